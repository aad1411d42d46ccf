//! Ranks of one process: what each holds, the groups it computes in, and its decoder.
//!
//! Groups are formed over [`forge_net::local`]. Invariant: a rank's group has exactly the ranks that differ from it in
//! that one dimension.

use std::sync::Arc;
use std::time::Duration;

use forge_kernels::Backend;
use forge_net::{Collective, GroupOptions, local};
use forge_shared::ids::Epoch;

use super::{LoadedRank, RankLayout, RankSetup, ShardedModel, ShardedOptions};
use crate::decoder::options::DecoderOptions;
use crate::decoder::{Decoder, Groups};
use crate::error::{ModelError, Result};
use crate::model::Model;

/// Makes a rank's backend, on the rank's own thread: what that thread is told of cores and priority its kernels inherit.
pub type MakeBackend<B> = Box<dyn FnOnce() -> Result<Arc<B>> + Send>;

impl ShardedModel {
    /// All ranks of a layout in this process, one for each of `backends`, in the layout's order. `options` are those of an
    /// undivided decoder.
    ///
    /// # Errors
    /// As [`ShardedModel::start`].
    pub fn local<B: Backend>(
        model: &Model,
        layout: &RankLayout,
        options: &DecoderOptions,
        deadline: Duration,
        backends: Vec<MakeBackend<B>>,
    ) -> Result<Self> {
        layout.check(backends.len())?;
        let parts = options.progress.divided(backends.len());
        let groups = seats::<B>(layout, options.epoch, deadline, |_| true)?.into_iter().map(|seats| match seats {
            Seats { tensor: Some(tensor), expert: Some(expert) } => Ok(Groups { tensor, expert }),
            Seats { .. } => Err(ModelError::RankGone { whom: "a member of a group" }),
        });
        let seats: Vec<Groups<B>> = groups.collect::<Result<_>>()?;
        let setups = backends.into_iter().zip(seats).zip(parts).enumerate().map(|(rank, ((backend, groups), progress))| {
            let options = DecoderOptions { shard: layout.shard(rank), progress, ..options.clone() };
            let (model, of_rank) = (model.clone(), groups.clone());
            RankSetup {
                load: Box::new(move || Ok(LoadedRank::alone(Box::new(Decoder::new(&model, backend()?, &options, of_rank)?)))),
                abort: Box::new(move |reason| groups.abort(reason)),
            }
        });
        Self::start(layout, setups.collect(), ShardedOptions { epoch: options.epoch, deadline })
    }
}

/// A rank's groups within this process; none where a group has ranks elsewhere.
pub(super) struct Seats<B: Backend> {
    pub(super) tensor: Option<Arc<dyn Collective<B>>>,
    pub(super) expert: Option<Arc<dyn Collective<B>>>,
}

impl<B: Backend> Default for Seats<B> {
    fn default() -> Self {
        Seats { tensor: None, expert: None }
    }
}

/// The groups of all ranks of a layout whose members are all here, in its order. `deadline` bounds every wait of a rank for
/// its peers.
pub(super) fn seats<B: Backend>(
    layout: &RankLayout,
    epoch: Epoch,
    deadline: Duration,
    is_here: impl Fn(usize) -> bool,
) -> Result<Vec<Seats<B>>> {
    let mut seats: Vec<Seats<B>> = (0..layout.ranks()).map(|_| Seats::default()).collect();
    let form = |ranks: &[usize]| -> Result<Vec<Arc<dyn Collective<B>>>> {
        let group = local::group(GroupOptions { deadline, ..GroupOptions::new(ranks.len(), epoch) })?;
        Ok(group.into_iter().map(|handle| Arc::new(handle) as Arc<dyn Collective<B>>).collect())
    };
    for rank in 0..layout.ranks() {
        let (tensor, expert) = (layout.tensor_group(rank), layout.expert_group(rank));
        // Formed once, for its first rank.
        if tensor.first() == Some(&rank) && tensor.iter().all(|&rank| is_here(rank)) {
            for (&rank, handle) in tensor.iter().zip(form(&tensor)?) {
                seats[rank].tensor = Some(handle);
            }
        }
        if expert.first() == Some(&rank) && expert.iter().all(|&rank| is_here(rank)) {
            for (&rank, handle) in expert.iter().zip(form(&expert)?) {
                seats[rank].expert = Some(handle);
            }
        }
    }
    Ok(seats)
}
