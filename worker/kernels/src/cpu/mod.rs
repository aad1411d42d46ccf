//! `CpuBackend`: checks every operand, then hands the work to the kernels and the thread pool.
//!
//! Operations complete before they return. All kernels behind this file trust the checks made here.

mod attention;
mod experts;
mod rows;

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use attention::AttentionOperands;

use crate::backend::*;
use crate::batch::AttentionBatch;
use crate::elementwise::{activate, add_scaled, clamp, scale_and_cap};
use crate::error::{KernelError, Result};
use crate::kv::{CpuKvPool, KvWriteTask, write_head};
use crate::linear::{CheckedProduct, Engine, Input, bias_elements, linear};
use crate::memory::{AlignedBuffer, SharedPointer};
use crate::norm::{NormRow, norm_row};
use crate::path::CpuPath;
use crate::pool::ThreadPool;
use crate::quantize::Activations;
use crate::rope::{CpuRopeTable, RopeRow, rope_row};
use crate::tree::Segments;
use crate::weight::CpuWeight;

/// Elements below which an operation is not worth a parallel region.
const PARALLEL_ELEMENTS: usize = 1 << 15;

/// How a [`CpuBackend`] is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuOptions {
    /// Threads that compute, the caller included; at least 1.
    pub threads: usize,
    /// Instruction set; `None` lets `FORGE_CPU_PATH`, else the machine, decide.
    pub path: Option<CpuPath>,
}

impl Default for CpuOptions {
    /// All threads the system offers, on the fastest path.
    fn default() -> Self {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        CpuOptions { threads, path: None }
    }
}

/// The CPU as a [`Backend`].
pub struct CpuBackend {
    path: CpuPath,
    pool: ThreadPool,
    activations: Mutex<Activations>,
}

/// Row-major f32 matrix of fixed capacity.
pub struct CpuBuffer {
    values: AlignedBuffer<f32>,
    rows: usize,
    width: usize,
}

/// A resident f32 vector, followed in memory by zeros up to 16 values.
pub struct CpuVector {
    values: AlignedBuffer<f32>,
    length: usize,
}

impl CpuVector {
    fn values(&self) -> &[f32] {
        &self.values[..self.length]
    }
}

impl CpuBuffer {
    fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.width..(row + 1) * self.width]
    }

    fn row_mut(&mut self, row: usize) -> &mut [f32] {
        &mut self.values[row * self.width..(row + 1) * self.width]
    }
}

/// An error unless `actual` is `expected`.
fn expect_equal(operation: &'static str, operand: &'static str, actual: usize, expected: usize) -> Result<()> {
    if actual == expected { Ok(()) } else { Err(KernelError::Shape { operation, operand, actual, expected }) }
}

/// An error unless `actual` is at least `needed`.
fn expect_at_least(operation: &'static str, operand: &'static str, actual: usize, needed: usize) -> Result<()> {
    if actual >= needed { Ok(()) } else { Err(KernelError::Shape { operation, operand, actual, expected: needed }) }
}

impl CpuBackend {
    /// Starts the threads and chooses the instruction set.
    ///
    /// # Errors
    /// A path that is unknown or not supported here; threads that the system does not grant.
    pub fn new(options: CpuOptions) -> Result<Self> {
        let path = CpuPath::choose(options.path)?;
        let pool = ThreadPool::new(options.threads).map_err(|error| KernelError::Unsupported {
            backend: "cpu",
            what: format!("starting {} threads ({error})", options.threads),
            remedy: "lower --threads, or raise the limit on processes".into(),
        })?;
        Ok(CpuBackend { path, pool, activations: Mutex::new(Activations::empty()) })
    }

    /// The instruction set in use.
    pub fn path(&self) -> CpuPath {
        self.path
    }

    /// Threads that compute, the caller included.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Calls `function` on ranges that cover `0..rows`, in parallel where rows × width is worth it.
    fn over_rows<F: Fn(Range<usize>) + Sync>(&self, rows: usize, width: usize, function: F) {
        if rows.saturating_mul(width) < PARALLEL_ELEMENTS {
            function(0..rows);
            return;
        }
        let step = rows.div_ceil(4 * self.pool.threads());
        self.pool.run(rows.div_ceil(step), |task| function(task * step..rows.min((task + 1) * step)));
    }
}

impl CpuBackend {
    /// Calls `function` on runs that cover the first `rows` rows: (first element, count).
    fn over_elements<F: Fn(*mut f32, usize) + Sync>(&self, x: &mut CpuBuffer, rows: usize, function: F) {
        let width = x.width;
        let target = SharedPointer::new(&mut x.values);
        self.over_rows(rows, width, |rows| function(target.get().wrapping_add(rows.start * width), rows.len() * width));
    }

    /// Runs checked products of the first `rows` rows of x.
    fn products(&self, x: &CpuBuffer, rows: usize, products: &[CheckedProduct<'_>]) -> Result<()> {
        let mut activations = self.activations.lock().unwrap_or_else(PoisonError::into_inner);
        let engine = Engine { path: self.path, pool: &self.pool, activations: &mut activations };
        linear(engine, Input { x: &x.values[..rows * x.width], width: x.width, tokens: rows }, products)
    }
}

impl Backend for CpuBackend {
    type Buffer = CpuBuffer;
    type Weight = CpuWeight;
    type Vector = CpuVector;
    type RopeTable = CpuRopeTable;
    type KvPool = CpuKvPool;

    /// All paths and thread counts give equal bits, so the id names neither.
    fn numerics_id(&self) -> String {
        "cpu/r1/tree8".into()
    }

    fn buffer(&self, rows: usize, width: usize) -> Result<CpuBuffer> {
        const WHAT: &str = "activations";
        let length = rows.checked_mul(width).ok_or(KernelError::OutOfMemory { bytes: usize::MAX, what: WHAT })?;
        Ok(CpuBuffer { values: AlignedBuffer::zeroed(length, WHAT)?, rows, width })
    }

    fn width(&self, buffer: &CpuBuffer) -> usize {
        buffer.width
    }

    fn weight(&self, source: MatrixSource) -> Result<CpuWeight> {
        CpuWeight::new(source)
    }

    fn vector(&self, values: &[f32]) -> Result<CpuVector> {
        let mut copy = AlignedBuffer::zeroed(bias_elements(values.len()), "a vector")?;
        copy[..values.len()].copy_from_slice(values);
        Ok(CpuVector { values: copy, length: values.len() })
    }

    fn rope_table(&self, params: &RopeParams) -> Result<CpuRopeTable> {
        CpuRopeTable::new(params)
    }

    fn kv_pool(&self, shape: KvShape) -> Result<CpuKvPool> {
        CpuKvPool::new(shape)
    }

    fn write_rows(&self, buffer: &mut CpuBuffer, rows: Range<usize>, values: &[f32]) -> Result<()> {
        expect_at_least("write_rows", "buffer", buffer.rows, rows.end)?;
        expect_equal("write_rows", "values", values.len(), rows.len() * buffer.width)?;
        let start = rows.start * buffer.width;
        buffer.values[start..start + values.len()].copy_from_slice(values);
        Ok(())
    }

    fn read_rows(&self, buffer: &CpuBuffer, rows: Range<usize>, values: &mut [f32]) -> Result<()> {
        expect_at_least("read_rows", "buffer", buffer.rows, rows.end)?;
        expect_equal("read_rows", "values", values.len(), rows.len() * buffer.width)?;
        let start = rows.start * buffer.width;
        values.copy_from_slice(&buffer.values[start..start + values.len()]);
        Ok(())
    }

    fn embed(&self, table: &CpuWeight, vocabulary: Range<u32>, ids: &[u32], scale: f32, out: &mut CpuBuffer) -> Result<()> {
        expect_at_least("embed", "out", out.rows, ids.len())?;
        expect_equal("embed", "out row", out.width, table.columns)?;
        expect_at_least("embed", "table", table.rows, vocabulary.len())?;
        for (row, &id) in ids.iter().enumerate() {
            let out = out.row_mut(row);
            if vocabulary.contains(&id) {
                table.dequantize_row((id - vocabulary.start) as usize, out);
                out.iter_mut().for_each(|value| *value *= scale);
            } else {
                out.fill(-0.0);
            }
        }
        Ok(())
    }

    fn embed_add(&self, table: &CpuWeight, ids: &[u32], x: &mut CpuBuffer) -> Result<()> {
        expect_at_least("embed_add", "x", x.rows, ids.len())?;
        expect_equal("embed_add", "x row", x.width, table.columns)?;
        let mut values = vec![0.0; table.columns];
        for (row, &id) in ids.iter().enumerate() {
            expect_at_least("embed_add", "table", table.rows, id as usize + 1)?;
            table.dequantize_row(id as usize, &mut values);
            for (x, value) in x.row_mut(row).iter_mut().zip(&values) {
                *x += value;
            }
        }
        Ok(())
    }

    fn norm(
        &self,
        x: &CpuBuffer,
        rows: usize,
        weight: Option<&CpuVector>,
        bias: Option<&CpuVector>,
        params: NormParams,
        out: &mut CpuBuffer,
    ) -> Result<()> {
        expect_at_least("norm", "x", x.rows, rows)?;
        expect_at_least("norm", "out", out.rows, rows)?;
        expect_equal("norm", "out row", out.width, x.width)?;
        for (operand, vector) in [("weight", weight), ("bias", bias)] {
            if let Some(vector) = vector {
                expect_equal("norm", operand, vector.length, x.width)?;
            }
        }
        let (weight, bias) = (weight.map(CpuVector::values), bias.map(CpuVector::values));
        let target = SharedPointer::new(&mut out.values);
        self.over_rows(rows, x.width, |rows| {
            for row in rows {
                // SAFETY: the row exists in x and out, vectors have its width; each row has one task.
                unsafe {
                    let operands = NormRow {
                        x: x.row(row).as_ptr(),
                        out: target.get().add(row * x.width),
                        weight: weight.map(<[f32]>::as_ptr),
                        bias: bias.map(<[f32]>::as_ptr),
                        width: x.width,
                    };
                    norm_row(self.path, operands, params);
                }
            }
        });
        Ok(())
    }

    fn linear(&self, x: &CpuBuffer, rows: usize, products: &mut [Product<'_, Self>]) -> Result<()> {
        expect_at_least("linear", "x", x.rows, rows)?;
        let mut checked = Vec::with_capacity(products.len());
        for product in products {
            expect_equal("linear", "x row", x.width, product.weight.columns)?;
            expect_equal("linear", "out row", product.out.width, product.weight.rows)?;
            expect_at_least("linear", "out", product.out.rows, rows)?;
            if let Some(bias) = product.bias {
                expect_equal("linear", "bias", bias.length, product.weight.rows)?;
            }
            checked.push(CheckedProduct {
                weight: product.weight,
                tokens: 0..rows,
                bias: product.bias.map(|bias| &*bias.values),
                out_width: product.out.width,
                out: SharedPointer::new(&mut product.out.values),
            });
        }
        if rows == 0 {
            return Ok(());
        }
        self.products(x, rows, &checked)
    }

    fn linear_groups(&self, x: &CpuBuffer, products: &mut [GroupProduct<'_, Self>]) -> Result<()> {
        experts::linear_groups(self, x, products)
    }

    fn combine_experts(&self, y: &CpuBuffer, shared: Option<&CpuBuffer>, choices: ExpertChoices<'_>, out: &mut CpuBuffer) -> Result<()> {
        experts::combine_experts(self, y, shared, choices, out)
    }

    fn norm_heads(
        &self,
        x: &mut CpuBuffer,
        rows: usize,
        heads: usize,
        weight: Option<&CpuVector>,
        bias: Option<&CpuVector>,
        params: NormParams,
    ) -> Result<()> {
        rows::norm_heads(self, x, rows, heads, (weight, bias), params)
    }

    fn square_sums(&self, x: &CpuBuffer, rows: usize, segments: &Segments, out: &mut CpuBuffer) -> Result<()> {
        rows::square_sums(self, x, rows, segments, out)
    }

    fn scale_by_square_sums(
        &self,
        x: &mut CpuBuffer,
        rows: usize,
        sums: &CpuBuffer,
        width: usize,
        weight: &CpuVector,
        params: NormParams,
    ) -> Result<()> {
        rows::scale_by_square_sums(self, x, rows, (sums, width), weight, params)
    }

    fn clamp(&self, x: &mut CpuBuffer, rows: usize, limit: f32) -> Result<()> {
        expect_at_least("clamp", "x", x.rows, rows)?;
        self.over_elements(x, rows, |values, count| {
            // SAFETY: `count` elements are this task's own.
            unsafe { clamp(self.path, values, count, limit) };
        });
        Ok(())
    }

    fn scale_and_cap(&self, x: &mut CpuBuffer, rows: usize, factor: f32, cap: Option<f32>) -> Result<()> {
        expect_at_least("scale_and_cap", "x", x.rows, rows)?;
        self.over_elements(x, rows, |values, count| {
            // SAFETY: `count` elements are this task's own.
            unsafe { scale_and_cap(self.path, values, count, factor, cap) };
        });
        Ok(())
    }

    fn copy_columns(&self, x: &CpuBuffer, rows: usize, from: Columns, out: &mut CpuBuffer, to: Columns, runs: HeadRuns) -> Result<()> {
        rows::copy_columns(x, rows, (from, to), runs, out)
    }

    fn rope(&self, x: &mut CpuBuffer, heads: usize, head_dim: usize, offset: usize, positions: &[u32], table: &CpuRopeTable) -> Result<()> {
        expect_at_least("rope", "x", x.rows, positions.len())?;
        expect_equal("rope", "x row", x.width, heads.saturating_mul(head_dim))?;
        expect_at_least("rope", "head", head_dim, offset.saturating_add(2 * table.half))?;
        let greatest = positions.iter().max().map_or(0, |&position| position as usize + 1);
        expect_at_least("rope", "table of positions", table.positions, greatest)?;
        let width = x.width;
        let target = SharedPointer::new(&mut x.values);
        self.over_rows(positions.len(), width, |rows| {
            for row in rows {
                let operands = RopeRow {
                    x: target.get().wrapping_add(row * width),
                    heads,
                    head_dim,
                    offset,
                    table: table.row(positions[row] as usize).as_ptr(),
                    half: table.half,
                    style: table.style,
                };
                // SAFETY: the row has heads · head_dim values, of which 2 · half from offset rotate; each row has one task.
                unsafe { rope_row(self.path, operands) };
            }
        });
        Ok(())
    }

    fn kv_write(&self, pool: &mut CpuKvPool, layer: usize, k: &CpuBuffer, v: &CpuBuffer, slots: &[u32]) -> Result<()> {
        let shape = pool.shape;
        expect_at_least("kv_write", "layers", shape.layers, layer.saturating_add(1))?;
        for (operand, buffer, dim) in [("k", k, shape.head_dim), ("v", v, shape.value_dim)] {
            expect_at_least("kv_write", operand, buffer.rows, slots.len())?;
            expect_equal("kv_write", operand, buffer.width, shape.kv_heads * dim)?;
        }
        let greatest = slots.iter().max().map_or(0, |&slot| slot as usize + 1);
        expect_at_least("kv_write", "pool slots", shape.blocks * shape.block_size, greatest)?;
        let at = pool.offsets(layer, 0, 0);
        let keys = SharedPointer::new(&mut pool.keys[at.keys..]);
        let values = SharedPointer::new(&mut pool.values[at.values..]);
        let key_scales = SharedPointer::new(&mut pool.key_scales[at.scales..]);
        let value_scales = SharedPointer::new(&mut pool.value_scales[at.scales..]);
        let write = |head: usize| {
            let task = KvWriteTask {
                shape,
                head,
                keys: keys.get(),
                values: values.get(),
                key_scales: key_scales.get(),
                value_scales: value_scales.get(),
                new_keys: k.values.as_ptr(),
                new_values: v.values.as_ptr(),
                slots,
            };
            // SAFETY: slots and layer lie in the pool, rows in k and v; each head has one task.
            unsafe { write_head(self.path, task) };
        };
        if slots.len() * (k.width + v.width) / 2 < PARALLEL_ELEMENTS {
            (0..shape.kv_heads).for_each(write);
        } else {
            self.pool.run(shape.kv_heads, write);
        }
        Ok(())
    }

    fn kv_copy(&self, pool: &mut CpuKvPool, pairs: &[(u32, u32)]) -> Result<()> {
        let greatest = pairs.iter().map(|&(from, to)| from.max(to) as usize + 1).max().unwrap_or(0);
        expect_at_least("kv_copy", "pool blocks", pool.shape.blocks, greatest)?;
        for &(from, to) in pairs {
            pool.copy_block(from as usize, to as usize);
        }
        Ok(())
    }

    fn attention(
        &self,
        q: &CpuBuffer,
        pool: &CpuKvPool,
        layer: usize,
        batch: AttentionBatch<'_>,
        params: AttentionParams<'_, Self>,
        out: &mut CpuBuffer,
    ) -> Result<()> {
        attention::attention(self, AttentionOperands { q, pool, layer, batch, params }, out)
    }

    fn activate(&self, gate: &mut CpuBuffer, rows: usize, up: Option<&CpuBuffer>, kind: ActivationKind) -> Result<()> {
        expect_at_least("activate", "gate", gate.rows, rows)?;
        if let Some(up) = up {
            expect_at_least("activate", "up", up.rows, rows)?;
            expect_equal("activate", "up row", up.width, gate.width)?;
        } else if let ActivationKind::ClampedSwiglu { .. } = kind {
            return Err(KernelError::Shape { operation: "activate", operand: "up", actual: 0, expected: gate.width });
        }
        let width = gate.width;
        let target = SharedPointer::new(&mut gate.values);
        self.over_rows(rows, width, |rows| {
            let start = rows.start * width;
            // SAFETY: the rows exist in both; each row has one task.
            unsafe {
                let up = up.map(|up| up.values.as_ptr().add(start));
                activate(self.path, kind, target.get().add(start), up, rows.len() * width);
            }
        });
        Ok(())
    }

    fn add(&self, x: &mut CpuBuffer, y: &CpuBuffer, rows: usize, scale: f32) -> Result<()> {
        expect_at_least("add", "x", x.rows, rows)?;
        expect_at_least("add", "y", y.rows, rows)?;
        expect_equal("add", "y row", y.width, x.width)?;
        let width = x.width;
        let target = SharedPointer::new(&mut x.values);
        self.over_rows(rows, width, |rows| {
            let start = rows.start * width;
            // SAFETY: the rows exist in both; each row has one task.
            unsafe { add_scaled(self.path, target.get().add(start), y.values.as_ptr().add(start), rows.len() * width, scale) };
        });
        Ok(())
    }

    fn gather_rows(&self, x: &CpuBuffer, rows: &[u32], out: &mut CpuBuffer) -> Result<()> {
        expect_at_least("gather_rows", "out", out.rows, rows.len())?;
        expect_equal("gather_rows", "out row", out.width, x.width)?;
        let greatest = rows.iter().max().map_or(0, |&row| row as usize + 1);
        expect_at_least("gather_rows", "x", x.rows, greatest)?;
        for (index, &row) in rows.iter().enumerate() {
            out.row_mut(index).copy_from_slice(x.row(row as usize));
        }
        Ok(())
    }

    fn host_rows_mut<'a>(&self, buffer: &'a mut CpuBuffer, rows: usize) -> Option<&'a mut [f32]> {
        let length = rows.checked_mul(buffer.width)?;
        buffer.values.get_mut(..length)
    }
}
