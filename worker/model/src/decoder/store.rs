//! Where the loader puts what it cuts from a checkpoint: on a backend, or nowhere but a count of bytes.
//!
//! Invariant: what is counted is what is loaded, because one walk ([`super::load`]) asks either store for the same
//! parts.

use std::ops::Range;
use std::sync::Arc;

use forge_kernels::{Backend, DType, MatrixSource, Segments};

use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::weights::{MatrixRef, Place, VectorRef};

/// What a loaded matrix and a loaded vector are.
pub(crate) trait Slots {
    type Weight;
    type Vector;
}

impl<B: Backend> Slots for B {
    type Weight = B::Weight;
    type Vector = B::Vector;
}

/// Part of a matrix.
pub(crate) struct Part<'a> {
    pub matrix: &'a MatrixRef,
    pub rows: &'a [Range<usize>],
    pub columns: Range<usize>,
    pub segments: Segments,
}

/// Takes parts of a checkpoint in.
pub(crate) trait Store {
    type Slots: Slots;

    /// Takes a matrix in.
    fn weight(&mut self, part: Part<'_>) -> Result<<Self::Slots as Slots>::Weight>;
    /// Takes runs of a vector in.
    fn vector(&mut self, vector: &VectorRef, wanted: &[Range<usize>]) -> Result<<Self::Slots as Slots>::Vector>;
    /// Takes vectors of one length in, as rows of a table.
    fn table(&mut self, rows: &[&VectorRef]) -> Result<<Self::Slots as Slots>::Weight>;
    /// Takes values in that no file holds.
    fn values(&mut self, values: &[f32]) -> Result<<Self::Slots as Slots>::Vector>;
    /// Reads a vector that stays on the host.
    fn host(&mut self, vector: &VectorRef) -> Result<Vec<f32>>;
}

/// Loads onto a backend.
pub(crate) struct BackendStore<'a, B: Backend> {
    pub backend: &'a B,
    pub checkpoint: &'a Checkpoint,
    /// Collects the matrices to look through for NaN; `None` where that is turned off.
    pub scanned: Option<Vec<MatrixSource>>,
}

impl<B: Backend> Store for BackendStore<'_, B> {
    type Slots = B;

    fn weight(&mut self, part: Part<'_>) -> Result<B::Weight> {
        let source = part.matrix.part(self.checkpoint, part.rows, part.columns, part.segments)?;
        if let Some(scanned) = &mut self.scanned {
            scanned.push(source.clone());
        }
        Ok(self.backend.weight(source)?)
    }

    fn vector(&mut self, vector: &VectorRef, wanted: &[Range<usize>]) -> Result<B::Vector> {
        self.values(&vector.read(self.checkpoint, wanted)?)
    }

    fn table(&mut self, rows: &[&VectorRef]) -> Result<B::Weight> {
        let mut bytes = Vec::new();
        for row in rows {
            bytes.extend(row.read_all(self.checkpoint)?.into_iter().flat_map(f32::to_le_bytes));
        }
        let columns = rows[0].len();
        Ok(self.backend.weight(MatrixSource {
            name: rows[0].name().to_owned(),
            row_stride_bytes: columns * size_of::<f32>(),
            bytes: Arc::new(bytes),
            offset: 0,
            rows: rows.len(),
            columns,
            dtype: DType::F32,
            scales: None,
            segments: Segments::whole(columns),
        })?)
    }

    fn values(&mut self, values: &[f32]) -> Result<B::Vector> {
        Ok(self.backend.vector(values)?)
    }

    fn host(&mut self, vector: &VectorRef) -> Result<Vec<f32>> {
        vector.read_all(self.checkpoint)
    }
}

/// Bytes of what would be loaded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct ByteCount {
    /// Read where they lie in the file.
    pub mapped: usize,
    /// Copied or converted.
    pub copied: usize,
}

/// What a counted matrix and vector are: nothing.
pub(crate) struct Nothing;

impl Slots for Nothing {
    type Weight = ();
    type Vector = ();
}

impl ByteCount {
    fn copy_floats(&mut self, count: usize) {
        self.copied += count * size_of::<f32>();
    }
}

impl Store for ByteCount {
    type Slots = Nothing;

    fn weight(&mut self, part: Part<'_>) -> Result<()> {
        match part.matrix.place(part.rows, part.columns.len()) {
            Place::Mapped(bytes) => self.mapped += bytes,
            Place::Copied(bytes) => self.copied += bytes,
        }
        Ok(())
    }

    fn vector(&mut self, _vector: &VectorRef, wanted: &[Range<usize>]) -> Result<()> {
        self.copy_floats(wanted.iter().map(Range::len).sum());
        Ok(())
    }

    fn table(&mut self, rows: &[&VectorRef]) -> Result<()> {
        self.copy_floats(rows.iter().map(|row| row.len()).sum());
        Ok(())
    }

    fn values(&mut self, values: &[f32]) -> Result<()> {
        self.copy_floats(values.len());
        Ok(())
    }

    fn host(&mut self, vector: &VectorRef) -> Result<Vec<f32>> {
        self.copy_floats(vector.len());
        Ok(Vec::new())
    }
}
