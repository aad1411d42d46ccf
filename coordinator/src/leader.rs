//! What a coordinator does while it leads: looks after leases, lets the controller decide, proposes what it decided, tells
//! workers what to run.
//!
//! Invariants: it acts only in a term that is its own and after everything of earlier terms is applied here; a new leader
//! gives every known node two leases' time before it believes one lost; with the leadership all sessions end.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use forge_shared::cluster::Revision;
use forge_shared::cluster::command::{Command, MemberRecord};
use forge_shared::cluster::node::{NodePhase, Role};
use forge_shared::cluster::session::NodeDown;
use forge_shared::ids::ServiceName;
use futures::StreamExt;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::control::{Controller, Intent, LeaseTable, ShareTable, assignments};
use crate::coordinator::Coordinator;
use crate::error::CoordinatorError;
use crate::raft::{MemberChange, RaftStatus};
use crate::sessions::{Purpose, Sessions};

/// How often leases are looked at.
const TICK: Duration = Duration::from_millis(100);
/// A burst of changes is one pass of the controller.
const PASS_INTERVAL: Duration = Duration::from_millis(10);
/// For one of the leader's own commands.
const PROPOSE_WITHIN: Duration = Duration::from_secs(2);
/// The leader's own commands in flight.
const PROPOSALS_AT_ONCE: usize = 64;
/// For a worker to look at a model: headers over the network.
pub(crate) const INSPECT_WITHIN: Duration = Duration::from_secs(120);
/// A learner that is within so many entries of the leader's is made a voter.
const CAUGHT_UP_ENTRIES: u64 = 100;
/// How often learners are looked at.
const PROMOTE_INTERVAL: Duration = Duration::from_millis(500);

/// What a leader holds in memory, for one term.
pub(crate) struct Leading {
    pub(crate) term: u64,
    pub(crate) sessions: Sessions,
    pub(crate) leases: Mutex<LeaseTable>,
    pub(crate) shares: Mutex<ShareTable>,
    pub(crate) controller: Mutex<Controller>,
    /// Asks for a pass of the controller.
    pub(crate) wake: Notify,
    /// Cancelled with the leadership.
    pub(crate) ended: CancellationToken,
    counter: AtomicU64,
}

impl Leading {
    /// A leader's memory at the beginning of a term: it gives every known node one full lease.
    pub(crate) fn new(coordinator: &Coordinator, term: u64) -> Leading {
        let mut leases = LeaseTable::new(coordinator.0.options.lease.as_millis() as u64);
        leases.follow(coordinator.now_ms(), &coordinator.0.replicated.read());
        Leading {
            term,
            sessions: Sessions::default(),
            leases: Mutex::new(leases),
            shares: Mutex::new(ShareTable::new()),
            controller: Mutex::new(Controller::default()),
            wake: Notify::new(),
            ended: CancellationToken::new(),
            counter: AtomicU64::new(0),
        }
    }

    /// Ends every session, saying where to go. The token first: a session that begins meanwhile looks at it once it is in the
    /// table, so that either it or this finds the other.
    pub(crate) fn end(&self, leader: Option<String>) {
        self.ended.cancel();
        self.sessions.end_all(leader);
    }

    /// A request id of the leader's own, never given out before.
    pub(crate) fn request_id(&self, what: &str) -> String {
        format!("leader-{}-{what}-{}", self.term, self.counter.fetch_add(1, Ordering::Relaxed))
    }
}

/// Leads whenever this member is the leader, until it is stopped.
pub(crate) async fn follow_leadership(coordinator: Coordinator) {
    let mut status = coordinator.0.raft.status();
    loop {
        let now = status.borrow_and_update().clone();
        if now.is_leader() {
            let term = now.term;
            let until_lost = wait_for_loss(&coordinator, term);
            tokio::select! {
                () = coordinator.0.stop.cancelled() => {}
                () = until_lost => {}
                () = lead(&coordinator, term) => {}
            }
            if let Some(leading) = coordinator.0.leading.write().take() {
                let leader = coordinator.leader_address();
                tracing::info!(term, ?leader, "no longer the leader");
                leading.end(leader);
            }
        }
        tokio::select! {
            () = coordinator.0.stop.cancelled() => return,
            changed = status.changed() => if changed.is_err() { return },
        }
    }
}

async fn wait_for_loss(coordinator: &Coordinator, term: u64) {
    let mut status = coordinator.0.raft.status();
    let is_other = |status: &RaftStatus| !status.is_leader() || status.term != term;
    // An error is the end of the member, and with it of its leadership.
    let _ = status.wait_for(is_other).await;
}

async fn lead(coordinator: &Coordinator, term: u64) {
    // What earlier terms left in the log must be applied here before anything is decided from the state.
    while let Err(error) = coordinator.0.raft.read_index(PROPOSE_WITHIN).await {
        tracing::debug!(%error, "the new leader waits for its first word");
        tokio::time::sleep(TICK).await;
    }
    let leading = Arc::new(Leading::new(coordinator, term));
    *coordinator.0.leading.write() = Some(leading.clone());
    tracing::info!(term, "leading");

    tokio::select! {
        () = passes(coordinator, &leading) => {}
        () = pulses(coordinator, &leading) => {}
    }
}

/// Says all the time that this process runs, also while a pass waits for the group.
async fn pulses(coordinator: &Coordinator, leading: &Leading) {
    loop {
        pulse(leading, coordinator.now_ms());
        tokio::time::sleep(TICK).await;
    }
}

fn pulse(leading: &Leading, now_ms: u64) {
    if let Some(still_ms) = leading.leases.lock().pulse(now_ms) {
        tracing::warn!(still_ms, "this process stood still: nodes have a lease's time to be heard again");
    }
}

async fn passes(coordinator: &Coordinator, leading: &Arc<Leading>) {
    let mut changes = coordinator.0.replicated.changes();
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut pass = Pass { coordinator, leading, assigned: None, promoted: Instant::now(), was_stalled: false };
    loop {
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = leading.wake.notified() => {}
            _ = tick.tick() => {}
        }
        changes.borrow_and_update();
        pass.run().await;
        tokio::time::sleep(PASS_INTERVAL).await;
    }
}

/// One look at everything, repeated.
struct Pass<'a> {
    coordinator: &'a Coordinator,
    leading: &'a Arc<Leading>,
    /// Revision of the last assignments.
    assigned: Option<Revision>,
    promoted: Instant,
    /// Raft's thread stood still at the last pass.
    was_stalled: bool,
}

impl Pass<'_> {
    async fn run(&mut self) {
        if self.coordinator.is_stalled() {
            // Sessions have ended, and what would be proposed now of the nodes' silence would be carried out afterwards.
            if !std::mem::replace(&mut self.was_stalled, true) {
                tracing::warn!("the raft thread stands still: is the disk slow? Nothing is decided until it goes on");
            }
            return;
        }
        if std::mem::take(&mut self.was_stalled) {
            self.leading.leases.lock().begin_anew(self.coordinator.now_ms());
        }
        let mut commands = Vec::new();
        for intent in self.decide() {
            match intent {
                Intent::Propose(command) => commands.push(command),
                Intent::Inspect { node, service, .. } => {
                    let purpose = Purpose::Service { name: ServiceName(service.metadata.name.clone()) };
                    self.leading.sessions.ask(&node, *service, purpose, INSPECT_WITHIN, Instant::now());
                }
            }
        }
        commands.extend(self.unanswered());
        futures::stream::iter(commands).for_each_concurrent(PROPOSALS_AT_ONCE, |command| self.propose(command)).await;
        self.keep_own_record().await;
        if self.promoted.elapsed() >= PROMOTE_INTERVAL {
            self.promoted = Instant::now();
            self.promote_learner().await;
        }
    }

    /// Tells the controller of questions that nobody will answer.
    fn unanswered(&self) -> Vec<Command> {
        let unanswered = self.leading.sessions.take_unanswered(Instant::now());
        if unanswered.is_empty() {
            return Vec::new();
        }
        let state = self.coordinator.0.replicated.read();
        let mut controller = self.leading.controller.lock();
        let now_ms = self.coordinator.now_ms();
        unanswered.iter().filter_map(|(node, name)| controller.inspected(now_ms, &state, (node, name), None)).collect()
    }

    /// Reads the state once: ends sessions of nodes that are lost, tells workers their assignments, asks the controller.
    fn decide(&mut self) -> Vec<Intent> {
        let state = self.coordinator.0.replicated.read();
        let sessions = &self.leading.sessions;
        if self.assigned != Some(state.revision()) {
            sessions.end_where(|spec| match state.nodes().get(&spec.id) {
                // Forgotten while it was away, and welcome again.
                None if spec.role == Role::Gateway => Some(NodeDown::Moved { leader: None }),
                None => Some(NodeDown::Refused { reason: format!("node {} was removed: join it anew", spec.id) }),
                Some(record) if record.spec.incarnation > spec.incarnation => {
                    Some(NodeDown::Refused { reason: format!("a newer process joined as {}", spec.id) })
                }
                // It may come again: its replicas are elsewhere by then.
                Some(record) if record.phase == NodePhase::Lost => Some(NodeDown::Moved { leader: None }),
                Some(_) => None,
            });
            self.assigned = Some(state.revision());
        }
        let history = &self.coordinator.0.options.raft.cluster_id;
        sessions.assign((history, state.revision()), |node| assignments(&state, node));
        let now_ms = self.coordinator.now_ms();
        // Before anybody is given up: the clock may have gone on while this process did not.
        pulse(self.leading, now_ms);
        let mut leases = self.leading.leases.lock();
        leases.follow(now_ms, &state);
        self.leading.controller.lock().decide(now_ms, &state, &leases)
    }

    async fn propose(&self, command: Command) {
        let what = crate::replicated::name_of(&command);
        let submission = self.coordinator.own(self.leading.request_id(what), command);
        match self.coordinator.submit(submission, PROPOSE_WITHIN).await {
            Ok(applied) => tracing::debug!(what, revision = %applied.revision, "the leader's command was applied"),
            // The state went on meanwhile: the next pass decides anew.
            Err(CoordinatorError::Command(error)) => tracing::debug!(what, %error, "the leader's command was refused"),
            Err(error) => tracing::warn!(what, %error, "the leader's command came to nothing"),
        }
    }

    /// The first member of a group is in nobody's list before it writes itself there.
    async fn keep_own_record(&self) {
        let options = &self.coordinator.0.options;
        let record = MemberRecord { id: options.raft.member_id, name: options.name.clone(), address: options.address.clone() };
        let is_known = self.coordinator.0.replicated.read().members().get(&record.id) == Some(&record);
        if !is_known && !options.address.is_empty() {
            self.propose(Command::PutMember { member: record }).await;
        }
    }

    async fn promote_learner(&self) {
        let status = self.coordinator.raft_status();
        let is_ready = |matched: u64| matched + CAUGHT_UP_ENTRIES >= status.commit_index;
        let learner = status.members.iter().find(|member| !member.is_voter && member.is_active && is_ready(member.matched_index));
        if let Some(learner) = learner {
            match self.coordinator.0.raft.change_members(MemberChange::Promote(learner.id), PROPOSE_WITHIN).await {
                Ok(()) => tracing::info!(member = learner.id, "a coordinator caught up and votes now"),
                Err(error) => tracing::warn!(member = learner.id, %error, "a learner was not made a voter"),
            }
        }
    }
}
