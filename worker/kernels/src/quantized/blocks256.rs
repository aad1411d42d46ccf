//! Formats of 256 values per block: how each is unpacked into eight parts. Layouts are at [`crate::DType`].
//!
//! A part's f32 scale is d times its integer scale where the part has only one: 11 by at most 8 bits, so exact.

use super::blocks32::{IQ4_TABLE, nibbles};
use super::part::{Format, Minima, Part};
use super::words::Words;
use crate::lanes::Lanes;

/// See [`crate::DType::Q2_K`].
#[derive(Clone, Copy)]
pub(crate) struct Q2K;
/// See [`crate::DType::Q3_K`].
#[derive(Clone, Copy)]
pub(crate) struct Q3K;
/// See [`crate::DType::Q4_K`].
#[derive(Clone, Copy)]
pub(crate) struct Q4K;
/// See [`crate::DType::Q5_K`].
#[derive(Clone, Copy)]
pub(crate) struct Q5K;
/// See [`crate::DType::Q6_K`].
#[derive(Clone, Copy)]
pub(crate) struct Q6K;
/// See [`crate::DType::IQ4_XS`].
#[derive(Clone, Copy)]
pub(crate) struct Iq4Xs;

const LOWEST_BIT: u32 = 0x0101_0101;
const TWO_BITS: u32 = 0x0303_0303;
const FOUR_BITS: u32 = 0x0f0f_0f0f;

/// The eight words at `first` of each row.
///
/// # Safety
/// As [`Format::unpack`].
#[inline(always)]
unsafe fn load_eight<W: Words>(first: *const u8, stride: usize) -> [W; 8] {
    // SAFETY: the caller's contract.
    unsafe {
        let [a, b, c, d] = W::load_four(first, stride);
        let [e, f, g, h] = W::load_four(first.add(16), stride);
        [a, b, c, d, e, f, g, h]
    }
}

/// Byte `index` of 16 that lie in four words.
///
/// # Safety
/// As [`Words`].
#[inline(always)]
unsafe fn byte<W: Words>(words: &[W], index: usize) -> W {
    // SAFETY: the caller's contract.
    unsafe { words[index / 4].field(8 * (index % 4) as u32, 0xff) }
}

/// Signed byte `index` of 16 that lie in four words: the unsigned one with its highest bit flipped, less 128.
///
/// # Safety
/// As [`Words`].
#[inline(always)]
unsafe fn signed_byte<W: Words>(words: &[W], index: usize) -> W {
    // SAFETY: the caller's contract.
    unsafe { byte(words, index).xor(W::splat(128)).add(W::splat(-128_i32 as u32)) }
}

/// The f16 that ends with a block of `bytes`, as the upper half of a word within the block.
///
/// # Safety
/// As [`Format::unpack`].
#[inline(always)]
unsafe fn last_half<W: Words>(block: *const u8, stride: usize, bytes: usize) -> W::Floats {
    // SAFETY: the caller's contract.
    unsafe { W::load_each(block.add(bytes - 4), stride).shr(16).halves_to_floats() }
}

impl Format for Q2K {
    const BYTES: usize = 84;
    const PARTS: usize = 8;
    const OFFSET: i16 = 0;
    const GREATEST: u8 = 45;
    const MINIMA: Minima = Minima::Integer;

    #[inline(always)]
    unsafe fn unpack<W: Words>(block: *const u8, stride: usize, parts: &mut [Part]) {
        // SAFETY: the caller's contract.
        unsafe {
            let scales = W::load_four(block, stride);
            let both = W::load_each(block.add(80), stride);
            let scale = both.halves_to_floats();
            let minimum = both.shr(16).halves_to_floats().mul(W::Floats::splat(-1.0));
            for quarter in 0..2 {
                let words = load_eight::<W>(block.add(16 + 32 * quarter), stride);
                for (shift, part) in parts[4 * quarter..4 * quarter + 4].iter_mut().enumerate() {
                    let run = 2 * (4 * quarter + shift);
                    let (first, last) = (byte(&scales, run), byte(&scales, run + 1));
                    for (index, word) in words.into_iter().enumerate() {
                        // At most 3 · 15 in each byte, so that no product reaches its neighbour.
                        let scale = if index < 4 { first } else { last }.field(0, 15);
                        part.set_bytes(index, word.field(2 * shift as u32, TWO_BITS).mul(scale));
                    }
                    part.set_pair(first.shr(4), last.shr(4));
                    part.set_scale::<W>(scale);
                    part.set_minimum::<W>(minimum);
                }
            }
        }
    }
}

/// Scales of the two halves of part `part`: six bits, the lower four in the first two words, 32 subtracted.
///
/// # Safety
/// As [`Words`].
#[inline(always)]
unsafe fn q3_scales<W: Words>(words: &[W; 3], part: usize) -> [W; 2] {
    // SAFETY: the caller's contract.
    unsafe {
        let mut scales = [W::splat(0); 2];
        for (half, scale) in scales.iter_mut().enumerate() {
            let run = 2 * part + half;
            let low = byte(words, run % 8).field(4 * (run / 8) as u32, 15);
            let high = byte(words, 8 + run % 4).moved_field(2 * (run / 4) as u32, 4, 3);
            *scale = low.or(high).add(W::splat(-32_i32 as u32));
        }
        scales
    }
}

impl Format for Q3K {
    const BYTES: usize = 110;
    const PARTS: usize = 8;
    const OFFSET: i16 = 4;
    const GREATEST: u8 = 7;
    const HALF_SCALES: bool = true;

    #[inline(always)]
    unsafe fn unpack<W: Words>(block: *const u8, stride: usize, parts: &mut [Part]) {
        // SAFETY: the caller's contract.
        unsafe {
            let [_, scales @ ..] = W::load_four(block.add(92), stride);
            let scale = last_half::<W>(block, stride, Self::BYTES);
            let third = load_eight::<W>(block, stride);
            for quarter in 0..2 {
                let words = load_eight::<W>(block.add(32 + 32 * quarter), stride);
                for (shift, part) in parts[4 * quarter..4 * quarter + 4].iter_mut().enumerate() {
                    let number = 4 * quarter + shift;
                    for (index, word) in words.into_iter().enumerate() {
                        let third = third[index].moved_field(number as u32, 2, LOWEST_BIT);
                        part.set_bytes(index, word.field(2 * shift as u32, TWO_BITS).or(third));
                    }
                    let [first, last] = q3_scales(&scales, number);
                    part.set_half_scales(first, last, Self::OFFSET);
                    part.set_scale::<W>(scale);
                }
            }
        }
    }
}

/// Sets the scales and minima of the eight parts: d, dmin and 8 pairs of 6-bit integers in the block's first 16 bytes.
///
/// # Safety
/// As [`Format::unpack`].
#[inline(always)]
unsafe fn set_six_bit_scales<W: Words>(block: *const u8, stride: usize, parts: &mut [Part]) {
    // SAFETY: the caller's contract.
    unsafe {
        let [both, scales, minima, upper] = W::load_four(block, stride);
        let d = both.halves_to_floats();
        let dmin = both.shr(16).halves_to_floats().mul(W::Floats::splat(-1.0));
        for (number, part) in parts.iter_mut().enumerate() {
            let at = 8 * (number % 4) as u32;
            let (scale, minimum) = if number < 4 {
                (scales.field(at, 63), minima.field(at, 63))
            } else {
                let (scale, minimum) = (scales.moved_field(at + 6, 4, 3), minima.moved_field(at + 6, 4, 3));
                (upper.field(at, 15).or(scale), upper.field(at + 4, 15).or(minimum))
            };
            part.set_scale::<W>(d.mul(scale.to_floats()));
            part.set_minimum::<W>(dmin.mul(minimum.to_floats()));
        }
    }
}

impl Format for Q4K {
    const BYTES: usize = 144;
    const PARTS: usize = 8;
    const OFFSET: i16 = 0;
    const GREATEST: u8 = 15;
    const MINIMA: Minima = Minima::Float;

    #[inline(always)]
    unsafe fn unpack<W: Words>(block: *const u8, stride: usize, parts: &mut [Part]) {
        // SAFETY: the caller's contract.
        unsafe {
            set_six_bit_scales::<W>(block, stride, parts);
            for pair in 0..4 {
                let words = load_eight::<W>(block.add(16 + 32 * pair), stride);
                for (index, word) in words.into_iter().enumerate() {
                    parts[2 * pair].set_bytes(index, word.field(0, FOUR_BITS));
                    parts[2 * pair + 1].set_bytes(index, word.field(4, FOUR_BITS));
                }
            }
        }
    }
}

impl Format for Q5K {
    const BYTES: usize = 176;
    const PARTS: usize = 8;
    const OFFSET: i16 = 0;
    const GREATEST: u8 = 31;
    const MINIMA: Minima = Minima::Float;

    #[inline(always)]
    unsafe fn unpack<W: Words>(block: *const u8, stride: usize, parts: &mut [Part]) {
        // SAFETY: the caller's contract.
        unsafe {
            set_six_bit_scales::<W>(block, stride, parts);
            let fifth = load_eight::<W>(block.add(16), stride);
            for pair in 0..4 {
                let words = load_eight::<W>(block.add(48 + 32 * pair), stride);
                for (index, word) in words.into_iter().enumerate() {
                    for half in 0..2 {
                        let number = 2 * pair + half;
                        let fifth = fifth[index].moved_field(number as u32, 4, LOWEST_BIT);
                        parts[number].set_bytes(index, word.field(4 * half as u32, FOUR_BITS).or(fifth));
                    }
                }
            }
        }
    }
}

impl Format for Q6K {
    const BYTES: usize = 210;
    const PARTS: usize = 8;
    const OFFSET: i16 = 32;
    const GREATEST: u8 = 63;
    const HALF_SCALES: bool = true;

    #[inline(always)]
    unsafe fn unpack<W: Words>(block: *const u8, stride: usize, parts: &mut [Part]) {
        // SAFETY: the caller's contract.
        unsafe {
            for half in 0..2 {
                let upper = load_eight::<W>(block.add(128 + 32 * half), stride);
                for column in 0..2 {
                    let lower = load_eight::<W>(block.add(64 * half + 32 * column), stride);
                    for (index, (lower, upper)) in lower.into_iter().zip(upper).enumerate() {
                        for step in 0..2 {
                            let number = column + 2 * step;
                            let upper = upper.moved_field(2 * number as u32, 4, TWO_BITS);
                            parts[4 * half + number].set_bytes(index, lower.field(4 * step as u32, FOUR_BITS).or(upper));
                        }
                    }
                }
            }
            let scales = W::load_four(block.add(192), stride);
            let scale = last_half::<W>(block, stride, Self::BYTES);
            for (number, part) in parts.iter_mut().enumerate() {
                let (first, last) = (signed_byte(&scales, 2 * number), signed_byte(&scales, 2 * number + 1));
                part.set_half_scales(first, last, Self::OFFSET);
                part.set_scale::<W>(scale);
            }
        }
    }
}

impl Format for Iq4Xs {
    const BYTES: usize = 136;
    const PARTS: usize = 8;
    const OFFSET: i16 = 128;
    const GREATEST: u8 = 255;

    #[inline(always)]
    unsafe fn unpack<W: Words>(block: *const u8, stride: usize, parts: &mut [Part]) {
        // SAFETY: the caller's contract.
        unsafe {
            let head = W::load_each(block, stride);
            let low = W::load_each(block.add(4), stride);
            let d = head.halves_to_floats();
            for (number, part) in parts.iter_mut().enumerate() {
                let bytes = nibbles::<W>(block.add(8 + 16 * number), stride);
                for (index, bytes) in bytes.into_iter().enumerate() {
                    part.set_bytes(index, bytes.look_up(&IQ4_TABLE));
                }
                let high = head.moved_field(16 + 2 * number as u32, 4, 3);
                let scale = low.field(4 * number as u32, 15).or(high).add(W::splat(-32_i32 as u32));
                part.set_scale::<W>(d.mul(scale.to_floats()));
            }
        }
    }
}
