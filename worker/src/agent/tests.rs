//! The agent alone, by example and by property.

use std::collections::{BTreeMap, BTreeSet};

use forge_shared::ids::{ReplicaId, ServiceName};
use forge_shared::spec::{KvCacheDtype, ModelService, ModelServiceSpec};
use proptest::prelude::*;

use super::*;

fn assignment(index: u32, epoch: u64) -> Assignment {
    let plan = Plan {
        replica: ReplicaId { service: ServiceName::from("s"), index },
        epoch: Epoch(epoch),
        max_model_len: 64,
        block_size: 16,
        kv_blocks: 4,
        kv_cache_dtype: KvCacheDtype::F32,
        max_step_tokens: 16,
        max_batch_size: 4,
        ranks: Vec::new(),
    };
    let service = Box::new(ModelService::new("s", ModelServiceSpec { model: "m".into(), ..Default::default() }));
    Assignment { plan, service, weights_digest: String::new(), drain_ms: None, peers: Vec::new() }
}

fn draining(index: u32, epoch: u64, drain_ms: u64) -> Assignment {
    Assignment { drain_ms: Some(drain_ms), ..assignment(index, epoch) }
}

fn set(revision: u64, assignments: Vec<Assignment>) -> AgentInput {
    AgentInput::Assignments { history: "g".into(), revision: Revision(revision), assignments }
}

fn run(index: u32, epoch: u64) -> RunId {
    RunId { replica: format!("s/{index}"), epoch: Epoch(epoch) }
}

fn agent() -> Agent {
    Agent::new(NodeId::from("n"), Incarnation(1), RestartLimits { deaths_max: 2, window_ms: 1000, backoff_ms: 10 })
}

fn died(epoch: u64) -> AgentInput {
    AgentInput::Died {
        run: run(0, epoch),
        death: Death { reason: "boom".into(), restartable: true, found_memory_bytes: None, fault: None },
    }
}

fn started(actions: &[AgentAction]) -> Vec<RunId> {
    let start = |action: &AgentAction| match action {
        AgentAction::Start { assignment, .. } => Some(RunId::of(&assignment.plan)),
        _ => None,
    };
    actions.iter().filter_map(start).collect()
}

fn stopped(actions: &[AgentAction]) -> Vec<(RunId, u64)> {
    let stop = |action: &AgentAction| match action {
        AgentAction::Stop { run, timeout_ms } => Some((run.clone(), *timeout_ms)),
        _ => None,
    };
    actions.iter().filter_map(stop).collect()
}

fn phases(actions: &[AgentAction]) -> Vec<ReplicaPhase> {
    let phase = |action: &AgentAction| match action {
        AgentAction::Report(report) => Some(report.status.phase),
        _ => None,
    };
    actions.iter().filter_map(phase).collect()
}

#[test]
fn deaths_are_forgiven_with_growing_pauses_then_given_up() {
    let mut agent = agent();
    assert_eq!(started(&agent.handle(0, set(1, vec![assignment(0, 1)]))), [run(0, 1)]);
    assert_eq!(phases(&agent.handle(5, died(1))), [ReplicaPhase::Loading]);
    assert_eq!(agent.next_tick_ms(), Some(15));
    assert_eq!(agent.handle(14, AgentInput::Tick), vec![]);
    assert_eq!(agent.handle(15, AgentInput::Tick), vec![AgentAction::Start { assignment: Box::new(assignment(0, 1)), is_restart: true }]);
    agent.handle(16, died(1));
    assert_eq!(agent.next_tick_ms(), Some(36));
    assert_eq!(started(&agent.handle(36, AgentInput::Tick)), [run(0, 1)]);
    let given_up = agent.handle(37, died(1));
    assert!(
        matches!(&given_up[..], [AgentAction::Report(report)] if report.status.phase == ReplicaPhase::Failed && report.status.restarts == 2)
    );
    assert_eq!(agent.state(&run(0, 1)), Some(&RunState::GivenUp));
    assert_eq!(agent.handle(39, set(1, vec![assignment(0, 1)])), vec![]);
    assert_eq!(started(&agent.handle(40, set(2, vec![assignment(0, 2)]))), [run(0, 2)]);
}

#[test]
fn a_model_that_cannot_load_is_not_tried_again_and_found_memory_is_told() {
    let mut agent = agent();
    agent.handle(0, set(1, vec![assignment(0, 1)]));
    let death = Death { reason: "too large".into(), restartable: false, found_memory_bytes: Some(7), fault: None };
    let actions = agent.handle(1, AgentInput::Died { run: run(0, 1), death });
    assert!(
        matches!(&actions[..], [AgentAction::Report(report)] if report.found_memory_bytes == Some(7) && report.status.reason == "too large")
    );
    assert_eq!(agent.next_tick_ms(), None);
}

#[test]
fn a_replacement_is_made_ready_beside_the_old_run_which_then_drains() {
    let mut agent = agent();
    agent.handle(0, set(1, vec![assignment(0, 1)]));
    agent.handle(1, AgentInput::Ready { run: run(0, 1), numerics_id: "x".into() });
    assert_eq!(started(&agent.handle(2, set(2, vec![assignment(0, 1), assignment(0, 2)]))), [run(0, 2)]);
    agent.handle(3, AgentInput::Ready { run: run(0, 2), numerics_id: "x".into() });
    let actions = agent.handle(4, set(3, vec![draining(0, 1, 900), assignment(0, 2)]));
    assert_eq!((phases(&actions), stopped(&actions)), (vec![ReplicaPhase::Draining], vec![(run(0, 1), 900)]));
    let actions = agent.handle(5, AgentInput::Stopped { run: run(0, 1) });
    assert_eq!(phases(&actions), [ReplicaPhase::Stopped]);
    // The leader has not heard yet: it is told again, and nothing starts.
    let actions = agent.handle(6, set(4, vec![draining(0, 1, 900), assignment(0, 2)]));
    assert_eq!((phases(&actions), started(&actions)), (vec![ReplicaPhase::Stopped], vec![]));
}

#[test]
fn what_is_missing_ends_at_once_and_new_runs_wait_for_its_memory() {
    let mut agent = agent();
    agent.handle(0, set(1, vec![assignment(0, 1), assignment(1, 2)]));
    let actions = agent.handle(1, set(2, vec![assignment(1, 2), assignment(2, 3)]));
    assert_eq!((stopped(&actions), started(&actions)), (vec![(run(0, 1), 0)], vec![]));
    assert_eq!(started(&agent.handle(2, AgentInput::Stopped { run: run(0, 1) })), [run(2, 3)]);
}

#[test]
fn older_sets_and_epochs_start_nothing() {
    let mut agent = agent();
    agent.handle(0, set(5, vec![assignment(0, 4)]));
    assert!(matches!(agent.handle(1, set(4, vec![]))[..], [AgentAction::Refused { .. }]));
    let actions = agent.handle(2, set(6, vec![assignment(0, 4), assignment(0, 3)]));
    // Whoever assigned it must not go on counting on it.
    assert!(matches!(actions[..], [AgentAction::Report(_), AgentAction::Refused { .. }]), "{actions:?}");
    assert_eq!(phases(&actions), [ReplicaPhase::Failed]);
}

#[test]
fn a_restored_cluster_s_older_revisions_and_epochs_are_taken() {
    let of = |history: &str, revision, assignments| AgentInput::Assignments {
        history: history.into(),
        revision: Revision(revision),
        assignments,
    };
    let mut agent = agent();
    assert_eq!(started(&agent.handle(0, of("g", 90, vec![assignment(0, 7), assignment(1, 8)]))), [run(0, 7), run(1, 8)]);
    assert!(matches!(agent.handle(1, of("g", 89, vec![])).as_slice(), [AgentAction::Refused { .. }]));
    // The backup knew epoch 7 as it is, and had replica 1 under epoch 5.
    let actions = agent.handle(2, of("g-restored", 40, vec![assignment(0, 7), assignment(1, 5)]));
    assert!(!actions.iter().any(|action| matches!(action, AgentAction::Refused { .. })), "{actions:?}");
    assert_eq!(stopped(&actions), [(run(1, 8), 0)], "what stands in both goes on");
    assert_eq!(started(&agent.handle(3, AgentInput::Stopped { run: run(1, 8) })), [run(1, 5)]);
    // Within the new history the order counts again.
    assert!(matches!(agent.handle(4, of("g-restored", 39, vec![])).as_slice(), [AgentAction::Refused { .. }]));
    // Another plan by the same epoch is another run.
    let mut other = assignment(0, 7);
    other.plan.kv_blocks += 1;
    let actions = agent.handle(5, of("g-again", 10, vec![other, assignment(1, 5)]));
    assert_eq!(stopped(&actions), [(run(0, 7), 0)]);
    let again = agent.handle(6, AgentInput::Stopped { run: run(0, 7) });
    assert_eq!(started(&again), [run(0, 7)]);
}

#[test]
fn an_expired_node_stops_all_and_takes_the_same_plan_again() {
    let mut agent = agent();
    agent.handle(0, set(1, vec![assignment(0, 1)]));
    agent.handle(0, AgentInput::Ready { run: run(0, 1), numerics_id: "x".into() });
    assert_eq!(stopped(&agent.handle(1, AgentInput::Expired)), [(run(0, 1), 0)]);
    // A new leader has given every node a full lease, and the plan stands.
    assert_eq!(agent.handle(2, set(1, vec![assignment(0, 1)])), vec![]);
    let actions = agent.handle(3, AgentInput::Stopped { run: run(0, 1) });
    assert_eq!((phases(&actions), started(&actions)), (vec![ReplicaPhase::Placed], vec![run(0, 1)]));
}

#[test]
fn drain_stops_all_and_says_so() {
    let mut agent = agent();
    agent.handle(0, set(1, vec![assignment(0, 1), assignment(1, 1)]));
    assert_eq!(stopped(&agent.handle(1, AgentInput::Drain { timeout_ms: 9 })), [(run(0, 1), 9), (run(1, 1), 9)]);
    assert!(matches!(agent.handle(1, set(2, vec![assignment(2, 1)]))[..], [AgentAction::Refused { .. }]));
    agent.handle(2, AgentInput::Stopped { run: run(0, 1) });
    let death = Death { reason: "slow".into(), restartable: true, found_memory_bytes: None, fault: None };
    let last = agent.handle(3, AgentInput::Died { run: run(1, 1), death });
    assert_eq!(last.last(), Some(&AgentAction::Drained));
}

#[test]
fn a_new_session_hears_of_every_run() {
    let mut agent = agent();
    agent.handle(0, set(1, vec![assignment(0, 1), assignment(1, 1)]));
    agent.handle(1, AgentInput::Progress { run: run(0, 1), phase: ReplicaPhase::Pulling, percent: 40 });
    assert_eq!(phases(&agent.handle(2, AgentInput::Connected)), [ReplicaPhase::Pulling, ReplicaPhase::Placed]);
    // The same progress again is no news.
    assert_eq!(agent.handle(3, AgentInput::Progress { run: run(0, 1), phase: ReplicaPhase::Pulling, percent: 40 }), vec![]);
}

#[derive(Debug, Clone)]
enum Move {
    Set { back: u64, wanted: Vec<(u32, u64, bool)> },
    Ready { pick: prop::sample::Index },
    Die { pick: prop::sample::Index, restartable: bool },
    Stop { pick: prop::sample::Index },
    Expire,
    Drain,
    Wait { ms: u64 },
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let one = prop_oneof![
        6 => (0u64..2, proptest::collection::vec((0u32..3, 1u64..6, prop::bool::weighted(0.2)), 0..4))
            .prop_map(|(back, wanted)| Move::Set { back, wanted }),
        4 => any::<prop::sample::Index>().prop_map(|pick| Move::Ready { pick }),
        3 => (any::<prop::sample::Index>(), any::<bool>()).prop_map(|(pick, restartable)| Move::Die { pick, restartable }),
        6 => any::<prop::sample::Index>().prop_map(|pick| Move::Stop { pick }),
        1 => Just(Move::Expire),
        1 => prop::bool::weighted(0.1).prop_map(|drain| if drain { Move::Drain } else { Move::Wait { ms: 1 } }),
        3 => (0u64..200).prop_map(|ms| Move::Wait { ms }),
    ];
    proptest::collection::vec(one, 1..60)
}

/// What the actors around the agent would see.
#[derive(Default)]
struct World {
    now_ms: u64,
    revision: u64,
    /// Runs with an actor, and whether it was told to end at once.
    alive: BTreeMap<RunId, bool>,
    newest: BTreeMap<String, Epoch>,
    begun: BTreeSet<RunId>,
    drained: bool,
}

impl World {
    fn take(&mut self, actions: Vec<AgentAction>) -> Result<(), TestCaseError> {
        for action in actions {
            prop_assert!(!self.drained || matches!(action, AgentAction::Refused { .. }), "{action:?} after Drained");
            match action {
                AgentAction::Start { assignment, .. } => {
                    let run = RunId::of(&assignment.plan);
                    prop_assert!(!self.alive.values().any(|at_once| *at_once), "{run} starts while memory is still held");
                    prop_assert!(!self.alive.contains_key(&run), "{run} is started twice");
                    prop_assert!(assignment.drain_ms.is_none());
                    self.alive.insert(run, false);
                }
                AgentAction::Stop { run, timeout_ms } => match self.alive.get_mut(&run) {
                    Some(at_once) => *at_once = *at_once || timeout_ms == 0,
                    None => prop_assert!(false, "{run} does not run and is stopped"),
                },
                AgentAction::Forget(run) => prop_assert!(!self.alive.contains_key(&run), "{run} is forgotten and runs"),
                AgentAction::Drained => {
                    prop_assert!(self.alive.is_empty());
                    self.drained = true;
                }
                AgentAction::Report(_) | AgentAction::Refused { .. } => {}
            }
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]
    #[test]
    fn whatever_happens_the_invariants_hold(moves in moves()) {
        let mut agent = agent();
        let mut world = World::default();
        for step in moves {
            let pick = |index: prop::sample::Index, world: &World| {
                let runs: Vec<RunId> = world.alive.keys().cloned().collect();
                (!runs.is_empty()).then(|| runs[index.index(runs.len())].clone())
            };
            let input = match step {
                Move::Set { back, wanted } => {
                    world.revision += 1;
                    let revision = world.revision - back;
                    let assignments = wanted.iter().map(|&(index, epoch, drains)| {
                        if drains { draining(index, epoch, 50) } else { assignment(index, epoch) }
                    });
                    Some(set(revision, assignments.collect()))
                }
                Move::Ready { pick: index } => pick(index, &world).map(|run| AgentInput::Ready { run, numerics_id: "x".into() }),
                Move::Die { pick: index, restartable } => pick(index, &world).map(|run| {
                    world.alive.remove(&run);
                    AgentInput::Died { run, death: Death { reason: "boom".into(), restartable, found_memory_bytes: None, fault: None } }
                }),
                Move::Stop { pick: index } => {
                    let stopping = |run: &RunId| matches!(agent.state(run), Some(RunState::Stopping { .. }));
                    pick(index, &world).filter(stopping).map(|run| {
                        world.alive.remove(&run);
                        AgentInput::Stopped { run }
                    })
                }
                Move::Expire => Some(AgentInput::Expired),
                Move::Drain => Some(AgentInput::Drain { timeout_ms: 5 }),
                Move::Wait { ms } => {
                    world.now_ms += ms;
                    Some(AgentInput::Tick)
                }
            };
            let Some(input) = input else { continue };
            let actions = agent.handle(world.now_ms, input);
            // Only the newest epoch ever seen of a replica is begun; an older one may only begin again.
            for run in started(&actions) {
                let newest = world.newest.entry(run.replica.clone()).or_default();
                prop_assert!(run.epoch >= *newest || world.begun.contains(&run), "{run} after epoch {newest}");
                *newest = (*newest).max(run.epoch);
                world.begun.insert(run);
            }
            world.take(actions)?;
        }
        // In the end nothing is wanted: all actors are told, answer, and nothing is left.
        world.revision += 1;
        if !world.drained {
            let actions = agent.handle(world.now_ms, set(world.revision, vec![]));
            world.take(actions)?;
        }
        while let Some(run) = world.alive.keys().next().cloned() {
            world.alive.remove(&run);
            let actions = agent.handle(world.now_ms, AgentInput::Stopped { run });
            world.take(actions)?;
        }
        prop_assert!(agent.runs.is_empty(), "{:?}", agent.runs);
    }
}
