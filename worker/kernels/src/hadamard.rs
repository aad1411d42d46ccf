//! The Walsh-Hadamard rotation that keys and values undergo before they become bytes.
//!
//! One scale for a whole head's row serves a few large values and robs the others of precision. The rotation spreads
//! every value over all dimensions, so that no dimension stands out. It is its own inverse and keeps dot products:
//! queries are rotated as keys are, and an output, a sum of rotated values, is rotated back.
//!
//! Invariant: it is sums and differences in one order, in plain Rust, so every instruction set gives the same bits.

use crate::lanes::LANES;

/// Whether rows of this width are rotated: powers of two are.
pub(crate) fn rotates(width: usize) -> bool {
    width.is_power_of_two()
}

/// Rotates a row in place, if rows of its width are: x = H·x / √width.
#[inline(always)]
pub(crate) fn rotate(x: &mut [f32]) {
    if !rotates(x.len()) {
        return;
    }
    let mut half = 1;
    if x.len() >= LANES {
        for lanes in x.as_chunks_mut::<LANES>().0 {
            *lanes = sums::<8>(sums::<4>(sums::<2>(sums::<1>(*lanes))));
        }
        half = LANES;
    }
    while half < x.len() {
        for pair in x.chunks_exact_mut(2 * half) {
            let (low, high) = pair.split_at_mut(half);
            for (low, high) in low.iter_mut().zip(high) {
                (*low, *high) = (*low + *high, *low - *high);
            }
        }
        half *= 2;
    }
    let factor = 1.0 / (x.len() as f32).sqrt();
    for value in x {
        *value *= factor;
    }
}

/// Sums and differences of lanes HALF apart, written so that the compiler finds the shuffle, the signs and the addition.
#[inline(always)]
fn sums<const HALF: usize>(x: [f32; LANES]) -> [f32; LANES] {
    let other: [f32; LANES] = std::array::from_fn(|lane| x[lane ^ HALF]);
    let signed: [f32; LANES] = std::array::from_fn(|lane| if lane & HALF == 0 { x[lane] } else { -x[lane] });
    std::array::from_fn(|lane| other[lane] + signed[lane])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_the_matrix_and_is_its_own_inverse() {
        for width in [1, 2, 8, 16, 64, 128, 256] {
            let x: Vec<f32> = (0..width).map(|index| ((index * 37 + 11) % 29) as f32 - 14.0).collect();
            let mut rotated = x.clone();
            rotate(&mut rotated);
            for (row, &actual) in rotated.iter().enumerate() {
                let sign = |column: usize| if (row & column).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
                let exact: f64 = x.iter().enumerate().map(|(column, &x)| sign(column) * f64::from(x)).sum();
                assert!((f64::from(actual) - exact / (width as f64).sqrt()).abs() < 1e-4, "{width}: row {row}");
            }
            rotate(&mut rotated);
            assert!(x.iter().zip(&rotated).all(|(x, back)| (x - back).abs() < 1e-4), "{width}");
        }
        let mut odd = [1.0, 2.0, 3.0];
        rotate(&mut odd);
        assert_eq!(odd, [1.0, 2.0, 3.0], "rows of other widths stay as they are");
    }
}
