//! GGUF files, version 2 and 3, little endian: header, metadata and tensor directory.
//!
//! What it is: a strict parser of untrusted bytes. What it is not: it interprets no key but the alignment
//! ([`crate::arch::gguf`] does) and reads no weight.
//!
//! Invariant: every count, length and offset is checked against the file before it is used or allocated for;
//! a file that is not whole, or says something twice, is refused.

pub mod metadata;
mod reader;
pub(crate) mod split;
mod tokenizer;
mod types;

use std::collections::BTreeMap;
use std::ops::Range;

use forge_kernels::DType;

pub use metadata::{Array, Metadata, Value};
pub use tokenizer::GgufTokenizerData;

use crate::error::{ModelError, Result};
use reader::{Reader, malformed};

/// The first four bytes of a GGUF file.
pub const MAGIC: [u8; 4] = *b"GGUF";

const DEFAULT_ALIGNMENT: usize = 32;
const MAX_ALIGNMENT: usize = 1 << 16;
const MAX_DIMENSIONS: u32 = 4;
/// Key string, type and one byte of value.
const SMALLEST_ENTRY_BYTES: usize = 8 + 4 + 1;
/// Name, number of dimensions, one dimension, type, offset.
const SMALLEST_TENSOR_BYTES: usize = 8 + 4 + 8 + 4 + 8;

/// A parsed file, without its weights.
#[derive(Debug, Clone, PartialEq)]
pub struct GgufFile {
    /// Format version, 2 or 3.
    pub version: u32,
    /// Metadata.
    pub metadata: Metadata,
    /// Tensors by name.
    pub tensors: BTreeMap<String, GgufTensor>,
}

/// A tensor of the directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufTensor {
    /// Storage type.
    pub dtype: DType,
    /// Row-major shape, slowest dimension first (the file has them the other way round).
    pub shape: Vec<usize>,
    /// Bytes within the file.
    pub bytes: Range<usize>,
}

/// Parses a whole file; `bytes` is usually a mapping, of which only the header's pages are touched.
///
/// # Errors
/// [`ModelError::Malformed`] where the bytes are not a whole and consistent GGUF file;
/// [`ModelError::UnsupportedType`] where a tensor has a type without kernels.
pub fn parse(bytes: &[u8]) -> Result<GgufFile> {
    let mut reader = Reader::new(bytes);
    let version = read_version(&mut reader)?;
    let at = reader.position();
    let tensor_count = reader.count("tensors", SMALLEST_TENSOR_BYTES)?;
    let entry_count = reader.count("metadata entries", SMALLEST_ENTRY_BYTES)?;
    let metadata = Metadata::read(&mut reader, entry_count)?;
    // The first part of a split file may hold metadata alone.
    if tensor_count == 0 && metadata.optional_u32(split::COUNT)?.is_none_or(|parts| parts < 2) {
        return Err(malformed(format!("the file has no tensors (count at byte {at})")));
    }
    let alignment = alignment(&metadata)?;
    let mut tensors = BTreeMap::new();
    for _ in 0..tensor_count {
        let (name, tensor) = read_tensor(&mut reader, alignment)?;
        if tensors.contains_key(&name) {
            return Err(malformed(format!("tensor {name:?} is there twice")));
        }
        tensors.insert(name, tensor);
    }
    let data_start = reader.position().next_multiple_of(alignment);
    place(&mut tensors, data_start, bytes.len())?;
    Ok(GgufFile { version, metadata, tensors })
}

fn read_version(reader: &mut Reader<'_>) -> Result<u32> {
    let magic: [u8; 4] = reader.array()?;
    let big_endian = || ModelError::Unsupported {
        what: "a big-endian GGUF file".to_owned(),
        remedy: "convert it to little endian (gguf_convert_endian.py of llama.cpp)".to_owned(),
    };
    if magic == *b"FUGG" {
        return Err(big_endian());
    }
    if magic != MAGIC {
        return Err(malformed(format!("the file begins with {magic:02x?}, not with \"GGUF\"")));
    }
    match reader.number::<u32>()? {
        version @ (2 | 3) => Ok(version),
        version if version != 0 && version & 0xffff == 0 => Err(big_endian()),
        version => Err(ModelError::Unsupported {
            what: format!("GGUF version {version}"),
            remedy: "convert the model again with a current llama.cpp (version 3)".to_owned(),
        }),
    }
}

fn alignment(metadata: &Metadata) -> Result<usize> {
    match metadata.optional_u32("general.alignment")? {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(alignment) if alignment.is_power_of_two() && alignment as usize <= MAX_ALIGNMENT => Ok(alignment as usize),
        Some(other) => {
            Err(metadata::config_error("general.alignment", format!("is {other}, must be a power of two up to {MAX_ALIGNMENT}")))
        }
    }
}

/// Reads one entry of the directory; its byte range is still relative to the data's start.
fn read_tensor(reader: &mut Reader<'_>, alignment: usize) -> Result<(String, GgufTensor)> {
    let name = reader.string()?;
    let wrong = |reason: String| malformed(format!("tensor {name:?}: {reason}"));
    let dimensions: u32 = reader.number()?;
    if dimensions == 0 || dimensions > MAX_DIMENSIONS {
        return Err(wrong(format!("has {dimensions} dimensions, must be 1 to {MAX_DIMENSIONS}")));
    }
    let mut shape: Vec<u64> = reader.numbers(dimensions as usize)?;
    shape.reverse();
    let number: u32 = reader.number()?;
    let offset: u64 = reader.number()?;
    let dtype = types::storage_type(number).map_err(|found| ModelError::UnsupportedType {
        tensor: name.clone(),
        found,
        remedy: format!("take a file of {}", types::readable()),
    })?;
    let shape: Option<Vec<usize>> = shape.iter().map(|&size| usize::try_from(size).ok().filter(|&size| size > 0)).collect();
    let shape = shape.ok_or_else(|| wrong("has a dimension of size 0 or beyond this machine".to_owned()))?;
    let bytes = tensor_bytes(dtype, &shape)
        .ok_or_else(|| wrong(format!("shape {shape:?} is too large or no whole number of {dtype} blocks per row")))?;
    let start = usize::try_from(offset).map_err(|_| wrong(format!("offset {offset} is beyond this machine")))?;
    if !start.is_multiple_of(alignment) {
        return Err(wrong(format!("offset {start} is not a multiple of the alignment {alignment}")));
    }
    let end = start.checked_add(bytes).ok_or_else(|| wrong(format!("offset {start} plus {bytes} bytes overflows")))?;
    Ok((name, GgufTensor { dtype, shape, bytes: start..end }))
}

/// Bytes of a tensor; `None` where a row is no whole number of blocks or the size overflows.
pub(crate) fn tensor_bytes(dtype: DType, shape: &[usize]) -> Option<usize> {
    let (columns, rows) = shape.split_last()?;
    rows.iter().try_fold(dtype.row_bytes(*columns)?, |bytes, &rows| bytes.checked_mul(rows))
}

/// Makes the ranges absolute and checks that they lie in the file and do not overlap.
fn place(tensors: &mut BTreeMap<String, GgufTensor>, data_start: usize, file_bytes: usize) -> Result<()> {
    for (name, tensor) in tensors.iter_mut() {
        let placed = |offset: usize| offset.checked_add(data_start).filter(|&end| end <= file_bytes);
        let (Some(start), Some(end)) = (placed(tensor.bytes.start), placed(tensor.bytes.end)) else {
            return Err(malformed(format!(
                "truncated: tensor {name:?} ends at byte {}, the file has {file_bytes}",
                tensor.bytes.end.saturating_add(data_start)
            )));
        };
        tensor.bytes = start..end;
    }
    let mut order: Vec<(&String, &GgufTensor)> = tensors.iter().collect();
    order.sort_by_key(|(_, tensor)| tensor.bytes.start);
    for pair in order.windows(2) {
        if pair[0].1.bytes.end > pair[1].1.bytes.start {
            return Err(malformed(format!("tensors {:?} and {:?} overlap", pair[0].0, pair[1].0)));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
