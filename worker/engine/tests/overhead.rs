//! What a step costs outside the model: 32 answers, the default model's vocabulary, logits shaped like a language
//! model's. The bar (under 3 % of a step) is checked with the real model; here a bound far above the
//! measured figure catches a change of order.

mod common;

use std::time::{Duration, Instant};

use common::*;
use forge_engine::{EngineCore, EngineOptions};
use forge_model::StepModelInfo;
use forge_shared::generate::*;
use forge_shared::ids::Epoch;
use forge_shared::telemetry::{Metrics, run_label};

const VOCAB: usize = 49_152;
const BATCH: usize = 32;
const STEPS: usize = 40;

/// Roughly normal logits with a deviation of 2.5 and a few likely tokens, as a language model's are.
fn logits(rows: usize, step: usize) -> Vec<f32> {
    let mut state = 88_172_645_463_325_252u64 + step as u64;
    let mut uniform = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    let mut logits = Vec::with_capacity(rows * VOCAB);
    for _ in 0..rows * VOCAB {
        let normal = uniform() + uniform() + uniform() + uniform() - 2.0;
        logits.push(normal * 1.73 * 2.5);
    }
    for row in logits.chunks_exact_mut(VOCAB) {
        for _ in 0..50 {
            // Ids the test's tokenizer knows.
            row[(uniform() * 60.0) as usize] = 8.0 + 8.0 * uniform();
        }
    }
    logits
}

/// Mean time of a step outside the model.
fn other_time(params: SamplingParams) -> Duration {
    let info = StepModelInfo { vocab_size: VOCAB, max_model_len: 2048, ..info(16, 4096, 512) };
    let options = EngineOptions { max_batch_size: BATCH, ..EngineOptions::default() };
    let mut core = EngineCore::new(info, tokenizer(), options, &Metrics::new(), &run_label("m", "m/0", Epoch(1))).unwrap();
    let mut receivers = Vec::new();
    for i in 0..BATCH as u32 {
        let (sender, receiver) = tokio::sync::mpsc::channel(1000);
        core.submit(
            request(&[i, 1, 2, 3], SamplingParams { max_tokens: 1000, ignore_eos: true, ..params.clone() }),
            sender,
            Duration::ZERO,
        )
        .unwrap();
        receivers.push(receiver);
    }
    let mut fastest = Duration::MAX;
    let rows = logits(BATCH, 0);
    for _ in 0..STEPS {
        let mut step_logits = rows.clone();
        let start = Instant::now();
        assert!(core.begin_step(Duration::ZERO));
        assert_eq!(core.plan().map(|plan| plan.logits_rows.len()), Some(BATCH));
        core.finish_step(&mut step_logits, Duration::ZERO).unwrap();
        fastest = fastest.min(start.elapsed());
    }
    fastest
}

#[test]
fn a_step_of_32_costs_little_outside_the_model() {
    let plain = SamplingParams::default();
    for (name, params) in [
        ("greedy", SamplingParams { temperature: 0.0, ..plain.clone() }),
        ("temperature 1", plain.clone()),
        ("temperature 0.7, top_p 0.9", SamplingParams { temperature: 0.7, top_p: 0.9, ..plain.clone() }),
        ("temperature 0.7, top_k 50, top_p 0.9", SamplingParams { temperature: 0.7, top_k: 50, top_p: 0.9, ..plain.clone() }),
        (
            "greedy, 5 logprobs, penalties",
            SamplingParams {
                temperature: 0.0,
                logprobs: Some(5),
                repetition_penalty: 1.1,
                frequency_penalty: 0.1,
                stop: vec!["zzzz".into()],
                ..plain.clone()
            },
        ),
    ] {
        let time = other_time(params);
        println!("{name}: {} µs per step of {BATCH}", time.as_micros());
        assert!(time < Duration::from_millis(30), "{name}: {time:?}");
    }
}
