//! The leader's controller: what it would have changed, given the state and the leases.
//!
//! Called after every change of the state and on every tick. What it proposes is fenced (incarnations, epochs, the basis of
//! a commit), so a proposal that comes late or twice does no harm; within a short time it does not repeat one.
//!
//! Invariant: when all that is wished runs, and no lease is over, it proposes nothing.

use std::collections::BTreeMap;

use forge_shared::cluster::Revision;
use forge_shared::cluster::command::{Command, PlannedReplica};
use forge_shared::cluster::node::{NodePhase, Role};
use forge_shared::cluster::service::{Facts, ReplicaRecord, ServiceRecord};
use forge_shared::ids::{Epoch, Incarnation, NodeId, ReplicaId, ServiceName};
use forge_shared::plan::{ModelFacts, Plan, Refusal};
use forge_shared::spec::ModelService;

use super::commit::Commit;
use super::deadline::Deadlines;
use super::failures::Failures;
use super::inspect::Inspections;
use super::lease::LeaseTable;
use super::rollout::{Budget, Replaced, Work};
use super::{drain_ms, present, wish_of};
use crate::placement::{self, Cluster, Placement, Wish};
use crate::state::ClusterState;

/// Ready replicas whose successors are tried in vain in one pass: the others wait for the next.
const TRIES: usize = 8;

/// What the leader is to do.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "each variant is described; its fields' names and types say the rest")]
pub enum Intent {
    /// Propose this under a new request id.
    Propose(Command),
    /// Ask this node what the service's model is, and hand its answer to [`Controller::inspected`].
    Inspect { node: NodeId, incarnation: Incarnation, service: Box<ModelService>, generation: u64 },
}

/// Times of a controller, milliseconds.
#[derive(Debug, Clone, Copy)]
pub struct ControllerOptions {
    /// A proposal that changed nothing by then is made again.
    pub propose_again_ms: u64,
    /// A replica's worker may say so much later than the service's drain time that it has ended.
    pub drain_margin_ms: u64,
    /// A lost gateway is forgotten after this time. Lost workers stay until an operator removes them.
    pub forget_gateway_ms: u64,
}

impl Default for ControllerOptions {
    fn default() -> Self {
        ControllerOptions { propose_again_ms: 2_000, drain_margin_ms: 5_000, forget_gateway_ms: 3_600_000 }
    }
}

/// The leader's controller. A new leader begins with a new one.
#[derive(Debug, Clone, Default)]
pub struct Controller {
    options: ControllerOptions,
    failures: Failures,
    inspections: Inspections,
    /// Since when replicas have been draining, as far as this leader saw.
    draining_since_ms: BTreeMap<(ReplicaId, Epoch), u64>,
    /// Since when gateways have been lost.
    lost_since_ms: BTreeMap<NodeId, u64>,
    /// Nodes that were proposed to be lost or removed, and when to propose it again.
    proposed_nodes: BTreeMap<(NodeId, Incarnation), u64>,
    deadlines: Deadlines,
    /// The state that a placement was proposed for, and when to propose it again.
    proposed_plans: Option<(Revision, u64)>,
}

impl Controller {
    /// A controller that knows nothing but the state it is shown.
    pub fn new(options: ControllerOptions) -> Self {
        Controller { options, ..Controller::default() }
    }

    /// What is to be done now. `now_ms` is the leader's monotonic clock; `leases` follow the state already.
    pub fn decide(&mut self, now_ms: u64, state: &ClusterState, leases: &LeaseTable) -> Vec<Intent> {
        let mut intents = Vec::new();
        self.watch_nodes(now_ms, state, leases, &mut intents);
        self.inspections.decide(now_ms, state, &mut intents);
        self.failures.follow(now_ms, state);
        self.watch_draining(now_ms, state);
        intents.extend(self.deadlines.decide(now_ms, state).into_iter().map(Intent::Propose));
        let is_waited_for = |(basis, again_ms): (Revision, u64)| basis == state.placement_revision() && now_ms < again_ms;
        let moves_nothing = |intent: &Intent| {
            matches!(intent, Intent::Inspect { .. } | Intent::Propose(Command::RecordWait { .. } | Command::RecordRollout { .. }))
        };
        // A placement beside the loss of a node would be stale when it is applied; what a service waits for moves nothing.
        if intents.iter().all(moves_nothing)
            && !self.proposed_plans.is_some_and(is_waited_for)
            && let Some(commit) = self.place(now_ms, state)
        {
            self.proposed_plans = Some((state.placement_revision(), now_ms.saturating_add(self.options.propose_again_ms)));
            intents.push(Intent::Propose(commit));
        }
        intents
    }

    /// A worker answered an inspection; `None` where it was busy or its session ended first. What to propose, if that settles it.
    pub fn inspected(
        &mut self,
        now_ms: u64,
        state: &ClusterState,
        (node, service): (&NodeId, &ServiceName),
        answer: Option<Result<Box<ModelFacts>, String>>,
    ) -> Option<Command> {
        self.inspections.answered(now_ms, state, node, service, answer)
    }

    fn watch_nodes(&mut self, now_ms: u64, state: &ClusterState, leases: &LeaseTable, intents: &mut Vec<Intent>) {
        let nodes = state.nodes();
        self.proposed_nodes.retain(|(id, incarnation), again_ms| {
            now_ms < *again_ms && nodes.get(id).is_some_and(|node| node.spec.incarnation == *incarnation)
        });
        self.lost_since_ms.retain(|id, _| nodes.get(id).is_some_and(|node| node.phase == NodePhase::Lost));
        let again_ms = now_ms.saturating_add(self.options.propose_again_ms);
        for (node, incarnation) in leases.expired(now_ms) {
            let is_ready = nodes.get(&node).is_some_and(|known| known.phase == NodePhase::Ready && known.spec.incarnation == incarnation);
            if is_ready && self.proposed_nodes.insert((node.clone(), incarnation), again_ms).is_none() {
                let reason = format!("no heartbeat for {} ms, or it said good-bye", leases.lease_ms());
                intents.push(Intent::Propose(Command::LoseNode { node, incarnation, reason }));
            }
        }
        let lost = nodes.values().filter(|node| node.phase == NodePhase::Lost && node.spec.role == Role::Gateway);
        for node in lost {
            let id = &node.spec.id;
            let since_ms = *self.lost_since_ms.entry(id.clone()).or_insert(now_ms);
            let is_old = now_ms.saturating_sub(since_ms) >= self.options.forget_gateway_ms;
            if is_old && self.proposed_nodes.insert((id.clone(), node.spec.incarnation), again_ms).is_none() {
                intents.push(Intent::Propose(Command::RemoveNode { node: id.clone() }));
            }
        }
    }

    fn watch_draining(&mut self, now_ms: u64, state: &ClusterState) {
        let mut seen = BTreeMap::new();
        for leaving in state.services().values().flat_map(|service| &service.leaving).filter(|leaving| leaving.is_draining) {
            let key = (leaving.replica.plan.replica.clone(), leaving.replica.plan.epoch);
            let since_ms = self.draining_since_ms.get(&key).copied().unwrap_or(now_ms);
            seen.insert(key, since_ms);
        }
        self.draining_since_ms = seen;
    }

    /// Whether a draining replica of a service had its time.
    fn is_drained(&self, now_ms: u64, service: &ServiceRecord, replica: &ReplicaRecord) -> bool {
        let key = (replica.plan.replica.clone(), replica.plan.epoch);
        let Some(since_ms) = self.draining_since_ms.get(&key) else { return false };
        let drain_ms = wish_of(service, replica.generation).map_or(0, |(wish, _)| drain_ms(wish));
        now_ms.saturating_sub(*since_ms) >= drain_ms.saturating_add(self.options.drain_margin_ms)
    }

    fn place(&self, now_ms: u64, state: &ClusterState) -> Option<Command> {
        let mut commit = Commit::default();
        // Built when the first service needs it: most calls find nothing to do.
        let mut cluster: Option<Cluster> = None;
        for (name, service) in state.services() {
            if commit.is_full() {
                break;
            }
            let is_over = |replica: &ReplicaRecord| self.is_drained(now_ms, service, replica);
            let mut refusal = None;
            if service.is_deleted {
                remove(&mut commit, Work::of_deleted(service, is_over).removed);
            } else {
                let mut work = Work::of(now_ms, state, (name, service), &self.failures, is_over);
                remove(&mut commit, std::mem::take(&mut work.removed));
                if work.places() && !commit.is_full() {
                    let cluster = cluster.get_or_insert_with(|| Cluster::of(state));
                    refusal = self.place_service(cluster, name, service, &work, &mut commit);
                }
                if commit.is_full() || (work.waits && refusal.is_none() && has_gap(service)) {
                    refusal = service.refusal.clone();
                }
            }
            commit.say(name, service.refusal.as_ref(), refusal);
        }
        commit.into_command(state.revision())
    }

    fn place_service(
        &self,
        cluster: &mut Cluster,
        name: &ServiceName,
        service: &ServiceRecord,
        work: &Work,
        commit: &mut Commit,
    ) -> Option<Refusal> {
        let Facts::Known { facts } = &service.facts else {
            // Nothing can be planned, and only a node drained by force makes a ready replica go without a successor.
            remove(commit, work.ready.iter().take(1).map(|replaced| replaced.id(name)));
            return None;
        };
        let mut placing = Placing { cluster, name, service, facts, epoch: service.last_epoch, plans: Vec::new() };
        let mut placed = 0;
        let (failed, often) = self.failures.nodes(name);
        let mut refusal = None;
        let (mut homeless, mut budget) = (0, work.budget);
        for &index in &work.missing {
            if commit.is_full() {
                return None;
            }
            let refused = placing.somewhere(index, &[&failed, &often]).err();
            // One that stands beside its predecessor and found no other place may have that one's, unless it is itself what
            // failed.
            if refused.is_some()
                && failed.is_empty()
                && budget.available > budget.floor
                && let Some(before) = Replaced::predecessor(service, index)
                && placing.refused_instead(&before, &often, None).is_none()
            {
                budget.available -= 1;
                remove(commit, [before.id(name)]);
                continue;
            }
            // Neither one that failed where it was nor one whose place comes free fits nowhere.
            homeless += usize::from(refused.is_some() && often.is_empty() && !work.waits && is_gone(service, index));
            // Where a predecessor still finishes its requests its memory comes free soon.
            refusal = refusal.or(refused.filter(|_| !work.waits));
            placed += placing.give(placed, commit);
        }
        for replaced in &work.unready {
            if commit.is_full() {
                return None;
            }
            let old = service.replicas.iter().find(|replica| replica.plan.epoch == replaced.epoch);
            old.iter().for_each(|old| placing.cluster.release(&old.plan));
            if let Err(refused) = placing.somewhere(replaced.index, &[&often]) {
                old.iter().for_each(|old| placing.cluster.take(&old.plan));
                refusal = refusal.or(Some(refused));
            }
            placed += placing.give(placed, commit);
        }
        let changes = Changes { service, work, budget, often: &often, homeless };
        let (drained, changed) = work.ready.split_at(work.ready.partition_point(|replaced| replaced.is_on_draining));
        let (refused, is_moving) = placing.empty_nodes(drained, &often, &mut placed, commit);
        refusal = refusal.or(refused);
        if is_moving {
            return refusal;
        }
        refusal.or(placing.replace_changed(&changes, changed, &mut placed, commit))
    }
}

/// Whether nothing of an index is there, nor on its way out.
fn is_gone(service: &ServiceRecord, index: u32) -> bool {
    let leaving = service.leaving.iter().map(|leaving| &leaving.replica);
    service.replicas.iter().chain(leaving).all(|replica| replica.plan.replica.index != index)
}

/// Whether a wished replica is not there, or does not run.
fn has_gap(service: &ServiceRecord) -> bool {
    service.replicas.iter().filter(|replica| crate::state::runs(replica)).count() < service.service.spec.replicas as usize
}

/// Removes as many as there is room for.
fn remove(commit: &mut Commit, replicas: impl IntoIterator<Item = (ReplicaId, Epoch)>) {
    for (replica, epoch) in replicas {
        if commit.is_full() {
            return;
        }
        commit.remove(replica, epoch);
    }
}

impl Replaced {
    fn id(&self, name: &ServiceName) -> (ReplicaId, Epoch) {
        (ReplicaId { service: name.clone(), index: self.index }, self.epoch)
    }
}

/// Plans of a service's generation, and those in the making, of other replicas than one: they decide its context.
fn others<'a>(service: &'a ServiceRecord, made: &'a [Plan], index: u32) -> Vec<&'a Plan> {
    let (_, standing) = present(service);
    standing.into_iter().filter(|plan| plan.replica.index != index).chain(made).collect()
}

/// What is known besides the ready replicas whose wish was changed.
struct Changes<'a> {
    service: &'a ServiceRecord,
    work: &'a Work,
    /// What of the strategy is left.
    budget: Budget,
    /// Nodes where the service failed too often.
    often: &'a [NodeId],
    /// Wished replicas that fit nowhere.
    homeless: usize,
}

/// One service's placement in the making.
struct Placing<'a> {
    cluster: &'a mut Cluster,
    name: &'a ServiceName,
    service: &'a ServiceRecord,
    facts: &'a ModelFacts,
    epoch: Epoch,
    plans: Vec<Plan>,
}

impl Placing<'_> {
    /// Places one replica off the first of these groups of nodes that leaves it a place: with the context that its
    /// generation has had, and only where that fits nowhere with a shorter one.
    fn somewhere(&mut self, index: u32, avoided: &[&[NodeId]]) -> Result<(), Refusal> {
        let longest_len = self.longest_len(index);
        if longest_len.is_some() && avoided.iter().any(|avoided| self.one(index, avoided, longest_len).is_ok()) {
            return Ok(());
        }
        let mut refused = Ok(());
        for avoided in avoided {
            refused = self.one(index, avoided, None);
            if refused.is_ok() {
                break;
            }
        }
        refused
    }

    /// Places one replica off `avoided` nodes, and off those where an older epoch of it still runs.
    fn one(&mut self, index: u32, avoided: &[NodeId], kept_len: Option<usize>) -> Result<(), Refusal> {
        let Placement { plans, refusal } = self.plan(index, avoided, kept_len, None);
        if let Some(plan) = plans.first() {
            self.epoch = plan.epoch;
        }
        self.plans.extend(plans);
        refusal.map_or(Ok(()), Err)
    }

    /// Puts what was placed after the first `given` plans into the commit; how many these were.
    fn give(&self, given: usize, commit: &mut Commit) -> usize {
        let plans = self.plans[given..].iter().cloned();
        plans.map(|plan| commit.plan(PlannedReplica { plan, generation: self.service.generation })).count()
    }

    /// Moves the first replica off its drained node that can be: one whose node is not drained by force keeps its context,
    /// and serves on where it is until there is room elsewhere; another ends without a successor. What was refused, and
    /// whether one moves or ends.
    fn empty_nodes(&mut self, drained: &[Replaced], often: &[NodeId], placed: &mut usize, commit: &mut Commit) -> (Option<Refusal>, bool) {
        let mut refusal = None;
        for replaced in drained {
            if commit.is_full() {
                return (refusal, true);
            }
            let elsewhere: Vec<NodeId> = often.iter().chain(&replaced.nodes).cloned().collect();
            // A place with less context is no place for what answers, unless it must go.
            let moved = match replaced.is_forced_off {
                true => self.somewhere(replaced.index, &[&elsewhere]),
                false => self.one(replaced.index, &elsewhere, self.served_len(replaced)),
            };
            *placed += self.give(*placed, commit);
            let Err(refused) = moved else { return (refusal, true) };
            refusal = refusal.or(Some(refused));
            if replaced.is_forced_off {
                remove(commit, [replaced.id(self.name)]);
                return (refusal, true);
            }
        }
        (refusal, false)
    }

    /// Replaces ready replicas as far as the strategy lets it: beside them, or else in their places. What fits nowhere is
    /// refused while nothing else is under way.
    fn replace_changed(&mut self, changes: &Changes<'_>, changed: &[Replaced], placed: &mut usize, commit: &mut Commit) -> Option<Refusal> {
        let Changes { service, work, mut budget, often, homeless } = *changes;
        let mut refusal = None;
        let mut tries = TRIES;
        for (position, replaced) in changed.iter().enumerate() {
            if commit.is_full() || tries == 0 {
                break;
            }
            let may_take_away = budget.may_take_away(homeless);
            let is_first = position == 0 && !budget.is_surging;
            if budget.surge == 0 && !may_take_away && !is_first {
                break;
            }
            let mut refused = None;
            if budget.surge > 0 {
                let elsewhere: Vec<NodeId> = often.iter().chain(&replaced.nodes).cloned().collect();
                refused = self.one(replaced.index, &elsewhere, self.served_len(replaced)).err();
                if refused.is_none() {
                    budget.surge -= 1;
                    budget.is_surging = true;
                    *placed += self.give(*placed, commit);
                    continue;
                }
                tries -= 1;
            }
            match self.refused_instead(replaced, often, self.served_len(replaced)) {
                None if may_take_away => {
                    budget.available -= 1;
                    remove(commit, [replaced.id(self.name)]);
                }
                // Nobody may be missing, and there is no room beside: nothing will change that.
                None if is_first && budget.available >= service.service.spec.replicas as usize => {
                    let one = vec![("rollout.maxUnavailable".to_owned(), "1".to_owned())];
                    refusal = refusal.or(refused.map(|refused| Refusal { nearest: one, ..refused }));
                }
                None => {}
                Some(instead) => {
                    tries = tries.saturating_sub(1);
                    let is_alone = !work.waits && !budget.is_surging && work.missing.is_empty() && work.unready.is_empty();
                    refusal = refusal.or(refused.or(Some(instead)).filter(|_| is_alone));
                }
            }
        }
        refusal
    }

    /// Why a replica's successor does not fit where it is now, once it is gone; nothing where it does. `kept_len` as of
    /// [`Placing::plan`].
    fn refused_instead(&mut self, replaced: &Replaced, avoided: &[NodeId], kept_len: Option<usize>) -> Option<Refusal> {
        let leaving = self.service.leaving.iter().map(|leaving| &leaving.replica);
        let old = self.service.replicas.iter().chain(leaving).find(|replica| replica.plan.epoch == replaced.epoch)?;
        self.cluster.release(&old.plan);
        let Placement { plans, refusal } = self.plan(replaced.index, avoided, kept_len, Some(replaced.epoch));
        plans.iter().for_each(|plan| self.cluster.release(plan));
        self.cluster.take(&old.plan);
        refusal
    }

    /// The context that the generation has had, where nothing that stands says which.
    fn longest_len(&self, index: u32) -> Option<usize> {
        self.service.longest_len.filter(|_| others(self.service, &self.plans, index).is_empty())
    }

    /// The context of a replica that answers, if its successor is of the same generation; else as [`Placing::longest_len`].
    fn served_len(&self, replaced: &Replaced) -> Option<usize> {
        let own = self.service.replicas.iter().find(|replica| replica.plan.epoch == replaced.epoch);
        let own = own.filter(|replica| replica.generation == self.service.generation).map(|replica| replica.plan.max_model_len);
        let longest_len = self.longest_len(replaced.index);
        longest_len.and(own).or(longest_len)
    }

    /// A plan off `avoided` nodes and off those where an older epoch of the replica runs, but for one that is to be `gone`.
    /// `kept_len`, if given, is the context it has instead of the longest that fits; a stated one goes before.
    fn plan(&mut self, index: u32, avoided: &[NodeId], kept_len: Option<usize>, gone: Option<Epoch>) -> Placement {
        let mut spec = self.service.service.spec.clone();
        spec.max_model_len = spec.max_model_len.or(kept_len);
        let standing = others(self.service, &self.plans, index);
        let is_older = |plan: &Plan| plan.replica.index == index && Some(plan.epoch) != gone;
        let older = self.service.leaving.iter().filter(|leaving| is_older(&leaving.replica.plan));
        let older = older.flat_map(|leaving| leaving.replica.plan.ranks.iter().map(|rank| rank.node.clone()));
        let avoided: Vec<(u32, NodeId)> = avoided.iter().cloned().chain(older).map(|node| (index, node)).collect();
        let wish = Wish {
            service: self.name,
            spec: &spec,
            facts: self.facts,
            indices: &[index],
            last_epoch: self.epoch,
            standing: &standing,
            avoided: &avoided,
            on_one_node: false,
        };
        placement::plan(self.cluster, &wish)
    }
}
