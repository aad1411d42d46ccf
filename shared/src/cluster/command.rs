//! Commands: everything that can change the cluster's state, and the typed answers.
//!
//! Invariant: a command's effect depends on it, its envelope and the state before alone; applied twice under one request
//! id, the second time changes nothing and answers the same.

use serde::{Deserialize, Serialize};

use std::collections::BTreeSet;

use super::Revision;
use super::certificate::{CaRecord, CertificateRecord, Holder};
use super::node::{NodeSpec, Role};
use super::service::ReplicaReport;
use crate::ids::{Epoch, Incarnation, NodeId, ReplicaId, ServiceName};
use crate::plan::{ModelFacts, Plan, Refusal};
use crate::spec::ModelService;
use crate::version::{Build, first_level, is_first_level};

/// A command as it stands in the log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Envelope {
    /// Chosen by whoever asked, kept over its retries. 1 to 128 visible ASCII characters.
    pub request_id: String,
    /// The leader's clock when it proposed, milliseconds since 1970. The state's time is the largest seen.
    pub proposed_ms: u64,
    /// W3C `traceparent` of whoever asked, or empty.
    #[serde(default)]
    pub traceparent: String,
    /// What is to change.
    pub command: Command,
}

/// What can be changed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", tag = "do", deny_unknown_fields)]
#[expect(missing_docs, reason = "each variant is described; its fields' names and types say the rest")]
pub enum Command {
    /// Wants a service to be as written: creates or changes it; the same wish again changes nothing.
    ApplyService { service: Box<ModelService> },
    /// Changes the number of replicas.
    ScaleService { name: ServiceName, replicas: u32 },
    /// Goes back to an earlier wish, the last one or that of a generation, as a new generation. The number of replicas and
    /// the strategy stay. Level 2.
    UndoService { name: ServiceName, to: Option<u64> },
    /// The rollout of a generation makes no progress, with the reason, or goes on again. Of another generation: changes
    /// nothing. Level 2.
    RecordRollout { name: ServiceName, generation: u64, stuck: Option<String> },
    /// Removes a service; its ready replicas finish their requests first.
    DeleteService { name: ServiceName },
    /// What a worker found out of a service's model. Of an older generation: changes nothing.
    RecordFacts { name: ServiceName, generation: u64, facts: Result<Box<ModelFacts>, String> },
    /// What a service waits for whose model no worker has looked at yet. Of an older generation: changes nothing.
    RecordWait { name: ServiceName, generation: u64, waits_for: String },
    /// The leader's placement. Refused where `basis` is older than the last change of a node, or of a service's wish,
    /// facts or placements, so that two leaders' plans cannot mix; epochs must be larger than any given out for the
    /// service.
    CommitPlans {
        /// Revision of the state it was computed from.
        basis: Revision,
        /// New replicas. One of an index that is placed supersedes it: if the old one is ready it serves on as leaving.
        plans: Vec<PlannedReplica>,
        /// Replicas that go one step further towards their end, each under the epoch that is meant: a ready one drains, a
        /// leaving one drains, a draining one is gone, and so is one that was never ready.
        removed: Vec<(ReplicaId, Epoch)>,
        /// Why replicas cannot be placed, of services of which something else, or nothing, was said before.
        refusals: Vec<Refusal>,
        /// Services of which nothing is refused any more.
        #[serde(default)]
        settled: Vec<ServiceName>,
    },
    /// What a worker says of a replica. Of another epoch or incarnation: changes nothing.
    ReportReplica { node: NodeId, incarnation: Incarnation, report: ReplicaReport },

    /// A node began a session. An older incarnation than the known one is refused.
    JoinNode { spec: Box<NodeSpec> },
    /// A node's lease ran out, or it said good-bye.
    LoseNode { node: NodeId, incarnation: Incarnation, reason: String },
    /// No new replicas on it, or again.
    CordonNode { node: NodeId, cordoned: bool },
    /// Its replicas are moved away, or may come again. One that has room nowhere else serves on until it has, or ends if
    /// `is_forced`.
    DrainNode {
        node: NodeId,
        draining: bool,
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        is_forced: bool,
    },
    /// Forgets a lost node.
    RemoveNode { node: NodeId },

    /// Lets nodes in. Only the token's hash is kept.
    PutJoinToken { token: JoinToken },
    /// A node was let in by a token. Refused where the token is unknown, used up, expired or of another role.
    UseJoinToken { id: String, role: Role, node: String },
    /// Takes a token back.
    RemoveJoinToken { id: String },

    /// An API key.
    PutKey { key: Box<ApiKeyRecord> },
    /// No longer good.
    RevokeKey { name: String },

    /// A certificate was signed, or seen: then one that is known is in use from now on. `asked_with` is the serial number of
    /// the one that asked for it; refused where that one is not known or was revoked.
    RecordCertificate { certificate: Box<CertificateRecord>, asked_with: Option<String> },
    /// Certificates are believed no more: these, and all that `holder` has when this is applied. Refused where it shuts out
    /// the last operator or a coordinator that votes, unless `force`.
    RevokeCertificates { serials: BTreeSet<String>, holder: Option<Holder>, force: bool },
    /// A CA is believed beside the one that signs.
    BeginCaRotation { from: CaRecord, to: CaRecord },
    /// The new CA, hex of its digest, signs. Refused while somebody has not said that it believes it, unless `force`; while
    /// most coordinators have not, always: they could not sign.
    SwitchCa { to: String, force: bool },
    /// The CA that signs, hex of its digest, is believed alone. Refused while somebody does not use a certificate of it,
    /// unless `force`.
    FinishCaRotation { to: String, force: bool },
    /// The new CA, which does not sign yet, is believed no more.
    AbandonCaRotation,

    /// Remembers what an idempotent request was, so that another gateway can give its answer again.
    RecordIdempotency { record: IdempotencyRecord },

    /// A member of the raft group and where it is reached; written with the change of membership.
    PutMember { member: MemberRecord },
    /// Its removal.
    RemoveMember { id: u64 },
    /// Every process is at this level: what it brought may be written from now on. Refused where one is not.
    RaiseLevel { level: u32 },
}

/// A replica's plan and the generation it was made for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PlannedReplica {
    /// The plan.
    pub plan: Plan,
    /// Of the service.
    pub generation: u64,
}

/// A way in for nodes of one role. The token itself is shown once and not kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct JoinToken {
    /// Names it; part of the token.
    pub id: String,
    /// Hex of SHA-256 over the token's secret.
    pub secret_sha256: String,
    /// What it lets in.
    pub role: Role,
    /// End of its life, milliseconds since 1970.
    pub expires_ms: u64,
    /// How many nodes it may still let in.
    pub uses_left: u32,
}

/// An API key as stored: hashed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ApiKeyRecord {
    /// First digits of the key; also its tenant.
    pub id: String,
    /// What the operator calls it.
    pub name: String,
    /// When it was made, seconds since 1970.
    pub created_s: u64,
    /// When it was revoked, if it was.
    pub revoked_s: Option<u64>,
    /// Requests per minute over the whole cluster; absent means unlimited.
    pub rpm: Option<u32>,
    /// Tokens per minute over the whole cluster; absent means unlimited.
    pub tpm: Option<u32>,
    /// Hex of 16 random bytes.
    pub salt: String,
    /// Hex of SHA-256 over salt and secret.
    pub hash: String,
}

/// An accepted request that carries an idempotency key. Forgotten some time after it was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct IdempotencyRecord {
    /// Whose request: the API key's id, or `anonymous`.
    pub tenant: String,
    /// The client's key.
    pub key: String,
    /// Hex of SHA-256 over the request's route and body.
    pub body_sha256: String,
    /// The clock its template was rendered with, seconds since 1970.
    pub clock_s: u64,
    /// Where it was accepted: a retry goes on only with these numerics.
    pub numerics_id: String,
    /// End of its life, milliseconds since 1970.
    pub expires_ms: u64,
}

/// A coordinator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MemberRecord {
    /// Its raft id, never 0.
    pub id: u64,
    /// Its name, as in its certificate.
    pub name: String,
    /// `host:port` of its service.
    pub address: String,
    /// Forge's version it runs, as it last said; empty before.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub version: String,
    /// That version's level.
    #[serde(default = "first_level", skip_serializing_if = "is_first_level")]
    pub level: u32,
}

impl MemberRecord {
    /// A member of this build.
    pub fn new(id: u64, name: &str, address: &str, build: Build) -> Self {
        MemberRecord { id, name: name.to_owned(), address: address.to_owned(), version: build.version, level: build.level }
    }

    /// What it runs.
    pub fn build(&self) -> Build {
        Build { version: self.version.clone(), level: self.level }
    }
}

/// What a command answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Applied {
    /// The state's revision after it.
    pub revision: Revision,
    /// Whether anything changed.
    pub changed: bool,
    /// An earlier record under the same tenant and key (`RecordIdempotency`); the caller compares.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub existing: Option<IdempotencyRecord>,
}

/// Why a command changed nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", tag = "error", deny_unknown_fields)]
pub enum CommandError {
    /// A field is wrong.
    #[error("{field}: {reason}")]
    Invalid {
        /// Dotted path.
        field: String,
        /// What is wrong and what to write.
        reason: String,
    },
    /// There is no such object.
    #[error("there is no {kind} {name:?}{}", nearest_help(.nearest))]
    NotFound {
        /// `service`, `node`, `key`, `join token`, `member`, `certificate`.
        kind: String,
        /// What was asked for.
        name: String,
        /// The known name most like it.
        nearest: Option<String>,
    },
    /// What is there already does not allow it.
    #[error("{kind} {name:?}: {reason}")]
    Conflict {
        /// What kind.
        kind: String,
        /// Its name.
        name: String,
        /// What stands against it and what to do.
        reason: String,
    },
    /// The sender's view is older than the state: a fenced incarnation, epoch or basis.
    #[error("stale: {reason}")]
    Stale {
        /// Which number, and what it is now.
        reason: String,
    },
    /// The state's bounds (objects of a kind) are reached.
    #[error("too many {kind}: at most {limit}")]
    TooMany {
        /// Of what.
        kind: String,
        /// The bound.
        limit: usize,
    },
    /// It would shut out somebody who is needed, or comes before its turn.
    #[error("refused: {reason}")]
    Unsafe {
        /// Whom or why, and what to do.
        reason: String,
    },
    /// Something that not every process of the cluster knows, or a process that does not know what the others use.
    #[error("{what} takes level {needed} and the cluster is at level {level}{}; docs/upgrade.md says how to go on", older_help(.older))]
    Level {
        /// What was asked for.
        what: String,
        /// The level it takes.
        needed: u32,
        /// The cluster's.
        level: u32,
        /// Who is older: role, name, version and level.
        older: Vec<String>,
    },
    /// A token that lets nobody in.
    #[error("join token refused: {reason}")]
    Token {
        /// Why, and how to get a good one.
        reason: String,
    },
}

fn older_help(older: &[String]) -> String {
    const SHOWN: usize = 3;
    let more = if older.len() > SHOWN { format!(" and {} more", older.len() - SHOWN) } else { String::new() };
    let shown = older.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    if shown.is_empty() { ", to be raised in a moment".to_owned() } else { format!(": {shown}{more}") }
}

fn nearest_help(nearest: &Option<String>) -> String {
    nearest.as_ref().map(|nearest| format!("; did you mean {nearest:?}?")).unwrap_or_default()
}
