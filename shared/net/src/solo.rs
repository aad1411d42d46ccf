//! A group of one rank: every reduction is the value itself.

use std::ops::Range;
use std::sync::Arc;

use forge_kernels::Backend;
use forge_shared::ids::Epoch;

use crate::{Collective, NetError, Result};

/// The collective of an unsharded replica.
#[derive(Debug, Clone, Copy, Default)]
pub struct Solo {
    /// Epoch of the plan.
    pub epoch: Epoch,
}

impl<B: Backend> Collective<B> for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn epoch(&self) -> Epoch {
        self.epoch
    }

    fn all_reduce(&self, _backend: &B, _buffer: &mut B::Buffer, _rows: usize) -> Result<()> {
        Ok(())
    }

    fn all_gather(&self, backend: &B, part: Option<&B::Buffer>, out: &mut B::Buffer, rows: usize) -> Result<()> {
        let width = part.map_or(0, |part| backend.width(part));
        if width != backend.width(out) {
            return Err(NetError::Mismatch {
                operation: "all_gather",
                rank: 0,
                actual: format!("{width} columns"),
                expected: format!("{} columns", backend.width(out)),
            });
        }
        match part {
            Some(part) => copy(backend, part, rows, out),
            None => Ok(()),
        }
    }

    fn reduce_scatter(&self, backend: &B, buffer: &B::Buffer, rows: usize, out: &mut B::Buffer) -> Result<Range<usize>> {
        copy(backend, buffer, rows, out)?;
        Ok(0..rows)
    }

    fn broadcast(&self, _backend: &B, _buffer: &mut B::Buffer, _rows: usize, root: usize) -> Result<()> {
        if root != 0 {
            return Err(NetError::Mismatch {
                operation: "broadcast",
                rank: 0,
                actual: format!("root {root}"),
                expected: "a root inside the group of 1".to_owned(),
            });
        }
        Ok(())
    }

    fn all_to_all(&self, backend: &B, buffer: &B::Buffer, counts: &[usize], out: &mut B::Buffer) -> Result<Vec<usize>> {
        let [rows] = counts else {
            return Err(NetError::Mismatch {
                operation: "all_to_all",
                rank: 0,
                actual: format!("{} counts", counts.len()),
                expected: "one per rank of the group of 1".to_owned(),
            });
        };
        copy(backend, buffer, *rows, out)?;
        Ok(vec![*rows])
    }

    fn send(&self, _backend: &B, _buffer: &B::Buffer, _rows: Range<usize>, to: usize) -> Result<()> {
        Err(NetError::NotAPeer { operation: "send", rank: 0, named: to, size: 1 })
    }

    fn recv(&self, _backend: &B, _buffer: &mut B::Buffer, _rows: Range<usize>, from: usize) -> Result<()> {
        Err(NetError::NotAPeer { operation: "recv", rank: 0, named: from, size: 1 })
    }

    fn barrier(&self) -> Result<()> {
        Ok(())
    }

    fn abort(&self, _reason: &str) {}

    fn rejoin(&self, epoch: Epoch) -> Result<Arc<dyn Collective<B>>> {
        if epoch <= self.epoch {
            return Err(NetError::OldEpoch { asked: epoch, current: self.epoch });
        }
        Ok(Arc::new(Solo { epoch }))
    }
}

fn copy<B: Backend>(backend: &B, from: &B::Buffer, rows: usize, to: &mut B::Buffer) -> Result<()> {
    let mut values = vec![0.0; rows * backend.width(from)];
    backend.read_rows(from, 0..rows, &mut values)?;
    Ok(backend.write_rows(to, 0..rows, &values)?)
}
