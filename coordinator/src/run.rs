//! A coordinator as a process: finds out which member it is, opens its port, serves, and stops in bounded time.
//!
//! What it is not: it reads no configuration file and no signal; the program does.
//!
//! Invariant: a folder that has no member yet becomes one in one way only: as the founder that was asked for, or by a join
//! token; never by guessing.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use forge_cluster::api::ClusterApi;
use forge_cluster::client::RemoteCluster;
use forge_cluster::probes::{self, Probes};
use forge_cluster::tls::{
    CA_KEY_FILE, CertificateClock, Credentials, JoinTokenText, JoinWish, NODE_LIFETIME, SharedCredentials, join, write_private,
};
use forge_shared::cluster::command::MemberRecord;
use forge_shared::cluster::node::Role;
use forge_shared::telemetry::RoleLabel;
use forge_shared::version::Build;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::certificates::{Keeper, follow_trust, record_seen};
use crate::coordinator::{Coordinator, CoordinatorOptions};
use crate::error::CoordinatorError;
use crate::member_file::MemberFile;
use crate::peers::Peers;
use crate::raft::RaftOptions;
use crate::server;
use crate::signing::SigningCas;
use crate::surroundings::Surroundings;

/// For a new coordinator to be let in.
const JOIN_WITHIN: Duration = Duration::from_secs(60);
/// For the group to be asked who belongs to it.
const ASK_WITHIN: Duration = Duration::from_secs(10);

/// Marks certificates that have founded a group.
const FOUNDED_FILE: &str = "founded";

/// What a coordinator's process needs to know.
#[derive(Debug, Clone)]
pub struct RunOptions {
    /// Its name; must be the one in its certificate where it has one.
    pub name: String,
    /// Where its services listen.
    pub listen: SocketAddr,
    /// `host:port` under which others reach them; where they listen, if empty.
    pub address: String,
    /// Where metrics and probes listen, if they do.
    pub metrics: Option<SocketAddr>,
    /// Folder of its data.
    pub data_dir: PathBuf,
    /// Folder of its certificate and the CA: `node.pem`, `ca.pem`, `ca.key`.
    pub tls_dir: PathBuf,
    /// A new folder founds a new group, alone.
    pub founds_group: bool,
    /// A new folder is let into a group with it.
    pub join_token: Option<String>,
    /// A node whose heartbeats stop for this long is lost.
    pub lease: Duration,
    /// How often nodes send heartbeats.
    pub heartbeat: Duration,
    /// Its machine.
    pub surroundings: Surroundings,
    /// What it is a build of.
    pub build: Build,
    /// The certificates it signs, and its own.
    pub certificates: CertificateOptions,
}

/// How certificates are signed and by what clock they are looked at.
#[derive(Debug, Clone)]
pub struct CertificateOptions {
    /// Life of those that are signed for nodes and operators.
    pub life: Duration,
    /// The machine's, but for tests.
    pub clock: CertificateClock,
}

impl Default for CertificateOptions {
    fn default() -> Self {
        CertificateOptions { life: NODE_LIFETIME, clock: CertificateClock::default() }
    }
}

/// A coordinator that has its ports and its group, and does not serve yet.
pub struct Prepared {
    options: RunOptions,
    coordinator: Coordinator,
    peers: Peers,
    credentials: SharedCredentials,
    cas: Arc<SigningCas>,
    listener: TcpListener,
    probes: Option<TcpListener>,
}

impl std::fmt::Debug for Prepared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prepared").field("coordinator", &self.coordinator).finish_non_exhaustive()
    }
}

/// Opens ports and data, joins or founds the group where the folder is new.
///
/// # Errors
/// What cannot be opened, or is missing, with the remedy.
pub async fn prepare(mut options: RunOptions) -> Result<Prepared, CoordinatorError> {
    let start = |reason: String| CoordinatorError::Start { reason };
    let no_port = |error: std::io::Error| start(format!("the port {}: {error}", options.listen));
    let listener = TcpListener::bind(options.listen).await.map_err(no_port)?;
    if options.address.is_empty() {
        options.address = listener.local_addr().map_err(no_port)?.to_string();
    }
    let probes = match options.metrics {
        Some(address) => Some(probes::bind(address).await.map_err(start)?),
        None => None,
    };
    let member = match MemberFile::load(&options.data_dir)? {
        Some(member) => member,
        None => become_member(&options).await?,
    };
    let (credentials, cas) = load_credentials(&options.tls_dir)?;
    let identity = credentials.identity().clone();
    if identity.role != Role::Coordinator || identity.name != options.name {
        let reason =
            format!("{} holds the certificate of {identity}; this is to be the coordinator {}", options.tls_dir.display(), options.name);
        return Err(start(reason));
    }
    let credentials = SharedCredentials::with_clock(credentials, options.certificates.clock.clone());
    let mut raft = RaftOptions::new(member.member_id, member.group_id.clone(), MemberFile::raft_folder(&options.data_dir));
    raft.bootstrap = member.is_founder.then(|| vec![member.member_id]);
    let mut coordinator_options = CoordinatorOptions::new(raft, &identity.cluster_id, &options.name, &options.address);
    (coordinator_options.lease, coordinator_options.heartbeat) = (options.lease, options.heartbeat);
    coordinator_options.surroundings = options.surroundings.clone();
    coordinator_options.build.clone_from(&options.build);
    let peers = Peers::new(&member, &credentials, options.build.clone());
    let coordinator = Coordinator::start(coordinator_options, peers.transport())?;
    peers.follow(&coordinator);
    Ok(Prepared { options, coordinator, peers, credentials, cas: Arc::new(cas), listener, probes })
}

impl Prepared {
    /// The coordinator.
    pub fn coordinator(&self) -> &Coordinator {
        &self.coordinator
    }

    /// Where its services listen, the port the system chose if 0 was asked for.
    ///
    /// # Errors
    /// What the system said.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `shutdown`, then hands leadership over and stops, within a bound.
    ///
    /// # Errors
    /// Credentials that cannot be used; the group has removed this member.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send) -> Result<(), CoordinatorError> {
        let Prepared { options, coordinator, peers, credentials, cas, listener, probes } = self;
        let stop = CancellationToken::new();
        let (metrics, ready) = (coordinator.metrics().clone(), coordinator.clone());
        let told = Probes { metrics: Arc::new(move || metrics.encode()), readiness: Arc::new(move || ready.readiness()) };
        let probes = probes.map(|port| tokio::spawn(probes::serve(port, told, stop.clone().cancelled_owned())));
        let removal = peers.removal(&coordinator);
        let renewal = keep_certificate(&options, &coordinator, &credentials);
        tracing::info!(address = options.address, name = options.name, "serving");
        let keeper = Keeper { credentials: credentials.clone(), cas: cas.clone(), directory: options.tls_dir.clone() };
        coordinator.0.tasks.spawn(follow_trust(coordinator.clone(), keeper));
        coordinator.0.tasks.spawn(record_seen(coordinator.clone(), credentials.clone()));
        let port = server::Port { listener, credentials: credentials.clone(), cas, life: options.certificates.life, peers };
        let server = server::serve(port, coordinator.clone());
        tokio::pin!(server);
        let served = tokio::select! {
            served = server.as_mut() => served,
            () = renewal => Ok(()),
            () = removal => {
                let error = CoordinatorError::Removed { name: options.name.clone(), data_dir: options.data_dir.clone() };
                tracing::error!(%error, "stopping");
                Err(error)
            }
            reason = member_failure(&coordinator) => Err(CoordinatorError::Start { reason }),
            () = shutdown => {
                tracing::info!("stopping");
                // The port stays open while leadership goes to another: calls in flight are told where.
                tokio::join!(coordinator.stop(), server.as_mut()).1
            }
        };
        coordinator.stop().await;
        stop.cancel();
        probes.inspect(|probes| probes.abort());
        served
    }
}

/// Waits until the raft member has stopped by itself: a process without it could only say so for ever.
async fn member_failure(coordinator: &Coordinator) -> String {
    let mut status = coordinator.raft().status();
    let failure = status.wait_for(|status| status.failure.is_some()).await.ok().and_then(|status| status.failure.clone());
    match failure {
        Some(failure) => format!("the raft member has stopped: {failure}"),
        // Its thread ended in order: whoever asked for that ends the process.
        None => std::future::pending().await,
    }
}

/// Renews the certificate at two thirds of its life, through the group itself.
async fn keep_certificate(options: &RunOptions, coordinator: &Coordinator, credentials: &SharedCredentials) {
    let mut addresses = vec![options.address.clone()];
    addresses.extend(coordinator.group_status().members.into_iter().map(|member| member.address));
    addresses.retain(|address| !address.is_empty());
    addresses.dedup();
    match RemoteCluster::new(&addresses, credentials) {
        Ok(cluster) => {
            let gauge = coordinator.metrics().certificate_left_s.get_or_create_owned(&RoleLabel { role: Role::Coordinator.to_string() });
            let left = move |left_s| {
                gauge.set(left_s);
            };
            forge_cluster::client::keep_renewed(cluster, options.tls_dir.clone(), left).await;
        }
        Err(error) => {
            tracing::error!(%error, "the certificate will not be renewed by itself");
            std::future::pending().await
        }
    }
}

fn load_credentials(folder: &Path) -> Result<(Credentials, SigningCas), CoordinatorError> {
    let start = |error: forge_cluster::tls::TlsError| CoordinatorError::Start { reason: error.to_string() };
    Ok((Credentials::load(folder).map_err(start)?, SigningCas::load(folder).map_err(start)?))
}

/// Makes a new folder a member.
async fn become_member(options: &RunOptions) -> Result<MemberFile, CoordinatorError> {
    let start = |reason: String| CoordinatorError::Start { reason };
    let member = match (&options.join_token, options.founds_group) {
        (None, true) => {
            let (credentials, _) = load_credentials(&options.tls_dir)?;
            found_once(&options.tls_dir)?;
            let group_id = credentials.identity().cluster_id.clone();
            tracing::info!(cluster = group_id, "a new cluster is founded");
            MemberFile { member_id: 1, group_id, is_founder: true, peers: Vec::new() }
        }
        (Some(token), false) => join_group(options, token).await?,
        (Some(_), true) => {
            return Err(start("a new coordinator founds a cluster or joins one: give a join token or --bootstrap, not both".into()));
        }
        (None, false) => {
            let folder = options.data_dir.display();
            return Err(start(format!(
                "{folder} is new: give a join token of `forgectl cluster join-token --role coordinator`, or start with --bootstrap to found a new cluster"
            )));
        }
    };
    member.save(&options.data_dir)?;
    Ok(member)
}

/// Certificates found a group once: with a lost data folder, the same start must not make a second group under one CA.
fn found_once(tls_dir: &Path) -> Result<(), CoordinatorError> {
    let path = tls_dir.join(FOUNDED_FILE);
    let made = std::fs::OpenOptions::new().write(true).create_new(true).open(&path).and_then(|file| file.sync_all());
    made.map_err(|source| match source.kind() {
        std::io::ErrorKind::AlreadyExists => {
            let reason = format!(
                "{}: these certificates have founded a cluster before, and its data folder is not here: restore a backup, or join",
                path.display()
            );
            CoordinatorError::Start { reason }
        }
        _ => CoordinatorError::File { path, source },
    })
}

async fn join_group(options: &RunOptions, token: &str) -> Result<MemberFile, CoordinatorError> {
    let start = |reason: String| CoordinatorError::Start { reason };
    let token = JoinTokenText::parse(token).map_err(|error| start(error.to_string()))?;
    let build = options.build.clone();
    let wish = JoinWish { role: Role::Coordinator, name: options.name.clone(), address: options.address.clone(), build };
    let joined = join(&token, &wish, JOIN_WITHIN).await.map_err(|error| start(format!("joining: {error}")))?;
    let (Some(ca_key), Some(member_id)) = (&joined.ca_key_pem, joined.member_id) else {
        return Err(start("joining: the answer has no key of the CA".into()));
    };
    let tls = |error: forge_cluster::tls::TlsError| start(error.to_string());
    write_private(&options.tls_dir.join(CA_KEY_FILE), ca_key).map_err(tls)?;
    joined.credentials.save(&options.tls_dir).map_err(tls)?;
    let credentials = SharedCredentials::new(joined.credentials);
    let others: Vec<String> = joined.coordinators.into_iter().filter(|address| *address != options.address).collect();
    let group = RemoteCluster::new(&others, &credentials).map_err(tls)?;
    let status = group.status(ASK_WITHIN).await.map_err(|error| start(format!("asking the group for its members: {error}")))?;
    let peers = status.members.into_iter().filter(|member| member.id != member_id && !member.address.is_empty());
    let peers = peers
        .map(|member| {
            let build = Build { version: member.version, level: member.level };
            MemberRecord::new(member.id, &member.name, &member.address, build)
        })
        .collect();
    tracing::info!(member_id, "let into the group");
    Ok(MemberFile { member_id, group_id: status.group_id, is_founder: false, peers })
}
