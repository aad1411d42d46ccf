//! The exponential and what is built on it, on sixteen lanes, equal on every path.
//!
//! exp(x) = 2ⁿ · exp(r) with n = round(x / ln 2) and r in ±ln2/2, where exp(r) is a Taylor polynomial of
//! degree 7 (remainder below 2⁻²⁷). Error ≤ 1 ulp measured, ≤ 2 promised.

use crate::lanes::Lanes;

/// Above this exp would be infinite; it is taken as this, so that the result stays finite.
const GREATEST: f32 = 88.72;
/// Below this the result would be subnormal; it is zero.
const SMALLEST: f32 = -87.33;
/// 1.5 · 2²³: adding it leaves the nearest integer in the low mantissa bits.
const ROUNDER: f32 = 12_582_912.0;
/// ln 2 in two parts: the first has few enough bits that n · it is exact.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;

/// e to the power of each lane: 0 below −87.33, e^88.72 above 88.72, NaN of NaN.
///
/// # Safety
/// As [`Lanes`].
#[inline(always)]
pub(crate) unsafe fn exp<L: Lanes>(x: L) -> L {
    // SAFETY: the caller's contract.
    unsafe {
        // The bound comes first in min and max so that a NaN passes.
        let bounded = L::splat(SMALLEST).max(L::splat(GREATEST).min(x));
        let biased = bounded.mul_add(L::splat(std::f32::consts::LOG2_E), L::splat(ROUNDER));
        let n = biased.sub(L::splat(ROUNDER));
        let r = n.mul_add(L::splat(-LN_2_HIGH), bounded);
        let r = n.mul_add(L::splat(-LN_2_LOW), r);
        let mut sum = L::splat(1.0 / 5040.0);
        for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            sum = sum.mul_add(r, L::splat(coefficient));
        }
        sum.scale_by_power(biased).zero_where_below(x, SMALLEST)
    }
}

/// x · sigmoid(argument) = x / (1 + exp(−argument)).
///
/// # Safety
/// As [`Lanes`].
#[inline(always)]
pub(crate) unsafe fn times_sigmoid<L: Lanes>(x: L, argument: L) -> L {
    // SAFETY: the caller's contract.
    unsafe {
        let negated = L::splat(0.0).sub(argument);
        x.div(L::splat(1.0).add(exp(negated)))
    }
}

/// The error function by Abramowitz and Stegun 7.1.26: absolute error ≤ 5e-7 in f32.
///
/// # Safety
/// As [`Lanes`].
#[inline(always)]
pub(crate) unsafe fn erf<L: Lanes>(x: L) -> L {
    // SAFETY: the caller's contract.
    unsafe {
        let magnitude = x.abs();
        let t = L::splat(1.0).div(magnitude.mul_add(L::splat(0.327_591_1), L::splat(1.0)));
        let mut sum = L::splat(1.061_405_4);
        for coefficient in [-1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6] {
            sum = sum.mul_add(t, L::splat(coefficient));
        }
        let tail = sum.mul(t).mul(exp(L::splat(0.0).sub(magnitude.mul(magnitude))));
        let positive = L::splat(1.0).sub(tail);
        // erf is odd: for x < 0 the result is -positive. zero_where_below picks the half that holds.
        let zero = L::splat(0.0);
        let upper = positive.zero_where_below(x, 0.0);
        let lower = positive.sub(upper);
        upper.sub(zero.add(lower))
    }
}

/// Below this tanh is taken from its polynomial, above from the exponential.
const TANH_MIDDLE: f32 = 0.625;

/// The hyperbolic tangent: x + x³·p(x²) below 0.625, with p of degree 5 fitted to relative error 1e-9, above it
/// 1 − 2/(exp(2·|x|) + 1) with x's sign. Error ≤ 1.2 ulp measured, ≤ 2 promised; odd; ±1 at the infinities, NaN of NaN.
///
/// # Safety
/// As [`Lanes`].
#[inline(always)]
pub(crate) unsafe fn tanh<L: Lanes>(x: L) -> L {
    // SAFETY: the caller's contract.
    unsafe {
        let one = L::splat(1.0);
        let magnitude = x.abs();
        // Bounded, so that what is thrown away below is finite. The bound comes first so that a NaN passes.
        let near = L::splat(-1.0).max(one.min(x));
        let square = near.mul(near);
        let mut sum = L::splat(2.249_316_4e-3);
        for coefficient in [-8.305_101e-3, 2.175_692_7e-2, -5.395_777_6e-2, 0.133_332_97, -0.333_333_33] {
            sum = sum.mul_add(square, L::splat(coefficient));
        }
        let near = sum.mul(square).mul_add(near, near);
        let far = one.sub(L::splat(2.0).div(exp(magnitude.add(magnitude)).add(one)));
        // x's sign: far where x is positive, minus far where it is negative.
        let positive = far.zero_where_below(x, 0.0);
        let far = positive.sub(far.sub(positive)).zero_where_below(magnitude, TANH_MIDDLE);
        let near = near.sub(near.zero_where_below(magnitude, TANH_MIDDLE));
        near.add(far)
    }
}
