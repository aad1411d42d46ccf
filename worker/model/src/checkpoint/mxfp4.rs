//! MXFP4 as Hugging Face folders store it (GPT-OSS): of a stack of matrices NAME the values are in `NAME_blocks`, two to a
//! byte, and the exponents, one of 32 values, in `NAME_scales`.
//!
//! What it is: it joins both to one tensor NAME of the directory. What it is not: it moves no bytes. Values lie in a block
//! in another order than products read them; `weights` lays the blocks out anew when they are loaded.
//!
//! Invariant: a joined tensor has three dimensions [matrices, outputs, inputs] and as many exponents as blocks.

use std::collections::BTreeMap;

use forge_kernels::DType;

use super::{PackedBytes, TensorEntry};
use crate::error::{ModelError, Result};
use crate::safetensors;

/// Bytes of a block's values, two to a byte.
const VALUE_BYTES: usize = 16;
const BLOCKS: &str = "_blocks";
const SCALES: &str = "_scales";

/// Joins the tensors of unsigned bytes into MXFP4 tensors of the directory, and gives the exponents of each by its name.
///
/// # Errors
/// Blocks without scales or the other way round, shapes that do not fit each other, bytes that are neither; by name.
pub(super) fn join(
    mut packed: BTreeMap<String, PackedBytes>,
    tensors: &mut BTreeMap<String, TensorEntry>,
) -> Result<BTreeMap<String, PackedBytes>> {
    let mut exponents = BTreeMap::new();
    while let Some((name, found)) = packed.pop_first() {
        let Some(base) = name.strip_suffix(BLOCKS) else {
            // Blocks come before their scales, so these have none.
            return Err(match name.strip_suffix(SCALES) {
                Some(base) => ModelError::MissingTensors { names: vec![format!("{base}{BLOCKS}")] },
                None => safetensors::unsupported(name, "U8".to_owned()),
            });
        };
        let scales_name = format!("{base}{SCALES}");
        let scales = packed.remove(&scales_name).ok_or_else(|| ModelError::MissingTensors { names: vec![scales_name.clone()] })?;
        let &[matrices, outputs, blocks, VALUE_BYTES] = &found.shape[..] else {
            return Err(ModelError::Unsupported {
                what: format!("{name} of shape {:?}", found.shape),
                remedy: format!("MXFP4 is read as stacks [experts, outputs, blocks, {VALUE_BYTES}]; take a GGUF file of this model"),
            });
        };
        let expected = vec![matrices, outputs, blocks];
        if scales.shape != expected {
            return Err(ModelError::TensorShape { name: scales_name, expected, actual: scales.shape });
        }
        let shape = vec![matrices, outputs, blocks * DType::MXFP4.block_elements()];
        let entry = TensorEntry { dtype: DType::MXFP4, shape, source: found.source, bytes: found.bytes };
        if tensors.insert(base.to_owned(), entry).is_some() {
            let reason = format!("tensor {base:?} is there both as it is and as {name:?}");
            return Err(ModelError::Malformed { format: "checkpoint".to_owned(), reason });
        }
        exponents.insert(base.to_owned(), scales);
    }
    Ok(exponents)
}
