//! Logits of every position of a text that is already known (teacher forcing).

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use forge_kernels::{CpuBackend, CpuOptions, KvDType, SequenceSlice};
use forge_model::{Decoder, DecoderOptions, LoadMode, Model, StepModel, StepPlan};

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

/// Logits after each of `tokens` from row `first` on: [tokens.len() − first, vocab_size], row-major.
///
/// The tokens form one sequence from position 0 and are computed in chunks of at most `chunk` rows.
///
/// # Errors
/// A sequence longer than the model was built for, ids outside the vocabulary, a failed step.
pub fn teacher_forced_logits(model: &mut dyn StepModel, tokens: &[u32], first: usize, chunk: usize) -> Result<Vec<f32>> {
    let info = model.info().clone();
    ensure!(chunk > 0 && chunk <= info.max_step_rows, "a chunk must have 1 to {} rows", info.max_step_rows);
    ensure!(tokens.len() <= info.max_model_len, "{} tokens do not fit {}", tokens.len(), info.max_model_len);
    let blocks = tokens.len().div_ceil(info.block_size);
    ensure!(blocks <= info.kv_blocks, "{blocks} blocks are needed, {} are there", info.kv_blocks);
    let mut all = Vec::new();
    let mut logits = Vec::new();
    for (step, start) in (0..tokens.len()).step_by(chunk).enumerate() {
        let end = (start + chunk).min(tokens.len());
        let plan = one_sequence_plan(step as u64, &tokens[start..end], start, blocks, first);
        model.step(&plan, &mut logits)?;
        all.extend_from_slice(&logits[..plan.logits_rows.len() * info.vocab_size]);
    }
    Ok(all)
}

/// A step of one sequence that lies in blocks 0, 1, 2, …, so that slots equal positions.
fn one_sequence_plan(step: u64, tokens: &[u32], start: usize, blocks: usize, first: usize) -> StepPlan {
    let positions: Vec<u32> = (start..start + tokens.len()).map(|position| position as u32).collect();
    let wanted = (0..tokens.len()).filter(|row| start + row >= first);
    StepPlan {
        step,
        tokens: tokens.to_vec(),
        slots: positions.clone(),
        sequences: vec![SequenceSlice {
            row_start: 0,
            row_count: tokens.len() as u32,
            first_position: start as u32,
            table_start: 0,
            table_len: blocks as u32,
        }],
        block_tables: (0..blocks as u32).collect(),
        logits_rows: wanted.map(|row| row as u32).collect(),
        positions,
        ..StepPlan::default()
    }
}

/// Natural logarithms of the softmax of one row, in double precision.
pub fn log_softmax(row: &[f32]) -> Vec<f64> {
    let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    let sum: f64 = row.iter().map(|&value| (value as f64 - largest).exp()).sum();
    row.iter().map(|&value| value as f64 - largest - sum.ln()).collect()
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
    fn the_softmax_sums_to_one() {
        let logprobs = log_softmax(&[1.0, 2.0, 1000.0, 999.0]);
        let sum: f64 = logprobs.iter().map(|value| value.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-12, "{sum}");
        assert!((logprobs[2] - logprobs[3] - 1.0).abs() < 1e-12);
    }

    #[test]
    fn equal_logits_go_to_the_lower_id() {
        assert_eq!(top_two(&[0.5, 2.0, 2.0, 1.0]), (1, 0.0));
        assert_eq!(top_two(&[3.0, 2.0]), (0, 1.0));
    }

    #[test]
    fn a_plan_covers_its_chunk() {
        let plan = one_sequence_plan(2, &[7, 8, 9], 4, 2, 5);
        assert_eq!((plan.positions.as_slice(), plan.slots.as_slice()), ([4, 5, 6].as_slice(), [4, 5, 6].as_slice()));
        assert_eq!(plan.logits_rows, [1, 2]);
        assert_eq!(plan.block_tables, [0, 1]);
    }
}
