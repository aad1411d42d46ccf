//! A coordinator's gRPC services over mTLS: what operators, programs, nodes and other coordinators ask.
//!
//! What it is not: it decides nothing. Each call finds out who asks ([`forge_cluster::tls::Peer`]) and whether they may
//! ([`crate::access`]), decodes the request, and hands it to the [`Coordinator`], the same that an embedded one is.
//!
//! Invariants: one port serves all; `Admission.Join` alone is answered without a client certificate; every message's size,
//! every call's time, and the calls and streams at once are bounded.

mod admission;
mod call;
mod cluster;
pub(crate) mod fuzz;
mod logs;
mod nodes;

use std::sync::Arc;
use std::time::Duration;

use forge_cluster::tls::{SharedCredentials, TlsIncoming};
use forge_proto::cluster::cluster_server::ClusterServer;
use forge_proto::node::admission_server::AdmissionServer;
use forge_proto::node::nodes_server::NodesServer;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tonic::transport::Server;

use crate::coordinator::Coordinator;
use crate::error::CoordinatorError;
use crate::peers::Peers;
use crate::signing::SigningCas;

/// Bytes of a request; documents of services have a few kilobytes.
const MAX_REQUEST_BYTES: usize = 1 << 20;
/// Bytes of a message in a session: a node's devices and loads, what it found of a model.
const MAX_SESSION_MESSAGE_BYTES: usize = 4 << 20;
/// Calls of one connection that have not answered yet.
const CALLS_PER_CONNECTION: usize = 512;
/// Streams of one connection.
const STREAMS_PER_CONNECTION: u32 = 2048;
/// Calls in work over all connections; more are told to come again.
const CALLS: usize = 2048;
/// Requests to be let in, in work over all connections: whoever asks has no certificate, and takes nobody's place who has.
const JOINS: usize = 64;
/// Of those, the ones whose token is not known here as good: the group is asked whether it is.
const DOUBTED_JOINS: usize = 4;
/// Watches over all connections.
const WATCHES: usize = 32_768;
/// Streams of log lines over all connections.
const LOGS: usize = 256;
/// A connection without a sign of life is asked for one this often.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// Without one for this long it is closed.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// For open streams to end after they were told to.
const CLOSE_WITHIN: Duration = Duration::from_secs(3);

/// What all services share.
#[derive(Clone)]
pub(crate) struct Shared {
    pub(crate) coordinator: Coordinator,
    pub(crate) credentials: SharedCredentials,
    /// With these certificates are signed.
    pub(crate) cas: Arc<SigningCas>,
    /// Of certificates that are signed.
    pub(crate) life: Duration,
    pub(crate) calls: Arc<Semaphore>,
    pub(crate) joins: Arc<Semaphore>,
    pub(crate) doubted_joins: Arc<Semaphore>,
    pub(crate) watches: Arc<Semaphore>,
    pub(crate) logs: Arc<Semaphore>,
}

/// What the services are reached by and sign with.
pub(crate) struct Port {
    pub(crate) listener: TcpListener,
    pub(crate) credentials: SharedCredentials,
    pub(crate) cas: Arc<SigningCas>,
    pub(crate) life: Duration,
    pub(crate) peers: Peers,
}

/// Serves until the coordinator is stopped, then closes within a bound.
///
/// # Errors
/// [`CoordinatorError::Start`] for credentials that cannot be used.
pub(crate) async fn serve(port: Port, coordinator: Coordinator) -> Result<(), CoordinatorError> {
    let Port { listener, credentials, cas, life, peers } = port;
    let unusable = |error: forge_cluster::tls::TlsError| CoordinatorError::Start { reason: error.to_string() };
    let incoming = TlsIncoming::new(listener, &credentials).map_err(unusable)?;

    let shared = Shared {
        coordinator: coordinator.clone(),
        credentials,
        cas,
        life,
        calls: Arc::new(Semaphore::new(CALLS)),
        joins: Arc::new(Semaphore::new(JOINS)),
        doubted_joins: Arc::new(Semaphore::new(DOUBTED_JOINS)),
        watches: Arc::new(Semaphore::new(WATCHES)),
        logs: Arc::new(Semaphore::new(LOGS)),
    };
    let stopped = coordinator.0.stop.clone();
    let ending = stopped.clone().cancelled_owned();
    let raft = peers.service(&coordinator);
    let served = Server::builder()
        .tcp_nodelay(true)
        .http2_keepalive_interval(Some(KEEP_ALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT))
        .concurrency_limit_per_connection(CALLS_PER_CONNECTION)
        .max_concurrent_streams(STREAMS_PER_CONNECTION)
        .add_service(raft)
        .add_service(ClusterServer::new(cluster::ClusterService(shared.clone())).max_decoding_message_size(MAX_REQUEST_BYTES))
        .add_service(NodesServer::new(nodes::NodesService(shared.clone())).max_decoding_message_size(MAX_SESSION_MESSAGE_BYTES))
        .add_service(AdmissionServer::new(admission::AdmissionService(shared)).max_decoding_message_size(MAX_REQUEST_BYTES))
        .serve_with_incoming_shutdown(incoming, ending);
    tokio::pin!(served);
    let ended = tokio::select! {
        ended = served.as_mut() => ended,
        () = async { stopped.cancelled().await; tokio::time::sleep(CLOSE_WITHIN).await } => Ok(()),
    };
    ended.map_err(|error| CoordinatorError::Start { reason: format!("the server ended: {error}") })
}
