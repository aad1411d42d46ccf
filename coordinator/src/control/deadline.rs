//! Rollouts that make no progress: since when, and why, so that whoever waits for one is told.
//!
//! What it is not: it stops nothing. A rollout that is stuck goes on being tried, and what serves goes on serving.
//!
//! Invariant: what is proposed is what the state does not say yet; a new leader counts from its beginning.

use std::collections::BTreeMap;

use forge_shared::cluster::command::Command;
use forge_shared::cluster::service::{Facts, ReplicaPhase, RolloutProgress, ServiceRecord};
use forge_shared::ids::ServiceName;

use crate::state::ClusterState;

/// A proposal that changed nothing by then is made again, milliseconds.
const PROPOSE_AGAIN_MS: u64 = 2_000;

/// All rollouts under way.
#[derive(Debug, Clone, Default)]
pub(super) struct Deadlines(BTreeMap<ServiceName, Watched>);

#[derive(Debug, Clone, PartialEq)]
struct Watched {
    generation: u64,
    best: Best,
    since_ms: u64,
    /// It made progress since then.
    has_moved: bool,
    /// Not proposed again before.
    again_ms: u64,
}

/// How far a rollout has been. More is progress; less is not, though it may be needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Best {
    is_known: bool,
    ready: u32,
    /// Replicas of older generations that are gone.
    gone: u32,
}

impl Best {
    fn of(service: &ServiceRecord, progress: &RolloutProgress) -> Best {
        let is_known = matches!(service.facts, Facts::Known { .. });
        Best { is_known, ready: progress.ready, gone: u32::MAX - progress.old }
    }
}

impl Deadlines {
    pub fn decide(&mut self, now_ms: u64, state: &ClusterState) -> Vec<Command> {
        let services = state.services();
        let is_open = |service: &ServiceRecord| !service.is_deleted && (!service.progress().is_complete() || service.stuck.is_some());
        self.0.retain(|name, _| services.get(name).is_some_and(is_open));
        let mut commands = Vec::new();
        for (name, service) in services.iter().filter(|(_, service)| is_open(service)) {
            let progress = service.progress();
            let best = Best::of(service, &progress);
            let new = Watched { generation: service.generation, best, since_ms: now_ms, has_moved: false, again_ms: 0 };
            let watched = self.0.entry(name.clone()).or_insert_with(|| new.clone());
            if watched.generation != service.generation {
                *watched = new;
            } else if best > watched.best {
                *watched = Watched { has_moved: true, ..new };
            }
            let deadline_ms = service.service.spec.rollout.progress_deadline_s.saturating_mul(1_000);
            let is_late = now_ms.saturating_sub(watched.since_ms) >= deadline_ms;
            let stuck = match &service.stuck {
                _ if progress.is_complete() => None,
                None => is_late.then(|| why(service, &progress, deadline_ms / 1_000)),
                // What was said stays, also under a new leader, until something moves.
                Some(said) => (is_late || !watched.has_moved).then(|| said.clone()),
            };
            if stuck != service.stuck && now_ms >= watched.again_ms {
                watched.again_ms = now_ms.saturating_add(PROPOSE_AGAIN_MS);
                commands.push(Command::RecordRollout { name: name.clone(), generation: service.generation, stuck });
            }
        }
        commands.retain(|command| state.check_level(command).is_ok());
        commands
    }
}

/// What a rollout is waiting for.
fn why(service: &ServiceRecord, progress: &RolloutProgress, deadline_s: u64) -> String {
    let RolloutProgress { wished, ready, old_serving, .. } = *progress;
    let failed =
        service.replicas.iter().find(|replica| replica.generation == service.generation && replica.status.phase == ReplicaPhase::Failed);
    let cause = match (&service.facts, &service.refusal, failed) {
        (Facts::Failed { reason }, ..) => format!("its model cannot be used: {reason}"),
        (Facts::Unknown { waits_for }, ..) if waits_for.is_empty() => "no worker has said yet what its model is".to_owned(),
        (Facts::Unknown { waits_for }, ..) => waits_for.clone(),
        (_, Some(refusal), _) => refusal.to_string(),
        (_, None, Some(failed)) => format!("replica {} failed: {}", failed.plan.replica, failed.status.reason),
        (_, None, None) => "its replicas do not become ready".to_owned(),
    };
    let serving = if old_serving > 0 { format!(", {old_serving} of an older generation serve on") } else { String::new() };
    format!("no progress for {deadline_s} s, {ready} of {wished} replicas are ready{serving}: {cause}")
}
