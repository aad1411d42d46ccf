//! PyTorch files (`pytorch_model.bin`): a zip archive of raw storages and one pickle that says which tensor lies where.
//!
//! What it is: a reader that executes nothing. The pickle is interpreted by a machine that knows the few names a file of
//! weights has need of (`pickle`); any other name is refused before anything is made of it. What it is not: a reader
//! of training checkpoints, of TorchScript, or of files from before the zip format (torch 1.6).
//!
//! Invariant: storages are mapped where they lie and never copied; every entry, offset and size is checked against the
//! file before it is used.

mod archive;
mod calls;
mod element;
mod pickle;
mod state;

use std::collections::BTreeMap;
use std::ops::Range;

use forge_kernels::DType;

use crate::error::{ModelError, Result};
use archive::Archive;

/// What errors call the format.
const FORMAT: &str = "PyTorch file";
/// The pickle within the archive; it names every tensor in some 200 bytes.
const MAX_PICKLE_BYTES: usize = 16 << 20;

/// A tensor of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TorchTensor {
    /// Storage type.
    pub dtype: DType,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// Bytes within the file. Tensors that share a storage may have the same.
    pub bytes: Range<usize>,
}

/// An error of the format.
fn malformed(reason: impl Into<String>) -> ModelError {
    ModelError::Malformed { format: FORMAT.to_owned(), reason: reason.into() }
}

/// Reads the directory of a whole file; `bytes` is usually a mapping, of which only the archive's directory and the
/// pickle are touched. `wanted` says which tensors are needed: others may have any type and are left out.
///
/// # Errors
/// [`ModelError::ForeignCode`] for a pickle that names anything but tensors; [`ModelError::Malformed`] where archive,
/// pickle and storages do not fit each other; [`ModelError::Unsupported`] and [`ModelError::UnsupportedType`] for what is
/// no plain file of weights.
pub fn parse(bytes: &[u8], wanted: impl Fn(&str) -> bool) -> Result<BTreeMap<String, TorchTensor>> {
    let archive = Archive::read(bytes)?;
    let folder = pickle_folder(&archive)?;
    let entry = |name: &str| archive.get(&format!("{folder}/{name}"));
    if archive.has(&format!("{folder}/constants.pkl")) || archive.names().any(|name| name.starts_with(&format!("{folder}/code/"))) {
        return Err(ModelError::Unsupported {
            what: "a TorchScript archive, which holds a program beside its weights,".to_owned(),
            remedy: "take the checkpoint it was traced from, saved as safetensors".to_owned(),
        });
    }
    if entry("byteorder")?.is_some_and(|range| bytes[range] == *b"big") {
        return Err(ModelError::Unsupported {
            what: "a PyTorch file of a big-endian machine".to_owned(),
            remedy: "load it there and save it as safetensors".to_owned(),
        });
    }
    let pickle = entry("data.pkl")?.map(|range| &bytes[range]).unwrap_or_default();
    if pickle.len() > MAX_PICKLE_BYTES {
        return Err(malformed(format!("its pickle has {} bytes; the most is {MAX_PICKLE_BYTES}", pickle.len())));
    }
    state::tensors(&pickle::run(pickle)?, |key| entry(&format!("data/{key}")), wanted)
}

/// The folder that the writer put everything into.
fn pickle_folder<'a>(archive: &Archive<'a>) -> Result<&'a str> {
    let mut folders = archive.names().filter_map(|name| name.strip_suffix("/data.pkl")).filter(|folder| !folder.contains('/'));
    match (folders.next(), folders.next()) {
        (Some(folder), None) => Ok(folder),
        (Some(_), Some(_)) => Err(malformed("the archive holds more than one data.pkl")),
        (None, _) => Err(malformed("it is a zip archive without data.pkl, so torch.save did not write it")),
    }
}
