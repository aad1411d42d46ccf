//! Vectors of a checkpoint (norm weights, biases, sinks), read as f32.
//!
//! Invariant: a vector's values are finite and dense; quantized types are refused when names are resolved.

use std::ops::Range;

use forge_kernels::dequantize;

use super::runs::Runs;
use crate::checkpoint::Checkpoint;
use crate::error::{ModelError, Result};

/// Values of stored tensors, one piece after another: more than one where every head has a tensor of its own.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct VectorRef {
    pub pieces: Vec<VectorPiece>,
}

/// Values of one tensor.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct VectorPiece {
    pub name: String,
    pub values: Runs,
}

impl VectorRef {
    /// Values of one tensor.
    pub fn of(name: String, values: Runs) -> Self {
        VectorRef { pieces: vec![VectorPiece { name, values }] }
    }

    /// The tensor's name, of several the first's.
    pub fn name(&self) -> &str {
        self.pieces.first().map_or("", |piece| &piece.name)
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.pieces.iter().map(|piece| piece.values.len()).sum()
    }

    /// The values of some ranges (within this vector), one after another, as f32.
    ///
    /// # Errors
    /// [`ModelError::NonFinite`]: vectors are small and always looked through.
    pub fn read(&self, checkpoint: &Checkpoint, wanted: &[Range<usize>]) -> Result<Vec<f32>> {
        let mut values = Vec::new();
        for range in wanted {
            let mut start = 0;
            for piece in &self.pieces {
                let end = start + piece.values.len();
                let (from, to) = (range.start.max(start), range.end.min(end));
                if from < to {
                    piece.read(checkpoint, from - start..to - start, &mut values)?;
                }
                start = end;
            }
        }
        Ok(values)
    }

    /// All values as f32.
    ///
    /// # Errors
    /// As [`VectorRef::read`].
    pub fn read_all(&self, checkpoint: &Checkpoint) -> Result<Vec<f32>> {
        self.read(checkpoint, std::slice::from_ref(&(0..self.len())))
    }
}

impl VectorPiece {
    fn read(&self, checkpoint: &Checkpoint, wanted: Range<usize>, values: &mut Vec<f32>) -> Result<()> {
        let entry = &checkpoint.tensors()[&self.name];
        let (bytes, element) = (checkpoint.bytes(entry), entry.dtype.block_bytes());
        for run in self.values.stored(&[wanted]) {
            let start = values.len();
            values.resize(start + run.len(), 0.0);
            dequantize(entry.dtype, &bytes[run.start * element..run.end * element], &mut values[start..]);
            if let Some(at) = values[start..].iter().position(|value| !value.is_finite()) {
                let path = checkpoint.path().to_owned();
                return Err(ModelError::NonFinite { path, tensor: self.name.clone(), index: run.start + at });
            }
        }
        Ok(())
    }
}
