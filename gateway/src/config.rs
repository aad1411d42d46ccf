//! What an operator may set, with defaults, and the checks that need no socket.
//!
//! Every limit a client can run into is here by name; nothing else in the crate invents one.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::GatewayError;

/// Settings of a gateway. The keys are the same in YAML, TOML, JSON, environment and `--set`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GatewayConfig {
    /// Address of the API.
    pub host: IpAddr,
    /// Port of the API; 0 lets the system choose.
    pub port: u16,
    /// Address of metrics and probes.
    pub metrics_host: IpAddr,
    /// Port of metrics and probes; 0 lets the system choose.
    pub metrics_port: u16,
    /// Listen beyond loopback although no keys are configured.
    pub insecure: bool,
    /// Origins whose pages may call the API (`https://example.org`), or `*`. Empty: none.
    pub allowed_origins: Vec<String>,
    /// Bounds on requests.
    pub limits: RequestLimits,
    /// Bounded waits.
    pub timeouts: Timeouts,
}

impl Default for GatewayConfig {
    fn default() -> Self {
        GatewayConfig {
            host: IpAddr::V4(Ipv4Addr::LOCALHOST),
            port: 8000,
            metrics_host: IpAddr::V4(Ipv4Addr::LOCALHOST),
            metrics_port: 9000,
            insecure: false,
            allowed_origins: Vec::new(),
            limits: RequestLimits::default(),
            timeouts: Timeouts::default(),
        }
    }
}

/// Bounds on what one request, and all of them together, may ask for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RequestLimits {
    /// Bytes of a request body.
    pub body_bytes: usize,
    /// Bytes of all request bodies held at once; at least `body_bytes`.
    pub total_body_bytes: usize,
    /// JSON values (objects, lists, strings, numbers …) in a body.
    pub json_values: usize,
    /// Messages of a chat.
    pub messages: usize,
    /// Prompts of a completion request.
    pub prompts: usize,
    /// Answers of a request: prompts × `n`.
    pub choices: usize,
    /// Open connections; more wait in the system's queue.
    pub connections: usize,
    /// Requests being answered at once; more get 429.
    pub concurrent_requests: usize,
    /// Idempotency keys remembered; the oldest is forgotten first.
    pub idempotency_keys: usize,
}

impl Default for RequestLimits {
    fn default() -> Self {
        RequestLimits {
            body_bytes: 8 << 20,
            total_body_bytes: 256 << 20,
            json_values: 1 << 20,
            messages: 2048,
            prompts: 128,
            choices: 128,
            connections: 4096,
            concurrent_requests: 4096,
            idempotency_keys: 10_000,
        }
    }
}

/// Bounded waits, in seconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Timeouts {
    /// For a request's head; also how long an idle connection is kept.
    pub head_s: u64,
    /// For a request's body.
    pub body_s: u64,
    /// For rendering the chat template and tokenizing.
    pub prepare_s: u64,
    /// From a request's arrival to its last token, engine deaths included.
    pub request_s: u64,
    /// How long a client may leave sent bytes unread before its connection is cut.
    pub write_stall_s: u64,
    /// Between two comments on a silent event stream.
    pub keep_alive_s: u64,
    /// For the one-token probe of `/healthz?deep=1` and `/health/full`.
    pub probe_s: u64,
    /// For requests in flight when the gateway is told to stop.
    pub drain_s: u64,
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts { head_s: 60, body_s: 60, prepare_s: 30, request_s: 600, write_stall_s: 60, keep_alive_s: 15, probe_s: 10, drain_s: 30 }
    }
}

impl Timeouts {
    /// Time a request has in all.
    pub fn request(&self) -> Duration {
        Duration::from_secs(self.request_s)
    }

    /// Time requests in flight have at the end.
    pub fn drain(&self) -> Duration {
        Duration::from_secs(self.drain_s)
    }
}

impl GatewayConfig {
    /// Checks what can be checked without a socket.
    ///
    /// # Errors
    /// [`GatewayError::Config`] for a limit of zero or a bad origin, [`GatewayError::OpenToTheWorld`]
    /// for an address beyond loopback without keys and without `insecure`.
    pub fn check(&self, keys_configured: bool) -> Result<(), GatewayError> {
        let positive = [
            ("limits.body_bytes", self.limits.body_bytes),
            ("limits.total_body_bytes", self.limits.total_body_bytes),
            ("limits.json_values", self.limits.json_values),
            ("limits.messages", self.limits.messages),
            ("limits.prompts", self.limits.prompts),
            ("limits.choices", self.limits.choices),
            ("limits.connections", self.limits.connections),
            ("limits.concurrent_requests", self.limits.concurrent_requests),
            ("limits.idempotency_keys", self.limits.idempotency_keys),
            ("timeouts.head_s", self.timeouts.head_s as usize),
            ("timeouts.body_s", self.timeouts.body_s as usize),
            ("timeouts.prepare_s", self.timeouts.prepare_s as usize),
            ("timeouts.request_s", self.timeouts.request_s as usize),
            ("timeouts.write_stall_s", self.timeouts.write_stall_s as usize),
            ("timeouts.keep_alive_s", self.timeouts.keep_alive_s as usize),
            ("timeouts.probe_s", self.timeouts.probe_s as usize),
        ];
        if let Some((field, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(GatewayError::config(field, "must be at least 1, got 0"));
        }
        for origin in &self.allowed_origins {
            check_origin(origin)?;
        }
        if !self.host.is_loopback() && !keys_configured && !self.insecure {
            return Err(GatewayError::OpenToTheWorld { host: self.host });
        }
        Ok(())
    }
}

fn check_origin(origin: &str) -> Result<(), GatewayError> {
    let rest = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
    let plain =
        |rest: &str| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'/' | b'*' | b'?' | b'#' | b'@'));
    if origin == "*" || rest.is_some_and(plain) {
        return Ok(());
    }
    Err(GatewayError::config(
        "allowed_origins",
        format!("{origin:?} is not an origin; write it as https://example.org or http://localhost:3000, without a path, or \"*\""),
    ))
}

#[cfg(test)]
mod tests {
    use forge_cluster::config::GatewayFile;
    use forge_shared::config::{Format, ProcessLayers};

    use super::*;

    #[test]
    fn loopback_needs_no_keys_and_another_address_does() {
        let mut config = GatewayConfig::default();
        assert!(config.check(false).is_ok());
        config.host = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        let error = config.check(false).unwrap_err();
        assert!(error.to_string().contains("--insecure"), "{error}");
        assert!(config.check(true).is_ok());
        config.insecure = true;
        assert!(config.check(false).is_ok());
    }

    #[test]
    fn zero_limits_and_bad_origins_are_named() {
        let mut config = GatewayConfig::default();
        config.limits.body_bytes = 0;
        assert!(config.check(false).unwrap_err().to_string().contains("limits.body_bytes"));
        for origin in ["example.org", "https://", "https://a/b", "https://*.a", ""] {
            let config = GatewayConfig { allowed_origins: vec![origin.into()], ..GatewayConfig::default() };
            assert!(config.check(false).unwrap_err().to_string().contains("allowed_origins"), "{origin}");
        }
    }

    #[test]
    fn unknown_keys_are_refused_by_name() {
        let error = serde_json::from_str::<GatewayConfig>(r#"{"prot": 8000}"#).unwrap_err();
        assert!(error.to_string().contains("prot"), "{error}");
        let text = "apiVersion: forge/v1\nkind: Gateway\ngateway:\n  prot: 8000\n";
        let layers = ProcessLayers { file: Some((text.into(), Format::Yaml, "g.yaml".into())), ..ProcessLayers::default() };
        let error = layers.resolve::<GatewayFile<GatewayConfig>>().unwrap_err();
        assert!(error.to_string().contains("g.yaml") && error.to_string().contains("gateway.prot"), "{error}");
        assert!(error.help().is_some_and(|help| help.contains("gateway.port")), "{:?}", error.help());
    }
}
