//! The model of the simulated engines, and what it answers when nothing disturbs it.
//!
//! The "KV" of a token is a hash of all tokens up to it, read from the slot of the token before, and the logits of a row are
//! a function of every slot that its block table names. So a wrong table, a missing copy, a block that is shared wrongly or
//! given on too early lead to other tokens. Which token follows is production's sampler's to draw, from the request's seed
//! and the position: an [`Undisturbed`] answer is known from the request alone.

use std::sync::OnceLock;

use forge_engine::sampler::{DrawKey, SampleInput, Sampler, TokenHistory};
use forge_model::{StepModelInfo, StepPlan};
use forge_shared::generate::{FinishReason, GenerateRequest, SamplingParams};
use forge_shared::telemetry::Metrics;
use forge_text::{GgufTokenizer, Tokenizer};

/// Tokens there are; the last one ends an answer.
pub const VOCAB: u32 = 32;
const END: u32 = VOCAB - 1;
/// Longest prompt and answer together.
pub const MAX_LEN: usize = 96;
/// Of the engines' KV: two long requests fill it, so that some wait and some are put back.
const BLOCK_SIZE: usize = 4;
const KV_BLOCKS: usize = 36;
/// The one numerics id.
pub const NUMERICS: &str = "n1";

/// The model's tokenizer: letters, and an end.
///
/// # Panics
/// Of nothing: the vocabulary is fixed.
pub fn tokenizer() -> Tokenizer {
    static MADE: OnceLock<Tokenizer> = OnceLock::new();
    let make = || {
        let mut tokens: Vec<String> = ('a'..='z').chain('0'..='3').map(String::from).collect();
        tokens.extend(["ab", "<end>"].map(String::from));
        let mut token_types = vec![1; tokens.len() - 1];
        token_types.push(3);
        let gguf = GgufTokenizer {
            model: "gpt2".into(),
            pre: "gpt-2".into(),
            tokens,
            token_types,
            merges: vec!["a b".into()],
            eos_id: Some(END),
            ..GgufTokenizer::default()
        };
        Tokenizer::from_gguf(&gguf)
    };
    MADE.get_or_init(|| make().unwrap_or_else(|error| panic!("the stub's tokenizer: {error}"))).clone()
}

/// Where engines count; nobody reads it.
pub fn metrics() -> &'static Metrics {
    static MADE: OnceLock<Metrics> = OnceLock::new();
    MADE.get_or_init(Metrics::new)
}

/// What engines know of the model.
pub fn info() -> StepModelInfo {
    StepModelInfo {
        vocab_size: VOCAB as usize,
        max_model_len: MAX_LEN,
        block_size: BLOCK_SIZE,
        kv_blocks: KV_BLOCKS,
        kv_block_bytes: 1,
        max_step_rows: 48,
        max_logits_rows: 48,
        numerics_id: NUMERICS.into(),
    }
}

fn mix(a: u64, b: u64) -> u64 {
    let mut x = a.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ b.wrapping_add(0xD1B5_4A32_D192_ED03);
    x = (x ^ (x >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x ^ (x >> 32)
}

/// Appends a row: quarters, so that equal logits are common.
fn logits_of(state: u64, logits: &mut Vec<f32>) {
    logits.extend((0..u64::from(VOCAB)).map(|token| (mix(state, token) >> 59) as f32 * 0.25 - 4.0));
}

const FIRST: u64 = 1;
const STATE: u64 = 7;

/// The model with its KV memory.
#[derive(Debug)]
pub struct StubModel {
    slots: Vec<u64>,
}

impl Default for StubModel {
    fn default() -> Self {
        StubModel { slots: vec![0xDEAD; BLOCK_SIZE * KV_BLOCKS] }
    }
}

impl StubModel {
    /// Runs a step.
    ///
    /// # Errors
    /// A plan that no model could run.
    pub fn step(&mut self, plan: &StepPlan, logits: &mut Vec<f32>) -> Result<(), String> {
        let size = BLOCK_SIZE;
        for &(from, to) in &plan.block_copies {
            self.slots.copy_within(from as usize * size..(from as usize + 1) * size, to as usize * size);
        }
        let mut written = Vec::with_capacity(plan.tokens.len());
        for sequence in &plan.sequences {
            let table = &plan.block_tables[sequence.table_start as usize..(sequence.table_start + sequence.table_len) as usize];
            for offset in 0..sequence.row_count {
                let row = (sequence.row_start + offset) as usize;
                let position = (sequence.first_position + offset) as usize;
                let slot = table[position / size] as usize * size + position % size;
                if plan.slots[row] as usize != slot || plan.positions[row] as usize != position {
                    return Err(format!("row {row} is at position {position} and names another place than its table"));
                }
                let before = match position {
                    0 => FIRST,
                    _ => self.slots[table[(position - 1) / size] as usize * size + (position - 1) % size],
                };
                self.slots[slot] = mix(before, u64::from(plan.tokens[row]));
                written.push(slot);
            }
        }
        written.sort_unstable();
        if let Some(twice) = written.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(format!("two rows of a step write slot {}", twice[0]));
        }
        logits.clear();
        for &row in &plan.logits_rows {
            let of_row = |sequence: &&forge_kernels::SequenceSlice| sequence.row_start <= row;
            let Some(sequence) = plan.sequences.iter().rfind(of_row) else { return Err(format!("row {row} is no sequence's")) };
            let table = &plan.block_tables[sequence.table_start as usize..(sequence.table_start + sequence.table_len) as usize];
            let position = plan.positions[row as usize] as usize;
            let state = (0..=position).fold(STATE, |state, at| mix(state, self.slots[table[at / size] as usize * size + at % size]));
            logits_of(state, logits);
        }
        Ok(())
    }
}

/// One answer as it is when nothing goes wrong, token by token.
#[derive(Debug)]
pub struct Undisturbed {
    params: SamplingParams,
    history: TokenHistory,
    seed: u64,
    choice: u32,
    prompt_tokens: u32,
    /// Of the last token's slot, and over all slots.
    slot: u64,
    state: u64,
    /// Tokens so far.
    pub tokens: u32,
    /// How it ended.
    pub end: Option<FinishReason>,
}

impl Undisturbed {
    /// Of one choice of a request that nobody has answered yet.
    pub fn new(request: &GenerateRequest, choice: u32) -> Self {
        let mut answer = Undisturbed {
            params: request.params.clone(),
            history: TokenHistory::new(&request.params, &request.prompt_tokens),
            seed: request.seed,
            choice,
            prompt_tokens: request.prompt_tokens.len() as u32,
            slot: FIRST,
            state: STATE,
            tokens: 0,
            end: None,
        };
        request.prompt_tokens.iter().for_each(|&token| answer.push(token));
        answer
    }

    fn push(&mut self, token: u32) {
        self.slot = mix(self.slot, u64::from(token));
        self.state = mix(self.state, self.slot);
    }

    /// The next token; `None` after the end.
    pub fn next_token(&mut self, sampler: &mut Sampler, row: &mut Vec<f32>) -> Option<u32> {
        if self.end.is_some() {
            return None;
        }
        row.clear();
        logits_of(self.state, row);
        let key = DrawKey { seed: self.seed, choice: self.choice, position: self.prompt_tokens + self.tokens };
        let input = SampleInput { params: &self.params, history: &self.history, forbidden: &[], key };
        let token = sampler.sample(row, input).ok()?.token;
        self.push(token);
        self.history.push(token);
        self.tokens += 1;
        if token == END {
            self.end = Some(FinishReason::EndOfText);
        } else if self.tokens >= self.params.max_tokens {
            self.end = Some(FinishReason::Length);
        }
        Some(token)
    }
}
