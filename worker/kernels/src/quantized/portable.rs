//! Integer dot products in plain Rust.

use super::{BlockDots, Format, RowBlocks, RowPointers, TokenBlocks};
use crate::lanes::{LANES, Lanes, Portable};
use crate::quantize::BLOCK;

/// One block's values as integers.
///
/// # Safety
/// `block` is readable for `F::BYTES`.
#[inline(always)]
unsafe fn unpack<F: Format>(block: *const u8) -> [i8; BLOCK] {
    let mut values = [0; BLOCK];
    // SAFETY: the values lie within the block.
    unsafe {
        let packed = block.add(F::VALUES);
        if F::NIBBLES {
            for index in 0..BLOCK / 2 {
                let byte = *packed.add(index);
                values[index] = (byte & 15) as i8 - F::OFFSET as i8;
                values[index + BLOCK / 2] = (byte >> 4) as i8 - F::OFFSET as i8;
            }
        } else {
            values = packed.cast::<[i8; BLOCK]>().read_unaligned();
        }
    }
    values
}

impl BlockDots for Portable {
    type Values = RowPointers;

    #[inline(always)]
    unsafe fn load_rows<F: Format>(weights: *const u8, stride: usize) -> RowBlocks<Self> {
        // SAFETY: the caller's contract.
        unsafe { RowPointers::load::<Self, F>(weights, stride) }
    }

    #[inline(always)]
    unsafe fn dots<F: Format, const M: usize>(rows: &RowPointers, tokens: TokenBlocks) -> [Self; M] {
        let mut dots = [[0_i32; LANES]; M];
        for lane in 0..LANES {
            // SAFETY: 16 rows and M tokens exist, by contract.
            unsafe {
                let row = unpack::<F>(rows.first.add(lane * rows.stride));
                for (m, dots) in dots.iter_mut().enumerate() {
                    let values = tokens.values.add(m * tokens.blocks * BLOCK).cast::<[i8; BLOCK]>().read_unaligned();
                    dots[lane] = row.iter().zip(values).map(|(&w, a)| i32::from(w) * i32::from(a)).sum();
                }
            }
        }
        // SAFETY: each array holds 16 integers.
        dots.map(|dots| unsafe { Portable::from_i32(dots.as_ptr()) })
    }
}
