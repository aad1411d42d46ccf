//! Requests run through the engine's core on a real decoder, step by step: what the batch-invariance suite compares.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use forge_engine::{EngineCore, EngineOptions};
use forge_kernels::{CpuBackend, CpuOptions, KvDType};
use forge_model::{DecoderOptions, LoadMode, Model};
use forge_shared::generate::{Choice, EngineEvent, GenerateRequest, Logprobs, SamplingParams, TenantSalt};
use forge_shared::ids::{Epoch, RequestId};
use forge_shared::telemetry::{Metrics, run_label};
use forge_text::{GgufTokenizer, Tokenizer};
use tokio::sync::mpsc;

const STEP_LIMIT: usize = 100_000;

/// How an engine is run; everything here must be without influence on any token.
#[derive(Debug, Clone)]
pub struct Setting {
    /// For messages.
    pub name: &'static str,
    /// Most sequences at once.
    pub batch: usize,
    /// Most tokens of one prompt in a step.
    pub chunk: usize,
    /// Whether equal prefixes share KV.
    pub prefix_cache: bool,
    /// Blocks of 16 slots.
    pub kv_blocks: usize,
    /// Steps after which each further request joins; 0 lets all begin together.
    pub join_after: usize,
    /// Kernel threads.
    pub threads: usize,
}

impl Setting {
    /// One request at a time, whole prompts, nothing shared, plenty of memory.
    pub fn alone(kv_blocks: usize) -> Self {
        Setting { name: "alone", batch: 1, chunk: 512, prefix_cache: false, kv_blocks, join_after: 0, threads: 1 }
    }
}

/// What came of one request.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Outcome {
    /// Per answer: tokens.
    pub tokens: Vec<Vec<u32>>,
    /// Per answer: the bits of every log-probability, chosen and alternatives, with their token ids.
    pub logprobs: Vec<Vec<(u32, u32)>>,
    /// Of the prompt, if asked for.
    pub prompt_logprobs: Vec<(u32, u32)>,
}

/// What a run did, so that a test knows that it tested something.
#[derive(Debug, Clone, Copy, Default)]
pub struct Effects {
    /// Sequences put back because memory ran out.
    pub preemptions: u64,
    /// Prompt tokens taken from the prefix cache.
    pub prefix_hits: u64,
    /// Most rows of a step.
    pub most_rows: usize,
    /// Most sequences of a step.
    pub most_sequences: usize,
}

/// A request for `answers` answers.
pub fn request(prompt: &[u32], answers: u32, seed: u64, params: SamplingParams) -> GenerateRequest {
    GenerateRequest {
        id: RequestId::from("test"),
        tenant: TenantSalt::anonymous(),
        prompt_tokens: prompt.into(),
        choices: (0..answers).map(|index| Choice { index, emitted_tokens: Vec::new() }).collect(),
        seed,
        params,
        priority: 0,
    }
}

/// A tokenizer whose every id is a word of its own, for models that come without one.
///
/// # Errors
/// A vocabulary of more than 26⁴ ids.
pub fn word_tokenizer(vocab_size: usize) -> Result<Tokenizer> {
    let letter = |number: usize| char::from(b'a' + (number % 26) as u8);
    let word = |id: usize| [id / 17_576, id / 676, id / 26, id].map(letter).iter().collect();
    // The format wants at least one merge, and the parts of it.
    let parts = ["x", "y", "xy"].map(String::from);
    let metadata = GgufTokenizer {
        model: "gpt2".into(),
        pre: "gpt-2".into(),
        tokens: parts.into_iter().chain((3..vocab_size).map(word)).collect(),
        merges: vec!["x y".into()],
        ..GgufTokenizer::default()
    };
    Ok(Tokenizer::from_gguf(&metadata)?)
}

/// Runs all requests on a fresh engine and decoder.
///
/// # Errors
/// A model that does not load, a request that is not admitted or fails, an engine that does not come to an end.
pub fn run(model: &Model, setting: &Setting, requests: &[GenerateRequest]) -> Result<(Vec<Outcome>, Effects)> {
    let backend = Arc::new(CpuBackend::new(CpuOptions { threads: setting.threads, ..CpuOptions::default() })?);
    let options = DecoderOptions {
        kv_dtype: KvDType::F16,
        kv_blocks: setting.kv_blocks,
        max_step_rows: setting.chunk.max(setting.batch) + setting.batch,
        max_logits_rows: 64,
        scan_values: false,
        ..DecoderOptions::single_sequence(model.summary().context_length.min(1024))
    };
    let mut decoder = model.decoder(backend, &options)?;
    let vocab_size = model.architecture().vocab_size;
    let engine = EngineOptions {
        max_batch_size: setting.batch,
        max_chunk_rows: setting.chunk,
        prefix_caching: setting.prefix_cache,
        ..EngineOptions::default()
    };
    let info = forge_model::StepModel::info(&decoder).clone();
    let mut core = EngineCore::new(info, word_tokenizer(vocab_size)?, engine, &Metrics::new(), &run_label("test", "test/0", Epoch(1)))?;
    let mut effects = Effects::default();
    let mut streams = Vec::new();
    let mut waiting = requests.iter();
    let mut logits = Vec::new();
    for step in 0..STEP_LIMIT {
        while setting.join_after == 0 || streams.len() * setting.join_after <= step {
            let Some(request) = waiting.next() else { break };
            let (sender, stream) = mpsc::channel(100_000);
            core.submit(request.clone(), sender, Duration::from_millis(step as u64))?;
            streams.push(stream);
        }
        let now = Duration::from_millis(step as u64);
        if core.begin_step(now)
            && let Some(plan) = core.plan()
        {
            effects.most_rows = effects.most_rows.max(plan.tokens.len());
            effects.most_sequences = effects.most_sequences.max(plan.sequences.len());
            forge_model::StepModel::step(&mut decoder, plan, &mut logits)?;
            core.finish_step(&mut logits, now)?;
        } else if core.is_idle() && streams.len() == requests.len() {
            let counts = core.scheduler().counts();
            effects.preemptions = counts.preemptions;
            effects.prefix_hits = counts.prefix_hits;
            let outcomes = streams.into_iter().zip(requests).map(|(stream, request)| outcome(stream, request));
            return Ok((outcomes.collect::<Result<_>>()?, effects));
        }
    }
    bail!("{}: the engine did not come to an end within {STEP_LIMIT} steps", setting.name)
}

fn bits(logprobs: &Logprobs) -> impl Iterator<Item = (u32, u32)> + '_ {
    [&logprobs.chosen].into_iter().chain(&logprobs.top).map(|entry| (entry.token, entry.logprob.to_bits()))
}

fn outcome(mut stream: mpsc::Receiver<EngineEvent>, request: &GenerateRequest) -> Result<Outcome> {
    let answers = request.choices.len();
    let mut outcome = Outcome { tokens: vec![Vec::new(); answers], logprobs: vec![Vec::new(); answers], ..Outcome::default() };
    let mut done = false;
    while let Ok(event) = stream.try_recv() {
        match event {
            EngineEvent::PromptLogprobs(list) => outcome.prompt_logprobs = list.iter().flat_map(bits).collect(),
            EngineEvent::Token(token) => {
                let answer = token.choice as usize;
                outcome.tokens[answer].push(token.token);
                outcome.logprobs[answer].extend(token.logprobs.iter().flat_map(bits));
            }
            EngineEvent::Finished { .. } => {}
            EngineEvent::Done(_) => done = true,
            EngineEvent::Failed { reason, .. } => bail!("a request failed: {reason}"),
        }
    }
    anyhow::ensure!(done, "a request has no end");
    Ok(outcome)
}

/// Opens a fixture or a model file for the suite.
///
/// # Errors
/// What is wrong with the model.
pub fn open(path: &Path) -> Result<Model> {
    Model::open(path, LoadMode::Mmap).with_context(|| path.display().to_string())
}
