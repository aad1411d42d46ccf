//! A group of one rank: every reduction is the value itself.

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
        if let Some(part) = part {
            let mut values = vec![0.0; rows * width];
            backend.read_rows(part, 0..rows, &mut values)?;
            backend.write_rows(out, 0..rows, &values)?;
        }
        Ok(())
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

    fn barrier(&self) -> Result<()> {
        Ok(())
    }

    fn abort(&self, _reason: &str) {}
}
