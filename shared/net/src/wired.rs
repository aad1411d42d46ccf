//! The collective of ranks in several processes.
//!
//! Small sums are taken in one exchange: every rank gets every other's rows and adds them all. Large ones are halved and
//! doubled: with each neighbour in turn a rank gives away half of what it has and adds what it gets, then the sums go back
//! the same way.
//!
//! Invariants: both ways add every element in the tree's order, lower ranks first, so all ranks and all transports have the
//! same bits; a matrix that is not whole is refused; rows go in chunks of which at most two are on their way to a rank that
//! waits, so that no two ranks wait for each other to read.

mod exchange;
mod operations;

use std::ops::Range;
use std::sync::Arc;

use forge_kernels::Backend;
use parking_lot::Mutex;

use crate::frame::Kind;
use crate::mesh::Mesh;
use crate::sum::tree_sum;
use crate::{NetError, Result};
use exchange::Outgoing;

/// Rows up to this size are summed in one exchange, bytes sent by a rank.
const ONE_SHOT_BYTES: usize = 64 << 10;

/// A rank's handle on its group.
#[derive(Debug)]
pub(crate) struct WiredRank {
    mesh: Arc<Mesh>,
    /// Held for a whole operation on the group, so one at a time.
    turn: Mutex<()>,
}

impl WiredRank {
    pub(crate) fn new(mesh: Arc<Mesh>) -> Self {
        WiredRank { mesh, turn: Mutex::new(()) }
    }

    fn own(&self) -> usize {
        self.mesh.spec().rank
    }

    fn ranks(&self) -> usize {
        self.mesh.spec().members.len()
    }

    fn check_peer(&self, operation: &'static str, named: usize, other: bool) -> Result<()> {
        let (rank, size) = (self.own(), self.ranks());
        if named < size && !(other && named == rank) {
            return Ok(());
        }
        Err(NetError::NotAPeer { operation, rank, named, size })
    }

    /// Sums `values` [rows, width] over all ranks in place.
    fn sum(&self, rows: usize, width: usize, values: &mut [f32]) -> Result<()> {
        let bytes = size_of_val(values) * (self.ranks() - 1);
        if bytes <= ONE_SHOT_BYTES { self.sum_at_once(rows, width, values) } else { self.sum_by_halves(rows, width, values) }
    }

    fn sum_at_once(&self, rows: usize, width: usize, values: &mut [f32]) -> Result<()> {
        let mut parts: Vec<Vec<f32>> = vec![vec![0.0; values.len()]; self.ranks()];
        let own = values.to_vec();
        let outgoing = self.to_all(Outgoing { rows, width, values: &own });
        self.exchange("all_reduce", Kind::AllReduce, &outgoing, &self.others(), |part| {
            let length = self.same_shape("all_reduce", (rows, width), &part)?;
            part.copy_to(&mut parts[part.from]);
            Ok(length)
        })?;
        parts[self.own()].copy_from_slice(&own);
        tree_sum(&parts.iter().map(Vec::as_slice).collect::<Vec<_>>(), values);
        Ok(())
    }

    fn sum_by_halves(&self, rows: usize, width: usize, values: &mut [f32]) -> Result<()> {
        let (own, size) = (self.own(), self.ranks());
        let mut kept: Range<usize> = 0..values.len();
        let mut given: Vec<Range<usize>> = Vec::new();
        let mut received = vec![0.0; values.len().div_ceil(2)];
        let mut distance = 1;
        while distance < size {
            let peer = own ^ distance;
            let middle = kept.start + kept.len() / 2;
            let (low, high) = (kept.start..middle, middle..kept.end);
            let (keep, give) = if own < peer { (low, high) } else { (high, low) };
            let received = &mut received[..keep.len()];
            let outgoing = self.to_one(peer, Outgoing::part(rows, width, &values[give.clone()]));
            self.exchange("all_reduce", Kind::AllReduce, &outgoing, &[peer], |part| {
                let length = self.same_part("all_reduce", (rows, width), received.len(), &part)?;
                part.copy_to(received);
                Ok(length)
            })?;
            for (sum, other) in values[keep.clone()].iter_mut().zip(received.iter()) {
                // Lower ranks first, whose side this rank may be on: a sum has the same bits either way, but for
                // which of two NaNs it keeps.
                let (lower, upper) = if own < peer { (*sum, *other) } else { (*other, *sum) };
                *sum = lower + upper;
            }
            given.push(give);
            kept = keep;
            distance *= 2;
        }
        // The way back: the neighbour that took a half has its sum now.
        while let Some(back) = given.pop() {
            distance /= 2;
            let peer = own ^ distance;
            let sent = values[kept.clone()].to_vec();
            let outgoing = self.to_one(peer, Outgoing::part(rows, width, &sent));
            let target = &mut values[back.clone()];
            self.exchange("all_reduce", Kind::AllReduced, &outgoing, &[peer], |part| {
                let length = self.same_part("all_reduce", (rows, width), target.len(), &part)?;
                part.copy_to(target);
                Ok(length)
            })?;
            kept = kept.start.min(back.start)..kept.end.max(back.end);
        }
        Ok(())
    }

    fn others(&self) -> Vec<usize> {
        (0..self.ranks()).filter(|&rank| rank != self.own()).collect()
    }

    fn to_all<'a>(&self, outgoing: Outgoing<'a>) -> Vec<Option<Outgoing<'a>>> {
        (0..self.ranks()).map(|rank| (rank != self.own()).then_some(outgoing)).collect()
    }

    fn to_one<'a>(&self, peer: usize, outgoing: Outgoing<'a>) -> Vec<Option<Outgoing<'a>>> {
        (0..self.ranks()).map(|rank| (rank == peer).then_some(outgoing)).collect()
    }
}

/// Rows of a buffer on the host.
fn read<B: Backend>(backend: &B, buffer: &B::Buffer, rows: Range<usize>) -> Result<Vec<f32>> {
    let mut values = vec![0.0; rows.len() * backend.width(buffer)];
    backend.read_rows(buffer, rows, &mut values)?;
    Ok(values)
}
