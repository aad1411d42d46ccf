//! Integer dot products with AVX-512 VNNI: 16 rows' blocks in 4 (nibbles) or 8 (bytes) registers.

// Indices name the rows, tokens and vectors of a register tile; several arrays share them.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use super::{BlockDots, Format, TokenBlocks};
use crate::lanes::{Avx512, LANES, Lanes};
use crate::quantize::BLOCK;

/// 16 bytes each of rows r, r + 4, r + 8, r + 12.
///
/// # Safety
/// AVX-512 F is available; the four rows are readable.
#[inline(always)]
unsafe fn load_four(row: *const u8, stride: usize) -> __m512i {
    // SAFETY: the caller's contract.
    unsafe {
        let four = 4 * stride;
        let a = _mm512_castsi128_si512(_mm_loadu_si128(row.cast()));
        let b = _mm512_inserti32x4::<1>(a, _mm_loadu_si128(row.add(four).cast()));
        let c = _mm512_inserti32x4::<2>(b, _mm_loadu_si128(row.add(2 * four).cast()));
        _mm512_inserti32x4::<3>(c, _mm_loadu_si128(row.add(3 * four).cast()))
    }
}

/// 32 bytes each of rows r and r + 4.
///
/// # Safety
/// AVX-512 F is available; the two rows are readable.
#[inline(always)]
unsafe fn load_two(row: *const u8, stride: usize) -> __m512i {
    // SAFETY: the caller's contract.
    unsafe {
        let a = _mm512_castsi256_si512(_mm256_loadu_si256(row.cast()));
        _mm512_inserti64x4::<1>(a, _mm256_loadu_si256(row.add(4 * stride).cast()))
    }
}

/// In each 128-bit lane: the sums of a's, b's, c's and d's four partial sums.
///
/// # Safety
/// AVX-512 F is available.
#[inline(always)]
unsafe fn sum_quads(a: __m512i, b: __m512i, c: __m512i, d: __m512i) -> __m512i {
    // SAFETY: the caller's contract.
    unsafe {
        let ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd))
    }
}

/// Nibbles: register r holds rows r, r + 4, r + 8, r + 12, so that [`sum_quads`] yields rows in order.
///
/// # Safety
/// As [`BlockDots::block_dots`].
#[inline(always)]
unsafe fn nibble_dots<F: Format, const M: usize>(weights: *const u8, stride: usize, tokens: TokenBlocks) -> [Avx512; M] {
    // SAFETY: the caller's contract.
    unsafe {
        let mask = _mm512_set1_epi8(15);
        let mut low = [_mm512_setzero_si512(); 4];
        let mut high = low;
        for r in 0..4 {
            let packed = load_four(weights.add(r * stride + F::VALUES), stride);
            low[r] = _mm512_and_si512(packed, mask);
            high[r] = _mm512_and_si512(_mm512_srli_epi16::<4>(packed), mask);
        }
        let mut dots = [Avx512::splat(0.0); M];
        for (m, dots) in dots.iter_mut().enumerate() {
            let values = tokens.values.add(m * tokens.blocks * BLOCK);
            let first = _mm512_broadcast_i32x4(_mm_loadu_si128(values.cast()));
            let second = _mm512_broadcast_i32x4(_mm_loadu_si128(values.add(16).cast()));
            let mut partial = [_mm512_setzero_si512(); 4];
            for r in 0..4 {
                partial[r] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), low[r], first);
                partial[r] = _mm512_dpbusd_epi32(partial[r], high[r], second);
            }
            let mut sum = sum_quads(partial[0], partial[1], partial[2], partial[3]);
            if F::OFFSET != 0 {
                let correction = -F::OFFSET * *tokens.sums.add(m * tokens.blocks);
                sum = _mm512_add_epi32(sum, _mm512_set1_epi32(correction));
            }
            *dots = Avx512(_mm512_cvtepi32_ps(sum));
        }
        dots
    }
}

/// Bytes: made unsigned by adding 128, which −128 · Σ activations undoes exactly. Register pairs hold rows
/// (i, i + 4) and (8 + i, 12 + i).
///
/// # Safety
/// As [`BlockDots::block_dots`].
#[inline(always)]
unsafe fn byte_dots<F: Format, const M: usize>(weights: *const u8, stride: usize, tokens: TokenBlocks) -> [Avx512; M] {
    // SAFETY: the caller's contract.
    unsafe {
        let flip = _mm512_set1_epi8(-128);
        let mut bytes = [_mm512_setzero_si512(); 8];
        for i in 0..4 {
            bytes[i] = _mm512_xor_si512(load_two(weights.add(i * stride + F::VALUES), stride), flip);
            bytes[4 + i] = _mm512_xor_si512(load_two(weights.add((8 + i) * stride + F::VALUES), stride), flip);
        }
        let mut dots = [Avx512::splat(0.0); M];
        for (m, dots) in dots.iter_mut().enumerate() {
            let values = _mm256_loadu_si256(tokens.values.add(m * tokens.blocks * BLOCK).cast());
            let values = _mm512_broadcast_i64x4(values);
            let mut partial = [_mm512_setzero_si512(); 8];
            for (partial, bytes) in partial.iter_mut().zip(bytes) {
                *partial = _mm512_dpbusd_epi32(_mm512_setzero_si512(), bytes, values);
            }
            let lower = sum_quads(partial[0], partial[1], partial[2], partial[3]);
            let upper = sum_quads(partial[4], partial[5], partial[6], partial[7]);
            let even = _mm512_shuffle_i32x4::<0b10_00_10_00>(lower, upper);
            let odd = _mm512_shuffle_i32x4::<0b11_01_11_01>(lower, upper);
            let correction = _mm512_set1_epi32(-128 * *tokens.sums.add(m * tokens.blocks));
            *dots = Avx512(_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_add_epi32(even, odd), correction)));
        }
        dots
    }
}

const _: () = assert!(LANES == 16, "the register arrangement is for 16 rows");

impl BlockDots for Avx512 {
    #[inline(always)]
    unsafe fn block_dots<F: Format, const M: usize>(weights: *const u8, stride: usize, tokens: TokenBlocks) -> [Self; M] {
        // SAFETY: the caller's contract.
        unsafe { if F::NIBBLES { nibble_dots::<F, M>(weights, stride, tokens) } else { byte_dots::<F, M>(weights, stride, tokens) } }
    }
}
