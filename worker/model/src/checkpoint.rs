//! The files of a model and the directory of their tensors.
//!
//! What it is: it tells by content what a path holds, opens the files and joins their tensor directories. What it
//! is not: it interprets neither configuration nor names ([`crate::arch`], `weights` do).
//!
//! Invariant: every entry of the directory lies inside its file and has the bytes its type and shape need.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use forge_kernels::DType;

use crate::arch::families::{Family, Ignored};
use crate::error::{ModelError, Result};
use crate::gguf::{self, Metadata};
use crate::safetensors;
use crate::source::{self, SharedBytes, io_error};

/// How the bytes get into memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LoadMode {
    /// Mapped: pages are read when touched and shared between processes. The files must not be truncated
    /// while they are mapped: the operating system would end the process. Stores that replace files by rename
    /// are safe.
    #[default]
    Mmap,
    /// Read into memory at once; independent of the files afterwards.
    Eager,
}

/// What the files are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// One GGUF file.
    Gguf,
    /// A Hugging Face folder: config.json and safetensors.
    HuggingFace,
}

/// The configuration as it was found.
#[derive(Debug, Clone)]
pub enum RawConfig {
    /// A GGUF file's metadata.
    Gguf(Metadata),
    /// A folder's JSON files.
    HuggingFace {
        /// config.json.
        config: serde_json::Value,
        /// generation_config.json, where there is one.
        generation: Option<serde_json::Value>,
    },
}

/// Where a tensor lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorEntry {
    /// Storage type.
    pub dtype: DType,
    /// Row-major shape, slowest dimension first.
    pub shape: Vec<usize>,
    /// Which of the checkpoint's files.
    pub source: usize,
    /// Bytes within that file.
    pub bytes: Range<usize>,
}

impl TensorEntry {
    /// Number of values.
    pub fn elements(&self) -> usize {
        // Checked against the file when it was read, so it cannot overflow.
        self.shape.iter().product()
    }
}

/// An opened checkpoint.
pub struct Checkpoint {
    path: PathBuf,
    config: RawConfig,
    tensors: BTreeMap<String, TensorEntry>,
    sources: Vec<SharedBytes>,
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checkpoint").field("path", &self.path).field("tensors", &self.tensors.len()).finish_non_exhaustive()
    }
}

impl Checkpoint {
    /// Opens a GGUF file, a folder with config.json and safetensors, or a folder with exactly one GGUF file.
    ///
    /// # Errors
    /// [`ModelError::NotAModel`] where the path holds none of these, saying what was found; errors of the formats.
    pub fn open(path: impl AsRef<Path>, mode: LoadMode) -> Result<Checkpoint> {
        Self::open_as(path, mode, None)
    }

    /// As [`Checkpoint::open`], for a family chosen by the operator. (Which family it is does not matter to a GGUF file.)
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open_as(path: impl AsRef<Path>, mode: LoadMode, family: Option<&'static Family>) -> Result<Checkpoint> {
        let path = path.as_ref();
        if std::fs::metadata(path).map_err(io_error(path))?.is_dir() {
            return if path.join("config.json").is_file() {
                Self::open_folder(path, mode, family)
            } else {
                Self::open_gguf(&only_gguf_in(path)?, mode)
            };
        }
        match &first_bytes(path)? {
            magic if magic.starts_with(b"GGUF") || magic.starts_with(b"FUGG") => Self::open_gguf(path, mode),
            other => Err(ModelError::NotAModel { path: path.to_owned(), reason: describe(other) }),
        }
    }

    fn open_gguf(path: &Path, mode: LoadMode) -> Result<Checkpoint> {
        let bytes = source::open(path, mode)?;
        let file = gguf::parse((*bytes).as_ref())?;
        let entry = |tensor: gguf::GgufTensor| TensorEntry { dtype: tensor.dtype, shape: tensor.shape, source: 0, bytes: tensor.bytes };
        let tensors = file.tensors.into_iter().map(|(name, tensor)| (name, entry(tensor))).collect();
        Ok(Checkpoint { path: path.to_owned(), config: RawConfig::Gguf(file.metadata), tensors, sources: vec![bytes] })
    }

    fn open_folder(path: &Path, mode: LoadMode, family: Option<&'static Family>) -> Result<Checkpoint> {
        let config = source::read_json(&path.join("config.json"))?;
        let generation = path.join("generation_config.json");
        let generation = if generation.is_file() { Some(source::read_json(&generation)?) } else { None };
        // Buffers that some exporters save have types no decoder needs (boolean masks); the family knows them.
        let ignored = Ignored::new(family, &config);
        let files = shard_files(path)?;
        let mut sources = Vec::new();
        let mut tensors: BTreeMap<String, TensorEntry> = BTreeMap::new();
        for name in &files {
            let file = path.join(name);
            let bytes = source::open(&file, mode)?;
            let found =
                safetensors::parse_header((*bytes).as_ref(), |tensor| !ignored.has(tensor)).map_err(|error| in_file(name, error))?;
            for (name, tensor) in found {
                let entry = TensorEntry { dtype: tensor.dtype, shape: tensor.shape, source: sources.len(), bytes: tensor.bytes };
                if tensors.insert(name.clone(), entry).is_some() {
                    let reason = format!("tensor {name:?} is in more than one of its files");
                    return Err(ModelError::Malformed { format: "safetensors".to_owned(), reason });
                }
            }
            sources.push(bytes);
        }
        Ok(Checkpoint { path: path.to_owned(), config: RawConfig::HuggingFace { config, generation }, tensors, sources })
    }

    /// What was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the files are.
    pub fn format(&self) -> Format {
        match self.config {
            RawConfig::Gguf(_) => Format::Gguf,
            RawConfig::HuggingFace { .. } => Format::HuggingFace,
        }
    }

    /// The configuration as found.
    pub fn config(&self) -> &RawConfig {
        &self.config
    }

    /// The directory of tensors.
    pub fn tensors(&self) -> &BTreeMap<String, TensorEntry> {
        &self.tensors
    }

    /// The bytes of a tensor of this checkpoint.
    pub fn bytes(&self, entry: &TensorEntry) -> &[u8] {
        &(*self.sources[entry.source]).as_ref()[entry.bytes.clone()]
    }

    /// The file a tensor lies in.
    pub(crate) fn source(&self, entry: &TensorEntry) -> SharedBytes {
        SharedBytes::clone(&self.sources[entry.source])
    }
}

/// Puts the file's name into a format error.
fn in_file(name: &str, error: ModelError) -> ModelError {
    match error {
        ModelError::Malformed { format, reason } => ModelError::Malformed { format: format!("{format} file {name}"), reason },
        other => other,
    }
}

fn first_bytes(path: &Path) -> Result<Vec<u8>> {
    let mut start = Vec::new();
    File::open(path).and_then(|file| file.take(9).read_to_end(&mut start)).map_err(io_error(path))?;
    Ok(start)
}

/// What a file that is no model seems to be, and what to do.
fn describe(start: &[u8]) -> String {
    if start.len() == 9 && start[8] == b'{' && start[4..8] == [0; 4] {
        return "it is a bare safetensors file, which lacks the configuration; give the folder that holds config.json, \
                tokenizer.json and the safetensors"
            .to_owned();
    }
    if start.starts_with(b"PK\x03\x04") || start.starts_with(b"\x80\x02") {
        return "it looks like a PyTorch pickle, which can run code when read; convert it to safetensors".to_owned();
    }
    if start.is_empty() {
        return "the file is empty; download it again".to_owned();
    }
    let start = String::from_utf8_lossy(start);
    format!("it begins with {start:?}; a GGUF file begins with \"GGUF\", and a Hugging Face model is a folder with config.json")
}

fn file_names(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io_error(folder))? {
        let entry = entry.map_err(io_error(folder))?;
        if let Ok(name) = entry.file_name().into_string()
            && entry.path().is_file()
        {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// The one GGUF file of a folder without config.json.
fn only_gguf_in(folder: &Path) -> Result<PathBuf> {
    let mut found = Vec::new();
    for name in file_names(folder)? {
        let path = folder.join(name);
        if first_bytes(&path)?.starts_with(&gguf::MAGIC) {
            found.push(path);
        }
    }
    let reason = match found.len() {
        1 => return Ok(found.remove(0)),
        0 => "the folder has neither config.json nor a GGUF file".to_owned(),
        count => format!("the folder has {count} GGUF files and no config.json; give one of the files"),
    };
    Err(ModelError::NotAModel { path: folder.to_owned(), reason })
}

/// Names of the safetensors files of a folder, by its index where it has one.
fn shard_files(folder: &Path) -> Result<Vec<String>> {
    const SINGLE: &str = "model.safetensors";
    const INDEX: &str = "model.safetensors.index.json";
    if folder.join(SINGLE).is_file() {
        return Ok(vec![SINGLE.to_owned()]);
    }
    if folder.join(INDEX).is_file() {
        return indexed_files(&source::read_json(&folder.join(INDEX))?)
            .map_err(|reason| ModelError::Malformed { format: INDEX.to_owned(), reason });
    }
    let names = file_names(folder)?;
    let (mut found, others): (Vec<String>, Vec<String>) = names.into_iter().partition(|name| name.ends_with(".safetensors"));
    let reason = match found.len() {
        1 => return Ok(vec![found.remove(0)]),
        0 if others.iter().any(|name| name.ends_with(".bin") || name.ends_with(".pth")) => {
            "its weights are PyTorch pickles, which can run code when read; convert them to safetensors".to_owned()
        }
        0 => "the folder has config.json but no safetensors file; download it again with its weights".to_owned(),
        count => format!("the folder has {count} safetensors files but neither {SINGLE} nor {INDEX}; download the index"),
    };
    Err(ModelError::NotAModel { path: folder.to_owned(), reason })
}

fn indexed_files(index: &serde_json::Value) -> std::result::Result<Vec<String>, String> {
    let map = index.get("weight_map").and_then(serde_json::Value::as_object).ok_or("weight_map is missing or no object")?;
    let mut files = Vec::new();
    for (tensor, file) in map {
        let name = file.as_str().ok_or_else(|| format!("weight_map: the file of {tensor:?} is no string"))?;
        let plain = Path::new(name).file_name().is_some_and(|plain| plain == name) && !name.contains(['/', '\\']);
        if !plain {
            return Err(format!("weight_map: {name:?} is no plain file name"));
        }
        files.push(name.to_owned());
    }
    files.sort();
    files.dedup();
    if files.is_empty() {
        return Err("weight_map is empty".to_owned());
    }
    Ok(files)
}
