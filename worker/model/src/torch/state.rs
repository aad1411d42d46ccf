//! From the dictionary of a pickle to a directory of tensors, checked against the archive's storages.

use std::collections::BTreeMap;
use std::ops::Range;

use super::pickle::{Tensor, Unpickled, Value};
use super::{TorchTensor, malformed};
use crate::error::{ModelError, Result};
use crate::gguf::tensor_bytes;

/// Checks every wanted tensor; `storage` gives the bytes of a storage by its key.
///
/// # Errors
/// By the tensor's name: what is no tensor, has a type that is not read, or does not lie in its storage.
pub(super) fn tensors(
    unpickled: &Unpickled<'_>,
    storage: impl Fn(&str) -> Result<Option<Range<usize>>>,
    wanted: impl Fn(&str) -> bool,
) -> Result<BTreeMap<String, TorchTensor>> {
    let mut tensors = BTreeMap::new();
    for &(key, value) in &unpickled.entries {
        let Value::Text(name) = key else {
            return Err(malformed("a key of its dictionary is no text"));
        };
        if !wanted(name) {
            continue;
        }
        let Value::Tensor(index) = value else { return Err(no_tensor(name, value)) };
        let tensor = place(name, &unpickled.tensors[index as usize], &storage)?;
        if tensors.insert(name.to_owned(), tensor).is_some() {
            return Err(malformed(format!("tensor {name:?} is there twice")));
        }
    }
    if tensors.is_empty() {
        return Err(malformed("its dictionary holds no tensors"));
    }
    Ok(tensors)
}

fn no_tensor(name: &str, value: Value<'_>) -> ModelError {
    let remedy = "export the weights alone (model.state_dict()), best as safetensors".to_owned();
    match value {
        Value::Dict(_) => ModelError::Unsupported {
            what: format!("a PyTorch file with a dictionary in {name:?} (a training checkpoint, whose weights are further inside)"),
            remedy,
        },
        _ => ModelError::Unsupported { what: format!("a PyTorch file with {name:?}, which is no tensor,"), remedy },
    }
}

fn place(name: &str, tensor: &Tensor<'_>, storage: impl Fn(&str) -> Result<Option<Range<usize>>>) -> Result<TorchTensor> {
    let wrong = |reason: String| malformed(format!("tensor {name:?} {reason}"));
    let Tensor { element, storage: stored, .. } = *tensor;
    let dtype = element.dtype.ok_or_else(|| ModelError::UnsupportedType {
        tensor: name.to_owned(),
        found: element.name.to_owned(),
        remedy: "take a checkpoint stored as float32, float16, bfloat16 or float8_e4m3fn, or a GGUF file".to_owned(),
    })?;
    let range = storage(stored.key)?.ok_or_else(|| wrong(format!("is in storage {:?}, which the archive lacks", stored.key)))?;
    if stored.count.checked_mul(stored.element.bytes) != Some(range.len()) {
        let said = format!("{} values of {} bytes", stored.count, stored.element.bytes);
        return Err(wrong(format!("is in storage {:?}, which should have {said} and has {} bytes", stored.key, range.len())));
    }
    if !is_contiguous(&tensor.shape, &tensor.strides) {
        return Err(ModelError::Unsupported {
            what: format!("tensor {name} of shape {:?} with strides {:?} (a view, not stored row by row)", tensor.shape, tensor.strides),
            remedy: "save it with .contiguous(), best as safetensors".to_owned(),
        });
    }
    let bytes = tensor_bytes(dtype, &tensor.shape).filter(|_| !tensor.shape.contains(&0));
    let bytes = bytes.ok_or_else(|| wrong(format!("has a shape that is empty or too large: {:?}", tensor.shape)))?;
    let start = tensor.offset.checked_mul(element.bytes).and_then(|offset| offset.checked_add(range.start));
    match start.and_then(|start| Some(start..start.checked_add(bytes)?)) {
        Some(place) if place.end <= range.end => Ok(TorchTensor { dtype, shape: tensor.shape.clone(), bytes: place }),
        _ => Err(wrong(format!("has {bytes} bytes from value {} on, more than its storage of {}", tensor.offset, range.len()))),
    }
}

/// Whether rows follow each other without gaps; what a dimension of one element steps over does not matter.
fn is_contiguous(shape: &[usize], strides: &[usize]) -> bool {
    let mut expected = 1usize;
    shape.iter().zip(strides).rev().all(|(&size, &stride)| {
        let right = size == 1 || stride == expected;
        expected = expected.saturating_mul(size);
        right
    })
}
