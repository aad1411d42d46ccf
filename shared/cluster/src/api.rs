//! The coordinators as everything else sees them, whether they are in this process or behind a wire.
//!
//! Invariant: every call is bounded by its deadline; `Unknown` is the only error after which a command may have been
//! applied, and repeating it under the same request id is safe.

use std::time::Duration;

use forge_shared::cluster::Revision;
use forge_shared::cluster::command::{Applied, Command, CommandError};
use forge_shared::cluster::event::{Event, Kind, Object};
use forge_shared::cluster::node::{NodeLoad, NodeSpec};
use forge_shared::cluster::session::{NodeDown, NodeUp};
use forge_shared::plan::{Plan, Refusal};
use forge_shared::spec::ModelService;
use forge_shared::version::first_level;
use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

/// Messages that may lie unread in a session or watch before the sender waits.
pub const STREAM_DEPTH: usize = 256;

/// Why the cluster did not do what was asked.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ClusterError {
    /// The command was refused; nothing changed.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// It fits nowhere.
    #[error(transparent)]
    NotPlaceable(Box<Refusal>),
    /// No coordinator that could do it was found in time; nothing was proposed.
    #[error("no coordinator answered within {waited_ms} ms: {reason}")]
    Unavailable {
        /// Time spent, milliseconds.
        waited_ms: u64,
        /// The last try's end.
        reason: String,
    },
    /// It is being worked on and was not finished in time; nothing was proposed. The same call again may find it done.
    #[error("not finished within {waited_ms} ms: {reason}")]
    Unfinished {
        /// Time spent, milliseconds.
        waited_ms: u64,
        /// Who works on what, and how long already.
        reason: String,
    },
    /// The coordinators answer, the node that would have to do it does not.
    #[error("{reason}")]
    Away {
        /// Which node, and what to do.
        reason: String,
    },
    /// It was proposed and its end is not known: ask again under the same request id.
    #[error("the command's outcome is not known: {reason}")]
    Unknown {
        /// What was lost.
        reason: String,
    },
    /// This caller may not.
    #[error("not allowed: {reason}")]
    Forbidden {
        /// Which role or certificate it would take.
        reason: String,
    },
    /// The other side broke the protocol, or speaks a version this one does not.
    #[error("protocol: {reason}")]
    Protocol {
        /// What came.
        reason: String,
    },
}

/// Objects and the revision they were read at.
#[derive(Debug, Clone, PartialEq)]
pub struct Listing {
    /// When.
    pub revision: Revision,
    /// What.
    pub objects: Vec<Object>,
}

/// What a watcher receives.
#[derive(Debug, Clone, PartialEq)]
pub enum WatchItem {
    /// Forget everything: what follows up to `Current` is all there is.
    Reset,
    /// A change.
    Event(Event),
    /// Everything up to here has been received; resume after it.
    Current(Revision),
}

/// A node's session: dropping both ends ends it.
#[derive(Debug)]
pub struct Session {
    /// To the leader.
    pub up: mpsc::Sender<NodeUp>,
    /// From the leader; ends when the session does.
    pub down: mpsc::Receiver<NodeDown>,
}

/// What `apply --dry-run` shows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PlannedService {
    /// The wish with defaults.
    pub service: ModelService,
    /// Whether it differs from what the cluster has.
    pub changes: bool,
    /// Where its replicas would be, the standing ones included.
    pub plans: Vec<Plan>,
    /// Devices that were not taken, and why: `node/device` and a sentence.
    pub refused_devices: Vec<(String, String)>,
    /// What else is to be known before it is applied, in sentences.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// A coordinator's view of its group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GroupStatus {
    /// Of the cluster.
    pub cluster_id: String,
    /// Of the raft group: the cluster's id, with a suffix where the group was restored from a backup.
    #[serde(default)]
    pub group_id: String,
    /// Who answers.
    pub member_id: u64,
    /// Whom it follows, itself if it leads; 0 if nobody.
    pub leader_id: u64,
    /// Raft's term.
    pub term: u64,
    /// Last entry known to be committed.
    pub commit_index: u64,
    /// Last entry applied here.
    pub applied_index: u64,
    /// The state's revision.
    pub revision: Revision,
    /// Voters and learners with their addresses, and whether they answered of late.
    pub members: Vec<MemberStatus>,
    /// Forge's version of who answers.
    pub version: String,
    /// What every process of the cluster knows; newer features wait for it.
    #[serde(default = "first_level")]
    pub level: u32,
    /// Who is below the level of who answers, in words.
    #[serde(default)]
    pub older: Vec<String>,
}

/// A member as the answering one sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MemberStatus {
    /// Raft id.
    pub id: u64,
    /// Name.
    pub name: String,
    /// `host:port`.
    pub address: String,
    /// Forge's version it runs, as it last said.
    #[serde(default)]
    pub version: String,
    /// That version's level.
    #[serde(default = "first_level")]
    pub level: u32,
    /// Votes, or only follows.
    pub is_voter: bool,
    /// Heard of within an election timeout (known to the leader only).
    pub is_reachable: bool,
    /// Last entry it is known to have (leader only).
    pub matched_index: u64,
}

/// Loads of all nodes with a session.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ClusterLoads {
    /// By node: who it is, what it does, milliseconds since its last heartbeat.
    pub nodes: Vec<(NodeSpec, NodeLoad, u64)>,
}

/// What may be asked of the coordinators. Waits are bounded by `timeout`.
pub trait ClusterApi: Send + Sync + 'static {
    /// Has a command applied. The same `request_id` again answers the same and changes nothing.
    fn execute(&self, request_id: String, command: Command, timeout: Duration) -> BoxFuture<'_, Result<Applied, ClusterError>>;

    /// Objects of a kind, all or one, no older than this call.
    fn read(&self, kind: Kind, name: Option<String>, timeout: Duration) -> BoxFuture<'_, Result<Listing, ClusterError>>;

    /// Changes from a revision on, for ever: it reconnects by itself and resumes; `None` begins with everything there is.
    fn watch(&self, kinds: Vec<Kind>, after: Option<Revision>) -> mpsc::Receiver<WatchItem>;

    /// What would be placed where.
    fn plan(&self, service: ModelService, timeout: Duration) -> BoxFuture<'_, Result<PlannedService, ClusterError>>;

    /// A node's session with the leader, begun with `Hello`. It ends with the connection or the leadership: begin another.
    fn session(&self, hello: NodeSpec, timeout: Duration) -> BoxFuture<'_, Result<Session, ClusterError>>;

    /// The group, as seen by whoever answers first.
    fn status(&self, timeout: Duration) -> BoxFuture<'_, Result<GroupStatus, ClusterError>>;

    /// Loads now and then, for ever.
    fn loads(&self, interval: Duration) -> mpsc::Receiver<ClusterLoads>;
}
