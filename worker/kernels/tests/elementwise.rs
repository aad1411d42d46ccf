//! Norms, rotary positions, activations, embedding and the small operations against f64 references.

mod common;

use common::*;
use forge_kernels::{ActivationKind, Backend, CpuPath, DType, KernelError, NormKind, NormParams, RopeParams, RopeStyle, Segments};

#[test]
fn norms_agree_with_f64_on_every_path() {
    let mut random = Random(21);
    for (rows, width) in [(1, 1), (3, 19), (70, 576)] {
        let mut x = random.normals(rows * width);
        x.iter_mut().for_each(|x| *x = *x * 3.0 + 1.0);
        let (weight, bias) = (random.normals(width), random.normals(width));
        for (kind, offset, affine) in
            [(NormKind::Rms, 0.0, true), (NormKind::Rms, 1.0, true), (NormKind::Layer, 0.0, true), (NormKind::Layer, 0.0, false)]
        {
            let params = NormParams { kind, eps: 1e-5, weight_offset: offset };
            let mut expected = Vec::new();
            for x in x.chunks(width) {
                let x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
                let n = width as f64;
                let mean = if kind == NormKind::Layer { x.iter().sum::<f64>() / n } else { 0.0 };
                let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
                for (column, x) in x.iter().enumerate() {
                    let normal = (x - mean) / (variance + 1e-5).sqrt();
                    let with_bias = if kind == NormKind::Layer { f64::from(bias[column]) } else { 0.0 };
                    expected.push(if affine { normal * f64::from(weight[column] + offset) + with_bias } else { normal });
                }
            }
            let mut first: Option<Vec<u32>> = None;
            for backend in backends() {
                let input = buffer(&backend, &x, width);
                let (w, b) = (backend.vector(&weight).unwrap(), backend.vector(&bias).unwrap());
                let mut out = backend.buffer(rows, width).unwrap();
                let with_bias = affine && kind == NormKind::Layer;
                backend.norm(&input, rows, affine.then_some(&w), with_bias.then_some(&b), params, &mut out).unwrap();
                let actual = read(&backend, &out, rows);
                assert!(relative_error(&actual, &expected) < 1e-5, "{kind:?} {rows}×{width}");
                assert_eq!(first.get_or_insert_with(|| bits(&actual)), &bits(&actual));
            }
        }
    }
}

#[test]
fn rope_rotates_as_defined() {
    let mut random = Random(22);
    for (style, heads, head_dim, rotary_dim) in
        [(RopeStyle::Neox, 3, 64, 64), (RopeStyle::Neox, 2, 20, 12), (RopeStyle::Gptj, 2, 16, 16), (RopeStyle::Gptj, 4, 24, 10)]
    {
        let params = RopeParams {
            style,
            rotary_dim,
            inverse_frequencies: (0..rotary_dim / 2).map(|i| 10_000_f32.powf(-2.0 * i as f32 / rotary_dim as f32)).collect(),
            attention_factor: 1.25,
            max_positions: 3000,
        };
        let positions = [0, 1, 17, 2999, 512];
        let x = random.normals(positions.len() * heads * head_dim);
        let mut expected: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
        for (row, &position) in positions.iter().enumerate() {
            for head in 0..heads {
                let at = (row * heads + head) * head_dim;
                for (pair, &frequency) in params.inverse_frequencies.iter().enumerate() {
                    let (i, j) = match style {
                        RopeStyle::Neox => (at + pair, at + pair + rotary_dim / 2),
                        RopeStyle::Gptj => (at + 2 * pair, at + 2 * pair + 1),
                    };
                    let angle = f64::from(position as f32 * frequency);
                    let (sin, cos) = (1.25 * angle.sin(), 1.25 * angle.cos());
                    let (a, b) = (f64::from(x[i]), f64::from(x[j]));
                    (expected[i], expected[j]) = (a * cos - b * sin, b * cos + a * sin);
                }
            }
        }
        let mut first: Option<Vec<u32>> = None;
        for backend in backends() {
            let table = backend.rope_table(&params).unwrap();
            let mut rotated = buffer(&backend, &x, heads * head_dim);
            backend.rope(&mut rotated, heads, head_dim, 0, &positions, &table).unwrap();
            let actual = read(&backend, &rotated, positions.len());
            assert!(relative_error(&actual, &expected) < 1e-6, "{style:?}");
            assert_eq!(first.get_or_insert_with(|| bits(&actual)), &bits(&actual));
            let beyond = backend.rope(&mut rotated, heads, head_dim, 0, &[3000], &table);
            assert!(matches!(beyond, Err(KernelError::Shape { operand: "table of positions", .. })));
        }
    }
}

#[test]
fn rope_tables_that_do_not_fit_are_refused() {
    let backend = backend(CpuPath::fastest(), 1);
    let params = |rotary_dim, frequencies: usize, max_positions| RopeParams {
        style: RopeStyle::Neox,
        rotary_dim,
        inverse_frequencies: vec![1.0; frequencies],
        attention_factor: 1.0,
        max_positions,
    };
    assert!(backend.rope_table(&params(8, 3, 10)).is_err());
    assert!(backend.rope_table(&params(7, 3, 10)).is_err());
    assert!(matches!(backend.rope_table(&params(8, 4, usize::MAX / 4)), Err(KernelError::OutOfMemory { .. })));
    let table = backend.rope_table(&params(8, 4, 10)).unwrap();
    let mut x = backend.buffer(1, 6).unwrap();
    assert!(backend.rope(&mut x, 1, 6, 0, &[0], &table).is_err(), "a head narrower than the rotated part");
}

/// erf by its Maclaurin series, in f64.
fn erf(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    if x.abs() > 5.0 { x.signum() } else { sum * std::f64::consts::FRAC_2_SQRT_PI }
}

#[test]
fn activations_agree_with_f64_on_every_path() {
    let gate: Vec<f32> = (-700..700).map(|index| index as f32 / 70.0).collect();
    let up: Vec<f32> = Random(23).normals(gate.len());
    for kind in [ActivationKind::Silu, ActivationKind::GeluErf, ActivationKind::GeluTanh, ActivationKind::Relu] {
        let expected: Vec<f64> = gate
            .iter()
            .map(|&x| {
                let x = f64::from(x);
                match kind {
                    ActivationKind::Silu => x / (1.0 + (-x).exp()),
                    ActivationKind::GeluErf => 0.5 * x * (1.0 + erf(x * std::f64::consts::FRAC_1_SQRT_2)),
                    ActivationKind::GeluTanh => {
                        let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
                        0.5 * x * (1.0 + inner.tanh())
                    }
                    ActivationKind::Relu => x.max(0.0),
                    ActivationKind::ClampedSwiglu { .. } => unreachable!(),
                }
            })
            .collect();
        let gated: Vec<f64> = expected.iter().zip(&up).map(|(a, u)| a * f64::from(*u)).collect();
        let mut first: Option<Vec<u32>> = None;
        for backend in backends() {
            for width in [14, 700] {
                let rows = gate.len() / width;
                let mut plain = buffer(&backend, &gate, width);
                backend.activate(&mut plain, rows, None, kind).unwrap();
                let plain = read(&backend, &plain, rows);
                for (actual, expected) in plain.iter().zip(&expected) {
                    assert!((f64::from(*actual) - expected).abs() < 4e-6, "{kind:?}: {actual} for {expected}");
                }
                let mut with_up = buffer(&backend, &gate, width);
                backend.activate(&mut with_up, rows, Some(&buffer(&backend, &up, width)), kind).unwrap();
                let with_up = read(&backend, &with_up, rows);
                assert!(relative_error(&with_up, &gated) < 1e-6, "{kind:?} with up");
                let all = bits(&[plain, with_up].concat());
                assert_eq!(first.get_or_insert_with(|| all.clone()), &all);
            }
        }
    }
}

#[test]
fn addition_and_gathering() {
    let mut random = Random(24);
    let (x, y) = (random.normals(300 * 150), random.normals(300 * 150));
    let expected: Vec<f32> = x.iter().zip(&y).map(|(x, y)| y.mul_add(0.7, *x)).collect();
    for backend in backends() {
        let mut sum = buffer(&backend, &x, 150);
        backend.add(&mut sum, &buffer(&backend, &y, 150), 200, 0.7).unwrap();
        let actual = read(&backend, &sum, 300);
        assert_eq!(bits(&actual[..200 * 150]), bits(&expected[..200 * 150]));
        assert_eq!(bits(&actual[200 * 150..]), bits(&x[200 * 150..]), "rows beyond the live ones stay");
        let mut out = backend.buffer(3, 150).unwrap();
        backend.gather_rows(&sum, &[7, 0, 299], &mut out).unwrap();
        let gathered = read(&backend, &out, 3);
        assert_eq!(gathered[..150], actual[7 * 150..8 * 150]);
        assert_eq!(gathered[300..], actual[299 * 150..]);
        assert!(backend.gather_rows(&sum, &[300], &mut out).is_err());
        assert!(backend.gather_rows(&sum, &[0; 4], &mut out).is_err());
        assert!(backend.add(&mut sum, &out, 4, 1.0).is_err());
        assert_eq!(backend.host_rows_mut(&mut sum, 2).unwrap().len(), 300);
        assert!(backend.host_rows_mut(&mut sum, 301).is_none());
    }
}

#[test]
fn embedding_dequantizes_every_format() {
    const WIDTH: usize = 256;
    let mut random = Random(25);
    let backend = backend(CpuPath::fastest(), 2);
    for dtype in DType::ALL {
        let bytes = random_matrix(&mut random, dtype, 10, WIDTH);
        let values = dequantize(&bytes, dtype);
        let table = backend.weight(source(bytes, dtype, 10, WIDTH, Segments::whole(WIDTH))).unwrap();
        let mut out = backend.buffer(4, WIDTH).unwrap();
        backend.embed(&table, 100..110, &[109, 100, 99, 110], 2.0, &mut out).unwrap();
        let actual = read(&backend, &out, 4);
        let expected: Vec<f32> = values[9 * WIDTH..].iter().chain(&values[..WIDTH]).map(|value| value * 2.0).collect();
        assert_eq!(bits(&actual[..2 * WIDTH]), bits(&expected), "{dtype}");
        assert!(actual[2 * WIDTH..].iter().all(|value| value.to_bits() == (-0.0_f32).to_bits()), "rows of other ranks");
        backend.embed_add(&table, &[3, 4], &mut out).unwrap();
        let added: Vec<f32> = expected.iter().zip(&values[3 * WIDTH..]).map(|(a, b)| a + b).collect();
        assert_eq!(bits(&read(&backend, &out, 2)), bits(&added), "{dtype}");
        assert!(backend.embed_add(&table, &[10], &mut out).is_err());
        assert!(backend.embed(&table, 0..11, &[0], 1.0, &mut out).is_err());
        assert!(backend.embed(&table, 0..10, &[0; 5], 1.0, &mut out).is_err());
    }
}

#[test]
fn buffers_check_their_rows() {
    let backend = backend(CpuPath::fastest(), 1);
    let mut buffer = backend.buffer(2, 3).unwrap();
    assert_eq!(backend.width(&buffer), 3);
    backend.write_rows(&mut buffer, 1..2, &[1.0, 2.0, 3.0]).unwrap();
    assert_eq!(read(&backend, &buffer, 2), [0.0, 0.0, 0.0, 1.0, 2.0, 3.0]);
    assert!(backend.write_rows(&mut buffer, 1..3, &[0.0; 6]).is_err());
    assert!(backend.write_rows(&mut buffer, 0..1, &[0.0; 4]).is_err());
    assert!(backend.read_rows(&buffer, 0..2, &mut [0.0; 5]).is_err());
    assert!(matches!(backend.buffer(usize::MAX, 2), Err(KernelError::OutOfMemory { .. })));
    assert!(matches!(backend.buffer(usize::MAX / 16, 2), Err(KernelError::OutOfMemory { .. })));
}
