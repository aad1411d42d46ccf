//! What workers are to run, as the state says: looked up once for all of them.
//!
//! Invariant: a worker's duties are its ranks of placed replicas and of leaving ones, in the order of services and replicas; what
//! failed or has stopped is not among them.

use std::collections::BTreeMap;
use std::sync::Arc;

use forge_shared::cluster::session::{Assignment, Peer};
use forge_shared::ids::NodeId;
use forge_shared::plan::Plan;
use forge_shared::spec::ModelService;

use super::{drain_ms, wish_of};
use crate::state::{ClusterState, runs};

/// Duties of all workers.
#[derive(Debug, Default)]
pub struct Duties<'a>(BTreeMap<&'a NodeId, Vec<Duty<'a>>>);

/// A replica that a worker has a rank of.
#[derive(Debug, Clone)]
pub struct Duty<'a> {
    plan: &'a Plan,
    wish: &'a ModelService,
    weights_digest: &'a str,
    drain_ms: Option<u64>,
    /// Where the workers of a plan of several reach each other.
    peers: Arc<[Peer]>,
}

impl<'a> Duties<'a> {
    /// Those of a state.
    pub fn of(state: &'a ClusterState) -> Self {
        let mut duties = Duties::default();
        for service in state.services().values() {
            let placed = service.replicas.iter().map(|replica| (replica, false));
            let leaving = service.leaving.iter().map(|leaving| (&leaving.replica, leaving.is_draining));
            for (replica, is_draining) in placed.chain(leaving).filter(|(replica, _)| runs(replica)) {
                let Some((wish, weights_digest)) = wish_of(service, replica.generation) else { continue };
                let drain_ms = is_draining.then(|| drain_ms(wish));
                duties.add(Duty { plan: &replica.plan, wish, weights_digest, drain_ms, peers: peers(state, &replica.plan) });
            }
        }
        duties
    }

    fn add(&mut self, duty: Duty<'a>) {
        let ranks = &duty.plan.ranks;
        for (place, rank) in ranks.iter().enumerate() {
            // Several ranks on one worker are one duty.
            if ranks[..place].iter().all(|before| before.node != rank.node) {
                self.0.entry(&rank.node).or_default().push(duty.clone());
            }
        }
    }

    /// One worker's alone.
    #[cfg(test)]
    pub(crate) fn of_one(node: &'a NodeId, plans: &'a [Plan], wish: &'a ModelService) -> Self {
        let duties = plans.iter().map(|plan| Duty { plan, wish, weights_digest: "", drain_ms: None, peers: Arc::default() });
        Duties(BTreeMap::from([(node, duties.collect())]))
    }

    /// Those of one worker.
    pub fn at(&self, node: &NodeId) -> &[Duty<'a>] {
        self.0.get(node).map_or(&[], Vec::as_slice)
    }
}

/// Where the workers of a plan of several reach each other.
fn peers(state: &ClusterState, plan: &Plan) -> Arc<[Peer]> {
    if !plan.is_divided() {
        return Arc::default();
    }
    let peer = |node: &NodeId| {
        let data_plane = state.nodes().get(node)?.spec.data_plane.clone()?;
        Some(Peer { node: node.clone(), data_plane })
    };
    plan.nodes().into_iter().filter_map(peer).collect()
}

impl Duty<'_> {
    /// Whether a worker was told just this.
    pub fn is(&self, told: &Assignment) -> bool {
        (self.plan, self.wish) == (&told.plan, &*told.service)
            && (self.weights_digest, self.drain_ms) == (told.weights_digest.as_str(), told.drain_ms)
            && *self.peers == *told.peers
    }

    /// As a worker is told.
    pub fn assignment(&self) -> Assignment {
        Assignment {
            plan: self.plan.clone(),
            service: Box::new(self.wish.clone()),
            weights_digest: self.weights_digest.to_owned(),
            drain_ms: self.drain_ms,
            peers: self.peers.to_vec(),
        }
    }
}

#[cfg(test)]
mod tests {
    use forge_shared::cluster::node::{DataPlane, DataTransport};

    use super::*;
    use crate::state::test_support::*;

    #[test]
    fn several_ranks_on_a_worker_are_one_duty() {
        let ranks = [("a", 0), ("b", 0), ("a", 1)];
        let plan = Plan {
            replica: id("s", 0),
            epoch: forge_shared::ids::Epoch(1),
            max_model_len: 1,
            block_size: 1,
            kv_blocks: 1,
            kv_cache_dtype: Default::default(),
            max_step_tokens: 1,
            max_batch_size: 1,
            ranks: ranks.iter().map(|(node, device)| whole_rank(node, *device, 1, 1)).collect(),
        };
        let wish = service("s", Default::default());
        let mut duties = Duties::default();
        let duty = Duty { plan: &plan, wish: &wish, weights_digest: "d", drain_ms: None, peers: Arc::default() };
        duties.add(duty.clone());
        let at = |node: &str| duties.at(&node.into()).len();
        assert_eq!([at("a"), at("b"), at("c")], [1, 1, 0]);
        let told = duty.assignment();
        assert!(duty.is(&told));
        assert!(!Duty { drain_ms: Some(1), ..duty.clone() }.is(&told) && !Duty { weights_digest: "e", ..duty.clone() }.is(&told));
        let data_plane = DataPlane { address: "b:7".into(), transport: DataTransport::Quic };
        let peer = Peer { node: "b".into(), data_plane };
        assert!(!Duty { peers: Arc::new([peer]), ..duty }.is(&told), "one that joined anew may have moved");
    }
}
