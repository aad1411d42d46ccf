//! A worker's process: its parts put together, kept up, and taken down in order.
//!
//! ```text
//! session thread ── assignments ──> NodeActor ── starts ──> replicas, engines
//!       ^───────────── reports ────────┘  └─ board ──> engine service (mTLS) ──> gateways
//! ```
//!
//! Invariant: it ends in bounded time after it was asked to: replicas drain, the coordinators hear a good-bye, ports close.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use forge_cluster::api::{ClusterApi, ClusterError};
use forge_cluster::client::{RemoteCluster, keep_certificates};
use forge_cluster::config::{DataPlaneConfig, DeclaredDevice};
use forge_cluster::incarnation;
use forge_cluster::probes::{self, Probes};
use forge_cluster::tls::SharedCredentials;
use forge_shared::cluster::node::{NodeSpec, Role};
use forge_shared::ids::NodeId;
use forge_shared::telemetry::{Metrics, RoleLabel};
use forge_shared::version::DATA_PLANES;
use forge_store::ForgeHome;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use crate::WorkerError;
use crate::data_plane::{DataPlane, DataPlaneOptions};
use crate::inspect::inspect;
use crate::ledger::Ledger;
use crate::logs::LogRing;
use crate::machine;
use crate::models::StoredModels;
use crate::node::{END_TIMEOUT, WorkerNode};
use crate::probe::{self, NodeDevices, ProbeWish};
use crate::service::{self, EngineService};
use crate::session::SessionState;
use crate::time::now_ms;

/// What a worker runs with.
#[derive(Debug, Clone)]
pub struct WorkerOptions {
    /// Its name, as in its certificate.
    pub name: String,
    /// Where it keeps its incarnation and measured speeds.
    pub data_dir: PathBuf,
    /// Where its certificate lies.
    pub credentials_dir: PathBuf,
    /// Where models lie.
    pub home: ForgeHome,
    /// Serve only what is in the store.
    pub is_offline: bool,
    /// Where the engine service listens.
    pub listen: SocketAddr,
    /// `host:port` by which gateways reach it; the bound address where absent.
    pub advertise: Option<String>,
    /// Where metrics and probes are.
    pub metrics_listen: SocketAddr,
    /// Where other workers reach it.
    pub data_plane: DataPlaneConfig,
    /// `host:port` of all coordinators.
    pub coordinators: Vec<String>,
    /// Its identity.
    pub credentials: SharedCredentials,
    /// Shares of this machine; the whole machine where empty.
    pub devices: Vec<DeclaredDevice>,
    /// Bytes left to the system where devices are found.
    pub reserve_bytes: u64,
    /// For requests under way when it is asked to end.
    pub drain_timeout: Duration,
}

/// Runs a worker until `shutdown`, then drains it.
///
/// # Errors
/// What keeps it from starting, and its refusal by the cluster.
pub async fn run(options: WorkerOptions, logs: Arc<LogRing>, shutdown: impl Future<Output = ()>) -> Result<(), WorkerError> {
    let cannot = |reason: String| WorkerError::Service { reason };
    let cannot_start = |reason: String| WorkerError::Setting { field: "dataDir", reason };
    let metrics_port = probes::bind(options.metrics_listen).await.map_err(cannot)?;
    let listener = TcpListener::bind(options.listen).await.map_err(|error| cannot(format!("{}: {error}", options.listen)))?;
    let local = |listener: &TcpListener| listener.local_addr().map_err(|error| cannot(error.to_string()));
    let (address, metrics_address) = (local(&listener)?, local(&metrics_port)?);
    let NodeDevices { infos, ledger } = {
        let options = options.clone();
        let wish = move || {
            let wish = ProbeWish { declared: &options.devices, reserve_bytes: options.reserve_bytes, cache: Some(&options.data_dir) };
            probe::devices(&NodeId::from(options.name.as_str()), &wish)
        };
        let probing = tokio::task::spawn_blocking(wish);
        probing.await.map_err(|error| cannot(format!("looking for devices: {error}")))?
    };
    let build = forge_cluster::build::of_this_process().map_err(cannot)?;
    let data_plane = DataPlane::start(DataPlaneOptions {
        node: NodeId::from(options.name.as_str()),
        config: &options.data_plane,
        engine_listen: options.listen,
        engine_address: options.advertise.clone().unwrap_or_else(|| address.to_string()),
        engine_port: address.port(),
        credentials: &options.credentials,
    })?;
    let spec = NodeSpec {
        id: NodeId::from(options.name.as_str()),
        role: Role::Worker,
        incarnation: incarnation::next(&options.data_dir, now_ms()).map_err(|error| cannot_start(error.to_string()))?,
        level: build.level,
        version: build.version,
        address: options.advertise.clone().unwrap_or_else(|| address.to_string()),
        metrics_address: metrics_address.to_string(),
        data_plane: (build.level >= DATA_PLANES).then(|| data_plane.told().clone()),
        devices: infos,
    };
    let metrics = Metrics::new();
    let models = Arc::new(StoredModels::new(options.home.clone(), options.is_offline).counting(metrics.clone()));
    let ledger = Ledger::new(ledger, Box::new(machine::free_bytes));
    let node = WorkerNode::start(&spec, ledger.clone(), models.clone(), Some(data_plane.fabric().clone()), metrics.clone()).await?;
    let data_address = &data_plane.told().address;
    tracing::info!(name = options.name, %address, %data_address, %metrics_address, incarnation = spec.incarnation.0, devices = spec.devices.len(), "the worker starts");
    let mut node = node.join(spec, connect(&options), Arc::new(move |service| inspect(&models, service)))?;
    let renewal = RemoteCluster::new(&options.coordinators, &options.credentials).map_err(|error| cannot(error.to_string()))?;
    let left = metrics.certificate_left_s.get_or_create_owned(&RoleLabel { role: Role::Worker.to_string() });
    let renewal = tokio::spawn(keep_certificates(renewal, options.credentials_dir.clone(), move |left_s| {
        left.set(left_s);
    }));
    let state = node.state();
    let readiness = Probes {
        metrics: {
            let state = state.clone();
            Arc::new(move || {
                ledger.observe(&metrics);
                state.borrow().observe(&metrics);
                metrics.encode()
            })
        },
        readiness: Arc::new(move || match *state.borrow() {
            SessionState::Welcome => Ok(()),
            SessionState::Connecting => Err("no session with a leader yet".to_owned()),
            SessionState::Expired => Err("the cluster has given this node up".to_owned()),
        }),
    };
    let (close_probes, probes_closed) = oneshot::channel::<()>();
    let (close_service, service_closed) = oneshot::channel::<()>();
    let closed = |closed: oneshot::Receiver<()>| async move {
        // A sender that is gone means the same as one that sent.
        let _ = closed.await;
    };
    let probing = tokio::spawn(probes::serve(metrics_port, readiness, closed(probes_closed)));
    let (credentials, engine) = (options.credentials.clone(), EngineService::new(node.board().clone(), logs));
    let mut serving = tokio::spawn(async move { service::serve(listener, &credentials, engine, closed(service_closed)).await });

    let mut shutdown = std::pin::pin!(shutdown);
    let result = loop {
        tokio::select! {
            () = &mut shutdown => break Ok(()),
            event = node.next() => if let Err(error) = event { break Err(error) },
            ended = &mut serving => break Err(match ended {
                Ok(Err(error)) => error,
                Ok(Ok(())) => cannot("it ended by itself".into()),
                Err(death) => cannot(death.to_string()),
            }),
        }
    };
    tracing::info!(drain_s = options.drain_timeout.as_secs(), "the worker ends: requests under way are finished");
    node.end(options.drain_timeout).await;
    renewal.abort();
    drop((close_service, close_probes));
    let rest = async {
        // How they end does not matter any more.
        let _ = tokio::join!(
            async {
                if !serving.is_finished() {
                    let _ = (&mut serving).await;
                }
            },
            probing
        );
    };
    let _ = tokio::time::timeout(END_TIMEOUT, rest).await;
    drop(data_plane);
    result
}

fn connect(options: &WorkerOptions) -> Box<dyn FnOnce() -> Result<Arc<dyn ClusterApi>, ClusterError> + Send> {
    let (coordinators, credentials) = (options.coordinators.clone(), options.credentials.clone());
    Box::new(move || {
        let cluster = RemoteCluster::new(&coordinators, &credentials);
        let cluster = cluster.map_err(|error| ClusterError::Forbidden { reason: error.to_string() })?;
        Ok(Arc::new(cluster) as Arc<dyn ClusterApi>)
    })
}
