//! Decoders of real models, and the choices in their logits.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use forge_kernels::{CpuBackend, CpuOptions, KvDType};
use forge_model::{Decoder, DecoderOptions, LoadMode, Model};

/// The decoder the product serves with.
pub type CpuDecoder = Decoder<CpuBackend>;

/// Opens a GGUF file or a Hugging Face folder and builds a decoder for one sequence with the given KV type.
///
/// # Errors
/// What is wrong with the model, or with the sizes asked for.
pub fn open_decoder(path: &Path, max_model_len: usize, kv_dtype: KvDType) -> Result<CpuDecoder> {
    let model = Model::open(path, LoadMode::Mmap)?;
    let backend = CpuBackend::new(CpuOptions::default())?;
    let max_model_len = max_model_len.min(model.summary().context_length);
    let options = DecoderOptions { kv_dtype, max_logits_rows: 64, ..DecoderOptions::single_sequence(max_model_len) };
    model.decoder(Arc::new(backend), &options).with_context(|| format!("building a decoder of {}", path.display()))
}

/// Index of the largest value (the lower one of equals) and its distance to the second largest.
pub fn top_two(row: &[f32]) -> (u32, f32) {
    let mut best = (0, f32::NEG_INFINITY);
    let mut second = f32::NEG_INFINITY;
    for (index, &value) in row.iter().enumerate() {
        if value > best.1 {
            second = best.1;
            best = (index as u32, value);
        } else if value > second {
            second = value;
        }
    }
    (best.0, best.1 - second)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_logits_go_to_the_lower_id() {
        assert_eq!(top_two(&[0.5, 2.0, 2.0, 1.0]), (1, 0.0));
        assert_eq!(top_two(&[3.0, 2.0]), (0, 1.0));
    }
}
