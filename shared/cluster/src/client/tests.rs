//! The client against scripted coordinators over real mTLS.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use forge_proto::cluster as wire;
use forge_proto::cluster::cluster_server::{Cluster, ClusterServer};
use forge_proto::node::nodes_server::{Nodes, NodesServer};
use forge_proto::node::{
    ConfirmReply, ConfirmRequest, RenewReply, RenewRequest, SessionDown, SessionUp, SigningKeyReply, SigningKeyRequest,
};
use forge_shared::cluster::command::CommandError;
use forge_shared::cluster::event::{Change, Event};
use forge_shared::cluster::node::{NodeLoad, Role};
use forge_shared::cluster::session::{NodeDown, NodeUp};
use forge_shared::ids::{Incarnation, NodeId, ServiceName};
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tonic::{Request, Response, Status, Streaming};

use super::*;
use crate::api::MemberStatus;
use crate::status::to_status;
use crate::tls::{ClusterCa, Credentials, Identity, NODE_LIFETIME, NodeKey, Peer, TlsIncoming, clock_s};

const TIMEOUT: Duration = Duration::from_secs(10);
/// The leader that a coordinator names which has not read who the members are.
const NEWCOMERS_LEADER: u64 = 9;

/// A coordinator that does as it is told.
#[derive(Clone)]
struct Script {
    ca: Arc<ClusterCa>,
    /// Whom it names as leader; None: it leads.
    leader: Arc<Mutex<Option<String>>>,
    /// Request ids it was asked to execute.
    executed: Arc<Mutex<Vec<String>>>,
    /// Commands that it carries out and then does not answer.
    answers_lost: Arc<AtomicU32>,
    /// Whom its status says leads; None: it has no such call.
    status_leader: Arc<Mutex<Option<u64>>>,
    /// Batches of the next watches, each watch ending after its own.
    watches: Arc<Mutex<VecDeque<Vec<wire::WatchBatch>>>>,
    /// Where watches began.
    resumed: Arc<Mutex<Vec<u64>>>,
}

impl Script {
    fn not_leader(&self) -> Result<(), Status> {
        let Some(leader) = self.leader.lock().clone() else { return Ok(()) };
        Err(to_status(&ClusterError::Unavailable { waited_ms: 0, reason: "not the leader".into() }, Some(&leader)))
    }
}

type Out<T> = BoxStream<'static, Result<T, Status>>;

#[tonic::async_trait]
impl Cluster for Script {
    type WatchStream = Out<wire::WatchBatch>;
    type LoadsStream = Out<wire::LoadsReply>;
    type LogsStream = Out<wire::LogLine>;
    type BackupStream = Out<wire::BackupChunk>;

    async fn execute(&self, request: Request<wire::ExecuteRequest>) -> Result<Response<wire::ExecuteReply>, Status> {
        Peer::require(&request, &[Role::Admin])?;
        self.not_leader()?;
        let request = request.into_inner();
        self.executed.lock().push(request.request_id);
        if self.answers_lost.load(Ordering::SeqCst) > 0 {
            self.answers_lost.fetch_sub(1, Ordering::SeqCst);
            return Err(Status::unavailable("connection reset"));
        }
        if let Command::ScaleService { name, .. } = serde_json::from_slice(&request.command_json).unwrap() {
            let error = CommandError::NotFound { kind: "service".into(), name: name.0, nearest: None };
            return Err(to_status(&error.into(), None));
        }
        let applied = Applied { revision: Revision(7), changed: true, existing: None };
        Ok(Response::new(wire::ExecuteReply { applied_json: serde_json::to_vec(&applied).unwrap().into() }))
    }

    async fn read(&self, _: Request<wire::ReadRequest>) -> Result<Response<wire::ReadReply>, Status> {
        Ok(Response::new(wire::ReadReply { revision: 3, objects_json: vec![b"{\"kind\":\"moon\"}".as_slice().into()] }))
    }

    async fn watch(&self, request: Request<wire::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        assert!(request.metadata().get("grpc-timeout").is_none(), "a watch has no end");
        self.resumed.lock().push(request.into_inner().after_revision);
        match self.watches.lock().pop_front() {
            Some(batches) => Ok(Response::new(stream::iter(batches).map(Ok).boxed())),
            None => Ok(Response::new(stream::pending().boxed())),
        }
    }

    async fn plan(&self, _: Request<wire::PlanRequest>) -> Result<Response<wire::PlanReply>, Status> {
        tokio::time::sleep(Duration::from_secs(60)).await;
        Err(Status::internal("too late"))
    }

    async fn status(&self, _: Request<wire::StatusRequest>) -> Result<Response<wire::StatusReply>, Status> {
        let Some(leader_id) = *self.status_leader.lock() else { return Err(Status::unimplemented("not in this test")) };
        let status = GroupStatus {
            cluster_id: "c1".into(),
            group_id: "g1".into(),
            member_id: 1,
            leader_id,
            term: 1,
            commit_index: 1,
            applied_index: 1,
            revision: Revision(1),
            members: match leader_id {
                0 | NEWCOMERS_LEADER => Vec::new(),
                id => vec![MemberStatus {
                    id,
                    name: "leader".into(),
                    address: "host:7000".into(),
                    version: "1".into(),
                    level: forge_shared::version::LEVEL,
                    is_voter: true,
                    is_reachable: true,
                    matched_index: 1,
                }],
            },
            version: "1".into(),
            level: forge_shared::version::LEVEL,
            older: Vec::new(),
        };
        Ok(Response::new(wire::StatusReply { status_json: serde_json::to_vec(&status).unwrap().into() }))
    }

    async fn change_members(&self, _: Request<wire::ChangeMembersRequest>) -> Result<Response<wire::ChangeMembersReply>, Status> {
        Ok(Response::new(wire::ChangeMembersReply {}))
    }

    async fn begin_ca_rotation(&self, _: Request<wire::BeginCaRotationRequest>) -> Result<Response<wire::BeginCaRotationReply>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    async fn loads(&self, request: Request<wire::LoadsRequest>) -> Result<Response<Self::LoadsStream>, Status> {
        self.not_leader()?;
        assert_eq!(request.into_inner().interval_ms, 50);
        let reply = wire::LoadsReply { loads_json: b"{\"nodes\":[]}".as_slice().into() };
        Ok(Response::new(stream::iter([Ok(reply)]).chain(stream::pending()).boxed()))
    }

    async fn logs(&self, _: Request<wire::LogsRequest>) -> Result<Response<Self::LogsStream>, Status> {
        let line = wire::LogLine { source: "w1".into(), text: "hello".into(), ..Default::default() };
        Ok(Response::new(stream::iter([Ok(line)]).boxed()))
    }

    async fn backup(&self, _: Request<wire::BackupRequest>) -> Result<Response<Self::BackupStream>, Status> {
        let chunk = wire::BackupChunk { data: b"part".as_slice().into() };
        Ok(Response::new(stream::iter([Ok(chunk), Err(Status::data_loss("disk"))]).boxed()))
    }
}

#[tonic::async_trait]
impl Nodes for Script {
    type SessionStream = Out<SessionDown>;

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<RenewReply>, Status> {
        let identity = Peer::of(&request)?;
        let certificate_pem = self.ca.sign(&request.into_inner().signing_request_der, &identity, NODE_LIFETIME, clock_s())?;
        let ca_certificate_pem = self.ca.certificate_pem().into();
        Ok(Response::new(RenewReply { certificate_pem, ca_certificate_pem, ..Default::default() }))
    }

    async fn confirm(&self, request: Request<ConfirmRequest>) -> Result<Response<ConfirmReply>, Status> {
        Peer::of(&request)?;
        Ok(Response::new(ConfirmReply {}))
    }

    async fn signing_key(&self, _: Request<SigningKeyRequest>) -> Result<Response<SigningKeyReply>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    async fn session(&self, request: Request<Streaming<SessionUp>>) -> Result<Response<Self::SessionStream>, Status> {
        let down = |message: &NodeDown| SessionDown { message_json: serde_json::to_vec(message).unwrap().into() };
        let moved = self.leader.lock().clone();
        if let Some(leader) = moved {
            return Ok(Response::new(stream::iter([Ok(down(&NodeDown::Moved { leader: Some(leader) }))]).boxed()));
        }
        let answers = request.into_inner().map(move |up| {
            let message = match serde_json::from_slice(&up?.message_json).unwrap() {
                NodeUp::Heartbeat { number, .. } => NodeDown::Ack { number, lease_ms: 3000, shares: Vec::new() },
                _ => NodeDown::Welcome { lease_ms: 3000, heartbeat_ms: 500 },
            };
            Ok(down(&message))
        });
        Ok(Response::new(answers.boxed()))
    }
}

struct World {
    script: Script,
    address: String,
    /// Its own, so that its connections end with it.
    runtime: Option<Runtime>,
}

impl World {
    fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.kill();
    }
}

fn credentials(ca: &ClusterCa, role: Role, name: &str) -> Credentials {
    let key = NodeKey::generate().unwrap();
    let identity = Identity::new(ca.cluster_id(), role, name).unwrap();
    let certificate = ca.sign(&key.signing_request_der().unwrap(), &identity, NODE_LIFETIME, clock_s()).unwrap();
    Credentials::from_pem(&certificate, &key.pem(), ca.certificate_pem()).unwrap()
}

async fn coordinator(ca: &Arc<ClusterCa>, name: &str) -> World {
    let shared = SharedCredentials::new(credentials(ca, Role::Coordinator, name));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let listening = runtime.spawn(async move {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        (listener.local_addr().unwrap().to_string(), TlsIncoming::new(listener, &shared).unwrap())
    });
    let (address, incoming) = listening.await.unwrap();
    let script = Script {
        ca: ca.clone(),
        leader: Arc::default(),
        executed: Arc::default(),
        answers_lost: Arc::default(),
        status_leader: Arc::default(),
        watches: Arc::default(),
        resumed: Arc::default(),
    };
    let server =
        tonic::transport::Server::builder().add_service(ClusterServer::new(script.clone())).add_service(NodesServer::new(script.clone()));
    runtime.spawn(server.serve_with_incoming(incoming));
    World { script, address, runtime: Some(runtime) }
}

fn ca() -> Arc<ClusterCa> {
    Arc::new(ClusterCa::create("c1", clock_s()).unwrap())
}

fn client(ca: &ClusterCa, worlds: &[&World]) -> RemoteCluster {
    let addresses: Vec<String> = worlds.iter().map(|world| world.address.clone()).collect();
    RemoteCluster::new(&addresses, &SharedCredentials::new(credentials(ca, Role::Admin, "root"))).unwrap()
}

fn cordon() -> Command {
    Command::CordonNode { node: NodeId::from("w1"), cordoned: true }
}

fn change(revision: u64) -> Event {
    let kind = Kind::Key;
    Event { revision: Revision(revision), change: Change::Deleted { kind, name: format!("k{revision}") } }
}

fn batch(revision: u64, events: &[u64], is_reset: bool, is_reset_end: bool) -> wire::WatchBatch {
    let events_json = events.iter().map(|event| serde_json::to_vec(&change(*event)).unwrap().into()).collect();
    wire::WatchBatch { revision, events_json, is_reset, is_reset_end }
}

#[tokio::test]
async fn a_command_finds_the_leader_and_asks_it_first_from_then_on() {
    let ca = ca();
    let (follower, leader) = (coordinator(&ca, "a").await, coordinator(&ca, "b").await);
    *follower.script.leader.lock() = Some(leader.address.clone());
    let cluster = client(&ca, &[&follower]);
    assert_eq!(cluster.execute("r1".into(), cordon(), TIMEOUT).await.unwrap().revision, Revision(7));
    *follower.script.leader.lock() = None;
    cluster.execute("r2".into(), cordon(), TIMEOUT).await.unwrap();
    assert_eq!(*leader.script.executed.lock(), ["r1", "r2"]);
    assert!(follower.script.executed.lock().is_empty());
}

#[tokio::test]
async fn a_lost_answer_is_asked_for_again_under_the_same_id() {
    let ca = ca();
    let world = coordinator(&ca, "a").await;
    world.script.answers_lost.store(2, Ordering::SeqCst);
    client(&ca, &[&world]).execute("r1".into(), cordon(), TIMEOUT).await.unwrap();
    assert_eq!(*world.script.executed.lock(), ["r1", "r1", "r1"]);

    world.script.answers_lost.store(u32::MAX, Ordering::SeqCst);
    let error = client(&ca, &[&world]).execute("r2".into(), cordon(), Duration::from_millis(400)).await.unwrap_err();
    assert!(matches!(error, ClusterError::Unknown { .. }), "{error:?}");
}

#[tokio::test]
async fn the_end_of_a_coordinator_is_the_beginning_of_the_next() {
    let ca = ca();
    let (mut first, mut second) = (coordinator(&ca, "a").await, coordinator(&ca, "b").await);
    let cluster = client(&ca, &[&first, &second]);
    cluster.execute("r1".into(), cordon(), TIMEOUT).await.unwrap();
    first.kill();
    cluster.execute("r2".into(), cordon(), TIMEOUT).await.unwrap();
    assert_eq!(*second.script.executed.lock(), ["r2"]);
    second.kill();
    let error = cluster.execute("r3".into(), cordon(), Duration::from_millis(500)).await.unwrap_err();
    assert!(matches!(error, ClusterError::Unavailable { .. } | ClusterError::Unknown { .. }), "{error:?}");
}

/// Takes connections and never says a word, as a host behind a cut does.
async fn silent() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

#[tokio::test]
async fn whether_the_group_lives_is_asked_of_all_at_once() {
    let ca = ca();
    let (without, with) = (coordinator(&ca, "a").await, coordinator(&ca, "b").await);
    *without.script.status_leader.lock() = Some(0);
    *with.script.status_leader.lock() = Some(2);
    // One after the other they would take a second each.
    let silent = futures::future::join_all((0..12).map(|_| silent())).await;
    let mut addresses: Vec<String> = silent.iter().map(|(_, address)| address.clone()).collect();
    addresses.extend([without.address.clone(), with.address.clone()]);
    let credentials = SharedCredentials::new(credentials(&ca, Role::Admin, "root"));
    let cluster = RemoteCluster::new(&addresses, &credentials).unwrap();
    assert_eq!(cluster.status(Duration::from_secs(8)).await.unwrap().leader_id, 2);
    // One that has just been let in knows no member's address yet: nobody could join by what it says.
    *without.script.status_leader.lock() = Some(NEWCOMERS_LEADER);
    for _ in 0..10 {
        assert_eq!(cluster.status(Duration::from_secs(8)).await.unwrap().leader_id, 2);
    }
    *without.script.status_leader.lock() = Some(0);
    // Without one that knows a leader, one that knows none will do.
    *with.script.status_leader.lock() = Some(0);
    assert_eq!(cluster.status(Duration::from_secs(8)).await.unwrap().leader_id, 0);
}

#[tokio::test]
async fn one_that_gives_no_answer_is_asked_last_from_then_on() {
    let ca = ca();
    let (world, (_listener, silent)) = (coordinator(&ca, "a").await, silent().await);
    let credentials = SharedCredentials::new(credentials(&ca, Role::Admin, "root"));
    let cluster = RemoteCluster::new(&[silent.clone(), world.address.clone()], &credentials).unwrap();
    // The silent one does not take all of the time.
    cluster.execute("r1".into(), cordon(), Duration::from_secs(8)).await.unwrap();
    assert_eq!(cluster.channels.addresses().all(), [world.address.clone(), silent]);
    // A leader whose session breaks off is not asked first again.
    let hello = NodeSpec {
        id: NodeId::from("w1"),
        role: Role::Worker,
        incarnation: Incarnation(1),
        version: "1".into(),
        level: forge_shared::version::LEVEL,
        address: "127.0.0.1:7100".into(),
        metrics_address: String::new(),
        data_plane: None,
        devices: Vec::new(),
    };
    drop(cluster.session(hello, TIMEOUT).await.unwrap());
    let demoted = async {
        while cluster.channels.addresses().all()[1] != world.address {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(TIMEOUT, demoted).await.unwrap();
}

#[tokio::test]
async fn refusals_come_out_as_they_are_and_at_once() {
    let ca = ca();
    let world = coordinator(&ca, "a").await;
    let scale = Command::ScaleService { name: ServiceName::from("m"), replicas: 2 };
    let error = client(&ca, &[&world]).execute("r1".into(), scale, TIMEOUT).await.unwrap_err();
    assert!(matches!(error, ClusterError::Command(CommandError::NotFound { .. })), "{error:?}");

    let worker = SharedCredentials::new(credentials(&ca, Role::Worker, "w1"));
    let error = RemoteCluster::new(std::slice::from_ref(&world.address), &worker)
        .unwrap()
        .execute("r2".into(), cordon(), TIMEOUT)
        .await
        .unwrap_err();
    assert!(matches!(&error, ClusterError::Forbidden { reason } if reason.contains("role admin")), "{error:?}");

    let stranger = self::ca();
    let began = std::time::Instant::now();
    let error = client(&stranger, &[&world]).execute("r3".into(), cordon(), TIMEOUT).await.unwrap_err();
    assert!(matches!(&error, ClusterError::Forbidden { reason } if reason.contains("CA")), "{error:?}");
    assert!(began.elapsed() < Duration::from_secs(2), "a wrong certificate is not waited for");
}

#[tokio::test]
async fn calls_end_in_time_and_unreadable_answers_are_said_to_be() {
    let ca = ca();
    let world = coordinator(&ca, "a").await;
    let cluster = client(&ca, &[&world]);
    let service = ModelService::new("m", Default::default());
    let error = cluster.plan(service, Duration::from_millis(300)).await.unwrap_err();
    assert!(matches!(error, ClusterError::Unavailable { waited_ms: 300.., .. }), "{error:?}");
    let error = cluster.read(Kind::Node, None, TIMEOUT).await.unwrap_err();
    assert!(matches!(&error, ClusterError::Protocol { reason } if reason.contains("one version of Forge")), "{error:?}");
    let error = cluster.status(TIMEOUT).await.unwrap_err();
    assert!(matches!(error, ClusterError::Protocol { .. }), "{error:?}");
}

#[tokio::test]
async fn a_watch_resumes_where_it_was_and_resets_when_told() {
    let ca = ca();
    let world = coordinator(&ca, "a").await;
    world.script.watches.lock().extend([
        vec![batch(0, &[1], true, false), batch(3, &[2], false, true), batch(4, &[4], false, false)],
        // A listing that breaks off is void: the watch begins again where it was.
        vec![batch(0, &[1], true, false)],
        vec![batch(9, &[8], true, true)],
    ]);
    let mut watch = client(&ca, &[&world]).watch(vec![Kind::Key], None);
    let expected = [
        WatchItem::Reset,
        WatchItem::Event(change(1)),
        WatchItem::Event(change(2)),
        WatchItem::Current(Revision(3)),
        WatchItem::Event(change(4)),
        WatchItem::Current(Revision(4)),
        WatchItem::Reset,
        WatchItem::Event(change(1)),
        WatchItem::Reset,
        WatchItem::Event(change(8)),
        WatchItem::Current(Revision(9)),
    ];
    for item in expected {
        assert_eq!(tokio::time::timeout(TIMEOUT, watch.recv()).await.unwrap().unwrap(), item);
    }
    let begun = async {
        while world.script.resumed.lock().len() < 4 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(TIMEOUT, begun).await.unwrap();
    assert_eq!(*world.script.resumed.lock(), [0, 4, 4, 9]);
}

#[tokio::test]
async fn a_session_moves_to_the_leader_and_carries_both_ways() {
    let ca = ca();
    let (follower, leader) = (coordinator(&ca, "a").await, coordinator(&ca, "b").await);
    *follower.script.leader.lock() = Some(leader.address.clone());
    let hello = NodeSpec {
        id: NodeId::from("w1"),
        role: Role::Worker,
        incarnation: Incarnation(1),
        version: "1".into(),
        level: forge_shared::version::LEVEL,
        address: "127.0.0.1:7100".into(),
        metrics_address: String::new(),
        data_plane: None,
        devices: Vec::new(),
    };
    let mut session = client(&ca, &[&follower]).session(hello, TIMEOUT).await.unwrap();
    assert_eq!(session.down.recv().await.unwrap(), NodeDown::Welcome { lease_ms: 3000, heartbeat_ms: 500 });
    session.up.send(NodeUp::Heartbeat { number: 5, load: NodeLoad::default(), usage: Vec::new() }).await.unwrap();
    assert!(matches!(session.down.recv().await.unwrap(), NodeDown::Ack { number: 5, .. }));
    drop(session.up);
    assert_eq!(tokio::time::timeout(TIMEOUT, session.down.recv()).await.unwrap(), None);
}

#[tokio::test]
async fn operators_calls_carry_their_streams_and_their_ends() {
    let ca = ca();
    let world = coordinator(&ca, "a").await;
    let cluster = client(&ca, &[&world]);
    cluster.change_members(MemberAction::Promote(2), TIMEOUT).await.unwrap();
    let source = LogSource { target: "m".into(), is_node: false, is_following: false, tail_lines: 10 };
    let mut lines = cluster.logs(source, TIMEOUT).await.unwrap();
    assert_eq!(lines.recv().await.unwrap().unwrap().text, "hello");
    assert!(lines.recv().await.is_none());
    let mut pieces = cluster.backup(TIMEOUT).await.unwrap();
    assert_eq!(pieces.recv().await.unwrap().unwrap(), "part");
    assert!(pieces.recv().await.unwrap().is_err(), "a backup that breaks off is not whole");
    assert!(cluster.loads(Duration::from_millis(50)).recv().await.unwrap().nodes.is_empty());
}

#[tokio::test]
async fn a_renewed_certificate_is_for_the_same_process() {
    let ca = ca();
    let world = coordinator(&ca, "a").await;
    let cluster = client(&ca, &[&world]);
    let renewed = cluster.renew(TIMEOUT).await.unwrap();
    assert_eq!(renewed.identity(), cluster.credentials().get().identity());
    assert_ne!(renewed.key_pem(), cluster.credentials().get().key_pem());
    cluster.credentials().replace(renewed).unwrap();
    cluster.execute("r1".into(), cordon(), TIMEOUT).await.unwrap();
}
