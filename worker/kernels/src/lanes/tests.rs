//! The paths against each other, and the exponential, error function and hyperbolic tangent against f64.

use crate::elementwise::{erf_in_place, exp_in_place, tanh_in_place};
use crate::lanes::{LANES, Lanes};
use crate::path::CpuPath;

/// Values that exercise signs, ties, magnitudes from subnormal to huge, and both infinities.
fn samples() -> Vec<f32> {
    let mut values = vec![0.0, -0.0, 0.5, -0.5, 1.5, 2.5, -2.5, 65504.0, 65520.0, 1e-8, -6e-8, 1e-40, 3e38, -3e38];
    values.extend([f32::INFINITY, f32::NEG_INFINITY]);
    let mut state = 1_u32;
    while values.len() < 40 * LANES {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        values.push((state as i32 as f32) * 10_f32.powi((state % 60) as i32 - 40));
    }
    values
}

/// Applies every operation to three vectors at `x` and appends the results' bits.
///
/// # Safety
/// `x` holds 48 values.
#[inline(always)]
unsafe fn all_operations<L: Lanes>(x: *const f32, results: &mut Vec<u32>) {
    // SAFETY: 48 values are readable; every result array holds 16.
    unsafe {
        let (a, b, c) = (L::load(x), L::load(x.add(16)), L::load(x.add(32)));
        let vectors = [
            a.add(b),
            a.sub(b),
            a.mul(b),
            a.div(b),
            a.mul_add(b, c),
            a.max(b),
            a.min(b),
            a.abs(),
            a.round_ties_even(),
            a.zero_where_below(b, 0.25),
            a.keep(3, 11, 7.0),
            a.keep(0, 16, 7.0),
            a.keep(9, 9, 7.0),
            L::load_partial(x, 5),
            L::load_f16(x.cast()),
            L::load_f16_partial(x.cast(), 7),
            L::load_bf16(x.cast()),
            L::load_i8(x.cast()),
            L::load_i8_partial(x.cast(), 9),
            L::load_f8e4m3(x.cast()),
            L::from_i32(x.cast()),
        ];
        for vector in vectors {
            let mut out = [0.0_f32; LANES];
            vector.store(out.as_mut_ptr());
            // A NaN's sign and payload are not part of the promise.
            results.extend(out.map(|value| if value.is_nan() { u32::MAX } else { value.to_bits() }));
        }
        let mut halves = [0_u16; LANES];
        a.store_f16(halves.as_mut_ptr());
        results.extend(halves.map(u32::from));
        let mut partial = [1.0_f32; LANES];
        a.store_partial(partial.as_mut_ptr(), 6);
        results.extend(partial.map(f32::to_bits));
        let mut bytes = [0_i8; LANES];
        L::splat(127.0).min(L::splat(-127.0).max(a)).round_ties_even().store_i8(bytes.as_mut_ptr());
        results.extend(bytes.map(|byte| byte as u32));
        let bounded = L::splat(1e30).min(L::splat(-1e30).max(a));
        results.extend([bounded.sum().to_bits(), bounded.greatest().to_bits()]);
    }
}

kernel! {
    /// # Safety
    /// `x` holds 48 values.
    unsafe fn run_all(x: *const f32, results: &mut Vec<u32>) = all_operations
}

fn supported() -> impl Iterator<Item = CpuPath> {
    CpuPath::ALL.into_iter().filter(|path| path.is_supported())
}

#[test]
fn every_operation_has_equal_bits_on_every_path() {
    let samples = samples();
    for window in samples.windows(48) {
        let results: Vec<Vec<u32>> = supported()
            .map(|path| {
                let mut results = Vec::new();
                // SAFETY: the window holds 48 values.
                unsafe { run_all(path, window.as_ptr(), &mut results) };
                results
            })
            .collect();
        assert!(results.iter().all(|result| *result == results[0]), "at {window:?}");
    }
}

/// Runs an in-place kernel on every path, checks that the paths agree, and returns the values.
fn on_all_paths(values: &[f32], kernel: unsafe fn(CpuPath, *mut f32, usize)) -> Vec<f32> {
    let mut results = supported().map(|path| {
        let mut values = values.to_vec();
        // SAFETY: the kernel writes `values.len()` elements.
        unsafe { kernel(path, values.as_mut_ptr(), values.len()) };
        values
    });
    let first = results.next().expect("the portable path is always there");
    for other in results {
        assert!(first.iter().zip(&other).all(|(a, b)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())));
    }
    first
}

#[test]
fn exp_is_within_two_units_in_the_last_place() {
    let x: Vec<f32> = (0..400_000).map(|index| -87.3 + index as f32 * (176.0 / 400_000.0)).collect();
    let mut worst = 0.0_f64;
    for (x, y) in x.iter().zip(on_all_paths(&x, exp_in_place)) {
        let exact = f64::from(*x).exp();
        let unit = f64::from(f32::from_bits((exact as f32).to_bits() + 1)) - f64::from(exact as f32);
        worst = worst.max((f64::from(y) - exact).abs() / unit);
    }
    assert!(worst <= 2.0, "{worst} units in the last place");
}

#[test]
fn exp_at_the_edges() {
    let result = on_all_paths(&[f32::NEG_INFINITY, -1e30, -88.0, 0.0, -0.0, 100.0, f32::INFINITY, f32::NAN], exp_in_place);
    assert_eq!(result[..5], [0.0, 0.0, 0.0, 1.0, 1.0]);
    assert!(result[5] > 3.3e38 && result[5].is_finite() && result[6] == result[5]);
    assert!(result[7].is_nan());
}

#[test]
fn erf_is_within_a_millionth() {
    // erf by its Maclaurin series in f64: converges well on |x| ≤ 4, beyond which erf is ±1 to 1e-7.
    let series = |x: f64| {
        let (mut term, mut sum) = (x, x);
        for n in 1..120 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI
    };
    let x: Vec<f32> = (-4_000..=4_000).map(|index| index as f32 / 1000.0).collect();
    for (x, y) in x.iter().zip(on_all_paths(&x, erf_in_place)) {
        assert!((f64::from(y) - series(f64::from(*x))).abs() < 1e-6, "erf({x}) = {y}");
    }
    assert_eq!(on_all_paths(&[-30.0, 30.0, f32::INFINITY], erf_in_place), [-1.0, 1.0, 1.0]);
}

#[test]
fn tanh_is_within_two_units_in_the_last_place() {
    let mut x: Vec<f32> = (0..400_000).map(|index| -10.0 + index as f32 * (20.0 / 400_000.0)).collect();
    x.extend((0..40_000).map(|index| 1e-6 * 1.0004_f32.powi(index - 20_000)));
    let mut worst = 0.0_f64;
    for (x, y) in x.iter().zip(on_all_paths(&x, tanh_in_place)) {
        let exact = f64::from(*x).tanh();
        let magnitude = (exact as f32).abs();
        let unit = f64::from(f32::from_bits(magnitude.to_bits() + 1)) - f64::from(magnitude);
        worst = worst.max((f64::from(y) - exact).abs() / unit);
    }
    assert!(worst <= 2.0, "{worst} units in the last place");
    let edges = on_all_paths(&[f32::NEG_INFINITY, f32::INFINITY, -1e30, 1e30, 0.0, -0.0, 1e-40, f32::NAN], tanh_in_place);
    assert_eq!(edges[..7], [-1.0, 1.0, -1.0, 1.0, 0.0, 0.0, 1e-40]);
    assert!(edges[7].is_nan());
}
