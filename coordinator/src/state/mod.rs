//! The replicated state of the cluster: what every coordinator knows after the same log entries.
//!
//! Plain data and rules. It has no clock, socket, disk or thread: an entry goes in, a reply and changes come out. Leases,
//! loads and shares of budgets are the leader's memory and never here.
//!
//! Invariants (property-tested): two states that applied the same entries are equal, and so are their snapshots; a
//! refused command changes nothing but what is remembered of it; every collection is bounded; a device is never given
//! more than its node said it has at that time; epochs of a service only grow.
//!
//! The log's times come from different leaders' clocks. They decide how long tokens and idempotency records live, by
//! the differences between entries (see `clock.rs`), and what is shown; nothing else.

mod access;
mod certificates;
mod checks;
mod clock;
mod fuzz;
mod history;
mod idempotency;
mod level;
mod limits;
#[cfg(test)]
mod log_tests;
mod members;
mod nodes;
mod notices;
mod plans;
mod replies;
mod reports;
mod rules;
mod services;
mod shared;
mod snapshot;
#[cfg(test)]
pub(crate) mod test_support;
#[cfg(test)]
mod tests;
mod wishes;

use std::collections::BTreeMap;

use forge_shared::cluster::Revision;
use forge_shared::cluster::certificate::Trust;
use forge_shared::cluster::command::{ApiKeyRecord, Applied, Command, CommandError, Envelope, IdempotencyRecord, JoinToken, MemberRecord};
use forge_shared::cluster::event::{Change, Kind, Notice, Object};
use forge_shared::cluster::node::NodeRecord;
use forge_shared::cluster::service::{ReplicaPhase, ReplicaRecord, ServiceRecord};
use forge_shared::ids::{Epoch, NodeId, ServiceName};
use forge_shared::plan::Plan;
use forge_shared::version::{first_level, is_first_level};
use serde::{Deserialize, Serialize};

pub(crate) use fuzz::Fuzzed;
pub use fuzz::{fuzz_envelopes, fuzz_snapshot};
pub(crate) use level::level_of;
pub use limits::*;
#[cfg(test)]
pub(crate) use plans::check_plan;
pub use rules::check_rules;
pub use services::{changes_replicas, check_wish};

use access::KeptToken;
use certificates::Certificates;
use clock::Clock;
use idempotency::Idempotency;
use members::RemovedMembers;
use nodes::RemovedNode;
use notices::Notices;
use replies::Replies;
use shared::Shared;

/// Why bytes are no state of this build.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// It was written by a newer Forge.
    #[error("the snapshot has format version {found}, and this Forge reads up to {known}: start a newer forge-coordinator")]
    Newer {
        /// Of the bytes.
        found: u64,
        /// This build's.
        known: u64,
    },
    /// It is not what was written.
    #[error("the snapshot is damaged: {reason}; restore a backup, or let the coordinator join anew")]
    Damaged {
        /// What does not fit.
        reason: String,
    },
}

/// Everything that the cluster agrees on. A copy costs next to nothing: the large parts are shared until they change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ClusterState {
    cluster_id: String,
    /// Index of the last entry, whether it changed something or not.
    applied: Revision,
    /// What all processes know; see `level.rs`.
    #[serde(default = "first_level", skip_serializing_if = "is_first_level")]
    level: u32,
    revision: Revision,
    /// The last revision that placement depends on: a node, or a service's wish, facts or placements.
    placement_revision: Revision,
    clock: Clock,
    nodes: Shared<BTreeMap<NodeId, NodeRecord>>,
    /// Incarnations of nodes that were removed, so that their old processes do not come back.
    removed_nodes: BTreeMap<NodeId, RemovedNode>,
    services: Shared<BTreeMap<ServiceName, ServiceRecord>>,
    /// At least every epoch of services that are gone: one that is made again under an old name begins above it.
    epoch_floor: Epoch,
    /// By name.
    keys: Shared<BTreeMap<String, ApiKeyRecord>>,
    tokens: BTreeMap<String, KeptToken>,
    members: BTreeMap<u64, MemberRecord>,
    #[serde(default)]
    removed_members: RemovedMembers,
    #[serde(default, skip_serializing_if = "Certificates::is_empty")]
    certificates: Certificates,
    idempotency: Shared<Idempotency>,
    notices: Shared<Notices>,
    /// Replies to commands from outside …
    asked: Shared<Replies>,
    /// … and to those of leaders and workers, which come in floods and must not push the others out.
    reported: Shared<Replies>,
}

/// What a command did.
#[derive(Debug, Default)]
struct Effect {
    changed: bool,
    existing: Option<IdempotencyRecord>,
}

impl Effect {
    const NONE: Effect = Effect { changed: false, existing: None };
    const CHANGED: Effect = Effect { changed: true, existing: None };
}

/// One entry on its way through the state.
struct Step {
    index: Revision,
    changes: Vec<Change>,
    /// Something that placement depends on changed.
    moves: bool,
}

impl ClusterState {
    /// An empty state of a new cluster.
    pub fn new(cluster_id: &str) -> Self {
        ClusterState {
            cluster_id: cluster_id.to_owned(),
            applied: Revision(0),
            // The same for all members, whatever their build: the first leader raises it.
            level: first_level(),
            revision: Revision(0),
            placement_revision: Revision(0),
            clock: Clock::default(),
            nodes: Shared::default(),
            removed_nodes: BTreeMap::new(),
            services: Shared::default(),
            epoch_floor: Epoch(0),
            keys: Shared::default(),
            tokens: BTreeMap::new(),
            members: BTreeMap::new(),
            removed_members: RemovedMembers::default(),
            certificates: Certificates::default(),
            idempotency: Shared::default(),
            notices: Shared::default(),
            asked: Shared::default(),
            reported: Shared::default(),
        }
    }

    /// Applies one entry. The changes are in order, each object as it is after the entry; notices are among them.
    ///
    /// The reply's error says why nothing changed. A request id that was applied lately answers as it did then.
    pub fn apply(&mut self, index: Revision, envelope: &Envelope) -> (Result<Applied, CommandError>, Vec<Change>) {
        if index <= self.applied {
            let reason = format!("entry {index} came after entry {}", self.applied);
            return (Err(CommandError::Stale { reason }), Vec::new());
        }
        self.applied = index;
        self.clock.advance(envelope.proposed_ms);
        if let Err(error) = checks::envelope(envelope) {
            return (Err(error), Vec::new());
        }
        let digest = replies::digest(&envelope.command);
        let is_asked = is_asked(&envelope.command);
        let known = if is_asked { &self.asked } else { &self.reported };
        if let Some(reply) = known.get(&envelope.request_id, &digest) {
            return (reply, Vec::new());
        }
        let mut step = Step { index, changes: Vec::new(), moves: false };
        let reply = match self.run(&envelope.command, &mut step) {
            Ok(Effect { changed, existing }) => {
                if changed {
                    self.revision = index;
                }
                if step.moves {
                    self.placement_revision = index;
                }
                Ok(Applied { revision: self.revision, changed, existing })
            }
            Err(error) => {
                debug_assert!(step.changes.is_empty(), "a refused command changed something: {error}");
                Err(error)
            }
        };
        // A build that does not know the level has nothing to remember of a raise that came too early.
        let is_early_raise = matches!(envelope.command, Command::RaiseLevel { .. }) && reply.as_ref().is_ok_and(|applied| !applied.changed);
        if is_early_raise {
            return (reply, step.changes);
        }
        let (replies, limit) = if is_asked { (&mut self.asked, MAX_ASKED_REPLIES) } else { (&mut self.reported, MAX_REPORTED_REPLIES) };
        replies.remember(&envelope.request_id, digest, &reply, limit);
        (reply, step.changes)
    }

    fn run(&mut self, command: &Command, step: &mut Step) -> Result<Effect, CommandError> {
        self.check_level(command)?;
        match command {
            Command::ApplyService { service } => self.apply_service(service, step),
            Command::ScaleService { name, replicas } => self.scale_service(name, *replicas, step),
            Command::UndoService { name, to } => self.undo_service(name, *to, step),
            Command::RecordRollout { name, generation, stuck } => self.record_rollout(name, *generation, stuck.as_deref(), step),
            Command::DeleteService { name } => self.delete_service(name, step),
            Command::RecordFacts { name, generation, facts } => self.record_facts(name, *generation, facts.as_deref(), step),
            Command::RecordWait { name, generation, waits_for } => self.record_wait(name, *generation, waits_for, step),
            Command::CommitPlans { basis, plans, removed, refusals, settled } => {
                self.commit_plans(*basis, plans::Commit { plans, removed, refusals, settled }, step)
            }
            Command::ReportReplica { node, incarnation, report } => self.report_replica(node, *incarnation, report, step),
            Command::JoinNode { spec } => self.join_node(spec, step),
            Command::LoseNode { node, incarnation, reason } => self.lose_node(node, *incarnation, reason, step),
            Command::CordonNode { node, cordoned } => self.cordon_node(node, *cordoned, step),
            Command::DrainNode { node, draining, is_forced } => self.drain_node(node, *draining, *is_forced, step),
            Command::RemoveNode { node } => self.remove_node(node, step),
            Command::PutJoinToken { token } => self.put_token(token, step),
            Command::UseJoinToken { id, role, node } => self.use_token(id, *role, node, step),
            Command::RemoveJoinToken { id } => self.remove_token(id, step),
            Command::PutKey { key } => self.put_key(key, step),
            Command::RevokeKey { name } => self.revoke_key(name, step),
            Command::RecordCertificate { certificate, asked_with } => self.record_certificate(certificate, asked_with.as_deref(), step),
            Command::RevokeCertificates { serials, holder, force } => self.revoke_certificates(serials, holder.as_ref(), *force, step),
            Command::BeginCaRotation { from, to } => self.begin_ca_rotation(from, to, step),
            Command::SwitchCa { to, force } => self.switch_ca(to, *force, step),
            Command::FinishCaRotation { to, force } => self.finish_ca_rotation(to, *force, step),
            Command::AbandonCaRotation => self.abandon_ca_rotation(step),
            Command::RecordIdempotency { record } => self.record_idempotency(record),
            Command::PutMember { member } => self.put_member(member, step),
            Command::RemoveMember { id } => self.remove_member(*id, step),
            Command::RaiseLevel { level } => self.raise_level(*level, step),
        }
    }

    /// Which cluster.
    pub fn cluster_id(&self) -> &str {
        &self.cluster_id
    }

    /// Index of the last entry that changed something.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// The last revision that placement depends on: the `basis` a commit must not be older than.
    pub fn placement_revision(&self) -> Revision {
        self.placement_revision
    }

    /// The latest of the leaders' clocks, milliseconds since 1970; for display.
    pub fn time_ms(&self) -> u64 {
        self.clock.latest_ms()
    }

    /// All nodes by name.
    pub fn nodes(&self) -> &BTreeMap<NodeId, NodeRecord> {
        &self.nodes
    }

    /// All services by name.
    pub fn services(&self) -> &BTreeMap<ServiceName, ServiceRecord> {
        &self.services
    }

    /// All API keys by name, revoked ones too.
    pub fn keys(&self) -> &BTreeMap<String, ApiKeyRecord> {
        &self.keys
    }

    /// All members of the raft group by id.
    pub fn members(&self) -> &BTreeMap<u64, MemberRecord> {
        &self.members
    }

    /// A join token in its life, used up or not, for comparing its secret's hash.
    pub fn token(&self, id: &str) -> Option<&JoinToken> {
        self.tokens.get(id).filter(|kept| !kept.is_over(&self.clock)).map(|kept| &kept.token)
    }

    /// Whether this command was taken under this request id, and is remembered: asked again it changes nothing.
    pub fn was_taken(&self, request_id: &str, command: &Command) -> bool {
        let replies = if is_asked(command) { &self.asked } else { &self.reported };
        matches!(replies.get(request_id, &replies::digest(command)), Some(Ok(_)))
    }

    /// All join tokens by id, those included that have run out and not been cleared away.
    pub fn tokens(&self) -> impl Iterator<Item = &JoinToken> {
        self.tokens.values().map(|kept| &kept.token)
    }

    /// What is remembered of an idempotent request.
    pub fn idempotency(&self, tenant: &str, key: &str) -> Option<&IdempotencyRecord> {
        self.idempotency.get(tenant, key, &self.clock)
    }

    /// What happened lately, oldest first.
    pub fn notices(&self) -> impl Iterator<Item = &Notice> {
        self.notices.iter()
    }

    /// Epoch that a service of this name which does not exist yet begins above.
    pub fn epoch_floor(&self) -> Epoch {
        self.epoch_floor
    }

    /// All objects of a kind, in order of their names; notices in order of time.
    pub fn objects(&self, kind: Kind) -> Vec<Object> {
        match kind {
            Kind::Node => self.nodes.values().map(|node| Object::Node(Box::new(node.clone()))).collect(),
            Kind::Service => self.services.values().map(|service| Object::Service(Box::new(service.clone()))).collect(),
            Kind::Key => self.keys.values().map(|key| Object::Key(Box::new(key.clone()))).collect(),
            Kind::Member => self.members.values().cloned().map(Object::Member).collect(),
            Kind::Token => self.tokens().cloned().map(Object::Token).collect(),
            Kind::Notice => self.notices().cloned().map(Object::Notice).collect(),
            Kind::Certificate => {
                self.certificates.records().map(|certificate| Object::Certificate(Box::new(certificate.clone()))).collect()
            }
            Kind::Trust => vec![Object::Trust(Box::new(self.trust().clone()))],
        }
    }

    /// One object, if there is one of this name.
    pub fn object(&self, kind: Kind, name: &str) -> Option<Object> {
        match kind {
            Kind::Node => self.nodes.get(&NodeId::from(name)).map(|node| Object::Node(Box::new(node.clone()))),
            Kind::Service => self.services.get(&ServiceName::from(name)).map(|service| Object::Service(Box::new(service.clone()))),
            Kind::Key => self.keys.get(name).map(|key| Object::Key(Box::new(key.clone()))),
            Kind::Member => self.members.values().find(|member| member.name == name).cloned().map(Object::Member),
            Kind::Token => self.tokens.get(name).map(|kept| Object::Token(kept.token.clone())),
            Kind::Notice => self.notices().find(|notice| notice.number.to_string() == name).cloned().map(Object::Notice),
            Kind::Certificate => self.certificate(name).map(|certificate| Object::Certificate(Box::new(certificate.clone()))),
            Kind::Trust => (name == Trust::NAME).then(|| Object::Trust(Box::new(self.trust().clone()))),
        }
    }

    /// Plans that hold memory: placed replicas and leaving ones, without those whose worker has ended them.
    pub fn standing_plans(&self) -> impl Iterator<Item = &Plan> {
        self.services.values().flat_map(standing).map(|replica| &replica.plan)
    }
}

/// A service's replicas, placed and leaving, of which something may run.
pub fn standing(service: &ServiceRecord) -> impl Iterator<Item = &ReplicaRecord> {
    service.replicas.iter().chain(service.leaving.iter().map(|leaving| &leaving.replica)).filter(|replica| runs(replica))
}

/// Whether something of a replica may run.
pub fn runs(replica: &ReplicaRecord) -> bool {
    !matches!(replica.status.phase, ReplicaPhase::Failed | ReplicaPhase::Stopped)
}

/// Whether a command comes from outside, where somebody may ask again after an answer was lost. The others are fenced by
/// incarnations, epochs and generations as well.
fn is_asked(command: &Command) -> bool {
    !matches!(
        command,
        Command::RecordFacts { .. }
            | Command::RecordWait { .. }
            | Command::CommitPlans { .. }
            | Command::ReportReplica { .. }
            | Command::JoinNode { .. }
            | Command::LoseNode { .. }
            | Command::RecordCertificate { .. }
            | Command::RecordIdempotency { .. }
            | Command::RecordRollout { .. }
            | Command::RaiseLevel { .. }
    )
}
