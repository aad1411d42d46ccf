//! What every format is unpacked into: 16 rows' integers over 32 columns, with their scales in f32.
//!
//! A part is what the multiplication knows of a format: unsigned bytes from which the same number is taken off, one or
//! two integer scales, one f32 scale, and perhaps a minimum. It lives in the nearest cache and is used for all tokens.

use std::mem::MaybeUninit;

use super::words::Words;
use crate::lanes::{LANES, Lanes};

/// Columns of a part: a block of activations.
pub(crate) const PART: usize = crate::quantize::BLOCK;

/// Minima of a format: what is added beside scale · integers.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Minima {
    /// None.
    None,
    /// An f32 for every 32 columns, times the sum that is rounded to f16.
    Rounded,
    /// An f32 for every 32 columns.
    Float,
    /// An integer for every 16 columns, with a common f32 factor.
    Integer,
}

/// A block format of weights.
pub(crate) trait Format: Copy + Send + Sync + 'static {
    /// Bytes of a block.
    const BYTES: usize;
    /// Parts of a block.
    const PARTS: usize;
    /// Taken off every unpacked byte; 128 where bytes go beyond 127.
    const OFFSET: i16;
    /// Greatest unpacked byte.
    const GREATEST: u8;
    /// Whether each half of a part has an integer scale of its own (else bytes count as they are).
    const HALF_SCALES: bool = false;
    /// Minima.
    const MINIMA: Minima = Minima::None;

    /// Whether unpacked bytes go beyond 127.
    const WIDE: bool = Self::OFFSET == 128;

    /// Words whose dot products, of two bytes each, add up to no more than 16 bits hold.
    const GROUP: usize = if Self::WIDE { 1 } else { i16::MAX as usize / (2 * 127 * Self::GREATEST as usize) };

    /// Unpacks a block of 16 rows, the first at `block`, the next `stride` bytes on.
    ///
    /// # Safety
    /// As [`Words`]; the blocks are readable, and `parts` has [`Format::PARTS`] parts.
    unsafe fn unpack<W: Words>(block: *const u8, stride: usize, parts: &mut [Part]);
}

/// Sixteen words in memory; what a format does not use stays unwritten.
type Row16 = MaybeUninit<[u32; LANES]>;

/// 16 rows over 32 columns; lanes are rows.
#[repr(C, align(64))]
pub(crate) struct Part {
    /// Word j holds columns 4j to 4j + 3.
    bytes: [Row16; 8],
    /// f32.
    scale: Row16,
    /// f32.
    minimum: Row16,
    /// Signed integers, for the first and last 16 columns, as [`Words::dots_scale`] has them.
    half_scales: [Row16; 2],
    /// Two signed 16-bit integers, for the first and last 16 columns: with [`Format::HALF_SCALES`] −offset · scale,
    /// with [`Minima::Integer`] the minima.
    pair: Row16,
}

impl Part {
    /// Parts before anything is unpacked into them.
    pub(crate) const fn unwritten() -> Self {
        const WORDS: Row16 = MaybeUninit::uninit();
        Part { bytes: [WORDS; 8], scale: WORDS, minimum: WORDS, half_scales: [WORDS; 2], pair: WORDS }
    }

    /// # Safety
    /// As [`Words`].
    #[inline(always)]
    pub(super) unsafe fn set_bytes<W: Words>(&mut self, index: usize, bytes: W) {
        // SAFETY: the caller's contract.
        unsafe { bytes.store(self.bytes[index].as_mut_ptr().cast()) }
    }

    /// # Safety
    /// As [`Words`].
    #[inline(always)]
    pub(super) unsafe fn set_scale<W: Words>(&mut self, scale: W::Floats) {
        // SAFETY: the caller's contract.
        unsafe { scale.store(self.scale.as_mut_ptr().cast()) }
    }

    /// # Safety
    /// As [`Words`].
    #[inline(always)]
    pub(super) unsafe fn set_minimum<W: Words>(&mut self, minimum: W::Floats) {
        // SAFETY: the caller's contract.
        unsafe { minimum.store(self.minimum.as_mut_ptr().cast()) }
    }

    /// Signed scales of the two halves, and what takes `offset` off their bytes.
    ///
    /// # Safety
    /// As [`Words`].
    #[inline(always)]
    pub(super) unsafe fn set_half_scales<W: Words>(&mut self, first: W, last: W, offset: i16) {
        // SAFETY: the caller's contract.
        unsafe {
            first.dots_scale().store(self.half_scales[0].as_mut_ptr().cast());
            last.dots_scale().store(self.half_scales[1].as_mut_ptr().cast());
            let negative = W::splat(-i32::from(offset) as u32);
            self.set_pair(first.mul(negative).field(0, 0xffff), last.mul(negative));
        }
    }

    /// Two integers of at most 16 bits, the first without a sign or with its upper bits cleared.
    ///
    /// # Safety
    /// As [`Words`].
    #[inline(always)]
    pub(super) unsafe fn set_pair<W: Words>(&mut self, first: W, last: W) {
        // SAFETY: the caller's contract.
        unsafe { first.or(last.shl(16)).store(self.pair.as_mut_ptr().cast()) }
    }
}

/// Activations of consecutive tokens from some block on.
#[derive(Clone, Copy)]
pub(crate) struct TokenBlocks {
    /// Signed bytes of the first token.
    pub(crate) values: *const i8,
    /// Its scales.
    pub(crate) scales: *const f32,
    /// Its scale · Σ values, rounded to f16.
    pub(crate) rounded_sums: *const f32,
    /// Its scale · Σ values.
    pub(crate) sums: *const f32,
    /// Its Σ values of each half of a block, 16 bits each.
    pub(crate) half_sums: *const i32,
    /// Blocks per token: the next token is this many blocks on.
    pub(crate) blocks: usize,
}

impl TokenBlocks {
    /// The same from `blocks` blocks further on.
    ///
    /// # Safety
    /// They lie within the same allocations.
    #[inline(always)]
    pub(super) unsafe fn after(self, blocks: usize) -> Self {
        // SAFETY: the caller's contract.
        unsafe {
            TokenBlocks {
                values: self.values.add(blocks * PART),
                scales: self.scales.add(blocks),
                rounded_sums: self.rounded_sums.add(blocks),
                sums: self.sums.add(blocks),
                half_sums: self.half_sums.add(blocks),
                blocks: self.blocks,
            }
        }
    }
}

/// Adds the parts' products with M tokens to their accumulators, in order.
///
/// # Safety
/// As [`Words`]; the parts were unpacked by `F` on the same path, and M tokens with as many blocks and M accumulators
/// exist.
#[inline(always)]
pub(super) unsafe fn multiply<W: Words, F: Format, const M: usize>(parts: &[Part], tokens: TokenBlocks, accumulators: *mut W::Floats) {
    // SAFETY: part < parts.len(), m < M, and the caller's contract.
    unsafe {
        let mut sums: [W::Floats; M] = accumulators.cast::<[W::Floats; M]>().read();
        for (index, part) in parts.iter().enumerate() {
            let mut at = [0; M];
            for m in 0..M {
                at[m] = m * tokens.blocks + index;
            }
            let dots = dots::<W, F, M>(part, tokens, at);
            let scale = W::Floats::load(part.scale.as_ptr().cast());
            for m in 0..M {
                let scale = scale.mul(W::Floats::splat(*tokens.scales.add(at[m])));
                sums[m] = dots[m].to_floats().mul_add(scale, sums[m]);
            }
            if F::MINIMA != Minima::None {
                add_minima::<W, F, M>(part, tokens, at, &mut sums);
            }
        }
        accumulators.cast::<[W::Floats; M]>().write(sums);
    }
}

/// Exact integer products of a part with M tokens: half scales and offset are in them.
///
/// # Safety
/// As [`multiply`], with the tokens' blocks at `at`.
#[inline(always)]
unsafe fn dots<W: Words, F: Format, const M: usize>(part: &Part, tokens: TokenBlocks, at: [usize; M]) -> [W; M] {
    // SAFETY: the caller's contract.
    unsafe {
        let mut sums = [W::splat(0); M];
        let mut dots = [W::splat(0); M];
        // So that one token's dot products need not wait for each other; integers add up to the same.
        let two_chains = M == 1 && !W::NARROW_DOTS;
        let mut others = dots;
        for (index, bytes) in part.bytes.iter().enumerate() {
            let bytes = W::load(bytes.as_ptr().cast());
            let ends = index == 7 || F::HALF_SCALES && index == 3 || W::NARROW_DOTS && (index + 1) % F::GROUP == 0;
            for m in 0..M {
                let chain = if two_chains && index % 2 == 1 { &mut others[m] } else { &mut dots[m] };
                let values = tokens.values.add(at[m] * PART + 4 * index);
                *chain = if F::WIDE { bytes.dot::<true>(values, *chain) } else { bytes.dot::<false>(values, *chain) };
                if ends {
                    let all = if two_chains { dots[m].add(others[m]) } else { dots[m] };
                    sums[m] = if F::HALF_SCALES {
                        sums[m].add_scaled_dots(all, W::load(part.half_scales[index / 4].as_ptr().cast()))
                    } else {
                        sums[m].add_dots(all)
                    };
                    (dots[m], others[m]) = (W::splat(0), W::splat(0));
                }
            }
        }
        if F::OFFSET != 0 && !(F::WIDE && W::DOT_TAKES_OFF_128) {
            let negative = u32::from((-F::OFFSET) as u16);
            let pair = if F::HALF_SCALES { W::load(part.pair.as_ptr().cast()) } else { W::splat(negative << 16 | negative) };
            for m in 0..M {
                sums[m] = pair.dot_pair(tokens.half_sums.add(at[m]), sums[m]);
            }
        }
        sums
    }
}

/// Adds a part's minima times the sums of the activations.
///
/// # Safety
/// As [`dots`].
#[inline(always)]
unsafe fn add_minima<W: Words, F: Format, const M: usize>(part: &Part, tokens: TokenBlocks, at: [usize; M], sums: &mut [W::Floats; M]) {
    // SAFETY: the caller's contract.
    unsafe {
        let minimum = W::Floats::load(part.minimum.as_ptr().cast());
        for m in 0..M {
            if F::MINIMA == Minima::Integer {
                let minima = W::load(part.pair.as_ptr().cast()).dot_pair(tokens.half_sums.add(at[m]), W::splat(0));
                let scale = minimum.mul(W::Floats::splat(*tokens.scales.add(at[m])));
                sums[m] = minima.to_floats().mul_add(scale, sums[m]);
            } else {
                let activations = if F::MINIMA == Minima::Rounded { tokens.rounded_sums } else { tokens.sums };
                sums[m] = minimum.mul_add(W::Floats::splat(*activations.add(at[m])), sums[m]);
            }
        }
    }
}
