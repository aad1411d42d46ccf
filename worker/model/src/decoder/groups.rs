//! The groups that a rank computes in: those it shares sums with.
//!
//! What it is: two collectives side by side. What it is not: who is in them, which the plan says.
//!
//! Invariant: both are of one epoch, and an abort of a rank ends both.

use std::sync::Arc;

use forge_kernels::Backend;
use forge_net::Collective;
use forge_shared::ids::Epoch;

use super::options::Shard;
use crate::error::{ModelError, Result};

/// A rank's groups.
pub struct Groups<B: Backend> {
    /// Ranks that share every product of a stage: same layers, same experts.
    pub tensor: Arc<dyn Collective<B>>,
    /// Ranks that divide a stage's experts: same layers, same share of every product.
    pub expert: Arc<dyn Collective<B>>,
}

impl<B: Backend> Clone for Groups<B> {
    fn clone(&self) -> Self {
        Groups { tensor: self.tensor.clone(), expert: self.expert.clone() }
    }
}

impl<B: Backend> Groups<B> {
    /// Those of a rank that shares nothing.
    pub fn alone(epoch: Epoch) -> Self {
        let alone = Arc::new(forge_net::Solo { epoch });
        Groups { tensor: alone.clone(), expert: alone }
    }

    /// Those of a rank that holds all experts of its layers.
    pub fn of_tensor(tensor: Arc<dyn Collective<B>>) -> Self {
        let expert = Arc::new(forge_net::Solo { epoch: tensor.epoch() });
        Groups { tensor, expert }
    }

    /// Ends both: nobody waits for this rank any more.
    pub fn abort(&self, reason: &str) {
        self.tensor.abort(reason);
        self.expert.abort(reason);
    }

    /// The groups a rank is given must be those its options speak of.
    pub(super) fn check(&self, shard: &Shard) -> Result<()> {
        let sides = [
            ("shard.tp_size", shard.tp_size, self.tensor.size()),
            ("shard.tp_rank", shard.tp_rank, self.tensor.rank()),
            ("shard.ep_size", shard.ep_size, self.expert.size()),
            ("shard.ep_rank", shard.ep_rank, self.expert.rank()),
        ];
        match sides.into_iter().find(|(_, wished, actual)| wished != actual) {
            None => Ok(()),
            Some((option, wished, actual)) => {
                Err(ModelError::Option { option, value: wished.to_string(), reason: format!("the collective says {actual}") })
            }
        }
    }
}
