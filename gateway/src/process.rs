//! A gateway's process: its parts put together, kept up, and taken down in order.
//!
//! Invariant: it listens only once it knows the cluster's keys, and ends in bounded time after it was asked to: no new
//! requests, those under way finish within the drain, then the ports close.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use forge_cluster::client::{RemoteCluster, keep_certificates};
use forge_cluster::config::GatewayFile;
use forge_cluster::engine::RemoteDialer;
use forge_cluster::incarnation;
use forge_cluster::tls::SharedCredentials;
use forge_shared::cluster::node::{NodeSpec, Role};
use forge_shared::ids::NodeId;
use forge_shared::telemetry::{Metrics, RoleLabel};

use crate::clock::{Clock, SystemClock};
use crate::cluster::{MemberParts, Shares};
use crate::config::GatewayConfig;
use crate::error::GatewayError;
use crate::gateway::Gateway;
use crate::keys::KeyRing;
use crate::server::Listeners;

/// For joining at the first start.
const JOIN_WITHIN: Duration = Duration::from_secs(60);
/// For the first sight of the cluster; a supervisor starts the process again.
const KNOWN_WITHIN: Duration = Duration::from_secs(120);

/// Runs a gateway until `shutdown`, then drains it.
///
/// # Errors
/// What keeps it from starting, and its refusal by the cluster.
pub async fn run(file: GatewayFile<GatewayConfig>, shutdown: impl Future<Output = ()> + Send) -> Result<(), GatewayError> {
    let cannot = |reason: String| GatewayError::Cluster { reason };
    let membership = &file.membership;
    let mut shutdown = std::pin::pin!(shutdown);
    let entry = tokio::select! {
        entry = membership.enter(Role::Gateway, &file.name, &file.coordinators, JOIN_WITHIN) => entry.map_err(cannot)?,
        () = &mut shutdown => return Ok(()),
    };
    let credentials = SharedCredentials::new(entry.credentials);
    let mut addresses = file.coordinators.clone();
    addresses.extend(entry.coordinators);
    addresses.dedup();
    let cluster = RemoteCluster::new(&addresses, &credentials).map_err(|error| cannot(error.to_string()))?;
    let metrics = Metrics::new();
    let left = metrics.certificate_left_s.get_or_create_owned(&RoleLabel { role: Role::Gateway.to_string() });
    let renewing = tokio::spawn(keep_certificates(cluster.clone(), membership.directory.clone(), move |left_s| {
        left.set(left_s);
    }));
    let result = serve(&file, metrics, cluster, &credentials, shutdown).await;
    renewing.abort();
    result
}

async fn serve(
    file: &GatewayFile<GatewayConfig>,
    metrics: Metrics,
    cluster: RemoteCluster,
    credentials: &SharedCredentials,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), GatewayError> {
    let cannot = |reason: String| GatewayError::Cluster { reason };
    let mut shutdown = std::pin::pin!(shutdown);
    let config = file.gateway.clone();
    let listeners = Listeners::bind(&config).await?;
    let now_ms = SystemClock.unix_s().saturating_mul(1000);
    let incarnation = incarnation::next(&file.membership.directory, now_ms).map_err(|error| cannot(error.to_string()))?;
    let build = forge_cluster::build::of_this_process().map_err(cannot)?;
    let spec = NodeSpec {
        id: NodeId::from(file.name.as_str()),
        role: Role::Gateway,
        incarnation,
        version: build.version,
        level: build.level,
        address: listeners.api().to_string(),
        metrics_address: listeners.metrics().to_string(),
        data_plane: None,
        devices: Vec::new(),
    };
    let shares = Arc::new(Shares::default());
    let keys = KeyRing::told(shares.clone());
    let dialer = Arc::new(RemoteDialer::new(credentials.clone(), config.timeouts.request()));
    let parts = MemberParts { api: Arc::new(cluster), dialer, spec, keys: keys.clone(), shares, built_texts: None };
    let gateway = Gateway::unchecked(config.clone(), metrics, keys.clone(), Arc::new(SystemClock));
    let member = gateway.join(parts);
    tracing::info!(name = file.name, "waiting for the cluster's services and keys");
    tokio::select! {
        known = tokio::time::timeout(KNOWN_WITHIN, member.known()) => known.map_err(|_| {
            let seconds = KNOWN_WITHIN.as_secs();
            cannot(format!("no coordinator of {} told what is served within {seconds} s", file.coordinators.join(", ")))
        })?,
        reason = member.refused() => return Err(cannot(reason)),
        () = &mut shutdown => return Ok(()),
    }
    config.check(keys.required())?;
    tracing::info!(api = %listeners.api(), metrics = %listeners.metrics(), "the gateway listens");
    let (refused_sender, refused) = tokio::sync::oneshot::channel();
    let ending = async move {
        tokio::select! {
            () = shutdown => {}
            reason = member.refused() => {
                // The receiver lives until this has been awaited.
                let _ = refused_sender.send(reason);
            }
        }
    };
    gateway.serve(listeners, ending).await?;
    match refused.await {
        Ok(reason) => Err(cannot(reason)),
        Err(_) => Ok(()),
    }
}
