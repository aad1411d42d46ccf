//! A coordinator's configuration.

use std::path::PathBuf;
use std::time::Duration;

use forge_shared::config::ProcessConfig;
use serde::{Deserialize, Serialize};

use crate::tls::NODE_LIFETIME;

use super::{Membership, TelemetryConfig, check_address, check_advertise, check_name};

/// Shorter ones end before a process that restarts is back.
const SHORTEST_LIFE: Duration = Duration::from_secs(10);
/// Longer ones are as good as for ever.
const LONGEST_LIFE: Duration = Duration::from_secs(3650 * 24 * 3600);

/// What a coordinator must know to start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct CoordinatorConfig {
    /// Its name, as in its certificate.
    pub name: String,
    /// Folder of log, snapshots and membership. One process at a time.
    pub data_dir: PathBuf,
    /// Address of the gRPC services.
    pub listen: String,
    /// `host:port` where other hosts reach it; absent: `listen`.
    pub advertise: Option<String>,
    /// Address of metrics and probes.
    pub metrics_listen: String,
    /// Certificates and join token.
    pub membership: Membership,
    /// A node without heartbeats for this long is lost, milliseconds.
    pub lease_ms: u64,
    /// How often nodes send heartbeats, milliseconds.
    pub heartbeat_ms: u64,
    /// Life of the certificates that it signs, seconds; they renew themselves at two thirds of it.
    pub certificate_life_s: u64,
    /// Logs and traces.
    pub telemetry: TelemetryConfig,
}

impl Default for CoordinatorConfig {
    fn default() -> Self {
        CoordinatorConfig {
            name: "c1".into(),
            data_dir: PathBuf::from("coordinator"),
            listen: "127.0.0.1:7000".into(),
            advertise: None,
            metrics_listen: "127.0.0.1:7001".into(),
            membership: Membership::default(),
            lease_ms: 3000,
            heartbeat_ms: 500,
            certificate_life_s: NODE_LIFETIME.as_secs(),
            telemetry: TelemetryConfig::default(),
        }
    }
}

impl CoordinatorConfig {
    /// `host:port` where other hosts reach it.
    pub fn address(&self) -> &str {
        self.advertise.as_deref().unwrap_or(&self.listen)
    }
}

impl ProcessConfig for CoordinatorConfig {
    const KIND: &'static str = "Coordinator";

    fn check(&self) -> Result<(), (&'static str, String)> {
        check_name(&self.name)?;
        check_address("listen", &self.listen)?;
        check_advertise(&self.listen, self.advertise.as_deref())?;
        check_address("metricsListen", &self.metrics_listen)?;
        if self.heartbeat_ms < 50 || self.lease_ms < self.heartbeat_ms * 3 {
            return Err(("leaseMs", "must be at least three times heartbeatMs, which is at least 50".into()));
        }
        let (shortest_s, longest_s) = (SHORTEST_LIFE.as_secs(), LONGEST_LIFE.as_secs());
        if !(shortest_s..=longest_s).contains(&self.certificate_life_s) {
            return Err(("certificateLifeS", format!("must be between {shortest_s} and {longest_s} seconds")));
        }
        self.membership.check()
    }
}
