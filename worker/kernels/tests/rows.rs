//! Norms of heads, norms that ranks share, limits, caps and runs of columns, against f64 references.

mod common;

use common::*;
use forge_kernels::tree::share;
use forge_kernels::{
    ActivationKind, Backend, Columns, CpuBackend, CpuPath, HeadRuns, KernelError, NormKind, NormParams, RopeParams, RopeStyle, Segments,
};

#[test]
fn each_head_is_normalized_by_itself() {
    let mut random = Random(51);
    let (rows, heads, head_dim) = (20, 5, 24);
    let x = random.normals(rows * heads * head_dim);
    let (one, each) = (random.normals(head_dim), random.normals(heads * head_dim));
    for kind in [NormKind::Rms, NormKind::Layer] {
        let params = NormParams { kind, eps: 1e-5, weight_offset: 0.5 };
        for affine in [None, Some(&one), Some(&each)] {
            let mut first: Option<Vec<u32>> = None;
            for backend in backends() {
                let vector = affine.map(|values| backend.vector(values).unwrap());
                let mut normed = buffer(&backend, &x, heads * head_dim);
                backend.norm_heads(&mut normed, rows, heads, vector.as_ref(), vector.as_ref(), params).unwrap();
                let actual = read(&backend, &normed, rows);
                // Head by head through the norm of whole rows.
                for (index, head) in x.chunks(head_dim).enumerate() {
                    let input = buffer(&backend, head, head_dim);
                    let mut out = backend.buffer(1, head_dim).unwrap();
                    let part = affine.map(|values| {
                        let start = if values.len() == head_dim { 0 } else { index % heads * head_dim };
                        backend.vector(&values[start..start + head_dim]).unwrap()
                    });
                    backend.norm(&input, 1, part.as_ref(), part.as_ref(), params, &mut out).unwrap();
                    assert!(bits(&actual[index * head_dim..][..head_dim]) == bits(&read(&backend, &out, 1)), "{kind:?}, head {index}");
                }
                assert_eq!(first.get_or_insert_with(|| bits(&actual)), &bits(&actual));
            }
        }
    }
    let backend = backend(CpuPath::fastest(), 1);
    let mut x = buffer(&backend, &x, heads * head_dim);
    let params = NormParams { kind: NormKind::Rms, eps: 1e-5, weight_offset: 0.0 };
    let wrong = backend.vector(&[1.0; 25]).unwrap();
    assert!(backend.norm_heads(&mut x, rows, heads, Some(&wrong), None, params).is_err());
    assert!(backend.norm_heads(&mut x, rows, 7, None, None, params).is_err(), "120 columns are not seven heads");
    assert!(backend.norm_heads(&mut x, rows, 0, None, None, params).is_err());
}

/// Part of a row's columns: an RMS norm of which is all-reduced.
fn part(backend: &CpuBackend, x: &[f32], width: usize, columns: std::ops::Range<usize>) -> forge_kernels::CpuBuffer {
    let values: Vec<f32> = x.chunks(width).flat_map(|row| row[columns.clone()].to_vec()).collect();
    buffer(backend, &values, columns.len())
}

#[test]
fn ranks_that_share_a_norm_have_the_bits_of_one() {
    let mut random = Random(52);
    let rows = 9;
    let params = NormParams { kind: NormKind::Rms, eps: 1e-6, weight_offset: 1.0 };
    for (heads, head_dim) in [(1, 40), (3, 64), (7, 20), (8, 64)] {
        let width = heads * head_dim;
        let (x, weight) = (random.normals(rows * width), random.normals(width));
        let mut first: Option<Vec<u32>> = None;
        for backend in backends().iter().filter(|backend| backend.threads() == 1) {
            for ranks in [1, 2, 4, 8] {
                let shares = (0..ranks).map(|rank| share(heads, rank, ranks)).filter(|heads| !heads.is_empty());
                let shares: Vec<_> = shares.map(|heads| heads.start * head_dim..heads.end * head_dim).collect();
                let mut sums: Vec<Vec<f32>> = (0..ranks)
                    .map(|rank| {
                        let heads = share(heads, rank, ranks);
                        if heads.is_empty() {
                            return vec![-0.0; rows];
                        }
                        let segments = Segments::from_bounds((0..=heads.len()).map(|head| head * head_dim).collect()).unwrap();
                        let mut out = backend.buffer(rows, 1).unwrap();
                        let local = part(backend, &x, width, heads.start * head_dim..heads.end * head_dim);
                        backend.square_sums(&local, rows, &segments, &mut out).unwrap();
                        read(backend, &out, rows)
                    })
                    .collect();
                while sums.len() > 1 {
                    sums = sums.chunks(2).map(|pair| pair[0].iter().zip(&pair[1]).map(|(a, b)| a + b).collect()).collect();
                }
                let sums = buffer(backend, &sums[0], 1);
                let mut scaled = vec![0.0; rows * width];
                for columns in shares {
                    let mut local = part(backend, &x, width, columns.clone());
                    let weight = backend.vector(&weight[columns.clone()]).unwrap();
                    backend.scale_by_square_sums(&mut local, rows, &sums, width, &weight, params).unwrap();
                    for (row, values) in read(backend, &local, rows).chunks(columns.len()).enumerate() {
                        scaled[row * width..][columns.clone()].copy_from_slice(values);
                    }
                }
                assert_eq!(first.get_or_insert_with(|| bits(&scaled)), &bits(&scaled), "{heads} heads on {ranks} ranks");
                let expected: Vec<f64> = x
                    .chunks(width)
                    .flat_map(|row| {
                        let mean = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / width as f64;
                        let weight = &weight;
                        row.iter()
                            .enumerate()
                            .map(move |(column, &x)| f64::from(x) / (mean + 1e-6).sqrt() * (f64::from(weight[column]) + 1.0))
                    })
                    .collect();
                assert!(relative_error(&scaled, &expected) < 1e-6);
            }
        }
    }
}

#[test]
fn a_shared_norm_of_one_leaf_is_the_norm() {
    let mut random = Random(53);
    let backend = backend(CpuPath::fastest(), 2);
    let (x, weight) = (random.normals(5 * 576), backend.vector(&random.normals(576)).unwrap());
    let params = NormParams { kind: NormKind::Rms, eps: 1e-5, weight_offset: 0.0 };
    let mut shared = buffer(&backend, &x, 576);
    let (mut sums, mut out) = (backend.buffer(5, 1).unwrap(), backend.buffer(5, 576).unwrap());
    backend.norm(&shared, 5, Some(&weight), None, params, &mut out).unwrap();
    backend.square_sums(&shared, 5, &Segments::whole(576), &mut sums).unwrap();
    backend.scale_by_square_sums(&mut shared, 5, &sums, 576, &weight, params).unwrap();
    assert_eq!(bits(&read(&backend, &shared, 5)), bits(&read(&backend, &out, 5)));
    let layer = NormParams { kind: NormKind::Layer, ..params };
    assert!(matches!(backend.scale_by_square_sums(&mut shared, 5, &sums, 576, &weight, layer), Err(KernelError::Unsupported { .. })));
    assert!(backend.scale_by_square_sums(&mut shared, 5, &sums, 500, &weight, params).is_err(), "fewer columns than there are");
    assert!(backend.square_sums(&shared, 5, &Segments::whole(500), &mut sums).is_err());
}

#[test]
fn limits_and_caps_agree_with_f64_on_every_path() {
    let x: Vec<f32> = (-3000..3000).map(|index| index as f32 / 13.0).chain([f32::INFINITY, f32::NEG_INFINITY, 0.0]).collect();
    let capped = |x: f32, factor: f32, cap: f32| (f64::from(x) * f64::from(factor) / f64::from(cap)).tanh() * f64::from(cap);
    for (factor, cap) in [(1.0, Some(30.0)), (0.0625, None), (0.25, Some(5.0))] {
        let (mut scaled_bits, mut clamped_bits): (Option<Vec<u32>>, Option<Vec<u32>>) = (None, None);
        for backend in backends() {
            let mut scaled = buffer(&backend, &x, x.len());
            backend.scale_and_cap(&mut scaled, 1, factor, cap).unwrap();
            let actual = read(&backend, &scaled, 1);
            let finite = x.len() - 3;
            let expected: Vec<f64> =
                x[..finite].iter().map(|&x| cap.map_or(f64::from(x) * f64::from(factor), |cap| capped(x, factor, cap))).collect();
            assert!(relative_error(&actual[..finite], &expected) < 5e-7, "{factor} {cap:?}");
            if let Some(cap) = cap {
                assert_eq!(actual[finite..], [cap, -cap, 0.0]);
            }
            assert_eq!(scaled_bits.get_or_insert_with(|| bits(&actual)), &bits(&actual));
            let mut clamped = buffer(&backend, &x, x.len());
            backend.clamp(&mut clamped, 1, 8.5).unwrap();
            let actual = read(&backend, &clamped, 1);
            assert!(actual.iter().zip(&x).all(|(actual, x)| *actual == x.clamp(-8.5, 8.5)));
            assert_eq!(clamped_bits.get_or_insert_with(|| bits(&actual)), &bits(&actual));
            let mut nan = buffer(&backend, &[f32::NAN; 3], 3);
            backend.clamp(&mut nan, 1, 8.5).unwrap();
            backend.scale_and_cap(&mut nan, 1, factor, cap).unwrap();
            assert!(read(&backend, &nan, 1).iter().all(|x| x.is_nan()), "what is not a number stays none");
        }
    }
}

#[test]
fn the_clamped_unit_is_as_gpt_oss_has_it() {
    let gate: Vec<f32> = (-700..700).map(|index| index as f32 / 70.0).collect();
    let up: Vec<f32> = Random(54).normals(gate.len()).iter().map(|x| x * 6.0).collect();
    let kind = ActivationKind::ClampedSwiglu { limit: 7.0, alpha: 1.702 };
    let expected: Vec<f64> = gate
        .iter()
        .zip(&up)
        .map(|(&gate, &up)| {
            let (gate, up) = (f64::from(gate).min(7.0), f64::from(up).clamp(-7.0, 7.0));
            (up + 1.0) * gate / (1.0 + (-f64::from(1.702_f32) * gate).exp())
        })
        .collect();
    let mut first: Option<Vec<u32>> = None;
    for backend in backends() {
        let mut x = buffer(&backend, &gate, gate.len());
        backend.activate(&mut x, 1, Some(&buffer(&backend, &up, up.len())), kind).unwrap();
        let actual = read(&backend, &x, 1);
        assert!(relative_error(&actual, &expected) < 1e-6);
        assert_eq!(first.get_or_insert_with(|| bits(&actual)), &bits(&actual));
        assert!(backend.activate(&mut x, 1, None, kind).is_err(), "it has no form without up");
    }
}

#[test]
fn runs_of_columns_go_where_they_are_sent() {
    let backend = backend(CpuPath::fastest(), 1);
    let x = buffer(&backend, &(0..24).map(|index| index as f32).collect::<Vec<_>>(), 12);
    let mut out = backend.buffer(2, 10).unwrap();
    let runs = HeadRuns { heads: 3, width: 2 };
    backend.copy_columns(&x, 2, Columns { start: 1, stride: 4 }, &mut out, Columns { start: 2, stride: 3 }, runs).unwrap();
    assert_eq!(read(&backend, &out, 1), [0.0, 0.0, 1.0, 2.0, 0.0, 5.0, 6.0, 0.0, 9.0, 10.0]);
    backend.copy_columns(&x, 2, Columns { start: 10, stride: 0 }, &mut out, Columns { start: 0, stride: 4 }, runs).unwrap();
    assert_eq!(read(&backend, &out, 2)[10..], [22.0, 23.0, 13.0, 14.0, 22.0, 23.0, 18.0, 0.0, 22.0, 23.0]);
    let mut refused = |from, to, runs| {
        let result = backend.copy_columns(&x, 2, from, &mut out, to, runs);
        assert!(matches!(result, Err(KernelError::Shape { operation: "copy_columns", .. })), "{from:?} {to:?}");
    };
    let at = |start, stride| Columns { start, stride };
    refused(at(3, 4), at(0, 2), runs);
    refused(at(0, 4), at(5, 2), runs);
    refused(at(0, 4), at(0, 1), runs);
    refused(at(0, usize::MAX), at(0, 2), runs);
    backend.copy_columns(&x, 2, at(99, 0), &mut out, at(99, 0), HeadRuns { heads: 0, width: 2 }).unwrap();
}

#[test]
fn rotation_can_begin_within_a_head() {
    let mut random = Random(55);
    let (heads, plain, rotary) = (3, 10, 8);
    for style in [RopeStyle::Neox, RopeStyle::Gptj] {
        let params = RopeParams {
            style,
            rotary_dim: rotary,
            inverse_frequencies: vec![1.0, 0.1, 0.01, 0.001],
            attention_factor: 1.0,
            max_positions: 50,
        };
        let positions = [3, 49];
        let x = random.normals(2 * heads * (plain + rotary));
        for backend in backends() {
            let table = backend.rope_table(&params).unwrap();
            let mut whole = buffer(&backend, &x, heads * (plain + rotary));
            backend.rope(&mut whole, heads, plain + rotary, plain, &positions, &table).unwrap();
            let last: Vec<f32> = x.chunks(plain + rotary).flat_map(|head| head[plain..].to_vec()).collect();
            let mut alone = buffer(&backend, &last, heads * rotary);
            backend.rope(&mut alone, heads, rotary, 0, &positions, &table).unwrap();
            let alone = read(&backend, &alone, 2);
            for (index, (head, before)) in read(&backend, &whole, 2).chunks(plain + rotary).zip(x.chunks(plain + rotary)).enumerate() {
                assert_eq!(head[..plain], before[..plain]);
                assert_eq!(bits(&head[plain..]), bits(&alone[index * rotary..(index + 1) * rotary]));
            }
            assert!(backend.rope(&mut whole, heads, plain + rotary, plain + 1, &positions, &table).is_err());
        }
    }
}
