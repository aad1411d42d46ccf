//! A process's place in the data plane: one port, its connections to peers, and the groups formed over them.
//!
//! What it is: the shell around [`Group`](crate::group::Group) and [`Epochs`]; it dials, opens streams, hands
//! those that peers open to the group they mean, and ends groups whose peers are lost. What it is not: it places no rank and
//! checks no certificate's policy ([`PeerVerifier`] does).
//!
//! Invariants: of two nodes the one with the lower id connects, of two ranks the lower opens the streams, so that there is
//! one of each; no wait is without end; what peers may leave waiting is bounded.

mod forming;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use forge_kernels::Backend;
use forge_shared::ids::NodeId;
use parking_lot::{Condvar, Mutex};

use crate::frame::{Frame, Head, Kind};
use crate::group::Epochs;
use crate::hello::{GroupId, Hello};
use crate::links::MessageLinks;
use crate::mesh::Mesh;
use crate::stream::{Failure, Inbox, Stream, Wire};
use crate::tls::PeerVerifier;
use crate::transport::{Carrier, Endpoint, Events, Transport};
use crate::wired::WiredRank;
use crate::{Collective, Result};

/// Streams that peers opened and no group has taken yet; the oldest makes room.
const MAX_ARRIVALS: usize = 4096;
/// As many of one node, so that it takes no other's place.
const MAX_NODE_ARRIVALS: usize = 1024;
/// How long such a stream waits for its group: a peer may have its plan this much earlier.
const ARRIVAL_LIFE: Duration = Duration::from_secs(120);

/// What a process brings.
#[derive(Clone)]
pub struct FabricOptions {
    /// Its node, as its certificate says.
    pub node: NodeId,
    /// Address and port to listen on; port 0 takes any.
    pub bind: SocketAddr,
    /// How streams are carried; all workers of a cluster use the same.
    pub transport: Transport,
    /// Certificates and their policy.
    pub verifier: Arc<dyn PeerVerifier>,
    /// A peer that is silent for so long is dead; it is known after at most 1.3 times this ([`SILENCE`] is for workers). The
    /// shorter of two peers' counts.
    pub silence: Duration,
}

/// With this a dead peer is known within 2 s.
pub const SILENCE: Duration = Duration::from_millis(1400);

/// A member of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its node. Members of this node are ranks of this process.
    pub node: NodeId,
    /// Where its data plane listens. Over QUIC needed for nodes whose ids are greater than this one's, the others connect
    /// to us; over TCP for all.
    pub address: Option<SocketAddr>,
}

/// How a group is formed.
#[derive(Debug, Clone)]
pub struct GroupSpec {
    /// Which group.
    pub id: GroupId,
    /// All ranks, in order.
    pub members: Vec<Member>,
    /// This rank.
    pub rank: usize,
    /// What all members must bring alike, for example the digest of their weights and their numerics id; may be empty.
    pub agreement: String,
    /// Whether its messages are small and waited for, and go ahead of bulk.
    pub urgent: bool,
    /// The longest wait until all members have come.
    pub form_timeout: Duration,
    /// The longest wait in one operation.
    pub deadline: Duration,
}

/// See the module's documentation.
pub struct Fabric {
    shared: Arc<Shared>,
}

pub(crate) struct Shared {
    node: NodeId,
    endpoint: Endpoint,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    epochs: Epochs,
    peers: HashMap<NodeId, Carrier>,
    arrivals: Vec<Arrival>,
    /// Locked while a node is dialed.
    dialing: HashMap<NodeId, Arc<Mutex<()>>>,
    meshes: Vec<Weak<Mesh>>,
    /// Groups that this process is forming, each under a number of its own.
    forming: HashMap<u64, Underway>,
    next_forming: u64,
    stopped: bool,
}

/// A group that is being formed, for those who end it meanwhile.
struct Underway {
    id: GroupId,
    rank: usize,
    nodes: Vec<NodeId>,
    /// Streams it has so far.
    streams: Vec<(Weak<Inbox>, Weak<dyn Wire>)>,
    /// Why it is over already.
    over: Option<String>,
}

impl Underway {
    /// Whom a notice means.
    fn is_meant(&self, node: &NodeId, notice: &Hello) -> bool {
        self.id == notice.group && self.rank == notice.to && self.nodes.get(notice.from) == Some(node)
    }
}

fn abort_stream((inbox, wire): &(Weak<Inbox>, Weak<dyn Wire>), reason: &str) {
    if let Some(inbox) = inbox.upgrade() {
        inbox.fail(Failure::Aborted(reason.to_owned()));
    }
    if let Some(wire) = wire.upgrade() {
        wire.abort(reason);
    }
}

/// A stream that waits for its group.
struct Arrival {
    stream: Stream,
    hello: Hello,
    came: Instant,
}

impl Arrival {
    /// The peer has given it up.
    fn is_over(&self) -> bool {
        self.stream.is_over()
    }

    /// Both are one stream of one rank, of which the peer wants the newer.
    fn is_replaced_by(&self, newer: &Arrival) -> bool {
        let (old, new) = (&self.hello, &newer.hello);
        self.stream.node == newer.stream.node && (&old.group, old.from, old.to, old.lane) == (&new.group, new.from, new.to, new.lane)
    }
}

impl Fabric {
    /// Binds the port and begins to answer peers.
    ///
    /// # Errors
    /// [`NetError::Bind`](crate::NetError::Bind) for an address that cannot be had, [`NetError::Setup`](crate::NetError::Setup) for certificates that cannot be used.
    pub fn start(options: FabricOptions) -> Result<Self> {
        let endpoint = Endpoint::bind(options.transport, options.bind, options.verifier, options.silence)?;
        let shared = Arc::new(Shared { node: options.node, endpoint, state: Mutex::default(), changed: Condvar::new() });
        let events: Arc<dyn Events> = Arc::<Shared>::clone(&shared);
        shared.endpoint.begin(Arc::downgrade(&events))?;
        Ok(Fabric { shared })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// [`NetError::Setup`](crate::NetError::Setup) if the system does not say.
    pub fn local_address(&self) -> Result<SocketAddr> {
        self.shared.endpoint.local_address()
    }

    /// Ends connections to nodes whose certificates the verifier does not take any more, and with them their groups: to be
    /// called after its policy has changed. New connections ask it anyway.
    pub fn recheck(&self) {
        self.shared.endpoint.recheck();
    }

    /// Forms a group for collective operations: returns when all members have come.
    ///
    /// # Errors
    /// [`crate::NetError`]: `Group` for a description that cannot be, an epoch that is over, or members that bring something
    /// else; `Unreachable`, `PeerLost`, `Refused`, `Timeout`.
    pub fn form<B: Backend>(&self, spec: GroupSpec) -> Result<Arc<dyn Collective<B>>> {
        Ok(Arc::new(WiredRank::new(self.shared.form(spec, true)?)))
    }

    /// Forms a group whose members send each other messages.
    ///
    /// # Errors
    /// As [`Fabric::form`].
    pub fn links(&self, spec: GroupSpec) -> Result<MessageLinks> {
        Ok(MessageLinks::new(self.shared.form(spec, false)?))
    }
}

impl Drop for Fabric {
    /// Tells all peers; groups that are still held fail.
    fn drop(&mut self) {
        self.shared.state.lock().stopped = true;
        self.shared.changed.notify_all();
        self.shared.endpoint.stop();
    }
}

impl Shared {
    fn dialing(&self, node: &NodeId) -> Arc<Mutex<()>> {
        Arc::clone(self.state.lock().dialing.entry(node.clone()).or_default())
    }

    /// The connection to a node, if it stands.
    fn live_peer(&self, state: &mut State, node: &NodeId) -> Option<Carrier> {
        state.peers.get(node).filter(|carrier| !carrier.is_lost()).cloned()
    }

    /// Ends groups of this process that `which` says, each with its reason; their peers are told by the groups.
    fn end_meshes(&self, which: impl Fn(&Mesh) -> bool, reason: &str) {
        let meshes: Vec<Arc<Mesh>> = self.state.lock().meshes.iter().filter_map(Weak::upgrade).collect();
        for mesh in meshes.iter().filter(|mesh| which(mesh)) {
            mesh.abort(reason);
        }
    }

    /// A group of this process is over: it is not formed again.
    pub(crate) fn close_epoch(&self, id: &GroupId) {
        self.state.lock().epochs.close(id);
    }

    /// A group of this process was aborted: it is not formed again, and its peers are told why.
    pub(crate) fn ended(&self, mesh: &Mesh, reason: &str) {
        let spec = mesh.spec();
        let carriers: Vec<(usize, Option<Carrier>)> = {
            let mut state = self.state.lock();
            state.epochs.close(&spec.id);
            let peers = (0..spec.members.len()).filter(|&rank| rank != spec.rank);
            peers.map(|rank| (rank, state.peers.get(&spec.members[rank].node).cloned())).collect()
        };
        for (to, carrier) in carriers {
            let hello = mesh.notice(to, reason);
            if spec.members[to].node == self.node {
                self.aborted(&self.node, &hello);
            } else if let Some(carrier) = carrier {
                self.endpoint.tell(&carrier, &hello);
            }
        }
    }

    /// A peer says that a group is over, which this process has or is forming.
    fn aborted(&self, node: &NodeId, notice: &Hello) {
        let mut streams = Vec::new();
        {
            let mut state = self.state.lock();
            let State { forming, epochs, .. } = &mut *state;
            for underway in forming.values_mut().filter(|underway| underway.is_meant(node, notice)) {
                underway.over.get_or_insert_with(|| notice.agreement.clone());
                streams.append(&mut underway.streams);
                epochs.close(&underway.id);
            }
        }
        self.changed.notify_all();
        streams.iter().for_each(|stream| abort_stream(stream, &notice.agreement));
        let meant = |mesh: &Mesh| {
            let spec = mesh.spec();
            spec.id == notice.group && spec.rank == notice.to && spec.members.get(notice.from).is_some_and(|member| member.node == *node)
        };
        self.end_meshes(meant, &notice.agreement);
    }
}

impl Events for Shared {
    fn connected(&self, carrier: Carrier) {
        let Some(node) = carrier.peer() else { return };
        let old = self.state.lock().peers.insert(node, carrier);
        self.changed.notify_all();
        // A newer connection of the same node: it began anew. The old one's streams end by its own silence.
        drop(old);
    }

    fn opened(&self, stream: Stream, first: Frame) {
        let hello = match Hello::decode(first.epoch, &first.body) {
            Ok(hello) => hello,
            Err(error) => return refuse(&stream, &error.to_string()),
        };
        match first.head.kind {
            Kind::Abort => self.aborted(&stream.node, &hello),
            Kind::Hello => self.arrived(stream, hello),
            other => refuse(&stream, &format!("a stream begins with {other:?}; it must begin with a hello")),
        }
    }

    fn told(&self, node: &NodeId, notice: &Hello) {
        self.aborted(node, notice);
    }

    fn lost(&self, carrier: &Carrier, reason: &str) {
        let Some(node) = carrier.peer() else { return };
        {
            let mut state = self.state.lock();
            if state.peers.get(&node).is_some_and(|known| known.is_same(carrier)) {
                state.peers.remove(&node);
            }
        }
        self.changed.notify_all();
        self.end_meshes(|mesh| mesh.runs_over(carrier), &format!("node {node} is lost: {reason}"));
    }
}

impl Shared {
    fn arrived(&self, stream: Stream, hello: Hello) {
        let now = Instant::now();
        let mut unwanted = Vec::new();
        let closed = {
            let mut state = self.state.lock();
            let closed = state.epochs.check(&hello.group).err();
            let arrival = Arrival { stream, hello, came: now };
            match &closed {
                None => {
                    let unwanted_now =
                        |old: &mut Arrival| now - old.came >= ARRIVAL_LIFE || old.is_replaced_by(&arrival) || old.stream.has_failed();
                    unwanted.extend(state.arrivals.extract_if(.., unwanted_now));
                    let mut of_node = state.arrivals.iter().enumerate().filter(|(_, old)| old.stream.node == arrival.stream.node);
                    let oldest = of_node.next().map(|(at, _)| at);
                    if let Some(oldest) = oldest.filter(|_| of_node.count() + 1 >= MAX_NODE_ARRIVALS) {
                        unwanted.push(state.arrivals.remove(oldest));
                    } else if state.arrivals.len() >= MAX_ARRIVALS {
                        unwanted.push(state.arrivals.remove(0));
                    }
                    state.arrivals.push(arrival);
                }
                Some(_) => unwanted.push(arrival),
            }
            closed
        };
        self.changed.notify_all();
        // Answered, and dropped, without the lock: that may call back.
        for arrival in unwanted {
            let reason = closed.as_ref().map_or_else(|| "no group has taken the stream in time".to_owned(), ToString::to_string);
            refuse(&arrival.stream, &reason);
        }
    }
}

/// Says why a stream is not wanted. It ends when it is dropped.
fn refuse(stream: &Stream, reason: &str) {
    tracing::debug!(node = %stream.node, %reason, "refused a stream of the data plane");
    // The peer waits for an answer; without this one it learns at its own deadline.
    let _ = stream.send(Head::bytes(Kind::Refuse), reason.as_bytes(), Instant::now());
}
