//! Members with threads and real folders over real TCP: the transport's side of raft.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use forge_coordinator::raft::transport::{Connector, GrpcTransport, RaftService, SenderCheck, peer_endpoint};
use forge_coordinator::raft::{self, Frozen, MemberChange, RaftError, RaftHandle, RaftOptions, RaftRole, StateMachine};
use forge_proto::raft as wire;
use tonic::transport::Endpoint;

const SOON: Duration = Duration::from_secs(20);

/// A state of some megabytes, so that snapshots have several chunks.
#[derive(Default)]
struct Blobs(Vec<Vec<u8>>);

impl StateMachine for Blobs {
    fn apply(&mut self, _: u64, data: &[u8]) -> Vec<u8> {
        self.0.push(data.to_vec());
        self.0.len().to_le_bytes().to_vec()
    }

    fn snapshot(&self) -> Frozen {
        let blobs = self.0.clone();
        Box::new(move || blobs.iter().flat_map(|blob| [(blob.len() as u32).to_le_bytes().as_slice(), blob].concat()).collect())
    }

    fn restore(&mut self, _: u64, mut data: &[u8]) -> Result<(), String> {
        self.0.clear();
        while let Some((len, rest)) = data.split_first_chunk::<4>() {
            let (blob, rest) = rest.split_at_checked(u32::from_le_bytes(*len) as usize).ok_or("short")?;
            self.0.push(blob.to_vec());
            data = rest;
        }
        Ok(())
    }
}

#[derive(Default, Clone)]
struct Addresses(Arc<Mutex<BTreeMap<u64, SocketAddr>>>);

struct Server {
    raft: RaftHandle,
    folder: tempfile::TempDir,
    stop: tokio::sync::oneshot::Sender<()>,
}

fn anyone() -> SenderCheck {
    Arc::new(|_, _| Ok(Box::new(|_| Ok(()))))
}

fn only(id: u64) -> SenderCheck {
    Arc::new(move |_, _| {
        let refused =
            move |from| tonic::Status::permission_denied(format!("the certificate is member {id}'s, and the message says {from}"));
        Ok(Box::new(move |from| if from == id { Ok(()) } else { Err(refused(from)) }))
    })
}

impl Addresses {
    async fn start(&self, id: u64, cluster_id: &str, bootstrap: Option<Vec<u64>>, folder: tempfile::TempDir, check: SenderCheck) -> Server {
        let addresses = self.0.clone();
        let connector: Connector = Arc::new(move |to| {
            let address = addresses.lock().unwrap().get(&to).copied();
            Box::pin(async move {
                let address = address.ok_or("no address")?;
                let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|error| error.to_string())?;
                peer_endpoint(endpoint).connect().await.map_err(|error| error.to_string())
            })
        });
        let transport = GrpcTransport::new(cluster_id, Default::default(), connector, tokio::runtime::Handle::current());
        let mut options = RaftOptions::new(id, cluster_id, folder.path());
        options.bootstrap = bootstrap;
        options.limits.snapshot_entries = 10;
        options.limits.trailing_entries = 2;
        let raft = raft::start(options, Box::new(Blobs::default()), transport.clone()).unwrap();
        transport.attach(raft.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        self.0.lock().unwrap().insert(id, listener.local_addr().unwrap());
        let service = RaftService::server(cluster_id, raft.clone(), check);
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let incoming = tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true));
        let serving = tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming);
        tokio::spawn(async move {
            tokio::select! {
                _ = serving => {}
                _ = stopped => {}
            }
        });
        Server { raft, folder, stop }
    }
}

async fn leader<'a>(servers: impl IntoIterator<Item = &'a Server> + Clone) -> &'a RaftHandle {
    for _ in 0..2000 {
        for server in servers.clone() {
            if server.raft.status().borrow().role == RaftRole::Leader {
                return &server.raft;
            }
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("no leader within 20 s");
}

/// Asks whoever leads until it is done: a busy machine may take leadership from a member at any time.
async fn at_leader<'a, T>(servers: &'a [Server], ask: impl AsyncFn(&'a RaftHandle) -> Result<T, RaftError>) -> T {
    let ends = std::time::Instant::now() + 2 * SOON;
    loop {
        match ask(leader(servers).await).await {
            Ok(done) => return done,
            Err(RaftError::NotLeader { .. } | RaftError::Unknown { .. } | RaftError::Busy { .. } | RaftError::Timeout { .. })
                if std::time::Instant::now() < ends =>
            {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Err(error) => panic!("{error}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_members_over_tcp_lose_their_leader_and_a_learner_gets_a_snapshot_in_chunks() {
    let addresses = Addresses::default();
    let mut servers = Vec::new();
    for id in 1..=3 {
        servers.push(addresses.start(id, "test", Some(vec![1, 2, 3]), tempfile::tempdir().unwrap(), anyone()).await);
    }
    for number in 0..25_u8 {
        let blob = Bytes::from(vec![number; 200_000]);
        at_leader(&servers, async |raft| raft.propose(blob.clone(), SOON).await).await;
    }
    // At every member, and over the wire at two of three.
    for server in &servers {
        let read = server.raft.read_index(SOON).await.unwrap();
        assert!(read >= 26, "{read}");
    }

    // 5 MB of state travel to a member that is new.
    servers.push(addresses.start(4, "test", None, tempfile::tempdir().unwrap(), anyone()).await);
    at_leader(&servers, async |raft| raft.change_members(MemberChange::AddLearner(4), SOON).await).await;
    at_leader(&servers, async |raft| raft.change_members(MemberChange::Promote(4), SOON).await).await;
    let read = servers[3].raft.read_index(SOON).await.unwrap();
    assert!(servers[3].raft.status().borrow().snapshot_index > 10);

    let first = leader(&servers).await.member_id();
    let gone = servers.remove(servers.iter().position(|server| server.raft.member_id() == first).unwrap());
    gone.raft.stop().await;
    drop(gone.stop);
    at_leader(&servers, async |raft| raft.propose(Bytes::from_static(b"after"), SOON).await).await;
    // It comes back at another address.
    servers.push(addresses.start(first, "test", None, gone.folder, anyone()).await);
    assert!(servers.last().unwrap().raft.read_index(SOON).await.unwrap() > read);
    at_leader(&servers, async |raft| raft.transfer_leadership(first, SOON).await).await;
    for server in servers {
        server.raft.stop().await;
        drop(server.stop);
    }
}

#[tokio::test]
async fn strangers_and_bad_messages_are_refused_and_the_member_goes_on() {
    let addresses = Addresses::default();
    let server = addresses.start(1, "test", Some(vec![1]), tempfile::tempdir().unwrap(), only(7)).await;
    assert_eq!(leader([&server]).await.member_id(), 1);
    let address = addresses.0.lock().unwrap()[&1];
    let channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
    let mut client = wire::raft_client::RaftClient::new(channel);
    let message = |kind, from| wire::Message { kind, to: 1, from, term: 3, ..wire::Message::default() };
    let batch = |cluster_id: &str, message| wire::MessageBatch { cluster_id: cluster_id.into(), messages: vec![message] };
    for (sent, expected) in [
        (batch("other", message(8, 7)), "belongs to cluster \"test\", and the message to \"other\""),
        (batch("test", message(8, 2)), "the certificate is member 7's"),
        (batch("test", message(99, 7)), "message.kind is 99"),
        (batch("test", message(0, 7)), "never sent between members"),
        (batch("test", wire::Message { to: 5, ..message(8, 7) }), "message.to"),
        (batch("test", message(7, 7)), "must come through InstallSnapshot"),
    ] {
        let status = client.messages(tokio_stream::iter([sent])).await.unwrap_err();
        assert!(status.message().contains(expected), "{}", status.message());
    }
    let chunk = wire::SnapshotChunk {
        cluster_id: "test".into(),
        message: Some(message(7, 7)),
        total_bytes: u64::MAX,
        is_last: true,
        ..wire::SnapshotChunk::default()
    };
    for (sent, expected) in [
        (chunk.clone(), "total_bytes is 18446744073709551615"),
        (wire::SnapshotChunk { total_bytes: 3, ..chunk.clone() }, "0 of 3 bytes"),
        (wire::SnapshotChunk { total_bytes: 0, crc32c: 1, ..chunk.clone() }, "CRC"),
        (wire::SnapshotChunk { total_bytes: 0, message: None, ..chunk.clone() }, "no message"),
        (wire::SnapshotChunk { total_bytes: 0, ..chunk }, "message.snapshot: is missing"),
    ] {
        let status = client.install_snapshot(tokio_stream::iter([sent])).await.unwrap_err();
        assert!(status.message().contains(expected), "{}", status.message());
    }
    server.raft.propose(Bytes::from_static(b"still here"), SOON).await.unwrap();
    server.raft.stop().await;
    drop(server.stop);
}
