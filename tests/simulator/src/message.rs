//! What travels between simulated processes, and what they remind themselves of.

use bytes::Bytes;
use forge_proto::cluster::WatchBatch;
use forge_shared::cluster::Revision;
use forge_shared::cluster::command::{Applied, Command, CommandError};
use forge_shared::cluster::node::NodeSpec;
use forge_shared::cluster::session::{NodeDown, NodeUp};

use crate::gateways::GatewayTimer;
use crate::host::Host;
use crate::streams::{Http, Wire};

/// A two-way stream between two processes.
pub type StreamId = u64;
/// A question that waits for an answer.
pub type CallId = u64;

/// What travels.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "each variant is described; its fields' names and types say the rest")]
pub enum Message {
    /// Between coordinators, as it is on the wire.
    Raft { bytes: Bytes, snapshot: Option<Bytes> },
    /// How sending a snapshot to a peer ended, as its transport tells.
    SnapshotSent { to: u16, is_ok: bool },
    /// A question.
    Ask { call: CallId, ask: Ask },
    /// Its answer.
    Answer { call: CallId, answer: Answer },
    /// A node begins a session on this stream.
    Hello { spec: Box<NodeSpec> },
    /// The session was not begun; another coordinator may lead.
    NoSession { leader: Option<String> },
    /// Of a session.
    Up(NodeUp),
    /// Of a session.
    Down(NodeDown),
    /// A gateway watches on this stream.
    Watch { after: Option<Revision> },
    /// For a watcher.
    Batch(WatchBatch),
    /// Between a gateway and a worker's engines; pings.
    Wire(Box<Wire>),
    /// Between a caller and a gateway.
    Http(Box<Http>),
}

/// A question to a coordinator.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "each variant is described; its fields' names and types say the rest")]
pub enum Ask {
    /// Have this applied.
    Execute { request_id: String, command: Box<Command> },
    /// Names of all keys, no older than the question.
    Read,
    /// Whether there is a leader.
    Status,
}

/// What a coordinator answers.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "each variant is described; its fields' names and types say the rest")]
pub enum Answer {
    /// It was applied, or refused by the state.
    Executed(Result<Applied, CommandError>),
    /// The state's revision and the keys' names.
    Read { revision: Revision, keys: Vec<String> },
    /// The status.
    Status { has_leader: bool },
    /// It was not done. It may have happened all the same where `is_open`.
    Failed { leader: Option<String>, is_open: bool },
}

/// What a process reminds itself of.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "each variant is described; its fields' names and types say the rest")]
pub enum Timer {
    /// A coordinator: raft's unit of time.
    Tick,
    /// A coordinator: the leader looks at everything.
    Pass,
    /// A coordinator: a snapshot was encoded and written.
    SnapshotMade,
    /// A coordinator: a report of this session is proposed again.
    Report(StreamId),
    /// A node: its session core is due.
    Session,
    /// A node: the coordinator that was asked for a session has not answered.
    Attempt(u64),
    /// A node: the coordinators that were asked for their status have not answered.
    AskGroup(u64),
    /// A worker: its agent core is due.
    Agent,
    /// A worker: a run goes one step further.
    Run { replica: String, epoch: u64, step: u32 },
    /// A worker: a model was looked at.
    Inspected { number: u64 },
    /// A worker: an engine's step.
    Engine { replica: String, epoch: u64 },
    /// A gateway.
    Gateway(GatewayTimer),
    /// A client or caller: its next step.
    Client(u64),
    /// A process that died comes back.
    Restart,
}

/// What happens.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "each variant is described; its fields' names and types say the rest")]
pub enum Event {
    /// A message arrives; on a stream, or alone.
    Arrives { from: Host, to: Host, stream: Option<StreamId>, message: Message },
    /// The other end of a stream is gone.
    Closed { at: Host, stream: StreamId },
    /// Time of a process; of that start of it alone.
    Timer { host: Host, life: u64, timer: Timer },
    /// A fault begins.
    FaultBegins(usize),
    /// It ends.
    FaultEnds(usize),
}
