//! Every metric Forge serves: its name, type and help, in this one place.
//!
//! Handles are cheap clones of shared atomics. A metric has one Forge name, and where vLLM serves the same
//! quantity, vLLM's name as an alias of the same handle, so that existing dashboards and routers work.
//!
//! What it is not: it measures nothing itself, and it knows no HTTP.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::ids::Epoch;

/// Gauge of a float.
pub type FloatGauge = Gauge<f64, AtomicU64>;

/// Label: which model.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ModelLabel {
    /// Served name; taken from the configuration, never from a request.
    pub model_name: String,
}

/// Labels of an engine: two replicas of a model may be in one process, and two epochs of a replica too. Sums over what is
/// left out (`sum by (model_name)`) are those of the model.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RunLabel {
    /// Served name.
    pub model_name: String,
    /// `service/index`.
    pub replica: String,
    /// Of its plan.
    pub epoch: u64,
}

/// Label: a device of this node.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct DeviceLabel {
    /// Its number.
    pub device: u32,
}

/// Label: where replicas stand.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PhaseLabel {
    /// As `forgectl get placements` says it: placed, pulling, loading, ready, draining, failed.
    pub phase: String,
}

/// Label: where the tie to the coordinators stands.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct SessionLabel {
    /// connecting, welcome or expired.
    pub state: String,
}

/// Labels of a finished request.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct FinishLabel {
    /// Served name.
    pub model_name: String,
    /// stop, length, abort or error.
    pub finished_reason: String,
}

/// Labels of an HTTP response.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct HttpLabel {
    /// Route pattern, not the path.
    pub route: String,
    /// Status code.
    pub status: u16,
}

/// Makes histograms of one bucket layout.
#[derive(Clone)]
pub struct Buckets(&'static [f64]);

impl MetricConstructor<Histogram> for Buckets {
    fn new_metric(&self) -> Histogram {
        Histogram::new(self.0.iter().copied())
    }
}

/// A histogram per model.
pub type ModelHistogram = Family<ModelLabel, Histogram, Buckets>;

/// A histogram per engine.
pub type RunHistogram = Family<RunLabel, Histogram, Buckets>;

const LATENCY_S: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0,
    2560.0,
];
const TOKEN_S: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5];
const TOKENS: &[f64] = &[1.0, 8.0, 32.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0, 131072.0];
const ROWS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0];

/// Handles of all metrics and the registry that serves them. Clones share everything.
#[derive(Clone)]
pub struct Metrics {
    registry: Arc<Registry>,
    /// HTTP responses by route and status.
    pub http_responses: Family<HttpLabel, Counter>,
    /// Requests being answered.
    pub requests_in_progress: Family<ModelLabel, Gauge>,
    /// Requests that ended, by reason.
    pub requests_finished: Family<FinishLabel, Counter>,
    /// Requests submitted again after an engine died.
    pub requests_replayed: Family<ModelLabel, Counter>,
    /// Prompt tokens accepted.
    pub prompt_tokens: Family<ModelLabel, Counter>,
    /// Tokens generated.
    pub generation_tokens: Family<ModelLabel, Counter>,
    /// Request in to first token out.
    pub time_to_first_token_s: ModelHistogram,
    /// Between two tokens of one answer.
    pub inter_token_latency_s: ModelHistogram,
    /// Request in to last token out.
    pub end_to_end_latency_s: ModelHistogram,
    /// Waiting before the first step.
    pub queue_time_s: RunHistogram,
    /// Prompt lengths.
    pub request_prompt_tokens: ModelHistogram,
    /// Answer lengths.
    pub request_generation_tokens: ModelHistogram,
    /// Sequences in the running batch.
    pub requests_running: Family<RunLabel, Gauge>,
    /// Sequences waiting.
    pub requests_waiting: Family<RunLabel, Gauge>,
    /// Share of KV blocks in use, 0 to 1.
    pub kv_cache_usage_ratio: Family<RunLabel, FloatGauge>,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_cache_queries: Family<RunLabel, Counter>,
    /// Prompt tokens found there.
    pub prefix_cache_hits: Family<RunLabel, Counter>,
    /// Sequences put back to wait because KV ran out.
    pub preemptions: Family<RunLabel, Counter>,
    /// Rows per step.
    pub step_rows: RunHistogram,
    /// Nanoseconds in the model.
    pub step_model_ns: Family<RunLabel, Counter>,
    /// Nanoseconds of a step outside the model: scheduling, sampling, detokenizing, handing out.
    pub step_other_ns: Family<RunLabel, Counter>,
    /// Engine restarts by its supervisor.
    pub engine_restarts: Family<RunLabel, Counter>,
    /// Seconds the model took to load.
    pub model_load_s: Family<RunLabel, FloatGauge>,
    /// Requests refused for want of capacity (429).
    pub requests_rejected: Family<ModelLabel, Counter>,
    /// Bytes of a device that this node may use (worker).
    pub device_memory_bytes: Family<DeviceLabel, Gauge>,
    /// Of those, bytes that are given to replicas (worker).
    pub device_memory_used_bytes: Family<DeviceLabel, Gauge>,
    /// Replicas by where they stand (worker).
    pub replicas: Family<PhaseLabel, Gauge>,
    /// Bytes of models that were pulled (worker).
    pub pulled_bytes: Family<ModelLabel, Counter>,
    /// 1 for the state the session is in, 0 for the others (worker).
    pub session: Family<SessionLabel, Gauge>,
    /// Seconds until this process's certificate ends (worker, gateway of a cluster).
    pub certificate_left_s: Family<RoleLabel, Gauge>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// A fresh registry with every metric at zero.
    pub fn new() -> Self {
        let histogram = |buckets| ModelHistogram::new_with_constructor(Buckets(buckets));
        let run_histogram = |buckets| RunHistogram::new_with_constructor(Buckets(buckets));
        let mut metrics = Metrics {
            registry: Arc::default(),
            http_responses: Family::default(),
            requests_in_progress: Family::default(),
            requests_finished: Family::default(),
            requests_replayed: Family::default(),
            prompt_tokens: Family::default(),
            generation_tokens: Family::default(),
            time_to_first_token_s: histogram(LATENCY_S),
            inter_token_latency_s: histogram(TOKEN_S),
            end_to_end_latency_s: histogram(LATENCY_S),
            queue_time_s: run_histogram(LATENCY_S),
            request_prompt_tokens: histogram(TOKENS),
            request_generation_tokens: histogram(TOKENS),
            requests_running: Family::default(),
            requests_waiting: Family::default(),
            kv_cache_usage_ratio: Family::default(),
            prefix_cache_queries: Family::default(),
            prefix_cache_hits: Family::default(),
            preemptions: Family::default(),
            step_rows: run_histogram(ROWS),
            step_model_ns: Family::default(),
            step_other_ns: Family::default(),
            engine_restarts: Family::default(),
            model_load_s: Family::default(),
            requests_rejected: Family::default(),
            device_memory_bytes: Family::default(),
            device_memory_used_bytes: Family::default(),
            replicas: Family::default(),
            pulled_bytes: Family::default(),
            session: Family::default(),
            certificate_left_s: Family::default(),
        };
        metrics.registry = Arc::new(metrics.register());
        metrics
    }

    /// The names. Counters get `_total` from the encoder.
    fn register(&self) -> Registry {
        let mut registry = Registry::default();
        let r = &mut registry;
        r.register("forge_http_responses", "HTTP responses by route and status", self.http_responses.clone());
        r.register("forge_requests_in_progress", "Requests being answered", self.requests_in_progress.clone());
        r.register("forge_requests_finished", "Requests that ended, by reason", self.requests_finished.clone());
        r.register("vllm:request_success", "Alias of forge_requests_finished", self.requests_finished.clone());
        r.register("forge_requests_replayed", "Requests submitted again after an engine died", self.requests_replayed.clone());
        r.register("forge_requests_rejected", "Requests refused for want of capacity", self.requests_rejected.clone());
        r.register("forge_prompt_tokens", "Prompt tokens accepted", self.prompt_tokens.clone());
        r.register("vllm:prompt_tokens", "Alias of forge_prompt_tokens", self.prompt_tokens.clone());
        r.register("forge_generation_tokens", "Tokens generated", self.generation_tokens.clone());
        r.register("vllm:generation_tokens", "Alias of forge_generation_tokens", self.generation_tokens.clone());
        r.register("forge_time_to_first_token_seconds", "Request in to first token out", self.time_to_first_token_s.clone());
        r.register("vllm:time_to_first_token_seconds", "Alias", self.time_to_first_token_s.clone());
        r.register("forge_inter_token_latency_seconds", "Between two tokens of one answer", self.inter_token_latency_s.clone());
        r.register("vllm:inter_token_latency_seconds", "Alias", self.inter_token_latency_s.clone());
        r.register("forge_request_duration_seconds", "Request in to last token out", self.end_to_end_latency_s.clone());
        r.register("vllm:e2e_request_latency_seconds", "Alias", self.end_to_end_latency_s.clone());
        r.register("forge_queue_duration_seconds", "Waiting before the first step", self.queue_time_s.clone());
        r.register("vllm:request_queue_time_seconds", "Alias", self.queue_time_s.clone());
        r.register("forge_request_prompt_tokens", "Prompt tokens per request", self.request_prompt_tokens.clone());
        r.register("vllm:request_prompt_tokens", "Alias", self.request_prompt_tokens.clone());
        r.register("forge_request_generation_tokens", "Generated tokens per request", self.request_generation_tokens.clone());
        r.register("vllm:request_generation_tokens", "Alias", self.request_generation_tokens.clone());
        r.register("forge_requests_running", "Sequences in the running batch", self.requests_running.clone());
        r.register("vllm:num_requests_running", "Alias of forge_requests_running", self.requests_running.clone());
        r.register("forge_requests_waiting", "Sequences waiting", self.requests_waiting.clone());
        r.register("vllm:num_requests_waiting", "Alias of forge_requests_waiting", self.requests_waiting.clone());
        r.register("forge_kv_cache_usage_ratio", "Share of KV blocks in use", self.kv_cache_usage_ratio.clone());
        r.register("vllm:kv_cache_usage_perc", "Alias of forge_kv_cache_usage_ratio", self.kv_cache_usage_ratio.clone());
        r.register("forge_prefix_cache_queries", "Prompt tokens looked up in the prefix cache", self.prefix_cache_queries.clone());
        r.register("vllm:prefix_cache_queries", "Alias", self.prefix_cache_queries.clone());
        r.register("forge_prefix_cache_hits", "Prompt tokens found in the prefix cache", self.prefix_cache_hits.clone());
        r.register("vllm:prefix_cache_hits", "Alias", self.prefix_cache_hits.clone());
        r.register("forge_preemptions", "Sequences put back to wait because KV ran out", self.preemptions.clone());
        r.register("vllm:num_preemptions", "Alias", self.preemptions.clone());
        r.register("forge_step_rows", "Rows per engine step", self.step_rows.clone());
        r.register("forge_step_model_nanoseconds", "Time in the model", self.step_model_ns.clone());
        r.register("forge_step_other_nanoseconds", "Time of steps outside the model", self.step_other_ns.clone());
        r.register("forge_engine_restarts", "Engine restarts by its supervisor", self.engine_restarts.clone());
        r.register("forge_model_load_seconds", "Time the model took to load", self.model_load_s.clone());
        r.register("forge_device_memory_bytes", "Memory of a device that may be used", self.device_memory_bytes.clone());
        r.register("forge_device_memory_used_bytes", "Memory of a device given to replicas", self.device_memory_used_bytes.clone());
        r.register("forge_replicas", "Replicas by where they stand", self.replicas.clone());
        r.register("forge_pulled_bytes", "Bytes of models that were pulled", self.pulled_bytes.clone());
        r.register("forge_session", "State of the session with the coordinators", self.session.clone());
        r.register("forge_certificate_left_seconds", CERTIFICATE_HELP, self.certificate_left_s.clone());
        registry
    }

    /// The Prometheus text page (OpenMetrics 1.0).
    pub fn encode(&self) -> String {
        page(&self.registry)
    }

    /// Takes what an engine counted off the page: nothing of it is left. Handles that still exist count for nobody.
    pub fn forget_run(&self, run: &RunLabel) {
        self.requests_running.remove(run);
        self.requests_waiting.remove(run);
        self.kv_cache_usage_ratio.remove(run);
        self.prefix_cache_queries.remove(run);
        self.prefix_cache_hits.remove(run);
        self.preemptions.remove(run);
        self.queue_time_s.remove(run);
        self.step_rows.remove(run);
        self.step_model_ns.remove(run);
        self.step_other_ns.remove(run);
        self.engine_restarts.remove(run);
        self.model_load_s.remove(run);
    }
}

fn page(registry: &Registry) -> String {
    let mut page = String::new();
    // Writing to a String cannot fail; an error here would be a defect of an encoder.
    if let Err(error) = encode(&mut page, registry) {
        page = format!("# metrics could not be encoded: {error}\n# EOF\n");
    }
    page
}

/// Label: which command.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CommandLabel {
    /// Its name in the log.
    pub command: String,
    /// ok, refused or failed.
    pub outcome: String,
}

/// Label: a role of nodes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RoleLabel {
    /// coordinator, worker or gateway.
    pub role: String,
}

const CERTIFICATE_HELP: &str = "Until this process's certificate ends; it renews itself when a third is left";

const COMMAND_S: &[f64] = &[0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

const DISK_S: &[f64] = &[0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

/// What a raft member measures of itself. Clones share everything.
#[derive(Debug, Clone)]
pub struct RaftMetrics {
    /// Seconds of each fsync of the log or of a snapshot.
    pub fsync_s: Histogram,
    /// Seconds in which the member's thread was at work on what had waited, fsync included: what comes meanwhile waits.
    pub turn_s: Histogram,
    /// Seconds from the decision to make a snapshot to its being on disk.
    pub snapshot_s: Histogram,
    /// Proposals that the member took and has not answered.
    pub proposals_waiting: Gauge,
    /// Bytes of the entries in the log.
    pub log_bytes: Gauge,
    /// Last entry in the newest snapshot.
    pub snapshot_index: Gauge,
    /// Seconds since the newest snapshot came; since the start, where it is older.
    pub snapshot_age_s: Gauge,
    /// Whether the disk is full, 0 or 1.
    pub disk_full: Gauge,
}

impl Default for RaftMetrics {
    fn default() -> Self {
        RaftMetrics {
            fsync_s: Buckets(DISK_S).new_metric(),
            turn_s: Buckets(DISK_S).new_metric(),
            snapshot_s: Buckets(DISK_S).new_metric(),
            proposals_waiting: Gauge::default(),
            log_bytes: Gauge::default(),
            snapshot_index: Gauge::default(),
            snapshot_age_s: Gauge::default(),
            disk_full: Gauge::default(),
        }
    }
}

impl RaftMetrics {
    fn register(&self, r: &mut Registry) {
        r.register("forge_raft_fsync_duration_seconds", "Each fsync of the log or of a snapshot", self.fsync_s.clone());
        r.register("forge_raft_turn_duration_seconds", "Work of the member's thread on what had waited", self.turn_s.clone());
        r.register(
            "forge_raft_snapshot_duration_seconds",
            "From the decision to make a snapshot to its being on disk",
            self.snapshot_s.clone(),
        );
        r.register("forge_raft_proposals_waiting", "Proposals that were taken and not answered", self.proposals_waiting.clone());
        r.register("forge_raft_log_bytes", "Bytes of the entries in the log", self.log_bytes.clone());
        r.register("forge_raft_snapshot_index", "Last entry in the newest snapshot", self.snapshot_index.clone());
        r.register("forge_raft_snapshot_age_seconds", "Since the newest snapshot came, or since the start", self.snapshot_age_s.clone());
        r.register("forge_raft_disk_full", "Whether the disk is full", self.disk_full.clone());
    }
}

/// Handles of a coordinator's metrics and the registry that serves them. Clones share everything.
#[derive(Debug, Clone)]
pub struct CoordinatorMetrics {
    registry: Arc<Registry>,
    /// Raft's term.
    pub raft_term: Gauge,
    /// Whether this member leads, 0 or 1.
    pub raft_is_leader: Gauge,
    /// Whom this member follows; 0 if nobody.
    pub raft_leader_id: Gauge,
    /// Last entry known to be committed.
    pub raft_commit_index: Gauge,
    /// Last entry applied here.
    pub raft_applied_index: Gauge,
    /// What the raft member measures of itself.
    pub raft: RaftMetrics,
    /// Commands proposed here, by how they ended.
    pub commands: Family<CommandLabel, Counter>,
    /// Seconds from proposal to reply.
    pub command_s: Histogram,
    /// Sessions of nodes.
    pub sessions: Family<RoleLabel, Gauge>,
    /// Watchers.
    pub watchers: Gauge,
    /// Seconds until this process's certificate ends.
    pub certificate_left_s: Family<RoleLabel, Gauge>,
}

impl Default for CoordinatorMetrics {
    fn default() -> Self {
        Self::new()
    }
}

impl CoordinatorMetrics {
    /// A fresh registry with every metric at zero.
    pub fn new() -> Self {
        let mut metrics = CoordinatorMetrics {
            registry: Arc::default(),
            raft_term: Gauge::default(),
            raft_is_leader: Gauge::default(),
            raft_leader_id: Gauge::default(),
            raft_commit_index: Gauge::default(),
            raft_applied_index: Gauge::default(),
            raft: RaftMetrics::default(),
            commands: Family::default(),
            command_s: Buckets(COMMAND_S).new_metric(),
            sessions: Family::default(),
            watchers: Gauge::default(),
            certificate_left_s: Family::default(),
        };
        let mut registry = Registry::default();
        let r = &mut registry;
        r.register("forge_raft_term", "Raft's term", metrics.raft_term.clone());
        r.register("forge_raft_is_leader", "Whether this member leads", metrics.raft_is_leader.clone());
        r.register("forge_raft_leader_id", "Whom this member follows, 0 if nobody", metrics.raft_leader_id.clone());
        r.register("forge_raft_commit_index", "Last entry known to be committed", metrics.raft_commit_index.clone());
        r.register("forge_raft_applied_index", "Last entry applied here", metrics.raft_applied_index.clone());
        metrics.raft.register(r);
        r.register("forge_commands", "Commands proposed here, by how they ended", metrics.commands.clone());
        r.register("forge_command_duration_seconds", "From proposal to reply", metrics.command_s.clone());
        r.register("forge_sessions", "Sessions of nodes", metrics.sessions.clone());
        r.register("forge_watchers", "Watchers", metrics.watchers.clone());
        r.register("forge_certificate_left_seconds", CERTIFICATE_HELP, metrics.certificate_left_s.clone());
        metrics.registry = Arc::new(registry);
        metrics
    }

    /// The Prometheus text page (OpenMetrics 1.0).
    pub fn encode(&self) -> String {
        page(&self.registry)
    }
}

/// The labels of an engine; `replica` is `service/index`.
pub fn run_label(model_name: &str, replica: &str, epoch: Epoch) -> RunLabel {
    RunLabel { model_name: model_name.to_owned(), replica: replica.to_owned(), epoch: epoch.0 }
}

/// The label of a model.
pub fn model_label(name: &str) -> ModelLabel {
    ModelLabel { model_name: name.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_has_forge_and_vllm_names_of_one_handle() {
        let metrics = Metrics::new();
        let run = |index: u32| RunLabel { model_name: "m".into(), replica: format!("m/{index}"), epoch: 1 };
        metrics.requests_running.get_or_create(&run(0)).set(3);
        metrics.requests_running.get_or_create(&run(1)).set(4);
        metrics.generation_tokens.get_or_create(&model_label("m")).inc_by(7);
        metrics.time_to_first_token_s.get_or_create(&model_label("m")).observe(0.02);
        let page = metrics.encode();
        for line in [
            "forge_requests_running{model_name=\"m\",replica=\"m/0\",epoch=\"1\"} 3",
            "forge_requests_running{model_name=\"m\",replica=\"m/1\",epoch=\"1\"} 4",
            "vllm:num_requests_running{model_name=\"m\",replica=\"m/0\",epoch=\"1\"} 3",
            "forge_generation_tokens_total{model_name=\"m\"} 7",
            "forge_time_to_first_token_seconds_count{model_name=\"m\"} 1",
        ] {
            assert!(page.contains(line), "{line} not in\n{page}");
        }
        assert!(page.ends_with("# EOF\n"));
        metrics.forget_run(&run(0));
        let page = metrics.encode();
        assert!(!page.contains("m/0") && page.contains("m/1"), "{page}");
    }
}
