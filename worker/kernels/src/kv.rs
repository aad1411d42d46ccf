//! The paged KV pool in memory, and writing to it.
//!
//! Keys lie transposed in a block, `[layer][block][kv_head][head_dim][block_size]`, so that keys are lanes when
//! scores are computed; values lie `[layer][block][kv_head][block_size][value_dim]`, so that dimensions are.
//! Scales of bytes ([`KvDType::Int8`]) lie in arrays of their own, one for keys and one for values,
//! `[layer][block][kv_head][block_size]`: they belong to a token and a head, never to a block (P2).
//!
//! Invariant: what is read back is what was written, rounded once to the pool's type. For bytes: the head's row is
//! rotated ([`crate::hadamard`]); with a the greatest magnitude of the result, the scale is a/127 rounded up to
//! bfloat16, so that nothing is cut off and every a that is not subnormal is in range, and a byte is round(x / scale),
//! ties to even. A row with an infinity or a NaN has the scale NaN: what is not a number stays one.

use std::cell::RefCell;

use half::{bf16, f16};

use crate::backend::KvShape;
use crate::dtype::KvDType;
use crate::error::{KernelError, Result};
use crate::hadamard::rotate;
use crate::lanes::{LANES, Lanes, Rounded, kernel};
use crate::memory::AlignedBuffer;
use crate::path::CpuPath;

thread_local! {
    /// A head's row while it is rotated.
    static ROTATED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Keys and values of all layers of a rank.
pub struct CpuKvPool {
    pub(crate) shape: KvShape,
    pub(crate) keys: AlignedBuffer<u8>,
    pub(crate) values: AlignedBuffer<u8>,
    /// bfloat16; empty unless the type is scaled.
    pub(crate) key_scales: AlignedBuffer<u16>,
    pub(crate) value_scales: AlignedBuffer<u16>,
}

impl CpuKvPool {
    pub(crate) fn new(shape: KvShape) -> Result<Self> {
        const WHAT: &str = "the KV cache";
        let tokens = [shape.layers, shape.blocks, shape.kv_heads, shape.block_size];
        let elements = |width: usize| {
            let product = tokens.into_iter().try_fold(width, usize::checked_mul);
            product.ok_or(KernelError::OutOfMemory { bytes: usize::MAX, what: WHAT })
        };
        let bytes = |dim: usize| elements(dim.saturating_mul(shape.dtype.bytes()));
        let scales = elements(shape.dtype.scale_bytes() / size_of::<u16>())?;
        Ok(CpuKvPool {
            shape,
            keys: AlignedBuffer::zeroed(bytes(shape.head_dim)?, WHAT)?,
            values: AlignedBuffer::zeroed(bytes(shape.value_dim)?, WHAT)?,
            key_scales: AlignedBuffer::zeroed(scales, WHAT)?,
            value_scales: AlignedBuffer::zeroed(scales, WHAT)?,
        })
    }

    /// Where a head of a block of a layer begins.
    pub(crate) fn offsets(&self, layer: usize, block: usize, head: usize) -> KvOffsets {
        let shape = &self.shape;
        let token = ((layer * shape.blocks + block) * shape.kv_heads + head) * shape.block_size;
        let token_bytes = token * shape.dtype.bytes();
        let scales = token * shape.dtype.scale_bytes() / size_of::<u16>();
        KvOffsets { keys: token_bytes * shape.head_dim, values: token_bytes * shape.value_dim, scales }
    }

    /// Copies a block in all layers. Both blocks are below `shape.blocks`.
    pub(crate) fn copy_block(&mut self, from: usize, to: usize) {
        for layer in 0..self.shape.layers {
            let (start, end) = (self.offsets(layer, from, 0), self.offsets(layer, from + 1, 0));
            let target = self.offsets(layer, to, 0);
            self.keys.copy_within(start.keys..end.keys, target.keys);
            self.values.copy_within(start.values..end.values, target.values);
            self.key_scales.copy_within(start.scales..end.scales, target.scales);
            self.value_scales.copy_within(start.scales..end.scales, target.scales);
        }
    }
}

/// Where a head of a block begins in a pool's arrays: bytes of keys and of values, scales.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KvOffsets {
    pub(crate) keys: usize,
    pub(crate) values: usize,
    pub(crate) scales: usize,
}

/// Rows to store in one layer, for one KV head.
#[derive(Clone, Copy)]
pub(crate) struct KvWriteTask<'a> {
    pub(crate) shape: KvShape,
    pub(crate) head: usize,
    /// The layer's keys and values, and their scales where the type has them.
    pub(crate) keys: *mut u8,
    pub(crate) values: *mut u8,
    pub(crate) key_scales: *mut u16,
    pub(crate) value_scales: *mut u16,
    /// `[rows][kv_heads][head_dim]` of new keys, `[rows][kv_heads][value_dim]` of new values.
    pub(crate) new_keys: *const f32,
    pub(crate) new_values: *const f32,
    /// One per row, each within the pool.
    pub(crate) slots: &'a [u32],
}

impl KvWriteTask<'_> {
    /// Slots before the head's first slot of a block, and the slot within the block.
    #[inline(always)]
    fn place(&self, slot: u32) -> (usize, usize) {
        let KvShape { kv_heads, block_size, .. } = self.shape;
        let (block, offset) = (slot as usize / block_size, slot as usize % block_size);
        ((block * kv_heads + self.head) * block_size, offset)
    }

    /// The head's part of a new row of keys or values.
    ///
    /// # Safety
    /// `base` holds the task's rows of `dim` wide heads, and the row exists.
    #[inline(always)]
    unsafe fn new_row(&self, base: *const f32, row: usize, dim: usize) -> *const f32 {
        // SAFETY: the caller's contract.
        unsafe { base.add((row * self.shape.kv_heads + self.head) * dim) }
    }
}

/// # Safety
/// The task's pointers hold what its numbers say; nobody else touches this head of the layer.
#[inline(always)]
unsafe fn write_body<L: Lanes, E: Rounded>(task: KvWriteTask<'_>) {
    let KvShape { head_dim, value_dim, block_size, .. } = task.shape;
    for (row, &slot) in task.slots.iter().enumerate() {
        let (start, offset) = task.place(slot);
        // SAFETY: the slot lies within the pool, dim + count within the head.
        unsafe {
            let keys = task.keys.cast::<E>().add(start * head_dim + offset);
            let new = task.new_row(task.new_keys, row, head_dim);
            for dim in (0..head_dim).step_by(LANES) {
                let count = LANES.min(head_dim - dim);
                let mut rounded = [E::ZERO; LANES];
                E::store(L::load_partial(new.add(dim), count), rounded.as_mut_ptr());
                for (index, &value) in rounded.iter().enumerate().take(count) {
                    *keys.add((dim + index) * block_size) = value;
                }
            }
            let values = task.values.cast::<E>().add((start + offset) * value_dim);
            let new = task.new_row(task.new_values, row, value_dim);
            for dim in (0..value_dim).step_by(LANES) {
                let count = LANES.min(value_dim - dim);
                let mut rounded = [E::ZERO; LANES];
                E::store(L::load_partial(new.add(dim), count), rounded.as_mut_ptr());
                std::ptr::copy_nonoverlapping(rounded.as_ptr(), values.add(dim), count);
            }
        }
    }
}

kernel! {
    /// Rounds and stores one head's rows; `E` is the pool's element type.
    ///
    /// # Safety
    /// The task's pointers hold what its numbers say; nobody else touches this head of the layer.
    unsafe fn write_elements<E: Rounded>(task: KvWriteTask<'_>) = write_body
}

/// The scale of a row of `width` values: see the module documentation.
///
/// # Safety
/// `x` is readable for `width` values.
#[inline(always)]
unsafe fn byte_scale<L: Lanes>(x: *const f32, width: usize) -> bf16 {
    // SAFETY: columns below `width` are read.
    unsafe {
        let (mut greatest, mut poison) = (L::splat(0.0), L::splat(0.0));
        for column in (0..width).step_by(LANES) {
            let value = L::load_partial(x.add(column), LANES.min(width - column));
            greatest = value.abs().max(greatest);
            // Zero, but NaN in a lane that has met an infinity or a NaN.
            poison = value.mul_add(L::splat(0.0), poison);
        }
        if poison.sum().is_nan() {
            return bf16::NAN;
        }
        round_up(greatest.greatest() / 127.0)
    }
}

/// The least bfloat16 that is not below a finite, non-negative value.
fn round_up(value: f32) -> bf16 {
    let bits = value.to_bits();
    bf16::from_bits((bits.div_ceil(1 << 16)) as u16)
}

/// Sixteen values (`count` of them in memory) as bytes of a scale.
///
/// # Safety
/// `x` is readable for `count` values.
#[inline(always)]
unsafe fn to_bytes<L: Lanes>(x: *const f32, count: usize, scale: bf16) -> [i8; LANES] {
    let mut bytes = [0_i8; LANES];
    if scale > bf16::ZERO {
        // SAFETY: the caller's contract; quotients are within ±127 since the scale was rounded up.
        unsafe { L::load_partial(x, count).div(L::splat(scale.to_f32())).round_ties_even().store_i8(bytes.as_mut_ptr()) };
    }
    bytes
}

/// Copies a row to `to`, rotated; returns where it is.
///
/// # Safety
/// `from` is readable for as many values as `to` has.
#[inline(always)]
unsafe fn rotated_row(from: *const f32, to: &mut [f32]) -> *const f32 {
    // SAFETY: the caller's contract.
    to.copy_from_slice(unsafe { std::slice::from_raw_parts(from, to.len()) });
    rotate(to);
    to.as_ptr()
}

/// # Safety
/// The task's pointers hold what its numbers say; nobody else touches this head of the layer.
#[inline(always)]
unsafe fn write_bytes_body<L: Lanes>(task: KvWriteTask<'_>, rotated: &mut [f32]) {
    let KvShape { head_dim, value_dim, block_size, .. } = task.shape;
    for (row, &slot) in task.slots.iter().enumerate() {
        let (start, offset) = task.place(slot);
        // SAFETY: the slot lies within the pool, dim + count within the head.
        unsafe {
            let keys = task.keys.cast::<i8>().add(start * head_dim + offset);
            let new = rotated_row(task.new_row(task.new_keys, row, head_dim), &mut rotated[..head_dim]);
            let scale = byte_scale::<L>(new, head_dim);
            *task.key_scales.add(start + offset) = scale.to_bits();
            for dim in (0..head_dim).step_by(LANES) {
                let count = LANES.min(head_dim - dim);
                for (index, &byte) in to_bytes::<L>(new.add(dim), count, scale).iter().enumerate().take(count) {
                    *keys.add((dim + index) * block_size) = byte;
                }
            }
            let values = task.values.cast::<i8>().add((start + offset) * value_dim);
            let new = rotated_row(task.new_row(task.new_values, row, value_dim), &mut rotated[..value_dim]);
            let scale = byte_scale::<L>(new, value_dim);
            *task.value_scales.add(start + offset) = scale.to_bits();
            for dim in (0..value_dim).step_by(LANES) {
                let count = LANES.min(value_dim - dim);
                let bytes = to_bytes::<L>(new.add(dim), count, scale);
                std::ptr::copy_nonoverlapping(bytes.as_ptr(), values.add(dim), count);
            }
        }
    }
}

kernel! {
    /// Rounds and stores one head's rows as bytes with scales. `rotated` has room for a row of keys or values; what it
    /// holds does not matter.
    ///
    /// # Safety
    /// The task's pointers hold what its numbers say; nobody else touches this head of the layer.
    unsafe fn write_bytes(task: KvWriteTask<'_>, rotated: &mut [f32]) = write_bytes_body
}

/// Rounds and stores one head's rows.
///
/// # Safety
/// The task's pointers hold what its numbers say; nobody else touches this head of the layer.
pub(crate) unsafe fn write_head(path: CpuPath, task: KvWriteTask<'_>) {
    // SAFETY: the caller's contract.
    unsafe {
        match task.shape.dtype {
            KvDType::F32 => write_elements::<f32>(path, task),
            KvDType::F16 => write_elements::<f16>(path, task),
            KvDType::BF16 => write_elements::<bf16>(path, task),
            KvDType::Int8 => ROTATED.with_borrow_mut(|rotated| {
                let width = task.shape.head_dim.max(task.shape.value_dim);
                rotated.resize(rotated.len().max(width), 0.0);
                write_bytes(path, task, rotated);
            }),
        }
    }
}
