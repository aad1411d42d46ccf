//! Integer dot products with AVX2: a row's 32 values in one register, eight rows reduced together.

// Indices name the rows, tokens and vectors of a register tile; several arrays share them.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use super::{BlockDots, Format, RowBlocks, RowPointers, TokenBlocks};
use crate::lanes::{Avx2, Lanes};
use crate::quantize::BLOCK;

/// A row's 32 values: nibbles as they are (0..=15), bytes signed.
///
/// # Safety
/// AVX2 is available; the block is readable.
#[inline(always)]
unsafe fn load_values<F: Format>(block: *const u8) -> __m256i {
    // SAFETY: the caller's contract.
    unsafe {
        if F::NIBBLES {
            let packed = _mm_loadu_si128(block.add(F::VALUES).cast());
            let both = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(packed), _mm_srli_epi16::<4>(packed));
            _mm256_and_si256(both, _mm256_set1_epi8(15))
        } else {
            _mm256_loadu_si256(block.add(F::VALUES).cast())
        }
    }
}

/// Eight partial sums of a row times a token. No 16-bit sum overflows: 2 · 128 · 127 < 2¹⁵.
///
/// # Safety
/// AVX2 is available.
#[inline(always)]
unsafe fn partial_sums<F: Format>(row: __m256i, token: __m256i) -> __m256i {
    // SAFETY: the caller's contract.
    unsafe {
        let pairs = if F::NIBBLES {
            _mm256_maddubs_epi16(row, token)
        } else {
            _mm256_maddubs_epi16(_mm256_abs_epi8(row), _mm256_sign_epi8(token, row))
        };
        _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))
    }
}

/// Eight rows' sums, in order, of their eight partial sums each.
///
/// # Safety
/// AVX2 is available.
#[inline(always)]
unsafe fn sum_rows(rows: [__m256i; 8]) -> __m256i {
    // SAFETY: the caller's contract.
    unsafe {
        let low = _mm256_hadd_epi32(_mm256_hadd_epi32(rows[0], rows[1]), _mm256_hadd_epi32(rows[2], rows[3]));
        let high = _mm256_hadd_epi32(_mm256_hadd_epi32(rows[4], rows[5]), _mm256_hadd_epi32(rows[6], rows[7]));
        let first = _mm256_permute2x128_si256::<0x20>(low, high);
        let second = _mm256_permute2x128_si256::<0x31>(low, high);
        _mm256_add_epi32(first, second)
    }
}

/// Rows 0..8 from `weights`.
///
/// # Safety
/// As [`BlockDots::dots`], for eight rows from `weights`.
#[inline(always)]
unsafe fn eight_rows<F: Format, const M: usize>(weights: *const u8, stride: usize, tokens: TokenBlocks) -> [__m256; M] {
    // SAFETY: the caller's contract.
    unsafe {
        let mut rows = [_mm256_setzero_si256(); 8];
        for (index, row) in rows.iter_mut().enumerate() {
            *row = load_values::<F>(weights.add(index * stride));
        }
        let mut dots = [_mm256_setzero_ps(); M];
        for (m, dots) in dots.iter_mut().enumerate() {
            let token = _mm256_loadu_si256(tokens.values.add(m * tokens.blocks * BLOCK).cast());
            let mut partial = [_mm256_setzero_si256(); 8];
            for (partial, row) in partial.iter_mut().zip(rows) {
                *partial = partial_sums::<F>(row, token);
            }
            let mut sum = sum_rows(partial);
            if F::OFFSET != 0 {
                let correction = -F::OFFSET * *tokens.sums.add(m * tokens.blocks);
                sum = _mm256_add_epi32(sum, _mm256_set1_epi32(correction));
            }
            *dots = _mm256_cvtepi32_ps(sum);
        }
        dots
    }
}

impl BlockDots for Avx2 {
    type Values = RowPointers;

    #[inline(always)]
    unsafe fn load_rows<F: Format>(weights: *const u8, stride: usize) -> RowBlocks<Self> {
        // SAFETY: the caller's contract.
        unsafe { RowPointers::load::<Self, F>(weights, stride) }
    }

    #[inline(always)]
    unsafe fn dots<F: Format, const M: usize>(rows: &RowPointers, tokens: TokenBlocks) -> [Self; M] {
        // SAFETY: the caller's contract.
        unsafe {
            let low = eight_rows::<F, M>(rows.first, rows.stride, tokens);
            let high = eight_rows::<F, M>(rows.first.add(8 * rows.stride), rows.stride, tokens);
            let mut dots = [Self::splat(0.0); M];
            for m in 0..M {
                dots[m] = Avx2(low[m], high[m]);
            }
            dots
        }
    }
}
