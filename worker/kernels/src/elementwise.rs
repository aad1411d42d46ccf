//! Operations that treat each element alone: activations and scaled addition.

use crate::backend::ActivationKind;
#[cfg(test)]
use crate::exp::exp;
use crate::exp::{erf, times_sigmoid};
use crate::lanes::{LANES, Lanes, kernel};
#[cfg(test)]
pub(crate) use single::{erf_in_place, exp_in_place};

/// √(2/π), of the tanh approximation of GELU.
const ROOT_2_OVER_PI: f32 = 0.797_884_6;

/// One activation on sixteen lanes.
///
/// # Safety
/// As [`Lanes`].
#[inline(always)]
unsafe fn activation<L: Lanes>(kind: ActivationKind, x: L) -> L {
    // SAFETY: the caller's contract.
    unsafe {
        match kind {
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
        }
    }
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
            let mut value = activation(kind, L::load_partial(gate.add(start), width));
            if let Some(up) = up {
                value = value.mul(L::load_partial(up.add(start), width));
            }
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
