//! The paged KV pool in memory, and writing to it.
//!
//! Keys lie transposed in a block, `[layer][block][kv_head][head_dim][block_size]`, so that keys are lanes when
//! scores are computed; values lie `[layer][block][kv_head][block_size][head_dim]`, so that dimensions are.
//!
//! Invariant: what is read back is what was written, rounded once to the pool's type.

use half::{bf16, f16};

use crate::backend::KvShape;
use crate::dtype::KvDType;
use crate::error::{KernelError, Result};
use crate::lanes::{Element, LANES, Lanes, kernel};
use crate::memory::AlignedBuffer;

/// Keys and values of all layers of a rank.
pub struct CpuKvPool {
    pub(crate) shape: KvShape,
    pub(crate) keys: AlignedBuffer<u8>,
    pub(crate) values: AlignedBuffer<u8>,
}

impl CpuKvPool {
    pub(crate) fn new(shape: KvShape) -> Result<Self> {
        const WHAT: &str = "the KV cache";
        let sizes = [shape.layers, shape.blocks, shape.kv_heads, shape.head_dim, shape.block_size, shape.dtype.bytes()];
        let bytes = sizes.into_iter().try_fold(1_usize, usize::checked_mul);
        let bytes = bytes.ok_or(KernelError::OutOfMemory { bytes: usize::MAX, what: WHAT })?;
        Ok(CpuKvPool { shape, keys: AlignedBuffer::zeroed(bytes, WHAT)?, values: AlignedBuffer::zeroed(bytes, WHAT)? })
    }

    /// Bytes of one block of one layer, keys or values alone.
    fn layer_block_bytes(&self) -> usize {
        self.shape.kv_heads * self.shape.head_dim * self.shape.block_size * self.shape.dtype.bytes()
    }

    /// Where a layer begins, in bytes.
    pub(crate) fn layer_offset(&self, layer: usize) -> usize {
        layer * self.shape.blocks * self.layer_block_bytes()
    }

    /// Copies a block in all layers. Both blocks are below `shape.blocks`.
    pub(crate) fn copy_block(&mut self, from: usize, to: usize) {
        let bytes = self.layer_block_bytes();
        for layer in 0..self.shape.layers {
            let start = self.layer_offset(layer);
            let source = start + from * bytes..start + (from + 1) * bytes;
            self.keys.copy_within(source.clone(), start + to * bytes);
            self.values.copy_within(source, start + to * bytes);
        }
    }
}

/// Rows to store in one layer, for one KV head.
#[derive(Clone, Copy)]
pub(crate) struct KvWriteTask<'a> {
    pub(crate) shape: KvShape,
    pub(crate) head: usize,
    /// The layer's keys and values.
    pub(crate) keys: *mut u8,
    pub(crate) values: *mut u8,
    /// `[rows][width]` of new keys and values; the head's part begins at head · head_dim.
    pub(crate) new_keys: *const f32,
    pub(crate) new_values: *const f32,
    pub(crate) width: usize,
    /// One per row, each within the pool.
    pub(crate) slots: &'a [u32],
}

/// # Safety
/// The task's pointers hold what its numbers say; nobody else touches this head of the layer.
#[inline(always)]
unsafe fn write_body<L: Lanes, E: Element>(task: KvWriteTask<'_>) {
    let KvShape { kv_heads, head_dim, block_size, .. } = task.shape;
    for (row, &slot) in task.slots.iter().enumerate() {
        let (block, offset) = (slot as usize / block_size, slot as usize % block_size);
        let head_start = (block * kv_heads + task.head) * head_dim * block_size;
        let mut dim = 0;
        while dim < head_dim {
            let count = LANES.min(head_dim - dim);
            let mut rounded = [E::ZERO; LANES];
            // SAFETY: the slot lies within the pool, dim + count ≤ head_dim.
            unsafe {
                let source = row * task.width + task.head * head_dim + dim;
                E::store(L::load_partial(task.new_keys.add(source), count), rounded.as_mut_ptr());
                let keys = task.keys.cast::<E>().add(head_start + dim * block_size + offset);
                for (index, &value) in rounded.iter().enumerate().take(count) {
                    *keys.add(index * block_size) = value;
                }
                E::store(L::load_partial(task.new_values.add(source), count), rounded.as_mut_ptr());
                let values = task.values.cast::<E>().add(head_start + offset * head_dim + dim);
                std::ptr::copy_nonoverlapping(rounded.as_ptr(), values, count);
            }
            dim += count;
        }
    }
}

kernel! {
    /// Rounds and stores one head's rows; `E` is the pool's element type.
    ///
    /// # Safety
    /// The task's pointers hold what its numbers say; nobody else touches this head of the layer.
    unsafe fn write_elements<E: Element>(task: KvWriteTask<'_>) = write_body
}

/// Rounds and stores one head's rows.
///
/// # Safety
/// The task's pointers hold what its numbers say; nobody else touches this head of the layer.
pub(crate) unsafe fn write_head(path: crate::path::CpuPath, task: KvWriteTask<'_>) {
    // SAFETY: the caller's contract.
    unsafe {
        match task.shape.dtype {
            KvDType::F32 => write_elements::<f32>(path, task),
            KvDType::F16 => write_elements::<f16>(path, task),
            KvDType::BF16 => write_elements::<bf16>(path, task),
        }
    }
}
