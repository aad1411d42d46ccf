//! Zeroed, cache-line-aligned memory whose size is checked before it is asked for.
//!
//! Invariant: an allocation that cannot be had is an error, never an abort.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use crate::error::{KernelError, Result};

/// Bytes of a cache line and of the widest vector register.
pub(crate) const ALIGNMENT: usize = 64;

/// Element types for which all-zero bytes are a value.
pub(crate) trait Zeroable: Copy + Send + Sync + 'static {}
impl Zeroable for f32 {}
impl Zeroable for u16 {}
impl Zeroable for u8 {}
impl Zeroable for i8 {}
impl Zeroable for i32 {}

/// A fixed number of elements, zeroed at first.
///
/// The alignment is made here, inside a slightly larger allocation of ordinary alignment: for those the allocator
/// takes fresh zero pages from the system and touches none, where it would clear an over-aligned one by hand. A KV
/// pool of gigabytes then costs memory only as it fills.
pub(crate) struct AlignedBuffer<T: Zeroable> {
    /// First element, aligned; inside the allocation that `base` begins.
    pointer: NonNull<T>,
    length: usize,
    base: *mut u8,
    layout: Layout,
}

// SAFETY: the buffer owns its memory exclusively, and T is Send and Sync.
unsafe impl<T: Zeroable> Send for AlignedBuffer<T> {}
// SAFETY: as above; shared access only reads.
unsafe impl<T: Zeroable> Sync for AlignedBuffer<T> {}

impl<T: Zeroable> AlignedBuffer<T> {
    /// `length` zeros; `what` names them in the error.
    pub(crate) fn zeroed(length: usize, what: &'static str) -> Result<Self> {
        if length == 0 || size_of::<T>() == 0 {
            return Ok(Self::empty());
        }
        let bytes = length.checked_mul(size_of::<T>()).and_then(|bytes| bytes.checked_add(ALIGNMENT));
        let layout = bytes.and_then(|bytes| Layout::from_size_align(bytes, align_of::<T>()).ok());
        let Some(layout) = layout else {
            return Err(KernelError::OutOfMemory { bytes: bytes.unwrap_or(usize::MAX), what });
        };
        // SAFETY: the layout has a size above zero.
        let base = unsafe { alloc_zeroed(layout) };
        if base.is_null() {
            return Err(KernelError::OutOfMemory { bytes: layout.size(), what });
        }
        let padding = base.align_offset(ALIGNMENT);
        debug_assert!(padding < ALIGNMENT);
        // SAFETY: the padding is below ALIGNMENT, which the allocation holds beside the elements, so the sum stays
        // inside it and is not null.
        let pointer = unsafe { NonNull::new_unchecked(base.add(padding).cast::<T>()) };
        Ok(AlignedBuffer { pointer, length, base, layout })
    }

    /// An empty buffer.
    pub(crate) fn empty() -> Self {
        AlignedBuffer { pointer: NonNull::dangling(), length: 0, base: std::ptr::null_mut(), layout: Layout::new::<()>() }
    }

    /// Grows to at least `length` elements; the contents are then undefined (but initialized).
    pub(crate) fn reserve(&mut self, length: usize, what: &'static str) -> Result<()> {
        if self.length < length {
            *self = AlignedBuffer::zeroed(length, what)?;
        }
        Ok(())
    }
}

impl<T: Zeroable> Drop for AlignedBuffer<T> {
    fn drop(&mut self) {
        if !self.base.is_null() {
            // SAFETY: allocated in `zeroed` with this very layout and freed only here.
            unsafe { dealloc(self.base, self.layout) };
        }
    }
}

impl<T: Zeroable> Deref for AlignedBuffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `length` initialized elements, or a dangling pointer with length 0.
        unsafe { std::slice::from_raw_parts(self.pointer.as_ptr(), self.length) }
    }
}

impl<T: Zeroable> DerefMut for AlignedBuffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`; `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.as_ptr(), self.length) }
    }
}

/// A raw pointer that tasks of one parallel region share; each task writes its own part.
#[derive(Clone, Copy)]
pub(crate) struct SharedPointer<T>(*mut T);

// SAFETY: only a pointer; every dereference has its own safety comment.
unsafe impl<T> Send for SharedPointer<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for SharedPointer<T> {}

impl<T> SharedPointer<T> {
    pub(crate) fn new(slice: &mut [T]) -> Self {
        SharedPointer(slice.as_mut_ptr())
    }

    pub(crate) fn get(self) -> *mut T {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_zeroed_and_aligned() {
        let buffer = AlignedBuffer::<f32>::zeroed(1000, "test").unwrap();
        assert_eq!(buffer.as_ptr() as usize % ALIGNMENT, 0);
        assert!(buffer.iter().all(|&value| value.to_bits() == 0));
    }

    #[test]
    fn impossible_sizes_are_errors() {
        for length in [usize::MAX, usize::MAX / 4, isize::MAX as usize / 4 - 64] {
            assert!(matches!(AlignedBuffer::<f32>::zeroed(length, "test"), Err(KernelError::OutOfMemory { .. })));
        }
    }
}
