//! Formats of 32 values per block: how each is unpacked. Layouts are at [`crate::DType`].

use super::part::{Format, Minima, Part};
use super::words::Words;
use crate::dequantize::{IQ4_VALUES, MXFP4_VALUES};
use crate::lanes::Lanes;

/// See [`crate::DType::Q4_0`].
#[derive(Clone, Copy)]
pub(crate) struct Q4_0;
/// See [`crate::DType::Q4_1`].
#[derive(Clone, Copy)]
pub(crate) struct Q4_1;
/// See [`crate::DType::Q5_0`].
#[derive(Clone, Copy)]
pub(crate) struct Q5_0;
/// See [`crate::DType::Q5_1`].
#[derive(Clone, Copy)]
pub(crate) struct Q5_1;
/// See [`crate::DType::Q8_0`].
#[derive(Clone, Copy)]
pub(crate) struct Q8_0;
/// See [`crate::DType::IQ4_NL`].
#[derive(Clone, Copy)]
pub(crate) struct Iq4Nl;
/// See [`crate::DType::MXFP4`].
#[derive(Clone, Copy)]
pub(crate) struct Mxfp4;

/// Added to MXFP4's table, to make it unsigned.
const MXFP4_OFFSET: i16 = 12;

/// A table of signed bytes with `offset` added to each.
pub(super) const fn unsigned<const OFFSET: i16>(table: [i8; 16]) -> [u8; 16] {
    let mut shifted = [0; 16];
    let mut index = 0;
    while index < 16 {
        shifted[index] = (table[index] as i16 + OFFSET) as u8;
        index += 1;
    }
    shifted
}

/// [`IQ4_VALUES`] + 128.
pub(super) const IQ4_TABLE: [u8; 16] = unsigned::<128>(IQ4_VALUES);
const MXFP4_TABLE: [u8; 16] = unsigned::<MXFP4_OFFSET>(MXFP4_VALUES);

/// 16 bytes of nibbles at `packed` of each row: the low ones are the part's first 16 values, the high ones its last.
///
/// # Safety
/// As [`Format::unpack`].
#[inline(always)]
pub(super) unsafe fn nibbles<W: Words>(packed: *const u8, stride: usize) -> [W; 8] {
    // SAFETY: the caller's contract.
    unsafe {
        let words = W::load_four(packed, stride);
        let mut bytes = [W::splat(0); 8];
        for (index, word) in words.into_iter().enumerate() {
            bytes[index] = word.field(0, 0x0f0f_0f0f);
            bytes[4 + index] = word.field(4, 0x0f0f_0f0f);
        }
        bytes
    }
}

/// Nibbles with a fifth bit each: bit i of the word at `bits` belongs to value i.
///
/// # Safety
/// As [`Format::unpack`].
#[inline(always)]
unsafe fn five_bits<W: Words>(bits: *const u8, packed: *const u8, stride: usize) -> [W; 8] {
    // SAFETY: the caller's contract.
    unsafe {
        let fifth = W::load_each(bits, stride);
        let mut bytes = nibbles::<W>(packed, stride);
        for (index, bytes) in bytes.iter_mut().enumerate() {
            *bytes = bytes.or(fifth.shr(4 * index as u32).spread().shl(4));
        }
        bytes
    }
}

/// # Safety
/// As [`Words`].
#[inline(always)]
unsafe fn set_all<W: Words>(part: &mut Part, bytes: [W; 8]) {
    for (index, bytes) in bytes.into_iter().enumerate() {
        // SAFETY: the caller's contract.
        unsafe { part.set_bytes(index, bytes) };
    }
}

/// The f16 scale at the head of the block.
///
/// # Safety
/// As [`Format::unpack`].
#[inline(always)]
unsafe fn set_scale<W: Words>(part: &mut Part, block: *const u8, stride: usize) {
    // SAFETY: the caller's contract.
    unsafe { part.set_scale::<W>(W::load_each(block, stride).halves_to_floats()) }
}

/// The f16 scale and minimum at the head of the block.
///
/// # Safety
/// As [`Format::unpack`].
#[inline(always)]
unsafe fn set_scale_and_minimum<W: Words>(part: &mut Part, block: *const u8, stride: usize) {
    // SAFETY: the caller's contract.
    unsafe {
        let both = W::load_each(block, stride);
        part.set_scale::<W>(both.halves_to_floats());
        part.set_minimum::<W>(both.shr(16).halves_to_floats());
    }
}

impl Format for Q4_0 {
    const BYTES: usize = 18;
    const PARTS: usize = 1;
    const OFFSET: i16 = 8;
    const GREATEST: u8 = 15;

    #[inline(always)]
    unsafe fn unpack<W: Words>(block: *const u8, stride: usize, parts: &mut [Part]) {
        // SAFETY: the caller's contract.
        unsafe {
            set_all(&mut parts[0], nibbles::<W>(block.add(2), stride));
            set_scale::<W>(&mut parts[0], block, stride);
        }
    }
}

impl Format for Q4_1 {
    const BYTES: usize = 20;
    const PARTS: usize = 1;
    const OFFSET: i16 = 0;
    const GREATEST: u8 = 15;
    const MINIMA: Minima = Minima::Rounded;

    #[inline(always)]
    unsafe fn unpack<W: Words>(block: *const u8, stride: usize, parts: &mut [Part]) {
        // SAFETY: the caller's contract.
        unsafe {
            set_all(&mut parts[0], nibbles::<W>(block.add(4), stride));
            set_scale_and_minimum::<W>(&mut parts[0], block, stride);
        }
    }
}

impl Format for Q5_0 {
    const BYTES: usize = 22;
    const PARTS: usize = 1;
    const OFFSET: i16 = 16;
    const GREATEST: u8 = 31;

    #[inline(always)]
    unsafe fn unpack<W: Words>(block: *const u8, stride: usize, parts: &mut [Part]) {
        // SAFETY: the caller's contract.
        unsafe {
            set_all(&mut parts[0], five_bits::<W>(block.add(2), block.add(6), stride));
            set_scale::<W>(&mut parts[0], block, stride);
        }
    }
}

impl Format for Q5_1 {
    const BYTES: usize = 24;
    const PARTS: usize = 1;
    const OFFSET: i16 = 0;
    const GREATEST: u8 = 31;
    const MINIMA: Minima = Minima::Rounded;

    #[inline(always)]
    unsafe fn unpack<W: Words>(block: *const u8, stride: usize, parts: &mut [Part]) {
        // SAFETY: the caller's contract.
        unsafe {
            set_all(&mut parts[0], five_bits::<W>(block.add(4), block.add(8), stride));
            set_scale_and_minimum::<W>(&mut parts[0], block, stride);
        }
    }
}

impl Format for Q8_0 {
    const BYTES: usize = 34;
    const PARTS: usize = 1;
    const OFFSET: i16 = 128;
    const GREATEST: u8 = 255;

    #[inline(always)]
    unsafe fn unpack<W: Words>(block: *const u8, stride: usize, parts: &mut [Part]) {
        // SAFETY: the caller's contract.
        unsafe {
            // Adding 128 to a signed byte is flipping its highest bit.
            let flip = W::splat(0x8080_8080);
            for half in 0..2 {
                let words = W::load_four(block.add(2 + 16 * half), stride);
                for (index, word) in words.into_iter().enumerate() {
                    parts[0].set_bytes(4 * half + index, word.xor(flip));
                }
            }
            set_scale::<W>(&mut parts[0], block, stride);
        }
    }
}

impl Format for Iq4Nl {
    const BYTES: usize = 18;
    const PARTS: usize = 1;
    const OFFSET: i16 = 128;
    const GREATEST: u8 = 255;

    #[inline(always)]
    unsafe fn unpack<W: Words>(block: *const u8, stride: usize, parts: &mut [Part]) {
        // SAFETY: the caller's contract.
        unsafe {
            for (index, bytes) in nibbles::<W>(block.add(2), stride).into_iter().enumerate() {
                parts[0].set_bytes(index, bytes.look_up(&IQ4_TABLE));
            }
            set_scale::<W>(&mut parts[0], block, stride);
        }
    }
}

/// 2^(exponent − 64).
///
/// # Safety
/// As [`Words`]; the exponents are below 192.
#[inline(always)]
unsafe fn power<W: Words>(exponent: W) -> W::Floats {
    // SAFETY: the caller's contract.
    unsafe { exponent.add(W::splat(63)).shl(23).as_floats() }
}

impl Format for Mxfp4 {
    const BYTES: usize = 17;
    const PARTS: usize = 1;
    const OFFSET: i16 = MXFP4_OFFSET;
    const GREATEST: u8 = 24;

    #[inline(always)]
    unsafe fn unpack<W: Words>(block: *const u8, stride: usize, parts: &mut [Part]) {
        // SAFETY: the caller's contract.
        unsafe {
            for (index, bytes) in nibbles::<W>(block.add(1), stride).into_iter().enumerate() {
                parts[0].set_bytes(index, bytes.look_up(&MXFP4_TABLE));
            }
            // The scale is 2^(e − 128), perhaps subnormal: the exact product of two powers within range.
            let exponent = W::load_each(block, stride).field(0, 0xff);
            let half = exponent.shr(1);
            let rest = exponent.add(half.mul(W::splat(u32::MAX)));
            parts[0].set_scale::<W>(power(half).mul(power(rest)));
        }
    }
}
