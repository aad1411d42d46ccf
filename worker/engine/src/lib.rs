//! Generation: which tokens to compute next, where their KV lies, which token follows.
//!
//! It runs anything that implements [`forge_model::StepModel`]: it knows no architecture and no kernel, and no
//! HTTP.
//!
//! | part | what it is |
//! |---|---|
//! | [`blocks::BlockManager`] | who holds which KV block; prefix cache; copy on write |
//! | [`scheduler::Scheduler`] | which tokens of which sequences the next step computes |
//! | [`sampler::Sampler`] | from logits to a token, counter-based |
//! | [`EngineCore`] | the three together with text and events; no thread, no clock |
//! | [`EngineThread`], [`EngineHandle`] | the core on its own thread; `EngineLink` for gateways |
//! | [`Engine`] | blocking calls for those who embed Forge |
//!
//! Invariant (DESIGN P2): a request's tokens and log-probabilities are a function of the request and the
//! model's numerics id. Batch, chunking, prefix cache, preemption, cancellation of others and replay have no part.

//! # Embedding
//! Any [`forge_model::StepModel`] can be run; a checkpoint loaded by `forge-model` is one. The model of this
//! example has no weights: the token that follows is always the next letter.
//!
//! ```
//! use forge_engine::{Engine, EngineOptions};
//! use forge_model::{ModelError, StepModel, StepModelInfo, StepPlan};
//! use forge_shared::generate::{FinishReason, SamplingParams};
//! use forge_text::{GgufTokenizer, Tokenizer};
//!
//! struct Alphabet(StepModelInfo);
//!
//! impl StepModel for Alphabet {
//!     fn info(&self) -> &StepModelInfo {
//!         &self.0
//!     }
//!     fn step(&mut self, plan: &StepPlan, logits: &mut Vec<f32>) -> Result<(), ModelError> {
//!         logits.clear();
//!         for &row in &plan.logits_rows {
//!             let next = (plan.tokens[row as usize] + 1) % 26;
//!             logits.extend((0..27).map(|token| if token == next { 10.0 } else { 0.0 }));
//!         }
//!         Ok(())
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let tokenizer = Tokenizer::from_gguf(&GgufTokenizer {
//!     model: "gpt2".into(),
//!     tokens: ('a'..='z').map(String::from).chain(["ab".to_string()]).collect(),
//!     merges: vec!["a b".into()],
//!     ..GgufTokenizer::default()
//! })?;
//! let model = Alphabet(StepModelInfo {
//!     vocab_size: 27,
//!     max_model_len: 64,
//!     block_size: 16,
//!     kv_blocks: 16,
//!     kv_block_bytes: 0,
//!     max_step_rows: 64,
//!     max_logits_rows: 64,
//!     numerics_id: "alphabet".into(),
//! });
//! let engine = Engine::new(Box::new(model), tokenizer.clone(), EngineOptions::default())?;
//!
//! let prompt = tokenizer.encode("x", false)?;
//! let params = SamplingParams { temperature: 0.0, max_tokens: 20, stop: vec!["de".into()], ..SamplingParams::default() };
//! let completion = engine.generate(&prompt, params.clone())?;
//! assert_eq!(completion.text, "yzabc");
//! assert_eq!(completion.finish_reason, FinishReason::StopString("de".into()));
//!
//! // The same, piece by piece. Nothing of a stop string is ever given out.
//! let mut text = String::new();
//! for piece in engine.stream(&prompt, params)? {
//!     text.push_str(&piece?.text);
//! }
//! assert_eq!(text, "yzabc");
//! # Ok(())
//! # }
//! ```

pub mod admission;
pub mod blocks;
pub mod sampler;
pub mod scheduler;

mod active;
mod answer;
mod core;
mod draws;
mod engine;
mod error;
mod handle;
mod listeners;
mod meter;
mod options;
mod outlet;
mod retry;
mod text;
mod thread;

pub use core::EngineCore;
pub use engine::{Completion, Engine, Events, Generation, Piece, TokenStream};
pub use error::EngineError;
pub use handle::{EngineHandle, EngineTimes};
pub use options::EngineOptions;
pub use text::{gguf_tokenizer, open_text};
pub use thread::{EngineExit, EngineSetup, EngineThread};
