//! How a replica's ranks divide a model: stages of layers, and in each stage expert ranks times tensor ranks.
//!
//! Invariant: ranks are numbered stage by stage, in a stage by expert rank, then by tensor rank, as plans number them.

use std::ops::Range;

use super::rank::Gives;
use crate::decoder::options::Shard;
use crate::error::{ModelError, Result};

/// See the module's documentation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankLayout {
    /// Layers of each stage, consecutive; together all of the model's.
    pub stages: Vec<Range<usize>>,
    /// Ranks that divide the experts of a stage.
    pub expert: usize,
    /// Ranks that share every product.
    pub tensor: usize,
}

impl RankLayout {
    /// Ranks of a stage.
    pub fn members(&self) -> usize {
        self.expert * self.tensor
    }

    /// All ranks.
    pub fn ranks(&self) -> usize {
        self.stages.len() * self.members()
    }

    /// What a rank holds.
    pub fn shard(&self, rank: usize) -> Shard {
        let (stage, member) = (rank / self.members(), rank % self.members());
        Shard {
            tp_rank: member % self.tensor,
            tp_size: self.tensor,
            ep_rank: member / self.tensor,
            ep_size: self.expert,
            layers: Some(self.stages[stage].clone()),
        }
    }

    /// Ranks that share every product with a rank, itself included.
    pub(super) fn tensor_group(&self, rank: usize) -> Vec<usize> {
        let first = rank - rank % self.tensor.max(1);
        (first..first + self.tensor).collect()
    }

    /// Ranks that divide the experts with a rank, itself included.
    pub(super) fn expert_group(&self, rank: usize) -> Vec<usize> {
        let (members, tensor) = (self.members().max(1), self.tensor.max(1));
        let first = rank - rank % members + rank % tensor;
        (0..self.expert).map(|group| first + group * tensor).collect()
    }

    /// What a rank of the last stage gives: the first the logits, its tensor peers their share of them.
    pub(super) fn gives(&self, member: usize) -> Gives {
        match member {
            0 => Gives::Logits,
            _ if member < self.tensor => Gives::Share,
            _ => Gives::Nothing,
        }
    }

    /// Whether it is a layout of so many ranks. Degrees and layers that the model cannot have are refused at load.
    pub(super) fn check(&self, ranks: usize) -> Result<()> {
        if ranks == 0 || self.ranks() != ranks {
            let value = format!("{} stages of {} × {} ranks", self.stages.len(), self.expert, self.tensor);
            return Err(ModelError::Option { option: "layout", value, reason: format!("there are {ranks} ranks") });
        }
        Ok(())
    }
}
