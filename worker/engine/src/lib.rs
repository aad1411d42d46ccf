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

pub mod admission;
pub mod blocks;
pub mod sampler;
pub mod scheduler;

mod active;
mod answer;
mod core;
mod engine;
mod error;
mod handle;
mod meter;
mod options;
mod outlet;
mod retry;
mod thread;

pub use core::EngineCore;
pub use engine::{Completion, Engine, Events, Generation, Piece, TokenStream};
pub use error::EngineError;
pub use handle::{EngineHandle, EngineTimes};
pub use options::EngineOptions;
pub use thread::{EngineExit, EngineSetup, EngineThread};
