//! One `linear` or `linear_groups` call: quantize the input once, cut all products into tasks over rows, run them in one
//! region.
//!
//! How the rows are cut never shows in the results: every output is computed whole by one task.

use std::ops::Range;

use crate::dense::{DenseTask, ElementRows, ScaledRows, dense_rows};
use crate::dtype::DType;
use crate::error::Result;
use crate::lanes::LANES;
use crate::memory::SharedPointer;
use crate::path::CpuPath;
use crate::pool::ThreadPool;
use crate::quantize::{Activations, BLOCK, QuantizedRow, quantize_row};
use crate::quantized::{MatrixView, QuantizedTask, TokenBlocks, quantized_rows};
use crate::weight::CpuWeight;

/// Tasks per thread: enough that the slowest does not keep the others waiting, few enough to stay cheap.
const TASKS_PER_THREAD: usize = 8;
/// Most rows of a task: its weights stay in a core's cache while blocks of tokens pass over them.
const MAX_TASK_ROWS: usize = 64;
/// Tokens from which quantizing the input is worth a parallel region.
const PARALLEL_TOKENS: usize = 16;

/// One matrix times some of the input's rows, with all shapes already checked. No two products write the same rows of one
/// output.
pub(crate) struct CheckedProduct<'a> {
    pub(crate) weight: &'a CpuWeight,
    /// Rows of the input and of the output.
    pub(crate) tokens: Range<usize>,
    /// `weight.rows` values, readable for 16 more than the last whole tile needs (see [`bias_elements`]).
    pub(crate) bias: Option<&'a [f32]>,
    /// Row 0 of the output, `[tokens][out_width]`
    pub(crate) out: SharedPointer<f32>,
    pub(crate) out_width: usize,
}

impl CheckedProduct<'_> {
    /// Where the first token's results go.
    fn first_output(&self) -> *mut f32 {
        self.out.get().wrapping_add(self.tokens.start * self.out_width)
    }
}

/// Elements a bias vector must have in memory for a weight of `rows` rows: kernels read 16 at once.
pub(crate) fn bias_elements(rows: usize) -> usize {
    rows.max(LANES)
}

/// The input of a call: `[tokens][width]`.
#[derive(Clone, Copy)]
pub(crate) struct Input<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) width: usize,
    pub(crate) tokens: usize,
}

/// What a call runs on.
pub(crate) struct Engine<'a> {
    pub(crate) path: CpuPath,
    pub(crate) pool: &'a ThreadPool,
    pub(crate) activations: &'a mut Activations,
}

/// Rows of one product.
struct Task {
    product: usize,
    rows: Range<usize>,
}

/// Computes all products.
pub(crate) fn linear(engine: Engine<'_>, input: Input<'_>, products: &[CheckedProduct<'_>]) -> Result<()> {
    if products.iter().any(|product| product.weight.dtype.is_quantized()) {
        quantize_input(&engine.path, engine.pool, engine.activations, input)?;
    }
    let tasks = cut(products, engine.pool.threads());
    let activations = &*engine.activations;
    engine.pool.run_in_order(tasks.len(), |index| {
        let task = &tasks[index];
        let product = &products[task.product];
        // SAFETY: shapes were checked; tasks have disjoint rows or tokens, so disjoint parts of `out`.
        unsafe {
            if product.weight.dtype.is_quantized() {
                run_quantized(engine.path, product, task.rows.clone(), activations);
            } else {
                run_dense(engine.path, product, task.rows.clone(), input);
            }
        }
    });
    Ok(())
}

/// Cuts the products' rows, in multiples of 16, into about [`TASKS_PER_THREAD`] tasks per thread.
fn cut(products: &[CheckedProduct<'_>], threads: usize) -> Vec<Task> {
    let total: usize = products.iter().map(|product| product.weight.rows).sum();
    let rows = total.div_ceil(threads * TASKS_PER_THREAD).next_multiple_of(LANES).min(MAX_TASK_ROWS);
    let mut tasks = Vec::with_capacity(total / rows + products.len());
    for (product, checked) in products.iter().enumerate() {
        let mut start = 0;
        while start < checked.weight.rows {
            let end = checked.weight.rows.min(start + rows);
            tasks.push(Task { product, rows: start..end });
            start = end;
        }
    }
    tasks
}

/// Quantizes all tokens, in parallel where there are many.
fn quantize_input(path: &CpuPath, pool: &ThreadPool, activations: &mut Activations, input: Input<'_>) -> Result<()> {
    activations.reserve(input.tokens, input.width)?;
    debug_assert!(input.width.is_multiple_of(BLOCK), "checked by the caller");
    let first: QuantizedRow = activations.row(0);
    let quantize = |tokens: Range<usize>| {
        for token in tokens {
            // SAFETY: the token's row of x and of the activations exist; each token has one task.
            unsafe { quantize_row(*path, input.x[token * input.width..].as_ptr(), first.offset(token)) };
        }
    };
    if input.tokens < PARALLEL_TOKENS {
        quantize(0..input.tokens);
    } else {
        let tasks = input.tokens.div_ceil(PARALLEL_TOKENS);
        pool.run(tasks, |task| quantize(task * PARALLEL_TOKENS..input.tokens.min((task + 1) * PARALLEL_TOKENS)));
    }
    Ok(())
}

/// # Safety
/// The product's shapes were checked; nobody else writes the rows of `out`.
unsafe fn run_dense(path: CpuPath, product: &CheckedProduct<'_>, rows: Range<usize>, input: Input<'_>) {
    let weight = product.weight;
    let task = DenseTask {
        rows,
        bounds: &weight.bounds,
        merges: &weight.merges,
        x: input.x[product.tokens.start * input.width..].as_ptr(),
        x_width: input.width,
        tokens: product.tokens.len(),
        bias: product.bias.map(<[f32]>::as_ptr),
        out: product.first_output(),
        out_width: product.out_width,
    };
    let (base, stride_bytes) = (weight.base(), weight.stride_bytes);
    // SAFETY: the caller's contract.
    unsafe {
        match (weight.dtype, &weight.scales) {
            (_, Some(scales)) => dense_rows(path, ScaledRows { base, stride_bytes, scales }, task),
            (DType::F16, None) => dense_rows(path, ElementRows::<half::f16> { base: base.cast(), stride_bytes }, task),
            (DType::BF16, None) => dense_rows(path, ElementRows::<half::bf16> { base: base.cast(), stride_bytes }, task),
            (_, None) => dense_rows(path, ElementRows::<f32> { base: base.cast(), stride_bytes }, task),
        }
    }
}

/// # Safety
/// The product's shapes were checked and the activations are those of the input; nobody else writes the rows
/// of `out`.
unsafe fn run_quantized(path: CpuPath, product: &CheckedProduct<'_>, rows: Range<usize>, activations: &Activations) {
    let weight = product.weight;
    let first_block = product.tokens.start * activations.blocks;
    let task = QuantizedTask {
        matrix: MatrixView {
            base: weight.base(),
            stride: weight.stride_bytes,
            rows: weight.stored_rows(),
            parts: activations.blocks,
            leaf_ends: &weight.leaf_ends,
            merges: &weight.merges,
        },
        rows,
        activations: TokenBlocks {
            values: activations.values[first_block * BLOCK..].as_ptr(),
            scales: activations.scales[first_block..].as_ptr(),
            rounded_sums: activations.rounded_sums[first_block..].as_ptr(),
            sums: activations.sums[first_block..].as_ptr(),
            half_sums: activations.half_sums[first_block..].as_ptr(),
            blocks: activations.blocks,
        },
        tokens: product.tokens.len(),
        bias: product.bias.map(<[f32]>::as_ptr),
        out: product.first_output(),
        out_width: product.out_width,
    };
    // SAFETY: the caller's contract.
    unsafe { quantized_rows(path, weight.dtype, task) }
}
