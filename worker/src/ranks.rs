//! A plan's ranks on this node: checked, given their cores, and loaded as one model.
//!
//! One rank is a decoder that the engine's thread runs. Several are a [`ShardedModel`]: a thread for each, on the cores of
//! its device, whose sums go through this process's memory; ranks of other workers are reached over the data plane, and where
//! another worker leads, the ranks here are [`FollowingRanks`]. What it is not: it takes no memory ([`crate::ledger`] does)
//! and starts no engine.
//!
//! Invariant: what a rank loads is what its plan says, part for part; a plan that says something else than its layout makes
//! is refused before a weight is read.

use std::sync::Arc;
use std::time::Duration;

use forge_kernels::{CpuBackend, CpuOptions, KernelError};
use forge_model::sharded::{FollowingRanks, MakeBackend, RankLayout, Reach};
use forge_model::{DecoderOptions, Shard, ShardedModel, StepModel};
use forge_shared::ids::NodeId;
use forge_shared::plan::{Plan, RankPlan};
use forge_shared::tree::share;

use crate::WorkerError;
use crate::ledger::Reservation;
use crate::prepare::{DecoderSizes, PreparedModel};
use crate::threads;

/// The longest a rank waits for its peers, and the engine for a step: longer than a first step that reads all weights from
/// a slow disk.
pub(crate) const STEP_DEADLINE: Duration = Duration::from_secs(120);

/// The numbers of a plan's ranks that are on a node.
///
/// # Errors
/// [`WorkerError::Setting`] where none is.
pub(crate) fn here(plan: &Plan, node: &NodeId) -> Result<Vec<usize>, WorkerError> {
    let here: Vec<usize> = (0..plan.ranks.len()).filter(|&rank| plan.ranks[rank].node == *node).collect();
    if here.is_empty() {
        return Err(WorkerError::Setting { field: "plan.ranks.node", reason: format!("none of the plan's ranks is on {node}") });
    }
    Ok(here)
}

/// How a plan's ranks divide its model.
///
/// # Errors
/// [`WorkerError::Setting`] for ranks that no layout has.
pub(crate) fn layout(plan: &Plan) -> Result<RankLayout, WorkerError> {
    let wrong = |field, reason: String| Err(WorkerError::Setting { field, reason });
    let Some(first) = plan.ranks.first() else { return wrong("plan.ranks", "there are none".into()) };
    let members = first.tensor_size.saturating_mul(first.expert_size);
    if members == 0 || !plan.ranks.len().is_multiple_of(members) {
        let reason = format!("{} ranks are no stages of {} × {}", plan.ranks.len(), first.expert_size, first.tensor_size);
        return wrong("plan.ranks", reason);
    }
    let stages = plan.ranks.chunks(members).map(|stage| stage[0].layers.clone()).collect();
    let layout = RankLayout { stages, expert: first.expert_size, tensor: first.tensor_size };
    for (number, rank) in plan.ranks.iter().enumerate() {
        let Shard { tp_rank, tp_size, ep_rank, ep_size, layers } = layout.shard(number);
        let said = (rank.tensor_rank, rank.tensor_size, rank.expert_rank, rank.expert_size, Some(rank.layers.clone()));
        if said != (tp_rank, tp_size, ep_rank, ep_size, layers) {
            return wrong("plan.ranks", format!("rank {number} is not where stages of {ep_size} × {tp_size} ranks have it"));
        }
    }
    Ok(layout)
}

/// Whether the experts of every rank that is here are those of its share, and its memory what it needs.
///
/// # Errors
/// [`WorkerError::Setting`] for experts that are not; [`WorkerError::Memory`] for the first that has not; a layout that this model cannot have.
pub(crate) fn check(
    plan: &Plan,
    here: &[usize],
    layout: &RankLayout,
    model: &PreparedModel,
    sizes: DecoderSizes,
) -> Result<(), WorkerError> {
    let experts = model.model.architecture().experts.as_ref().map_or(0, |experts| experts.count);
    for &number in here {
        let rank = &plan.ranks[number];
        let held = share(experts, rank.expert_rank, rank.expert_size);
        if held != rank.experts {
            let reason =
                format!("rank {number} is to hold experts {:?}, and of this model's {experts} its share is {held:?}", rank.experts);
            return Err(WorkerError::Setting { field: "plan.ranks.experts", reason });
        }
        let needed_bytes = model.needed_bytes(sizes, layout.shard(number))?;
        let free_bytes = rank.memory.total_bytes();
        if needed_bytes > free_bytes {
            return Err(WorkerError::Memory { device: rank.device, needed_bytes, free_bytes, found_bytes: None });
        }
    }
    Ok(())
}

/// Where a rank's kernels run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RankCores {
    /// Empty leaves it to the system.
    pub(crate) cores: Vec<usize>,
    pub(crate) threads: usize,
    pub(crate) niceness: u8,
}

impl RankCores {
    /// Moves the calling thread, and those it will begin, there.
    pub(crate) fn settle(&self) {
        threads::settle(&self.cores, self.niceness);
    }
}

/// The cores of every rank that is here: those of its device, divided where ranks of this replica share it.
pub(crate) fn cores(plan: &Plan, here: &[usize], reservations: &[Reservation]) -> Vec<RankCores> {
    let of = |(place, reservation): (usize, &Reservation)| {
        let (rank, device) = (&plan.ranks[here[place]], reservation.device());
        let same = |other: &&usize| plan.ranks[**other].device == rank.device;
        let (position, sharing) = (here[..place].iter().filter(same).count(), here.iter().filter(same).count());
        let cores = share_of(&device.cores, position, sharing);
        let threads = if cores.is_empty() { rank.threads } else { rank.threads.min(cores.len()) };
        RankCores { cores, threads, niceness: device.niceness }
    };
    reservations.iter().enumerate().map(of).collect()
}

/// The part of a device's cores that is the `position`-th of `sharing` ranks'; all of them where there are too few.
fn share_of(cores: &[usize], position: usize, sharing: usize) -> Vec<usize> {
    if cores.len() < sharing {
        return cores.to_vec();
    }
    cores[position * cores.len() / sharing..(position + 1) * cores.len() / sharing].to_vec()
}

/// Loads the ranks of a plan in this process, outside any node: each on cores of its own where the machine has as many.
///
/// # Errors
/// As `layout`; the model's, and the device's.
pub fn load_here(model: &PreparedModel, options: &DecoderOptions, plan: &Plan) -> Result<Box<dyn StepModel>, WorkerError> {
    let layout = layout(plan)?;
    let (all, ranks) = (threads::allowed_cores(), plan.ranks.len());
    let of = |(number, rank): (usize, &RankPlan)| RankCores { cores: share_of(&all, number, ranks), threads: rank.threads, niceness: 0 };
    load(model, options, &layout, plan.ranks.iter().enumerate().map(of).collect(), None)
}

fn backend(threads: usize) -> Result<Arc<CpuBackend>, KernelError> {
    CpuBackend::new(CpuOptions { threads, ..CpuOptions::default() }).map(Arc::new)
}

/// What makes the backend of each rank, on the rank's own thread.
fn backends(cores: Vec<RankCores>) -> Vec<MakeBackend<CpuBackend>> {
    let make = |cores: RankCores| -> MakeBackend<CpuBackend> {
        Box::new(move || {
            cores.settle();
            Ok(backend(cores.threads)?)
        })
    };
    cores.into_iter().map(make).collect()
}

/// Loads the ranks that are here, on the worker that leads; `options` are those of an undivided decoder, `reach` has the ranks
/// of other workers. A single rank uses the calling thread and its cores.
///
/// # Errors
/// The model's, and the device's.
pub(crate) fn load(
    model: &PreparedModel,
    options: &DecoderOptions,
    layout: &RankLayout,
    cores: Vec<RankCores>,
    reach: Option<&Reach>,
) -> Result<Box<dyn StepModel>, WorkerError> {
    if let Some(reach) = reach {
        return Ok(Box::new(ShardedModel::spanning(&model.model, layout, options, reach, backends(cores))?));
    }
    if let [only] = cores.as_slice() {
        let options = DecoderOptions { shard: layout.shard(0), ..options.clone() };
        return Ok(Box::new(model.model.decoder(backend(only.threads)?, &options)?));
    }
    Ok(Box::new(ShardedModel::local(&model.model, layout, options, STEP_DEADLINE, backends(cores))?))
}

/// Loads the ranks that are here, on a worker that does not lead.
///
/// # Errors
/// As [`load`].
pub(crate) fn follow(
    model: &PreparedModel,
    options: &DecoderOptions,
    layout: &RankLayout,
    cores: Vec<RankCores>,
    reach: &Reach,
) -> Result<FollowingRanks, WorkerError> {
    Ok(FollowingRanks::start(&model.model, layout, options, reach, backends(cores))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_that_share_a_device_divide_its_cores() {
        let cores = [4, 5, 6, 7, 8];
        assert_eq!([0, 1].map(|position| share_of(&cores, position, 2)), [vec![4, 5], vec![6, 7, 8]]);
        assert_eq!(share_of(&cores, 0, 1), cores);
        assert_eq!(share_of(&cores[..1], 1, 2), [4], "fewer cores than ranks: both have all");
        assert!(share_of(&[], 0, 2).is_empty());
    }
}
