//! How an engine is set up; checked against the model once, at the start.

use forge_model::StepModelInfo;
use forge_shared::ids::Epoch;

use crate::EngineError;
use crate::scheduler::SchedulerLimits;

/// Settings of an engine. Every figure has a bound that is checked when the engine is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineOptions {
    /// Most sequences computed together. Bounded by the model's `max_step_rows` and `max_logits_rows`.
    pub max_batch_size: usize,
    /// Most tokens of one prompt in a step.
    pub max_chunk_rows: usize,
    /// Whether KV of equal prefixes is shared between requests of a tenant.
    pub prefix_caching: bool,
    /// Requests that may wait for their first step; more are refused, but for as many again that go on after another engine.
    pub max_waiting: usize,
    /// Events a client may be behind before its sequences pause.
    pub event_capacity: usize,
    /// Epoch written into step plans.
    pub epoch: Epoch,
}

impl Default for EngineOptions {
    fn default() -> Self {
        EngineOptions {
            max_batch_size: 32,
            max_chunk_rows: 512,
            prefix_caching: true,
            max_waiting: 1024,
            event_capacity: 1024,
            epoch: Epoch::default(),
        }
    }
}

impl EngineOptions {
    /// The scheduler's limits for a model.
    ///
    /// # Errors
    /// [`EngineError::Option`]: an option that is zero or more than the model can do.
    pub(crate) fn limits(&self, info: &StepModelInfo) -> Result<SchedulerLimits, EngineError> {
        let positive = [
            ("max_chunk_rows", self.max_chunk_rows),
            ("max_waiting", self.max_waiting),
            ("event_capacity", self.event_capacity),
            ("block_size", info.block_size),
            ("kv_blocks", info.kv_blocks),
            ("vocab_size", info.vocab_size),
            ("max_model_len", info.max_model_len),
        ];
        for (field, actual) in positive {
            if actual == 0 {
                return Err(EngineError::Option { field, expected: "at least 1".into(), actual });
            }
        }
        let most = info.max_step_rows.min(info.max_logits_rows);
        if self.max_batch_size == 0 || self.max_batch_size > most {
            return Err(EngineError::Option {
                field: "max_batch_size",
                expected: format!("between 1 and the model's rows per step ({most})"),
                actual: self.max_batch_size,
            });
        }
        Ok(SchedulerLimits {
            max_step_rows: info.max_step_rows,
            max_logits_rows: info.max_logits_rows,
            max_batch_size: self.max_batch_size,
            max_chunk_rows: self.max_chunk_rows,
            prefix_caching: self.prefix_caching,
        })
    }
}
