//! What workers say of their replicas.
//!
//! Invariant: a report counts only from a node of the plan, in the node's present incarnation, under the plan's epoch;
//! a replica that was given up does not come back under its epoch.

use forge_shared::cluster::command::CommandError;
use forge_shared::cluster::event::{Change, Object};
use forge_shared::cluster::node::NodePhase;
use forge_shared::cluster::service::{ReplicaPhase, ReplicaRecord, ReplicaReport, ReplicaStatus, ServiceRecord};
use forge_shared::ids::{Incarnation, NodeId};

use super::notices::Weight;
use super::{ClusterState, Effect, MAX_REASON_BYTES, Step, checks, runs};

impl ClusterState {
    pub(super) fn report_replica(
        &mut self,
        node: &NodeId,
        incarnation: Incarnation,
        report: &ReplicaReport,
        step: &mut Step,
    ) -> Result<Effect, CommandError> {
        let mut status = report.status.clone();
        checks::text("report.status.numericsId", &status.numerics_id, 512)?;
        if status.percent > 100 {
            return checks::invalid("report.status.percent", format!("must be at most 100, got {}", status.percent));
        }
        status.reason = checks::cut(&status.reason, MAX_REASON_BYTES);
        let is_present = self.nodes.get(node).is_some_and(|known| known.spec.incarnation == incarnation && known.phase == NodePhase::Ready);
        if !is_present {
            return Ok(Effect::NONE);
        }
        let name = &report.replica.service;
        let Some(mut service) = self.services.get(name).cloned() else { return Ok(Effect::NONE) };
        let is_meant = |replica: &ReplicaRecord| replica.plan.replica == report.replica && replica.plan.epoch == report.epoch;
        let is_leaving = service.leaving.iter().any(|leaving| is_meant(&leaving.replica));
        let Some(replica) = find_mut(&mut service, is_meant) else { return Ok(Effect::NONE) };
        let devices: Vec<u32> = replica.plan.ranks.iter().filter(|rank| rank.node == *node).map(|rank| rank.device).collect();
        let leads = replica.plan.ranks.first().is_some_and(|rank| rank.node == *node);
        let ends = matches!(status.phase, ReplicaPhase::Failed | ReplicaPhase::Stopped);
        if devices.is_empty() {
            return Ok(Effect::NONE);
        }
        status.fault = status.fault.filter(|fault| replica.plan.ranks.iter().any(|rank| rank.node == *fault));
        let believed = report.found_memory_bytes.is_some_and(|found_bytes| self.believe_memory(node, &devices, found_bytes, step));
        // Ranks that do not lead can only say that they are at their end.
        if replica.status == status || !runs(replica) || !(leads || ends) {
            return Ok(if believed { Effect::CHANGED } else { Effect::NONE });
        }
        let before = std::mem::replace(&mut replica.status, status.clone());
        if ends && is_leaving {
            service.leaving.retain(|leaving| !is_meant(&leaving.replica));
            self.put_service(name.clone(), service, step);
        } else {
            // A worker's progress moves nothing; its end gives memory free.
            step.moves |= ends;
            step.changes.push(Change::Put { object: Object::Service(Box::new(service.clone())) });
            self.services.insert(name.clone(), service);
        }
        self.notice_phase(node, report, &before, &status, step);
        Ok(Effect::CHANGED)
    }

    fn notice_phase(&mut self, node: &NodeId, report: &ReplicaReport, before: &ReplicaStatus, after: &ReplicaStatus, step: &mut Step) {
        let (id, epoch) = (&report.replica, report.epoch);
        let about = format!("replica/{id}");
        if after.restarts > before.restarts {
            let message = format!("the engine of replica {id} on {node} was restarted, {} times by now: {}", after.restarts, after.reason);
            self.notice(step, Weight::Warning, "EngineRestarted", about.clone(), message);
        }
        if before.phase == after.phase {
            return;
        }
        match after.phase {
            ReplicaPhase::Ready => {
                self.notice(step, Weight::Normal, "ReplicaReady", about, format!("replica {id} of epoch {epoch} answers on {node}"));
            }
            ReplicaPhase::Failed => {
                let message = format!("replica {id} of epoch {epoch} failed on {node}: {}", after.reason);
                self.notice(step, Weight::Warning, "ReplicaFailed", about, message);
            }
            ReplicaPhase::Stopped => {
                self.notice(step, Weight::Normal, "ReplicaStopped", about, format!("replica {id} of epoch {epoch} ended on {node}"));
            }
            ReplicaPhase::Placed | ReplicaPhase::Pulling | ReplicaPhase::Loading | ReplicaPhase::Draining => {}
        }
    }
}

fn find_mut(service: &mut ServiceRecord, is_meant: impl Fn(&ReplicaRecord) -> bool) -> Option<&mut ReplicaRecord> {
    let leaving = service.leaving.iter_mut().map(|leaving| &mut leaving.replica);
    service.replicas.iter_mut().chain(leaving).find(|replica| is_meant(replica))
}
