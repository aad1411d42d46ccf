//! A gateway's configuration file: how it joins the cluster, around the gateway's own settings.

use forge_shared::config::ProcessConfig;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{Membership, TelemetryConfig, check_address, check_name};

/// What a gateway must know to start. `G` is the gateway's own type for addresses, limits and timeouts: forge-cluster does
/// not know forge-gateway.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields, bound(deserialize = "G: DeserializeOwned + Default"))]
pub struct GatewayFile<G> {
    /// Its name, as in its certificate.
    pub name: String,
    /// `host:port` of coordinators; more are learned from them.
    pub coordinators: Vec<String>,
    /// Listen addresses, limits and timeouts.
    pub gateway: G,
    /// Certificates and join token.
    pub membership: Membership,
    /// Logs and traces.
    pub telemetry: TelemetryConfig,
}

impl<G: Default> Default for GatewayFile<G> {
    fn default() -> Self {
        GatewayFile {
            name: "g1".into(),
            coordinators: vec!["127.0.0.1:7000".into()],
            gateway: G::default(),
            membership: Membership::default(),
            telemetry: TelemetryConfig::default(),
        }
    }
}

impl<G: Serialize + DeserializeOwned + Default> ProcessConfig for GatewayFile<G> {
    const KIND: &'static str = "Gateway";

    fn check(&self) -> Result<(), (&'static str, String)> {
        check_name(&self.name)?;
        if self.coordinators.is_empty() {
            return Err(("coordinators", "is empty: name at least one coordinator as host:port".into()));
        }
        self.coordinators.iter().try_for_each(|address| check_address("coordinators", address))?;
        self.membership.check()
    }
}
