//! What a leader knows and decides, as steps: time, the state and what nodes said go in; commands to propose come out, and
//! messages to nodes are put into their sessions' queues.
//!
//! What it is not: it has no clock, task or raft. `leader` and `session` wait, propose and send in production, a simulator
//! in tests; both decide by this alone.
//!
//! Invariants: a new leader gives every known node two leases' time before it believes one lost; while raft stands still
//! nothing is decided; a heartbeat is answered, with another lease, only while the state has this process of the node as
//! ready; with the leadership all sessions end.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use forge_shared::cluster::Revision;
use forge_shared::cluster::command::{Command, MemberRecord};
use forge_shared::cluster::node::{NodePhase, NodeRecord, NodeSpec, Role};
use forge_shared::cluster::service::ReplicaReport;
use forge_shared::cluster::session::{KeyShare, NodeDown, NodeUp};
use forge_shared::ids::{NodeId, ServiceName};
use forge_shared::version::Build;
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;

use crate::control::{Controller, Duties, Intent, LeaseTable, ShareTable};
use crate::raft::RaftStatus;
use crate::sessions::{Handle, Inspection, Purpose, Sessions};
use crate::state::ClusterState;

/// For a worker to look at a model: headers over the network.
pub(crate) const INSPECT_WITHIN: Duration = Duration::from_secs(120);
/// A learner that is within so many entries of the leader's is made a voter.
const CAUGHT_UP_ENTRIES: u64 = 100;

/// How a leader is set up.
#[derive(Debug, Clone)]
pub struct LeaderOptions {
    /// The raft group: what assignments name as their history.
    pub history: String,
    /// A node whose heartbeats stop for this long is lost, milliseconds.
    pub lease_ms: u64,
    /// How often nodes send heartbeats, milliseconds.
    pub heartbeat_ms: u64,
}

/// What a pass remembers of the last one.
#[derive(Debug, Default)]
struct Passed {
    /// Revision of the last look at the sessions.
    revision: Option<Revision>,
    was_stalled: bool,
}

/// What a leader holds in memory, for one term.
pub struct Leading {
    term: u64,
    options: LeaderOptions,
    pub(crate) sessions: Sessions,
    leases: Mutex<LeaseTable>,
    shares: Mutex<ShareTable>,
    controller: Mutex<Controller>,
    passed: Mutex<Passed>,
    /// Asks for a pass.
    pub(crate) wake: Notify,
    /// Cancelled with the leadership.
    pub(crate) ended: CancellationToken,
    counter: AtomicU64,
}

impl std::fmt::Debug for Leading {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Leading").field("term", &self.term).finish_non_exhaustive()
    }
}

/// What follows from a node's message.
#[derive(Debug, Default)]
pub struct Heard {
    /// For the node.
    pub answer: Option<NodeDown>,
    /// To be proposed, with a word for its request id. Where the session ends, it ends after that.
    pub propose: Option<(&'static str, Command)>,
    /// To be proposed until its end is known.
    pub report: Option<Box<ReplicaReport>>,
    /// The session ends.
    pub ends: bool,
}

impl Heard {
    fn answer(answer: NodeDown) -> Heard {
        Heard { answer: Some(answer), ..Heard::default() }
    }
}

impl Leading {
    /// A leader's memory at the beginning of a term: it gives every known node two leases' time.
    pub fn new(options: LeaderOptions, term: u64, now_ms: u64, state: &ClusterState) -> Leading {
        let mut leases = LeaseTable::new(options.lease_ms);
        leases.follow(now_ms, state);
        Leading {
            term,
            options,
            sessions: Sessions::default(),
            leases: Mutex::new(leases),
            shares: Mutex::new(ShareTable::new()),
            controller: Mutex::new(Controller::default()),
            passed: Mutex::default(),
            wake: Notify::new(),
            ended: CancellationToken::new(),
            counter: AtomicU64::new(0),
        }
    }

    /// The term it leads in.
    pub fn term(&self) -> u64 {
        self.term
    }

    /// Ends every session, saying where to go. The token first: a session that begins meanwhile looks at it once it is in the
    /// table, so that either it or this finds the other.
    pub fn end(&self, leader: Option<String>) {
        self.ended.cancel();
        self.sessions.end_all(leader);
    }

    /// A request id of the leader's own, never given out before.
    pub fn request_id(&self, what: &str) -> String {
        format!("leader-{}-{what}-{}", self.term, self.counter.fetch_add(1, Ordering::Relaxed))
    }

    /// This process runs: to be called all the time, also while a pass waits for the group.
    pub fn pulse(&self, now_ms: u64) {
        if let Some(still_ms) = self.leases.lock().pulse(now_ms) {
            tracing::warn!(still_ms, "this process stood still: nodes have a lease's time to be heard again");
        }
    }

    /// One look at everything: ends sessions of nodes that are lost, tells workers their assignments, puts questions to them,
    /// and gives what is to be proposed. `None` while raft's thread stands still: sessions have ended then, and what would be
    /// proposed of the nodes' silence would be carried out afterwards.
    pub fn pass(&self, now_ms: u64, state: &ClusterState, is_stalled: bool) -> Option<Vec<Command>> {
        let mut passed = self.passed.lock();
        if is_stalled {
            if !std::mem::replace(&mut passed.was_stalled, true) {
                tracing::warn!("the raft thread stands still: is the disk slow? Nothing is decided until it goes on");
            }
            return None;
        }
        if std::mem::take(&mut passed.was_stalled) {
            self.leases.lock().begin_anew(now_ms);
        }
        if passed.revision != Some(state.revision()) {
            self.end_sessions(state);
            passed.revision = Some(state.revision());
        }
        drop(passed);
        self.sessions.assign((&self.options.history, state.revision()), || Duties::of(state));
        // Before anybody is given up: the clock may have gone on while this process did not.
        self.pulse(now_ms);
        let intents = {
            let mut leases = self.leases.lock();
            leases.follow(now_ms, state);
            self.controller.lock().decide(now_ms, state, &leases)
        };
        let mut commands = Vec::new();
        for intent in intents {
            match intent {
                Intent::Propose(command) => commands.push(command),
                Intent::Inspect { node, service, .. } => {
                    let purpose = Purpose::Service { name: ServiceName(service.metadata.name.clone()) };
                    self.sessions.ask(&node, *service, purpose, INSPECT_WITHIN.as_millis() as u64, now_ms);
                }
            }
        }
        // The controller is told of questions that nobody will answer.
        let unanswered = self.sessions.take_unanswered(now_ms);
        let mut controller = self.controller.lock();
        commands.extend(unanswered.iter().filter_map(|(node, name)| controller.inspected(now_ms, state, (node, name), None)));
        Some(commands)
    }

    fn end_sessions(&self, state: &ClusterState) {
        self.sessions.end_where(|spec| match state.nodes().get(&spec.id) {
            // Forgotten while it was away, and welcome again.
            None if spec.role == Role::Gateway => Some(NodeDown::Moved { leader: None }),
            None => Some(NodeDown::Refused { reason: format!("node {} was removed: join it anew", spec.id) }),
            Some(record) if record.spec.incarnation > spec.incarnation => {
                Some(NodeDown::Refused { reason: format!("a newer process joined as {}", spec.id) })
            }
            // It may come again: its replicas are elsewhere by then.
            Some(record) if record.phase == NodePhase::Lost => Some(NodeDown::Moved { leader: None }),
            // It says it again, and it is written down then.
            Some(_) if state.lacks_of(spec) => Some(NodeDown::Moved { leader: None }),
            Some(_) => None,
        });
    }

    /// What a node is told first when its joining was applied.
    pub fn welcome(&self) -> NodeDown {
        NodeDown::Welcome { lease_ms: self.options.lease_ms, heartbeat_ms: self.options.heartbeat_ms }
    }

    /// Begins a session of a node whose joining was applied. `None` where there is no room.
    pub fn begin(&self, now_ms: u64, state: &ClusterState, spec: &NodeSpec, down: mpsc::Sender<NodeDown>) -> Option<Handle> {
        {
            let mut leases = self.leases.lock();
            leases.follow(now_ms, state);
            leases.renew(&spec.id, spec.incarnation, now_ms);
        }
        if spec.role == Role::Gateway {
            self.shares.lock().begin(&spec.id);
        }
        self.sessions.begin(spec.clone(), down, now_ms)
    }

    /// A session is over.
    pub fn forget(&self, handle: &Handle) {
        self.sessions.end(handle);
    }

    /// Takes a node's message. A leader that stands still may be one no more, and must not hold its nodes: the next one counts
    /// them as lost.
    pub fn hear(
        &self,
        now_ms: u64,
        state: &ClusterState,
        (handle, spec): (&Handle, &NodeSpec),
        message: NodeUp,
        is_stalled: bool,
    ) -> Heard {
        match message {
            NodeUp::Heartbeat { number, load, usage } => {
                if is_stalled || !self.renew(now_ms, state, spec) {
                    // It may come again, here or elsewhere, and is then told what it is to run.
                    return Heard { ends: true, ..Heard::answer(NodeDown::Moved { leader: None }) };
                }
                self.sessions.heard(handle, load, now_ms);
                let shares: Vec<KeyShare> = if spec.role == Role::Gateway {
                    let mut shares = self.shares.lock();
                    shares.heard(&spec.id, &usage);
                    shares.grant(state, &spec.id)
                } else {
                    Vec::new()
                };
                Heard::answer(NodeDown::Ack { number, lease_ms: self.options.lease_ms, shares })
            }
            NodeUp::Replica { report } => Heard { report: Some(report), ..Heard::default() },
            NodeUp::Inspected { number, result } => {
                let propose = match self.sessions.answered(handle, number, now_ms) {
                    None => {
                        tracing::debug!(node = %spec.id, number, "an answer to no question, or too late");
                        None
                    }
                    Some(Purpose::DryRun(asker)) => {
                        // Who asked may have gone meanwhile.
                        let _ = asker.send(result);
                        None
                    }
                    Some(Purpose::Service { name }) => self.found(now_ms, state, (&spec.id, &name), Some(result)),
                };
                Heard { propose, ..Heard::default() }
            }
            NodeUp::Busy { number } => {
                // No verdict: a dry run goes to the next worker when its question is dropped.
                let propose = match self.sessions.answered(handle, number, now_ms) {
                    Some(Purpose::Service { name }) => self.found(now_ms, state, (&spec.id, &name), None),
                    Some(Purpose::DryRun(_)) | None => None,
                };
                Heard { propose, ..Heard::default() }
            }
            NodeUp::Goodbye => {
                let (node, incarnation) = (spec.id.clone(), spec.incarnation);
                let command = Command::LoseNode { node, incarnation, reason: "it said good-bye".into() };
                Heard { propose: Some(("goodbye", command)), ends: true, ..Heard::default() }
            }
            NodeUp::Hello { .. } => {
                tracing::warn!(node = %spec.id, "a second hello: the session ends");
                Heard { ends: true, ..Heard::default() }
            }
        }
    }

    /// Renews the node's lease. False where the node is lost, removed or another process of it joined.
    fn renew(&self, now_ms: u64, state: &ClusterState, NodeSpec { id, incarnation, .. }: &NodeSpec) -> bool {
        let is_known = |node: &NodeRecord| node.phase == NodePhase::Ready && node.spec.incarnation == *incarnation;
        state.nodes().get(id).is_some_and(is_known) && self.leases.lock().renew(id, *incarnation, now_ms)
    }

    /// What a worker found of a service's model (`None`: it was busy) is for the controller to judge.
    fn found(
        &self,
        now_ms: u64,
        state: &ClusterState,
        about: (&NodeId, &ServiceName),
        result: Option<Inspection>,
    ) -> Option<(&'static str, Command)> {
        self.controller.lock().inspected(now_ms, state, about, result).map(|command| ("facts", command))
    }
}

/// Members' records that the state lacks: the leader's own, for the first member of a group is in nobody's list before it
/// writes itself there; and those of members that run another build since they were `heard` last.
pub fn changed_records(state: &ClusterState, own: MemberRecord, heard: &BTreeMap<u64, Build>) -> Vec<Command> {
    let others = heard.iter().filter_map(|(id, build)| {
        let MemberRecord { name, address, .. } = state.members().get(id).filter(|known| known.build() != *build)?;
        Some(MemberRecord::new(*id, name, address, build.clone()))
    });
    let is_unknown = state.members().get(&own.id) != Some(&own) && !own.address.is_empty();
    others.chain(is_unknown.then_some(own)).map(|member| Command::PutMember { member }).collect()
}

/// The level that every process is at, where the cluster is below it. `own` is the leader's build.
pub fn level_to_raise(state: &ClusterState, own: &Build, status: &RaftStatus) -> Option<Command> {
    // A member that nobody wrote down has not said what it is.
    let is_known = |id: u64| id == status.member_id || state.members().contains_key(&id);
    let level = state.reachable_level(own.level);
    let may_raise = level > state.level() && status.members.iter().all(|member| is_known(member.id));
    may_raise.then_some(Command::RaiseLevel { level })
}

/// A learner that has caught up and may vote.
pub fn learner_to_promote(status: &RaftStatus) -> Option<u64> {
    let is_ready = |matched: u64| matched + CAUGHT_UP_ENTRIES >= status.commit_index;
    let mut learners = status.members.iter().filter(|member| !member.is_voter && member.is_active);
    learners.find(|member| is_ready(member.matched_index)).map(|member| member.id)
}
