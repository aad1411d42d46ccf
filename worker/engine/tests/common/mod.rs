//! A deterministic model that computes through the paged KV it is given, and a harness that runs the core step by
//! step.
//!
//! The model's "KV" of a token is a hash of all tokens up to it, read from the slot of the token before, as real
//! keys and values depend on the whole prefix. Logits are a function of every slot the block table names. So a
//! wrong block table, a missing copy on write, a wrongly reused or recycled block or a wrong position gives other
//! logits, and other tokens.
#![allow(dead_code)]

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use forge_engine::{EngineCore, EngineOptions};
use forge_model::{ModelError, StepModel, StepModelInfo, StepPlan};
use forge_shared::generate::*;
use forge_shared::ids::{Epoch, RequestId};
use forge_shared::telemetry::{Metrics, run_label};
use forge_text::{GgufTokenizer, Tokenizer};
use tokio::sync::mpsc;

pub const VOCAB: usize = 64;
pub const END: u32 = 63;

/// Letters a to z, two halves of "é", a space, pairs of letters, and an end token.
pub fn tokenizer() -> Tokenizer {
    static MADE: OnceLock<Tokenizer> = OnceLock::new();
    MADE.get_or_init(make_tokenizer).clone()
}

fn make_tokenizer() -> Tokenizer {
    let mut tokens: Vec<String> = ('a'..='z').map(String::from).collect();
    tokens.extend(["Ã", "©", "Ġ"].map(String::from));
    tokens.extend((0..33u8).map(|index| format!("{}{}", char::from(b'a' + index % 26), if index < 26 { "x" } else { "Ã©" })));
    for name in ["<mark>", "<end>"] {
        tokens.push(name.into());
    }
    let mut token_types = vec![1; VOCAB - 2];
    token_types.extend([3, 3]);
    let metadata = GgufTokenizer {
        model: "gpt2".into(),
        pre: "gpt-2".into(),
        tokens,
        token_types,
        merges: vec!["a x".into()],
        eos_id: Some(END),
        ..GgufTokenizer::default()
    };
    Tokenizer::from_gguf(&metadata).unwrap()
}

fn mix(a: u64, b: u64) -> u64 {
    let mut x = a.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ b.wrapping_add(0xD1B5_4A32_D192_ED03);
    x = (x ^ (x >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x ^ (x >> 32)
}

pub struct FakeModel {
    info: StepModelInfo,
    slots: Vec<u64>,
    /// Steps run, rows computed.
    pub steps: usize,
    pub rows: usize,
    /// Tokens whose presence as a sequence's last token gives NaN logits.
    pub poison: Option<u32>,
    pub fail_at_step: Option<usize>,
    pub panic_at_step: Option<usize>,
    /// How long a step takes.
    pub delay: Duration,
}

impl FakeModel {
    pub fn new(info: StepModelInfo) -> Self {
        let slots = vec![0xDEAD; info.block_size * info.kv_blocks];
        FakeModel { info, slots, steps: 0, rows: 0, poison: None, fail_at_step: None, panic_at_step: None, delay: Duration::ZERO }
    }

    fn logits(&self, state: u64, logits: &mut Vec<f32>) {
        // Quarters: ties are common, so that the order of equal logits is tested too.
        logits.extend((0..VOCAB as u64).map(|token| (mix(state, token) >> 59) as f32 * 0.25 - 4.0));
    }
}

impl StepModel for FakeModel {
    fn info(&self) -> &StepModelInfo {
        &self.info
    }

    fn step(&mut self, plan: &StepPlan, logits: &mut Vec<f32>) -> Result<(), ModelError> {
        std::thread::sleep(self.delay);
        self.steps += 1;
        self.rows += plan.tokens.len();
        assert_ne!(Some(self.steps), self.panic_at_step, "told to panic");
        if Some(self.steps) == self.fail_at_step {
            return Err(failure());
        }
        let size = self.info.block_size;
        assert!(plan.tokens.len() <= self.info.max_step_rows && plan.logits_rows.len() <= self.info.max_logits_rows);
        assert!(plan.logits_rows.windows(2).all(|pair| pair[0] < pair[1]));
        for &(from, to) in &plan.block_copies {
            self.slots.copy_within(from as usize * size..(from as usize + 1) * size, to as usize * size);
        }
        let mut writers: HashMap<u32, usize> = HashMap::new();
        let mut next_row = 0;
        for (index, sequence) in plan.sequences.iter().enumerate() {
            assert_eq!(sequence.row_start, next_row);
            next_row += sequence.row_count;
            let table = &plan.block_tables[sequence.table_start as usize..(sequence.table_start + sequence.table_len) as usize];
            for offset in 0..sequence.row_count {
                let row = (sequence.row_start + offset) as usize;
                let position = (sequence.first_position + offset) as usize;
                assert_eq!(plan.positions[row] as usize, position);
                assert_eq!(plan.slots[row], table[position / size] * size as u32 + (position % size) as u32);
                let before = match position {
                    0 => 1,
                    _ => self.slots[table[(position - 1) / size] as usize * size + (position - 1) % size],
                };
                self.slots[plan.slots[row] as usize] = mix(before, u64::from(plan.tokens[row]));
                assert_eq!(writers.insert(plan.slots[row], index), None, "two rows write one slot");
            }
        }
        assert_eq!(next_row as usize, plan.tokens.len());
        logits.clear();
        for &row in &plan.logits_rows {
            let (index, sequence) =
                plan.sequences.iter().enumerate().rfind(|(_, sequence)| sequence.row_start <= row).expect("rows belong to sequences");
            let table = &plan.block_tables[sequence.table_start as usize..(sequence.table_start + sequence.table_len) as usize];
            let position = plan.positions[row as usize] as usize;
            let mut state = 7;
            for p in 0..=position {
                let slot = table[p / size] * size as u32 + (p % size) as u32;
                let writer = writers.get(&slot);
                assert!(writer.is_none_or(|&writer| writer == index), "a slot is read that another sequence writes in this step");
                state = mix(state, self.slots[slot as usize]);
            }
            let start = logits.len();
            self.logits(state, logits);
            if Some(plan.tokens[row as usize]) == self.poison {
                logits[start + 5] = f32::NAN;
            }
        }
        Ok(())
    }
}

/// Some error of the model crate.
pub fn failure() -> ModelError {
    ModelError::Plan { field: "tokens", reason: "told to fail".into() }
}

pub fn info(block_size: usize, kv_blocks: usize, max_step_rows: usize) -> StepModelInfo {
    StepModelInfo {
        vocab_size: VOCAB,
        max_model_len: 96,
        block_size,
        kv_blocks,
        kv_block_bytes: 1,
        max_step_rows,
        max_logits_rows: max_step_rows,
        numerics_id: "fake".into(),
    }
}

/// Room for everything, whole prompts at once, no sharing: how a request runs alone.
pub fn roomy() -> (StepModelInfo, EngineOptions) {
    (info(16, 64, 256), EngineOptions { max_batch_size: 32, prefix_caching: false, ..EngineOptions::default() })
}

pub fn request(prompt: &[u32], params: SamplingParams) -> GenerateRequest {
    GenerateRequest {
        id: RequestId::from("test"),
        tenant: TenantSalt::anonymous(),
        prompt_tokens: Arc::from(prompt),
        choices: vec![Choice { index: 0, emitted_tokens: Vec::new() }],
        seed: 99,
        params,
        priority: 0,
    }
}

pub fn greedy(max_tokens: u32) -> SamplingParams {
    SamplingParams { temperature: 0.0, max_tokens, ignore_eos: true, ..SamplingParams::default() }
}

/// A core with its model, stepped by hand.
pub struct Harness {
    pub core: EngineCore,
    pub model: FakeModel,
    pub steps: u32,
    /// Most steps under way.
    depth: usize,
    /// Logits of steps under way, oldest first: what a model of several stages would still hold.
    done: VecDeque<Vec<f32>>,
}

impl Harness {
    pub fn new(info: StepModelInfo, options: EngineOptions) -> Self {
        Harness::with_metrics(info, options, &Metrics::new())
    }

    pub fn with_metrics(info: StepModelInfo, options: EngineOptions, metrics: &Metrics) -> Self {
        let core = EngineCore::new(info.clone(), tokenizer(), options, metrics, &run_label("fake", "fake/0", Epoch(1))).unwrap();
        Harness { core, model: FakeModel::new(info), steps: 0, depth: 1, done: VecDeque::new() }
    }

    /// With so many steps under way.
    pub fn with_depth(mut self, depth: usize) -> Self {
        self.core.allow_under_way(depth);
        self.depth = depth;
        self
    }

    fn now(&self) -> Duration {
        Duration::from_millis(u64::from(self.steps))
    }

    pub fn submit(&mut self, request: GenerateRequest, capacity: usize) -> Result<mpsc::Receiver<EngineEvent>, AdmitError> {
        let (sender, receiver) = mpsc::channel(capacity);
        let now = self.now();
        self.core.submit(request, sender, now).map(|()| receiver)
    }

    /// One step and all invariants. Returns whether anything was computed.
    pub fn step(&mut self) -> bool {
        self.steps += 1;
        let now = self.now();
        let began = self.core.begin_step(now);
        if began {
            let mut logits = Vec::new();
            self.model.step(self.core.plan().unwrap(), &mut logits).unwrap();
            self.done.push_back(logits);
            self.core.scheduler().check().unwrap();
        }
        assert_eq!(self.core.under_way(), self.done.len());
        let finished = if !began || self.done.len() == self.depth { self.done.pop_front() } else { None };
        let stepped = began || finished.is_some();
        if let Some(mut logits) = finished {
            self.core.finish_step(&mut logits, now).unwrap();
        }
        self.core.scheduler().check().unwrap();
        stepped
    }

    /// Steps until nothing is left.
    pub fn run(&mut self) {
        for _ in 0..100_000 {
            if self.core.is_idle() {
                return;
            }
            self.step();
        }
        panic!("requests never end");
    }

    /// Runs one request with nothing else.
    pub fn complete(&mut self, request: GenerateRequest) -> Record {
        let mut receiver = self.submit(request, 100_000).unwrap();
        self.run();
        let mut record = Record::default();
        record.drain(&mut receiver, usize::MAX);
        record
    }
}

/// How a request is answered when it is alone.
pub fn alone(request: &GenerateRequest) -> Record {
    let (info, options) = roomy();
    Harness::new(info, options).complete(request.clone())
}

/// Events of a request, by answer: the order between answers is not promised.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Record {
    pub prompt_logprobs: Option<Vec<Logprobs>>,
    pub answers: BTreeMap<u32, Vec<EngineEvent>>,
    pub done: Option<Usage>,
    pub failed: Option<(String, bool)>,
}

impl Record {
    /// Takes up to `most` events. Returns whether the stream has ended.
    pub fn drain(&mut self, receiver: &mut mpsc::Receiver<EngineEvent>, most: usize) -> bool {
        for _ in 0..most {
            match receiver.try_recv() {
                Ok(event) => self.take(event),
                Err(mpsc::error::TryRecvError::Empty) => return false,
                Err(mpsc::error::TryRecvError::Disconnected) => return true,
            }
        }
        false
    }

    pub fn take(&mut self, event: EngineEvent) {
        assert!(self.done.is_none() && self.failed.is_none(), "an event after the last: {event:?}");
        match event {
            EngineEvent::PromptLogprobs(logprobs) => {
                assert!(self.answers.is_empty() && self.prompt_logprobs.is_none());
                self.prompt_logprobs = Some(logprobs);
            }
            EngineEvent::Token(ref token) => self.answers.entry(token.choice).or_default().push(event),
            EngineEvent::Finished { choice, .. } => self.answers.entry(choice).or_default().push(event),
            // What was cached is the one thing that may differ.
            EngineEvent::Done(usage) => self.done = Some(Usage { cached_prompt_tokens: 0, ..usage }),
            EngineEvent::Failed { reason, retryable } => self.failed = Some((reason, retryable)),
        }
    }

    pub fn tokens(&self, choice: u32) -> Vec<u32> {
        let events = self.answers.get(&choice).map(Vec::as_slice).unwrap_or_default();
        events.iter().filter_map(|event| if let EngineEvent::Token(token) = event { Some(token.token) } else { None }).collect()
    }

    pub fn text(&self, choice: u32) -> String {
        let events = self.answers.get(&choice).map(Vec::as_slice).unwrap_or_default();
        let text = |event: &EngineEvent| match event {
            EngineEvent::Token(token) => token.text.clone(),
            EngineEvent::Finished { text, .. } => text.clone(),
            _ => String::new(),
        };
        events.iter().map(text).collect()
    }

    pub fn finish_reason(&self, choice: u32) -> FinishReason {
        match self.answers[&choice].last() {
            Some(EngineEvent::Finished { reason, .. }) => reason.clone(),
            other => panic!("answer {choice} did not finish: {other:?}"),
        }
    }
}
