//! Ranks of one process: they exchange rows through shared memory.
//!
//! Each operation is one rendezvous. A rank puts its rows into its slot, waits until all have come, and then
//! reads every slot. There are two sets of slots, used in turn: a set is written again only after the next
//! rendezvous, which nobody reaches before having read, so one wait per operation is enough.
//!
//! Invariant: the sum is taken by every rank from the same slots in the same order, so all hold the same bits.

use std::sync::Arc;
use std::time::{Duration, Instant};

use forge_kernels::Backend;
use forge_shared::ids::Epoch;
use parking_lot::{Condvar, Mutex, RwLock};

use crate::{Collective, NetError, Result};

/// How a group of one process is formed.
#[derive(Debug, Clone, Copy)]
pub struct GroupOptions {
    /// Ranks: a power of two.
    pub size: usize,
    /// Epoch of the plan.
    pub epoch: Epoch,
    /// The longest a rank waits for its peers in one operation.
    pub deadline: Duration,
}

impl GroupOptions {
    /// A group of `size` ranks at `epoch` that waits half a minute at most.
    pub fn new(size: usize, epoch: Epoch) -> Self {
        GroupOptions { size, epoch, deadline: Duration::from_secs(30) }
    }
}

/// Forms a group and returns one handle per rank, in rank order.
///
/// # Errors
/// [`NetError::GroupSize`] where the size is no power of two.
pub fn group(options: GroupOptions) -> Result<Vec<LocalRank>> {
    let size = options.size;
    if !size.is_power_of_two() {
        return Err(NetError::GroupSize { size, nearest: 1 << size.max(1).ilog2() });
    }
    let slots = || (0..size).map(|_| RwLock::new(Slot::default())).collect();
    let shared = Arc::new(Shared {
        options,
        meeting: Mutex::new(Meeting { arrived: vec![false; size], generation: 0, aborted: None }),
        woken: Condvar::new(),
        slots: [slots(), slots()],
    });
    Ok((0..size).map(|rank| LocalRank { rank, shared: Arc::clone(&shared), turn: Mutex::new(0) }).collect())
}

/// A rank's handle on its in-process group.
#[derive(Debug)]
pub struct LocalRank {
    rank: usize,
    shared: Arc<Shared>,
    /// Which set of slots the next operation uses; held for a whole operation, so one at a time per rank.
    turn: Mutex<usize>,
}

#[derive(Debug)]
struct Shared {
    options: GroupOptions,
    meeting: Mutex<Meeting>,
    woken: Condvar,
    slots: [Vec<RwLock<Slot>>; 2],
}

#[derive(Debug)]
struct Meeting {
    arrived: Vec<bool>,
    generation: u64,
    aborted: Option<String>,
}

/// What a rank brought: the operation, for the check that all do the same, and its rows.
#[derive(Debug, Default)]
struct Slot {
    operation: &'static str,
    rows: usize,
    width: usize,
    values: Vec<f32>,
}

impl LocalRank {
    fn aborted(&self, reason: &str) -> NetError {
        NetError::Aborted { epoch: self.shared.options.epoch, reason: reason.to_owned() }
    }

    /// Waits until every rank has come to this rendezvous.
    fn meet(&self, operation: &'static str) -> Result<()> {
        let GroupOptions { size, deadline, .. } = self.shared.options;
        let until = Instant::now() + deadline;
        let mut meeting = self.shared.meeting.lock();
        if let Some(reason) = &meeting.aborted {
            return Err(self.aborted(reason));
        }
        meeting.arrived[self.rank] = true;
        if meeting.arrived.iter().all(|&arrived| arrived) {
            meeting.arrived.fill(false);
            meeting.generation += 1;
            self.shared.woken.notify_all();
            return Ok(());
        }
        let generation = meeting.generation;
        while meeting.generation == generation {
            if let Some(reason) = &meeting.aborted {
                return Err(self.aborted(reason));
            }
            let timed_out = self.shared.woken.wait_until(&mut meeting, until).timed_out();
            if timed_out && meeting.generation == generation && meeting.aborted.is_none() {
                let missing = meeting.arrived.iter().filter(|&&arrived| !arrived).count();
                meeting.aborted = Some(format!("{operation}: {missing} of {size} ranks did not come within {deadline:?}"));
                self.shared.woken.notify_all();
                return Err(NetError::Timeout { operation, rank: self.rank, missing, size, waited: deadline });
            }
        }
        Ok(())
    }

    /// Puts rows into this rank's slot, meets the others, checks that all brought the same operation and rows
    /// (and width, where `same_width`), and hands the slots to `take`.
    fn exchange<B: Backend>(
        &self,
        backend: &B,
        part: Option<&B::Buffer>,
        call: Call,
        take: impl FnOnce(&[RwLock<Slot>]) -> Result<()>,
    ) -> Result<()> {
        let mut turn = self.turn.lock();
        let slots = &self.shared.slots[*turn];
        *turn = 1 - *turn;
        let done = self.put(backend, part, &call, slots).and_then(|()| {
            self.meet(call.operation)?;
            self.check(&call, slots)?;
            take(slots)
        });
        if let Err(error) = &done {
            // Peers must not wait for a rank that has given up.
            abort(&self.shared, &format!("rank {}: {error}", self.rank));
        }
        done
    }

    fn put<B: Backend>(&self, backend: &B, part: Option<&B::Buffer>, call: &Call, slots: &[RwLock<Slot>]) -> Result<()> {
        let mut slot = slots[self.rank].write();
        let width = part.map_or(0, |part| backend.width(part));
        slot.operation = call.operation;
        slot.rows = call.rows;
        slot.width = width;
        slot.values.resize(call.rows * width, 0.0);
        if let Some(part) = part {
            backend.read_rows(part, 0..call.rows, &mut slot.values)?;
        }
        Ok(())
    }

    fn check(&self, call: &Call, slots: &[RwLock<Slot>]) -> Result<()> {
        let own = slots[self.rank].read();
        for slot in slots {
            let slot = slot.read();
            let width_differs = call.same_width && slot.width != own.width;
            if slot.operation != own.operation || slot.rows != own.rows || width_differs {
                let describe = |slot: &Slot| format!("{} of {} rows × {} columns", slot.operation, slot.rows, slot.width);
                return Err(NetError::Mismatch {
                    operation: call.operation,
                    rank: self.rank,
                    actual: describe(&own),
                    expected: describe(&slot),
                });
            }
        }
        Ok(())
    }
}

impl Drop for LocalRank {
    /// A rank that is gone (also by a panic) must not keep its peers waiting for the deadline.
    fn drop(&mut self) {
        abort(&self.shared, &format!("rank {} has left the group", self.rank));
    }
}

struct Call {
    operation: &'static str,
    rows: usize,
    same_width: bool,
}

fn abort(shared: &Shared, reason: &str) {
    let mut meeting = shared.meeting.lock();
    if meeting.aborted.is_none() {
        meeting.aborted = Some(reason.to_owned());
        shared.woken.notify_all();
    }
}

/// Sum of one element over ranks, neighbours first: the tree of a power of two ranks, each holding a subtree.
fn tree_sum(parts: &[f32]) -> f32 {
    match parts {
        [value] => *value,
        _ => {
            let (low, high) = parts.split_at(parts.len() / 2);
            tree_sum(low) + tree_sum(high)
        }
    }
}

impl<B: Backend> Collective<B> for LocalRank {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.shared.options.size
    }

    fn epoch(&self) -> Epoch {
        self.shared.options.epoch
    }

    fn all_reduce(&self, backend: &B, buffer: &mut B::Buffer, rows: usize) -> Result<()> {
        let call = Call { operation: "all_reduce", rows, same_width: true };
        let mut sum = Vec::new();
        self.exchange(backend, Some(&*buffer), call, |slots| {
            let slots: Vec<_> = slots.iter().map(|slot| slot.read()).collect();
            let mut parts = vec![0.0; slots.len()];
            sum.reserve_exact(slots[0].values.len());
            for index in 0..slots[0].values.len() {
                for (part, slot) in parts.iter_mut().zip(&slots) {
                    *part = slot.values[index];
                }
                sum.push(tree_sum(&parts));
            }
            Ok(())
        })?;
        Ok(backend.write_rows(buffer, 0..rows, &sum)?)
    }

    fn all_gather(&self, backend: &B, part: Option<&B::Buffer>, out: &mut B::Buffer, rows: usize) -> Result<()> {
        let width = backend.width(out);
        let call = Call { operation: "all_gather", rows, same_width: false };
        let mut joined = Vec::new();
        self.exchange(backend, part, call, |slots| {
            let slots: Vec<_> = slots.iter().map(|slot| slot.read()).collect();
            let sum: usize = slots.iter().map(|slot| slot.width).sum();
            if sum != width {
                return Err(NetError::Mismatch {
                    operation: "all_gather",
                    rank: self.rank,
                    actual: format!("an output of {width} columns"),
                    expected: format!("{sum} columns in all"),
                });
            }
            joined.reserve_exact(rows * width);
            for row in 0..rows {
                for slot in &slots {
                    joined.extend_from_slice(&slot.values[row * slot.width..(row + 1) * slot.width]);
                }
            }
            Ok(())
        })?;
        Ok(backend.write_rows(out, 0..rows, &joined)?)
    }

    fn broadcast(&self, backend: &B, buffer: &mut B::Buffer, rows: usize, root: usize) -> Result<()> {
        let call = Call { operation: "broadcast", rows, same_width: true };
        let mut values = Vec::new();
        self.exchange(backend, Some(&*buffer), call, |slots| {
            let slot = slots.get(root).ok_or_else(|| NetError::Mismatch {
                operation: "broadcast",
                rank: self.rank,
                actual: format!("root {root}"),
                expected: format!("a root inside the group of {}", self.shared.options.size),
            })?;
            values.extend_from_slice(&slot.read().values);
            Ok(())
        })?;
        Ok(backend.write_rows(buffer, 0..rows, &values)?)
    }

    fn barrier(&self) -> Result<()> {
        let call = Call { operation: "barrier", rows: 0, same_width: true };
        let mut turn = self.turn.lock();
        let slots = &self.shared.slots[*turn];
        *turn = 1 - *turn;
        {
            let mut slot = slots[self.rank].write();
            *slot = Slot { operation: call.operation, ..Slot::default() };
        }
        let done = self.meet(call.operation).and_then(|()| self.check(&call, slots));
        if let Err(error) = &done {
            abort(&self.shared, &format!("rank {}: {error}", self.rank));
        }
        done
    }

    fn abort(&self, reason: &str) {
        abort(&self.shared, reason);
    }
}

#[cfg(test)]
mod tests;
