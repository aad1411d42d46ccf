//! What travels between callers, gateways and workers on simulated streams: the wire of engines, and HTTP, as plain values.
//!
//! What it is not: their encodings, which have fuzz targets and tests of their own.

use std::sync::Arc;

use forge_gateway::ApiError;
use forge_shared::generate::{AdmitError, EngineEvent, GenerateRequest};
use forge_shared::link::EngineStatus;
use forge_worker::agent::RunId;

use crate::message::CallId;

/// On a gateway's connection to a worker, which carries many calls; pings on any connection.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "each variant is described; its fields' names and types say the rest")]
pub enum Wire {
    /// Whether the other end lives, and that it does.
    Ping,
    Pong,
    /// Answer this request, within its time.
    Submit {
        call: CallId,
        run: RunId,
        request: Arc<GenerateRequest>,
        timeout_ms: u64,
    },
    /// It will be answered.
    Admitted {
        call: CallId,
    },
    /// It will not.
    Refused {
        call: CallId,
        error: AdmitError,
    },
    /// Parts of the answer.
    Events {
        call: CallId,
        events: Vec<EngineEvent>,
    },
    /// The engine died: nothing more comes.
    Ended {
        call: CallId,
    },
    /// The caller is not interested any more.
    Cancel {
        call: CallId,
    },
    /// Tell of a run's status.
    WatchReplica {
        call: CallId,
        run: RunId,
    },
    /// The status.
    Update {
        call: CallId,
        status: EngineStatus,
    },
    /// There is no such run here, or no more.
    NotFound {
        call: CallId,
    },
}

/// What a caller wants.
#[derive(Debug, Clone, PartialEq)]
pub struct Order {
    /// For timelines.
    pub id: String,
    /// `Idempotency-Key`.
    pub key: Option<String>,
    /// `seed`.
    pub seed: Option<u64>,
    /// Tokens of the prompt.
    pub prompt: Arc<[u32]>,
    /// `max_tokens`.
    pub max_tokens: u32,
    /// `n`.
    pub choices: u32,
}

/// On a caller's connection to a gateway.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "each variant is described; its fields' names and types say the rest")]
pub enum Http {
    /// A request.
    Post(Arc<Order>),
    /// The head of an answer; the seed is told to the test alone.
    Accepted { seed: u64 },
    /// Parts of it.
    Events(Vec<EngineEvent>),
    /// A comment: the gateway lives.
    Comment,
    /// The answer's error, or the stream's last event.
    Error(ApiError),
}
