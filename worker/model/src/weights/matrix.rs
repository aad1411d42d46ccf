//! Matrices of a checkpoint, and any part of them as a [`MatrixSource`].
//!
//! A part whose rows lie one after another is used where it lies in the file. Rows from several places, and matrices
//! stored in another [`Order`], are copied into owned memory, which [`MatrixRef::place`] tells beforehand.
//!
//! Invariant: a part lies inside its tensor, and its columns are whole blocks.

use std::ops::Range;
use std::sync::Arc;

use forge_kernels::{DType, MatrixSource, Segments};

use super::mxfp4::SplitBlocks;
use super::runs::Runs;
use super::transposed::Planes;
use crate::checkpoint::Checkpoint;
use crate::error::{ModelError, Result};

/// Rows of a stored matrix, as the decoder sees it: [outputs, inputs].
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct MatrixRef {
    pub name: String,
    /// Rows of the (untransposed) tensor; of a three-dimensional one, of all its matrices in a row.
    pub rows: Runs,
    pub columns: usize,
    /// Of what the decoder sees; what is stored may have another type ([`Order::Transposed`]).
    pub dtype: DType,
    pub order: Order,
}

/// In which order a tensor stores a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// [outputs, inputs].
    Rows,
    /// [inputs, outputs], with all outputs of the tensor per row; of a three-dimensional tensor, its matrices in a row.
    /// Types that store values in blocks are read as f32.
    Transposed { outputs: usize },
    /// [outputs, inputs] in MXFP4, the exponents apart from the values ([`Checkpoint::exponents`]).
    SplitBlocks,
}

impl Order {
    /// What the decoder sees of a tensor of this type in this order.
    pub fn seen(self, stored: DType) -> DType {
        if matches!(self, Order::Transposed { .. }) && stored.block_elements() > 1 { DType::F32 } else { stored }
    }
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
            (Some(_), Order::Transposed { .. } | Order::SplitBlocks, _) => {
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
            Order::Transposed { outputs } => Planes { bytes, inputs: self.columns, outputs, dtype: entry.dtype }.part(&stored, &columns),
            Order::SplitBlocks => {
                let exponents = checkpoint.exponents(&self.name).unwrap_or_default();
                SplitBlocks { values: bytes, exponents, columns: self.columns }.joined(&stored, &columns)
            }
        };
        Ok(source(Arc::new(owned), 0, part_bytes))
    }
}
