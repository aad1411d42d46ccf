//! The files of a model and the directory of their tensors.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;

use forge_kernels::DType;

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

/// An opened checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    tensors: BTreeMap<String, TensorEntry>,
}

impl Checkpoint {
    /// What was opened.
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }

    /// The directory of tensors.
    pub fn tensors(&self) -> &BTreeMap<String, TensorEntry> {
        &self.tensors
    }
}
