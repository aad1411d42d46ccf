//! Speed of a model without server or scheduler: tokens per second of prefill and decode, as one line of JSON.
//!
//!     cargo run --release -p forge-tests --example bench_model -- MODEL [--threads N] [--prefill 512] [--decode 128] [--batch 32]
//!
//! One round of what `forgectl bench model` measures in several; it reads a path and knows no store.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use forge_eval::speed::{SpeedSizes, measure_speed};
use forge_kernels::{CpuBackend, CpuOptions, KvDType};
use forge_model::{DecoderOptions, LoadMode, Model, StepModel};
use serde_json::json;

fn arguments() -> Result<(String, usize, SpeedSizes)> {
    let mut threads = CpuOptions::default().threads;
    let mut sizes = SpeedSizes { prefill: 512, decode: 128, batch: 32, rounds: 1 };
    let mut arguments = std::env::args().skip(1);
    let model = arguments.next().context("usage: bench_model MODEL [--threads N] [--prefill N] [--decode N] [--batch N]")?;
    while let Some(name) = arguments.next() {
        let value: usize = arguments.next().with_context(|| format!("{name} needs a number"))?.parse().context(name.clone())?;
        match name.as_str() {
            "--threads" => threads = value,
            "--prefill" => sizes.prefill = value,
            "--decode" => sizes.decode = value,
            "--batch" => sizes.batch = value,
            _ => bail!("unknown option {name}"),
        }
    }
    Ok((model, threads, sizes))
}

fn main() -> Result<()> {
    let (path, threads, sizes) = arguments()?;
    let start = Instant::now();
    let model = Model::open(&path, LoadMode::Mmap)?;
    sizes.check(model.summary().context_length)?;
    let backend = Arc::new(CpuBackend::new(CpuOptions { threads, ..CpuOptions::default() })?);
    let base = DecoderOptions { kv_dtype: KvDType::F16, ..DecoderOptions::single_sequence(sizes.longest()) };
    // The whole prompt in one step.
    let mut decoder = model.decoder(backend, &sizes.decoder_options(base, sizes.prefill))?;
    let load_s = start.elapsed().as_secs_f64();
    let speed = measure_speed(&mut decoder, &sizes, |_| {})?;
    let report = json!({
        "model": path, "threads": threads, "load_s": load_s,
        "prefill_tokens": sizes.prefill, "prefill_tokens_per_s": speed.prefill_tokens_per_s.median,
        "decode_tokens_per_s": speed.decode_tokens_per_s.median, "batch": sizes.batch,
        "batch_decode_tokens_per_s": speed.batch_decode_tokens_per_s.median,
        "numerics_id": decoder.info().numerics_id,
    });
    println!("{report}");
    Ok(())
}
