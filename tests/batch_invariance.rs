//! DESIGN P2, end to end on real decoders: the tokens and log-probabilities of a request are the same bits alone, in
//! a batch of 33, at any chunking, with and without the prefix cache, after preemption, on any number of threads.
//!
//! Tiny checkpoints of all three families, dense and quantized, and the default model where `FORGE_TEST_SMOLLM2` says
//! where it is (always in CI). Splitting a product over ranks is tested in forge-model.

use std::path::{Path, PathBuf};

use forge_model::Model;
use forge_shared::generate::{GenerateRequest, SamplingParams};
use forge_tests::company::{Effects, Outcome, Setting, open, request, run};

const TINY: [&str; 7] =
    ["llama", "qwen2", "gpt2", "gguf/llama-q4_0.gguf", "gguf/llama-q4_1.gguf", "gguf/qwen2-q8_0.gguf", "gguf/gpt2-q4_1.gguf"];

/// Sizes of the comparison: tiny models have a short context.
struct Sizes {
    prompt: usize,
    answer: u32,
    companions: usize,
    vocabulary: u32,
    /// Blocks that hold everything, and blocks that do not.
    blocks: (usize, usize),
}

fn prompt(length: usize, vocabulary: u32, seed: u32) -> Vec<u32> {
    (0..length as u32).map(|i| (i * i * 7 + i * 13 + seed * 31) % vocabulary).collect()
}

/// The first request is the one that is looked at most closely; its companions are of all kinds.
fn requests(sizes: &Sizes) -> Vec<GenerateRequest> {
    let greedy = SamplingParams { temperature: 0.0, max_tokens: sizes.answer, logprobs: Some(5), ignore_eos: true, ..Default::default() };
    let sampled =
        SamplingParams { temperature: 0.9, top_k: 40, top_p: 0.95, repetition_penalty: 1.1, frequency_penalty: 0.3, ..greedy.clone() };
    let scored = SamplingParams { prompt_logprobs: Some(2), ..greedy.clone() };
    let mut all = vec![request(&prompt(sizes.prompt, sizes.vocabulary, 1), 1, 7, greedy.clone())];
    for number in 1..=sizes.companions {
        let length = 1 + (number * 11) % sizes.prompt;
        // Every third shares its beginning with the first, so that the prefix cache has something to do.
        let seed = if number % 3 == 0 { 1 } else { number as u32 };
        let tokens = prompt(length, sizes.vocabulary, seed);
        all.push(match number % 4 {
            0 => request(&tokens, 2, number as u64, sampled.clone()),
            1 => request(&tokens, 1, number as u64, sampled.clone()),
            2 => request(&tokens, 1, number as u64, scored.clone()),
            _ => request(&tokens, 1, number as u64, greedy.clone()),
        });
    }
    all
}

fn settings(sizes: &Sizes) -> Vec<Setting> {
    let plenty = Setting { batch: 33, threads: 2, ..Setting::alone(sizes.blocks.0) };
    vec![
        Setting { name: "batch of 33", ..plenty.clone() },
        Setting { name: "chunks of 1", chunk: 1, ..plenty.clone() },
        Setting { name: "chunks of 7, joining late", chunk: 7, join_after: 3, ..plenty.clone() },
        Setting { name: "chunks of 64 with prefix cache", chunk: 64, prefix_cache: true, join_after: 2, ..plenty.clone() },
        Setting { name: "preempted", kv_blocks: sizes.blocks.1, ..plenty.clone() },
        Setting { name: "preempted with prefix cache", kv_blocks: sizes.blocks.1, prefix_cache: true, chunk: 7, ..plenty },
    ]
}

/// Each request by itself, on an engine of its own.
fn alone(model: &Model, sizes: &Sizes, requests: &[GenerateRequest]) -> Vec<Outcome> {
    let setting = Setting::alone(sizes.blocks.0);
    // A batch must hold all answers of one request.
    let setting = |request: &GenerateRequest| Setting { batch: request.choices.len(), ..setting.clone() };
    requests
        .iter()
        .map(|one| run(model, &setting(one), std::slice::from_ref(one)).expect("a request alone is answered").0.remove(0))
        .collect()
}

fn compare(path: &Path, sizes: &Sizes) {
    let model = open(path).expect("the model opens");
    let requests = requests(sizes);
    let expected = alone(&model, sizes, &requests);
    assert!(expected[0].tokens[0].len() == sizes.answer as usize && !expected[0].logprobs[0].is_empty());
    for setting in settings(sizes) {
        let (outcomes, effects) = run(&model, &setting, &requests).unwrap_or_else(|error| panic!("{}: {error:#}", setting.name));
        check_effects(&setting, &effects);
        for (number, (outcome, expected)) in outcomes.iter().zip(&expected).enumerate() {
            assert_eq!(outcome, expected, "{}: {}, request {number}", path.display(), setting.name);
        }
    }
}

/// A run that was meant to preempt, share or batch must have done so.
fn check_effects(setting: &Setting, effects: &Effects) {
    let name = setting.name;
    assert_eq!(effects.preemptions > 0, name.starts_with("preempted"), "{name}: {effects:?}");
    assert_eq!(effects.prefix_hits > 0, setting.prefix_cache, "{name}: {effects:?}");
    assert!(effects.most_sequences > 2, "{name}: {effects:?}");
    if setting.chunk == 1 {
        assert!(effects.most_rows <= setting.batch, "{name}: {effects:?}");
    }
}

#[test]
fn tiny_models_of_all_families_dense_and_quantized() {
    for name in TINY {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model").join(name);
        compare(&path, &Sizes { prompt: 40, answer: 20, companions: 32, vocabulary: 96, blocks: (200, 20) });
    }
}

#[test]
fn the_default_model() {
    let path = match std::env::var_os("FORGE_TEST_SMOLLM2") {
        Some(path) => PathBuf::from(path),
        None if std::env::var_os("CI").is_none() => {
            eprintln!("not run: set FORGE_TEST_SMOLLM2 to the path of SmolLM2-135M-Instruct.Q4_1.gguf");
            return;
        }
        None => panic!("CI must set FORGE_TEST_SMOLLM2 to the default model's GGUF file"),
    };
    compare(&path, &Sizes { prompt: 90, answer: 20, companions: 32, vocabulary: 17_000, blocks: (400, 16) });
}
