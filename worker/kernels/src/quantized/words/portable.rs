//! [`Words`] in plain Rust.

use super::{IntegerLanes, Words, gather};
use crate::lanes::{LANES, Lanes, Portable};

/// Sixteen words in an array.
#[derive(Clone, Copy)]
pub(crate) struct PortableWords([u32; LANES]);

impl IntegerLanes for Portable {
    type Words = PortableWords;
}

impl PortableWords {
    #[inline(always)]
    fn map(self, function: impl Fn(u32) -> u32) -> Self {
        PortableWords(self.0.map(function))
    }

    #[inline(always)]
    fn zip(self, other: Self, function: impl Fn(u32, u32) -> u32) -> Self {
        let mut words = self.0;
        for (word, other) in words.iter_mut().zip(other.0) {
            *word = function(*word, other);
        }
        PortableWords(words)
    }
}

// SAFETY (all blocks): pointers hold what is read or written: the contract of `Words`.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Words for PortableWords {
    type Floats = Portable;

    const TOKENS: usize = 4;
    const DOT_TAKES_OFF_128: bool = false;
    const NARROW_DOTS: bool = false;

    #[inline(always)]
    unsafe fn splat(value: u32) -> Self {
        PortableWords([value; LANES])
    }

    #[inline(always)]
    unsafe fn load(from: *const u32) -> Self {
        unsafe { PortableWords(from.cast::<[u32; LANES]>().read_unaligned()) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut u32) {
        unsafe { to.cast::<[u32; LANES]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn load_each(first: *const u8, stride: usize) -> Self {
        unsafe { PortableWords(gather(first, stride)).map(u32::from_le) }
    }

    #[inline(always)]
    unsafe fn load_four(first: *const u8, stride: usize) -> [Self; 4] {
        unsafe { [0, 4, 8, 12].map(|at| Self::load_each(first.add(at), stride)) }
    }

    #[inline(always)]
    unsafe fn and(self, other: Self) -> Self {
        self.zip(other, |a, b| a & b)
    }

    #[inline(always)]
    unsafe fn or(self, other: Self) -> Self {
        self.zip(other, |a, b| a | b)
    }

    #[inline(always)]
    unsafe fn xor(self, other: Self) -> Self {
        self.zip(other, |a, b| a ^ b)
    }

    #[inline(always)]
    unsafe fn shl(self, bits: u32) -> Self {
        self.map(|word| word << bits)
    }

    #[inline(always)]
    unsafe fn shr(self, bits: u32) -> Self {
        self.map(|word| word >> bits)
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        self.zip(other, u32::wrapping_add)
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        self.zip(other, u32::wrapping_mul)
    }

    #[inline(always)]
    unsafe fn spread(self) -> Self {
        self.map(|word| (word & 15).wrapping_mul(0x0020_4081) & 0x0101_0101)
    }

    #[inline(always)]
    unsafe fn look_up(self, table: &[u8; 16]) -> Self {
        self.map(|word| u32::from_le_bytes(word.to_le_bytes().map(|index| table[usize::from(index & 15)])))
    }

    #[inline(always)]
    unsafe fn dot<const WIDE: bool>(self, activations: *const i8, dots: Self) -> Self {
        let activations = unsafe { activations.cast::<[i8; 4]>().read() }.map(i32::from);
        self.zip(dots, |word, dots| {
            let bytes = word.to_le_bytes();
            let product = (0..4).fold(0, |dot, at| dot + i32::from(bytes[at]) * activations[at]);
            dots.wrapping_add(product as u32)
        })
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
        let pair = unsafe { *pair };
        let (low, high) = (i32::from(pair as i16), pair >> 16);
        self.zip(sum, |word, sum| sum.wrapping_add((i32::from(word as i16) * low + (word as i32 >> 16) * high) as u32))
    }

    #[inline(always)]
    unsafe fn to_floats(self) -> Portable {
        unsafe { Portable::from_i32(self.0.as_ptr().cast()) }
    }

    #[inline(always)]
    unsafe fn as_floats(self) -> Portable {
        unsafe { Portable::load(self.0.as_ptr().cast()) }
    }

    #[inline(always)]
    unsafe fn halves_to_floats(self) -> Portable {
        unsafe { Portable::load_f16(self.0.map(|word| word as u16).as_ptr()) }
    }
}
