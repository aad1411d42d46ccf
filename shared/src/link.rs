//! `EngineLink`: how a gateway reaches an engine. In one process it is a channel; in a cluster it is a wire.
//!
//! Invariant: an admitted request answers with events until `Done` or `Failed`, or its stream ends because the
//! engine died; dropping the stream cancels the request and frees its KV within one step.

use std::sync::Arc;

use futures::future::BoxFuture;
use tokio::sync::mpsc;

use crate::generate::{AdmitError, EngineEvent, GenerateRequest};

/// Events of one request. Ends without `Done` if the engine died: the request may be submitted again.
pub type EventStream = mpsc::Receiver<EngineEvent>;

/// What a gateway needs to know of a served model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelCard {
    /// First of `names`: what responses carry where the request named an alias.
    pub name: String,
    /// Names it answers to that lists show.
    pub names: Vec<String>,
    /// Names it answers to that lists leave out: paths of the machine it runs on.
    pub unlisted_names: Vec<String>,
    /// Longest sequence, prompt and answer.
    pub max_model_len: usize,
    /// Ids of the model.
    pub vocab_size: usize,
    /// Comes back as `system_fingerprint`.
    pub numerics_id: String,
    /// When it began to be served, seconds since 1970.
    pub created_s: u64,
    /// Defaults of generation_config.json: temperature, top_k, top_p, repetition_penalty where given.
    pub default_sampling: DefaultSampling,
}

/// Sampling defaults that come with a checkpoint; a request's own fields win.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct DefaultSampling {
    /// Temperature.
    pub temperature: Option<f32>,
    /// Top-k.
    pub top_k: Option<u32>,
    /// Top-p.
    pub top_p: Option<f32>,
    /// Min-p.
    pub min_p: Option<f32>,
    /// Repetition penalty.
    pub repetition_penalty: Option<f32>,
}

/// What an engine is doing, for readiness, routing and metrics.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct EngineStatus {
    /// Can answer now.
    pub ready: bool,
    /// Why not, if not.
    pub reason: String,
    /// Sequences in the running batch.
    pub running: usize,
    /// Sequences waiting.
    pub waiting: usize,
    /// KV blocks in use (cached free ones do not count).
    pub kv_blocks_used: usize,
    /// KV blocks there are.
    pub kv_blocks_total: usize,
    /// Times the engine was restarted by its supervisor.
    pub restarts: u32,
}

/// Changes of an engine's prefix cache: prompt blocks it can reuse, each by the first 64 bits of forge-text's prefix hash.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PrefixUpdate {
    /// Forget everything said before.
    pub reset: bool,
    /// Now there.
    pub stored: Vec<u64>,
    /// No longer there.
    pub removed: Vec<u64>,
}

/// A way to one replica's engine.
pub trait EngineLink: Send + Sync + 'static {
    /// Submits a request. `Ok` means admitted: it will be answered even if this engine dies and another
    /// replays it.
    fn submit(&self, request: GenerateRequest) -> BoxFuture<'_, Result<EventStream, AdmitError>>;
    /// What is served.
    fn card(&self) -> Arc<ModelCard>;
    /// State now; cheap.
    fn status(&self) -> EngineStatus;
}
