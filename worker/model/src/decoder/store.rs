//! Where the loader puts what it cuts from a checkpoint: on a backend, or nowhere but a count of bytes.
//!
//! Invariant: what is counted is what is loaded, because one walk ([`super::load`]) asks either store for the same
//! parts.

use std::ops::Range;
use std::sync::Arc;

use forge_kernels::{Backend, DType, MatrixSource, Segments};

use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::progress::LoadProgress;
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
    /// Hears of bytes that were copied.
    pub progress: &'a LoadProgress,
}

impl<B: Backend> Store for BackendStore<'_, B> {
    type Slots = B;

    fn weight(&mut self, part: Part<'_>) -> Result<B::Weight> {
        let place = part.matrix.place(part.rows, part.columns.len());
        let source = part.matrix.part(self.checkpoint, part.rows, part.columns, part.segments)?;
        if let Place::Copied(bytes) = place {
            self.progress.add(bytes);
        }
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
    /// Matrices read where they lie in the file.
    pub mapped: usize,
    /// Matrices put together in memory.
    pub gathered: usize,
    /// Vectors, as f32.
    pub converted: usize,
}

/// What a counted matrix and vector are: nothing.
pub(crate) struct Nothing;

impl Slots for Nothing {
    type Weight = ();
    type Vector = ();
}

impl ByteCount {
    fn floats(&mut self, count: usize) {
        self.converted += count * size_of::<f32>();
    }
}

impl Store for ByteCount {
    type Slots = Nothing;

    fn weight(&mut self, part: Part<'_>) -> Result<()> {
        match part.matrix.place(part.rows, part.columns.len()) {
            Place::Mapped(bytes) => self.mapped += bytes,
            Place::Copied(bytes) => self.gathered += bytes,
        }
        Ok(())
    }

    fn vector(&mut self, _vector: &VectorRef, wanted: &[Range<usize>]) -> Result<()> {
        self.floats(wanted.iter().map(Range::len).sum());
        Ok(())
    }

    fn table(&mut self, rows: &[&VectorRef]) -> Result<()> {
        self.floats(rows.iter().map(|row| row.len()).sum());
        Ok(())
    }

    fn values(&mut self, values: &[f32]) -> Result<()> {
        self.floats(values.len());
        Ok(())
    }

    fn host(&mut self, vector: &VectorRef) -> Result<Vec<f32>> {
        self.floats(vector.len());
        Ok(Vec::new())
    }
}

#[cfg(test)]
mod tests {
    use forge_kernels::{CpuBackend, CpuOptions};

    use super::*;
    use crate::decoder::layout::Layout;
    use crate::decoder::load::Loader;
    use crate::decoder::options::Shard;
    use crate::{LoadMode, Model};

    /// Bytes of the matrices that a rank loads: those that lie in the file, those that do not.
    fn loaded(model: &Model, layout: &Layout) -> (usize, usize) {
        let backend = CpuBackend::new(CpuOptions { threads: 1, ..CpuOptions::default() }).unwrap();
        let progress = &LoadProgress::default();
        let mut store = BackendStore { backend: &backend, checkpoint: model.checkpoint(), scanned: Some(Vec::new()), progress };
        Loader { store: &mut store, architecture: model.architecture(), layout }.load(model.refs()).unwrap();
        let files: Vec<_> = model.checkpoint().tensors().values().map(|entry| model.checkpoint().source(entry)).collect();
        let (mut mapped, mut gathered) = (0, 0);
        for matrix in store.scanned.unwrap() {
            if files.iter().any(|file| Arc::ptr_eq(file, &matrix.bytes)) {
                mapped += matrix.rows * matrix.dtype.row_bytes(matrix.columns).unwrap();
            } else {
                gathered += (*matrix.bytes).as_ref().len();
            }
        }
        (mapped, gathered)
    }

    #[test]
    fn what_is_counted_is_what_is_loaded() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/model");
        // Transposed, grouped, one after another, by turns in stacks, blocks apart, an expert a tensor, latent (joined and
        // apart), shared by ranks.
        let rows = [
            "gpt2",
            "rows/falcon-40b",
            "rows/phi3",
            "rows/gpt_oss",
            "quantized/gpt_oss-mxfp4",
            "rows/mixtral",
            "rows/deepseek_v2",
            "rows-gguf/deepseek_v2.gguf",
            "rows/olmo2-grouped",
        ];
        for row in rows {
            let model = Model::open(format!("{folder}/{row}"), LoadMode::Mmap).unwrap();
            let mut gathered_by_any = 0;
            for (tp_size, tp_rank) in [1, 2, 4, 8].into_iter().flat_map(|size| (0..size).map(move |rank| (size, rank))) {
                let shard = Shard { tp_rank, tp_size, ..Shard::default() };
                let layout = Layout::new(model.architecture(), model.refs(), &shard).unwrap();
                let mut count = ByteCount::default();
                Loader { store: &mut count, architecture: model.architecture(), layout: &layout }.load(model.refs()).unwrap();
                assert_eq!((count.mapped, count.gathered), loaded(&model, &layout), "{row}: rank {tp_rank} of {tp_size}");
                gathered_by_any += count.gathered;
            }
            let gathers =
                ["gpt2", "rows/falcon-40b", "rows/gpt_oss", "quantized/gpt_oss-mxfp4", "rows-gguf/deepseek_v2.gguf"].contains(&row);
            assert_eq!(gathered_by_any > 0, gathers, "{row}");
        }
    }
}
