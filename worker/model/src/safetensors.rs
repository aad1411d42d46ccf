//! The header of a safetensors file, parsed by the format's own library, and the storage types we load of it.

use std::collections::BTreeMap;
use std::ops::Range;

use forge_kernels::DType;
use safetensors::{Dtype, SafeTensors};

use crate::error::{ModelError, Result};
use crate::gguf::tensor_bytes;

/// A tensor of the header: type, row-major shape, bytes within the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SafetensorsTensor {
    /// Storage type; `None` of unsigned bytes, in which quantized checkpoints pack what their names explain.
    pub dtype: Option<DType>,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// Bytes within the file.
    pub bytes: Range<usize>,
}

/// Parses the header of a whole file; `bytes` is usually a mapping, of which only the header's pages are touched.
/// `wanted` says which tensors are needed: others may have any type and are left out.
///
/// # Errors
/// [`ModelError::Malformed`] where header and file do not fit each other; [`ModelError::UnsupportedType`] where a
/// wanted tensor is not F32, F16, BF16, F8_E4M3 or U8.
pub fn parse_header(bytes: &[u8], wanted: impl Fn(&str) -> bool) -> Result<BTreeMap<String, SafetensorsTensor>> {
    let malformed = |reason: String| ModelError::Malformed { format: "safetensors".to_owned(), reason };
    if bytes.starts_with(b"version https://git-lfs") {
        return Err(malformed("it is a Git LFS pointer, not the file it stands for; run `git lfs pull` in its repository".to_owned()));
    }
    // The library bounds the header, and checks that offsets follow each other without gaps up to the file's end.
    let (header_bytes, metadata) = SafeTensors::read_metadata(bytes)
        .map_err(|error| malformed(format!("{error}; the file is damaged or incomplete: download it again")))?;
    let data_start = header_bytes + size_of::<u64>();
    let mut tensors = BTreeMap::new();
    for (name, info) in metadata.tensors() {
        if !wanted(&name) {
            continue;
        }
        let dtype = match info.dtype {
            Dtype::F32 => Some(DType::F32),
            Dtype::F16 => Some(DType::F16),
            Dtype::BF16 => Some(DType::BF16),
            Dtype::F8_E4M3 => Some(DType::F8E4M3),
            Dtype::U8 => None,
            other => return Err(unsupported(name, format!("{other:?}"))),
        };
        let (start, end) = info.data_offsets;
        // A number alone has no dimensions.
        let shape: &[usize] = if info.shape.is_empty() { &[1] } else { &info.shape };
        let needed = match dtype {
            Some(dtype) => tensor_bytes(dtype, shape),
            None => shape.iter().try_fold(1_usize, |bytes, &size| bytes.checked_mul(size)),
        };
        if shape.contains(&0) || needed != end.checked_sub(start) {
            return Err(malformed(format!("tensor {name:?} of {:?} {:?} does not fit its {start}..{end} bytes", info.dtype, info.shape)));
        }
        let range = data_start + start..data_start + end;
        if range.end > bytes.len() {
            return Err(malformed(format!("tensor {name:?} ends beyond the file")));
        }
        tensors.insert(name, SafetensorsTensor { dtype, shape: info.shape.clone(), bytes: range });
    }
    Ok(tensors)
}

/// A type that no weights have which are read.
pub(crate) fn unsupported(tensor: String, found: String) -> ModelError {
    let remedy = "take a checkpoint stored as F32, F16, BF16 or F8_E4M3, or a GGUF file".to_owned();
    ModelError::UnsupportedType { tensor, found, remedy }
}
