//! What an operator asks to be served: a Kubernetes-shaped `ModelService`.
//!
//! The same document serves one laptop and a cluster. Keys are the flags' names in camelCase; unknown keys are
//! refused by name. What it is not: it resolves no model and reads no machine; `0`-like defaults are `None`.

use serde::{Deserialize, Serialize};

use crate::rollout::RolloutSpec;

/// The one API version this build understands.
pub const API_VERSION: &str = "forge/v1";
/// The most ranks of a replica.
pub const MAX_RANKS: usize = 1024;

/// A model to serve.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ModelService {
    /// `forge/v1`.
    pub api_version: String,
    /// `ModelService`.
    pub kind: String,
    /// Name.
    pub metadata: Metadata,
    /// The wish.
    pub spec: ModelServiceSpec,
}

/// Name of an object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Metadata {
    /// Unique among services.
    pub name: String,
}

/// How to serve it. Every key has a flag of the same name (`maxModelLen`, `--max-model-len`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ModelServiceSpec {
    /// Catalogue alias, hub id, https URL, path or `pypi:PACKAGE`.
    pub model: String,
    /// Name in the API; the model's own by default.
    pub model_name: Option<String>,
    /// Family of the model, where its files do not say or say wrong: a family's name or a `model_type`.
    pub arch: Option<String>,
    /// Context extension of rotary positions instead of the model's own, such as `type=yarn,factor=4`.
    pub rope_scaling: Option<String>,
    /// Sliding window in positions instead of the model's own; 0 is none.
    pub sliding_window: Option<u32>,
    /// Longest sequence; the checkpoint's context by default, less where memory is short.
    pub max_model_len: Option<usize>,
    /// f32, f16 or bf16.
    pub kv_cache_dtype: KvCacheDtype,
    /// Bytes for keys and values, e.g. `2GiB`; a share of free memory by default.
    pub kv_memory: Option<ByteSize>,
    /// Token slots per KV block.
    pub block_size: usize,
    /// Sequences running at once.
    pub max_batch_size: usize,
    /// Rows (tokens) per engine step.
    pub max_step_tokens: usize,
    /// Requests waiting before 429.
    pub max_waiting: usize,
    /// Reuse of equal prompt prefixes.
    pub prefix_cache: bool,
    /// Kernel threads; all cores by default.
    pub threads: Option<usize>,
    /// How weights come into memory.
    pub load: LoadMode,
    /// Check weights for NaN and infinity at load.
    pub check_weights: bool,
    /// Copies of the model.
    pub replicas: u32,
    /// Shards of each copy.
    pub layout: Layout,
    /// How copies are replaced when the wish changes. Left out of documents where it is the default, for builds of level 1
    /// do not know it.
    #[serde(skip_serializing_if = "RolloutSpec::is_default")]
    pub rollout: RolloutSpec,
    /// A Jinja file that replaces the model's own chat template.
    pub chat_template: Option<String>,
    /// Where the API listens.
    pub gateway: GatewaySpec,
}

impl Default for ModelServiceSpec {
    fn default() -> Self {
        ModelServiceSpec {
            model: String::new(),
            model_name: None,
            arch: None,
            rope_scaling: None,
            sliding_window: None,
            max_model_len: None,
            kv_cache_dtype: KvCacheDtype::default(),
            kv_memory: None,
            block_size: 16,
            max_batch_size: 32,
            max_step_tokens: 512,
            max_waiting: 256,
            prefix_cache: true,
            threads: None,
            load: LoadMode::default(),
            check_weights: true,
            replicas: 1,
            layout: Layout::default(),
            rollout: RolloutSpec::default(),
            chat_template: None,
            gateway: GatewaySpec::default(),
        }
    }
}

/// Shards of a replica: `tensor × pipeline × expert` ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Layout {
    /// Tensor-parallel degree.
    pub tensor: usize,
    /// Pipeline stages.
    pub pipeline: usize,
    /// Ranks that the experts of a mixture are divided over; each has everything else whole.
    pub expert: usize,
}

impl Default for Layout {
    fn default() -> Self {
        Layout { tensor: 1, pipeline: 1, expert: 1 }
    }
}

impl Layout {
    /// Ranks of a stage, which hold the same layers.
    pub fn stage_ranks(&self) -> usize {
        self.tensor.saturating_mul(self.expert)
    }

    /// Ranks of a replica.
    pub fn ranks(&self) -> usize {
        self.stage_ranks().saturating_mul(self.pipeline)
    }
}

impl std::fmt::Display for Layout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "tensor={} pipeline={} expert={}", self.tensor, self.pipeline, self.expert)
    }
}

/// Listener of the API and its limits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct GatewaySpec {
    /// Address.
    pub host: String,
    /// Port; 0 picks a free one.
    pub port: u16,
    /// Address of metrics and probes.
    pub metrics_host: String,
    /// Port of metrics and probes; 0 picks a free one.
    pub metrics_port: u16,
    /// Listen beyond loopback without API keys.
    pub insecure: bool,
    /// Origins allowed to call from a browser; `*` for any.
    pub cors_origins: Vec<String>,
    /// Largest request body.
    pub max_body: ByteSize,
    /// A request's whole time, seconds.
    pub request_timeout_s: u64,
    /// Time to finish running requests after SIGTERM, seconds.
    pub drain_timeout_s: u64,
    /// Most answers (`n`) of one request.
    pub max_choices: u32,
}

impl Default for GatewaySpec {
    fn default() -> Self {
        GatewaySpec {
            host: "127.0.0.1".into(),
            port: 8000,
            metrics_host: "127.0.0.1".into(),
            metrics_port: 9000,
            insecure: false,
            cors_origins: Vec::new(),
            max_body: ByteSize(8 << 20),
            request_timeout_s: 600,
            drain_timeout_s: 30,
            max_choices: 128,
        }
    }
}

/// Storage type of keys and values.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvCacheDtype {
    /// Single precision.
    F32,
    /// Half precision.
    #[default]
    F16,
    /// bfloat16.
    Bf16,
    /// Signed bytes, with a scale per token and head.
    Int8,
}

/// How weights come into memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LoadMode {
    /// Mapped: pages come when first read and can be dropped by the system.
    #[default]
    Mmap,
    /// Read into memory at start.
    Eager,
}

/// A number of bytes: `1048576`, `512MiB`, `2GiB`, `1.5GB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

impl std::str::FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let trimmed = text.trim();
        let split = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(split);
        let factor: f64 = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1.0,
            "k" | "kib" => 1024.0,
            "m" | "mib" => 1024.0 * 1024.0,
            "g" | "gib" => 1024.0 * 1024.0 * 1024.0,
            "t" | "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
            "kb" => 1e3,
            "mb" => 1e6,
            "gb" => 1e9,
            "tb" => 1e12,
            other => return Err(format!("unknown unit {other:?} in {text:?}: use B, KiB, MiB, GiB, TiB, KB, MB, GB or TB")),
        };
        let value: f64 = number.parse().map_err(|_| format!("{text:?} is not a size: write for example 512MiB or 2GiB"))?;
        let bytes = value * factor;
        if !bytes.is_finite() || bytes > 1e18 {
            return Err(format!("{text:?} is larger than any memory"));
        }
        Ok(ByteSize(bytes as u64))
    }
}

impl std::fmt::Display for ByteSize {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const UNITS: [(&str, u64); 4] = [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
        for (unit, bytes) in UNITS {
            if self.0 >= bytes {
                let value = self.0 as f64 / bytes as f64;
                return if self.0.is_multiple_of(bytes) { write!(f, "{value}{unit}") } else { write!(f, "{value:.1}{unit}") };
            }
        }
        write!(f, "{}", self.0)
    }
}

impl Serialize for ByteSize {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // Exact, so that a saved specification loads back unchanged.
        serializer.serialize_u64(self.0)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Raw {
            Number(u64),
            Text(String),
        }
        match Raw::deserialize(deserializer)? {
            Raw::Number(bytes) => Ok(ByteSize(bytes)),
            Raw::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

/// A specification that contradicts itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct SpecError {
    /// Dotted path of the key.
    pub field: &'static str,
    /// What is wrong and what to do.
    pub reason: String,
}

impl ModelService {
    /// A service of this name and wish.
    pub fn new(name: &str, spec: ModelServiceSpec) -> Self {
        ModelService { api_version: API_VERSION.into(), kind: "ModelService".into(), metadata: Metadata { name: name.to_owned() }, spec }
    }

    /// Checks what can be checked without a model or a machine.
    ///
    /// # Errors
    /// The first key that is wrong, and what it may be.
    pub fn check(&self) -> Result<(), SpecError> {
        let fail = |field, reason: String| Err(SpecError { field, reason });
        let spec = &self.spec;
        if self.api_version != API_VERSION {
            return fail("apiVersion", format!("this build understands {API_VERSION}, got {:?}", self.api_version));
        }
        if self.kind != "ModelService" {
            return fail("kind", format!("expected ModelService, got {:?}", self.kind));
        }
        if spec.model.is_empty() {
            return fail("spec.model", "name a model: an alias, a hub id, a path or a URL".into());
        }
        for (field, value, low, high) in [
            ("spec.blockSize", spec.block_size, 1, 1024),
            ("spec.maxBatchSize", spec.max_batch_size, 1, 4096),
            ("spec.maxStepTokens", spec.max_step_tokens, 1, 65_536),
            ("spec.maxWaiting", spec.max_waiting, 1, 1_000_000),
            ("spec.threads", spec.threads.unwrap_or(1), 1, 1024),
            ("spec.maxModelLen", spec.max_model_len.unwrap_or(1), 1, 16 << 20),
            ("spec.layout.tensor", spec.layout.tensor, 1, 8),
            ("spec.layout.pipeline", spec.layout.pipeline, 1, 1024),
            ("spec.layout.expert", spec.layout.expert, 1, 1024),
        ] {
            if value < low || value > high {
                return fail(field, format!("must be between {low} and {high}, got {value}"));
            }
        }
        if spec.layout.ranks() > MAX_RANKS {
            return fail("spec.layout", format!("{} makes {} ranks, at most {MAX_RANKS}", spec.layout, spec.layout.ranks()));
        }
        if spec.max_step_tokens < spec.max_batch_size {
            return fail(
                "spec.maxStepTokens",
                format!("must be at least maxBatchSize ({}), or running sequences could not all advance", spec.max_batch_size),
            );
        }
        if spec.replicas == 0 {
            return fail("spec.replicas", "must be at least 1; `forgectl delete NAME` ends the last one".into());
        }
        spec.rollout.check().or_else(|(field, reason)| fail(field, reason))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse_and_print() {
        for (text, bytes) in [("512MiB", 512 << 20), ("2GiB", 2 << 30), ("1.5GB", 1_500_000_000), ("77", 77), ("4k", 4096)] {
            assert_eq!(text.parse::<ByteSize>().map(|size| size.0), Ok(bytes), "{text}");
        }
        for text in ["", "x", "1.2.3", "5parsecs", "999999999999TiB", "-1"] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
        assert_eq!(ByteSize(2 << 30).to_string(), "2GiB");
        assert_eq!(ByteSize(1536 << 20).to_string(), "1.5GiB");
    }

    #[test]
    fn unknown_keys_are_refused_by_name() {
        let text = r#"{"apiVersion":"forge/v1","kind":"ModelService","metadata":{"name":"a"},"spec":{"model":"m","maxmodellen":5}}"#;
        let error = serde_json::from_str::<ModelService>(text).map_err(|error| error.to_string());
        assert!(error.as_ref().is_err_and(|message| message.contains("maxmodellen")), "{error:?}");
    }

    #[test]
    fn a_service_survives_a_round_trip() {
        let service = ModelService::new("demo", ModelServiceSpec { model: "smollm2:135m".into(), ..Default::default() });
        assert_eq!(service.check(), Ok(()));
        let text = serde_json::to_string(&service).expect("plain data");
        assert_eq!(serde_json::from_str::<ModelService>(&text).expect("own output"), service);
    }

    #[test]
    fn contradictions_name_their_key() {
        let mut service = ModelService::new("demo", ModelServiceSpec { model: "m".into(), ..Default::default() });
        service.spec.max_step_tokens = 8;
        assert_eq!(service.check().map_err(|error| error.field), Err("spec.maxStepTokens"));
        service.spec.block_size = 0;
        assert_eq!(service.check().map_err(|error| error.field), Err("spec.blockSize"));
    }
}
