//! Asking for the rows after those being multiplied, so that they are in the cache when their turn comes.

use std::ops::Range;

/// Some rows, and that as many follow them.
#[derive(Clone, Copy)]
pub(crate) struct NextRows {
    /// The first of the rows being multiplied.
    pub(crate) current: *const u8,
    pub(crate) rows: usize,
    pub(crate) stride_bytes: usize,
    pub(crate) row_bytes: usize,
}

impl NextRows {
    /// Asks for as large a part of the next rows as `bytes` is of one row. They lie side by side, so it need not be the
    /// same bytes of each; rows that do not are not asked for.
    #[inline(always)]
    pub(crate) fn prefetch(&self, bytes: Range<usize>) {
        #[cfg(target_arch = "x86_64")]
        if self.stride_bytes == self.row_bytes {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            let start = self.current.wrapping_add(self.rows * (self.stride_bytes + bytes.start));
            let mut line = 0;
            while line < self.rows * bytes.len() {
                // SAFETY: a prefetch may name any address.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(line).cast()) };
                line += 64;
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (self, bytes);
    }
}
