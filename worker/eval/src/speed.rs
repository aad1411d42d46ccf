//! Speed of a model without server or scheduler: tokens per second of prefill and decode.
//!
//! Prefill computes one prompt; decode goes on token by token, with one sequence and with a batch. Several rounds
//! alternate the three, so that a machine that changes its pace meets all of them alike; the median counts.

use std::ops::Range;
use std::time::Instant;

use forge_kernels::SequenceSlice;
use forge_model::{DecoderOptions, StepModel, StepModelInfo, StepPlan};
use serde::Serialize;

use crate::statistics::quantile;
use crate::{EvalError, Result};

/// Decode steps of the batch, at most: its context stays short, so that products are measured and not attention.
const BATCH_STEPS_MAX: usize = 64;

/// What to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SpeedSizes {
    /// Tokens of the prompt.
    pub prefill: usize,
    /// Tokens decoded after it.
    pub decode: usize,
    /// Sequences of the batch.
    pub batch: usize,
    /// Times everything is measured.
    pub rounds: usize,
}

impl SpeedSizes {
    /// Refuses zeros and sequences beyond a model's context.
    ///
    /// # Errors
    /// [`EvalError::Option`].
    pub fn check(&self, context_length: usize) -> Result<()> {
        for (option, value) in [("prefill", self.prefill), ("decode", self.decode), ("batch", self.batch), ("rounds", self.rounds)] {
            if value == 0 {
                return Err(EvalError::Option { option, value, reason: "must be at least 1".to_owned() });
            }
            // Rows, positions and slots are counted in 32 bits; with less, no product of two sizes overflows.
            if u32::try_from(value).is_err() {
                return Err(EvalError::Option { option, value, reason: "must be below 2^32".to_owned() });
            }
        }
        if self.longest() > context_length {
            let reason = format!("with {} decoded tokens it is beyond the model's context of {context_length}", self.decode);
            return Err(EvalError::Option { option: "prefill", value: self.prefill, reason });
        }
        Ok(())
    }

    /// Tokens of the longest sequence: one step of warm-up comes before those that are timed.
    pub fn longest(&self) -> usize {
        self.prefill + self.decode + 1
    }

    fn batch_steps(&self) -> usize {
        self.decode.min(BATCH_STEPS_MAX)
    }

    fn blocks_each(&self, block_size: usize) -> usize {
        self.longest().div_ceil(block_size)
    }

    /// `base` with the sizes that measuring needs. A prompt is computed in steps of at most `step_rows` rows.
    pub fn decoder_options(&self, base: DecoderOptions, step_rows: usize) -> DecoderOptions {
        // The batch decodes a few tokens each; one sequence holds the whole prompt.
        let batch_blocks = self.batch * (self.batch_steps() + 2).div_ceil(base.block_size);
        DecoderOptions {
            max_model_len: self.longest(),
            kv_blocks: self.blocks_each(base.block_size).max(batch_blocks),
            max_step_rows: self.prefill.min(step_rows).max(self.batch),
            max_logits_rows: self.batch,
            ..base
        }
    }
}

/// A rate over several rounds, in tokens per second.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Rate {
    /// Median of the rounds.
    pub median: f64,
    /// Best round.
    pub best: f64,
    /// Every round.
    pub rounds: Vec<f64>,
}

impl Rate {
    fn of(rounds: Vec<f64>) -> Self {
        let mut sorted = rounds.clone();
        sorted.sort_by(f64::total_cmp);
        Rate { median: quantile(&sorted, 0.5).unwrap_or(0.0), best: quantile(&sorted, 1.0).unwrap_or(0.0), rounds }
    }
}

/// How fast a model is.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Speed {
    /// Prompt tokens.
    pub prefill_tokens_per_s: Rate,
    /// Tokens of one sequence after that prompt.
    pub decode_tokens_per_s: Rate,
    /// Tokens of all sequences of the batch together.
    pub batch_decode_tokens_per_s: Rate,
}

/// Measures a model built with [`SpeedSizes::decoder_options`]. A round nobody counts comes first: it brings weights
/// and caches into memory. `progress` hears how many rounds are done.
///
/// # Errors
/// A failed step.
pub fn measure_speed(model: &mut dyn StepModel, sizes: &SpeedSizes, mut progress: impl FnMut(usize)) -> Result<Speed> {
    let mut rates = (Vec::new(), Vec::new(), Vec::new());
    round(model, &SpeedSizes { decode: 1, ..*sizes })?;
    for done in 0..sizes.rounds {
        progress(done);
        let (prefill, decode, batch) = round(model, sizes)?;
        rates.0.push(prefill);
        rates.1.push(decode);
        rates.2.push(batch);
    }
    progress(sizes.rounds);
    Ok(Speed {
        prefill_tokens_per_s: Rate::of(rates.0),
        decode_tokens_per_s: Rate::of(rates.1),
        batch_decode_tokens_per_s: Rate::of(rates.2),
    })
}

/// Rates of prefill, decode and batch.
fn round(model: &mut dyn StepModel, sizes: &SpeedSizes) -> Result<(f64, f64, f64)> {
    let mut logits = Vec::new();
    let prefill = Instant::now();
    let pool = Pool::of(model.info(), 1);
    let step_rows = model.info().max_step_rows;
    for start in (0..sizes.prefill).step_by(step_rows) {
        let rows = step_rows.min(sizes.prefill - start);
        model.step(&pool.plan(0..1, start, rows), &mut logits)?;
    }
    let prefill = sizes.prefill as f64 / prefill.elapsed().as_secs_f64();
    let decode = decode_rate(model, 1, sizes.prefill, sizes.decode)?;
    let batch = decode_rate(model, sizes.batch, 0, sizes.batch_steps())?;
    Ok((prefill, decode, batch))
}

/// Tokens per second over `steps` decode steps of `sequences` sequences that already hold `context` tokens. Stages of a
/// model that has several work at once, each on its part of the sequences, as an engine has it.
fn decode_rate(model: &mut dyn StepModel, sequences: usize, context: usize, steps: usize) -> Result<f64> {
    let pool = Pool::of(model.info(), sequences);
    let mut logits = Vec::new();
    model.step(&pool.plan(0..sequences, context, 1), &mut logits)?;
    let start = Instant::now();
    match model.pipeline() {
        None => {
            for step in 1..=steps {
                model.step(&pool.plan(0..sequences, context + step, 1), &mut logits)?;
            }
        }
        Some(pipeline) => {
            let part = sequences.div_ceil(pipeline.depth());
            let mut under_way = 0;
            for (step, first) in (1..=steps).flat_map(|step| (0..sequences).step_by(part).map(move |first| (step, first))) {
                if under_way == pipeline.depth() {
                    pipeline.complete(&mut logits)?;
                    under_way -= 1;
                }
                pipeline.submit(&pool.plan(first..(first + part).min(sequences), context + step, 1))?;
                under_way += 1;
            }
            for _ in 0..under_way {
                pipeline.complete(&mut logits)?;
            }
        }
    }
    Ok((sequences * steps) as f64 / start.elapsed().as_secs_f64())
}

/// A KV pool shared out evenly among sequences.
struct Pool {
    block_size: usize,
    blocks_each: usize,
    vocab_size: usize,
}

impl Pool {
    fn of(info: &StepModelInfo, sequences: usize) -> Self {
        Pool { block_size: info.block_size, blocks_each: info.kv_blocks / sequences, vocab_size: info.vocab_size }
    }

    /// A step in which each of these sequences gets `rows` tokens from position `first` on.
    fn plan(&self, sequences: Range<usize>, first: usize, rows: usize) -> StepPlan {
        let mut plan = StepPlan::default();
        for sequence in sequences {
            let row_start = plan.tokens.len() as u32;
            let first_block = sequence * self.blocks_each;
            for position in first..first + rows {
                // Any ids do: the work is the same. They differ, so that no row is another's copy.
                plan.tokens.push(((sequence * 31 + position * 7) % self.vocab_size) as u32);
                plan.positions.push(position as u32);
                plan.slots.push((first_block * self.block_size + position) as u32);
            }
            let table_len = (first + rows).div_ceil(self.block_size);
            plan.sequences.push(SequenceSlice {
                row_start,
                row_count: rows as u32,
                first_position: first as u32,
                table_start: plan.block_tables.len() as u32,
                table_len: table_len as u32,
            });
            plan.block_tables.extend((first_block..first_block + table_len).map(|block| block as u32));
            plan.logits_rows.push(row_start + rows as u32 - 1);
        }
        plan
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_the_rounds_counts() {
        assert_eq!(Rate::of(vec![3.0, 1.0, 8.0]), Rate { median: 3.0, best: 8.0, rounds: vec![3.0, 1.0, 8.0] });
    }

    #[test]
    fn sizes_that_cannot_be_measured_are_refused() {
        let sizes = SpeedSizes { prefill: 60, decode: 8, batch: 4, rounds: 1 };
        assert!(sizes.check(69).is_ok());
        assert!(sizes.check(68).expect_err("too long").to_string().contains("context of 68"));
        assert!(SpeedSizes { rounds: 0, ..sizes }.check(100).is_err());
        for huge in [SpeedSizes { prefill: usize::MAX, ..sizes }, SpeedSizes { batch: 1 << 32, ..sizes }] {
            assert!(huge.check(100).expect_err("too large").to_string().contains("below 2^32"));
        }
    }
}
