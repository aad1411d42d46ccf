//! [`Lanes`] in two 256-bit registers (lanes 0..8 and 8..16).

use std::arch::x86_64::*;

use super::{LANES, Lanes, Sum, padded, write_first};

/// Sixteen f32 values in two registers.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Avx2(pub(crate) __m256, pub(crate) __m256);

/// Sixteen 8-bit floats as f16 of 2⁻⁸ of their values, which is exact; NaN stays NaN.
///
/// # Safety
/// AVX2 is available and 16 bytes are readable.
#[inline(always)]
pub(super) unsafe fn f8e4m3_to_f16(from: *const u8) -> __m256i {
    // SAFETY: the caller's contract.
    unsafe {
        // The sign's copies above it and the magnitude move to f16's places; only one sign stays.
        let codes = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(_mm_loadu_si128(from.cast())));
        let halves = _mm256_and_si256(codes, _mm256_set1_epi16(0xbf80_u16 as i16));
        let greatest = _mm256_set1_epi16(0x3f80);
        _mm256_or_si256(halves, _mm256_cmpeq_epi16(_mm256_and_si256(codes, greatest), greatest))
    }
}

/// [`Lanes::add_products`] of eight lanes, `first` and on. A function of its own, so that the compiler gives all registers
/// to its loop.
///
/// # Safety
/// As there.
#[inline(never)]
#[allow(clippy::needless_range_loop, reason = "indices name rows and tokens of several arrays")]
#[target_feature(enable = "avx2,fma")]
unsafe fn add_half_products<const R: usize, const T: usize>(
    sums: [*mut Avx2; T],
    rows: [*const f32; R],
    inputs: [*const f32; T],
    columns: usize,
    first: usize,
) {
    // SAFETY: the caller's contract; sixteen lanes lie one after the other.
    unsafe {
        let mut tile = [[_mm256_setzero_ps(); R]; T];
        for t in 0..T {
            for r in 0..R {
                tile[t][r] = _mm256_loadu_ps(sums[t].add(r).cast::<f32>().add(first));
            }
        }
        for column in (first..columns).step_by(LANES) {
            let mut x = [_mm256_setzero_ps(); T];
            for t in 0..T {
                x[t] = _mm256_loadu_ps(inputs[t].add(column));
            }
            for r in 0..R {
                let row = _mm256_loadu_ps(rows[r].add(column));
                for t in 0..T {
                    tile[t][r] = _mm256_fmadd_ps(row, x[t], tile[t][r]);
                }
            }
        }
        for t in 0..T {
            for r in 0..R {
                _mm256_storeu_ps(sums[t].add(r).cast::<f32>().add(first), tile[t][r]);
            }
        }
    }
}

// SAFETY (all blocks): AVX2, FMA and F16C are available and pointers hold what is read or written: the
// contract of `Lanes`.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Lanes for Avx2 {
    const TOKENS: usize = 3;
    const SUMS: usize = 6;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        unsafe { Avx2(_mm256_set1_ps(value), _mm256_set1_ps(value)) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        unsafe { Avx2(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
    }

    #[inline(always)]
    unsafe fn load_partial(from: *const f32, count: usize) -> Self {
        if count == LANES {
            // SAFETY: 16 elements are readable, by contract.
            return unsafe { Self::load(from) };
        }
        unsafe { Self::load(padded(from, count).as_ptr()) }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        unsafe { Avx2(_mm256_cvtph_ps(_mm_loadu_si128(from.cast())), _mm256_cvtph_ps(_mm_loadu_si128(from.add(8).cast()))) }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(8).cast()));
            Avx2(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)), _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)))
        }
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        unsafe {
            let low = _mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()));
            let high = _mm256_cvtepi8_epi32(_mm_loadl_epi64(from.add(8).cast()));
            Avx2(_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high))
        }
    }

    #[inline(always)]
    unsafe fn load_f8e4m3(from: *const u8) -> Self {
        unsafe {
            let (halves, factor) = (f8e4m3_to_f16(from), _mm256_set1_ps(256.0));
            let low = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
            let high = _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(halves));
            Avx2(_mm256_mul_ps(low, factor), _mm256_mul_ps(high, factor))
        }
    }

    #[inline(always)]
    unsafe fn from_i32(from: *const i32) -> Self {
        unsafe { Avx2(_mm256_cvtepi32_ps(_mm256_loadu_si256(from.cast())), _mm256_cvtepi32_ps(_mm256_loadu_si256(from.add(8).cast()))) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe {
            _mm256_storeu_ps(to, self.0);
            _mm256_storeu_ps(to.add(8), self.1);
        }
    }

    #[inline(always)]
    unsafe fn store_partial(self, to: *mut f32, count: usize) {
        if count == LANES {
            // SAFETY: 16 elements are writable, by contract.
            return unsafe { self.store(to) };
        }
        let mut values = [0.0; LANES];
        unsafe {
            self.store(values.as_mut_ptr());
            write_first(values, to, count);
        }
    }

    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16) {
        unsafe {
            _mm_storeu_si128(to.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0));
            _mm_storeu_si128(to.add(8).cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.1));
        }
    }

    #[inline(always)]
    unsafe fn store_i8(self, to: *mut i8) {
        unsafe {
            let words = _mm256_packs_epi32(_mm256_cvtps_epi32(self.0), _mm256_cvtps_epi32(self.1));
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
            let bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_storeu_si128(to.cast(), bytes);
        }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        unsafe { Avx2(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        unsafe { Avx2(_mm256_sub_ps(self.0, other.0), _mm256_sub_ps(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        unsafe { Avx2(_mm256_mul_ps(self.0, other.0), _mm256_mul_ps(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        unsafe { Avx2(_mm256_div_ps(self.0, other.0), _mm256_div_ps(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
        unsafe { Avx2(_mm256_fmadd_ps(self.0, factor.0, addend.0), _mm256_fmadd_ps(self.1, factor.1, addend.1)) }
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        unsafe { Avx2(_mm256_max_ps(self.0, other.0), _mm256_max_ps(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        unsafe { Avx2(_mm256_min_ps(self.0, other.0), _mm256_min_ps(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn abs(self) -> Self {
        unsafe {
            let sign = _mm256_set1_ps(-0.0);
            Avx2(_mm256_andnot_ps(sign, self.0), _mm256_andnot_ps(sign, self.1))
        }
    }

    #[inline(always)]
    unsafe fn round_ties_even(self) -> Self {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        unsafe { Avx2(_mm256_round_ps::<NEAREST>(self.0), _mm256_round_ps::<NEAREST>(self.1)) }
    }

    #[inline(always)]
    unsafe fn zero_where_below(self, key: Self, limit: f32) -> Self {
        unsafe {
            let limit = _mm256_set1_ps(limit);
            Avx2(
                _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(key.0, limit), self.0),
                _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(key.1, limit), self.1),
            )
        }
    }

    #[inline(always)]
    unsafe fn scale_by_power(self, biased: Self) -> Self {
        unsafe {
            let low = _mm256_slli_epi32::<23>(_mm256_castps_si256(biased.0));
            let high = _mm256_slli_epi32::<23>(_mm256_castps_si256(biased.1));
            Avx2(
                _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(self.0), low)),
                _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(self.1), high)),
            )
        }
    }

    #[inline(always)]
    unsafe fn keep(self, start: usize, end: usize, other: f32) -> Self {
        if start == 0 && end == LANES {
            return self;
        }
        let mut values = [0.0_f32; LANES];
        unsafe {
            self.store(values.as_mut_ptr());
            for (lane, value) in values.iter_mut().enumerate() {
                if lane < start || lane >= end {
                    *value = other;
                }
            }
            Self::load(values.as_ptr())
        }
    }

    /// First lanes 0 to 7 of all columns, then lanes 8 to 15: both would not fit the registers.
    #[inline(always)]
    unsafe fn add_products<const R: usize, const T: usize>(
        sums: [*mut Self; T],
        rows: [*const f32; R],
        inputs: [*const f32; T],
        columns: usize,
    ) {
        unsafe {
            add_half_products(sums, rows, inputs, columns, 0);
            add_half_products(sums, rows, inputs, columns, 8);
        }
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        unsafe {
            let eight = _mm256_add_ps(self.0, self.1);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    unsafe fn greatest(self) -> f32 {
        unsafe {
            let eight = _mm256_max_ps(self.0, self.1);
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        }
    }
}

impl Sum for Avx2 {
    #[inline(always)]
    unsafe fn plus(self, other: Self) -> Self {
        // SAFETY: the caller's contract.
        unsafe { self.add(other) }
    }
}
