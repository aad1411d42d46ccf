//! A weight matrix as the CPU backend holds it: the mapped bytes, checked, and how its sums are cut.
//!
//! Invariant: every row the matrix claims lies within its bytes. Nothing is copied, except a quantized matrix
//! of fewer than 16 rows, which is padded to the 16 the kernels read at once.

use std::sync::Arc;

use crate::backend::MatrixSource;
use crate::dequantize::dequantize;
use crate::dtype::DType;
use crate::error::{KernelError, Result};
use crate::lanes::LANES;
use crate::memory::AlignedBuffer;
use crate::scales::BlockScales;
use crate::tree::merges_after;

/// A resident or mapped weight matrix.
pub struct CpuWeight {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) dtype: DType,
    pub(crate) stride_bytes: usize,
    /// Leaf boundaries in columns.
    pub(crate) bounds: Vec<usize>,
    /// Where each leaf ends, in blocks of the type.
    pub(crate) leaf_ends: Vec<usize>,
    pub(crate) merges: Vec<u8>,
    /// Scales beside the bytes: always for 8-bit floats, never else.
    pub(crate) scales: Option<BlockScales>,
    base: *const u8,
    row_bytes: usize,
    _bytes: Arc<dyn AsRef<[u8]> + Send + Sync>,
    _padded: Option<AlignedBuffer<u8>>,
}

// SAFETY: `base` points into memory that `_bytes` or `_padded` keeps alive and that nobody writes.
unsafe impl Send for CpuWeight {}
// SAFETY: as above.
unsafe impl Sync for CpuWeight {}

impl CpuWeight {
    pub(crate) fn new(source: MatrixSource) -> Result<Self> {
        let refuse = |reason: String| KernelError::Weight { name: source.name.clone(), reason };
        let (rows, columns, dtype) = (source.rows, source.columns, source.dtype);
        if rows == 0 || columns == 0 {
            return Err(refuse(format!("{rows} rows of {columns} columns hold nothing")));
        }
        let row_bytes = dtype
            .row_bytes(columns)
            .ok_or_else(|| refuse(format!("{columns} columns are not whole {dtype} blocks of {}", dtype.block_elements())))?;
        if source.segments.columns() != columns {
            return Err(refuse(format!("its leaves cover {} of {columns} columns", source.segments.columns())));
        }
        let block = dtype.block_elements();
        if let Some(bound) = source.segments.bounds().iter().find(|bound| !bound.is_multiple_of(block)) {
            return Err(refuse(format!("a leaf ends at column {bound}, inside a {dtype} block of {block}")));
        }
        if source.row_stride_bytes < row_bytes {
            return Err(refuse(format!("rows of {row_bytes} bytes do not fit a stride of {}", source.row_stride_bytes)));
        }
        if let Some(scales) = &source.scales {
            if dtype != DType::F8E4M3 {
                return Err(refuse(format!("scales beside a matrix of {dtype}; only F8_E4M3 has them")));
            }
            if let Some(reason) = scales.misfit(rows, columns) {
                return Err(refuse(reason));
            }
        }
        let bytes: &[u8] = (*source.bytes).as_ref();
        let end = (rows - 1)
            .checked_mul(source.row_stride_bytes)
            .and_then(|start| start.checked_add(row_bytes))
            .and_then(|length| length.checked_add(source.offset));
        if end.is_none_or(|end| end > bytes.len()) {
            let needed = end.map_or("more than the address space".into(), |end| format!("{end} bytes"));
            return Err(refuse(format!("it needs {needed}, the data has {}: the file is cut short or damaged", bytes.len())));
        }
        let data = &bytes[source.offset..];
        let (padded, stride_bytes) = if dtype.is_quantized() && rows < LANES {
            (Some(pad_rows(data, &source, row_bytes)?), row_bytes)
        } else {
            (None, source.row_stride_bytes)
        };
        Ok(CpuWeight {
            rows,
            columns,
            dtype,
            stride_bytes,
            bounds: source.segments.bounds().to_vec(),
            leaf_ends: source.segments.bounds()[1..].iter().map(|bound| bound / block).collect(),
            merges: merges_after(source.segments.leaves()),
            scales: source.scales.or_else(|| (dtype == DType::F8E4M3).then(|| BlockScales::whole(1.0))),
            base: padded.as_ref().map_or(data.as_ptr(), |padded| padded.as_ptr()),
            row_bytes,
            _bytes: source.bytes,
            _padded: padded,
        })
    }

    /// Row 0.
    pub(crate) fn base(&self) -> *const u8 {
        self.base
    }

    /// Rows in memory: at least 16 for a quantized matrix.
    pub(crate) fn stored_rows(&self) -> usize {
        if self.dtype.is_quantized() { self.rows.max(LANES) } else { self.rows }
    }

    /// A row's bytes. `row` is below `rows`.
    fn row(&self, row: usize) -> &[u8] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: `new` checked that every row lies within the bytes.
        unsafe { std::slice::from_raw_parts(self.base.add(row * self.stride_bytes), self.row_bytes) }
    }

    /// Writes the row's values into `out` (as long as the row).
    pub(crate) fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        dequantize(self.dtype, self.row(row), out);
        if let Some(scales) = &self.scales {
            for (column, out) in out.iter_mut().enumerate() {
                *out *= scales.at(row, column);
            }
        }
    }
}

/// The rows side by side, followed by zeros up to 16 rows.
fn pad_rows(data: &[u8], source: &MatrixSource, row_bytes: usize) -> Result<AlignedBuffer<u8>> {
    let mut padded = AlignedBuffer::zeroed(LANES * row_bytes, "a small weight")?;
    for (row, to) in padded.chunks_exact_mut(row_bytes).enumerate().take(source.rows) {
        let start = row * source.row_stride_bytes;
        to.copy_from_slice(&data[start..start + row_bytes]);
    }
    Ok(padded)
}
