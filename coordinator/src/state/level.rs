//! The cluster's level: what all of its processes know. Nothing newer is written before every one of them does.
//!
//! What it is not: it asks nobody. Processes state their builds when they join, and the leader writes them down.
//!
//! Invariants: the level only grows, and never above that of a member or node that is known, lost ones included (they may
//! come back); a process below it is not let in; at a level nothing of a later one is in the state.

use forge_shared::cluster::command::{Command, CommandError};
use forge_shared::cluster::node::{NodePhase, NodeRecord, NodeSpec, Role};
use forge_shared::plan::ModelFacts;
use forge_shared::version::{Build, DATA_PLANES, LEVEL};

use super::notices::Weight;
use super::{ClusterState, Effect, Step, checks};

/// The level of spec.rollout, earlier wishes and stuck rollouts.
pub(super) const ROLLOUTS: u32 = 2;
/// The level of what services wait for.
const WAITS: u32 = 2;
/// The level of certificates in the log.
const CERTIFICATES: u32 = 2;
/// The level of nodes that are drained by force, and of contexts that are kept.
pub(super) const KEPT: u32 = 2;
/// The level of counts of what tensor ranks have beyond their parts.
const SHARES: u32 = 2;

/// What takes more than the first level in a command, and the level it takes.
fn needs(command: &Command) -> Option<(&'static str, u32)> {
    match command {
        Command::ApplyService { service } => (!service.spec.rollout.is_default()).then_some(("spec.rollout", ROLLOUTS)),
        Command::UndoService { .. } => Some(("going back to an earlier wish", ROLLOUTS)),
        Command::RecordRollout { .. } => Some(("the record of a stuck rollout", ROLLOUTS)),
        Command::RecordWait { .. } => Some(("the record of what a service waits for", WAITS)),
        Command::RecordCertificate { .. } => Some(("the list of certificates", CERTIFICATES)),
        Command::RevokeCertificates { .. } => Some(("revoking a certificate", CERTIFICATES)),
        Command::BeginCaRotation { .. } | Command::SwitchCa { .. } | Command::FinishCaRotation { .. } | Command::AbandonCaRotation => {
            Some(("rotating the CA", CERTIFICATES))
        }
        Command::DrainNode { is_forced, .. } => is_forced.then_some(("draining a node by force", KEPT)),
        Command::RecordFacts { facts: Ok(facts), .. } if !facts.shape.tensor_extra_bytes.is_empty() => {
            Some(("the count of what tensor ranks have beyond their parts", SHARES))
        }
        Command::JoinNode { spec } if spec.data_plane.is_some() => Some(("the address of a worker's data plane", DATA_PLANES)),
        Command::ReportReplica { report, .. } if report.status.fault.is_some() => {
            Some(("the node by whose fault a replica failed", DATA_PLANES))
        }
        Command::ScaleService { .. }
        | Command::DeleteService { .. }
        | Command::RecordFacts { .. }
        | Command::CommitPlans { .. }
        | Command::ReportReplica { .. }
        | Command::JoinNode { .. }
        | Command::LoseNode { .. }
        | Command::CordonNode { .. }
        | Command::RemoveNode { .. }
        | Command::PutJoinToken { .. }
        | Command::UseJoinToken { .. }
        | Command::RemoveJoinToken { .. }
        | Command::PutKey { .. }
        | Command::RevokeKey { .. }
        | Command::RecordIdempotency { .. }
        | Command::PutMember { .. }
        | Command::RemoveMember { .. }
        | Command::RaiseLevel { .. } => None,
    }
}

/// The level that a process must have to apply a command: an entry of the log says it, so that an older one stops before it.
pub(crate) fn level_of(command: &Command) -> u32 {
    match command {
        Command::RaiseLevel { level } => *level,
        _ => needs(command).map_or(forge_shared::version::FIRST_LEVEL, |(_, level)| level),
    }
}

impl ClusterState {
    /// What every process of the cluster knows.
    pub fn level(&self) -> u32 {
        self.level
    }

    /// Members and nodes below a level, in words.
    pub fn older_than(&self, level: u32) -> Vec<String> {
        let words = |role: Role, name: &str, build: Build| format!("{role} {name} runs {build}");
        let members = self.members.values().filter(|member| member.level < level);
        let nodes = self.nodes.values().filter(|node| node.spec.level < level);
        let node_words = |node: &NodeRecord| {
            let id = &node.spec.id.0;
            let said = words(node.spec.role, id, node.spec.build());
            match node.phase {
                NodePhase::Ready => said,
                NodePhase::Lost => format!("{said} and is lost (start it anew, or `forgectl delete node {id}` if it will not come back)"),
            }
        };
        members.map(|member| words(Role::Coordinator, &member.name, member.build())).chain(nodes.map(node_words)).collect()
    }

    /// The level the cluster could be at, for a leader of level `own`: that of its oldest member or node.
    pub fn reachable_level(&self, own: u32) -> u32 {
        let members = self.members.values().map(|member| member.level);
        members.chain(self.nodes.values().map(|node| node.spec.level)).fold(own, u32::min)
    }

    /// Facts of a model as the cluster's processes know them: what is newer is left out, and assumed where it is needed.
    pub(crate) fn known_facts(&self, mut facts: Box<ModelFacts>) -> Box<ModelFacts> {
        if self.level < SHARES {
            facts.shape.tensor_extra_bytes.clear();
        }
        facts
    }

    /// What a node says of itself as the cluster's processes know it: what is newer is left out.
    pub(crate) fn known_spec(&self, mut spec: NodeSpec) -> NodeSpec {
        if self.level < DATA_PLANES {
            spec.data_plane = None;
        }
        spec
    }

    /// Whether a node said something of itself that was left out when it joined, and that the cluster's processes know by now.
    pub(crate) fn lacks_of(&self, spec: &NodeSpec) -> bool {
        let known = self.nodes.get(&spec.id).filter(|known| known.spec.incarnation == spec.incarnation);
        known.is_some_and(|known| known.spec.data_plane != self.known_spec(spec.clone()).data_plane)
    }

    /// Whether the cluster's processes know all of a command.
    ///
    /// # Errors
    /// [`CommandError::Level`], naming who does not.
    pub(crate) fn check_level(&self, command: &Command) -> Result<(), CommandError> {
        match needs(command) {
            Some((what, needed)) if needed > self.level => {
                Err(CommandError::Level { what: what.to_owned(), needed, level: self.level, older: self.older_than(needed) })
            }
            _ => Ok(()),
        }
    }

    /// Whether a process of this build knows what the cluster uses.
    ///
    /// # Errors
    /// [`CommandError::Level`], naming it.
    pub(crate) fn check_build(&self, role: Role, name: &str, build: &Build) -> Result<(), CommandError> {
        checks::text("version", &build.version, 64)?;
        if build.level == 0 {
            return checks::invalid("level", "must be at least 1");
        }
        if build.level >= self.level {
            return Ok(());
        }
        let older = vec![format!("{role} {name} runs {build}: start a newer forge-{role}")];
        Err(CommandError::Level { what: format!("being a {role} here"), needed: self.level, level: self.level, older })
    }

    pub(super) fn raise_level(&mut self, level: u32, step: &mut Step) -> Result<Effect, CommandError> {
        if level <= self.level {
            return Ok(Effect::NONE);
        }
        // A build that knows more stops older ones before this; what it proposed is no command of this one.
        if level > LEVEL {
            return checks::invalid("level", format!("this build knows up to {LEVEL}"));
        }
        // Somebody older came since the leader looked. That is no refusal: its words would be a trace of what is newer.
        if !self.older_than(level).is_empty() {
            return Ok(Effect::NONE);
        }
        let message =
            format!("every process is at level {level}, the cluster was at {}: an older Forge is not let in any more", self.level);
        self.level = level;
        self.notice(step, Weight::Normal, "LevelRaised", "cluster".to_owned(), message);
        Ok(Effect::CHANGED)
    }
}

#[cfg(test)]
mod tests {
    use forge_shared::cluster::certificate::CaRecord;
    use forge_shared::cluster::command::{MemberRecord, PlannedReplica};
    use forge_shared::cluster::node::{DataPlane, DataTransport};
    use forge_shared::cluster::service::Facts;
    use forge_shared::ids::{Incarnation, NodeId, ServiceName};
    use forge_shared::rollout::{Portion, RolloutSpec};
    use forge_shared::spec::ModelServiceSpec;
    use forge_shared::version::FIRST_LEVEL;

    use super::super::test_support::{World, facts, worker};
    use super::*;
    use crate::placement::{Cluster, Wish, plan};

    fn at_first_level() -> World {
        let mut world = World::new();
        world.state.level = FIRST_LEVEL;
        world
    }

    fn member(id: u64, level: u32) -> Command {
        let build = Build { version: "0.1.0".into(), level };
        Command::PutMember { member: MemberRecord::new(id, &format!("c{id}"), "c:7000", build) }
    }

    fn join(world: &mut World, id: &str, incarnation: u64, level: u32) -> Result<(), CommandError> {
        let spec = NodeSpec { level, ..worker(id, incarnation, &[4_096]) };
        world.run(Command::JoinNode { spec: Box::new(spec) }).map(|_| ())
    }

    fn ca(digits: &str) -> CaRecord {
        CaRecord { sha256: digits.repeat(32), certificate_pem: digits.to_owned() }
    }

    /// Places a service's first replica.
    fn place(world: &mut World, name: &str) {
        let name = ServiceName::from(name);
        let record = &world.state.services()[&name];
        let Facts::Known { facts } = &record.facts else { panic!("{:?}", record.facts) };
        let wish = Wish {
            service: &name,
            spec: &record.service.spec,
            facts,
            indices: &[0],
            last_epoch: record.last_epoch,
            standing: &[],
            avoided: &[],
            on_one_node: true,
        };
        let plans = plan(&mut Cluster::of(&world.state), &wish).plans.into_iter();
        let plans: Vec<_> = plans.map(|plan| PlannedReplica { plan, generation: record.generation }).collect();
        assert_eq!(plans.len(), 1);
        let basis = world.state.revision();
        world.run(Command::CommitPlans { basis, plans, removed: vec![], refusals: vec![], settled: vec![] }).expect("placed");
    }

    #[test]
    fn the_oldest_process_holds_the_level_and_is_named() {
        let mut world = at_first_level();
        world.run(member(1, 2)).expect("new");
        world.run(member(2, 1)).expect("old");
        join(&mut world, "w1", 1, 2).expect("new");
        let traces = |world: &World| serde_json::to_string(&world.state.reported).expect("JSON");
        let before = traces(&world);
        assert!(!world.run(Command::RaiseLevel { level: 2 }).expect("c2 is old").changed);
        assert_eq!(traces(&world), before, "an old build remembers nothing of it either");
        assert_eq!(world.state.older_than(2), ["coordinator c2 runs 0.1.0 (level 1)"]);
        assert_eq!(world.state.reachable_level(2), 1);
        let changed =
            ModelServiceSpec { rollout: RolloutSpec { max_surge: Portion::Count(0), ..Default::default() }, ..Default::default() };
        let refusal = world.apply("demo", changed.clone()).expect_err("too new").to_string();
        assert!(refusal.contains("spec.rollout") && refusal.contains("c2"), "{refusal}");
        world.run(member(2, 2)).expect("upgraded");
        assert_eq!(world.state.reachable_level(2), 2);
        let early = world.apply("demo", changed.clone()).expect_err("not raised yet").to_string();
        assert!(early.contains("in a moment"), "{early}");
        assert!(world.run(Command::RaiseLevel { level: 2 }).expect("all know it").changed);
        assert!(!world.run(Command::RaiseLevel { level: 1 }).expect("never back").changed);
        world.apply("demo", changed).expect("known to all");
    }

    #[test]
    fn who_is_older_than_the_cluster_is_not_let_in() {
        let mut world = World::new();
        let refusal = join(&mut world, "w1", 1, 1).expect_err("old").to_string();
        assert!(refusal.contains("worker w1") && refusal.contains("start a newer forge-worker"), "{refusal}");
        assert!(matches!(world.run(member(3, 1)), Err(CommandError::Level { .. })));
        join(&mut world, "w1", 2, 2).expect("new");
    }

    #[test]
    fn a_lost_node_holds_the_level_until_it_is_removed_or_comes_back_new() {
        let mut world = at_first_level();
        join(&mut world, "w1", 1, 1).expect("old");
        assert_eq!(world.state.older_than(2), ["worker w1 runs 1.0.0 (level 1)"]);
        world.lose("w1", 1).expect("lost");
        let older = world.state.older_than(2).join("; ");
        assert!(older.contains("w1 runs 1.0.0 (level 1) and is lost") && older.contains("forgectl delete node w1"), "{older}");
        assert!(!world.run(Command::RaiseLevel { level: 2 }).expect("too early").changed);
        join(&mut world, "w1", 2, 2).expect("upgraded");
        world.run(Command::RaiseLevel { level: 2 }).expect("all know it");
    }

    #[test]
    fn what_a_node_says_that_not_all_know_is_written_down_once_they_do() {
        let mut world = at_first_level();
        let told = DataPlane { address: "w1:7100".into(), transport: DataTransport::Quic };
        let spec = NodeSpec { data_plane: Some(told.clone()), ..worker("w1", 1, &[4_096]) };
        let join = |spec: &NodeSpec| Command::JoinNode { spec: Box::new(spec.clone()) };
        assert!(matches!(world.run(join(&spec)), Err(CommandError::Level { needed: 2, level: 1, .. })));
        let known = world.state.known_spec(spec.clone());
        world.run(join(&known)).expect("without it");
        assert!(!world.state.lacks_of(&spec));
        assert!(!String::from_utf8(world.state.encode()).expect("JSON").contains("dataPlane"));
        world.run(Command::RaiseLevel { level: 2 }).expect("all know it");
        assert!(world.state.lacks_of(&spec), "its session ends, and it says it again");
        assert_eq!(world.state.known_spec(spec.clone()), spec);
        assert!(world.run(join(&spec)).expect("the same process").changed);
        assert_eq!(world.state.nodes()[&spec.id].spec.data_plane, Some(told));
        assert!(!world.state.lacks_of(&spec) && !world.run(join(&spec)).expect("again").changed);
        let wrong = DataPlane { address: "nowhere".into(), transport: DataTransport::Tcp };
        let refused = world.run(join(&NodeSpec { data_plane: Some(wrong), incarnation: Incarnation(2), ..spec.clone() }));
        assert!(refused.is_err_and(|error| error.to_string().contains("spec.dataPlane.address")));
    }

    #[test]
    fn at_the_first_level_nothing_of_the_second_is_in_the_state() {
        let mut world = at_first_level();
        world.apply("demo", ModelServiceSpec::default()).expect("new");
        world.apply("demo", ModelServiceSpec { max_batch_size: 3, ..Default::default() }).expect("changed");
        let mut counted = facts(10);
        counted.shape.tensor_extra_bytes = vec![1, 2, 3];
        let known = world.state.known_facts(Box::new(counted.clone()));
        assert_eq!(*known, facts(10), "what tensor ranks share is assumed");
        world.record_facts("demo", *known).expect("known");
        join(&mut world, "w1", 1, 1).expect("old");
        place(&mut world, "demo");
        let text = String::from_utf8(world.state.encode()).expect("JSON");
        assert!(text.starts_with("forge-cluster-state 1 "), "the format is the level");
        for newer in ["history", "changedMs", "stuck", "rollout", "\"level\"", "waitsFor", "longestLen", "isForced", "certificates"] {
            assert!(!text.contains(newer), "{newer}");
        }
        for command in [
            Command::UndoService { name: "demo".into(), to: None },
            Command::RecordRollout { name: "demo".into(), generation: 2, stuck: None },
            Command::RecordWait { name: "demo".into(), generation: 2, waits_for: "a worker".into() },
            Command::DrainNode { node: NodeId::from("w1"), draining: true, is_forced: true },
            Command::RecordFacts { name: "demo".into(), generation: 2, facts: Ok(Box::new(counted.clone())) },
            Command::RevokeCertificates { serials: Default::default(), holder: None, force: false },
            Command::BeginCaRotation { from: ca("aa"), to: ca("bb") },
            Command::SwitchCa { to: "bb".repeat(32), force: true },
            Command::FinishCaRotation { to: "bb".repeat(32), force: true },
            Command::AbandonCaRotation,
        ] {
            assert!(matches!(world.run(command), Err(CommandError::Level { needed: 2, level: 1, .. })));
        }
        world.lose("w1", 1).expect("lost");
        world.run(Command::RemoveNode { node: NodeId::from("w1") }).expect("removed");
        world.run(Command::RaiseLevel { level: 2 }).expect("nobody is older");
        world.apply("demo", ModelServiceSpec { max_batch_size: 4, ..Default::default() }).expect("changed");
        let bytes = world.state.encode();
        assert!(bytes.starts_with(b"forge-cluster-state 2 "));
        assert_eq!(ClusterState::decode(&bytes).expect("its own"), world.state);
        assert_eq!(world.state.services()[&"demo".into()].history.len(), 1);
    }
}
