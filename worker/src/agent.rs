//! `Agent`: what a worker does with its assignments. A core without I/O.
//!
//! Inputs are orders (assign, remove, drain), reports of replicas (ready, died, stopped) and the passing of
//! time; outputs are actions for the actors around it. It starts no thread, reads no clock, loads nothing.
//!
//! Invariants (property-tested below): at most one epoch of a replica runs at a time; an order or report of an
//! older epoch changes nothing (fencing); a replica that dies more than `deaths_max` times within `window_ms`
//! is given up once, and never started again under that epoch.

use std::collections::{BTreeMap, VecDeque};

use forge_shared::ids::{Epoch, Incarnation, NodeId};
use forge_shared::plan::Plan;

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

/// Name of a replica within the agent: the plan's own, as text, so that it orders.
pub type ReplicaKey = String;

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentInput {
    /// The coordinator gives this node a rank.
    Assign(Plan),
    /// The coordinator takes a replica away.
    Remove {
        /// Which.
        replica: ReplicaKey,
        /// The epoch it means.
        epoch: Epoch,
    },
    /// A replica can answer.
    Ready {
        /// Which.
        replica: ReplicaKey,
        /// Its epoch.
        epoch: Epoch,
    },
    /// A replica's actor ended by itself.
    Died {
        /// Which.
        replica: ReplicaKey,
        /// Its epoch.
        epoch: Epoch,
        /// What it said.
        reason: String,
        /// Whether another try may succeed; a model that does not load never will.
        restartable: bool,
    },
    /// A replica's actor ended because it was told to.
    Stopped {
        /// Which.
        replica: ReplicaKey,
        /// Its epoch.
        epoch: Epoch,
    },
    /// Take no more assignments and stop all replicas.
    Drain,
    /// Time has passed.
    Tick,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentAction {
    /// Start a replica's actor for this plan.
    Start(Plan),
    /// Stop a replica's actor; it answers with `Stopped`.
    Stop {
        /// Which.
        replica: ReplicaKey,
        /// Its epoch.
        epoch: Epoch,
    },
    /// A replica will not come back under this epoch: report it to whoever placed it.
    GiveUp {
        /// Which.
        replica: ReplicaKey,
        /// Its epoch.
        epoch: Epoch,
        /// The last death's reason.
        reason: String,
    },
    /// An order was refused; the reason says why.
    Refused {
        /// Why.
        reason: String,
    },
    /// All replicas are stopped after `Drain`.
    Drained,
}

/// Where a replica stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReplicaState {
    /// Its actor is loading the model.
    Starting,
    /// It answers.
    Ready,
    /// It died and is started again at this time, milliseconds.
    Waiting {
        /// When.
        at_ms: u64,
    },
    /// It was told to stop; `next` follows it.
    Stopping {
        /// A newer plan, if one came.
        next: Option<Box<Plan>>,
    },
    /// It died too often.
    GivenUp,
}

#[derive(Debug)]
struct Held {
    plan: Plan,
    state: ReplicaState,
    deaths_ms: VecDeque<u64>,
}

/// The core. See the module documentation.
#[derive(Debug)]
pub struct Agent {
    node: NodeId,
    incarnation: Incarnation,
    limits: RestartLimits,
    replicas: BTreeMap<ReplicaKey, Held>,
    draining: bool,
}

impl Agent {
    /// An agent without assignments.
    pub fn new(node: NodeId, incarnation: Incarnation, limits: RestartLimits) -> Self {
        Agent { node, incarnation, limits, replicas: BTreeMap::new(), draining: false }
    }

    /// Which node this is.
    pub fn node(&self) -> &NodeId {
        &self.node
    }

    /// Which start of it.
    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// Where a replica stands.
    pub fn state(&self, replica: &str) -> Option<&ReplicaState> {
        self.replicas.get(replica).map(|held| &held.state)
    }

    /// When `Tick` is next due, milliseconds.
    pub fn next_tick_ms(&self) -> Option<u64> {
        let due = |held: &Held| match held.state {
            ReplicaState::Waiting { at_ms } => Some(at_ms),
            _ => None,
        };
        self.replicas.values().filter_map(due).min()
    }

    /// Takes an input and says what to do. `now_ms` must not go backwards.
    pub fn handle(&mut self, now_ms: u64, input: AgentInput) -> Vec<AgentAction> {
        match input {
            AgentInput::Assign(plan) => self.assign(plan),
            AgentInput::Remove { replica, epoch } => self.remove(&replica, epoch),
            AgentInput::Ready { replica, epoch } => {
                if let Some(held) = self.current(&replica, epoch)
                    && held.state == ReplicaState::Starting
                {
                    held.state = ReplicaState::Ready;
                }
                Vec::new()
            }
            AgentInput::Died { replica, epoch, reason, restartable } => self.died(now_ms, &replica, epoch, reason, restartable),
            AgentInput::Stopped { replica, epoch } => self.stopped(&replica, epoch),
            AgentInput::Drain => self.drain(),
            AgentInput::Tick => self.tick(now_ms),
        }
    }

    fn current(&mut self, replica: &str, epoch: Epoch) -> Option<&mut Held> {
        self.replicas.get_mut(replica).filter(|held| held.plan.epoch == epoch)
    }

    fn assign(&mut self, plan: Plan) -> Vec<AgentAction> {
        if self.draining {
            return vec![AgentAction::Refused { reason: format!("node {} is draining", self.node) }];
        }
        let key = plan.replica.to_string();
        let Some(held) = self.replicas.get_mut(&key) else {
            self.replicas.insert(key, Held { plan: plan.clone(), state: ReplicaState::Starting, deaths_ms: VecDeque::new() });
            return vec![AgentAction::Start(plan)];
        };
        let newest = match &held.state {
            ReplicaState::Stopping { next: Some(next) } => next.epoch,
            _ => held.plan.epoch,
        };
        if plan.epoch <= newest {
            let reason = format!("plan of {key} has epoch {}, and this node holds epoch {newest}", plan.epoch);
            return vec![AgentAction::Refused { reason }];
        }
        match &mut held.state {
            ReplicaState::Stopping { next } => {
                *next = Some(Box::new(plan));
                Vec::new()
            }
            ReplicaState::Waiting { .. } | ReplicaState::GivenUp => {
                *held = Held { plan: plan.clone(), state: ReplicaState::Starting, deaths_ms: VecDeque::new() };
                vec![AgentAction::Start(plan)]
            }
            ReplicaState::Starting | ReplicaState::Ready => {
                let epoch = held.plan.epoch;
                held.state = ReplicaState::Stopping { next: Some(Box::new(plan)) };
                vec![AgentAction::Stop { replica: key, epoch }]
            }
        }
    }

    fn remove(&mut self, replica: &str, epoch: Epoch) -> Vec<AgentAction> {
        let Some(held) = self.current(replica, epoch) else { return Vec::new() };
        match held.state {
            ReplicaState::Starting | ReplicaState::Ready => {
                held.state = ReplicaState::Stopping { next: None };
                vec![AgentAction::Stop { replica: replica.to_owned(), epoch }]
            }
            ReplicaState::Waiting { .. } | ReplicaState::GivenUp => {
                self.replicas.remove(replica);
                self.drained()
            }
            ReplicaState::Stopping { .. } => Vec::new(),
        }
    }

    fn died(&mut self, now_ms: u64, replica: &str, epoch: Epoch, reason: String, restartable: bool) -> Vec<AgentAction> {
        let limits = self.limits;
        let Some(held) = self.current(replica, epoch) else { return Vec::new() };
        match held.state {
            // Dying instead of stopping is stopping.
            ReplicaState::Stopping { .. } => return self.stopped(replica, epoch),
            ReplicaState::Waiting { .. } | ReplicaState::GivenUp => return Vec::new(),
            ReplicaState::Starting | ReplicaState::Ready => {}
        }
        while held.deaths_ms.front().is_some_and(|death| death.saturating_add(limits.window_ms) < now_ms) {
            held.deaths_ms.pop_front();
        }
        held.deaths_ms.push_back(now_ms);
        let deaths = held.deaths_ms.len();
        if !restartable || deaths > limits.deaths_max {
            held.state = ReplicaState::GivenUp;
            return vec![AgentAction::GiveUp { replica: replica.to_owned(), epoch, reason }];
        }
        let wait_ms = limits.backoff_ms.saturating_mul(1 << (deaths - 1).min(16));
        held.state = ReplicaState::Waiting { at_ms: now_ms.saturating_add(wait_ms) };
        Vec::new()
    }

    fn stopped(&mut self, replica: &str, epoch: Epoch) -> Vec<AgentAction> {
        let draining = self.draining;
        let Some(held) = self.current(replica, epoch) else { return Vec::new() };
        let ReplicaState::Stopping { next } = &mut held.state else { return Vec::new() };
        match next.take() {
            Some(plan) if !draining => {
                let plan = *plan;
                *held = Held { plan: plan.clone(), state: ReplicaState::Starting, deaths_ms: VecDeque::new() };
                vec![AgentAction::Start(plan)]
            }
            _ => {
                self.replicas.remove(replica);
                self.drained()
            }
        }
    }

    fn drain(&mut self) -> Vec<AgentAction> {
        if self.draining {
            return Vec::new();
        }
        self.draining = true;
        self.replicas.retain(|_, held| !matches!(held.state, ReplicaState::Waiting { .. } | ReplicaState::GivenUp));
        let mut actions = Vec::new();
        for (key, held) in &mut self.replicas {
            if !matches!(held.state, ReplicaState::Stopping { .. }) {
                actions.push(AgentAction::Stop { replica: key.clone(), epoch: held.plan.epoch });
            }
            held.state = ReplicaState::Stopping { next: None };
        }
        actions.extend(self.drained());
        actions
    }

    fn drained(&self) -> Vec<AgentAction> {
        if self.draining && self.replicas.is_empty() { vec![AgentAction::Drained] } else { Vec::new() }
    }

    fn tick(&mut self, now_ms: u64) -> Vec<AgentAction> {
        let mut actions = Vec::new();
        for held in self.replicas.values_mut() {
            if matches!(held.state, ReplicaState::Waiting { at_ms } if at_ms <= now_ms) {
                held.state = ReplicaState::Starting;
                actions.push(AgentAction::Start(held.plan.clone()));
            }
        }
        actions
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use forge_shared::ids::{ReplicaId, ServiceName};
    use forge_shared::spec::KvCacheDtype;
    use proptest::prelude::*;

    use super::*;

    fn plan(index: u32, epoch: u64) -> Plan {
        Plan {
            replica: ReplicaId { service: ServiceName::from("s"), index },
            epoch: Epoch(epoch),
            max_model_len: 64,
            block_size: 16,
            kv_blocks: 4,
            kv_cache_dtype: KvCacheDtype::F32,
            max_step_tokens: 16,
            max_batch_size: 4,
            ranks: Vec::new(),
        }
    }

    fn agent() -> Agent {
        Agent::new(NodeId::from("n"), Incarnation(1), RestartLimits { deaths_max: 2, window_ms: 1000, backoff_ms: 10 })
    }

    fn died(epoch: u64) -> AgentInput {
        AgentInput::Died { replica: "s/0".into(), epoch: Epoch(epoch), reason: "boom".into(), restartable: true }
    }

    #[test]
    fn deaths_are_forgiven_with_growing_pauses_then_given_up() {
        let mut agent = agent();
        assert_eq!(agent.handle(0, AgentInput::Assign(plan(0, 1))), vec![AgentAction::Start(plan(0, 1))]);
        assert_eq!(agent.handle(5, died(1)), vec![]);
        assert_eq!(agent.next_tick_ms(), Some(15));
        assert_eq!(agent.handle(14, AgentInput::Tick), vec![]);
        assert_eq!(agent.handle(15, AgentInput::Tick), vec![AgentAction::Start(plan(0, 1))]);
        assert_eq!(agent.handle(16, died(1)), vec![]);
        assert_eq!(agent.next_tick_ms(), Some(36));
        assert_eq!(agent.handle(36, AgentInput::Tick).len(), 1);
        let given_up = AgentAction::GiveUp { replica: "s/0".into(), epoch: Epoch(1), reason: "boom".into() };
        assert_eq!(agent.handle(37, died(1)), vec![given_up]);
        assert_eq!(agent.state("s/0"), Some(&ReplicaState::GivenUp));
        assert_eq!(agent.handle(40, AgentInput::Assign(plan(0, 2))), vec![AgentAction::Start(plan(0, 2))]);
    }

    #[test]
    fn a_death_long_after_the_last_is_a_first_one() {
        let mut agent = agent();
        agent.handle(0, AgentInput::Assign(plan(0, 1)));
        for round in 0..10 {
            let now_ms = round * 5_000;
            assert_eq!(agent.handle(now_ms, died(1)), vec![]);
            assert_eq!(agent.handle(now_ms + 10, AgentInput::Tick), vec![AgentAction::Start(plan(0, 1))]);
        }
    }

    #[test]
    fn a_model_that_cannot_load_is_not_tried_again() {
        let mut agent = agent();
        agent.handle(0, AgentInput::Assign(plan(0, 1)));
        let input = AgentInput::Died { replica: "s/0".into(), epoch: Epoch(1), reason: "bad file".into(), restartable: false };
        assert_eq!(agent.handle(1, input).len(), 1);
        assert_eq!(agent.next_tick_ms(), None);
    }

    #[test]
    fn a_newer_plan_waits_for_the_older_to_stop() {
        let mut agent = agent();
        agent.handle(0, AgentInput::Assign(plan(0, 1)));
        assert_eq!(agent.handle(1, AgentInput::Assign(plan(0, 3))), vec![AgentAction::Stop { replica: "s/0".into(), epoch: Epoch(1) }]);
        assert!(matches!(agent.handle(2, AgentInput::Assign(plan(0, 2)))[..], [AgentAction::Refused { .. }]));
        let stopped = AgentInput::Stopped { replica: "s/0".into(), epoch: Epoch(1) };
        assert_eq!(agent.handle(3, stopped), vec![AgentAction::Start(plan(0, 3))]);
    }

    #[test]
    fn drain_stops_all_and_says_so() {
        let mut agent = agent();
        agent.handle(0, AgentInput::Assign(plan(0, 1)));
        agent.handle(0, AgentInput::Assign(plan(1, 1)));
        assert_eq!(agent.handle(1, AgentInput::Drain).len(), 2);
        assert!(matches!(agent.handle(1, AgentInput::Assign(plan(2, 1)))[..], [AgentAction::Refused { .. }]));
        assert_eq!(agent.handle(2, AgentInput::Stopped { replica: "s/0".into(), epoch: Epoch(1) }), vec![]);
        assert_eq!(agent.handle(2, AgentInput::Stopped { replica: "s/1".into(), epoch: Epoch(1) }), vec![AgentAction::Drained]);
    }

    fn input() -> impl Strategy<Value = AgentInput> {
        let names = (0u32..2).prop_map(|index| format!("s/{index}"));
        let epochs = (1u64..5).prop_map(Epoch);
        prop_oneof![
            (0u32..2, 1u64..5).prop_map(|(index, epoch)| AgentInput::Assign(plan(index, epoch))),
            (names.clone(), epochs.clone()).prop_map(|(replica, epoch)| AgentInput::Remove { replica, epoch }),
            (names.clone(), epochs.clone()).prop_map(|(replica, epoch)| AgentInput::Ready { replica, epoch }),
            (names.clone(), epochs.clone(), any::<bool>()).prop_map(|(replica, epoch, restartable)| AgentInput::Died {
                replica,
                epoch,
                reason: String::new(),
                restartable
            }),
            (names, epochs).prop_map(|(replica, epoch)| AgentInput::Stopped { replica, epoch }),
            Just(AgentInput::Drain),
            Just(AgentInput::Tick),
        ]
    }

    proptest! {
        #[test]
        fn one_epoch_of_a_replica_runs_at_a_time(inputs in proptest::collection::vec((0u64..200, input()), 0..60)) {
            let mut agent = agent();
            let mut now_ms = 0;
            // Actors alive, as the world around the agent sees them.
            let mut alive: BTreeSet<(String, u64)> = BTreeSet::new();
            for (pause_ms, input) in inputs {
                now_ms += pause_ms;
                // Only what is alive can die or stop.
                match &input {
                    AgentInput::Died { replica, epoch, .. } | AgentInput::Stopped { replica, epoch } => {
                        if matches!(input, AgentInput::Stopped { .. }) && !matches!(agent.state(replica), Some(ReplicaState::Stopping { .. })) {
                            continue;
                        }
                        if !alive.remove(&(replica.clone(), epoch.0)) {
                            continue;
                        }
                    }
                    _ => {}
                }
                for action in agent.handle(now_ms, input) {
                    if let AgentAction::Start(plan) = action {
                        let key = plan.replica.to_string();
                        prop_assert!(!alive.iter().any(|(name, _)| *name == key), "two actors of {}", key);
                        alive.insert((key, plan.epoch.0));
                    }
                }
            }
        }
    }
}
