//! The cluster inside `forgectl serve`: a coordinator that is a raft group of one, a worker that is this machine, and the
//! context by which other commands find them.
//!
//! What it is not: another way to serve. Coordinator, worker and the gateway beside them are those of `forge-coordinator`,
//! `forge-worker` and `forge-gateway`; only the calls between them stay in the process. Operators' commands come through a
//! loopback port with mTLS, as to any cluster.
//!
//! Invariant: what is served is what this process was told: its state is new at each start and removed at its end.

mod folder;
mod served;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use forge_cluster::api::ClusterApi;
use forge_cluster::tls::{CA_LIFETIME, ClusterCa, Credentials, NODE_LIFETIME, SharedCredentials};
use forge_coordinator::{CertificateOptions, Coordinator, CoordinatorError, RunOptions, Surroundings, prepare};
use forge_shared::cluster::Revision;
use forge_shared::cluster::command::Command;
use forge_shared::cluster::event::{Kind, Object};
use forge_shared::cluster::node::{DeviceInfo, NodeSpec, Role};
use forge_shared::cluster::service::{ReplicaPhase, ReplicaReport, ServiceRecord};
use forge_shared::ids::{Incarnation, NodeId};
use forge_shared::spec::ModelService;
use forge_shared::telemetry::Metrics;
use forge_shared::version::Build;
use forge_store::ForgeHome;
use forge_worker::actors::NodeEvent;
use forge_worker::ledger::{Ledger, LedgerDevice};
use forge_worker::link::ReplicaBoard;
use forge_worker::models::{OpenModel, OpenedFirst, ServedNames, StoredModels};
use forge_worker::node::{JoinedNode, WorkerNode};
use forge_worker::prepare::PreparedModel;
use forge_worker::service::{self, EngineService};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::cluster::{ContextStore, HeldContext, issue};
use crate::failure::{Failure, Result};
use crate::logging;
use crate::replica::failed;
use crate::time::Utc;

use folder::LocalFolder;

pub use served::{Beginning, ServedService};

/// Of the cluster, in its certificates.
const CLUSTER: &str = "local";
/// Of the coordinator.
const COORDINATOR: &str = "coordinator";
/// Of the worker, as `get nodes` shows it.
pub const WORKER: &str = "local";
/// Of the gateway.
pub const GATEWAY: &str = "gateway";
/// Worker and gateway live and die with the coordinator: what looks like a lost node is a machine that is slow.
const LEASE: Duration = Duration::from_secs(60);
const HEARTBEAT: Duration = Duration::from_millis(500);
/// For one command; this process carries it out.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);
/// For each part that ends after the replicas.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// A running coordinator without a worker yet.
pub struct EmbeddedCoordinator {
    coordinator: Coordinator,
    address: String,
    worker_credentials: Credentials,
    admin: Credentials,
    server: JoinHandle<Result<(), CoordinatorError>>,
    stop: oneshot::Sender<()>,
    folder: LocalFolder,
}

/// What the worker begins with.
pub struct WorkerParts {
    /// This machine.
    pub device: DeviceInfo,
    /// Opened already.
    pub model: PreparedModel,
    /// Names its model answers to.
    pub names: ServedNames,
    /// Whose model it is.
    pub service: ModelService,
    /// Where other models come from.
    pub home: ForgeHome,
    /// Where everything is counted.
    pub metrics: Metrics,
}

/// A coordinator and a worker of this process.
pub struct Embedded {
    base: EmbeddedCoordinator,
    node: JoinedNode,
    close_engine_service: oneshot::Sender<()>,
    engine_service: JoinHandle<()>,
    context: HeldContext,
}

impl EmbeddedCoordinator {
    /// Makes certificates, starts the coordinator, and opens its port on loopback.
    ///
    /// # Errors
    /// A home folder that cannot be written.
    pub async fn start(home: &ForgeHome) -> Result<Self> {
        let root = home.root().to_owned();
        let made = tokio::task::spawn_blocking(move || make(&root)).await;
        let (folder, worker_credentials, admin) = made.map_err(|error| Failure::of(&error))??;
        let prepared = prepare(RunOptions {
            name: COORDINATOR.into(),
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            address: String::new(),
            metrics: None,
            data_dir: folder.path().join("data"),
            tls_dir: folder.path().join("tls"),
            founds_group: true,
            join_token: None,
            lease: LEASE,
            heartbeat: HEARTBEAT,
            surroundings: Surroundings::default(),
            certificates: CertificateOptions::default(),
            build: Build::default(),
        });
        let prepared = prepared.await.map_err(|error| broken(&error))?;
        let address = prepared.address().map_err(|error| Failure::of(&error))?.to_string();
        let coordinator = prepared.coordinator().clone();
        let (stop, stopped) = oneshot::channel();
        let server = tokio::spawn(prepared.run(async move {
            // A sender that is gone means the same as one that sent.
            let _ = stopped.await;
        }));
        Ok(EmbeddedCoordinator { coordinator, address, worker_credentials, admin, server, stop, folder })
    }

    /// Starts the worker, and tells other commands where the cluster is.
    ///
    /// # Errors
    /// The system gives no port or thread.
    pub async fn with_worker(self, parts: WorkerParts, contexts: ContextStore) -> Result<Embedded> {
        let WorkerParts { device, model, names, service, home, metrics } = parts;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.map_err(|error| Failure::of(&error))?;
        // Placement goes by this number alone: whoever asks for more than is free by then gets what was asked for.
        let memory_bytes = device.memory_bytes;
        let ledger = Ledger::new(vec![LedgerDevice::of(&device, Vec::new(), 0)], Box::new(move || memory_bytes));
        let spec = NodeSpec {
            id: NodeId::from(WORKER),
            role: Role::Worker,
            incarnation: first_incarnation(),
            version: forge_shared::version::VERSION.to_owned(),
            level: forge_shared::version::LEVEL,
            address: listener.local_addr().map_err(|error| Failure::of(&error))?.to_string(),
            metrics_address: String::new(),
            data_plane: None,
            devices: vec![device],
        };
        let models = Arc::new(OpenedFirst {
            opened: OpenModel { model, names },
            service,
            stored: StoredModels::new(home, false).counting(metrics.clone()),
        });
        let node = WorkerNode::start(&spec, ledger, models.clone(), None, metrics).await.map_err(failed)?;
        let engine = EngineService::new(node.board.clone(), logging::lines());
        let api: Arc<dyn ClusterApi> = Arc::new(self.coordinator.clone());
        let node = node.join(spec, Box::new(move || Ok(api)), Arc::new(move |service| models.inspect(service))).map_err(failed)?;
        let (close_engine_service, closed) = oneshot::channel::<()>();
        let credentials = SharedCredentials::new(self.worker_credentials.clone());
        let engine_service = tokio::spawn(async move {
            let closed = async {
                let _ = closed.await;
            };
            // `forgectl logs` alone goes this way: the gateway is in this process.
            if let Err(error) = service::serve(listener, &credentials, engine, closed).await {
                tracing::error!(%error, "the worker's port is closed: `forgectl logs` has no lines");
            }
        });
        let context = contexts.hold_local(std::slice::from_ref(&self.address), &self.admin)?;
        Ok(Embedded { base: self, node, close_engine_service, engine_service, context })
    }

    /// Stops it. Bounded.
    pub async fn stop(self) {
        // One that has ended needs no word.
        let _ = self.stop.send(());
        if tokio::time::timeout(END_TIMEOUT, self.server).await.is_err() {
            tracing::warn!("the coordinator did not stop in time");
        }
        drop(self.folder);
    }
}

impl Embedded {
    /// The cluster, as everything in it sees it.
    pub fn api(&self) -> Arc<dyn ClusterApi> {
        Arc::new(self.base.coordinator.clone())
    }

    /// The context by which other commands find it.
    pub fn context(&self) -> &str {
        self.context.name()
    }

    /// The worker's replicas.
    pub fn board(&self) -> Arc<ReplicaBoard> {
        self.node.board().clone()
    }

    /// Tells the cluster what is wished, and gives the wish's generation.
    ///
    /// # Errors
    /// A wish that the cluster does not take.
    pub async fn apply(&self, service: &ModelService) -> Result<u64> {
        let command = Command::ApplyService { service: Box::new(service.clone()) };
        let applied = self.base.coordinator.execute("serve".into(), command, COMMAND_TIMEOUT).await?;
        let record = self.service(&service.metadata.name).await?;
        record.map(|record| record.generation).ok_or_else(|| lost(applied.revision))
    }

    /// What the cluster knows of a service.
    ///
    /// # Errors
    /// The coordinator does not answer.
    pub async fn service(&self, name: &str) -> Result<Option<ServiceRecord>> {
        let listing = self.base.coordinator.read(Kind::Service, Some(name.to_owned()), COMMAND_TIMEOUT).await?;
        Ok(listing.objects.into_iter().find_map(|object| match object {
            Object::Service(record) => Some(*record),
            _ => None,
        }))
    }

    /// Waits for the next report of a replica; must be called again and again.
    ///
    /// # Errors
    /// The node died.
    pub async fn report(&mut self) -> Result<ReplicaReport> {
        loop {
            if let NodeEvent::Report(report) = self.node.next().await.map_err(failed)? {
                tell(&report);
                return Ok(*report);
            }
        }
    }

    /// Ends the worker, letting requests under way finish within `timeout`, then the coordinator. Bounded.
    pub async fn end(self, timeout: Duration) {
        let Embedded { base, node, close_engine_service, engine_service, context } = self;
        drop(context);
        node.end(timeout).await;
        drop(close_engine_service);
        if tokio::time::timeout(END_TIMEOUT, engine_service).await.is_err() {
            tracing::warn!("the worker's port did not close in time");
        }
        base.stop().await;
    }
}

/// What an operator wants to know of a replica without asking.
fn tell(report: &ReplicaReport) {
    let (replica, reason, restarts) = (report.replica.to_string(), &report.status.reason, report.status.restarts);
    match report.status.phase {
        ReplicaPhase::Ready if restarts > 0 => tracing::info!(replica, "replica is ready again"),
        ReplicaPhase::Failed => tracing::error!(replica, reason, "replica was given up"),
        ReplicaPhase::Loading if !reason.is_empty() => tracing::warn!(replica, reason, "replica died and will be restarted"),
        _ => {}
    }
}

/// The cluster is new, and so is every process in it.
pub fn first_incarnation() -> Incarnation {
    Incarnation(1)
}

/// A folder with certificates: the coordinator's in it, the others' only here.
fn make(home: &std::path::Path) -> Result<(LocalFolder, Credentials, Credentials)> {
    let folder = LocalFolder::make(home)?;
    let tls = folder.path().join("tls");
    let ca = ClusterCa::create(CLUSTER, Utc::now().0)?;
    ca.save(&tls)?;
    issue(&ca, Role::Coordinator, COORDINATOR, NODE_LIFETIME)?.save(&tls)?;
    // Nobody renews these two; the CA goes with the process.
    let worker = issue(&ca, Role::Worker, WORKER, CA_LIFETIME)?;
    let admin = issue(&ca, Role::Admin, "admin", CA_LIFETIME)?;
    Ok((folder, worker, admin))
}

fn broken(error: &CoordinatorError) -> Failure {
    Failure::of(error).while_doing("the embedded coordinator does not start")
}

fn lost(revision: Revision) -> Failure {
    Failure::new(format!("the service was deleted at once after revision {revision}"))
}
