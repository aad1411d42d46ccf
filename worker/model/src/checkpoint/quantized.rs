//! Schemes by which Hugging Face checkpoints are quantized: 8-bit floats with scales and MXFP4 ([`super::mxfp4`]) are read,
//! the rest is recognized and refused with the conversion to use.
//!
//! A scheme is told by `quantization_config`, and where that is missing by the names of tensors that only it has.

use std::collections::BTreeMap;
use std::path::Path;

use forge_kernels::{BlockScales, DType, dequantize};
use serde_json::Value;

use super::TensorEntry;
use crate::error::{ModelError, Result};

const FILE: &str = "config.json";
const UNQUANTIZED: &str = "take the unquantized checkpoint it was made from (its model card names it), or a GGUF file of it";
const DEQUANTIZE: &str = "load it with transformers, call model.dequantize() and save_pretrained(), or take the unquantized checkpoint";

/// 8-bit floats (e4m3), scaled per matrix, per row or per block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Fp8 {
    /// Rows and columns that share a scale, where scales have two dimensions.
    block: Option<[usize; 2]>,
    /// Whether a matrix of 8-bit floats must have scales.
    scaled: bool,
}

/// What config.json says of quantization beside what tensors tell themselves: of 8-bit floats.
///
/// # Errors
/// [`ModelError::Unsupported`] for every other scheme, with the conversion to use.
pub(crate) fn scheme(config: &Value) -> Result<Option<Fp8>> {
    let Some(quantization) = config.get("quantization_config").filter(|value| !value.is_null()) else { return Ok(None) };
    let text = |key: &str| quantization.get(key).and_then(Value::as_str);
    let method = match text("quant_method") {
        Some(method) => method,
        // Early checkpoints of bitsandbytes name no method.
        None if quantization.get("load_in_4bit").is_some() || quantization.get("load_in_8bit").is_some() => "bitsandbytes",
        None => "unknown",
    };
    let refuse = |what: String, remedy: &str| {
        Err(ModelError::Unsupported { what: format!("{FILE}: quantization_config: {what}"), remedy: remedy.to_owned() })
    };
    match method {
        "fp8" | "fbgemm_fp8" => {
            if let Some(format) = text("fmt").filter(|&format| format != "e4m3") {
                return refuse(format!("8-bit floats of format `{format}`"), UNQUANTIZED);
            }
            let block = quantization.get("weight_block_size").filter(|value| !value.is_null()).map(block_size).transpose()?;
            Ok(Some(Fp8 { block, scaled: true }))
        }
        "compressed-tensors" => match compressed_floats(quantization)? {
            Some(fp8) => Ok(Some(fp8)),
            None => refuse(format!("`compressed-tensors` of format `{}`", text("format").unwrap_or("unknown")), UNQUANTIZED),
        },
        // Its tensors have names and types of their own.
        "mxfp4" => Ok(None),
        "gptq" | "awq" => refuse(format!("a checkpoint quantized by `{method}`"), UNQUANTIZED),
        "bitsandbytes" => refuse("a checkpoint quantized by `bitsandbytes`".to_owned(), DEQUANTIZE),
        other => refuse(format!("a checkpoint quantized by `{other}`"), DEQUANTIZE),
    }
}

fn block_size(value: &Value) -> Result<[usize; 2]> {
    let sizes = value.as_array().map(|sizes| sizes.iter().filter_map(Value::as_u64).collect::<Vec<_>>());
    match sizes.as_deref() {
        Some(&[rows, columns]) if rows > 0 && columns > 0 && rows <= 1 << 20 && columns <= 1 << 20 => Ok([rows as usize, columns as usize]),
        _ => Err(ModelError::Config {
            file: FILE.to_owned(),
            key: "quantization_config.weight_block_size".to_owned(),
            reason: format!("is {value}, must be two whole numbers above 0"),
        }),
    }
}

/// compressed-tensors whose weights are all 8-bit floats; `None` where anything else is compressed or quantized.
fn compressed_floats(quantization: &Value) -> Result<Option<Fp8>> {
    let absent =
        |key: &str| quantization.get(key).is_none_or(|value| value.is_null() || value.as_object().is_some_and(serde_json::Map::is_empty));
    let Some(groups) = quantization.get("config_groups").and_then(Value::as_object) else { return Ok(None) };
    if groups.is_empty() || !absent("sparsity_config") || !absent("kv_cache_scheme") {
        return Ok(None);
    }
    let mut block = None;
    for group in groups.values() {
        let Some(weights) = group.get("weights") else { return Ok(None) };
        let is = |key: &str, wanted: &Value| weights.get(key) == Some(wanted);
        if !is("num_bits", &8.into()) || !is("type", &"float".into()) {
            return Ok(None);
        }
        if is("strategy", &"block".into()) {
            block = weights.get("block_structure").map(block_size).transpose()?;
        }
    }
    Ok(Some(Fp8 { block, scaled: true }))
}

/// The scheme that a tensor of this name belongs to, where only one that is not read has such.
pub(super) fn packed(name: &str) -> Option<ModelError> {
    let ends = |ending: &str| name.ends_with(ending);
    let (scheme, remedy) = if ends(".qweight") || ends(".qzeros") || ends(".g_idx") {
        ("GPTQ or AWQ", UNQUANTIZED)
    } else if ends(".absmax") || ends(".quant_map") || name.contains(".quant_state.") || ends(".SCB") {
        ("bitsandbytes", DEQUANTIZE)
    } else if ends(".weight_packed") || ends(".weight_shape") {
        ("compressed-tensors", UNQUANTIZED)
    } else {
        return None;
    };
    Some(ModelError::Unsupported { what: format!("tensor {name} of a checkpoint quantized by {scheme}"), remedy: remedy.to_owned() })
}

/// Takes the scales of 8-bit floats out of the directory: per matrix, by its name. Those of activations go too, since
/// activations are not rounded here.
///
/// # Errors
/// Scales that are missing, not finite, or do not fit their matrix; by name.
pub(super) fn take_scales<'a>(
    path: &Path,
    tensors: &mut BTreeMap<String, TensorEntry>,
    bytes: impl Fn(&TensorEntry) -> &'a [u8],
    fp8: Fp8,
) -> Result<BTreeMap<String, BlockScales>> {
    let matrices: Vec<(String, Vec<usize>)> = tensors
        .iter()
        .filter(|(name, entry)| entry.dtype == DType::F8E4M3 && (name.ends_with(".weight") || entry.shape.len() > 2))
        .map(|(name, entry)| (name.clone(), entry.shape.clone()))
        .collect();
    let mut scales = BTreeMap::new();
    for (name, shape) in matrices {
        let base = name.trim_end_matches("weight");
        for activations in ["input_scale", "activation_scale"] {
            tensors.remove(&format!("{base}{activations}"));
        }
        let found = ["_scale_inv", "_scale"].iter().find_map(|ending| tensors.remove_entry(&format!("{name}{ending}")));
        match found {
            Some((scale_name, entry)) => {
                let values = read_finite(path, &scale_name, &entry, bytes(&entry))?;
                scales.insert(name, arrange(&scale_name, &entry.shape, values, &shape, fp8.block)?);
            }
            None if fp8.scaled => return Err(ModelError::MissingTensors { names: vec![format!("{name}_scale_inv")] }),
            None => {}
        }
    }
    Ok(scales)
}

fn read_finite(path: &Path, name: &str, entry: &TensorEntry, bytes: &[u8]) -> Result<Vec<f32>> {
    if !matches!(entry.dtype, DType::F32 | DType::F16 | DType::BF16) {
        return Err(ModelError::UnsupportedType {
            tensor: name.to_owned(),
            found: entry.dtype.to_string(),
            remedy: "scales of 8-bit floats must be F32, F16 or BF16".to_owned(),
        });
    }
    let mut values = vec![0.0; entry.elements()];
    dequantize(entry.dtype, bytes, &mut values);
    match values.iter().position(|value| !value.is_finite()) {
        Some(index) => Err(ModelError::NonFinite { path: path.to_owned(), tensor: name.to_owned(), index }),
        None => Ok(values),
    }
}

fn arrange(name: &str, scales: &[usize], values: Vec<f32>, matrix: &[usize], block: Option<[usize; 2]>) -> Result<BlockScales> {
    let misfit = |expected: Vec<usize>| ModelError::TensorShape { name: name.to_owned(), expected, actual: scales.to_vec() };
    let &[rows, columns] = matrix else {
        return Err(ModelError::Unsupported {
            what: format!("{name}: scales of 8-bit floats of {matrix:?} values in one tensor"),
            remedy: "8-bit floats with scales are read where each expert has matrices of its own; take such a checkpoint, an unquantized \
                     one or a GGUF file"
                .to_owned(),
        });
    };
    if values.len() == 1 {
        return Ok(BlockScales::whole(values[0]));
    }
    let one = |block_rows, block_columns, blocks_per_row| BlockScales {
        block_rows,
        block_columns,
        blocks_per_row,
        first_row: 0,
        first_column: 0,
        values: values.into(),
    };
    match (scales, block) {
        (&[count] | &[count, 1], _) if count == rows => Ok(one(1, usize::MAX, 1)),
        (&[down, across], Some([block_rows, block_columns])) => {
            let expected = [rows.div_ceil(block_rows), columns.div_ceil(block_columns)];
            if [down, across] != expected {
                return Err(misfit(expected.to_vec()));
            }
            Ok(one(block_rows, block_columns, across))
        }
        (&[_, _], None) => Err(ModelError::Config {
            file: FILE.to_owned(),
            key: "quantization_config.weight_block_size".to_owned(),
            reason: format!("is missing; {name} has scales per block"),
        }),
        _ => Err(misfit(vec![rows, 1])),
    }
}
