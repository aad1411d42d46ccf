//! `Agent`: what a worker does with its assignments. A core without I/O.
//!
//! Inputs are the whole set of assignments, reports of replicas (progress, ready, died, stopped), the loss of the lease
//! and the passing of time; outputs are actions for the actors around it. It starts no thread, reads no clock, loads
//! nothing.
//!
//! A *run* is one epoch of one replica: while a replacement is made ready, the old epoch serves on, so a node may hold
//! two runs of one replica.
//!
//! Invariants (property-tested in `tests.rs`): a run is never started while it runs; nothing starts while a run that was
//! told to end at once still holds memory; a set older than the last, and an epoch older than the newest ever seen of its
//! replica, start nothing (fencing); what is missing from a set ends; a run that dies more than `deaths_max` times within
//! `window_ms` is given up once.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;

use forge_shared::cluster::Revision;
use forge_shared::cluster::service::{ReplicaPhase, ReplicaReport, ReplicaStatus};
use forge_shared::cluster::session::Assignment;
use forge_shared::ids::{Epoch, Incarnation, NodeId};
use forge_shared::plan::Plan;

#[cfg(test)]
mod tests;

/// How often a replica may die before it is given up, and how long to wait before the next try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RestartLimits {
    /// Deaths within the window that are forgiven.
    pub deaths_max: usize,
    /// The window, milliseconds.
    pub window_ms: u64,
    /// Wait after the first death; doubles with every further one in the window, milliseconds.
    pub backoff_ms: u64,
}

impl Default for RestartLimits {
    fn default() -> Self {
        RestartLimits { deaths_max: 3, window_ms: 60_000, backoff_ms: 50 }
    }
}

/// One epoch of one replica.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RunId {
    /// `service/index`.
    pub replica: String,
    /// Of its plan.
    pub epoch: Epoch,
}

impl RunId {
    /// The run that carries out a plan.
    pub fn of(plan: &Plan) -> Self {
        RunId { replica: plan.replica.to_string(), epoch: plan.epoch }
    }
}

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} epoch {}", self.replica, self.epoch)
    }
}

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum AgentInput {
    /// Everything this node is to run.
    Assignments {
        /// The raft group that says so. Those of another group than before are no older or newer: they are taken.
        history: String,
        /// The state they come from; a set older than the last one changes nothing.
        revision: Revision,
        /// What is not in it ends.
        assignments: Vec<Assignment>,
    },
    /// A run is on its way.
    Progress {
        /// Which.
        run: RunId,
        /// Pulling or loading.
        phase: ReplicaPhase,
        /// Share done, 0 to 100.
        percent: u8,
    },
    /// A run can answer.
    Ready {
        /// Which.
        run: RunId,
        /// Of its engine.
        numerics_id: String,
    },
    /// A run's actor ended by itself.
    Died {
        /// Which.
        run: RunId,
        /// What happened.
        death: Death,
    },
    /// A run's actor ended because it was told to.
    Stopped {
        /// Which.
        run: RunId,
    },
    /// The cluster lives and has given this node up: nothing of it may serve any more.
    Expired,
    /// A session began: say again where every run stands.
    Connected,
    /// Take no more assignments and stop all replicas, letting running requests finish.
    Drain {
        /// For how long.
        timeout_ms: u64,
    },
    /// Time has passed.
    Tick,
}

/// Why a run ended by itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Death {
    /// What it said.
    pub reason: String,
    /// Whether another try may succeed; a model that does not load never will.
    pub restartable: bool,
    /// Bytes Forge may really use on its device, where they were fewer than the node had said.
    pub found_memory_bytes: Option<u64>,
    /// By whose fault, where several workers share the replica and that is known.
    pub fault: Option<NodeId>,
}

/// What to do.
#[derive(Debug, Clone, PartialEq)]
pub enum AgentAction {
    /// Start a run.
    Start {
        /// What it carries out.
        assignment: Box<Assignment>,
        /// Whether it ran before under this plan and died.
        is_restart: bool,
    },
    /// Stop a run's actor; it answers with `Stopped`. A second one shortens the time.
    Stop {
        /// Which.
        run: RunId,
        /// For requests under way.
        timeout_ms: u64,
    },
    /// Nothing of this run is left.
    Forget(RunId),
    /// Tell the coordinators.
    Report(Box<ReplicaReport>),
    /// Something was refused; the reason says why.
    Refused {
        /// Why.
        reason: String,
    },
    /// All replicas are stopped after `Drain`.
    Drained,
}

/// Where a run stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunState {
    /// It waits for the memory of runs that are ending.
    Queued,
    /// Its actor pulls and loads the model.
    Starting,
    /// It answers.
    Ready,
    /// It died and is started again at this time, milliseconds.
    Waiting {
        /// When.
        at_ms: u64,
    },
    /// It was told to stop.
    Stopping {
        /// At once, rather than when its requests are done.
        at_once: bool,
        /// It was assigned again in the meantime.
        again: bool,
    },
    /// It died too often, or cannot be started.
    GivenUp,
}

#[derive(Debug)]
struct Held {
    assignment: Assignment,
    state: RunState,
    status: ReplicaStatus,
    found_memory_bytes: Option<u64>,
    deaths_ms: VecDeque<u64>,
}

impl Held {
    fn report(&self) -> AgentAction {
        AgentAction::Report(Box::new(ReplicaReport {
            replica: self.assignment.plan.replica.clone(),
            epoch: self.assignment.plan.epoch,
            status: self.status.clone(),
            found_memory_bytes: self.found_memory_bytes,
        }))
    }

    fn phase(&mut self, phase: ReplicaPhase, percent: u8, reason: &str) -> AgentAction {
        self.status.phase = phase;
        self.status.percent = percent;
        self.status.reason = reason.to_owned();
        self.report()
    }

    /// Whether an actor of it exists.
    fn has_actor(&self) -> bool {
        matches!(self.state, RunState::Starting | RunState::Ready | RunState::Stopping { .. })
    }
}

/// The core. See the module documentation.
#[derive(Debug)]
pub struct Agent {
    node: NodeId,
    incarnation: Incarnation,
    limits: RestartLimits,
    runs: BTreeMap<RunId, Held>,
    /// Newest epoch ever seen of each replica.
    newest: BTreeMap<String, Epoch>,
    /// The group whose revisions and epochs are compared.
    history: String,
    revision: Revision,
    draining: bool,
}

impl Agent {
    /// An agent without assignments.
    pub fn new(node: NodeId, incarnation: Incarnation, limits: RestartLimits) -> Self {
        let (runs, newest) = (BTreeMap::new(), BTreeMap::new());
        Agent { node, incarnation, limits, runs, newest, history: String::new(), revision: Revision(0), draining: false }
    }

    /// Which node this is.
    pub fn node(&self) -> &NodeId {
        &self.node
    }

    /// Which start of it.
    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// Where a run stands.
    pub fn state(&self, run: &RunId) -> Option<&RunState> {
        self.runs.get(run).map(|held| &held.state)
    }

    /// Where each run stands, as it was last reported.
    pub fn phases(&self) -> impl Iterator<Item = ReplicaPhase> {
        self.runs.values().map(|held| held.status.phase)
    }

    /// When `Tick` is next due, milliseconds.
    pub fn next_tick_ms(&self) -> Option<u64> {
        let due = |held: &Held| match held.state {
            RunState::Waiting { at_ms } => Some(at_ms),
            _ => None,
        };
        self.runs.values().filter_map(due).min()
    }

    /// Takes an input and says what to do, in order. `now_ms` must not go backwards.
    pub fn handle(&mut self, now_ms: u64, input: AgentInput) -> Vec<AgentAction> {
        let mut actions = match input {
            AgentInput::Assignments { history, revision, assignments } => self.assignments(history, revision, assignments),
            AgentInput::Progress { run, phase, percent } => self.progress(&run, phase, percent),
            AgentInput::Ready { run, numerics_id } => self.ready(&run, numerics_id),
            AgentInput::Died { run, death } => self.died(now_ms, &run, death),
            AgentInput::Stopped { run } => self.stopped(&run),
            AgentInput::Expired => self.expired(),
            AgentInput::Connected => self.runs.values().map(Held::report).collect(),
            AgentInput::Drain { timeout_ms } => self.drain(timeout_ms),
            AgentInput::Tick => self.tick(now_ms),
        };
        self.start_queued(&mut actions);
        actions
    }

    fn assignments(&mut self, history: String, revision: Revision, assignments: Vec<Assignment>) -> Vec<AgentAction> {
        if history != self.history {
            // A cluster that was restored counts on from its backup.
            self.history = history;
            self.revision = Revision(0);
            self.newest.clear();
        }
        if revision < self.revision {
            let reason = format!("assignments of revision {revision}, and this node has those of {}", self.revision);
            return vec![AgentAction::Refused { reason }];
        }
        self.revision = revision;
        if self.draining {
            return vec![AgentAction::Refused { reason: format!("node {} is draining", self.node) }];
        }
        let wanted: BTreeMap<RunId, Assignment> =
            assignments.into_iter().map(|assignment| (RunId::of(&assignment.plan), assignment)).collect();
        // Another history may mean another plan by the same epoch.
        let is_kept = |run: &RunId, held: &Held| wanted.get(run).is_some_and(|new| new.plan == held.assignment.plan);
        let missing: Vec<RunId> = self.runs.iter().filter(|(run, held)| !is_kept(run, held)).map(|(run, _)| run.clone()).collect();
        let mut actions: Vec<AgentAction> = missing.iter().flat_map(|run| self.end(run)).collect();
        for (run, assignment) in wanted {
            actions.extend(self.assign(run, assignment));
        }
        actions
    }

    fn assign(&mut self, run: RunId, assignment: Assignment) -> Vec<AgentAction> {
        let Some(held) = self.runs.get_mut(&run) else { return self.begin(run, assignment) };
        let drain_ms = assignment.drain_ms;
        match (&mut held.state, drain_ms) {
            (RunState::Stopping { again, .. }, None) => {
                *again = true;
                held.assignment = assignment;
                Vec::new()
            }
            (RunState::Starting | RunState::Ready, Some(timeout_ms)) => {
                held.state = RunState::Stopping { at_once: false, again: false };
                vec![held.phase(ReplicaPhase::Draining, 0, ""), AgentAction::Stop { run, timeout_ms }]
            }
            (RunState::Queued | RunState::Waiting { .. } | RunState::GivenUp, Some(_)) => {
                let report = held.phase(ReplicaPhase::Stopped, 100, "");
                self.runs.remove(&run);
                vec![report, AgentAction::Forget(run)]
            }
            (RunState::Stopping { .. }, Some(_)) | (_, None) => Vec::new(),
        }
    }

    fn begin(&mut self, run: RunId, assignment: Assignment) -> Vec<AgentAction> {
        let newest = self.newest.entry(run.replica.clone()).or_default();
        let status = ReplicaStatus::placed();
        let mut held = Held { assignment, state: RunState::Queued, status, found_memory_bytes: None, deaths_ms: VecDeque::new() };
        if run.epoch < *newest && held.assignment.drain_ms.is_none() {
            // Said, for whoever assigned it counts on it: a group that was restored from an older backup plans it anew.
            let reason = format!("plan of {run}, and this node has seen epoch {newest} of it");
            return vec![held.phase(ReplicaPhase::Failed, 0, &reason), AgentAction::Refused { reason }];
        }
        *newest = run.epoch.max(*newest);
        if held.assignment.drain_ms.is_some() {
            // Nothing of it runs: it has drained.
            return vec![held.phase(ReplicaPhase::Stopped, 100, "")];
        }
        self.runs.insert(run, held);
        Vec::new()
    }

    /// Ends a run at once.
    fn end(&mut self, run: &RunId) -> Vec<AgentAction> {
        let Some(held) = self.runs.get_mut(run) else { return Vec::new() };
        match &mut held.state {
            RunState::Starting | RunState::Ready => held.state = RunState::Stopping { at_once: true, again: false },
            RunState::Stopping { at_once, again } => {
                *again = false;
                if std::mem::replace(at_once, true) {
                    return Vec::new();
                }
            }
            RunState::Queued | RunState::Waiting { .. } | RunState::GivenUp => {
                self.runs.remove(run);
                let mut actions = vec![AgentAction::Forget(run.clone())];
                actions.extend(self.drained());
                return actions;
            }
        }
        vec![AgentAction::Stop { run: run.clone(), timeout_ms: 0 }]
    }

    fn progress(&mut self, run: &RunId, phase: ReplicaPhase, percent: u8) -> Vec<AgentAction> {
        let Some(held) = self.runs.get_mut(run).filter(|held| held.state == RunState::Starting) else { return Vec::new() };
        if (held.status.phase, held.status.percent) == (phase, percent) {
            return Vec::new();
        }
        vec![held.phase(phase, percent.min(100), "")]
    }

    fn ready(&mut self, run: &RunId, numerics_id: String) -> Vec<AgentAction> {
        let Some(held) = self.runs.get_mut(run).filter(|held| held.state == RunState::Starting) else { return Vec::new() };
        held.state = RunState::Ready;
        held.status.numerics_id = numerics_id;
        vec![held.phase(ReplicaPhase::Ready, 100, "")]
    }

    fn died(&mut self, now_ms: u64, run: &RunId, death: Death) -> Vec<AgentAction> {
        let limits = self.limits;
        let Some(held) = self.runs.get_mut(run) else { return Vec::new() };
        match held.state {
            // Dying instead of stopping is stopping.
            RunState::Stopping { .. } => return self.stopped(run),
            RunState::Queued | RunState::Waiting { .. } | RunState::GivenUp => return Vec::new(),
            RunState::Starting | RunState::Ready => {}
        }
        while held.deaths_ms.front().is_some_and(|death| death.saturating_add(limits.window_ms) < now_ms) {
            held.deaths_ms.pop_front();
        }
        held.deaths_ms.push_back(now_ms);
        let deaths = held.deaths_ms.len();
        held.found_memory_bytes = death.found_memory_bytes;
        held.status.fault = death.fault;
        if !death.restartable || deaths > limits.deaths_max {
            held.state = RunState::GivenUp;
            return vec![held.phase(ReplicaPhase::Failed, 0, &death.reason)];
        }
        let wait_ms = limits.backoff_ms.saturating_mul(1 << (deaths - 1).min(16));
        held.state = RunState::Waiting { at_ms: now_ms.saturating_add(wait_ms) };
        held.status.restarts = held.status.restarts.saturating_add(1);
        vec![held.phase(ReplicaPhase::Loading, 0, &format!("it is started again after it died: {}", death.reason))]
    }

    fn stopped(&mut self, run: &RunId) -> Vec<AgentAction> {
        let draining = self.draining;
        let Some(held) = self.runs.get_mut(run) else { return Vec::new() };
        let RunState::Stopping { again, .. } = held.state else { return Vec::new() };
        if again && !draining {
            held.state = RunState::Queued;
            return vec![held.phase(ReplicaPhase::Placed, 0, "")];
        }
        let report = held.phase(ReplicaPhase::Stopped, 100, "");
        self.runs.remove(run);
        let mut actions = vec![report, AgentAction::Forget(run.clone())];
        actions.extend(self.drained());
        actions
    }

    fn expired(&mut self) -> Vec<AgentAction> {
        let all: Vec<RunId> = self.runs.keys().cloned().collect();
        all.iter().flat_map(|run| self.end(run)).collect()
    }

    fn drain(&mut self, timeout_ms: u64) -> Vec<AgentAction> {
        if self.draining {
            return Vec::new();
        }
        self.draining = true;
        let mut actions = Vec::new();
        let idle: Vec<RunId> = self.runs.iter().filter(|(_, held)| !held.has_actor()).map(|(run, _)| run.clone()).collect();
        for run in idle {
            self.runs.remove(&run);
            actions.push(AgentAction::Forget(run));
        }
        for (run, held) in &mut self.runs {
            match &mut held.state {
                RunState::Stopping { again, .. } => *again = false,
                state => {
                    *state = RunState::Stopping { at_once: false, again: false };
                    actions.push(held.phase(ReplicaPhase::Draining, 0, "its node is shutting down"));
                    actions.push(AgentAction::Stop { run: run.clone(), timeout_ms });
                }
            }
        }
        actions.extend(self.drained());
        actions
    }

    fn drained(&self) -> Option<AgentAction> {
        (self.draining && self.runs.is_empty()).then_some(AgentAction::Drained)
    }

    fn tick(&mut self, now_ms: u64) -> Vec<AgentAction> {
        for held in self.runs.values_mut() {
            if matches!(held.state, RunState::Waiting { at_ms } if at_ms <= now_ms) {
                held.state = RunState::Queued;
            }
        }
        Vec::new()
    }

    fn start_queued(&mut self, actions: &mut Vec<AgentAction>) {
        let ending = self.runs.values().any(|held| matches!(held.state, RunState::Stopping { at_once: true, .. }));
        if ending || self.draining {
            return;
        }
        for held in self.runs.values_mut().filter(|held| held.state == RunState::Queued) {
            held.state = RunState::Starting;
            let is_restart = held.status.restarts > 0;
            actions.push(AgentAction::Start { assignment: Box::new(held.assignment.clone()), is_restart });
        }
    }
}
