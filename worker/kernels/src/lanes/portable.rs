//! [`Lanes`] in plain Rust: the definition the other paths must equal.

use super::{LANES, Lanes, Sum, padded, write_first};
use crate::dequantize::f8e4m3_to_f32;

/// Sixteen f32 values in an array.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; LANES]);

impl Portable {
    #[inline(always)]
    fn map(self, mut function: impl FnMut(f32) -> f32) -> Self {
        Portable(std::array::from_fn(|lane| function(self.0[lane])))
    }

    #[inline(always)]
    fn zip(self, other: Self, mut function: impl FnMut(f32, f32) -> f32) -> Self {
        Portable(std::array::from_fn(|lane| function(self.0[lane], other.0[lane])))
    }

    #[inline(always)]
    fn fold(self, function: impl Fn(f32, f32) -> f32) -> f32 {
        let mut values = self.0;
        for half in [8, 4, 2, 1] {
            for lane in 0..half {
                values[lane] = function(values[lane], values[lane + half]);
            }
        }
        values[0]
    }
}

/// max as x86 has it: the second operand where either is NaN.
#[inline(always)]
fn greater(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

// The methods' contract is `Lanes`'s: pointers hold as many elements as are read or written.
impl Lanes for Portable {
    const TOKENS: usize = 4;
    const SUMS: usize = 16;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Portable([value; LANES])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: 16 elements are readable, by contract.
        Portable(unsafe { from.cast::<[f32; LANES]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn load_partial(from: *const f32, count: usize) -> Self {
        if count == LANES {
            // SAFETY: 16 elements are readable, by contract.
            return unsafe { Self::load(from) };
        }
        // SAFETY: `count` ≤ 16 elements are readable, by contract.
        Portable(unsafe { padded(from, count) })
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        // SAFETY: 16 elements are readable, by contract.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        Portable(bits.map(|bits| half::f16::from_bits(bits).to_f32()))
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: 16 elements are readable, by contract.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        Portable(bits.map(|bits| f32::from_bits(u32::from(bits) << 16)))
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        // SAFETY: 16 elements are readable, by contract.
        let values = unsafe { from.cast::<[i8; LANES]>().read_unaligned() };
        Portable(values.map(f32::from))
    }

    #[inline(always)]
    unsafe fn load_f8e4m3(from: *const u8) -> Self {
        // SAFETY: 16 elements are readable, by contract.
        Portable(unsafe { from.cast::<[u8; LANES]>().read() }.map(f8e4m3_to_f32))
    }

    #[inline(always)]
    unsafe fn from_i32(from: *const i32) -> Self {
        // SAFETY: 16 elements are readable, by contract.
        let values = unsafe { from.cast::<[i32; LANES]>().read_unaligned() };
        Portable(values.map(|value| value as f32))
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: 16 elements are writable, by contract.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn store_partial(self, to: *mut f32, count: usize) {
        if count == LANES {
            // SAFETY: 16 elements are writable, by contract.
            return unsafe { self.store(to) };
        }
        // SAFETY: `count` ≤ 16 elements are writable, by contract.
        unsafe { write_first(self.0, to, count) }
    }

    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16) {
        let bits = self.0.map(|value| half::f16::from_f32(value).to_bits());
        // SAFETY: 16 elements are writable, by contract.
        unsafe { to.cast::<[u16; LANES]>().write_unaligned(bits) }
    }

    #[inline(always)]
    unsafe fn store_i8(self, to: *mut i8) {
        let values = self.0.map(|value| value as i8);
        // SAFETY: 16 elements are writable, by contract.
        unsafe { to.cast::<[i8; LANES]>().write_unaligned(values) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
        Portable(std::array::from_fn(|lane| self.0[lane].mul_add(factor.0[lane], addend.0[lane])))
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        self.zip(other, greater)
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    unsafe fn abs(self) -> Self {
        self.map(f32::abs)
    }

    #[inline(always)]
    unsafe fn round_ties_even(self) -> Self {
        self.map(f32::round_ties_even)
    }

    #[inline(always)]
    unsafe fn zero_where_below(self, key: Self, limit: f32) -> Self {
        self.zip(key, |value, key| if key < limit { 0.0 } else { value })
    }

    #[inline(always)]
    unsafe fn scale_by_power(self, biased: Self) -> Self {
        self.zip(biased, |value, biased| f32::from_bits(value.to_bits().wrapping_add(biased.to_bits() << 23)))
    }

    #[inline(always)]
    unsafe fn keep(self, start: usize, end: usize, other: f32) -> Self {
        Portable(std::array::from_fn(|lane| if (start..end).contains(&lane) { self.0[lane] } else { other }))
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        self.fold(|a, b| a + b)
    }

    #[inline(always)]
    unsafe fn greatest(self) -> f32 {
        self.fold(greater)
    }
}

impl Sum for Portable {
    #[inline(always)]
    unsafe fn plus(self, other: Self) -> Self {
        // SAFETY: the caller's contract.
        unsafe { self.add(other) }
    }
}
