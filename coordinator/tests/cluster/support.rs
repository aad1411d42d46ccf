//! Coordinators in this process, on loopback, with real certificates; and a worker that is a few lines of client.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use forge_cluster::api::{ClusterApi, Session};
use forge_cluster::client::RemoteCluster;
use forge_cluster::tls::{ClusterCa, Credentials, Identity, JoinTokenText, JoinWish, NODE_LIFETIME, NodeKey, SharedCredentials, join};
use forge_coordinator::{CertificateOptions, Coordinator, CoordinatorError, RunOptions, Surroundings, prepare};
use forge_shared::cluster::command::{Applied, Command};
use forge_shared::cluster::event::{Kind, Object};
use forge_shared::cluster::node::{DeviceInfo, DeviceKind, NodeLoad, NodeSpec, Role};
use forge_shared::cluster::service::{ReplicaPhase, ReplicaReport, ReplicaStatus, ServiceRecord};
use forge_shared::cluster::session::{Assignment, NodeDown, NodeUp};
use forge_shared::ids::Incarnation;
use forge_shared::plan::{ModelFacts, ModelShape};
use forge_shared::spec::{ModelService, ModelServiceSpec};
use forge_shared::version::{Build, LEVEL};
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

pub const CLUSTER: &str = "test";
/// For anything that must happen.
pub const SOON: Duration = Duration::from_secs(20);

pub fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock").as_secs()
}

/// A coordinator that runs.
pub struct Running {
    pub address: String,
    pub metrics: Option<SocketAddr>,
    pub coordinator: Coordinator,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), CoordinatorError>>,
}

impl Running {
    /// How it ends by itself.
    pub async fn end(mut self) -> Result<(), CoordinatorError> {
        tokio::time::timeout(SOON, &mut self.task).await.expect("it ends in time").expect("it ends well")
    }

    /// As `kill -9` looks to the others: its port and its member are gone at once.
    pub async fn kill(mut self) {
        self.task.abort();
        let _ = (&mut self.task).await;
        self.coordinator.raft().stop().await;
        self.coordinator.stop().await;
    }

    /// As SIGTERM.
    pub async fn stop(mut self) {
        self.stop.take().expect("it runs").send(()).expect("it listens");
        tokio::time::timeout(SOON, &mut self.task).await.expect("it stops in time").expect("it ends well").expect("it serves");
    }

    pub fn is_leader(&self) -> bool {
        let status = self.coordinator.group_status();
        status.leader_id == status.member_id
    }
}

/// A cluster's files and its coordinators.
pub struct Cluster {
    pub folder: tempfile::TempDir,
    pub ca: ClusterCa,
    pub members: Vec<Running>,
    pub certificates: CertificateOptions,
    /// What coordinators that are started state.
    pub level: u32,
}

/// Credentials of a role, signed by `ca` for as long as they say.
pub fn credentials(ca: &ClusterCa, role: Role, name: &str, signed_s: u64, lifetime: Duration) -> Credentials {
    let key = NodeKey::generate().expect("a key");
    let identity = Identity::new(ca.cluster_id(), role, name).expect("a name");
    let request = key.signing_request_der().expect("a request");
    let certificate = ca.sign(&request, &identity, lifetime, signed_s).expect("signed");
    Credentials::from_pem(&certificate, &key.pem(), ca.certificate_pem()).expect("whole")
}

async fn free_address() -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    listener.local_addr().expect("bound")
}

pub async fn start(options: RunOptions) -> Running {
    let prepared = prepare(options.clone()).await.expect("it starts");
    let coordinator = prepared.coordinator().clone();
    let (stop, stopped) = oneshot::channel();
    let task = tokio::spawn(async move {
        let shutdown = async move {
            let _ = stopped.await;
        };
        prepared.run(shutdown).await
    });
    Running { address: options.address, metrics: options.metrics, coordinator, stop: Some(stop), task }
}

impl Cluster {
    /// A founded cluster of one.
    pub async fn found() -> Cluster {
        Cluster::found_as(LEVEL, Surroundings::default()).await
    }

    /// A founded cluster of one, of an older build perhaps, on such a machine.
    async fn found_as(level: u32, surroundings: Surroundings) -> Cluster {
        let _ =
            tracing_subscriber::fmt().with_env_filter(tracing_subscriber::EnvFilter::from_env("FORGE_LOG")).with_test_writer().try_init();
        let folder = tempfile::tempdir().expect("a folder");
        let ca = ClusterCa::create(CLUSTER, now_s()).expect("a CA");
        let certificates = CertificateOptions::default();
        let mut cluster = Cluster { folder, ca, members: Vec::new(), certificates, level };
        let tls = cluster.path("c1/tls");
        cluster.ca.save(&tls).expect("saved");
        credentials(&cluster.ca, Role::Coordinator, "c1", now_s(), NODE_LIFETIME).save(&tls).expect("saved");
        let options = cluster.options("c1").await;
        cluster.members.push(start(RunOptions { founds_group: true, surroundings, ..options }).await);
        cluster.leader().await;
        cluster
    }

    /// Three, of which two joined by token.
    pub async fn of_three() -> Cluster {
        Cluster::of_three_on(Default::default()).await
    }

    /// Three on such machines, of which two joined by token.
    pub async fn of_three_on(machines: [Surroundings; 3]) -> Cluster {
        Cluster::of_three_as(LEVEL, machines).await
    }

    /// Three, of an older build perhaps.
    pub async fn of_three_at(level: u32) -> Cluster {
        Cluster::of_three_as(level, Default::default()).await
    }

    async fn of_three_as(level: u32, [first, second, third]: [Surroundings; 3]) -> Cluster {
        let mut cluster = Cluster::found_as(level, first).await;
        for (name, surroundings) in [("c2", second), ("c3", third)] {
            cluster.add_on(name, surroundings).await;
        }
        let begun = Instant::now();
        while cluster.members[0].coordinator.group_status().members.iter().filter(|member| member.is_voter).count() < 3 {
            assert!(begun.elapsed() < SOON, "all vote: {:?}", cluster.members[0].coordinator.group_status());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        cluster
    }

    pub fn path(&self, below: &str) -> PathBuf {
        self.folder.path().join(below)
    }

    pub async fn options(&self, name: &str) -> RunOptions {
        let listen = free_address().await;
        RunOptions {
            name: name.into(),
            listen,
            address: listen.to_string(),
            metrics: Some(free_address().await),
            data_dir: self.path(&format!("{name}/data")),
            tls_dir: self.path(&format!("{name}/tls")),
            founds_group: false,
            join_token: None,
            lease: Duration::from_secs(3),
            heartbeat: Duration::from_millis(500),
            surroundings: Surroundings::default(),
            certificates: self.certificates.clone(),
            build: Build { level: self.level, ..Build::default() },
        }
    }

    /// Adds a coordinator by a join token.
    pub async fn add(&mut self, name: &str) {
        self.add_on(name, Surroundings::default()).await;
    }

    /// Adds one on such a machine.
    pub async fn add_on(&mut self, name: &str, surroundings: Surroundings) {
        let token = self.token(Role::Coordinator, 1).await;
        let options = self.options(name).await;
        self.members.push(start(RunOptions { join_token: Some(token), surroundings, ..options }).await);
    }

    /// A join token's text.
    pub async fn token(&self, role: Role, uses: u32) -> String {
        self.token_until(role, uses, now_s() + 600).await
    }

    /// One that ends then, by the leader's clock: seconds since 1970.
    pub async fn token_until(&self, role: Role, uses: u32, expires_s: u64) -> String {
        let token = JoinTokenText::generate(self.ca.digest(), self.addresses()).expect("a token");
        let record = token.record(role, expires_s * 1000, uses);
        execute(&self.admin(), Command::PutJoinToken { token: record }).await;
        token.to_text()
    }

    pub fn addresses(&self) -> Vec<String> {
        self.members.iter().map(|member| member.address.clone()).collect()
    }

    /// A client of a role.
    pub fn client(&self, role: Role, name: &str) -> RemoteCluster {
        self.client_with(credentials(&self.ca, role, name, now_s(), NODE_LIFETIME))
    }

    /// A client with these credentials.
    pub fn client_with(&self, credentials: Credentials) -> RemoteCluster {
        let credentials = SharedCredentials::with_clock(credentials, self.certificates.clock.clone());
        RemoteCluster::new(&self.addresses(), &credentials).expect("a client")
    }

    pub fn admin(&self) -> RemoteCluster {
        self.client(Role::Admin, "operator")
    }

    /// The position of the leader among the members.
    pub async fn leader(&self) -> usize {
        let begun = Instant::now();
        loop {
            if let Some(leader) = self.members.iter().position(Running::is_leader) {
                return leader;
            }
            assert!(begun.elapsed() < SOON, "a leader is elected");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// A worker's credentials, by a join token.
pub async fn join_worker(token: &str, name: &str) -> Credentials {
    let token = JoinTokenText::parse(token).expect("a token");
    let wish = JoinWish { role: Role::Worker, name: name.into(), address: String::new(), build: Default::default() };
    join(&token, &wish, SOON).await.expect("let in").credentials
}

/// Has a command applied.
pub async fn execute(cluster: &dyn ClusterApi, command: Command) -> Applied {
    static NUMBER: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    let id = format!("test-{}-{}", std::process::id(), NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed));
    cluster.execute(id, command, SOON).await.expect("it is applied")
}

/// A wish for a small model.
pub fn wish(name: &str, replicas: u32) -> ModelService {
    let spec = ModelServiceSpec { model: "tests/tiny".into(), max_model_len: Some(64), replicas, ..ModelServiceSpec::default() };
    ModelService::new(name, spec)
}

/// What every worker here finds of every model.
pub fn facts() -> ModelFacts {
    ModelFacts {
        layers: 2,
        context_length: 128,
        weights_bytes: 1 << 20,
        kv_slot_bytes: 1 << 10,
        workspace_bytes: 1 << 20,
        weights_digest: "0".repeat(64),
        shape: ModelShape {
            heads: 4,
            kv_heads: 2,
            experts: 0,
            hidden_size: 64,
            vocab_size: 256,
            embedding_bytes: 1 << 16,
            head_bytes: 0,
            layer_bytes: vec![1 << 19, 1 << 19],
            expert_bytes: Vec::new(),
            tensor_extra_bytes: Vec::new(),
        },
    }
}

pub fn worker_spec(name: &str, incarnation: u64) -> NodeSpec {
    NodeSpec {
        id: name.into(),
        role: Role::Worker,
        incarnation: Incarnation(incarnation),
        version: "0.1.0".into(),
        level: forge_shared::version::LEVEL,
        address: "127.0.0.1:7100".into(),
        metrics_address: "127.0.0.1:9000".into(),
        data_plane: None,
        devices: vec![DeviceInfo {
            index: 0,
            kind: DeviceKind::Cpu,
            name: "test".into(),
            cores: 2,
            numa_node: None,
            instruction_sets: vec!["avx2".into()],
            memory_bytes: 1 << 30,
            read_bandwidth_bytes_per_s: 0,
            matrix_flops: 0,
            is_virtual: true,
            cannot_run: None,
        }],
    }
}

/// A worker that looks at models, says that what it is told to run is ready, and sends heartbeats.
pub struct Worker {
    /// What it was last told to run.
    pub assignments: Arc<Mutex<Vec<Assignment>>>,
    /// Why it was refused, if it was.
    pub refused: Arc<Mutex<Option<String>>>,
    task: JoinHandle<()>,
}

impl Worker {
    pub fn start(cluster: RemoteCluster, spec: NodeSpec) -> Worker {
        let assignments: Arc<Mutex<Vec<Assignment>>> = Arc::default();
        let refused: Arc<Mutex<Option<String>>> = Arc::default();
        let (told, no) = (assignments.clone(), refused.clone());
        let task = tokio::spawn(async move {
            loop {
                if let Ok(session) = cluster.session(spec.clone(), Duration::from_secs(2)).await
                    && let Some(reason) = live(session, &told).await
                {
                    *no.lock() = Some(reason);
                    return;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        });
        Worker { assignments, refused, task }
    }

    /// As `kill -9`.
    pub fn kill(&self) {
        self.task.abort();
    }
}

/// One session; the reason if it was refused.
async fn live(mut session: Session, told: &Mutex<Vec<Assignment>>) -> Option<String> {
    let mut beat = tokio::time::interval(Duration::from_millis(200));
    let mut number = 0;
    loop {
        let down = tokio::select! {
            _ = beat.tick() => {
                number += 1;
                let message = NodeUp::Heartbeat { number, load: NodeLoad::default(), usage: Vec::new() };
                if session.up.send(message).await.is_err() {
                    return None;
                }
                continue;
            }
            down = session.down.recv() => down,
        };
        let answers = match down {
            None | Some(NodeDown::Moved { .. }) => return None,
            Some(NodeDown::Refused { reason }) => return Some(reason),
            Some(NodeDown::Inspect { number, .. }) => vec![NodeUp::Inspected { number, result: Ok(Box::new(facts())) }],
            Some(NodeDown::Assignments { assignments, .. }) => {
                let before = std::mem::replace(&mut *told.lock(), assignments.clone());
                let ended = before.iter().filter(|old| !assignments.iter().any(|new| new.plan.epoch == old.plan.epoch));
                let ended = ended.map(|old| report(old, ReplicaPhase::Stopped)).collect::<Vec<_>>();
                let phase = |of: &Assignment| if of.drain_ms.is_some() { ReplicaPhase::Stopped } else { ReplicaPhase::Ready };
                assignments.iter().map(|new| report(new, phase(new))).chain(ended).collect()
            }
            Some(NodeDown::Welcome { .. } | NodeDown::Ack { .. }) => Vec::new(),
        };
        for answer in answers {
            if session.up.send(answer).await.is_err() {
                return None;
            }
        }
    }
}

fn report(assignment: &Assignment, phase: ReplicaPhase) -> NodeUp {
    let status = ReplicaStatus { phase, percent: 100, reason: String::new(), restarts: 0, numerics_id: "test".into(), fault: None };
    let report = ReplicaReport { replica: assignment.plan.replica.clone(), epoch: assignment.plan.epoch, status, found_memory_bytes: None };
    NodeUp::Replica { report: Box::new(report) }
}

/// A service as the cluster has it.
pub async fn service(cluster: &dyn ClusterApi, name: &str) -> Option<ServiceRecord> {
    let listing = cluster.read(Kind::Service, Some(name.into()), SOON).await.expect("it answers");
    match listing.objects.into_iter().next() {
        Some(Object::Service(record)) => Some(*record),
        _ => None,
    }
}

/// Nodes of a service's ready replicas.
pub async fn ready_on(cluster: &dyn ClusterApi, name: &str) -> Vec<String> {
    let replicas = service(cluster, name).await.map(|record| record.replicas).unwrap_or_default();
    let ready = replicas.iter().filter(|replica| replica.status.phase == ReplicaPhase::Ready);
    ready.filter_map(|replica| replica.plan.ranks.first()).map(|rank| rank.node.0.clone()).collect()
}

/// Waits until the ready replicas stand on these nodes, in any order.
pub async fn wait_ready(cluster: &dyn ClusterApi, name: &str, nodes: &[&str]) {
    let begun = Instant::now();
    loop {
        let mut ready = ready_on(cluster, name).await;
        ready.sort();
        if ready == nodes {
            return;
        }
        assert!(begun.elapsed() < SOON, "ready on {nodes:?}, not {ready:?}: {:?}", service(cluster, name).await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
