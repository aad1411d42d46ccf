//! The state as a function of its log: random commands in random order, with repeats, jumping clocks and restarts from
//! snapshots. Commands are made of the state they meet, so that many are taken, and bent, so that many are refused.

use std::collections::BTreeMap;

use forge_shared::cluster::Revision;
use forge_shared::cluster::certificate::{CaRecord, CaRotation, CertificateRecord, Holder};
use forge_shared::cluster::command::{
    ApiKeyRecord, Applied, Command, CommandError, Envelope, IdempotencyRecord, JoinToken, MemberRecord, PlannedReplica,
};
use forge_shared::cluster::event::Change;
use forge_shared::cluster::node::{NodePhase, Role};
use forge_shared::cluster::service::{Facts, ReplicaPhase, ReplicaReport, ReplicaStatus};
use forge_shared::ids::{Epoch, Incarnation, NodeId, ServiceName};
use forge_shared::plan::Plan;
use forge_shared::rollout::RolloutSpec;
use forge_shared::spec::{ByteSize, Layout, ModelServiceSpec};
use proptest::prelude::*;

use super::test_support::*;
use super::*;
use crate::placement::{Cluster, Wish, plan};

/// What kind of command, about whom, and how it is bent.
type Draw = (u8, u8, u8, u8);

const START_MS: u64 = 1_700_000_000_000;

struct Log {
    entries: Vec<Envelope>,
    state: ClusterState,
    now_ms: u64,
}

fn node_id(number: u8) -> NodeId {
    NodeId(format!("w{}", number % 4))
}

fn service_name(number: u8) -> ServiceName {
    ServiceName(format!("s{}", number % 3))
}

impl Log {
    fn index(&self) -> u64 {
        self.entries.len() as u64
    }

    /// The next entry, which may be one that was there before.
    fn draw(&mut self, draw: Draw) -> Envelope {
        let (kind, a, b, c) = draw;
        self.now_ms = match kind % 16 {
            // Another leader's clock, an hour off.
            0 => self.now_ms + 3_600_000,
            1 => self.now_ms.saturating_sub(3_600_000),
            _ => self.now_ms + u64::from(c) * 100,
        };
        if kind >= 230 && !self.entries.is_empty() {
            let known = self.entries[(usize::from(a) * 256 + usize::from(b)) % self.entries.len()].clone();
            return match c % 4 {
                // One id for two commands.
                0 => Envelope { command: self.command((a, b, c, kind)), ..known },
                _ => Envelope { proposed_ms: self.now_ms, ..known },
            };
        }
        let request_id = format!("r{}", self.index());
        Envelope { request_id, proposed_ms: self.now_ms, traceparent: String::new(), command: self.command(draw) }
    }

    fn command(&self, (kind, a, b, c): Draw) -> Command {
        let state = &self.state;
        let incarnation = |id: &NodeId| state.nodes().get(id).map_or(1, |node| node.spec.incarnation.0);
        let (node, name) = (node_id(a), service_name(a));
        let bent = c % 4 == 0;
        match kind % 28 {
            0 | 1 => {
                let layout = if b.is_multiple_of(8) { Layout { tensor: 2, ..Layout::default() } } else { Layout::default() };
                let spec = ModelServiceSpec {
                    replicas: u32::from(b % 4),
                    max_batch_size: 1 + usize::from(c % 2),
                    kv_memory: Some(ByteSize(40 * MIB)),
                    layout,
                    rollout: RolloutSpec { progress_deadline_s: if c % 8 == 1 { 60 } else { 600 }, ..Default::default() },
                    ..Default::default()
                };
                Command::ApplyService { service: Box::new(service(&name.0, spec)) }
            }
            2 => Command::ScaleService { name, replicas: u32::from(b % 5) },
            3 => Command::DeleteService { name },
            4 | 5 => {
                let generation = state.services().get(&name).map_or(1, |service| service.generation).saturating_sub(u64::from(bent));
                if c % 8 == 1 {
                    return Command::RecordWait { name, generation, waits_for: format!("w{}", b % 4) };
                }
                let facts = if b.is_multiple_of(8) { Err("no such model".into()) } else { Ok(Box::new(facts(100))) };
                Command::RecordFacts { name, generation, facts }
            }
            6..=10 => self.commit(&name, b, c),
            11..=13 => self.report(a, b, c),
            14 | 15 => {
                let incarnation = (incarnation(&node) + u64::from(b % 3)).saturating_sub(1);
                let spec = if node.0 == "w3" { gateway(&node.0, incarnation) } else { worker(&node.0, incarnation, &[1_500, 700]) };
                Command::JoinNode { spec: Box::new(spec) }
            }
            16 => {
                let incarnation = Incarnation(incarnation(&node).saturating_sub(u64::from(bent)));
                Command::LoseNode { node, incarnation, reason: "test".into() }
            }
            17 => Command::CordonNode { node, cordoned: b.is_multiple_of(2) },
            18 => Command::DrainNode { node, draining: b.is_multiple_of(2), is_forced: b.is_multiple_of(4) },
            19 => Command::RemoveNode { node },
            20 => self.token(a, b, c),
            24..=26 => self.certificate(a, b, c),
            21 => match b % 4 {
                0 => Command::RevokeKey { name: format!("k{}", a % 3) },
                1 => {
                    let record = IdempotencyRecord {
                        tenant: format!("k{}", a % 2),
                        key: format!("i{}", b % 8),
                        body_sha256: "0".repeat(64),
                        clock_s: u64::from(c),
                        numerics_id: "n".into(),
                        expires_ms: self.now_ms + 900_000,
                    };
                    Command::RecordIdempotency { record }
                }
                _ => {
                    let key = ApiKeyRecord {
                        name: format!("k{}", a % 3),
                        id: format!("id{}", a % 3),
                        salt: "0".repeat(32),
                        hash: "0".repeat(64),
                        created_s: 1,
                        rpm: Some(u32::from(c)),
                        tpm: None,
                        revoked_s: None,
                    };
                    Command::PutKey { key: Box::new(key) }
                }
            },
            22 => Command::UndoService { name, to: (b % 3 != 0).then(|| u64::from(c % 6)) },
            23 => match b % 3 {
                0 => Command::RaiseLevel { level: 1 + u32::from(c % 3) },
                _ => {
                    let generation = state.services().get(&name).map_or(1, |service| service.generation);
                    Command::RecordRollout { name, generation, stuck: (!bent).then(|| format!("no room {c}")) }
                }
            },
            _ if bent => Command::RemoveMember { id: u64::from(a % 4) },
            _ => {
                let member = MemberRecord::new(u64::from(a % 4), &format!("c{}", b % 4), &format!("c{}:7000", b % 4), Default::default());
                Command::PutMember { member }
            }
        }
    }

    fn certificate(&self, a: u8, b: u8, c: u8) -> Command {
        let ca = |number: u8| CaRecord { sha256: format!("{:02x}", number % 3).repeat(32), certificate_pem: format!("{}", number % 3) };
        let trust = self.state.trust();
        match c % 8 {
            0..=3 => {
                // A CA signs once most members have said that they believe it.
                let is_wanted = trust.rotation == Some(CaRotation::Introduced);
                let role = if is_wanted { Role::Coordinator } else { Role::ALL[usize::from(b % 4)] };
                let member = self.state.members().values().nth(usize::from(a) % self.state.members().len().max(1));
                let name = member.filter(|_| role == Role::Coordinator).map_or_else(|| node_id(a).0, |member| member.name.clone());
                let issued_s = (self.now_ms / 1_000).saturating_sub(u64::from(b));
                let certificate = CertificateRecord {
                    serial: format!("{:02x}", if is_wanted { 64 + b % 64 } else { a % 8 }),
                    role,
                    name,
                    issued_s,
                    expires_s: issued_s + u64::from(c),
                    ca_sha256: ca(b).sha256,
                    believes: if c >= 128 && !is_wanted { Vec::new() } else { (0..3).map(|number| ca(number).sha256).collect() },
                    is_used: a.is_multiple_of(2),
                    written: Revision(0),
                    revoked_s: None,
                };
                let asked_with = c.is_multiple_of(16).then(|| format!("{:02x}", b % 8));
                Command::RecordCertificate { certificate: Box::new(certificate), asked_with }
            }
            4 => Command::RevokeCertificates {
                serials: if c >= 64 { Default::default() } else { [format!("{:02x}", a % 8)].into() },
                holder: (c >= 64).then(|| Holder { role: Role::ALL[usize::from(b % 4)], name: node_id(a).0 }),
                force: b.is_multiple_of(2),
            },
            5 => Command::BeginCaRotation { from: ca(a), to: ca(b) },
            // A rotation has three steps in this order; random ones alone would hardly ever take them.
            _ if trust.rotation == Some(CaRotation::Switched) => {
                let to = if a.is_multiple_of(8) { ca(a).sha256 } else { trust.cas[0].sha256.clone() };
                Command::FinishCaRotation { to, force: !b.is_multiple_of(4) }
            }
            7 if b.is_multiple_of(4) => Command::AbandonCaRotation,
            _ => {
                let new = trust.cas.get(1).map_or_else(|| ca(a).sha256, |new| new.sha256.clone());
                Command::SwitchCa { to: if a.is_multiple_of(8) { ca(a).sha256 } else { new }, force: !b.is_multiple_of(4) }
            }
        }
    }

    fn token(&self, a: u8, b: u8, c: u8) -> Command {
        let id = format!("t{}", a % 2);
        match b % 4 {
            0 => Command::RemoveJoinToken { id },
            1 => {
                let expires_ms = self.now_ms + u64::from(c) * 1_000;
                let uses_left = u32::from(c % 3) + 1;
                Command::PutJoinToken { token: JoinToken { id, secret_sha256: "0".repeat(64), role: Role::Worker, expires_ms, uses_left } }
            }
            _ => Command::UseJoinToken { id, role: if c.is_multiple_of(5) { Role::Gateway } else { Role::Worker }, node: node_id(c).0 },
        }
    }

    /// What the leader would place, or something like it that is out of date, out of order or too large.
    fn commit(&self, name: &ServiceName, b: u8, c: u8) -> Command {
        let state = &self.state;
        let basis = Revision(state.revision().0.saturating_sub(u64::from(c.is_multiple_of(8)) * u64::from(b % 4)));
        let Some(service) = state.services().get(name) else {
            return Command::CommitPlans { basis, plans: vec![], removed: vec![], refusals: vec![], settled: vec![] };
        };
        let removed = service.replicas.iter().chain(service.leaving.iter().map(|leaving| &leaving.replica));
        let removed =
            removed.filter(|_| b.is_multiple_of(5)).map(|replica| (replica.plan.replica.clone(), replica.plan.epoch)).take(2).collect();
        let indices: Vec<u32> =
            (0..service.service.spec.replicas).filter(|index| b.is_multiple_of(3) || placed(service, *index).is_none()).collect();
        let mut plans = Vec::new();
        if let Facts::Known { facts } = &service.facts {
            let last_epoch = Epoch(service.last_epoch.0.saturating_sub(u64::from(c % 16 == 1)));
            let spec = &service.service.spec;
            let wish = Wish { service: name, spec, facts, indices: &indices, last_epoch, standing: &[], avoided: &[], on_one_node: false };
            plans = plan(&mut Cluster::of(state), &wish).plans;
        }
        if c % 16 == 2 {
            plans.iter_mut().for_each(|plan| plan.ranks[0].memory.kv_bytes <<= 6);
        }
        let plans = plans.into_iter().map(|plan| PlannedReplica { plan, generation: service.generation }).collect();
        Command::CommitPlans { basis, plans, removed, refusals: vec![], settled: vec![] }
    }

    fn report(&self, a: u8, b: u8, c: u8) -> Command {
        let plans: Vec<&Plan> = self.state.standing_plans().collect();
        let replica = plans.get(usize::from(a) % plans.len().max(1)).map_or_else(|| id("s0", 0), |plan| plan.replica.clone());
        let plan = plans.iter().find(|plan| plan.replica == replica);
        let node = plan.map_or_else(|| node_id(a), |plan| plan.ranks[0].node.clone());
        let known = self.state.nodes().get(&node).map_or(Incarnation(1), |node| node.spec.incarnation);
        let incarnation = Incarnation(known.0.saturating_sub(u64::from(c.is_multiple_of(8))));
        let phases = [ReplicaPhase::Loading, ReplicaPhase::Ready, ReplicaPhase::Ready, ReplicaPhase::Failed, ReplicaPhase::Stopped];
        let status = ReplicaStatus { phase: phases[usize::from(b) % phases.len()], percent: c % 120, ..ReplicaStatus::placed() };
        let epoch = Epoch(plan.map_or(1, |plan| plan.epoch.0).saturating_sub(u64::from(c % 8 == 1)));
        let found_memory_bytes = (c % 16 == 3).then_some(600 * MIB);
        Command::ReportReplica { node, incarnation, report: ReplicaReport { replica, epoch, status, found_memory_bytes } }
    }
}

fn placed(service: &ServiceRecord, index: u32) -> Option<&ReplicaRecord> {
    service.replicas.iter().find(|replica| replica.plan.replica.index == index)
}

/// What was seen over a log's life.
#[derive(Default)]
struct Seen {
    /// The largest epoch that ever stood, by service, over deletion.
    epochs: BTreeMap<ServiceName, Epoch>,
    /// The processes that an epoch was given to.
    processes: BTreeMap<(ServiceName, Epoch), Vec<(NodeId, Incarnation)>>,
}

impl Seen {
    fn check(&mut self, state: &ClusterState) -> Result<(), TestCaseError> {
        prop_assert_eq!(check_rules(state), Ok(()));
        let mut fresh: BTreeMap<ServiceName, Vec<Epoch>> = BTreeMap::new();
        let mut live = Vec::new();
        for plan in state.standing_plans() {
            let name = plan.replica.service.clone();
            let key = (name.clone(), plan.epoch);
            prop_assert!(!live.contains(&key), "two live plans of {} have epoch {}", name, plan.epoch);
            live.push(key.clone());
            let mut processes = Vec::new();
            for rank in &plan.ranks {
                let node = state.nodes().get(&rank.node);
                prop_assert!(node.is_some_and(|node| node.phase == NodePhase::Ready), "{} stands on a lost node", plan.replica);
                processes.extend(node.map(|node| (rank.node.clone(), node.spec.incarnation)));
            }
            match self.processes.get(&key) {
                Some(first) => prop_assert_eq!(first, &processes, "an epoch outlived a process"),
                None => {
                    fresh.entry(name).or_default().push(plan.epoch);
                    self.processes.insert(key, processes);
                }
            }
        }
        for (name, epochs) in fresh {
            let last = self.epochs.entry(name.clone()).or_insert(Epoch(0));
            prop_assert!(epochs.iter().all(|epoch| epoch > last), "{}: {:?} after {}", name, epochs, last);
            *last = epochs.into_iter().max().unwrap_or(*last);
        }
        Ok(())
    }
}

/// Logs of this kind are no good if most of what they hold is refused.
#[test]
fn random_logs_reach_every_command() {
    let mut taken: BTreeMap<String, usize> = BTreeMap::new();
    let mut placed = 0;
    let mut word = 1u64;
    for number in 0..120 {
        let mut log = Log { entries: Vec::new(), state: ClusterState::new("test"), now_ms: START_MS };
        // Every other log is that of a group whose level was raised at once: what is new takes effect from there on.
        if number % 2 == 0 {
            let command = Command::RaiseLevel { level: forge_shared::version::LEVEL };
            let raise = Envelope { request_id: "raise".into(), proposed_ms: START_MS, traceparent: String::new(), command };
            log.state.apply(Revision(1), &raise).0.expect("nobody is older");
            log.entries.push(raise);
        }
        for _ in 0..160 {
            word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let [.., a, b, c, d] = word.to_be_bytes()[..5] else { unreachable!("five bytes") };
            let envelope = log.draw((a, b, c, d));
            let before = log.state.standing_plans().count();
            let (reply, _) = log.state.apply(Revision(log.index() + 1), &envelope);
            if reply.is_ok_and(|applied| applied.changed) {
                let name = format!("{:?}", envelope.command);
                *taken.entry(name.split([' ', '{']).next().unwrap_or_default().to_owned()).or_default() += 1;
            }
            placed += log.state.standing_plans().count().saturating_sub(before);
            log.entries.push(envelope);
        }
    }
    assert_eq!(taken.len(), 29, "{taken:?}");
    assert!(placed > 100, "{placed} plans, {taken:?}");
}

type Answer = (Result<Applied, CommandError>, Vec<Change>);

fn reread(state: &ClusterState) -> ClusterState {
    ClusterState::decode(&state.encode()).expect("its own snapshot")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]
    /// The same log makes the same state, replies and changes, from the beginning and from a snapshot at any entry; an id
    /// that is applied again changes nothing; and the rules hold after every entry.
    #[test]
    fn a_log_is_a_state(
        draws in proptest::collection::vec(any::<Draw>(), 1..160),
        restarts in proptest::collection::btree_set(0usize..160, 0..6),
        from in any::<prop::sample::Index>(),
    ) {
        let mut log = Log { entries: Vec::new(), state: ClusterState::new("test"), now_ms: START_MS };
        let mut answers: Vec<Answer> = Vec::new();
        // Ids are remembered apart for commands from outside and for those of leaders and workers.
        let mut taken: BTreeMap<(String, bool), (Command, Result<Applied, CommandError>)> = BTreeMap::new();
        let mut seen = Seen::default();
        let mut snapshot = None;
        let from = from.index(draws.len());
        for (number, draw) in draws.into_iter().enumerate() {
            if number == from {
                snapshot = Some(log.state.encode());
            }
            let envelope = log.draw(draw);
            let before = log.state.clone();
            let (reply, changes) = log.state.apply(Revision(number as u64 + 1), &envelope);
            let key = (envelope.request_id.clone(), is_asked(&envelope.command));
            let is_quiet = reply.is_err() || taken.contains_key(&key);
            if is_quiet {
                prop_assert!(changes.is_empty());
                prop_assert_eq!(log.state.revision(), before.revision());
                prop_assert_eq!(log.state.services(), before.services());
                prop_assert_eq!(log.state.nodes(), before.nodes());
                prop_assert_eq!((log.state.keys(), log.state.members()), (before.keys(), before.members()));
                prop_assert!(log.state.tokens().eq(before.tokens()) && log.state.notices().eq(before.notices()));
            }
            let is_forgotten = matches!(envelope.command, Command::RaiseLevel { .. }) && reply.as_ref().is_ok_and(|applied| !applied.changed);
            match taken.get(&key) {
                Some((command, first)) if *command == envelope.command => prop_assert_eq!(&reply, first, "the answer of then"),
                Some(_) => prop_assert!(matches!(&reply, Err(CommandError::Conflict { .. })), "one id is one command"),
                None if is_forgotten => {}
                None => drop(taken.insert(key, (envelope.command.clone(), reply.clone()))),
            }
            if changes.is_empty() && reply.as_ref().is_ok_and(|applied| !applied.changed) {
                prop_assert_eq!(log.state.services(), before.services());
            }
            seen.check(&log.state)?;
            log.entries.push(envelope);
            answers.push((reply, changes));
        }
        // Another coordinator, which begins anew from its snapshot now and then.
        let mut replica = ClusterState::new("test");
        for (number, envelope) in log.entries.iter().enumerate() {
            if restarts.contains(&number) {
                replica = reread(&replica);
            }
            prop_assert_eq!(&replica.apply(Revision(number as u64 + 1), envelope), &answers[number]);
        }
        prop_assert_eq!(&replica, &log.state);
        prop_assert_eq!(replica.encode(), log.state.encode());
        // One that got a snapshot and the rest of the log; it may be given entries that the snapshot has.
        let mut late = snapshot.map(|bytes| ClusterState::decode(&bytes).expect("a snapshot")).unwrap_or_else(|| ClusterState::new("test"));
        for (number, envelope) in log.entries.iter().enumerate().skip(from.saturating_sub(3)) {
            let answer = late.apply(Revision(number as u64 + 1), envelope);
            if number >= from {
                prop_assert_eq!(&answer, &answers[number]);
            } else {
                prop_assert!(answer.0.is_err() && answer.1.is_empty());
            }
        }
        prop_assert_eq!(&late, &log.state);
    }
}
