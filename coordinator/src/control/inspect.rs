//! Whom the leader asks to look at a service's model, and what it makes of the answers.
//!
//! Invariant: one worker at a time is asked for a service, and about few services at a time; a model is unusable only after
//! several workers could not use it, or all there are; one that is busy, or does not answer, has not judged: the next one is
//! asked, with growing pauses. What a service waits for longer than a moment is said in the state.

use std::collections::BTreeMap;

use forge_shared::cluster::command::Command;
use forge_shared::cluster::node::{NodePhase, NodeRecord, Role};
use forge_shared::cluster::service::{Facts, ServiceRecord};
use forge_shared::ids::{Incarnation, NodeId, ServiceName};
use forge_shared::plan::ModelFacts;

use super::controller::Intent;
use crate::state::ClusterState;

/// A worker answers within this time, or another is asked: it may have to download headers.
const ANSWER_MS: u64 = 120_000;
/// What was answered is in the state within this time, or it is asked once more.
const RECORD_MS: u64 = 5_000;
/// Workers that are asked before a model is called unusable.
const TRIES: usize = 3;
/// Questions that one worker has at a time: it looks at so many models together, and says of a further one that it is busy.
const QUESTIONS_PER_NODE: usize = 2;
/// Pause after the first question without an answer, and the most, milliseconds.
const PAUSE_MS: (u64, u64) = (1_000, 60_000);

/// What is waited for no longer than this is not said, milliseconds.
const SAY_AFTER_MS: u64 = 2_000;

/// Questions under way.
#[derive(Debug, Clone, Default)]
pub(super) struct Inspections {
    services: BTreeMap<ServiceName, Inspection>,
}

#[derive(Debug, Clone, Default)]
struct Inspection {
    generation: u64,
    asked: Option<Asked>,
    /// Workers that were asked in this round.
    tried: Vec<NodeId>,
    /// What is wrong with the model, by who said so.
    refused: BTreeMap<NodeId, String>,
    unanswered: u32,
    not_before_ms: u64,
    /// Since when this leader has known that nobody has looked.
    since_ms: Option<u64>,
    /// What was proposed to be said may be proposed again then.
    say_again_ms: u64,
}

#[derive(Debug, Clone)]
struct Asked {
    node: NodeId,
    incarnation: Incarnation,
    since_ms: u64,
    until_ms: u64,
    /// What it said waits to be in the state.
    is_answered: bool,
}

impl Inspections {
    pub fn decide(&mut self, now_ms: u64, state: &ClusterState, intents: &mut Vec<Intent>) {
        let services = state.services();
        let is_open = |name: &ServiceName| services.get(name).is_some_and(|s| !s.is_deleted && matches!(s.facts, Facts::Unknown { .. }));
        self.services.retain(|name, _| is_open(name));
        for (name, service) in services.iter().filter(|(name, _)| is_open(name)) {
            let known = self.services.entry(name.clone()).or_default();
            if known.generation != service.generation {
                *known = Inspection { generation: service.generation, ..Inspection::default() };
            }
            let since_ms = *known.since_ms.get_or_insert(now_ms);
            let waits_for = self.take_turn(now_ms, state, name, service, intents);
            let Facts::Unknown { waits_for: said } = &service.facts else { continue };
            let Some(waits_for) = waits_for.filter(|waits_for| waits_for != said) else { continue };
            let Some(known) = self.services.get_mut(name) else { continue };
            if now_ms.saturating_sub(since_ms) >= SAY_AFTER_MS && now_ms >= known.say_again_ms {
                known.say_again_ms = now_ms.saturating_add(SAY_AFTER_MS);
                let command = Command::RecordWait { name: name.clone(), generation: service.generation, waits_for };
                intents.extend(state.check_level(&command).is_ok().then_some(Intent::Propose(command)));
            }
        }
    }

    /// Asks a worker about a service if it is time. What the service waits for; `None` where that cannot be said yet.
    fn take_turn(
        &mut self,
        now_ms: u64,
        state: &ClusterState,
        name: &ServiceName,
        service: &ServiceRecord,
        intents: &mut Vec<Intent>,
    ) -> Option<String> {
        let model = &service.service.spec.model;
        let known = self.services.get_mut(name)?;
        if let Some(asked) = &known.asked {
            let lives = state.nodes().get(&asked.node).is_some_and(|node| is_able(node) && node.spec.incarnation == asked.incarnation);
            if lives && now_ms < asked.until_ms {
                let is_long = now_ms.saturating_sub(asked.since_ms) >= SAY_AFTER_MS && !asked.is_answered;
                return is_long.then(|| format!("worker {} is reading the model {model}{}", asked.node, known.judged()));
            }
            known.give_up_question(now_ms);
        }
        let workers = || state.nodes().values().filter(|node| is_able(node));
        if workers().next().is_none() {
            return Some(format!("no worker is there that could look at the model {model}: start one"));
        }
        if now_ms < known.not_before_ms {
            let judged = known.judged();
            return Some(format!(
                "no worker has told what the model {model} is: those asked were busy, or did not answer{judged}; one is asked again"
            ));
        }
        let busy = self.questions_per_node();
        let known = self.services.get_mut(name)?;
        if workers().all(|node| known.tried.contains(&node.spec.id)) {
            known.tried.clear();
        }
        let untried = workers().filter(|node| !known.tried.contains(&node.spec.id));
        let questions = |node: &NodeRecord| busy.get(&node.spec.id).copied().unwrap_or(0);
        let free = untried.filter(|node| questions(node) < QUESTIONS_PER_NODE);
        // Nodes are in order of their names, and the first of equals is taken. Who has judged need not look again.
        let Some(node) = free.min_by_key(|node| (known.refused.contains_key(&node.spec.id), questions(node))) else {
            return Some(format!("the workers are looking at other models: {model} waits for its turn{}", known.judged()));
        };
        let (id, incarnation) = (node.spec.id.clone(), node.spec.incarnation);
        known.tried.push(id.clone());
        let until_ms = now_ms.saturating_add(ANSWER_MS);
        known.asked = Some(Asked { node: id.clone(), incarnation, since_ms: now_ms, until_ms, is_answered: false });
        intents.push(Intent::Inspect { node: id, incarnation, service: Box::new(service.service.clone()), generation: service.generation });
        None
    }

    /// A worker answered, or has not judged (`None`): it was busy, or its session ended. What to propose, if that settles it.
    pub fn answered(
        &mut self,
        now_ms: u64,
        state: &ClusterState,
        node: &NodeId,
        name: &ServiceName,
        answer: Option<Result<Box<ModelFacts>, String>>,
    ) -> Option<Command> {
        let known = self.services.get_mut(name)?;
        let generation = known.generation;
        if known.asked.as_ref().is_none_or(|asked| asked.node != *node) {
            return None;
        }
        let facts = match answer {
            None => {
                known.give_up_question(now_ms);
                return None;
            }
            Some(Ok(facts)) => Ok(state.known_facts(facts)),
            Some(Err(reason)) => {
                known.refused.insert(node.clone(), reason);
                let refused = &known.refused;
                let is_last = state.nodes().values().filter(|node| is_able(node)).all(|node| refused.contains_key(&node.spec.id));
                if refused.len() < TRIES && !is_last {
                    known.asked = None;
                    return None;
                }
                let reasons = std::mem::take(&mut known.refused).into_iter().map(|(node, reason)| format!("{node}: {reason}"));
                Err(reasons.collect::<Vec<_>>().join("; "))
            }
        };
        // Until the state says so, nobody is asked again.
        known.asked = known.asked.take().map(|asked| Asked { until_ms: now_ms.saturating_add(RECORD_MS), is_answered: true, ..asked });
        Some(Command::RecordFacts { name: name.clone(), generation, facts })
    }

    fn questions_per_node(&self) -> BTreeMap<NodeId, usize> {
        let mut busy = BTreeMap::new();
        for asked in self.services.values().filter_map(|known| known.asked.as_ref()).filter(|asked| !asked.is_answered) {
            *busy.entry(asked.node.clone()).or_default() += 1;
        }
        busy
    }
}

impl Inspection {
    /// What workers have found wrong with the model so far, as the end of a sentence.
    fn judged(&self) -> String {
        self.refused.iter().map(|(node, reason)| format!("; {node} cannot use it: {reason}")).collect()
    }

    fn give_up_question(&mut self, now_ms: u64) {
        let (first_ms, most_ms) = PAUSE_MS;
        self.asked = None;
        self.not_before_ms = now_ms.saturating_add(first_ms.saturating_mul(1 << self.unanswered.min(10)).min(most_ms));
        self.unanswered = self.unanswered.saturating_add(1);
    }
}

fn is_able(node: &NodeRecord) -> bool {
    node.spec.role == Role::Worker && node.phase == NodePhase::Ready
}
