use forge_kernels::RopeStyle;

use super::*;

fn spec(theta: f64, rotary_dim: usize, scaling: RopeScaling) -> RopeSpec {
    RopeSpec { style: RopeStyle::Neox, rotary_dim, theta, scaling }
}

fn close(actual: f32, expected: f64) {
    assert!((f64::from(actual) - expected).abs() <= 1e-6 * expected.abs(), "{actual} {expected}");
}

#[test]
fn plain_linear_and_stored_divisors() {
    let plain = spec(10_000.0, 64, RopeScaling::Default);
    let inverse = plain.inverse_frequencies(8, None);
    assert_eq!(inverse.len(), 32);
    close(inverse[16], 0.01);
    close(spec(10_000.0, 64, RopeScaling::Linear { factor: 4.0 }).inverse_frequencies(8, None)[16], 0.0025);
    let stored = spec(10_000.0, 64, RopeScaling::Tensor);
    close(stored.inverse_frequencies(8, Some(&[2.0; 32]))[16], 0.005);
    assert_eq!((stored.scaling.stored_divisors(), stored.scaling.stored_choice(8)), (&[ROPE_FREQS][..], Some(0)));
}

/// The bases that transformers 5.23 has for a factor of 4 over 2048 positions: spec E.2.
#[test]
fn the_dynamic_base_grows_beyond_the_trained_context() {
    let dynamic = spec(10_000.0, 64, RopeScaling::Dynamic { factor: 4.0, trained_context: 2048.0 });
    for (length, base) in [(16, 10_000.0), (2048, 10_000.0), (4096, 52_664.0), (8192, 141_214.0)] {
        let inverse = dynamic.inverse_frequencies(length, None);
        let found = f64::from(inverse[31]).powf(-64.0 / 62.0);
        assert!((found / base - 1.0f64).abs() < 1e-4, "{length}: {found}");
    }
    assert_eq!(dynamic.numerics_name(16), "dynamic@2048");
    assert_eq!(dynamic.numerics_name(4096), "dynamic@4096");
    assert!(spec(1e4, 2, dynamic.scaling.clone()).validate(2).is_err());
    assert!(spec(1e4, 64, RopeScaling::Dynamic { factor: 0.5, trained_context: 2048.0 }).validate(64).is_err());
}

#[test]
fn longrope_takes_its_long_list_where_more_is_served_than_the_original_context() {
    let side = |divisors: Option<Vec<f64>>, attention_factor| LongRopeSide { divisors, attention_factor };
    let longrope = |short, long| RopeScaling::LongRope { original_context: 32.0, short: side(short, 1.0), long: side(long, 1.25) };
    let given = spec(100.0, 4, longrope(Some(vec![1.0, 2.0]), Some(vec![4.0, 8.0])));
    assert!(given.validate(4).is_ok() && given.validate(2).is_err());
    close(given.inverse_frequencies(32, None)[1], 0.05);
    close(given.inverse_frequencies(33, None)[1], 0.0125);
    assert_eq!((given.attention_factor(32), given.attention_factor(33)), (1.0, 1.25));
    assert_eq!((given.numerics_name(32), given.numerics_name(33)), ("longrope-short".to_owned(), "longrope-long".to_owned()));
    assert_eq!(given.scaling.stored_choice(33), None);
    assert!(spec(100.0, 4, longrope(Some(vec![1.0]), Some(vec![4.0, 8.0]))).validate(4).is_err());
    assert!(spec(100.0, 4, longrope(Some(vec![1.0, 0.0]), Some(vec![4.0, 8.0]))).validate(4).is_err());

    let stored = spec(100.0, 4, longrope(None, None));
    assert_eq!(stored.scaling.stored_divisors(), LONG_ROPE_TENSORS);
    assert_eq!((stored.scaling.stored_choice(32), stored.scaling.stored_choice(33)), (Some(0), Some(1)));
    close(stored.inverse_frequencies(33, Some(&[1.0, 5.0]))[1], 0.02);
}

#[test]
fn yarn_keeps_short_waves_and_divides_long_ones() {
    let scaling = RopeScaling::Yarn {
        factor: 4.0,
        original_context: 2048.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor: yarn_magnitude(4.0, 1.0),
        truncate: true,
    };
    let yarn = spec(10_000.0, 64, scaling);
    let (plain, scaled) = (spec(10_000.0, 64, RopeScaling::Default).inverse_frequencies(8, None), yarn.inverse_frequencies(8, None));
    assert_eq!(plain[0], scaled[0]);
    close(scaled[31], f64::from(plain[31]) / 4.0);
    close(yarn.attention_factor(8), 0.1 * 4f64.ln() + 1.0);
    assert!(RopeSpec { theta: 1.0, ..yarn }.validate(64).is_err());
}
