//! A coordinator: a member of the raft group with its state, its watchers, and, while it leads, its sessions.
//!
//! What it is not: a server. [`crate::server`] puts it behind gRPC; `forgectl serve` has it in its own process as a group
//! of one, whose worker and gateway call it without a wire. The code behind both is this.
//!
//! Invariant: whatever changes the state goes through the log ([`Coordinator::submit`]); everything else is memory of the
//! leader that its successor rebuilds from sessions and heartbeats.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use forge_cluster::api::{GroupStatus, Listing, MemberStatus};
use forge_shared::cluster::Revision;
use forge_shared::cluster::command::{Applied, Command, Envelope};
use forge_shared::cluster::event::Kind;
use forge_shared::telemetry::{CommandLabel, CoordinatorMetrics};
use forge_shared::version::{Build, FIRST_LEVEL};
use parking_lot::{Mutex, RwLock};
use tokio::runtime::Handle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::contact::{Contact, follow_contact};
use crate::error::CoordinatorError;
use crate::leader;
use crate::leading::Leading;
use crate::raft::{self, MemberChange, PeerTransport, RaftError, RaftHandle, RaftOptions, RaftStatus};
use crate::replicated::{Machine, Replicated, decode_reply, encode_envelope, name_of};
use crate::state::ClusterState;
use crate::surroundings::Surroundings;
use crate::watch::{KindSet, Watcher};

/// Longest request id, characters.
const MAX_REQUEST_ID: usize = 128;
/// For everything to end when a coordinator is stopped.
const STOP_WITHIN: Duration = Duration::from_secs(5);
/// How often numbers that nobody announces are put into the metrics.
const METRICS_INTERVAL: Duration = Duration::from_secs(1);

/// How a coordinator is set up.
#[derive(Debug, Clone)]
pub struct CoordinatorOptions {
    /// Its raft member.
    pub raft: RaftOptions,
    /// The cluster, as in certificates. The raft group's id is this, or says which restored history of it is meant.
    pub cluster_id: String,
    /// Its name, as in its certificate.
    pub name: String,
    /// `host:port` where others reach it; empty where nobody does (embedded).
    pub address: String,
    /// A node whose heartbeats stop for this long is lost.
    pub lease: Duration,
    /// How often nodes send heartbeats.
    pub heartbeat: Duration,
    /// Its metrics.
    pub metrics: CoordinatorMetrics,
    /// Its machine.
    pub surroundings: Surroundings,
    /// What it is a build of.
    pub build: Build,
}

impl CoordinatorOptions {
    /// Usual times: leases of 3 s, heartbeats every 500 ms.
    pub fn new(raft: RaftOptions, cluster_id: &str, name: &str, address: &str) -> Self {
        CoordinatorOptions {
            raft,
            cluster_id: cluster_id.into(),
            name: name.into(),
            address: address.into(),
            lease: Duration::from_secs(3),
            heartbeat: Duration::from_millis(500),
            metrics: CoordinatorMetrics::new(),
            surroundings: Surroundings::default(),
            build: Build::default(),
        }
    }
}

/// A command and who wants it.
#[derive(Debug, Clone)]
pub(crate) struct Submission {
    pub(crate) request_id: String,
    pub(crate) traceparent: String,
    pub(crate) command: Command,
}

pub(crate) struct Inner {
    pub(crate) options: CoordinatorOptions,
    pub(crate) raft: RaftHandle,
    pub(crate) replicated: Arc<Replicated>,
    /// While this member leads and may act.
    pub(crate) leading: RwLock<Option<Arc<Leading>>>,
    /// Held alone while the level is raised, and together while somebody is let in.
    pub(crate) levels: tokio::sync::RwLock<()>,
    /// What other members said they are builds of, as far as this one heard.
    pub(crate) heard: Mutex<BTreeMap<u64, Build>>,
    pub(crate) contact: Contact,
    pub(crate) stop: CancellationToken,
    pub(crate) tasks: TaskTracker,
    /// Where sessions live, whoever begins them: a worker of the same process has a runtime of its own.
    pub(crate) runtime: Handle,
    /// The leader's clock for leases: it does not jump with the machine's.
    began: Instant,
}

/// See the module. Clones are the same coordinator.
#[derive(Clone)]
pub struct Coordinator(pub(crate) Arc<Inner>);

impl std::fmt::Debug for Coordinator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Coordinator").field("name", &self.0.options.name).finish_non_exhaustive()
    }
}

impl Coordinator {
    /// Starts it: the member recovers its log, and joins or forms its group.
    ///
    /// # Errors
    /// What is wrong with the data folder or the options.
    pub fn start(options: CoordinatorOptions, transport: Arc<dyn PeerTransport>) -> Result<Self, CoordinatorError> {
        let replicated = Replicated::new(ClusterState::new(&options.cluster_id), options.build.clone());
        let machine = Box::new(Machine(replicated.clone()));
        let raft = RaftOptions {
            metrics: options.metrics.raft.clone(),
            before_sync: options.surroundings.before_sync.clone(),
            ..options.raft.clone()
        };
        let raft = raft::start(raft, machine, transport).map_err(CoordinatorError::Raft)?;
        let stop = CancellationToken::new();
        let inner = Arc::new(Inner {
            contact: Contact::new(&stop),
            options,
            raft,
            replicated,
            leading: RwLock::new(None),
            levels: tokio::sync::RwLock::default(),
            heard: Mutex::default(),
            stop,
            tasks: TaskTracker::new(),
            runtime: Handle::current(),
            began: Instant::now(),
        });
        let coordinator = Coordinator(inner);
        let inner = &coordinator.0;
        inner.tasks.spawn(inner.replicated.hub.clone().run(inner.stop.clone()));
        inner.tasks.spawn(leader::follow_leadership(coordinator.clone()));
        inner.tasks.spawn(follow_contact(coordinator.clone()));
        inner.tasks.spawn(follow_metrics(coordinator.clone()));
        Ok(coordinator)
    }

    /// The member's handle: for the raft service and for tests.
    pub fn raft(&self) -> &RaftHandle {
        &self.0.raft
    }

    /// Its metrics.
    pub fn metrics(&self) -> &CoordinatorMetrics {
        &self.0.options.metrics
    }

    /// Whether it can answer now: it knows a leader and has applied what it knows to be committed.
    ///
    /// # Errors
    /// Why not, in a sentence.
    pub fn readiness(&self) -> Result<(), String> {
        let status = self.raft_status();
        if let Some(failure) = &status.failure {
            return Err(format!("the raft member has stopped: {failure}"));
        }
        if status.leader.is_none() {
            return Err("there is no leader: is a majority of the coordinators running and connected?".into());
        }
        if self.is_stalled() {
            return Err("the raft thread stands still: is the disk slow?".into());
        }
        if status.applied_index < status.commit_index {
            return Err(format!("applied {} of {} committed entries", status.applied_index, status.commit_index));
        }
        Ok(())
    }

    /// Stops: hands leadership to another member if it can, ends sessions, and closes the log. Bounded.
    pub async fn stop(&self) {
        let status = self.raft_status();
        if status.is_leader() {
            let heir = status.members.iter().filter(|member| member.id != status.member_id && member.is_voter && member.is_active);
            if let Some(heir) = heir.max_by_key(|member| member.matched_index) {
                match self.0.raft.transfer_leadership(heir.id, Duration::from_secs(2)).await {
                    Ok(()) => tracing::info!(to = heir.id, "leadership handed over"),
                    Err(error) => tracing::warn!(%error, "leadership was not handed over: the others elect a leader by themselves"),
                }
            }
        }
        self.0.stop.cancel();
        if let Some(leading) = self.0.leading.write().take() {
            leading.end(self.leader_address());
        }
        self.0.tasks.close();
        if tokio::time::timeout(STOP_WITHIN, self.0.tasks.wait()).await.is_err() {
            tracing::warn!("tasks of the coordinator did not end in time");
        }
        self.0.raft.stop().await;
    }

    /// Has a command applied.
    pub(crate) async fn submit(&self, submission: Submission, timeout: Duration) -> Result<Applied, CoordinatorError> {
        check_request_id(&submission.request_id)?;
        let name = name_of(&submission.command);
        let Submission { request_id, traceparent, command } = submission;
        // Before it is in the log: older members could not apply it. The level only grows, so this stays true.
        self.0.replicated.read().check_level(&command)?;
        self.0.replicated.read().check_duty(&command)?;
        // Nobody older is let in between the leader's look at who is there and the entry that older ones stop before.
        let (_joining, _raising);
        match &command {
            Command::JoinNode { .. } | Command::PutMember { .. } => _joining = self.0.levels.read().await,
            Command::RaiseLevel { level } => {
                let alone = self.0.levels.try_write();
                let state = self.0.replicated.read();
                match alone {
                    Ok(alone) if state.older_than(*level).is_empty() => _raising = alone,
                    // The leader looks again in a moment.
                    Ok(_) | Err(_) => return Ok(Applied { revision: state.revision(), changed: false, existing: None }),
                }
            }
            _ => {}
        }
        let data = encode_envelope(&Envelope { request_id, proposed_ms: self.wall_ms(), traceparent, command })?;
        let began = Instant::now();
        let result = match self.0.raft.propose(data, timeout).await {
            Ok(proposed) => match decode_reply(&proposed.reply) {
                Ok(reply) => reply.map_err(CoordinatorError::Command),
                Err(error) => Err(CoordinatorError::Unknown { reason: format!("the reply cannot be read: {error}") }),
            },
            Err(error) => Err(self.raft_error(error)),
        };
        let outcome = match &result {
            Ok(_) => "ok",
            Err(CoordinatorError::Command(_)) => "refused",
            Err(_) => "failed",
        };
        let metrics = &self.0.options.metrics;
        metrics.commands.get_or_create(&CommandLabel { command: name.into(), outcome: outcome.into() }).inc();
        metrics.command_s.observe(began.elapsed().as_secs_f64());
        result
    }

    /// Objects of a kind; no older than this call unless `is_local`.
    pub(crate) async fn list(
        &self,
        kind: Kind,
        name: Option<&str>,
        is_local: bool,
        timeout: Duration,
    ) -> Result<Listing, CoordinatorError> {
        if !is_local {
            self.0.raft.read_index(timeout).await.map_err(|error| self.raft_error(error))?;
        }
        let state = self.0.replicated.read();
        let objects = match name {
            None => state.objects(kind),
            Some(name) => state.object(kind, name).into_iter().collect(),
        };
        Ok(Listing { revision: state.revision(), objects })
    }

    /// Watches from here on, or after a revision.
    pub fn watcher(&self, kinds: KindSet, after: Option<Revision>) -> Watcher {
        let replicated = &self.0.replicated;
        replicated.hub.watch(replicated.clone(), kinds, after)
    }

    /// This member's view of the group.
    pub fn group_status(&self) -> GroupStatus {
        let raft = self.raft_status();
        let state = self.0.replicated.read();
        let records = state.members();
        let members = raft.members.iter().map(|member| {
            let record = records.get(&member.id);
            MemberStatus {
                id: member.id,
                name: record.map(|record| record.name.clone()).unwrap_or_default(),
                address: record.map(|record| record.address.clone()).unwrap_or_default(),
                version: record.map(|record| record.version.clone()).unwrap_or_default(),
                level: record.map_or(FIRST_LEVEL, |record| record.level),
                is_voter: member.is_voter,
                is_reachable: member.is_active,
                matched_index: member.matched_index,
            }
        });
        GroupStatus {
            cluster_id: self.0.options.cluster_id.clone(),
            group_id: self.0.options.raft.cluster_id.clone(),
            member_id: raft.member_id,
            leader_id: raft.leader.unwrap_or(0),
            term: raft.term,
            commit_index: raft.commit_index,
            applied_index: raft.applied_index,
            revision: state.revision(),
            members: members.collect(),
            version: self.0.options.build.version.clone(),
            level: state.level(),
            older: state.older_than(self.0.options.build.level),
        }
    }

    /// Changes who belongs to the group. Members are added by [`crate::server`]'s admission.
    pub(crate) async fn change_members(&self, change: GroupChange, timeout: Duration) -> Result<(), CoordinatorError> {
        let failed = |error| self.raft_error(error);
        match change {
            GroupChange::Promote(id) => {
                let change = MemberChange::Promote(id);
                self.0.raft.change_members(change, timeout).await.map_err(failed)
            }
            GroupChange::Transfer(id) => self.0.raft.transfer_leadership(id, timeout).await.map_err(failed),
            GroupChange::Remove(id) => {
                let status = self.raft_status();
                // Where an earlier try came half way, only the record is left.
                if status.members.iter().any(|member| member.id == id) {
                    self.0.raft.change_members(MemberChange::Remove(id), timeout).await.map_err(failed)?;
                }
                let submission = self.own(format!("remove-member-{id}-{}", status.commit_index), Command::RemoveMember { id });
                self.submit(submission, timeout).await.map(|_| ())
            }
        }
    }

    /// A member said what it is a build of. The leader writes it down.
    pub(crate) fn hear(&self, id: u64, build: &Build) {
        let mut heard = self.0.heard.lock();
        if heard.get(&id) == Some(build) {
            return;
        }
        heard.insert(id, build.clone());
        drop(heard);
        if let Some(leading) = self.0.leading.read().as_ref() {
            leading.wake.notify_one();
        }
    }

    /// A command of this coordinator's own.
    pub(crate) fn own(&self, request_id: String, command: Command) -> Submission {
        Submission { request_id, traceparent: forge_cluster::tracing::current_traceparent(), command }
    }

    pub(crate) fn raft_status(&self) -> RaftStatus {
        self.0.raft.status().borrow().clone()
    }

    /// Whether raft's thread has stood still (its disk, most likely) for so long that others may have elected a leader, of
    /// whom this member cannot know.
    pub(crate) fn is_stalled(&self) -> bool {
        let raft = &self.0.options.raft;
        let ticks = u32::try_from(2 * raft.election_ticks).unwrap_or(u32::MAX);
        self.0.raft.busy_for() > raft.tick.saturating_mul(ticks)
    }

    /// What this leader holds in memory.
    pub(crate) fn leading(&self) -> Result<Arc<Leading>, CoordinatorError> {
        if self.is_stalled() {
            return Err(CoordinatorError::NotLeader { leader: None });
        }
        let leading = self.0.leading.read().clone();
        leading.ok_or_else(|| CoordinatorError::NotLeader { leader: self.leader_address() })
    }

    /// `host:port` of the leader, where it is another member and known.
    pub(crate) fn leader_address(&self) -> Option<String> {
        let status = self.raft_status();
        status.leader.filter(|leader| *leader != status.member_id).and_then(|leader| self.member_address(leader))
    }

    pub(crate) fn member_address(&self, id: u64) -> Option<String> {
        let state = self.0.replicated.read();
        state.members().get(&id).map(|member| member.address.clone()).filter(|address| !address.is_empty())
    }

    /// Milliseconds since 1970 by this machine's clock.
    pub(crate) fn wall_ms(&self) -> u64 {
        self.0.options.surroundings.wall_ms()
    }

    /// Milliseconds on the leader's own clock.
    pub(crate) fn now_ms(&self) -> u64 {
        self.0.began.elapsed().as_millis() as u64
    }

    pub(crate) fn raft_error(&self, error: RaftError) -> CoordinatorError {
        match error {
            RaftError::NotLeader { leader } => {
                CoordinatorError::NotLeader { leader: leader.and_then(|leader| self.member_address(leader)) }
            }
            RaftError::Busy { .. } => CoordinatorError::Busy { reason: error.to_string() },
            RaftError::Unknown { why } => CoordinatorError::Unknown { reason: why },
            RaftError::Timeout { after } => {
                CoordinatorError::Late { waited_ms: after.as_millis() as u64, reason: "an answer of a majority of the coordinators".into() }
            }
            RaftError::TooLarge { bytes, limit_bytes } => {
                CoordinatorError::message("command", format!("it has {bytes} bytes; at most {limit_bytes} are taken"))
            }
            RaftError::Members(reason) => CoordinatorError::message("change", reason),
            error => CoordinatorError::Raft(error),
        }
    }
}

/// A change of the group that an operator asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum GroupChange {
    Promote(u64),
    Transfer(u64),
    Remove(u64),
}

fn check_request_id(id: &str) -> Result<(), CoordinatorError> {
    let is_visible = id.bytes().all(|byte| byte.is_ascii_graphic());
    if is_visible && (1..=MAX_REQUEST_ID).contains(&id.len()) {
        return Ok(());
    }
    Err(CoordinatorError::message("request_id", format!("1 to {MAX_REQUEST_ID} visible ASCII characters")))
}

async fn follow_metrics(coordinator: Coordinator) {
    use forge_shared::cluster::node::Role;
    use forge_shared::telemetry::RoleLabel;

    let mut status = coordinator.0.raft.status();
    let mut snapshot = (status.borrow().snapshot_index, Instant::now());
    loop {
        let now = status.borrow_and_update().clone();
        let metrics = &coordinator.0.options.metrics;
        if now.snapshot_index != snapshot.0 {
            snapshot = (now.snapshot_index, Instant::now());
        }
        metrics.raft.snapshot_index.set(now.snapshot_index as i64);
        metrics.raft.snapshot_age_s.set(snapshot.1.elapsed().as_secs() as i64);
        metrics.raft.log_bytes.set(now.log_bytes as i64);
        metrics.raft.proposals_waiting.set(now.open_proposals as i64);
        metrics.raft.disk_full.set(i64::from(now.disk == raft::DiskState::Full));
        metrics.raft_term.set(now.term as i64);
        metrics.raft_is_leader.set(i64::from(now.is_leader()));
        metrics.raft_leader_id.set(now.leader.unwrap_or(0) as i64);
        metrics.raft_commit_index.set(now.commit_index as i64);
        metrics.raft_applied_index.set(now.applied_index as i64);
        metrics.watchers.set(coordinator.0.replicated.hub.watchers() as i64);
        let leading = coordinator.0.leading.read().clone();
        for role in [Role::Worker, Role::Gateway] {
            let count = leading.as_ref().map_or(0, |leading| leading.sessions.count(role));
            metrics.sessions.get_or_create(&RoleLabel { role: role.to_string() }).set(count as i64);
        }
        tokio::select! {
            () = coordinator.0.stop.cancelled() => return,
            () = tokio::time::sleep(METRICS_INTERVAL) => {}
        }
    }
}
