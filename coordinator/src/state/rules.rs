//! The rules that hold after every entry, as one function: for snapshots, fuzzing, property tests and the simulator.
//!
//! Invariant: what [`ClusterState::apply`] makes of a state that keeps them keeps them.

use forge_shared::cluster::event::{Kind, Object};
use forge_shared::cluster::node::NodePhase;
use forge_shared::ids::{Epoch, NodeId};

use super::{ClusterState, standing};

/// The rules that hold after every entry.
///
/// # Errors
/// The rule that is broken, in words.
pub fn check_rules(state: &ClusterState) -> Result<(), String> {
    let revoked = state.objects(Kind::Certificate).into_iter().filter_map(|object| match object {
        Object::Certificate(certificate) if certificate.revoked_s.is_some() => Some(certificate.serial),
        _ => None,
    });
    let trust = state.trust();
    if !revoked.eq(trust.revoked.iter().cloned()) || trust.rotation.is_some() != (trust.cas.len() == 2) {
        return Err(format!("what is believed does not follow from the certificates: {trust:?}"));
    }
    for (name, service) in state.services() {
        let mut epochs: Vec<Epoch> = standing(service).map(|replica| replica.plan.epoch).collect();
        epochs.sort();
        if epochs.windows(2).any(|pair| pair[0] == pair[1]) || epochs.last().is_some_and(|last| *last > service.last_epoch) {
            return Err(format!("epochs of {name}: {epochs:?}, the last is {}", service.last_epoch));
        }
        if service.replicas.windows(2).any(|pair| pair[0].plan.replica.index >= pair[1].plan.replica.index) {
            return Err(format!("replicas of {name} are out of order"));
        }
        for replica in service.replicas.iter().chain(service.leaving.iter().map(|leaving| &leaving.replica)) {
            let is_lost = |id: &NodeId| state.nodes().get(id).is_none_or(|node| node.phase != NodePhase::Ready);
            if let Some(rank) = replica.plan.ranks.iter().find(|rank| is_lost(&rank.node)) {
                return Err(format!("replica {} stands on {}, which is not there", replica.plan.replica, rank.node));
            }
            let is_known =
                replica.generation == service.generation || service.older.iter().any(|older| older.generation == replica.generation);
            if !is_known {
                return Err(format!("replica {} carries out a forgotten wish", replica.plan.replica));
            }
        }
    }
    Ok(())
}
