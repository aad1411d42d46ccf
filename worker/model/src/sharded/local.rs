//! Ranks of one process: what each holds, the groups it computes in, and its decoder.
//!
//! Groups are formed over [`forge_net::local`]. Invariant: a rank's group has exactly the ranks that differ from it in
//! that one dimension.

use std::sync::Arc;
use std::time::Duration;

use forge_kernels::Backend;
use forge_net::{Collective, GroupOptions, local};
use forge_shared::ids::Epoch;

use super::{RankLayout, RankSetup, ShardedModel, ShardedOptions};
use crate::decoder::options::DecoderOptions;
use crate::decoder::{Decoder, Groups};
use crate::error::{ModelError, Result};
use crate::model::Model;
use crate::step::StageModel;

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
        let seats = seats::<B>(layout, options.epoch, deadline)?;
        let setups = backends.into_iter().zip(seats).zip(parts).enumerate().map(|(rank, ((backend, groups), progress))| {
            let options = DecoderOptions { shard: layout.shard(rank), progress, ..options.clone() };
            let (model, of_rank) = (model.clone(), groups.clone());
            RankSetup {
                load: Box::new(move || Ok(Box::new(Decoder::new(&model, backend()?, &options, of_rank)?) as Box<dyn StageModel>)),
                abort: Box::new(move |reason| groups.abort(reason)),
            }
        });
        Self::start(layout, setups.collect(), ShardedOptions { epoch: options.epoch, deadline })
    }
}

/// The groups of all ranks of a layout, in its order. `deadline` bounds every wait of a rank for its peers.
fn seats<B: Backend>(layout: &RankLayout, epoch: Epoch, deadline: Duration) -> Result<Vec<Groups<B>>> {
    let members = layout.members();
    let mut tensor: Vec<Option<Arc<dyn Collective<B>>>> = (0..layout.ranks()).map(|_| None).collect();
    let mut expert = tensor.clone();
    let form = |seats: &mut [Option<Arc<dyn Collective<B>>>], ranks: Vec<usize>| -> Result<()> {
        let group = local::group(GroupOptions { deadline, ..GroupOptions::new(ranks.len(), epoch) })?;
        for (rank, handle) in ranks.into_iter().zip(group) {
            seats[rank] = Some(Arc::new(handle));
        }
        Ok(())
    };
    for stage in (0..layout.ranks()).step_by(members.max(1)) {
        for group in 0..layout.expert {
            let first = stage + group * layout.tensor;
            form(&mut tensor, (first..first + layout.tensor).collect())?;
        }
        for place in 0..layout.tensor {
            form(&mut expert, (0..layout.expert).map(|group| stage + group * layout.tensor + place).collect())?;
        }
    }
    let groups = tensor.into_iter().zip(expert).map(|groups| match groups {
        (Some(tensor), Some(expert)) => Ok(Groups { tensor, expert }),
        _ => Err(ModelError::RankGone { whom: "a member of a group" }),
    });
    groups.collect()
}
