mod inspections;
mod rollouts;

use std::collections::{BTreeMap, BTreeSet};

use forge_shared::cluster::node::{DataPlane, DataTransport, NodePhase, NodeSpec};
use forge_shared::cluster::service::{ReplicaPhase, ReplicaRecord, ReplicaReport, ReplicaStatus};
use forge_shared::cluster::session::{Assignment, Peer};
use forge_shared::plan::Refusal;
use forge_shared::rollout::RolloutSpec;
use forge_shared::spec::{ByteSize, Layout, ModelServiceSpec};
use proptest::prelude::*;

use super::*;
use crate::state::test_support::*;
use forge_shared::cluster::command::{Command, CommandError};
use forge_shared::ids::{Incarnation, NodeId, ReplicaId};

const LEASE_MS: u64 = 3_000;

/// What a worker is to run, looked up for it alone: the duties of all must come to the same.
fn assignments(state: &ClusterState, node: &NodeId) -> Vec<Assignment> {
    let is_here = |replica: &ReplicaRecord| runs(replica) && replica.plan.ranks.iter().any(|rank| rank.node == *node);
    let mut assignments = Vec::new();
    for service in state.services().values() {
        let placed = service.replicas.iter().map(|replica| (replica, None));
        let leaving = service.leaving.iter().map(|leaving| (&leaving.replica, Some(()).filter(|()| leaving.is_draining)));
        for (replica, drains) in placed.chain(leaving).filter(|(replica, _)| is_here(replica)) {
            let (wish, weights_digest) = wish_of(service, replica.generation).expect("it is kept");
            let mut peers = Vec::new();
            for node in replica.plan.nodes().into_iter().filter(|_| replica.plan.is_divided()) {
                let data_plane = state.nodes().get(node).and_then(|record| record.spec.data_plane.clone());
                peers.extend(data_plane.map(|data_plane| Peer { node: node.clone(), data_plane }));
            }
            assignments.push(Assignment {
                plan: replica.plan.clone(),
                service: Box::new(wish.clone()),
                weights_digest: weights_digest.to_owned(),
                drain_ms: drains.map(|()| drain_ms(wish)),
                peers,
            });
        }
    }
    let duties = Duties::of(state);
    assert_eq!(duties.at(node).iter().map(Duty::assignment).collect::<Vec<_>>(), assignments);
    assert!(duties.at(node).iter().zip(&assignments).all(|(duty, told)| duty.is(told)));
    assignments
}

/// A leader with its tables, and workers that do what they are told.
struct Leader {
    world: World,
    leases: LeaseTable,
    controller: Controller,
    now_ms: u64,
    /// Processes that send heartbeats.
    alive: Vec<(String, u64)>,
    /// Nodes on which every replica fails.
    broken: Vec<String>,
    /// Batch sizes with which every replica fails: a bad wish.
    bad_batches: Vec<usize>,
    /// Replicas that were ever told to drain.
    drained: Vec<Plan>,
    weights_mib: u64,
    /// Commands proposed so far.
    proposed: usize,
    /// Where each epoch of each replica was first seen.
    seen: BTreeMap<(ReplicaId, Epoch), Vec<(NodeId, Incarnation)>>,
}

impl Leader {
    fn new(world: World) -> Self {
        let alive = world.state.nodes().values().map(|node| (node.spec.id.0.clone(), node.spec.incarnation.0)).collect();
        Leader {
            world,
            leases: LeaseTable::new(LEASE_MS),
            controller: Controller::new(ControllerOptions::default()),
            now_ms: 0,
            alive,
            broken: Vec::new(),
            bad_batches: Vec::new(),
            drained: Vec::new(),
            weights_mib: 100,
            proposed: 0,
            seen: BTreeMap::new(),
        }
    }

    fn of(nodes: &[(&str, u64)]) -> Self {
        let mut world = World::new();
        nodes.iter().for_each(|(id, mib)| assert!(world.join(id, 1, &[*mib]).is_ok()));
        Leader::new(world)
    }

    fn apply(&mut self, name: &str, spec: ModelServiceSpec) {
        self.world.apply(name, spec).expect("a good wish");
    }

    /// One decision, carried out; says how much was asked for.
    fn decide(&mut self) -> usize {
        self.leases.follow(self.now_ms, &self.world.state);
        for (id, incarnation) in &self.alive {
            self.leases.renew(&NodeId(id.clone()), Incarnation(*incarnation), self.now_ms);
        }
        let intents = self.controller.decide(self.now_ms, &self.world.state, &self.leases);
        let asked = intents.len();
        for intent in intents {
            match intent {
                Intent::Propose(command) => {
                    self.proposed += 1;
                    let is_commit = matches!(command, Command::CommitPlans { .. });
                    let bytes = serde_json::to_vec(&command).expect("JSON").len();
                    assert!(bytes < crate::raft::RaftLimits::default().entry_bytes * 3 / 4, "{bytes} bytes of one command");
                    match self.world.run(command.clone()) {
                        // Facts that were recorded in the same round.
                        Err(CommandError::Stale { .. }) if is_commit && asked > 1 => {}
                        done => assert!(done.is_ok(), "{done:?}: {command:?}"),
                    }
                }
                Intent::Inspect { node, service, .. } => {
                    let name = ServiceName(service.metadata.name.clone());
                    let answer = Some(Ok(Box::new(facts(self.weights_mib))));
                    let settled = self.controller.inspected(self.now_ms, &self.world.state, (&node, &name), answer);
                    self.world.run(settled.expect("an answer")).expect("facts");
                }
            }
        }
        asked
    }

    /// Workers load what they are assigned, and end what drains.
    fn work(&mut self) {
        for (node, incarnation) in self.alive.clone() {
            let id = NodeId(node.clone());
            for assignment in assignments(&self.world.state, &id) {
                let fails = self.broken.contains(&node) || self.bad_batches.contains(&assignment.plan.max_batch_size);
                let phase = match (fails, assignment.drain_ms) {
                    (_, Some(_)) => ReplicaPhase::Stopped,
                    (true, None) => ReplicaPhase::Failed,
                    (false, None) => ReplicaPhase::Ready,
                };
                if assignment.drain_ms.is_some() {
                    self.drained.push(assignment.plan.clone());
                }
                let status = ReplicaStatus { phase, ..ReplicaStatus::placed() };
                let report =
                    ReplicaReport { replica: assignment.plan.replica, epoch: assignment.plan.epoch, status, found_memory_bytes: None };
                let command = Command::ReportReplica { node: id.clone(), incarnation: Incarnation(incarnation), report };
                self.world.run(command).expect("a report");
            }
        }
    }

    /// Until nothing is asked for any more, in `limit_ms` at most.
    fn settle(&mut self, limit_ms: u64) {
        let end_ms = self.now_ms + limit_ms;
        let mut quiet = 0;
        while quiet < 8 {
            assert!(self.now_ms < end_ms, "not settled: {:#?}", self.world.state.services());
            self.now_ms += 500;
            self.world.now_ms += 500;
            let before = self.world.state.revision();
            self.decide();
            self.work();
            quiet = if self.world.state.revision() == before { quiet + 1 } else { 0 };
        }
    }

    fn service(&self, name: &str) -> &ServiceRecord {
        &self.world.state.services()[&ServiceName::from(name)]
    }

    /// Where the ready replicas of a service are, by index.
    fn places(&self, name: &str) -> Vec<&str> {
        let ready = self.service(name).replicas.iter().filter(|replica| replica.status.phase == ReplicaPhase::Ready);
        ready.map(|replica| replica.plan.ranks[0].node.0.as_str()).collect()
    }
}

fn spec(replicas: u32) -> ModelServiceSpec {
    ModelServiceSpec { replicas, kv_memory: Some(ByteSize(200 * MIB)), ..Default::default() }
}

#[test]
fn a_wish_becomes_ready_replicas_and_then_nothing_is_asked_for() {
    let mut leader = Leader::of(&[("a", 1_000), ("b", 1_000), ("c", 1_000)]);
    leader.apply("demo", spec(2));
    leader.settle(20_000);
    assert_eq!(leader.places("demo"), ["a", "b"]);
    assert_eq!(leader.decide(), 0);
    // A new leader finds nothing to do either.
    leader.controller = Controller::default();
    leader.leases = LeaseTable::new(LEASE_MS);
    assert_eq!(leader.decide(), 0);
}

#[test]
fn a_proposal_is_not_repeated_at_once() {
    let mut leader = Leader::of(&[("a", 1_000)]);
    leader.apply("demo", spec(1));
    leader.decide();
    let Leader { world, leases, controller, .. } = &mut leader;
    assert_eq!(controller.decide(100, &world.state, leases).len(), 1);
    assert_eq!(controller.decide(200, &world.state, leases).len(), 0);
    assert_eq!(controller.decide(2_200, &world.state, leases).len(), 1);
}

#[test]
fn a_lost_node_s_replicas_are_placed_elsewhere_at_once_and_those_that_stand_stay() {
    let mut leader = Leader::of(&[("a", 1_000), ("b", 1_000), ("c", 1_000)]);
    leader.apply("demo", spec(2));
    leader.settle(20_000);
    let standing = leader.service("demo").replicas[1].clone();
    leader.alive.retain(|(id, _)| id != "a");
    leader.settle(20_000);
    assert_eq!(leader.places("demo"), ["c", "b"]);
    assert_eq!(leader.service("demo").replicas[1], standing);
    assert_eq!(leader.world.state.nodes()[&NodeId::from("a")].phase, NodePhase::Lost);
}

#[test]
fn a_drained_node_s_replica_leaves_after_its_successor_is_ready() {
    let mut leader = Leader::of(&[("a", 1_000), ("b", 1_000)]);
    leader.apply("demo", spec(1));
    leader.settle(20_000);
    leader.world.run(Command::DrainNode { node: NodeId::from("a"), draining: true, is_forced: false }).expect("drains");
    leader.decide();
    assert_eq!((leader.service("demo").leaving.len(), leader.service("demo").leaving[0].is_draining), (1, false));
    leader.decide();
    assert!(!leader.service("demo").leaving[0].is_draining, "the successor is not ready yet");
    leader.settle(20_000);
    assert_eq!(leader.places("demo"), ["b"]);
    assert!(leader.service("demo").leaving.is_empty() && leader.drained.len() == 1);
    // Where there is no other place it serves on, and the refusal says what is missing.
    let drain = |is_forced| Command::DrainNode { node: NodeId::from("b"), draining: true, is_forced };
    leader.world.run(drain(false)).expect("drains");
    leader.settle(60_000);
    assert_eq!(leader.places("demo"), ["b"]);
    assert!(leader.service("demo").refusal.as_ref().is_some_and(|refusal| refusal.to_string().contains("drained")));
    leader.world.join("c", 1, &[1_000]).expect("joins");
    leader.alive.push(("c".into(), 1));
    leader.settle(60_000);
    assert_eq!(leader.places("demo"), ["c"], "it moves when there is room");
    assert!(leader.service("demo").refusal.is_none());
}

#[test]
fn a_node_drained_by_force_is_emptied_and_one_that_is_not_holds_up_no_change() {
    let mut leader = Leader::of(&[("a", 500), ("b", 500)]);
    leader.apply("demo", spec(2));
    leader.settle(20_000);
    assert_eq!(leader.places("demo"), ["a", "b"]);
    let drain = |is_forced| Command::DrainNode { node: NodeId::from("a"), draining: true, is_forced };
    leader.world.run(drain(false)).expect("drains");
    leader.settle(60_000);
    assert_eq!(leader.places("demo"), ["a", "b"]);
    // The change goes through where it can; what is on the drained node carries out the old wish.
    leader.apply("demo", ModelServiceSpec { max_batch_size: 8, ..spec(2) });
    leader.settle(60_000);
    assert_eq!(leader.places("demo"), ["a", "b"]);
    let generations: Vec<u64> = leader.service("demo").replicas.iter().map(|replica| replica.generation).collect();
    assert_eq!(generations, [1, 2]);
    // Fewer replicas: the one elsewhere is over, and the one on the drained node takes its room.
    leader.world.run(Command::ScaleService { name: ServiceName::from("demo"), replicas: 1 }).expect("scales");
    leader.settle(60_000);
    assert_eq!(leader.places("demo"), ["b"]);
    leader.world.run(Command::ScaleService { name: ServiceName::from("demo"), replicas: 2 }).expect("scales");
    leader.world.run(Command::DrainNode { node: NodeId::from("a"), draining: false, is_forced: false }).expect("serves");
    leader.settle(60_000);
    assert_eq!(leader.places("demo").len(), 2);
    leader.world.run(drain(false)).expect("drains");
    leader.settle(60_000);
    assert_eq!(leader.places("demo").len(), 2);
    leader.world.run(drain(true)).expect("drains by force");
    leader.settle(60_000);
    assert_eq!(leader.places("demo"), ["b"], "its requests were finished, and it is gone");
    assert!(leader.service("demo").refusal.is_some());
}

#[test]
fn a_changed_wish_rolls_one_replica_at_a_time() {
    let mut leader = Leader::of(&[("a", 1_000), ("b", 1_000), ("c", 1_000)]);
    leader.apply("demo", spec(2));
    leader.settle(20_000);
    leader.apply("demo", ModelServiceSpec { max_batch_size: 8, ..spec(2) });
    let mut fewest = 2;
    for _ in 0..40 {
        leader.now_ms += 500;
        leader.decide();
        leader.work();
        let leaving = leader.service("demo").leaving.iter().filter(|leaving| !leaving.is_draining).count();
        fewest = fewest.min(leader.places("demo").len() + leaving);
    }
    assert_eq!(fewest, 2, "there is room for a successor, so nobody misses a replica");
    assert!(leader.service("demo").replicas.iter().all(|replica| replica.generation == 2 && replica.plan.max_batch_size == 8));
    assert!(leader.service("demo").older.is_empty());
}

#[test]
fn without_room_for_both_the_old_one_makes_room() {
    let mut leader = Leader::of(&[("a", 500)]);
    leader.apply("demo", spec(1));
    leader.settle(20_000);
    leader.apply("demo", ModelServiceSpec { max_batch_size: 8, ..spec(1) });
    leader.settle(60_000);
    assert_eq!(leader.places("demo"), ["a"]);
    assert_eq!(leader.service("demo").replicas[0].generation, 2);
    assert_eq!(leader.drained.len(), 1, "its requests were finished");
    // A change that fits nowhere leaves what serves.
    leader.apply("demo", ModelServiceSpec { kv_memory: Some(ByteSize(5_000 * MIB)), ..spec(1) });
    leader.settle(60_000);
    assert_eq!((leader.places("demo"), leader.service("demo").replicas[0].generation), (vec!["a"], 2));
    assert!(leader.service("demo").refusal.is_some());
    let held = assignments(&leader.world.state, &NodeId::from("a"));
    assert_eq!(held[0].service.spec.max_batch_size, 8, "it carries out the wish it was planned for");
}

#[test]
fn scaling_down_and_deleting_end_replicas_gently() {
    let mut leader = Leader::of(&[("a", 1_000), ("b", 1_000)]);
    leader.apply("demo", spec(2));
    leader.settle(20_000);
    leader.world.run(Command::ScaleService { name: ServiceName::from("demo"), replicas: 1 }).expect("scales");
    leader.settle(20_000);
    assert_eq!((leader.places("demo"), leader.drained.len()), (vec!["a"], 1));
    leader.world.run(Command::DeleteService { name: ServiceName::from("demo") }).expect("deletes");
    leader.settle(20_000);
    assert!(leader.world.state.services().is_empty());
    assert_eq!(leader.drained.len(), 2);
}

#[test]
fn a_worker_that_never_says_that_it_has_drained_is_not_waited_for() {
    let mut leader = Leader::of(&[("a", 1_000)]);
    leader.apply("demo", spec(1));
    leader.settle(20_000);
    leader.world.run(Command::DeleteService { name: ServiceName::from("demo") }).expect("deletes");
    for _ in 0..80 {
        leader.now_ms += 500;
        leader.decide();
    }
    assert!(leader.world.state.services().is_empty());
}

#[test]
fn a_replica_that_fails_is_tried_elsewhere_and_not_for_ever_on_one_node() {
    let mut leader = Leader::of(&[("a", 2_000), ("b", 1_000)]);
    leader.broken = vec!["a".into()];
    leader.apply("demo", spec(1));
    leader.settle(60_000);
    assert_eq!(leader.places("demo"), ["b"]);
    let mut alone = Leader::of(&[("a", 2_000)]);
    alone.broken = vec!["a".into()];
    alone.apply("demo", spec(1));
    for _ in 0..2_400 {
        alone.now_ms += 500;
        alone.decide();
        alone.work();
    }
    assert!(alone.service("demo").last_epoch <= Epoch(4), "{:?}", alone.service("demo").last_epoch);
    let refusal = alone.service("demo").refusal.as_ref().map(Refusal::to_string);
    assert!(refusal.as_ref().is_some_and(|text| text.contains("failed")), "{refusal:?}");
    // Its process begins anew: it is believed again.
    alone.broken.clear();
    alone.world.join("a", 2, &[2_000]).expect("anew");
    alone.alive = vec![("a".into(), 2)];
    alone.settle(400_000);
    assert_eq!(alone.places("demo"), ["a"]);
}

#[test]
fn a_replica_of_several_nodes_is_placed_anew_without_the_one_that_let_it_down() {
    let mut world = World::new();
    for name in ["a", "b", "c"] {
        let data_plane = Some(DataPlane { address: format!("{name}:7100"), transport: DataTransport::Quic });
        let spec = Box::new(NodeSpec { data_plane, ..worker(name, 1, &[420]) });
        world.run(Command::JoinNode { spec }).expect("joins");
    }
    let mut leader = Leader::new(world);
    leader.weights_mib = 400;
    let layout = Layout { tensor: 2, ..Layout::default() };
    let (kv_memory, max_model_len) = (Some(ByteSize(50 * MIB)), Some(512));
    let wish = ModelServiceSpec { replicas: 1, layout, kv_memory, max_model_len, ..Default::default() };
    leader.apply("demo", wish.clone());
    leader.settle(20_000);
    let planned = plan_service(&leader.world.state, &service("demo", wish), &facts(400)).expect("it stands");
    assert!(planned.notes[0].contains("are on 2 workers"), "{:?}", planned.notes);
    let plan = leader.service("demo").replicas[0].plan.clone();
    let [first, second] = plan.nodes()[..] else { panic!("{plan:?}") };
    for node in [first, second] {
        let peers: Vec<NodeId> = assignments(&leader.world.state, node).remove(0).peers.into_iter().map(|peer| peer.node).collect();
        assert_eq!(peers, [first.clone(), second.clone()]);
    }
    // The leading worker says whose fault it was; a stranger's name is not believed.
    for (fault, expected) in [("stranger", [first.clone(), second.clone()]), (second.0.as_str(), [first.clone(), NodeId::from("c")])] {
        let plan = leader.service("demo").replicas[0].plan.clone();
        let status = ReplicaStatus { phase: ReplicaPhase::Failed, fault: Some(fault.into()), ..ReplicaStatus::placed() };
        let report = ReplicaReport { replica: plan.replica, epoch: plan.epoch, status, found_memory_bytes: None };
        leader.world.run(Command::ReportReplica { node: first.clone(), incarnation: Incarnation(1), report }).expect("reports");
        leader.settle(60_000);
        let now = &leader.service("demo").replicas[0].plan;
        assert!(now.epoch > plan.epoch);
        assert_eq!(now.nodes(), expected.iter().collect::<Vec<_>>());
    }
    // A node that is lost ends the epoch, and what is left is planned.
    leader.alive.retain(|(name, _)| name != "c");
    leader.now_ms += 2 * LEASE_MS;
    leader.settle(60_000);
    assert_eq!(leader.service("demo").replicas[0].plan.nodes(), [first, second]);
}

#[test]
fn a_node_with_less_memory_than_it_said_gets_no_more_than_was_found() {
    let mut leader = Leader::of(&[("a", 2_000), ("b", 1_000)]);
    leader.apply("demo", spec(1));
    (0..3).for_each(|_| assert!(leader.decide() <= 1));
    let plan = leader.service("demo").replicas[0].plan.clone();
    assert_eq!(plan.ranks[0].node, NodeId::from("a"));
    let status = ReplicaStatus { phase: ReplicaPhase::Failed, ..ReplicaStatus::placed() };
    let report = ReplicaReport { replica: plan.replica, epoch: plan.epoch, status, found_memory_bytes: Some(100 * MIB) };
    leader.world.run(Command::ReportReplica { node: NodeId::from("a"), incarnation: Incarnation(1), report }).expect("reports");
    leader.settle(60_000);
    assert_eq!(leader.places("demo"), ["b"]);
}

#[test]
fn what_was_served_with_a_long_context_keeps_it_where_it_can() {
    let mut leader = Leader::of(&[("a", 1_000), ("b", 250)]);
    leader.apply("demo", ModelServiceSpec { replicas: 1, ..Default::default() });
    leader.settle(20_000);
    let context = |leader: &Leader| leader.service("demo").replicas[0].plan.max_model_len;
    assert_eq!((leader.places("demo"), context(&leader)), (vec!["a"], 8192));
    // One death is no reason to refuse long requests from then on.
    let plan = leader.service("demo").replicas[0].plan.clone();
    leader.world.report(&plan.replica, plan.epoch, ReplicaPhase::Failed).expect("reports");
    leader.settle(60_000);
    assert_eq!((leader.places("demo"), context(&leader)), (vec!["a"], 8192));
    // Neither is a drained node: there is no room for that context elsewhere.
    let drain = |draining| Command::DrainNode { node: NodeId::from("a"), draining, is_forced: false };
    leader.world.run(drain(true)).expect("drains");
    leader.settle(60_000);
    assert_eq!((leader.places("demo"), context(&leader)), (vec!["a"], 8192));
    leader.world.run(drain(false)).expect("serves");
    leader.world.run(Command::CordonNode { node: NodeId::from("a"), cordoned: false }).expect("serves");
    // Less context is better than no replica, and the first that can have it all gets it again.
    leader.alive.retain(|(id, _)| id != "a");
    leader.settle(60_000);
    assert_eq!(leader.places("demo"), ["b"]);
    assert!(context(&leader) < 8192, "{}", context(&leader));
    assert_eq!(leader.service("demo").longest_len, Some(8192));
    leader.world.join("c", 1, &[500]).expect("joins");
    leader.alive = vec![("c".into(), 1)];
    leader.settle(60_000);
    assert_eq!((leader.places("demo"), context(&leader)), (vec!["c"], 8192));
    leader.apply("demo", ModelServiceSpec { replicas: 1, max_batch_size: 8, ..Default::default() });
    assert_eq!(leader.service("demo").longest_len, None, "another wish, another context");
}

#[test]
fn a_gateway_that_was_forgotten_while_it_was_cut_off_comes_back_as_it_is() {
    let mut leader = Leader::of(&[("a", 1_000)]);
    let join = || Command::JoinNode { spec: Box::new(gateway("g", 1)) };
    leader.world.run(join()).expect("joins");
    let is_known = |leader: &Leader| leader.world.state.nodes().contains_key(&NodeId::from("g"));
    leader.decide();
    leader.now_ms += 10_000;
    leader.settle(60_000);
    assert!(is_known(&leader), "it is lost, and not yet forgotten");
    leader.now_ms += 3_600_000;
    leader.settle(60_000);
    assert!(!is_known(&leader));
    leader.world.run(join()).expect("the same process, after the cut");
    assert!(is_known(&leader));
}

#[test]
fn layouts_over_workers_that_do_not_reach_each_other_stay_pending_with_the_reason() {
    let mut leader = Leader::of(&[("a", 300), ("b", 300)]);
    let wish = ModelServiceSpec { layout: Layout { tensor: 2, ..Layout::default() }, ..spec(1) };
    leader.apply("demo", wish.clone());
    leader.settle(20_000);
    let refusal = leader.service("demo").refusal.as_ref().map(Refusal::to_string).unwrap_or_default();
    assert!(refusal.contains("2 ranks must fit together on one worker, or on several that reach each other"), "{refusal}");
    assert!(plan_service(&leader.world.state, &service("other", wish), &facts(100)).is_err());
}

#[test]
fn a_device_that_cannot_run_is_refused_once_and_not_tried_again_and_again() {
    let mut world = World::new();
    let mut node = worker("a", 1, &[9_000]);
    node.devices[0].cannot_run = Some("this build has no kernels for cuda".into());
    world.run(Command::JoinNode { spec: Box::new(node) }).expect("joins");
    let mut leader = Leader::new(world);
    // So long that it is not said to be stuck meanwhile.
    leader.apply("demo", ModelServiceSpec { rollout: RolloutSpec { progress_deadline_s: 86_400, ..Default::default() }, ..spec(1) });
    leader.settle(20_000);
    let refusal = leader.service("demo").refusal.as_ref().map(Refusal::to_string).unwrap_or_default();
    assert!(refusal.contains("no kernels for cuda"), "{refusal}");
    assert_eq!(leader.service("demo").last_epoch, Epoch(0), "nothing was ever placed");
    let revision = leader.world.state.revision();
    for _ in 0..2_400 {
        leader.now_ms += 500;
        assert_eq!(leader.decide(), 0);
    }
    assert_eq!(leader.world.state.revision(), revision);
}

#[test]
fn a_dry_run_keeps_what_stands_and_says_why_devices_were_left_out() {
    let mut leader = Leader::of(&[("a", 1_000), ("b", 1_000), ("c", 100), ("d", 1_000)]);
    leader.world.run(Command::CordonNode { node: NodeId::from("d"), cordoned: true }).expect("cordoned");
    leader.apply("demo", spec(1));
    leader.settle(20_000);
    let standing = leader.service("demo").replicas[0].plan.clone();
    let planned = plan_service(&leader.world.state, &service("demo", spec(2)), &facts(100)).expect("fits");
    assert!(planned.changes);
    assert_eq!(planned.plans[0], standing);
    assert_eq!(planned.plans[1].ranks[0].node, NodeId::from("b"));
    let said: Vec<&str> = planned.refused_devices.iter().map(|(device, _)| device.as_str()).collect();
    assert_eq!(said, ["c/0", "d/0"]);
    assert!(planned.refused_devices[0].1.contains("is free") && planned.refused_devices[1].1.contains("cordoned"));
    let same = plan_service(&leader.world.state, &service("demo", spec(1)), &facts(100)).expect("stands");
    assert!(!same.changes);
    assert!(plan_service(&leader.world.state, &service("demo", spec(9)), &facts(400)).is_err());
}

#[test]
fn a_gateway_that_is_long_lost_is_forgotten() {
    let mut leader = Leader::of(&[("a", 1_000)]);
    leader.world.run(Command::JoinNode { spec: Box::new(gateway("g", 1)) }).expect("joins");
    leader.world.lose("g", 1).expect("lost");
    leader.settle(10_000);
    assert!(leader.world.state.nodes().contains_key(&NodeId::from("g")));
    leader.now_ms += 3_600_000;
    leader.settle(10_000);
    assert!(!leader.world.state.nodes().contains_key(&NodeId::from("g")));
}

#[derive(Debug, Clone)]
enum Event {
    Apply {
        service: usize,
        replicas: u32,
        batch: usize,
    },
    Scale {
        service: usize,
        replicas: u32,
    },
    Delete {
        service: usize,
    },
    Kill {
        node: usize,
    },
    Restart {
        node: usize,
    },
    /// It was only not heard for a while.
    Return {
        node: usize,
    },
    Remove {
        node: usize,
    },
    Cordon {
        node: usize,
        on: bool,
    },
    Drain {
        node: usize,
        on: bool,
    },
    Break {
        node: usize,
    },
    NewLeader,
    Wait {
        steps: u64,
    },
}

fn event() -> impl Strategy<Value = Event> {
    let (service, node) = (0usize..3, 0usize..NODES);
    prop_oneof![
        3 => (service.clone(), 1u32..4, 1usize..4).prop_map(|(service, replicas, batch)| Event::Apply { service, replicas, batch }),
        1 => (service.clone(), 1u32..4).prop_map(|(service, replicas)| Event::Scale { service, replicas }),
        1 => service.prop_map(|service| Event::Delete { service }),
        2 => node.clone().prop_map(|node| Event::Kill { node }),
        2 => node.clone().prop_map(|node| Event::Restart { node }),
        1 => node.clone().prop_map(|node| Event::Return { node }),
        1 => node.clone().prop_map(|node| Event::Remove { node }),
        1 => (node.clone(), any::<bool>()).prop_map(|(node, on)| Event::Cordon { node, on }),
        1 => (node.clone(), any::<bool>()).prop_map(|(node, on)| Event::Drain { node, on }),
        1 => node.prop_map(|node| Event::Break { node }),
        1 => Just(Event::NewLeader),
        4 => (1u64..12).prop_map(|steps| Event::Wait { steps }),
    ]
}

const NODES: usize = 6;

fn node_name(number: usize) -> String {
    format!("n{number}")
}

/// Devices of a node: one or two, of several sizes.
fn node_mib(number: usize) -> &'static [u64] {
    [&[4_000][..], &[2_000, 2_000], &[6_000], &[1_000, 3_000]][number % 4]
}

impl Leader {
    fn happen(&mut self, event: Event, incarnations: &mut [u64]) {
        let name = |service: usize| ServiceName(format!("s{service}"));
        // Refusals of what does not exist are answers like others.
        let _ = match event {
            Event::Apply { service, replicas, batch } => {
                self.world.apply(&name(service).0, ModelServiceSpec { max_batch_size: batch, ..spec(replicas) })
            }
            Event::Scale { service, replicas } => self.world.run(Command::ScaleService { name: name(service), replicas }),
            Event::Delete { service } => self.world.run(Command::DeleteService { name: name(service) }),
            Event::Cordon { node, on } => self.world.run(Command::CordonNode { node: NodeId(node_name(node)), cordoned: on }),
            Event::Drain { node, on } => {
                self.world.run(Command::DrainNode { node: NodeId(node_name(node)), draining: on, is_forced: node % 2 == 1 })
            }
            Event::Restart { node } => {
                incarnations[node] += 1;
                self.alive.retain(|(id, _)| *id != node_name(node));
                self.broken.retain(|id| *id != node_name(node));
                self.alive.push((node_name(node), incarnations[node]));
                self.world.join(&node_name(node), incarnations[node], node_mib(node))
            }
            Event::Return { node } => {
                if self.alive.iter().all(|(id, _)| *id != node_name(node)) {
                    self.alive.push((node_name(node), incarnations[node]));
                }
                match self.world.join(&node_name(node), incarnations[node], node_mib(node)) {
                    // It was removed meanwhile: this process does not come back.
                    Err(_) => {
                        self.alive.retain(|(id, _)| *id != node_name(node));
                        return;
                    }
                    done => done,
                }
            }
            Event::Remove { node } => self.world.run(Command::RemoveNode { node: NodeId(node_name(node)) }),
            Event::Kill { node } => {
                self.alive.retain(|(id, _)| *id != node_name(node));
                return;
            }
            Event::Break { node } => {
                self.broken.push(node_name(node));
                return;
            }
            Event::NewLeader => {
                self.controller = Controller::default();
                self.leases = LeaseTable::new(LEASE_MS);
                return;
            }
            Event::Wait { steps } => {
                for _ in 0..steps {
                    self.now_ms += 500;
                    self.world.now_ms += 500;
                    self.decide();
                    self.work();
                }
                return;
            }
        };
    }

    /// No device is given more than it has, nothing runs where nothing may, and an epoch of a replica is one plan on
    /// processes that live since then.
    fn check(&mut self) {
        let state = &self.world.state;
        let mut now = BTreeSet::new();
        for plan in state.standing_plans() {
            let key = (plan.replica.clone(), plan.epoch);
            assert!(now.insert(key.clone()), "two replicas {} of epoch {}", key.0, key.1);
            let places = plan.ranks.iter().map(|rank| (rank.node.clone(), state.nodes()[&rank.node].spec.incarnation)).collect();
            let first: &Vec<_> = self.seen.entry(key).or_insert_with(|| Vec::clone(&places));
            assert_eq!(*first, places, "an epoch outlived its process, or moved");
        }
        for node in state.nodes().values() {
            for device in &node.spec.devices {
                let ranks = state.standing_plans().flat_map(|plan| &plan.ranks);
                let here = ranks.filter(|rank| rank.node == node.spec.id && rank.device == device.index);
                assert!(here.map(|rank| rank.memory.total_bytes()).sum::<u64>() <= device.memory_bytes);
            }
        }
        assert_eq!(crate::state::check_rules(state), Ok(()));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]
    /// Whatever happened: once faults stop and there is room, every wish is fulfilled, and then nothing is asked for.
    #[test]
    fn everything_converges_and_then_rests(events in proptest::collection::vec(event(), 1..48)) {
        let mut world = World::new();
        (0..NODES).for_each(|node| assert!(world.join(&node_name(node), 1, node_mib(node)).is_ok()));
        let mut leader = Leader::new(world);
        let mut incarnations = [1; NODES];
        for event in events {
            leader.happen(event, &mut incarnations);
            leader.check();
        }
        for node in 0..NODES {
            leader.happen(Event::Restart { node }, &mut incarnations);
            leader.happen(Event::Drain { node, on: false }, &mut incarnations);
        }
        // The longest pause between two tries is five minutes.
        let before = leader.proposed;
        leader.settle(3_600_000);
        // Each replica is placed, its predecessors leave in two steps, and a refusal or two are said.
        let wished: usize = leader.world.state.services().values().map(|service| service.service.spec.replicas as usize).sum();
        let proposed = leader.proposed - before;
        prop_assert!(proposed <= 60 + 12 * wished, "{} commands for {} replicas", proposed, wished);
        leader.now_ms += 1_000_000;
        leader.settle(3_600_000);
        leader.check();
        for (name, service) in leader.world.state.services() {
            prop_assert!(!service.is_deleted, "{} is still there", name);
            prop_assert_eq!(service.replicas.len(), service.service.spec.replicas as usize);
            prop_assert!(service.replicas.iter().all(|replica| replica.status.phase == ReplicaPhase::Ready && replica.generation == service.generation));
            prop_assert!(service.leaving.is_empty() && service.refusal.is_none() && service.older.is_empty());
        }
        prop_assert_eq!(leader.decide(), 0);
        // The state survives its snapshot.
        let bytes = leader.world.state.encode();
        prop_assert_eq!(ClusterState::decode(&bytes).map(|state| state.encode()), Ok(bytes));
    }
}

#[test]
fn what_is_too_much_for_one_entry_is_said_and_removed_in_several() {
    let mut leader = Leader::of(&[("a", 1_000)]);
    let names: Vec<String> = (0..900).map(|number| format!("a-service-with-a-name-{number}")).collect();
    for name in &names {
        // The model's facts are known at once: nobody is asked nine hundred times.
        leader.apply(name, ModelServiceSpec { replicas: 1, kv_memory: Some(ByteSize(1 << 40)), ..Default::default() });
        leader.world.record_facts(name, facts(100)).expect("facts");
    }
    leader.settle(600_000);
    assert!(names.iter().all(|name| leader.service(name).refusal.is_some()));
    for name in &names {
        leader.world.run(Command::DeleteService { name: name.as_str().into() }).expect("deleted");
    }
    leader.settle(600_000);
    assert!(leader.world.state.services().is_empty());
}
