//! Speed of a model without server or scheduler: tokens per second of prefill and decode, as one line of JSON.
//!
//!     cargo run --release -p forge-tests --example bench_model -- MODEL [--threads N] [--prefill 512] [--decode 128] [--batch 32]
//!
//! Prefill computes one prompt in one step; decode goes on token by token, with one sequence and with a batch.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use forge_kernels::{CpuBackend, CpuOptions, KvDType, SequenceSlice};
use forge_model::{DecoderOptions, LoadMode, Model, StepModel, StepPlan};
use serde_json::json;

struct Sizes {
    threads: usize,
    prefill: usize,
    decode: usize,
    batch: usize,
}

fn arguments() -> Result<(String, Sizes)> {
    let mut sizes = Sizes { threads: CpuOptions::default().threads, prefill: 512, decode: 128, batch: 32 };
    let mut arguments = std::env::args().skip(1);
    let model = arguments.next().context("usage: bench_model MODEL [--threads N] [--prefill N] [--decode N] [--batch N]")?;
    while let Some(name) = arguments.next() {
        let value: usize = arguments.next().with_context(|| format!("{name} needs a number"))?.parse().context(name.clone())?;
        match name.as_str() {
            "--threads" => sizes.threads = value,
            "--prefill" => sizes.prefill = value,
            "--decode" => sizes.decode = value,
            "--batch" => sizes.batch = value,
            _ => bail!("unknown option {name}"),
        }
    }
    Ok((model, sizes))
}

/// One step in which every sequence gets `rows` tokens from position `first` on; sequence i owns the blocks from
/// i · `blocks_each` on.
fn plan(sequences: usize, first: usize, rows: usize, blocks_each: usize, block_size: usize) -> StepPlan {
    let mut plan = StepPlan::default();
    for sequence in 0..sequences {
        let row_start = plan.tokens.len() as u32;
        for position in first..first + rows {
            // Any ids do: the work is the same. They differ, so that no row is another's copy.
            plan.tokens.push(((sequence * 31 + position * 7) % 90) as u32);
            plan.positions.push(position as u32);
            plan.slots.push((sequence * blocks_each * block_size + position) as u32);
        }
        plan.sequences.push(SequenceSlice {
            row_start,
            row_count: rows as u32,
            first_position: first as u32,
            table_start: (sequence * blocks_each) as u32,
            table_len: blocks_each as u32,
        });
        plan.block_tables.extend((sequence * blocks_each..(sequence + 1) * blocks_each).map(|block| block as u32));
        plan.logits_rows.push(row_start + rows as u32 - 1);
    }
    plan
}

/// Tokens per second over `steps` decode steps of `sequences` sequences that already hold `context` tokens.
fn decode_rate(model: &mut dyn StepModel, sequences: usize, context: usize, steps: usize, blocks_each: usize) -> Result<f64> {
    let block_size = model.info().block_size;
    let mut logits = Vec::new();
    model.step(&plan(sequences, context, 1, blocks_each, block_size), &mut logits)?;
    let start = Instant::now();
    for step in 1..=steps {
        model.step(&plan(sequences, context + step, 1, blocks_each, block_size), &mut logits)?;
    }
    Ok((sequences * steps) as f64 / start.elapsed().as_secs_f64())
}

fn main() -> Result<()> {
    let (path, sizes) = arguments()?;
    let start = Instant::now();
    let model = Model::open(&path, LoadMode::Mmap)?;
    let backend = Arc::new(CpuBackend::new(CpuOptions { threads: sizes.threads, ..CpuOptions::default() })?);
    let longest = sizes.prefill + sizes.decode + 1;
    let block_size = 16;
    let blocks_each = longest.div_ceil(block_size);
    let options = DecoderOptions {
        kv_dtype: KvDType::F16,
        kv_blocks: blocks_each * sizes.batch.max(1),
        max_step_rows: sizes.prefill.max(sizes.batch),
        max_logits_rows: sizes.batch.max(1),
        block_size,
        ..DecoderOptions::single_sequence(longest)
    };
    let mut decoder = model.decoder(backend, &options)?;
    let load_s = start.elapsed().as_secs_f64();
    let mut logits = Vec::new();
    let prefill = plan(1, 0, sizes.prefill, blocks_each, block_size);
    decoder.step(&prefill, &mut logits)?;
    let start = Instant::now();
    decoder.step(&prefill, &mut logits)?;
    let prefill_rate = sizes.prefill as f64 / start.elapsed().as_secs_f64();
    let decode_rate_1 = decode_rate(&mut decoder, 1, sizes.prefill, sizes.decode, blocks_each)?;
    // A short context each: the batch measures products, not attention over a long past.
    decoder.step(&plan(sizes.batch, 0, 1, blocks_each, block_size), &mut logits)?;
    let decode_rate_batch = decode_rate(&mut decoder, sizes.batch, 1, sizes.decode.min(64), blocks_each)?;
    let report = json!({
        "model": path, "threads": sizes.threads, "load_s": load_s,
        "prefill_tokens": sizes.prefill, "prefill_tokens_per_s": prefill_rate,
        "decode_tokens_per_s": decode_rate_1, "batch": sizes.batch, "batch_decode_tokens_per_s": decode_rate_batch,
        "numerics_id": decoder.info().numerics_id,
    });
    println!("{report}");
    Ok(())
}
