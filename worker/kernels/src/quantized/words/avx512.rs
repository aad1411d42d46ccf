//! [`Words`] in one 512-bit register, dot products by VNNI.

use std::arch::x86_64::*;

use super::{IntegerLanes, Words, gather};
use crate::lanes::Avx512;

/// Sixteen words in a register.
#[derive(Clone, Copy)]
pub(crate) struct Words512(__m512i);

impl IntegerLanes for Avx512 {
    type Words = Words512;
}

/// 16 bytes each of rows r, r + 4, r + 8, r + 12, given row r.
///
/// # Safety
/// AVX-512 F is available; the four rows are readable.
#[inline(always)]
unsafe fn load_rows(row: *const u8, stride: usize) -> __m512i {
    // SAFETY: the caller's contract.
    unsafe {
        let four = 4 * stride;
        let a = _mm512_castsi128_si512(_mm_loadu_si128(row.cast()));
        let b = _mm512_inserti32x4::<1>(a, _mm_loadu_si128(row.add(four).cast()));
        let c = _mm512_inserti32x4::<2>(b, _mm_loadu_si128(row.add(2 * four).cast()));
        _mm512_inserti32x4::<3>(c, _mm_loadu_si128(row.add(3 * four).cast()))
    }
}

// SAFETY (all blocks): AVX-512 F, BW, DQ, VL and VNNI are available and pointers hold what is read or written: the
// contract of `Words`.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Words for Words512 {
    type Floats = Avx512;

    const TOKENS: usize = 8;
    const DOT_TAKES_OFF_128: bool = false;
    const NARROW_DOTS: bool = false;

    #[inline(always)]
    unsafe fn splat(value: u32) -> Self {
        unsafe { Words512(_mm512_set1_epi32(value as i32)) }
    }

    #[inline(always)]
    unsafe fn load(from: *const u32) -> Self {
        unsafe { Words512(_mm512_loadu_si512(from.cast())) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut u32) {
        unsafe { _mm512_storeu_si512(to.cast(), self.0) }
    }

    #[inline(always)]
    unsafe fn load_each(first: *const u8, stride: usize) -> Self {
        unsafe { Self::load(gather(first, stride).as_ptr()) }
    }

    /// A 4 × 4 transposition in each 128-bit lane leaves the rows in order.
    #[inline(always)]
    unsafe fn load_four(first: *const u8, stride: usize) -> [Self; 4] {
        unsafe {
            let a = load_rows(first, stride);
            let b = load_rows(first.add(stride), stride);
            let c = load_rows(first.add(2 * stride), stride);
            let d = load_rows(first.add(3 * stride), stride);
            let (ab_low, ab_high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
            let (cd_low, cd_high) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
            [
                Words512(_mm512_unpacklo_epi64(ab_low, cd_low)),
                Words512(_mm512_unpackhi_epi64(ab_low, cd_low)),
                Words512(_mm512_unpacklo_epi64(ab_high, cd_high)),
                Words512(_mm512_unpackhi_epi64(ab_high, cd_high)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn and(self, other: Self) -> Self {
        unsafe { Words512(_mm512_and_si512(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn or(self, other: Self) -> Self {
        unsafe { Words512(_mm512_or_si512(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn xor(self, other: Self) -> Self {
        unsafe { Words512(_mm512_xor_si512(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn shl(self, bits: u32) -> Self {
        unsafe { Words512(_mm512_sllv_epi32(self.0, _mm512_set1_epi32(bits as i32))) }
    }

    #[inline(always)]
    unsafe fn shr(self, bits: u32) -> Self {
        unsafe { Words512(_mm512_srlv_epi32(self.0, _mm512_set1_epi32(bits as i32))) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        unsafe { Words512(_mm512_add_epi32(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        unsafe { Words512(_mm512_mullo_epi32(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn spread(self) -> Self {
        const SPREAD: [u32; 16] = {
            let mut table = [0; 16];
            let mut bits = 0;
            while bits < 16 {
                table[bits] = (bits as u32).wrapping_mul(0x0020_4081) & 0x0101_0101;
                bits += 1;
            }
            table
        };
        unsafe { Words512(_mm512_permutexvar_epi32(self.0, _mm512_loadu_si512(SPREAD.as_ptr().cast()))) }
    }

    #[inline(always)]
    unsafe fn look_up(self, table: &[u8; 16]) -> Self {
        unsafe { Words512(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast())), self.0)) }
    }

    #[inline(always)]
    unsafe fn dot<const WIDE: bool>(self, activations: *const i8, dots: Self) -> Self {
        unsafe {
            let activations = _mm512_set1_epi32(activations.cast::<i32>().read_unaligned());
            Words512(_mm512_dpbusd_epi32(dots.0, self.0, activations))
        }
    }

    #[inline(always)]
    unsafe fn add_dots(self, dots: Self) -> Self {
        unsafe { self.add(dots) }
    }

    #[inline(always)]
    unsafe fn add_scaled_dots(self, dots: Self, scale: Self) -> Self {
        unsafe { self.add(dots.mul(scale)) }
    }

    #[inline(always)]
    unsafe fn dots_scale(self) -> Self {
        self
    }

    #[inline(always)]
    unsafe fn dot_pair(self, pair: *const i32, sum: Self) -> Self {
        unsafe { Words512(_mm512_dpwssd_epi32(sum.0, self.0, _mm512_set1_epi32(*pair))) }
    }

    #[inline(always)]
    unsafe fn to_floats(self) -> Avx512 {
        unsafe { Avx512(_mm512_cvtepi32_ps(self.0)) }
    }

    #[inline(always)]
    unsafe fn as_floats(self) -> Avx512 {
        unsafe { Avx512(_mm512_castsi512_ps(self.0)) }
    }

    #[inline(always)]
    unsafe fn halves_to_floats(self) -> Avx512 {
        unsafe { Avx512(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(self.0))) }
    }
}
