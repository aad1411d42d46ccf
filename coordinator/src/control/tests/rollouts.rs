//! Changes that roll from one generation to the next, within their strategy.

use forge_shared::rollout::Portion;

use super::*;

const NAME: &str = "demo";

fn strategy(max_unavailable: u32, max_surge: u32) -> RolloutSpec {
    RolloutSpec { max_unavailable: Portion::Count(max_unavailable), max_surge: Portion::Count(max_surge), ..Default::default() }
}

fn wish(replicas: u32, rollout: RolloutSpec, max_batch_size: usize) -> ModelServiceSpec {
    ModelServiceSpec { rollout, max_batch_size, ..spec(replicas) }
}

/// What is to be seen of a rollout while it goes on.
#[derive(Debug)]
struct Seen {
    /// Fewest indices that took requests.
    available: usize,
    /// Most successors beside those they replace.
    surging: usize,
}

impl Leader {
    /// Wished replicas that take requests now.
    fn available(&self) -> usize {
        let service = self.service(NAME);
        let leaving = service.leaving.iter().filter(|leaving| !leaving.is_draining).map(|leaving| &leaving.replica);
        let serving = service.replicas.iter().chain(leaving).filter(|replica| replica.status.phase == ReplicaPhase::Ready);
        let indices = serving.map(|replica| replica.plan.replica.index).filter(|index| *index < service.service.spec.replicas);
        indices.collect::<BTreeSet<u32>>().len()
    }

    fn watch(&mut self, steps: usize) -> Seen {
        let mut seen = Seen { available: usize::MAX, surging: 0 };
        for _ in 0..steps {
            self.now_ms += 500;
            self.world.now_ms += 500;
            self.decide();
            // After each half: what was decided, and what came of it.
            for half in 0..2 {
                seen.available = seen.available.min(self.available());
                let surging = self.service(NAME).leaving.iter().filter(|leaving| !leaving.is_draining).count();
                seen.surging = seen.surging.max(surging);
                if half == 0 {
                    self.work();
                }
            }
        }
        seen
    }

    fn is_at(&self, batch: usize) -> bool {
        let service = self.service(NAME);
        service.progress().is_complete() && service.replicas.iter().all(|replica| replica.plan.max_batch_size == batch)
    }
}

/// So many nodes that hold so many replicas each.
fn nodes(count: usize, replicas_each: u64) -> Leader {
    let names: Vec<String> = (0..count).map(|number| format!("n{number}")).collect();
    let nodes: Vec<(&str, u64)> = names.iter().map(|name| (name.as_str(), 400 * replicas_each)).collect();
    Leader::of(&nodes)
}

fn running(mut leader: Leader, spec: ModelServiceSpec) -> Leader {
    leader.apply(NAME, spec);
    leader.settle(60_000);
    assert!(leader.service(NAME).progress().is_complete(), "{:#?}", leader.service(NAME));
    leader
}

#[test]
fn as_many_successors_come_at_a_time_as_the_strategy_says() {
    for surge in 1..4 {
        let mut leader = running(nodes(8, 1), wish(4, strategy(0, surge), 1));
        leader.apply(NAME, wish(4, strategy(0, surge), 2));
        let seen = leader.watch(60);
        assert_eq!((seen.available, seen.surging), (4, surge as usize), "surge {surge}");
        assert!(leader.is_at(2));
    }
}

#[test]
fn without_room_as_many_make_room_as_may_be_missing() {
    for (unavailable, fewest) in [(1, 3), (2, 2), (4, 0)] {
        let mut leader = running(nodes(4, 1), wish(4, strategy(unavailable, 1), 1));
        leader.apply(NAME, wish(4, strategy(unavailable, 1), 2));
        let seen = leader.watch(80);
        assert_eq!(seen.available, fewest, "maxUnavailable {unavailable}");
        assert!(leader.is_at(2), "{:#?}", leader.service(NAME));
    }
}

#[test]
fn where_nobody_may_be_missing_and_there_is_no_room_the_old_serve_on_and_it_is_said() {
    let mut leader = running(nodes(2, 1), wish(2, strategy(0, 1), 1));
    leader.apply(NAME, wish(2, strategy(0, 1), 2));
    let seen = leader.watch(1_300);
    assert_eq!(seen.available, 2);
    let service = leader.service(NAME);
    assert_eq!((service.progress().ready, service.progress().old_serving), (0, 2));
    let refusal = service.refusal.as_ref().map(Refusal::to_string).expect("said");
    assert!(refusal.contains("rollout.maxUnavailable=1"), "{refusal}");
    let stuck = service.stuck.as_deref().expect("said after 600 s");
    assert!(stuck.contains("no progress for 600 s") && stuck.contains("2 of an older generation serve on"), "{stuck}");
    // The strategy alone may be changed: the same rollout goes on.
    leader.apply(NAME, wish(2, strategy(1, 1), 2));
    leader.settle(60_000);
    assert!(leader.is_at(2) && leader.service(NAME).generation == 2);
    assert_eq!((&leader.service(NAME).stuck, &leader.service(NAME).refusal), (&None, &None));
}

#[test]
fn a_bad_wish_leaves_the_old_replicas_serving_and_the_way_back_is_open() {
    let mut leader = running(nodes(6, 1), wish(4, strategy(1, 1), 1));
    leader.bad_batches = vec![2];
    leader.apply(NAME, wish(4, strategy(1, 1), 2));
    let seen = leader.watch(4_000);
    assert!(seen.available >= 3, "{seen:?}");
    let service = leader.service(NAME);
    assert!(service.progress().old_serving >= 3, "{:?}", service.progress());
    assert!(service.stuck.is_some(), "{service:#?}");
    leader.world.run(Command::UndoService { name: NAME.into(), to: None }).expect("back");
    let seen = leader.watch(200);
    assert!(seen.available >= 3, "{seen:?}");
    assert!(leader.is_at(1) && leader.service(NAME).generation == 3 && leader.service(NAME).stuck.is_none());
}

#[test]
fn a_new_leader_goes_on_with_a_rollout_and_says_nothing_twice() {
    let mut leader = running(nodes(2, 1), wish(2, strategy(0, 1), 1));
    leader.apply(NAME, wish(2, strategy(0, 1), 2));
    leader.watch(1_300);
    let said = leader.service(NAME).stuck.clone();
    assert!(said.is_some());
    leader.controller = Controller::default();
    let before = leader.world.state.revision();
    leader.watch(20);
    assert_eq!((leader.service(NAME).stuck.clone(), leader.world.state.revision()), (said, before));
}

#[test]
fn what_fits_nowhere_holds_up_no_change_of_the_others() {
    // Three are wished and two have room.
    let mut leader = nodes(2, 1);
    leader.apply(NAME, wish(3, strategy(1, 1), 1));
    leader.settle(60_000);
    assert_eq!(leader.available(), 2);
    leader.apply(NAME, wish(3, strategy(1, 1), 2));
    let seen = leader.watch(120);
    assert_eq!(seen.available, 1, "one at a time");
    let service = leader.service(NAME);
    assert!(service.replicas.iter().all(|replica| replica.generation == 2) && service.replicas.len() == 2);
}

#[test]
fn what_has_no_room_off_a_drained_node_serves_on_while_the_others_roll_as_many_at_a_time_as_they_may() {
    let mut leader = running(nodes(4, 1), wish(4, strategy(2, 1), 1));
    let drain = |is_forced| Command::DrainNode { node: NodeId::from("n0"), draining: true, is_forced };
    leader.world.run(drain(false)).expect("drains");
    leader.apply(NAME, wish(4, strategy(2, 1), 2));
    let seen = leader.watch(80);
    assert_eq!((seen.available, seen.surging), (2, 0), "two at a time, and never the one on the drained node");
    let generations: Vec<u64> = leader.service(NAME).replicas.iter().map(|replica| replica.generation).collect();
    assert_eq!((generations.iter().filter(|generation| **generation == 2).count(), generations.len()), (3, 4));
    assert!(leader.service(NAME).refusal.is_some(), "it is said that there is no room");
    // By force it goes, whatever the strategy keeps.
    leader.apply(NAME, wish(4, strategy(0, 1), 2));
    leader.world.run(drain(true)).expect("drains by force");
    leader.watch(40);
    assert_eq!((leader.available(), leader.service(NAME).replicas.len()), (3, 3));
}

#[test]
fn a_drained_node_s_replica_keeps_its_context_while_a_change_rolls() {
    let mut leader = running(Leader::of(&[("a", 1_000), ("b", 250)]), ModelServiceSpec { replicas: 1, ..Default::default() });
    let context = |leader: &Leader| leader.service(NAME).replicas[0].plan.max_model_len;
    assert_eq!((leader.places(NAME), context(&leader)), (vec!["a"], 8192));
    // The change may have the place of what it replaces, and all of its context there.
    leader.apply(NAME, ModelServiceSpec { replicas: 1, max_batch_size: 2, ..Default::default() });
    leader.settle(60_000);
    assert!(leader.is_at(2));
    let served = context(&leader);
    leader.world.run(Command::DrainNode { node: NodeId::from("a"), draining: true, is_forced: false }).expect("drains");
    leader.settle(60_000);
    assert_eq!(context(&leader), served, "{:?}", leader.places(NAME));
}

#[derive(Debug, Clone)]
enum Turn {
    Change { batch: usize, max_unavailable: u32, max_surge: u32 },
    Undo,
    Scale { replicas: u32 },
    NewLeader,
    Wait { steps: usize },
}

fn turn() -> impl Strategy<Value = Turn> {
    prop_oneof![
        4 => (1usize..5, 0u32..4, 0u32..4).prop_map(|(batch, max_unavailable, max_surge)| Turn::Change { batch, max_unavailable, max_surge }),
        1 => Just(Turn::Undo),
        1 => (1u32..6).prop_map(|replicas| Turn::Scale { replicas }),
        1 => Just(Turn::NewLeader),
        4 => (1usize..40).prop_map(|steps| Turn::Wait { steps }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    /// While enough devices live, no change takes away more than its strategy says, a bad one included; and in the end the
    /// newest generation runs, or it is said why not.
    #[test]
    fn no_rollout_takes_away_more_than_it_may(
        turns in proptest::collection::vec(turn(), 1..16),
        (count, each) in (1usize..7, 1u64..3),
    ) {
        let room = count * each as usize;
        // Said to be stuck soon, so that the test need not wait for long.
        let strategy = |unavailable, surge| RolloutSpec { progress_deadline_s: 60, ..strategy(unavailable, surge) };
        let mut leader = running(nodes(count, each), wish(1, strategy(1, 1), 1));
        // Batches of 4 are bad.
        leader.bad_batches = vec![4];
        let mut unavailable = 1;
        for turn in turns {
            let service = leader.service(NAME);
            let (replicas, rollout, batch) = (service.service.spec.replicas, service.service.spec.rollout, service.service.spec.max_batch_size);
            match turn {
                Turn::Change { batch, max_unavailable, max_surge } => {
                    let rollout = strategy(max_unavailable, max_surge);
                    if rollout.check().is_ok() {
                        leader.apply(NAME, wish(replicas, rollout, batch));
                        unavailable = unavailable.max(rollout.unavailable(replicas) as usize);
                    }
                }
                Turn::Undo => {
                    // At the beginning there is nothing to go back to.
                    let _ = leader.world.run(Command::UndoService { name: NAME.into(), to: None });
                }
                Turn::Scale { replicas } => {
                    let replicas = replicas.min(room as u32);
                    leader.apply(NAME, wish(replicas, rollout, batch));
                    unavailable = unavailable.max(rollout.unavailable(replicas) as usize);
                }
                Turn::NewLeader => leader.controller = Controller::default(),
                Turn::Wait { steps } => {
                    let before = leader.available();
                    let wished = leader.service(NAME).service.spec.replicas as usize;
                    let seen = leader.watch(steps);
                    // What was missing before, by other turns or by more replicas that are wished, is none of this one's.
                    let floor = before.min(wished).min(wished.saturating_sub(unavailable));
                    prop_assert!(seen.available >= floor, "{seen:?} of {wished}, {before} before, at most {unavailable} missing");
                    let surge = leader.service(NAME).service.spec.rollout.surge(wished as u32) as usize;
                    prop_assert!(seen.surging <= surge.max(3), "{seen:?}");
                }
            }
            leader.check();
        }
        leader.watch(400);
        let service = leader.service(NAME);
        prop_assert!(service.progress().is_complete() || service.stuck.is_some(), "{:#?}", service);
        // A good wish ends every rollout.
        leader.apply(NAME, wish(room.min(3) as u32, strategy(1, 1), 3));
        leader.settle(3_600_000);
        prop_assert!(leader.is_at(3), "{:#?}", leader.service(NAME));
        prop_assert!(leader.service(NAME).stuck.is_none() && leader.service(NAME).refusal.is_none());
        prop_assert_eq!(leader.decide(), 0);
    }
}
