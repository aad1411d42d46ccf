//! What a coordinator does while it leads: lets [`Leading`] decide, and proposes what it decided.
//!
//! What it is not: it decides nothing itself; it waits, and carries out.
//!
//! Invariants: it acts only in a term that is its own and after everything of earlier terms is applied here; with the
//! leadership all sessions end.

use std::sync::Arc;
use std::time::Duration;

use forge_shared::cluster::command::{Command, MemberRecord};
use futures::StreamExt;
use tokio::time::{Instant, MissedTickBehavior};

use crate::coordinator::Coordinator;
use crate::error::CoordinatorError;
use crate::leading::{LeaderOptions, Leading, changed_records, learner_to_promote, level_to_raise};
use crate::raft::{MemberChange, RaftStatus};

/// How often leases are looked at.
const TICK: Duration = Duration::from_millis(100);
/// A burst of changes is one pass of the controller.
const PASS_INTERVAL: Duration = Duration::from_millis(10);
/// For one of the leader's own commands.
const PROPOSE_WITHIN: Duration = Duration::from_secs(2);
/// The leader's own commands in flight.
const PROPOSALS_AT_ONCE: usize = 64;
/// How often learners are looked at.
const PROMOTE_INTERVAL: Duration = Duration::from_millis(500);

impl Coordinator {
    /// A leader's memory for a term that begins now.
    pub(crate) fn begin_to_lead(&self, term: u64) -> Leading {
        let options = &self.0.options;
        let options = LeaderOptions {
            history: options.raft.cluster_id.clone(),
            lease_ms: options.lease.as_millis() as u64,
            heartbeat_ms: options.heartbeat.as_millis() as u64,
        };
        Leading::new(options, term, self.now_ms(), &self.0.replicated.read())
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
    // What was heard of members before may be of processes that have ended since.
    coordinator.0.heard.lock().clear();
    let leading = Arc::new(coordinator.begin_to_lead(term));
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
        leading.pulse(coordinator.now_ms());
        tokio::time::sleep(TICK).await;
    }
}

async fn passes(coordinator: &Coordinator, leading: &Arc<Leading>) {
    let mut changes = coordinator.0.replicated.changes();
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut pass = Pass { coordinator, leading, promoted: Instant::now() };
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
    promoted: Instant,
}

impl Pass<'_> {
    async fn run(&mut self) {
        let commands = {
            let state = self.coordinator.0.replicated.read();
            self.leading.pass(self.coordinator.now_ms(), &state, self.coordinator.is_stalled())
        };
        let Some(commands) = commands else { return };
        futures::stream::iter(commands).for_each_concurrent(PROPOSALS_AT_ONCE, |command| self.propose(command)).await;
        self.keep_records().await;
        self.raise_level().await;
        if self.promoted.elapsed() >= PROMOTE_INTERVAL {
            self.promoted = Instant::now();
            self.promote_learner().await;
        }
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

    async fn keep_records(&self) {
        let options = &self.coordinator.0.options;
        let own = MemberRecord::new(options.raft.member_id, &options.name, &options.address, options.build.clone());
        let changed = {
            let state = self.coordinator.0.replicated.read();
            let mut heard = self.coordinator.0.heard.lock();
            heard.retain(|id, _| !state.is_removed_member(*id));
            changed_records(&state, own, &heard)
        };
        for command in changed {
            self.propose(command).await;
        }
    }

    /// What every process knows may be used from now on.
    async fn raise_level(&self) {
        let raise = {
            let state = self.coordinator.0.replicated.read();
            level_to_raise(&state, &self.coordinator.0.options.build, &self.coordinator.raft_status())
        };
        if let Some(command) = raise {
            self.propose(command).await;
        }
    }

    async fn promote_learner(&self) {
        if let Some(learner) = learner_to_promote(&self.coordinator.raft_status()) {
            match self.coordinator.0.raft.change_members(MemberChange::Promote(learner), PROPOSE_WITHIN).await {
                Ok(()) => tracing::info!(member = learner, "a coordinator caught up and votes now"),
                Err(error) => tracing::warn!(member = learner, %error, "a learner was not made a voter"),
            }
        }
    }
}
