//! `forgectl bench model`: one model on this machine, without server or scheduler, beside the machine's own limits.
//!
//! Decoding reads every weight once per step, so its limit is the measured read bandwidth over the bytes read; a
//! prompt's limit is the measured rate of f32 multiply-adds over two per parameter and token.

use std::time::Instant;

use forge_eval::speed::{Rate, Speed, SpeedSizes, measure_speed};
use forge_kernels::{measure_peak_flops, measure_read_bandwidth};
use forge_shared::spec::{KvCacheDtype, Layout};
use indicatif::HumanBytes;
use serde::Serialize;

use crate::cli::measure::BenchModelArgs;
use crate::context::Context;
use crate::failure::{Failure, Result};
use crate::measure::{Opened, Subject, check_memory, stoppable};
use crate::meter::Meter;
use crate::output::{print_facts, short_count};
use crate::runtime;

/// Rows of a prompt's step: what `serve` takes by default.
const STEP_ROWS: usize = 512;

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    model: String,
    architecture: &'static str,
    quantization: String,
    parameters: u64,
    threads: usize,
    layout: Layout,
    kv_cache_dtype: KvCacheDtype,
    numerics_id: String,
    sizes: SpeedSizes,
    load: Load,
    #[serde(flatten)]
    speed: Speed,
    memory: Memory,
    machine: Machine,
    /// Absent for mixtures of experts, of which a token reads only some.
    #[serde(skip_serializing_if = "Option::is_none")]
    shares: Option<Shares>,
}

/// Seconds until it could compute.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Load {
    /// Metadata, tokenizer.
    open_s: f64,
    /// Weights and buffers; mapped weights are only checked here, and read when first used.
    weights_s: f64,
    total_s: f64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Memory {
    /// Weights as stored, and what loading copies of them.
    weights_bytes: u64,
    workspace_bytes: u64,
    kv_bytes: u64,
    /// Of the process, as the system counts; absent where it does not tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    resident_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    peak_resident_bytes: Option<u64>,
}

/// Measured limits of the machine, with the same threads.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Machine {
    read_bytes_per_s: f64,
    f32_flops: f64,
}

/// Medians over the machine's limits; more than 1 where work stays in caches, or where 8-bit products outdo f32.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Shares {
    /// Of the read bandwidth, decoding one sequence.
    decode_of_bandwidth: f64,
    /// Of the f32 rate, prefill.
    prefill_of_flops: f64,
}

/// Measures and prints.
///
/// # Errors
/// A model that cannot be used or does not fit, sizes beyond its context.
pub fn model(args: &BenchModelArgs) -> Result<()> {
    let context = Context::open()?;
    let sizes = SpeedSizes { prefill: args.prefill, decode: args.decode, batch: args.batch, rounds: args.rounds };
    let report = runtime::start()?.block_on(async {
        let name = args.model.as_deref();
        let subject = Subject::find(&context, name, &args.keys.settings).await?;
        stoppable(move || measure(subject.open()?, sizes)).await
    })?;
    print_facts(args.list.output, &report, &facts(&report))
}

fn measure(opened: Opened, sizes: SpeedSizes) -> Result<Report> {
    sizes.check(opened.context_length())?;
    let options = sizes.decoder_options(opened.options(), STEP_ROWS);
    check_memory(opened.needed_bytes(&options)?)?;
    let start = Instant::now();
    let (mut decoder, threads) = opened.loaded(&options)?;
    let weights_s = start.elapsed().as_secs_f64();
    let mut meter = Meter::new("rounds", sizes.rounds);
    let speed = measure_speed(&mut *decoder, &sizes, |done| meter.at(done, ""))?;
    drop(meter);
    let memory = opened.prepared.model.memory(&options).map_err(|error| Failure::of(&error))?;
    let memory = Memory {
        weights_bytes: (memory.weights_bytes + memory.copied_bytes) as u64,
        workspace_bytes: (memory.workspace_bytes + memory.rope_bytes) as u64,
        kv_bytes: (memory.kv_block_bytes * options.kv_blocks) as u64,
        resident_bytes: resident("VmRSS:"),
        peak_resident_bytes: resident("VmHWM:"),
    };
    // Last, so that its buffers do not count as the model's.
    let limit = |measured: Result<f64, forge_kernels::KernelError>| measured.map_err(|error| Failure::of(&error));
    let machine = Machine { read_bytes_per_s: limit(measure_read_bandwidth(threads))?, f32_flops: limit(measure_peak_flops(threads))? };
    let summary = opened.prepared.model.summary();
    let whole = opened.prepared.model.architecture().experts.is_none();
    let shares = whole.then(|| Shares::of(&speed, &memory, &machine, summary.parameters as u64));
    Ok(Report {
        model: opened.name,
        architecture: summary.family,
        quantization: summary.quantization.main_type().to_owned(),
        parameters: summary.parameters as u64,
        threads,
        layout: opened.spec.layout,
        kv_cache_dtype: opened.spec.kv_cache_dtype,
        numerics_id: decoder.info().numerics_id.clone(),
        sizes,
        load: Load { open_s: opened.open_s, weights_s, total_s: opened.open_s + weights_s },
        speed,
        memory,
        machine,
        shares,
    })
}

impl Shares {
    fn of(speed: &Speed, memory: &Memory, machine: &Machine, parameters: u64) -> Self {
        let read = speed.decode_tokens_per_s.median * memory.weights_bytes as f64;
        let computed = speed.prefill_tokens_per_s.median * 2.0 * parameters as f64;
        Shares { decode_of_bandwidth: read / machine.read_bytes_per_s, prefill_of_flops: computed / machine.f32_flops }
    }
}

/// A line of the process's status, in bytes.
fn resident(key: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim().trim_end_matches("kB").trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

fn rate(rate: &Rate) -> String {
    format!("{:.1} tokens/s (best {:.1})", rate.median, rate.best)
}

/// How the model is divided, where it is.
fn ranks(layout: Layout) -> String {
    if layout.ranks() == 1 { String::new() } else { format!("{layout} in this process, ") }
}

fn share(value: Option<f64>, of: &str) -> String {
    value.map_or(String::new(), |value| format!(", {:.0} % of {of}", 100.0 * value))
}

fn facts(report: &Report) -> Vec<(&'static str, String)> {
    let SpeedSizes { prefill, decode, batch, rounds } = report.sizes;
    let machine = &report.machine;
    let shares = report.shares.as_ref();
    let mut facts = vec![
        ("model", report.model.clone()),
        ("kind", format!("{} {}, {} parameters", report.architecture, report.quantization, short_count(report.parameters))),
        ("run", format!("{}{} threads, medians of {rounds} rounds", ranks(report.layout), report.threads)),
        ("load", format!("{:.3} s (open {:.3} s, weights {:.3} s)", report.load.total_s, report.load.open_s, report.load.weights_s)),
        (
            "prefill",
            format!(
                "{}, {prefill} tokens{}",
                rate(&report.speed.prefill_tokens_per_s),
                share(shares.map(|shares| shares.prefill_of_flops), "the f32 rate")
            ),
        ),
        (
            "decode",
            format!(
                "{}, one sequence, {decode} tokens{}",
                rate(&report.speed.decode_tokens_per_s),
                share(shares.map(|shares| shares.decode_of_bandwidth), "the read bandwidth")
            ),
        ),
        ("batch", format!("{}, {batch} sequences", rate(&report.speed.batch_decode_tokens_per_s))),
        (
            "memory",
            format!(
                "{} weights, {} workspace, {} keys and values",
                HumanBytes(report.memory.weights_bytes),
                HumanBytes(report.memory.workspace_bytes),
                HumanBytes(report.memory.kv_bytes)
            ),
        ),
    ];
    if let (Some(resident), Some(peak)) = (report.memory.resident_bytes, report.memory.peak_resident_bytes) {
        facts.push(("resident", format!("{}, at most {}", HumanBytes(resident), HumanBytes(peak))));
    }
    facts.push(("machine", format!("reads {:.1} GB/s, {:.0} GFLOP/s in f32", machine.read_bytes_per_s / 1e9, machine.f32_flops / 1e9)));
    facts.push(("numerics", report.numerics_id.clone()));
    facts
}
