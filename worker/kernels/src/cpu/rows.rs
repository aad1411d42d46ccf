//! Calls that treat parts of rows: norms of heads, norms that ranks share, runs of columns.

use super::{CpuBackend, CpuBuffer, CpuVector, expect_at_least, expect_equal};
use crate::backend::{Columns, HeadRuns, NormKind, NormParams};
use crate::error::{KernelError, Result};
use crate::memory::SharedPointer;
use crate::norm::{NormRow, ScaledRow, norm_row, scale_row, square_sum};
use crate::tree::{Segments, merges_after};

/// [`crate::Backend::norm_heads`]; `affine` is weight and bias.
pub(super) fn norm_heads(
    backend: &CpuBackend,
    x: &mut CpuBuffer,
    rows: usize,
    heads: usize,
    affine: (Option<&CpuVector>, Option<&CpuVector>),
    params: NormParams,
) -> Result<()> {
    const NAME: &str = "norm_heads";
    expect_at_least(NAME, "x", x.rows, rows)?;
    expect_at_least(NAME, "heads", heads, 1)?;
    expect_equal(NAME, "columns beyond whole heads", x.width % heads, 0)?;
    let head_dim = x.width / heads;
    for (operand, vector) in [("weight", affine.0), ("bias", affine.1)] {
        if let Some(vector) = vector
            && vector.length != x.width
        {
            expect_equal(NAME, operand, vector.length, head_dim)?;
        }
    }
    let target = SharedPointer::new(&mut x.values);
    // A vector of one head's width begins again at each head.
    let part =
        |vector: Option<&CpuVector>, head: usize| vector.map(|vector| vector.values()[head * head_dim % vector.length.max(1)..].as_ptr());
    backend.over_rows(rows * heads, head_dim, |range| {
        for index in range {
            let x = target.get().wrapping_add(index * head_dim);
            let (weight, bias) = (part(affine.0, index % heads), part(affine.1, index % heads));
            // SAFETY: the head exists in x, the vectors hold its width; each head of a row has one task.
            unsafe { norm_row(backend.path, NormRow { x, out: x, weight, bias, width: head_dim }, params) };
        }
    });
    Ok(())
}

/// [`crate::Backend::square_sums`].
pub(super) fn square_sums(backend: &CpuBackend, x: &CpuBuffer, rows: usize, segments: &Segments, out: &mut CpuBuffer) -> Result<()> {
    const NAME: &str = "square_sums";
    expect_at_least(NAME, "x", x.rows, rows)?;
    expect_equal(NAME, "segments", segments.columns(), x.width)?;
    expect_at_least(NAME, "out", out.rows, rows)?;
    expect_equal(NAME, "out row", out.width, 1)?;
    let merges = merges_after(segments.leaves());
    for row in 0..rows {
        // SAFETY: the leaves cover the row, as checked.
        out.values[row] = unsafe { square_sum(backend.path, x.row(row).as_ptr(), segments.bounds(), &merges) };
    }
    Ok(())
}

/// [`crate::Backend::scale_by_square_sums`]; `sums` come with the columns they were taken over.
pub(super) fn scale_by_square_sums(
    backend: &CpuBackend,
    x: &mut CpuBuffer,
    rows: usize,
    sums: (&CpuBuffer, usize),
    weight: &CpuVector,
    params: NormParams,
) -> Result<()> {
    const NAME: &str = "scale_by_square_sums";
    let (sums, width) = sums;
    expect_at_least(NAME, "x", x.rows, rows)?;
    expect_at_least(NAME, "sums", sums.rows, rows)?;
    expect_equal(NAME, "sums row", sums.width, 1)?;
    expect_at_least(NAME, "width", width, x.width)?;
    expect_equal(NAME, "weight", weight.length, x.width)?;
    if params.kind != NormKind::Rms {
        return Err(KernelError::Unsupported {
            backend: "cpu",
            what: "a layer norm from sums of squares".into(),
            remedy: "only RMS norms are shared by ranks".into(),
        });
    }
    let columns = x.width;
    let target = SharedPointer::new(&mut x.values);
    backend.over_rows(rows, columns, |range| {
        for row in range {
            let x = target.get().wrapping_add(row * columns);
            let operands = ScaledRow { x, weight: weight.values().as_ptr(), columns, sum: sums.values[row], width };
            // SAFETY: the row exists in x, the weight has its width; each row has one task.
            unsafe { scale_row(backend.path, operands, params) };
        }
    });
    Ok(())
}

/// [`crate::Backend::copy_columns`]; `columns` are from and to.
pub(super) fn copy_columns(x: &CpuBuffer, rows: usize, columns: (Columns, Columns), runs: HeadRuns, out: &mut CpuBuffer) -> Result<()> {
    const NAME: &str = "copy_columns";
    let (from, to) = columns;
    expect_at_least(NAME, "x", x.rows, rows)?;
    expect_at_least(NAME, "out", out.rows, rows)?;
    if runs.heads == 0 {
        return Ok(());
    }
    let end = |columns: Columns| columns.stride.saturating_mul(runs.heads - 1).saturating_add(columns.start).saturating_add(runs.width);
    expect_at_least(NAME, "x row", x.width, end(from))?;
    expect_at_least(NAME, "out row", out.width, end(to))?;
    if runs.heads > 1 {
        expect_at_least(NAME, "distance of runs in out", to.stride, runs.width)?;
    }
    for row in 0..rows {
        let (source, target) = (x.row(row), out.row_mut(row));
        for head in 0..runs.heads {
            let (from, to) = (from.start + head * from.stride, to.start + head * to.stride);
            target[to..to + runs.width].copy_from_slice(&source[from..from + runs.width]);
        }
    }
    Ok(())
}
