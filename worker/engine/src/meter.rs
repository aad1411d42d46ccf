//! The engine's own metrics, bound to its run's labels once.
//!
//! It counts what only the engine sees: batch, queue, KV, prefix cache, preemptions, time shares. What a client
//! sees (first token, latencies, tokens, refusals) is counted by the gateway.

use std::time::Duration;

use forge_shared::telemetry::{FloatGauge, Metrics, RunLabel};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;

use crate::scheduler::{Scheduler, SchedulerCounts};

#[derive(Debug)]
pub(crate) struct Meter {
    running: Gauge,
    waiting: Gauge,
    kv_usage_ratio: FloatGauge,
    prefix_queries: Counter,
    prefix_hits: Counter,
    preemptions: Counter,
    queue_time_s: Histogram,
    step_rows: Histogram,
    model_ns: Counter,
    other_ns: Counter,
    /// What was counted already.
    seen: SchedulerCounts,
}

impl Meter {
    pub(crate) fn new(metrics: &Metrics, label: &RunLabel) -> Self {
        Meter {
            running: metrics.requests_running.get_or_create(label).clone(),
            waiting: metrics.requests_waiting.get_or_create(label).clone(),
            kv_usage_ratio: metrics.kv_cache_usage_ratio.get_or_create(label).clone(),
            prefix_queries: metrics.prefix_cache_queries.get_or_create(label).clone(),
            prefix_hits: metrics.prefix_cache_hits.get_or_create(label).clone(),
            preemptions: metrics.preemptions.get_or_create(label).clone(),
            queue_time_s: metrics.queue_time_s.get_or_create(label).clone(),
            step_rows: metrics.step_rows.get_or_create(label).clone(),
            model_ns: metrics.step_model_ns.get_or_create(label).clone(),
            other_ns: metrics.step_other_ns.get_or_create(label).clone(),
            seen: SchedulerCounts::default(),
        }
    }

    /// A request began to run after waiting this long.
    pub(crate) fn started(&self, waited: Duration) {
        self.queue_time_s.observe(waited.as_secs_f64());
    }

    /// A step was planned.
    pub(crate) fn planned(&self, rows: usize) {
        self.step_rows.observe(rows as f64);
    }

    /// Sets gauges and adds what the scheduler counted since the last call.
    pub(crate) fn observe(&mut self, scheduler: &Scheduler) {
        self.running.set(scheduler.running() as i64);
        self.waiting.set(scheduler.waiting() as i64);
        let blocks = scheduler.blocks();
        self.kv_usage_ratio.set(blocks.used() as f64 / blocks.total().max(1) as f64);
        let counts = scheduler.counts();
        self.prefix_queries.inc_by(counts.prefix_queries - self.seen.prefix_queries);
        self.prefix_hits.inc_by(counts.prefix_hits - self.seen.prefix_hits);
        self.preemptions.inc_by(counts.preemptions - self.seen.preemptions);
        self.seen = counts;
    }

    /// Sets the gauges to nothing.
    pub(crate) fn clear(&self) {
        self.running.set(0);
        self.waiting.set(0);
        self.kv_usage_ratio.set(0.0);
    }

    /// Adds a step's time.
    pub(crate) fn step_time(&self, model: Duration, other: Duration) {
        self.model_ns.inc_by(model.as_nanos() as u64);
        self.other_ns.inc_by(other.as_nanos() as u64);
    }
}
