//! Sixteen 32-bit words, one for each of 16 rows: what quantized blocks are unpacked and multiplied in.
//!
//! A word often is four values of a row (unsigned bytes), so that a dot product with four activations stays inside
//! the row's own lane. All operations are on integers and exact; every path gives the same words.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use crate::lanes::{LANES, Lanes};

/// Lanes that have words.
pub(crate) trait IntegerLanes: Lanes {
    /// Their words.
    type Words: Words<Floats = Self>;
}

/// One 32-bit word of each of 16 rows.
///
/// # Safety
/// As [`Lanes`]: only where the instruction set is available; pointers hold what is read or written.
pub(crate) trait Words: Copy {
    /// Sixteen f32 values on the same path.
    type Floats: Lanes;

    /// Most tokens that a multiplication holds in registers.
    const TOKENS: usize;

    /// Whether [`Words::dot`] of wide bytes has already taken off the 128 that was added to each.
    const DOT_TAKES_OFF_128: bool;

    /// Whether [`Words::dot`] adds in halves of words: the products of a word's first two bytes, and of its last two.
    const NARROW_DOTS: bool;

    unsafe fn splat(value: u32) -> Self;
    unsafe fn load(from: *const u32) -> Self;
    unsafe fn store(self, to: *mut u32);
    /// The word at `first` of each row, rows being `stride` bytes apart.
    unsafe fn load_each(first: *const u8, stride: usize) -> Self;
    /// The four words at `first` of each row.
    unsafe fn load_four(first: *const u8, stride: usize) -> [Self; 4];
    unsafe fn and(self, other: Self) -> Self;
    unsafe fn or(self, other: Self) -> Self;
    unsafe fn xor(self, other: Self) -> Self;
    unsafe fn shl(self, bits: u32) -> Self;
    unsafe fn shr(self, bits: u32) -> Self;
    unsafe fn add(self, other: Self) -> Self;
    /// The low 32 bits of the product.
    unsafe fn mul(self, other: Self) -> Self;
    /// Bits 0 to 3, each to the lowest bit of a byte; the others are lost or anywhere else but in those bits.
    unsafe fn spread(self) -> Self;
    /// Each byte, below 16, replaced by the table's.
    unsafe fn look_up(self, table: &[u8; 16]) -> Self;
    /// dots + the products of the word's four unsigned bytes with four activations, whose magnitudes are at most 127. Bytes
    /// above 127 need `WIDE`. Narrow dots must not grow beyond 16 bits ([`super::part::Format::GROUP`]).
    unsafe fn dot<const WIDE: bool>(self, activations: *const i8, dots: Self) -> Self;
    /// self + what [`Words::dot`] summed up.
    unsafe fn add_dots(self, dots: Self) -> Self;
    /// self + what [`Words::dot`] summed up · scale.
    unsafe fn add_scaled_dots(self, dots: Self, scale: Self) -> Self;
    /// Signed integers of at most 16 bits as the scale of [`Words::add_scaled_dots`].
    unsafe fn dots_scale(self) -> Self;
    /// sum + the products of the word's two signed halves with the two at `pair`.
    unsafe fn dot_pair(self, pair: *const i32, sum: Self) -> Self;
    /// Of signed integers, rounded to nearest even.
    unsafe fn to_floats(self) -> Self::Floats;
    /// The words' bits as f32.
    unsafe fn as_floats(self) -> Self::Floats;
    /// The lower halves as f16; the upper halves are ignored.
    unsafe fn halves_to_floats(self) -> Self::Floats;

    /// `(self >> bits) & mask`.
    #[inline(always)]
    unsafe fn field(self, bits: u32, mask: u32) -> Self {
        // SAFETY: the caller's contract.
        unsafe { self.shr(bits).and(Self::splat(mask)) }
    }

    /// `((self >> from) & mask) << to`, for a mask that neither shift cuts, in one shift.
    #[inline(always)]
    unsafe fn moved_field(self, from: u32, to: u32, mask: u32) -> Self {
        // SAFETY: the caller's contract.
        unsafe {
            let moved = if from > to { self.shr(from - to) } else { self.shl(to - from) };
            moved.and(Self::splat(mask << to))
        }
    }
}

/// The word at `first` of each of 16 rows.
///
/// # Safety
/// 16 rows of `stride` bytes are readable.
#[inline(always)]
unsafe fn gather(first: *const u8, stride: usize) -> [u32; LANES] {
    let mut words = [0; LANES];
    for (row, word) in words.iter_mut().enumerate() {
        // SAFETY: the caller's contract.
        *word = unsafe { first.add(row * stride).cast::<u32>().read_unaligned() };
    }
    words
}
