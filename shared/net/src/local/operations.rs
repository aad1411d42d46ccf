//! The operations of a group of one process.

use std::ops::Range;
use std::sync::Arc;

use forge_kernels::Backend;
use forge_shared::ids::Epoch;
use parking_lot::{RwLock, RwLockReadGuard};

use super::letters::Letter;
use super::{LocalRank, Slot};
use crate::sum::{check_size, tree_sum};
use crate::{Collective, NetError, Result, row_share};

/// What a rank is about to do, and what must be the same on all.
struct Call<'a> {
    operation: &'static str,
    rows: usize,
    same_rows: bool,
    same_width: bool,
    counts: &'a [usize],
}

impl Call<'_> {
    fn new(operation: &'static str, rows: usize) -> Self {
        Call { operation, rows, same_rows: true, same_width: true, counts: &[] }
    }
}

impl LocalRank {
    pub(super) fn meet(&self, operation: &'static str) -> Result<()> {
        self.shared.meeting.meet(self.rank, operation)
    }

    /// Does it, and aborts the group where it fails: peers must not wait for a rank that has given up.
    fn or_abort<T>(&self, done: Result<T>) -> Result<T> {
        done.inspect_err(|error| self.shared.abort(&format!("rank {}: {error}", self.rank)))
    }

    /// Puts rows into this rank's slot, meets the others, checks that all brought the same operation and rows
    /// (and width, where `same_width`), and hands the slots to `take`.
    fn exchange<B: Backend, T>(
        &self,
        backend: &B,
        part: Option<&B::Buffer>,
        call: Call<'_>,
        take: impl FnOnce(&[RwLockReadGuard<'_, Slot>]) -> Result<T>,
    ) -> Result<T> {
        let mut turn = self.turn.lock();
        let slots = self.next_slots(&mut turn);
        self.finish(slots, &call, self.put(backend, part, &call, slots), take)
    }

    fn next_slots(&self, turn: &mut usize) -> &[RwLock<Slot>] {
        let slots = &self.shared.slots[*turn];
        *turn = 1 - *turn;
        slots
    }

    /// What follows once this rank's slot is filled.
    fn finish<T>(
        &self,
        slots: &[RwLock<Slot>],
        call: &Call<'_>,
        put: Result<()>,
        take: impl FnOnce(&[RwLockReadGuard<'_, Slot>]) -> Result<T>,
    ) -> Result<T> {
        let done = put.and_then(|()| {
            self.meet(call.operation)?;
            let slots: Vec<_> = slots.iter().map(RwLock::read).collect();
            self.check(call, &slots)?;
            take(&slots)
        });
        self.or_abort(done)
    }

    fn put<B: Backend>(&self, backend: &B, part: Option<&B::Buffer>, call: &Call<'_>, slots: &[RwLock<Slot>]) -> Result<()> {
        let mut slot = slots[self.rank].write();
        let width = part.map_or(0, |part| backend.width(part));
        slot.operation = call.operation;
        slot.rows = call.rows;
        slot.width = width;
        slot.counts.clear();
        slot.counts.extend_from_slice(call.counts);
        slot.values.resize(call.rows * width, 0.0);
        if let Some(part) = part {
            backend.read_rows(part, 0..call.rows, &mut slot.values)?;
        }
        Ok(())
    }

    fn check(&self, call: &Call<'_>, slots: &[RwLockReadGuard<'_, Slot>]) -> Result<()> {
        let own = &slots[self.rank];
        for slot in slots {
            let rows_differ = call.same_rows && slot.rows != own.rows;
            let width_differs = call.same_width && slot.width != own.width;
            if slot.operation != own.operation || rows_differ || width_differs {
                let describe = |slot: &Slot| format!("{} of {} rows × {} columns", slot.operation, slot.rows, slot.width);
                return Err(NetError::Mismatch {
                    operation: call.operation,
                    rank: self.rank,
                    actual: describe(own),
                    expected: describe(slot),
                });
            }
        }
        Ok(())
    }

    fn peer(&self, operation: &'static str, named: usize) -> Result<()> {
        let size = self.shared.options.size;
        if named < size && named != self.rank {
            return Ok(());
        }
        Err(NetError::NotAPeer { operation, rank: self.rank, named, size })
    }
}

/// Where a device's rows are host memory they are written in place, else through a copy.
fn fill<B: Backend, T>(backend: &B, buffer: &mut B::Buffer, rows: usize, write: impl FnOnce(&mut [f32]) -> Result<T>) -> Result<T> {
    if let Some(values) = backend.host_rows_mut(buffer, rows) {
        return write(values);
    }
    let mut values = vec![0.0; rows * backend.width(buffer)];
    let done = write(&mut values)?;
    backend.write_rows(buffer, 0..rows, &values)?;
    Ok(done)
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
        check_size(self.shared.options.size)?;
        let mut turn = self.turn.lock();
        let slots = self.next_slots(&mut turn);
        let call = Call::new("all_reduce", rows);
        // The buffer is read before the rendezvous and written after it.
        let put = self.put(backend, Some(&*buffer), &call, slots);
        self.finish(slots, &call, put, |slots| {
            let parts: Vec<&[f32]> = slots.iter().map(|slot| slot.values.as_slice()).collect();
            fill(backend, buffer, rows, |out| {
                tree_sum(&parts, out);
                Ok(())
            })
        })
    }

    fn all_gather(&self, backend: &B, part: Option<&B::Buffer>, out: &mut B::Buffer, rows: usize) -> Result<()> {
        let width = backend.width(out);
        let call = Call { same_width: false, ..Call::new("all_gather", rows) };
        self.exchange(backend, part, call, |slots| {
            let sum: usize = slots.iter().map(|slot| slot.width).sum();
            if sum != width {
                return Err(NetError::Mismatch {
                    operation: "all_gather",
                    rank: self.rank,
                    actual: format!("an output of {width} columns"),
                    expected: format!("{sum} columns in all"),
                });
            }
            fill(backend, out, rows, |joined| {
                let mut start = 0;
                for slot in slots.iter().filter(|slot| slot.width > 0) {
                    for (row, values) in joined.chunks_exact_mut(width).zip(slot.values.chunks_exact(slot.width)) {
                        row[start..start + slot.width].copy_from_slice(values);
                    }
                    start += slot.width;
                }
                Ok(())
            })
        })
    }

    fn reduce_scatter(&self, backend: &B, buffer: &B::Buffer, rows: usize, out: &mut B::Buffer) -> Result<Range<usize>> {
        let size = self.shared.options.size;
        check_size(size)?;
        let share = row_share(rows, self.rank, size);
        self.exchange(backend, Some(buffer), Call::new("reduce_scatter", rows), |slots| {
            let width = slots[self.rank].width;
            let parts: Vec<&[f32]> = slots.iter().map(|slot| &slot.values[share.start * width..share.end * width]).collect();
            let mut sum = vec![0.0; share.len() * width];
            tree_sum(&parts, &mut sum);
            Ok(backend.write_rows(out, 0..share.len(), &sum)?)
        })?;
        Ok(share)
    }

    fn broadcast(&self, backend: &B, buffer: &mut B::Buffer, rows: usize, root: usize) -> Result<()> {
        let size = self.shared.options.size;
        if root >= size {
            return Err(NetError::NotAPeer { operation: "broadcast", rank: self.rank, named: root, size });
        }
        let mut values = Vec::new();
        self.exchange(backend, Some(&*buffer), Call::new("broadcast", rows), |slots| {
            values.extend_from_slice(&slots[root].values);
            Ok(())
        })?;
        Ok(backend.write_rows(buffer, 0..rows, &values)?)
    }

    fn all_to_all(&self, backend: &B, buffer: &B::Buffer, counts: &[usize], out: &mut B::Buffer) -> Result<Vec<usize>> {
        let size = self.shared.options.size;
        if counts.len() != size {
            return Err(NetError::Mismatch {
                operation: "all_to_all",
                rank: self.rank,
                actual: format!("{} counts", counts.len()),
                expected: format!("one per rank of the group of {size}"),
            });
        }
        let call = Call { same_rows: false, counts, ..Call::new("all_to_all", counts.iter().sum()) };
        self.exchange(backend, Some(buffer), call, |slots| {
            let (mut received, mut at) = (Vec::with_capacity(size), 0);
            for slot in slots {
                let start: usize = slot.counts[..self.rank].iter().sum();
                let rows = slot.counts[self.rank];
                backend.write_rows(out, at..at + rows, &slot.values[start * slot.width..(start + rows) * slot.width])?;
                received.push(rows);
                at += rows;
            }
            Ok(received)
        })
    }

    fn send(&self, backend: &B, buffer: &B::Buffer, rows: Range<usize>, to: usize) -> Result<()> {
        self.peer("send", to)?;
        let width = backend.width(buffer);
        let mut values = vec![0.0; rows.len() * width];
        let sent = backend.read_rows(buffer, rows, &mut values).map_err(NetError::from);
        self.or_abort(sent.and_then(|()| self.shared.letters.put(self.rank, to, Letter { width, values })))
    }

    fn recv(&self, backend: &B, buffer: &mut B::Buffer, rows: Range<usize>, from: usize) -> Result<()> {
        self.peer("recv", from)?;
        let received = self.shared.letters.take(from, self.rank).and_then(|letter| {
            let width = backend.width(buffer);
            if letter.width != width || letter.values.len() != rows.len() * width {
                return Err(NetError::Mismatch {
                    operation: "recv",
                    rank: self.rank,
                    actual: format!("room for {} rows × {width} columns", rows.len()),
                    expected: format!("{} values in rows of {}", letter.values.len(), letter.width),
                });
            }
            Ok(backend.write_rows(buffer, rows, &letter.values)?)
        });
        self.or_abort(received)
    }

    fn barrier(&self) -> Result<()> {
        let mut turn = self.turn.lock();
        let slots = self.next_slots(&mut turn);
        *slots[self.rank].write() = Slot { operation: "barrier", ..Slot::default() };
        self.finish(slots, &Call::new("barrier", 0), Ok(()), |_| Ok(()))
    }

    fn abort(&self, reason: &str) {
        self.shared.abort(reason);
    }

    fn rejoin(&self, epoch: Epoch) -> Result<Arc<dyn Collective<B>>> {
        Ok(Arc::new(self.at_epoch(epoch)?))
    }
}
