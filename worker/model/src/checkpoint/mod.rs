//! The files of a model and the directory of their tensors.
//!
//! What it is: it tells by content what a path holds, opens the files and joins their tensor directories. What it
//! is not: it interprets neither configuration nor names ([`crate::arch`], `weights` do).
//!
//! Invariant: every entry of the directory lies inside its file and has the bytes its type and shape need. (Of MXFP4 in a
//! folder those are in two tensors: an entry has the values, [`Checkpoint::exponents`] the rest.)

mod folder;
mod foreign;
mod mxfp4;
pub(crate) mod quantized;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use forge_kernels::{BlockScales, DType};

use crate::arch::families::Family;
use crate::error::{ModelError, Result};
use crate::gguf::{self, Metadata};
use crate::source::{self, SharedBytes, io_error};
pub use folder::weight_map;
use foreign::{Kind, first_bytes, kind};

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
    /// GGUF: one file, or the parts of a split one.
    Gguf,
    /// A Hugging Face folder, or one file of it: config.json beside safetensors or PyTorch files.
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

/// A tensor of unsigned bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct PackedBytes {
    shape: Vec<usize>,
    source: usize,
    bytes: Range<usize>,
}

/// An opened checkpoint.
pub struct Checkpoint {
    path: PathBuf,
    config: RawConfig,
    tensors: BTreeMap<String, TensorEntry>,
    scales: BTreeMap<String, BlockScales>,
    exponents: BTreeMap<String, PackedBytes>,
    sources: Vec<SharedBytes>,
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checkpoint").field("path", &self.path).field("tensors", &self.tensors.len()).finish_non_exhaustive()
    }
}

impl Checkpoint {
    /// Opens a GGUF file (any part of a split one), a folder with config.json and safetensors or PyTorch files, one such
    /// file with config.json beside it, or a folder with exactly one GGUF model.
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
                folder::open_folder(path, mode, family)
            } else {
                Self::open_gguf(&folder::only_gguf_in(path)?, mode)
            };
        }
        let start = first_bytes(path)?;
        match kind(&start) {
            Kind::Gguf => Self::open_gguf(path, mode),
            Kind::Safetensors | Kind::Zip => folder::open_file(path, mode, family),
            Kind::Other => Err(ModelError::NotAModel { path: path.to_owned(), reason: foreign::describe(&start) }),
        }
    }

    fn open_gguf(path: &Path, mode: LoadMode) -> Result<Checkpoint> {
        let mut directory = Directory::default();
        let bytes = source::open(path, mode)?;
        let file = gguf::parse((*bytes).as_ref())?;
        let metadata = match gguf::split::parts(path, &file.metadata)? {
            None => {
                directory.add_gguf(bytes, file.tensors)?;
                file.metadata
            }
            Some(parts) => gguf::split::open(&parts, mode, |bytes, tensors| directory.add_gguf(bytes, tensors))?,
        };
        Ok(Checkpoint::new(path, RawConfig::Gguf(metadata), directory))
    }

    fn new(path: &Path, config: RawConfig, directory: Directory) -> Self {
        let Directory { tensors, scales, packed: exponents, sources } = directory;
        Checkpoint { path: path.to_owned(), config, tensors, scales, exponents, sources }
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

    /// The folder with the files beside the weights (tokenizer, template) of a Hugging Face checkpoint.
    pub fn folder(&self) -> Option<&Path> {
        match self.config {
            RawConfig::Gguf(_) => None,
            RawConfig::HuggingFace { .. } if self.path.is_dir() => Some(&self.path),
            RawConfig::HuggingFace { .. } => Some(folder::parent(&self.path)),
        }
    }

    /// The directory of tensors.
    pub fn tensors(&self) -> &BTreeMap<String, TensorEntry> {
        &self.tensors
    }

    /// Tensors without those that lie where another does: names that share a PyTorch storage are counted once.
    pub fn distinct_tensors(&self) -> impl Iterator<Item = &TensorEntry> {
        let mut seen = std::collections::BTreeSet::new();
        self.tensors.values().filter(move |entry| seen.insert((entry.source, entry.bytes.start, entry.bytes.end)))
    }

    /// The scales of a matrix of 8-bit floats, for the whole tensor. They are not in the directory themselves.
    pub fn scales(&self, name: &str) -> Option<&BlockScales> {
        self.scales.get(name)
    }

    /// The exponents of an MXFP4 tensor whose entry has the values alone, 16 bytes a block: one byte a block, in their
    /// order. They are not in the directory themselves.
    pub fn exponents(&self, name: &str) -> Option<&[u8]> {
        let exponents = self.exponents.get(name)?;
        Some(&(*self.sources[exponents.source]).as_ref()[exponents.bytes.clone()])
    }

    /// Bytes of all weights as stored, those that share a storage counted once.
    pub fn stored_bytes(&self) -> usize {
        let values: usize = self.distinct_tensors().map(|entry| entry.bytes.len()).sum();
        values + self.exponents.values().map(|exponents| exponents.bytes.len()).sum::<usize>()
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

/// A directory being joined from files.
#[derive(Default)]
struct Directory {
    tensors: BTreeMap<String, TensorEntry>,
    scales: BTreeMap<String, BlockScales>,
    /// Tensors of unsigned bytes: as found, and once all files are joined, the exponents of the tensors by name.
    packed: BTreeMap<String, PackedBytes>,
    sources: Vec<SharedBytes>,
}

impl Directory {
    /// Adds a file and its tensors: name, type (none of unsigned bytes), shape and bytes of each.
    fn add(
        &mut self,
        bytes: SharedBytes,
        found: impl IntoIterator<Item = (String, Option<DType>, Vec<usize>, Range<usize>)>,
    ) -> Result<()> {
        let source = self.sources.len();
        self.sources.push(bytes);
        for (name, dtype, shape, bytes) in found {
            if self.file_of(&name).is_some() {
                let reason = format!("tensor {name:?} is in more than one of its files");
                return Err(ModelError::Malformed { format: "checkpoint".to_owned(), reason });
            }
            match dtype {
                Some(dtype) => drop(self.tensors.insert(name, TensorEntry { dtype, shape, source, bytes })),
                None => drop(self.packed.insert(name, PackedBytes { shape, source, bytes })),
            }
        }
        Ok(())
    }

    /// In which of the files a tensor is.
    fn file_of(&self, name: &str) -> Option<usize> {
        self.tensors.get(name).map(|entry| entry.source).or_else(|| self.packed.get(name).map(|packed| packed.source))
    }

    fn add_gguf(&mut self, bytes: SharedBytes, tensors: BTreeMap<String, gguf::GgufTensor>) -> Result<()> {
        self.add(bytes, tensors.into_iter().map(|(name, tensor)| (name, Some(tensor.dtype), tensor.shape, tensor.bytes)))
    }
}
