//! Matrices of a checkpoint, and any part of them as a [`MatrixSource`].
//!
//! A part whose rows lie one after another is used where it lies in the file; rows from several places, and matrices
//! stored [inputs, outputs], are copied into owned memory, which [`MatrixRef::place`] tells beforehand.
//!
//! Invariant: a part lies inside its tensor, and its columns are whole blocks.

use std::ops::Range;
use std::sync::Arc;

use forge_kernels::{DType, MatrixSource, Segments};

use super::runs::Runs;
use crate::checkpoint::Checkpoint;
use crate::error::{ModelError, Result};

/// Rows of a stored matrix, as the decoder sees it: [outputs, inputs].
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct MatrixRef {
    pub name: String,
    /// Rows of the (untransposed) tensor; of a three-dimensional one, of all its matrices in a row.
    pub rows: Runs,
    pub columns: usize,
    pub dtype: DType,
    pub order: Order,
}

/// In which order a tensor stores a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// [outputs, inputs].
    Rows,
    /// [inputs, outputs], with all outputs of the tensor per row; of a three-dimensional tensor, matrix `plane`.
    Transposed { outputs: usize, plane: usize },
}

/// What a part needs of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// Bytes read where they lie in the file.
    Mapped(usize),
    /// Bytes of a copy made at load.
    Copied(usize),
}

impl MatrixRef {
    /// All its rows, as a range to ask for.
    pub fn all_rows(&self) -> Range<usize> {
        0..self.rows.len()
    }

    /// Bytes of a part as stored, and where they will be.
    pub fn place(&self, wanted: &[Range<usize>], columns: usize) -> Place {
        let rows: usize = wanted.iter().map(Range::len).sum();
        let bytes = self.dtype.row_bytes(columns).unwrap_or(0) * rows;
        match self.order {
            Order::Rows if self.rows.stored(wanted).len() < 2 => Place::Mapped(bytes),
            _ => Place::Copied(bytes),
        }
    }

    /// Rows `wanted`, one range after another, and columns `columns` (whole blocks) of this matrix, summed by
    /// `segments`.
    ///
    /// # Errors
    /// Columns that would cut a quantization block.
    pub fn part(
        &self,
        checkpoint: &Checkpoint,
        wanted: &[Range<usize>],
        columns: Range<usize>,
        segments: Segments,
    ) -> Result<MatrixSource> {
        debug_assert!(columns.end <= self.columns && segments.columns() == columns.len());
        let entry = &checkpoint.tensors()[&self.name];
        let cut = || ModelError::Layout {
            requested: format!("columns {columns:?} of {}", self.name),
            reason: format!("they would cut a block of {} {} values", self.dtype.block_elements(), self.dtype),
            nearest: format!("bounds that are multiples of {}", self.dtype.block_elements()),
        };
        let row_bytes = self.dtype.row_bytes(self.columns).ok_or_else(cut)?;
        let first_byte = self.dtype.row_bytes(columns.start).ok_or_else(cut)?;
        let part_bytes = self.dtype.row_bytes(columns.len()).ok_or_else(cut)?;
        let stored = self.rows.stored(wanted);
        let rows = wanted.iter().map(Range::len).sum();
        let scales = match (checkpoint.scales(&self.name), self.order, &stored[..]) {
            (None, _, _) => None,
            (Some(scales), Order::Rows, [run]) => Some(scales.part(run.start, columns.start)),
            (Some(scales), Order::Rows, runs) => Some(scales.gathered(runs).part(0, columns.start)),
            (Some(_), Order::Transposed { .. }, _) => {
                return Err(ModelError::Unsupported {
                    what: format!("{} of 8-bit floats with scales, stored transposed,", self.name),
                    remedy: "take the unquantized checkpoint".to_owned(),
                });
            }
        };
        let source = |bytes, offset, row_stride_bytes| MatrixSource {
            name: self.name.clone(),
            bytes,
            offset,
            row_stride_bytes,
            rows,
            columns: columns.len(),
            dtype: self.dtype,
            scales,
            segments,
        };
        if let (Order::Rows, [run]) = (self.order, &stored[..]) {
            return Ok(source(checkpoint.source(entry), entry.bytes.start + run.start * row_bytes + first_byte, row_bytes));
        }
        let bytes = checkpoint.bytes(entry);
        let owned = match self.order {
            Order::Rows => {
                let row = |row: usize| &bytes[row * row_bytes + first_byte..][..part_bytes];
                let mut owned = Vec::with_capacity(rows * part_bytes);
                stored.into_iter().flatten().for_each(|stored| owned.extend_from_slice(row(stored)));
                owned
            }
            Order::Transposed { outputs, plane } => {
                let element = self.dtype.block_bytes();
                let stored_plane = StoredPlane { bytes: &bytes[plane * self.columns * outputs * element..], outputs, element };
                stored_plane.transpose(&stored, columns.clone())
            }
        };
        Ok(source(Arc::new(owned), 0, part_bytes))
    }
}

/// A matrix stored [inputs, outputs].
struct StoredPlane<'a> {
    bytes: &'a [u8],
    outputs: usize,
    /// Bytes of a value.
    element: usize,
}

impl StoredPlane<'_> {
    /// [outputs, inputs] of the wanted ones. Walks in tiles, so that both sides stay in the cache.
    fn transpose(&self, outputs: &[Range<usize>], inputs: Range<usize>) -> Vec<u8> {
        const TILE: usize = 32;
        let element = self.element;
        let outputs: Vec<usize> = outputs.iter().cloned().flatten().collect();
        let mut owned = vec![0; outputs.len() * inputs.len() * element];
        for input_tile in inputs.clone().step_by(TILE) {
            for (tile, outputs) in outputs.chunks(TILE).enumerate() {
                for (index, output) in outputs.iter().enumerate() {
                    let row = (tile * TILE + index) * inputs.len();
                    for input in input_tile..(input_tile + TILE).min(inputs.end) {
                        let from = (input * self.outputs + output) * element;
                        let to = (row + input - inputs.start) * element;
                        owned[to..to + element].copy_from_slice(&self.bytes[from..from + element]);
                    }
                }
            }
        }
        owned
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposes_any_part() {
        // More than one tile each way, value = input · 256 + output in two bytes.
        let (inputs, outputs) = (70, 90);
        let stored: Vec<u8> = (0..inputs).flat_map(|input| (0..outputs).flat_map(move |output| [input as u8, output as u8])).collect();
        let plane = StoredPlane { bytes: &stored, outputs, element: 2 };
        let wanted = [3..44, 47..48, 50..90];
        let part = plane.transpose(&wanted, 5..70);
        let outputs: Vec<usize> = wanted.into_iter().flatten().collect();
        assert_eq!(part.len(), outputs.len() * 65 * 2);
        for (index, value) in part.chunks_exact(2).enumerate() {
            assert_eq!(value, [(index % 65 + 5) as u8, outputs[index / 65] as u8]);
        }
    }
}
