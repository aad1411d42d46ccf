//! [`Roster`]: which of the cluster's replicas are dialed, and which of those are served, as a core without I/O.
//!
//! What is wanted comes from the directory; what a dialed replica can serve, from whoever dialed it. Invariant: a replica is
//! served only while it is wanted under that key and target, and only once its card and text are known; one that is wanted
//! elsewhere, or under another epoch, is dialed anew.

use std::collections::BTreeMap;

use forge_cluster::engine::EngineTarget;
use forge_shared::cluster::node::NodeLoad;
use forge_shared::ids::{Epoch, ServiceName};
use forge_shared::link::ModelCard;

use super::Wanted;
use crate::gateway::ServedReplica;

/// Replicas that requests go to, by their epochs: what a gateway tells the leader.
pub type Serves = BTreeMap<ServiceName, Vec<Epoch>>;

/// A dialed replica, as its dialer holds it. Dropping it lets it go.
pub trait Dialed {
    /// What can be served of it, once everything is known.
    fn served(&self) -> Option<ServedReplica>;
}

/// See the module.
#[derive(Debug)]
pub struct Roster<D> {
    dialed: BTreeMap<String, (EngineTarget, D)>,
}

impl<D> Default for Roster<D> {
    fn default() -> Self {
        Roster { dialed: BTreeMap::new() }
    }
}

impl<D: Dialed> Roster<D> {
    /// Dials what is wanted and not dialed, and lets go of the rest.
    pub fn reconcile(&mut self, wanted: &[Wanted], mut dial: impl FnMut(&Wanted) -> D) {
        self.dialed.retain(|key, (target, _)| wanted.iter().any(|wanted| wanted.key == *key && wanted.target == *target));
        for wanted in wanted {
            if !self.dialed.contains_key(&wanted.key) {
                self.dialed.insert(wanted.key.clone(), (wanted.target.clone(), dial(wanted)));
            }
        }
    }

    /// Replicas that can be served, by name.
    pub fn served(&self) -> Vec<ServedReplica> {
        self.dialed.values().filter_map(|(_, dialed)| dialed.served()).collect()
    }

    /// The dialed ones by key.
    pub fn dialed_mut(&mut self) -> impl Iterator<Item = (&str, &EngineTarget, &mut D)> {
        self.dialed.iter_mut().map(|(key, (target, dialed))| (key.as_str(), &*target, dialed))
    }
}

/// What the leader is told of these replicas ([`NodeLoad::serves`]).
pub fn epochs(served: &[ServedReplica]) -> Serves {
    let mut epochs = Serves::new();
    for replica in served {
        epochs.entry(replica.service.as_str().into()).or_default().push(replica.epoch);
    }
    epochs
}

/// Names what two replicas of a service must share to be one model: the digest of their text parts and the card.
pub fn version(text_digest: &str, card: &ModelCard) -> String {
    format!("{text_digest}/{}/{}", card.max_model_len, card.vocab_size)
}

/// What a gateway's heartbeat says of it.
pub fn load(serves: Serves, requests_in_progress: u64, resident_bytes: u64) -> NodeLoad {
    NodeLoad { resident_bytes, replicas: Vec::new(), requests_in_progress, serves: Some(serves) }
}

#[cfg(test)]
mod tests {
    use forge_shared::ids::{NodeId, ReplicaId};

    use super::*;

    struct Silent(u32);

    impl Dialed for Silent {
        fn served(&self) -> Option<ServedReplica> {
            None
        }
    }

    fn wanted(key: &str, node: &str) -> Wanted {
        let replica = ReplicaId { service: ServiceName::from("s"), index: 0 };
        let target = EngineTarget { node: NodeId::from(node), address: format!("{node}:1"), replica, epoch: Epoch(1) };
        Wanted { key: key.into(), target }
    }

    #[test]
    fn what_stays_is_not_dialed_again_and_what_moved_is() {
        let mut roster = Roster::default();
        let mut dials = 0;
        let mut dial = |_: &Wanted| {
            dials += 1;
            Silent(dials)
        };
        roster.reconcile(&[wanted("a", "x"), wanted("b", "x")], &mut dial);
        roster.reconcile(&[wanted("b", "x"), wanted("a", "y")], &mut dial);
        let dialed: Vec<(String, String, u32)> =
            roster.dialed_mut().map(|(key, target, Silent(number))| (key.into(), target.node.0.clone(), *number)).collect();
        assert_eq!(dialed, [("a".into(), "y".into(), 3), ("b".into(), "x".into(), 2)]);
        roster.reconcile(&[], |_| Silent(0));
        assert_eq!(roster.dialed_mut().count(), 0);
        assert!(roster.served().is_empty());
    }
}
