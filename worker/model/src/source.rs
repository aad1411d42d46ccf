//! A file's bytes: mapped, or read into aligned memory.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;

use crate::checkpoint::LoadMode;
use crate::error::{ModelError, Result};

/// Bytes shared by all weights that lie in them.
pub(crate) type SharedBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// A cache line, so that rows of a file read eagerly begin as aligned as in the file.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Owned bytes, aligned to a cache line.
struct AlignedBytes {
    lines: Vec<Line>,
    length: usize,
}

impl AsRef<[u8]> for AlignedBytes {
    fn as_ref(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.lines)[..self.length]
    }
}

/// An error of the operating system on a path.
pub(crate) fn io_error(path: &Path) -> impl FnOnce(std::io::Error) -> ModelError + '_ {
    move |source| ModelError::Io { path: path.to_owned(), source }
}

/// Opens a file in the given mode.
pub(crate) fn open(path: &Path, mode: LoadMode) -> Result<SharedBytes> {
    let mut file = File::open(path).map_err(io_error(path))?;
    let length = file.metadata().map_err(io_error(path))?.len();
    if length == 0 {
        return Err(ModelError::NotAModel { path: path.to_owned(), reason: "the file is empty; download it again".to_owned() });
    }
    match mode {
        LoadMode::Mmap => {
            // SAFETY: the mapping is read-only and private. That nobody truncates or rewrites the file meanwhile is
            // the caller's promise (`LoadMode::Mmap`): the store replaces files by rename only.
            let map = unsafe { Mmap::map(&file) }.map_err(io_error(path))?;
            Ok(Arc::new(map))
        }
        LoadMode::Eager => {
            let too_large = || io_error(path)(std::io::Error::from(std::io::ErrorKind::OutOfMemory));
            let length = usize::try_from(length).map_err(|_| too_large())?;
            let count = length.div_ceil(size_of::<Line>());
            let mut lines = Vec::new();
            lines.try_reserve_exact(count).map_err(|_| too_large())?;
            lines.resize(count, Line([0; 64]));
            file.read_exact(&mut bytemuck::cast_slice_mut(&mut lines)[..length]).map_err(io_error(path))?;
            Ok(Arc::new(AlignedBytes { lines, length }))
        }
    }
}

/// Reads a JSON file of bounded size.
pub(crate) fn read_json(path: &Path) -> Result<serde_json::Value> {
    const MAX_JSON_BYTES: u64 = 64 << 20;
    let name = path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned());
    let file = File::open(path).map_err(io_error(path))?;
    let mut text = Vec::new();
    file.take(MAX_JSON_BYTES + 1).read_to_end(&mut text).map_err(io_error(path))?;
    if text.len() as u64 > MAX_JSON_BYTES {
        return Err(ModelError::Malformed { format: name, reason: format!("is larger than {MAX_JSON_BYTES} bytes") });
    }
    serde_json::from_slice(&text).map_err(|error| ModelError::Malformed { format: name, reason: error.to_string() })
}
