//! [`Words`] in two 256-bit registers (rows 0..8 and 8..16).

use std::arch::x86_64::*;

use super::{IntegerLanes, Words, gather};
use crate::lanes::Avx2;

/// Sixteen words in two registers.
#[derive(Clone, Copy)]
pub(crate) struct Words256(__m256i, __m256i);

impl IntegerLanes for Avx2 {
    type Words = Words256;
}

/// 16 bytes each of rows r and r + 4, given row r.
///
/// # Safety
/// AVX2 is available; the two rows are readable.
#[inline(always)]
unsafe fn load_rows(row: *const u8, stride: usize) -> __m256i {
    // SAFETY: the caller's contract.
    unsafe {
        let a = _mm256_castsi128_si256(_mm_loadu_si128(row.cast()));
        _mm256_inserti128_si256::<1>(a, _mm_loadu_si128(row.add(4 * stride).cast()))
    }
}

/// The four words at `first` of each of eight rows.
///
/// # Safety
/// AVX2 is available; the rows are readable.
#[inline(always)]
unsafe fn load_eight(first: *const u8, stride: usize) -> [__m256i; 4] {
    // SAFETY: the caller's contract.
    unsafe {
        let a = load_rows(first, stride);
        let b = load_rows(first.add(stride), stride);
        let c = load_rows(first.add(2 * stride), stride);
        let d = load_rows(first.add(3 * stride), stride);
        let (ab_low, ab_high) = (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
        let (cd_low, cd_high) = (_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
        [
            _mm256_unpacklo_epi64(ab_low, cd_low),
            _mm256_unpackhi_epi64(ab_low, cd_low),
            _mm256_unpacklo_epi64(ab_high, cd_high),
            _mm256_unpackhi_epi64(ab_high, cd_high),
        ]
    }
}

/// dots + the products of eight words' bytes with four activations, in 16-bit halves. Wide bytes are made signed again
/// first: 2 · 128 · 127 < 2¹⁵.
///
/// # Safety
/// AVX2 is available.
#[inline(always)]
unsafe fn dot_eight<const WIDE: bool>(bytes: __m256i, activations: __m256i, dots: __m256i) -> __m256i {
    // SAFETY: the caller's contract.
    unsafe {
        let pairs = if WIDE {
            let signed = _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));
            _mm256_maddubs_epi16(_mm256_abs_epi8(signed), _mm256_sign_epi8(activations, signed))
        } else {
            _mm256_maddubs_epi16(bytes, activations)
        };
        _mm256_add_epi16(dots, pairs)
    }
}

/// The lower halves of eight words, as f16.
///
/// # Safety
/// AVX2 and F16C are available.
#[inline(always)]
unsafe fn eight_halves(words: __m256i) -> __m256 {
    // SAFETY: the caller's contract.
    unsafe {
        let low = _mm256_and_si256(words, _mm256_set1_epi32(0xffff));
        let packed = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256::<1>(low));
        _mm256_cvtph_ps(packed)
    }
}

// SAFETY (all blocks): AVX2, FMA and F16C are available and pointers hold what is read or written: the contract of
// `Words`.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Words for Words256 {
    type Floats = Avx2;

    const TOKENS: usize = 4;
    const DOT_TAKES_OFF_128: bool = true;
    const NARROW_DOTS: bool = true;

    #[inline(always)]
    unsafe fn splat(value: u32) -> Self {
        unsafe { Words256(_mm256_set1_epi32(value as i32), _mm256_set1_epi32(value as i32)) }
    }

    #[inline(always)]
    unsafe fn load(from: *const u32) -> Self {
        unsafe { Words256(_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(8).cast())) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut u32) {
        unsafe {
            _mm256_storeu_si256(to.cast(), self.0);
            _mm256_storeu_si256(to.add(8).cast(), self.1);
        }
    }

    #[inline(always)]
    unsafe fn load_each(first: *const u8, stride: usize) -> Self {
        unsafe { Self::load(gather(first, stride).as_ptr()) }
    }

    #[inline(always)]
    unsafe fn load_four(first: *const u8, stride: usize) -> [Self; 4] {
        unsafe {
            let low = load_eight(first, stride);
            let high = load_eight(first.add(8 * stride), stride);
            [Words256(low[0], high[0]), Words256(low[1], high[1]), Words256(low[2], high[2]), Words256(low[3], high[3])]
        }
    }

    #[inline(always)]
    unsafe fn and(self, other: Self) -> Self {
        unsafe { Words256(_mm256_and_si256(self.0, other.0), _mm256_and_si256(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn or(self, other: Self) -> Self {
        unsafe { Words256(_mm256_or_si256(self.0, other.0), _mm256_or_si256(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn xor(self, other: Self) -> Self {
        unsafe { Words256(_mm256_xor_si256(self.0, other.0), _mm256_xor_si256(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn shl(self, bits: u32) -> Self {
        unsafe {
            let bits = _mm256_set1_epi32(bits as i32);
            Words256(_mm256_sllv_epi32(self.0, bits), _mm256_sllv_epi32(self.1, bits))
        }
    }

    #[inline(always)]
    unsafe fn shr(self, bits: u32) -> Self {
        unsafe {
            let bits = _mm256_set1_epi32(bits as i32);
            Words256(_mm256_srlv_epi32(self.0, bits), _mm256_srlv_epi32(self.1, bits))
        }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        unsafe { Words256(_mm256_add_epi32(self.0, other.0), _mm256_add_epi32(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        unsafe { Words256(_mm256_mullo_epi32(self.0, other.0), _mm256_mullo_epi32(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn spread(self) -> Self {
        unsafe { self.and(Self::splat(15)).mul(Self::splat(0x0020_4081)).and(Self::splat(0x0101_0101)) }
    }

    #[inline(always)]
    unsafe fn look_up(self, table: &[u8; 16]) -> Self {
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            Words256(_mm256_shuffle_epi8(table, self.0), _mm256_shuffle_epi8(table, self.1))
        }
    }

    #[inline(always)]
    unsafe fn dot<const WIDE: bool>(self, activations: *const i8, dots: Self) -> Self {
        unsafe {
            let activations = _mm256_set1_epi32(activations.cast::<i32>().read_unaligned());
            Words256(dot_eight::<WIDE>(self.0, activations, dots.0), dot_eight::<WIDE>(self.1, activations, dots.1))
        }
    }

    #[inline(always)]
    unsafe fn add_dots(self, dots: Self) -> Self {
        unsafe { self.add_scaled_dots(dots, Self::splat(0x0001_0001)) }
    }

    #[inline(always)]
    unsafe fn add_scaled_dots(self, dots: Self, scale: Self) -> Self {
        unsafe { self.add(Words256(_mm256_madd_epi16(dots.0, scale.0), _mm256_madd_epi16(dots.1, scale.1))) }
    }

    /// The scale in both halves.
    #[inline(always)]
    unsafe fn dots_scale(self) -> Self {
        unsafe { self.and(Self::splat(0xffff)).or(self.shl(16)) }
    }

    #[inline(always)]
    unsafe fn dot_pair(self, pair: *const i32, sum: Self) -> Self {
        unsafe {
            let pair = _mm256_set1_epi32(*pair);
            sum.add(Words256(_mm256_madd_epi16(self.0, pair), _mm256_madd_epi16(self.1, pair)))
        }
    }

    #[inline(always)]
    unsafe fn to_floats(self) -> Avx2 {
        unsafe { Avx2(_mm256_cvtepi32_ps(self.0), _mm256_cvtepi32_ps(self.1)) }
    }

    #[inline(always)]
    unsafe fn as_floats(self) -> Avx2 {
        unsafe { Avx2(_mm256_castsi256_ps(self.0), _mm256_castsi256_ps(self.1)) }
    }

    #[inline(always)]
    unsafe fn halves_to_floats(self) -> Avx2 {
        unsafe { Avx2(eight_halves(self.0), eight_halves(self.1)) }
    }
}
