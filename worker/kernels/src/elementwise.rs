//! Operations that treat each element alone: activations, scaled addition, limits and caps.

use crate::backend::ActivationKind;
#[cfg(test)]
use crate::exp::exp;
use crate::exp::{erf, tanh, times_sigmoid};
use crate::lanes::{LANES, Lanes, kernel};
#[cfg(test)]
pub(crate) use single::{erf_in_place, exp_in_place, tanh_in_place};

/// √(2/π), of the tanh approximation of GELU.
const ROOT_2_OVER_PI: f32 = 0.797_884_6;

/// activation(gate) · up on sixteen lanes, or activation(gate).
///
/// # Safety
/// As [`Lanes`].
#[inline(always)]
unsafe fn activation<L: Lanes>(kind: ActivationKind, x: L, up: Option<L>) -> L {
    // SAFETY: the caller's contract.
    unsafe {
        let value = match kind {
            ActivationKind::ClampedSwiglu { limit, alpha } => {
                let x = L::splat(limit).min(x);
                let one = L::splat(1.0);
                let up = up.map_or(one, |up| limited(up, limit).add(one));
                return times_sigmoid(x, x.mul(L::splat(alpha))).mul(up);
            }
            ActivationKind::Silu => times_sigmoid(x, x),
            ActivationKind::GeluErf => {
                let phi = erf(x.mul(L::splat(std::f32::consts::FRAC_1_SQRT_2))).add(L::splat(1.0));
                x.mul(L::splat(0.5)).mul(phi)
            }
            // 0.5·x·(1 + tanh(u)) = x·sigmoid(2u), u = √(2/π)·(x + 0.044715·x³).
            ActivationKind::GeluTanh => {
                let inner = x.mul(x).mul_add(L::splat(0.044_715), L::splat(1.0)).mul(x);
                times_sigmoid(x, inner.mul(L::splat(2.0 * ROOT_2_OVER_PI)))
            }
            ActivationKind::Relu => x.max(L::splat(0.0)),
        };
        up.map_or(value, |up| value.mul(up))
    }
}

/// x within ±limit; NaN of NaN.
///
/// # Safety
/// As [`Lanes`].
#[inline(always)]
unsafe fn limited<L: Lanes>(x: L, limit: f32) -> L {
    // SAFETY: the caller's contract. The bound comes first so that a NaN passes.
    unsafe { L::splat(-limit).max(L::splat(limit).min(x)) }
}

/// # Safety
/// `gate` is writable, and `up` where given readable, for `count` elements.
#[inline(always)]
unsafe fn activate_body<L: Lanes>(kind: ActivationKind, gate: *mut f32, up: Option<*const f32>, count: usize) {
    let mut start = 0;
    while start < count {
        let width = LANES.min(count - start);
        // SAFETY: start + width ≤ count, and the caller's contract.
        unsafe {
            let up = up.map(|up| L::load_partial(up.add(start), width));
            let value = activation(kind, L::load_partial(gate.add(start), width), up);
            value.store_partial(gate.add(start), width);
        }
        start += width;
    }
}

kernel! {
    /// gate = activation(gate) · up.
    ///
    /// # Safety
    /// `gate` is writable, and `up` where given readable, for `count` elements.
    pub(crate) unsafe fn activate(kind: ActivationKind, gate: *mut f32, up: Option<*const f32>, count: usize) = activate_body
}

/// # Safety
/// `x` is writable and `y` readable for `count` elements.
#[inline(always)]
unsafe fn add_body<L: Lanes>(x: *mut f32, y: *const f32, count: usize, scale: f32) {
    let mut start = 0;
    while start < count {
        let width = LANES.min(count - start);
        // SAFETY: start + width ≤ count, and the caller's contract.
        unsafe {
            let sum = L::load_partial(y.add(start), width).mul_add(L::splat(scale), L::load_partial(x.add(start), width));
            sum.store_partial(x.add(start), width);
        }
        start += width;
    }
}

kernel! {
    /// x += y · scale, rounded once.
    ///
    /// # Safety
    /// `x` is writable and `y` readable for `count` elements.
    pub(crate) unsafe fn add_scaled(x: *mut f32, y: *const f32, count: usize, scale: f32) = add_body
}

/// # Safety
/// `x` is writable for `count` elements.
#[inline(always)]
unsafe fn clamp_body<L: Lanes>(x: *mut f32, count: usize, limit: f32) {
    for start in (0..count).step_by(LANES) {
        let width = LANES.min(count - start);
        // SAFETY: start + width ≤ count, and the caller's contract.
        unsafe { limited(L::load_partial(x.add(start), width), limit).store_partial(x.add(start), width) };
    }
}

kernel! {
    /// x within ±limit.
    ///
    /// # Safety
    /// `x` is writable for `count` elements.
    pub(crate) unsafe fn clamp(x: *mut f32, count: usize, limit: f32) = clamp_body
}

/// tanh(x / cap) · cap.
///
/// # Safety
/// As [`Lanes`].
#[inline(always)]
pub(crate) unsafe fn capped<L: Lanes>(x: L, cap: f32) -> L {
    // SAFETY: the caller's contract.
    unsafe { tanh(x.div(L::splat(cap))).mul(L::splat(cap)) }
}

/// # Safety
/// `x` is writable for `count` elements.
#[inline(always)]
unsafe fn scale_body<L: Lanes>(x: *mut f32, count: usize, factor: f32, cap: Option<f32>) {
    for start in (0..count).step_by(LANES) {
        let width = LANES.min(count - start);
        // SAFETY: start + width ≤ count, and the caller's contract.
        unsafe {
            let mut value = L::load_partial(x.add(start), width).mul(L::splat(factor));
            if let Some(cap) = cap {
                value = capped(value, cap);
            }
            value.store_partial(x.add(start), width);
        }
    }
}

kernel! {
    /// x = x · factor, then tanh(x / cap) · cap where there is a cap.
    ///
    /// # Safety
    /// `x` is writable for `count` elements.
    pub(crate) unsafe fn scale_and_cap(x: *mut f32, count: usize, factor: f32, cap: Option<f32>) = scale_body
}

/// In-place kernels of single functions, for the tests of their accuracy.
#[cfg(test)]
mod single {
    use super::*;

    /// # Safety
    /// `values` is writable for `count` elements.
    #[inline(always)]
    unsafe fn exp_body<L: Lanes>(values: *mut f32, count: usize) {
        for start in (0..count).step_by(LANES) {
            let width = LANES.min(count - start);
            // SAFETY: start + width ≤ count, and the caller's contract.
            unsafe { exp(L::load_partial(values.add(start), width)).store_partial(values.add(start), width) };
        }
    }

    /// # Safety
    /// `values` is writable for `count` elements.
    #[inline(always)]
    unsafe fn erf_body<L: Lanes>(values: *mut f32, count: usize) {
        for start in (0..count).step_by(LANES) {
            let width = LANES.min(count - start);
            // SAFETY: start + width ≤ count, and the caller's contract.
            unsafe { erf(L::load_partial(values.add(start), width)).store_partial(values.add(start), width) };
        }
    }

    /// # Safety
    /// `values` is writable for `count` elements.
    #[inline(always)]
    unsafe fn tanh_body<L: Lanes>(values: *mut f32, count: usize) {
        for start in (0..count).step_by(LANES) {
            let width = LANES.min(count - start);
            // SAFETY: start + width ≤ count, and the caller's contract.
            unsafe { tanh(L::load_partial(values.add(start), width)).store_partial(values.add(start), width) };
        }
    }

    kernel! {
        /// values = tanh(values).
        ///
        /// # Safety
        /// `values` is writable for `count` elements.
        pub(crate) unsafe fn tanh_in_place(values: *mut f32, count: usize) = tanh_body
    }

    kernel! {
        /// values = exp(values).
        ///
        /// # Safety
        /// `values` is writable for `count` elements.
        pub(crate) unsafe fn exp_in_place(values: *mut f32, count: usize) = exp_body
    }

    kernel! {
        /// values = erf(values).
        ///
        /// # Safety
        /// `values` is writable for `count` elements.
        pub(crate) unsafe fn erf_in_place(values: *mut f32, count: usize) = erf_body
    }
}
