//! Raft's messages over gRPC: one stream per peer and direction, and snapshots in chunks.
//!
//! What it is not: it knows no addresses and no certificates; a [`Connector`] makes channels, a [`SenderCheck`] says who is
//! at the other end of one.
//!
//! Invariants: [`PeerTransport::send`] never blocks; queues are bounded and what does not fit is dropped, for raft sends
//! again; every wait has a deadline; what a peer sends is checked and bounded before it is kept.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use forge_proto::raft as wire;
use forge_shared::version::{Build, FIRST_LEVEL};
use futures::future::BoxFuture;
use parking_lot::Mutex;
use prost::Message as _;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status, Streaming};
use wire::raft_client::RaftClient;
use wire::raft_server::{Raft, RaftServer};

use super::{PeerTransport, RaftError, RaftHandle};

/// The answer to messages of a member that was removed; it is the only one of this code between members.
#[must_use]
pub fn not_a_member(id: u64) -> Status {
    Status::not_found(format!("member {id} was removed from the group: stop it, or let it join anew with an empty folder"))
}

/// Makes a channel to a member; called again after each failure. The error is for the log.
pub type Connector = Arc<dyn Fn(u64) -> BoxFuture<'static, Result<Channel, String>> + Send + Sync>;

/// Says who is at the other end of a connection, from what TLS left in the request's extensions, and is told what the
/// sender says it is a build of.
pub type SenderCheck = Arc<dyn Fn(&tonic::Extensions, Build) -> Result<Speaker, Status> + Send + Sync>;

/// Whether a sender may speak as this member now. Asked for every batch: members are removed while their streams are open.
pub type Speaker = Box<dyn Fn(u64) -> Result<(), Status> + Send + Sync>;

/// Of a snapshot's chunk.
pub const CHUNK_BYTES: usize = 1 << 20;
/// The largest gRPC message between members: a raft message and what is packed with it.
const MAX_BATCH_BYTES: usize = 8 << 20;
/// Messages are packed together up to this size.
const PACKED_BYTES: usize = 1 << 20;
const MAX_BATCH_MESSAGES: usize = 4096;
const QUEUED_SENDS: usize = 1024;
/// To make a connection, and to hand a batch to one that is made.
const DEADLINE: Duration = Duration::from_secs(2);
/// A stream without a message for so long is closed; the peer opens another when it has one.
const IDLE: Duration = Duration::from_secs(300);
/// Between two chunks of a snapshot.
const CHUNK_DEADLINE: Duration = Duration::from_secs(30);
const MAX_VERSION_CHARS: usize = 64;
const SHORTEST_BACKOFF: Duration = Duration::from_millis(20);
const LONGEST_BACKOFF: Duration = Duration::from_secs(1);

/// What every channel between members needs: no delay for small packets, and a dead link noticed in seconds.
#[must_use]
pub fn peer_endpoint(endpoint: Endpoint) -> Endpoint {
    endpoint
        .connect_timeout(DEADLINE)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(2))
        .keep_alive_timeout(DEADLINE)
        .keep_alive_while_idle(true)
}

/// Headers of every call: the sender's build. Who sends none is of the first release.
const VERSION_HEADER: &str = "forge-version";
const LEVEL_HEADER: &str = "forge-level";

/// The sending side.
pub struct GrpcTransport {
    cluster_id: String,
    build: Build,
    connector: Connector,
    runtime: tokio::runtime::Handle,
    handle: OnceLock<RaftHandle>,
    peers: Mutex<BTreeMap<u64, mpsc::Sender<Vec<wire::Message>>>>,
    snapshots: Mutex<BTreeSet<u64>>,
    removed: CancellationToken,
    me: std::sync::Weak<Self>,
}

impl GrpcTransport {
    /// For a member of `cluster_id`; its tasks run on `runtime`.
    #[must_use]
    pub fn new(cluster_id: impl Into<String>, build: Build, connector: Connector, runtime: tokio::runtime::Handle) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            cluster_id: cluster_id.into(),
            build,
            connector,
            runtime,
            handle: OnceLock::new(),
            peers: Mutex::default(),
            snapshots: Mutex::default(),
            removed: CancellationToken::new(),
            me: me.clone(),
        })
    }

    /// Names the member that sends through this: it is told of peers that cannot be reached. Once, right after `start`.
    pub fn attach(&self, handle: RaftHandle) {
        // A second one would be a second member on one transport; the first stays.
        drop(self.handle.set(handle));
    }

    /// Cancelled when a peer says that this member was removed from the group.
    pub fn removed(&self) -> &CancellationToken {
        &self.removed
    }

    /// Ends the connection to a member that is removed.
    pub fn forget(&self, id: u64) {
        self.peers.lock().remove(&id);
    }

    fn unreachable(&self, id: u64) {
        if let Some(handle) = self.handle.get() {
            handle.unreachable(id);
        }
    }

    async fn client(&self, to: u64) -> Result<RaftClient<Channel>, String> {
        let channel = timeout(DEADLINE, (self.connector)(to)).await.map_err(|_| format!("no connection within {DEADLINE:?}"))??;
        Ok(RaftClient::new(channel).max_encoding_message_size(MAX_BATCH_BYTES))
    }
}

impl PeerTransport for GrpcTransport {
    fn send(&self, to: u64, messages: Vec<wire::Message>) {
        let mut peers = self.peers.lock();
        let queue = peers.entry(to).or_insert_with(|| {
            let (sender, queue) = mpsc::channel(QUEUED_SENDS);
            // Weak: the task must not keep the transport alive.
            self.runtime.spawn(carry(self.me.clone(), to, queue));
            sender
        });
        // Full: the peer is slow or away.
        drop(queue.try_send(messages));
    }

    fn send_snapshot(&self, to: u64, message: wire::Message, data: Bytes) {
        let Some(me) = self.me.upgrade() else { return };
        if !self.snapshots.lock().insert(to) {
            // One is on its way; its end is reported.
            return;
        }
        self.runtime.spawn(async move {
            let bytes = data.len();
            let sent = push_snapshot(&me, to, message, data).await;
            if let Err(why) = &sent {
                tracing::warn!(to, bytes, "a snapshot did not arrive: {why}");
            }
            me.snapshots.lock().remove(&to);
            if let Some(handle) = me.handle.get() {
                handle.snapshot_sent(to, sent.is_ok());
            }
        });
    }
}

/// Carries one peer's messages as long as the transport lives.
async fn carry(weak: std::sync::Weak<GrpcTransport>, to: u64, mut queue: mpsc::Receiver<Vec<wire::Message>>) {
    let mut backoff = SHORTEST_BACKOFF;
    loop {
        // Not before there is something to say.
        let Some(first) = queue.recv().await else { return };
        let Some(transport) = weak.upgrade() else { return };
        let connected = transport.client(to).await;
        let (cluster_id, build) = (transport.cluster_id.clone(), transport.build.clone());
        drop(transport);
        let why = match connected {
            Ok(client) => match stream(client, (&cluster_id, &build), first, &mut queue, &mut backoff).await {
                Some(why) => why,
                None => return,
            },
            Err(why) => Broken { why, is_removed: false },
        };
        let Broken { why, is_removed } = why;
        let Some(transport) = weak.upgrade() else { return };
        if is_removed {
            transport.removed.cancel();
        }
        tracing::debug!(to, "no stream of raft messages: {why}");
        transport.unreachable(to);
        drop(transport);
        tokio::time::sleep(backoff).await;
        backoff = (backoff * 2).min(LONGEST_BACKOFF);
        // What waited is old; raft has newer.
        while queue.try_recv().is_ok() {}
    }
}

/// The end of a stream.
struct Broken {
    why: String,
    /// The peer knows that this member was removed.
    is_removed: bool,
}

impl Broken {
    fn of(ended: Result<Response<wire::Received>, Status>) -> Self {
        match ended {
            Ok(_) => Broken::because("the peer closed the stream"),
            Err(status) => Broken { is_removed: status.code() == Code::NotFound, why: status.to_string() },
        }
    }

    fn because(why: impl Into<String>) -> Self {
        Broken { why: why.into(), is_removed: false }
    }
}

/// Sends until the stream breaks (why), or nobody sends any more (`None`).
async fn stream(
    mut client: RaftClient<Channel>,
    (cluster_id, build): (&str, &Build),
    first: Vec<wire::Message>,
    queue: &mut mpsc::Receiver<Vec<wire::Message>>,
    backoff: &mut Duration,
) -> Option<Broken> {
    let (sender, batches) = mpsc::channel(16);
    let call = client.messages(stating(build, ReceiverStream::new(batches)));
    tokio::pin!(call);
    let mut waiting = vec![first];
    loop {
        for batch in pack(cluster_id, waiting.drain(..).flatten()) {
            tokio::select! {
                ended = &mut call => return Some(Broken::of(ended)),
                sent = timeout(DEADLINE, sender.send(batch)) => match sent {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) => return Some(Broken::because("the stream is closed")),
                    Err(_) => return Some(Broken::because(format!("the peer took nothing for {DEADLINE:?}"))),
                },
            }
        }
        tokio::select! {
            ended = &mut call => return Some(Broken::of(ended)),
            count = queue.recv_many(&mut waiting, 64) => {
                if count == 0 {
                    return None;
                }
                // It carried something and still stands.
                *backoff = SHORTEST_BACKOFF;
            }
        }
    }
}

/// A request that says what its sender is a build of.
#[must_use]
pub fn stating<T>(build: &Build, message: T) -> Request<T> {
    let mut request = Request::new(message);
    let headers = request.metadata_mut();
    headers.insert(LEVEL_HEADER, build.level.into());
    // A version that is no header is for people only.
    drop(build.version.parse().map(|version| headers.insert(VERSION_HEADER, version)));
    request
}

/// What a request's sender says it is a build of.
fn stated<T>(request: &Request<T>) -> Result<Build, Status> {
    let header = |name| request.metadata().get(name).and_then(|value| value.to_str().ok());
    let level = match request.metadata().get(LEVEL_HEADER) {
        None => FIRST_LEVEL,
        Some(_) => {
            let level = header(LEVEL_HEADER).and_then(|text| text.parse().ok()).filter(|level| *level >= FIRST_LEVEL);
            level.ok_or_else(|| Status::invalid_argument(format!("the header {LEVEL_HEADER} is no level")))?
        }
    };
    let version = header(VERSION_HEADER).unwrap_or_default().chars().take(MAX_VERSION_CHARS).collect();
    Ok(Build { version, level })
}

/// Packs messages into batches, in order.
fn pack(cluster_id: &str, messages: impl Iterator<Item = wire::Message>) -> Vec<wire::MessageBatch> {
    let mut batches: Vec<wire::MessageBatch> = Vec::new();
    let mut bytes = 0;
    for message in messages {
        let len = message.encoded_len();
        match batches.last_mut().filter(|batch| bytes + len <= PACKED_BYTES && batch.messages.len() < MAX_BATCH_MESSAGES) {
            Some(batch) => {
                bytes += len;
                batch.messages.push(message);
            }
            None => {
                bytes = len;
                batches.push(wire::MessageBatch { cluster_id: cluster_id.into(), messages: vec![message] });
            }
        }
    }
    batches
}

async fn push_snapshot(transport: &GrpcTransport, to: u64, message: wire::Message, data: Bytes) -> Result<(), String> {
    let mut client = transport.client(to).await?;
    let (total_bytes, crc32c) = (data.len() as u64, crc32c::crc32c(&data));
    let cluster_id = transport.cluster_id.clone();
    // At least one megabyte a second, after what a busy peer may take to begin.
    let deadline = CHUNK_DEADLINE + Duration::from_secs(60 + total_bytes / (1 << 20));
    let mut message = Some(message);
    let mut offset = 0;
    let chunks = std::iter::from_fn(move || {
        if offset > 0 && offset >= data.len() || message.is_none() && data.is_empty() {
            return None;
        }
        let end = (offset + CHUNK_BYTES).min(data.len());
        let chunk = wire::SnapshotChunk {
            cluster_id: cluster_id.clone(),
            message: message.take(),
            total_bytes,
            offset: offset as u64,
            data: data.slice(offset..end),
            crc32c,
            is_last: end == data.len(),
        };
        offset = end;
        Some(chunk)
    });
    let call = client.install_snapshot(stating(&transport.build, tokio_stream::iter(chunks)));
    match timeout(deadline, call).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(status)) => Err(status.to_string()),
        Err(_) => Err(format!("not within {deadline:?}")),
    }
}

/// The receiving side: mounted by the coordinator's server.
pub struct RaftService {
    cluster_id: String,
    handle: RaftHandle,
    check: SenderCheck,
    arriving: tokio::sync::Mutex<()>,
}

impl RaftService {
    /// For the member behind `handle`, with bounds on what is decoded.
    #[must_use]
    pub fn server(cluster_id: impl Into<String>, handle: RaftHandle, check: SenderCheck) -> RaftServer<Self> {
        let service = Self { cluster_id: cluster_id.into(), handle, check, arriving: tokio::sync::Mutex::new(()) };
        RaftServer::new(service).max_decoding_message_size(MAX_BATCH_BYTES)
    }

    fn check_cluster(&self, cluster_id: &str) -> Result<(), Status> {
        if cluster_id == self.cluster_id {
            return Ok(());
        }
        let named: String = cluster_id.chars().take(64).collect();
        Err(Status::failed_precondition(format!(
            "this member belongs to cluster {:?}, and the message to {named:?}: is a peer's address wrong?",
            self.cluster_id
        )))
    }
}

fn refusal(error: RaftError) -> Status {
    match error {
        RaftError::Message(_) | RaftError::TooLarge { .. } => Status::invalid_argument(error.to_string()),
        RaftError::Busy { .. } => Status::resource_exhausted(error.to_string()),
        RaftError::Timeout { .. } => Status::deadline_exceeded(error.to_string()),
        _ => Status::unavailable(error.to_string()),
    }
}

#[tonic::async_trait]
impl Raft for RaftService {
    async fn messages(&self, request: Request<Streaming<wire::MessageBatch>>) -> Result<Response<wire::Received>, Status> {
        let speaker = (self.check)(request.extensions(), stated(&request)?)?;
        let mut batches = request.into_inner();
        while let Ok(batch) = timeout(IDLE, batches.message()).await {
            let Some(batch) = batch? else { break };
            self.check_cluster(&batch.cluster_id)?;
            if batch.messages.len() > MAX_BATCH_MESSAGES {
                return Err(Status::invalid_argument(format!("{} messages; at most {MAX_BATCH_MESSAGES}", batch.messages.len())));
            }
            // They are all of one member, but a batch can say otherwise.
            let senders: BTreeSet<u64> = batch.messages.iter().map(|message| message.from).collect();
            senders.into_iter().try_for_each(&speaker)?;
            self.handle.receive(batch.messages).map_err(refusal)?;
        }
        Ok(Response::new(wire::Received {}))
    }

    async fn install_snapshot(&self, request: Request<Streaming<wire::SnapshotChunk>>) -> Result<Response<wire::Received>, Status> {
        let speaker = (self.check)(request.extensions(), stated(&request)?)?;
        let mut chunks = request.into_inner();
        // One at a time: each may take as much memory as a snapshot may.
        let _one = self.arriving.try_lock().map_err(|_| Status::resource_exhausted("another snapshot is arriving; try again"))?;
        let mut arriving = Arriving::new(self.handle.limits.max_snapshot_bytes);
        loop {
            let chunk = timeout(CHUNK_DEADLINE, chunks.message()).await;
            let chunk = chunk.map_err(|_| Status::deadline_exceeded(format!("no chunk for {CHUNK_DEADLINE:?}")))??;
            let Some(chunk) = chunk else { return Err(Status::invalid_argument("the snapshot ends before its last chunk")) };
            self.check_cluster(&chunk.cluster_id)?;
            if let Some(message) = &chunk.message {
                speaker(message.from)?;
            }
            if let Some((message, data)) = arriving.take(chunk).map_err(Status::invalid_argument)? {
                self.handle.receive_snapshot(message, data).await.map_err(refusal)?;
                return Ok(Response::new(wire::Received {}));
            }
        }
    }
}

/// A snapshot that is arriving, chunk by chunk.
#[derive(Debug)]
pub struct Arriving {
    max_bytes: u64,
    message: Option<wire::Message>,
    total_bytes: u64,
    data: BytesMut,
}

impl Arriving {
    /// Takes snapshots of at most `max_bytes`.
    #[must_use]
    pub fn new(max_bytes: u64) -> Self {
        Self { max_bytes, message: None, total_bytes: 0, data: BytesMut::new() }
    }

    /// Takes the next chunk; all of the snapshot after the last.
    ///
    /// # Errors
    /// What does not fit.
    pub fn take(&mut self, chunk: wire::SnapshotChunk) -> Result<Option<(wire::Message, Bytes)>, String> {
        match (&self.message, chunk.message) {
            (None, Some(message)) => {
                if chunk.total_bytes > self.max_bytes {
                    return Err(format!("total_bytes is {}; at most {} are taken", chunk.total_bytes, self.max_bytes));
                }
                (self.message, self.total_bytes) = (Some(message), chunk.total_bytes);
            }
            (None, None) => return Err("the first chunk has no message".into()),
            (Some(_), Some(_)) => return Err("a second message within one snapshot".into()),
            (Some(_), None) => {}
        }
        let len = self.data.len() as u64;
        if chunk.offset != len || chunk.data.len() > CHUNK_BYTES || len + chunk.data.len() as u64 > self.total_bytes {
            return Err(format!(
                "a chunk of {} bytes at {} does not continue {len} of {}",
                chunk.data.len(),
                chunk.offset,
                self.total_bytes
            ));
        }
        self.data.extend_from_slice(&chunk.data);
        if !chunk.is_last {
            return Ok(None);
        }
        if self.data.len() as u64 != self.total_bytes {
            return Err(format!("{} of {} bytes came", self.data.len(), self.total_bytes));
        }
        if crc32c::crc32c(&self.data) != chunk.crc32c {
            return Err("the CRC does not fit the data".into());
        }
        Ok(self.message.take().map(|message| (message, std::mem::take(&mut self.data).freeze())))
    }
}
