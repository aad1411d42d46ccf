//! A node's session with the leader: heartbeats and reports up, assignments and grants down.
//!
//! Invariant: every message down that grants something carries how long it holds, counted from when the node sent the
//! heartbeat it answers; clocks of two machines are never compared.

use serde::{Deserialize, Serialize};

use super::Revision;
use super::node::{DataPlane, NodeLoad, NodeSpec};
use super::service::ReplicaReport;
use crate::ids::NodeId;
use crate::plan::{ModelFacts, Plan};
use crate::spec::ModelService;

/// From a worker or gateway. The first one is `Hello`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", tag = "type", deny_unknown_fields)]
#[expect(missing_docs, reason = "each variant is described; its fields' names and types say the rest")]
pub enum NodeUp {
    /// Who it is.
    Hello { spec: Box<NodeSpec> },
    /// It lives.
    Heartbeat {
        /// Comes back in `Ack`.
        number: u64,
        /// What it is doing.
        load: NodeLoad,
        /// What it used of its shares since the last heartbeat and would use (gateway).
        usage: Vec<KeyUsage>,
    },
    /// Something about a replica changed.
    Replica { report: Box<ReplicaReport> },
    /// Answers `Inspect`.
    Inspected {
        /// Of the question.
        number: u64,
        /// The model's numbers, or what is wrong with it.
        result: Result<Box<ModelFacts>, String>,
    },
    /// Answers `Inspect`: it looks at as many models as it can. Says nothing about the model.
    Busy {
        /// Of the question.
        number: u64,
    },
    /// It leaves of its own will; its lease need not be waited for.
    Goodbye,
}

/// To a worker or gateway. The first one is `Welcome` or `Refused`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", tag = "type", deny_unknown_fields)]
pub enum NodeDown {
    /// The session holds.
    Welcome {
        /// Length of a lease, milliseconds.
        lease_ms: u64,
        /// How often to send a heartbeat, milliseconds.
        heartbeat_ms: u64,
    },
    /// The node must not go on under this identity: a newer incarnation of it lives, or it was removed.
    Refused {
        /// Why, and what to do.
        reason: String,
    },
    /// Answers a heartbeat.
    Ack {
        /// Of the heartbeat.
        number: u64,
        /// The lease, counted from when that heartbeat was sent, milliseconds.
        lease_ms: u64,
        /// New shares of keys' budgets (gateway).
        shares: Vec<KeyShare>,
    },
    /// Everything this worker is to run; what is not in it ends. Sent at the beginning and at every change.
    Assignments {
        /// Which raft group's state: revisions and epochs of two groups are not compared, and a group made from a backup is
        /// another.
        #[serde(default)]
        history: String,
        /// The state's revision.
        revision: Revision,
        /// One per replica with a rank here.
        assignments: Vec<Assignment>,
    },
    /// Look at this service's model (headers only) and answer with `Inspected` or `Busy`.
    Inspect {
        /// Comes back in the answer.
        number: u64,
        /// The wish.
        service: Box<ModelService>,
    },
    /// The leader ends the session; ask for the new one.
    Moved {
        /// `host:port` of the leader, if known.
        leader: Option<String>,
    },
}

/// A replica this worker has a rank of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Assignment {
    /// The decision.
    pub plan: Plan,
    /// The wish it carries out.
    pub service: Box<ModelService>,
    /// Digest of the weights that were planned for: other weights are refused.
    pub weights_digest: String,
    /// Let running requests finish within this time and end; none is taken any more.
    pub drain_ms: Option<u64>,
    /// Where the workers of a plan of several reach each other; nothing for a plan of one. Level 2.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub peers: Vec<Peer>,
}

/// A worker that has a rank of a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Peer {
    /// Which.
    pub node: NodeId,
    /// Where it is reached.
    pub data_plane: DataPlane,
}

/// What a gateway used of one key's budget.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct KeyUsage {
    /// The key's id.
    pub key_id: String,
    /// Requests admitted since the last heartbeat.
    pub requests: u64,
    /// Tokens since the last heartbeat.
    pub tokens: u64,
    /// Requests refused for want of budget since the last heartbeat: demand that a larger share would serve.
    pub refused: u64,
    /// Requests per minute of the share it holds now; absent where it holds none. A gateway reports every key it holds a
    /// share of, used or not: the leader lends no one what another may still spend, and a new leader learns here what
    /// the last one lent.
    pub held_rpm: Option<u32>,
    /// Tokens per minute of the share it holds now.
    pub held_tpm: Option<u32>,
}

/// A gateway's share of one key's budget; kept while no coordinator answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct KeyShare {
    /// The key's id.
    pub key_id: String,
    /// Requests per minute for this gateway; absent means unlimited.
    pub rpm: Option<u32>,
    /// Tokens per minute for this gateway; absent means unlimited.
    pub tpm: Option<u32>,
}
