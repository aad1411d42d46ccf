//! Products against plain references, and the invariance of their bits.

mod common;

use common::*;
use forge_kernels::tree::{even_leaves, merges_after, share};
use forge_kernels::{Backend, CpuPath, DType, Product, Segments};
use half::f16;
use proptest::prelude::*;

/// A block of activations as the format's products see it: values, scale, scale · sum, and that before the scale was
/// rounded, in f16.
struct QuantizedBlock {
    values: Vec<i32>,
    scale: f32,
    sum: f32,
    rounded_sum: f32,
}

fn quantize_block(x: &[f32]) -> QuantizedBlock {
    let greatest = x.iter().fold(0.0_f32, |a, b| a.max(b.abs()));
    let tiny = greatest < 127.0 * f32::MIN_POSITIVE;
    let scale = if tiny { 0.0 } else { greatest / 127.0 };
    let inverse = if tiny { 0.0 } else { 127.0 / greatest };
    let values: Vec<i32> = x.iter().map(|x| (x * inverse).round_ties_even() as i32).collect();
    let sum: i32 = values.iter().sum();
    let rounded_sum = f16::from_f32(scale * sum as f32).to_f32();
    let scale = f16::from_f32(scale).to_f32();
    QuantizedBlock { values, scale, sum: scale * sum as f32, rounded_sum }
}

/// 32 weights as the documentation splits them: value = scale · integer + minimum, or, where `minima` holds an integer
/// of each half, scale · integer + minimum · minima.
struct WeightPart {
    integers: Vec<i32>,
    scale: f32,
    minimum: Option<f32>,
    minima: Option<[i32; 2]>,
    /// Whether the minimum multiplies the sum that was rounded to f16.
    rounded: bool,
}

/// A type's block with its f16 scales replaced: by `d`, and all minima by `minimum`.
fn with_scales(dtype: DType, block: &[u8], d: f32, minimum: f32) -> Vec<u8> {
    let mut changed = block.to_vec();
    for (&at, scale) in half_scales(dtype).iter().zip([d, minimum]) {
        changed[at..at + 2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
    }
    changed
}

/// The parts of a block, found through its dequantized values, which golden files pin: at d = 1 and no minimum a value
/// is its integer, at d = 0 it is its minimum.
fn weight_parts(dtype: DType, block: &[u8]) -> Vec<WeightPart> {
    let half_at = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
    if dtype == DType::MXFP4 {
        let mut at_one = block.to_vec();
        at_one[0] = 128;
        let integers = dequantize(&at_one, dtype).iter().map(|&value| value as i32).collect();
        let scale = 2.0_f32.powi(i32::from(block[0]) - 128);
        return vec![WeightPart { integers, scale, minimum: None, minima: None, rounded: false }];
    }
    let scales = half_scales(dtype);
    let d = half_at(scales[0]);
    let integers = dequantize(&with_scales(dtype, block, 1.0, 0.0), dtype);
    let minima = dequantize(&with_scales(dtype, block, 0.0, 1.0), dtype);
    let minimum = scales.get(1).map(|&at| half_at(at));
    let parts = integers.chunks_exact(32).zip(minima.chunks_exact(32)).enumerate();
    parts
        .map(|(part, (integers, minima))| {
            let mut integers: Vec<i32> = integers.iter().map(|&value| value as i32).collect();
            // Types with one integer scale for the part have it in their f32 scale.
            let part_scale = match dtype {
                DType::Q4_K | DType::Q5_K => i32::from(six_bit_scale(&block[4..16], part)),
                DType::IQ4_XS => {
                    let low = block[4 + part / 2] >> (part % 2 * 4) & 15;
                    let high = u16::from_le_bytes([block[2], block[3]]) >> (2 * part) & 3;
                    i32::from(low) + i32::from(high) * 16 - 32
                }
                _ => 1,
            };
            if part_scale != 0 {
                integers.iter_mut().for_each(|integer| *integer /= part_scale);
            }
            let scale = d * part_scale as f32;
            match (dtype, minimum) {
                (DType::Q2_K, Some(dmin)) => {
                    let minima = [minima[0] as i32, minima[16] as i32].map(|minimum| -minimum);
                    WeightPart { integers, scale, minimum: Some(-dmin), minima: Some(minima), rounded: false }
                }
                (_, Some(factor)) => {
                    WeightPart { integers, scale, minimum: Some(minima[0] * factor), minima: None, rounded: dtype.block_elements() == 32 }
                }
                _ => WeightPart { integers, scale, minimum: None, minima: None, rounded: false },
            }
        })
        .collect()
}

/// The integer scale of part `part` of Q4_K and Q5_K.
fn six_bit_scale(scales: &[u8], part: usize) -> u8 {
    if part < 4 { scales[part] & 63 } else { scales[part + 4] & 15 | scales[part - 4] >> 6 << 4 }
}

/// Adds leaves in the tree's order.
fn tree_sum(leaves: &[f32]) -> f32 {
    let mut stack: Vec<f32> = Vec::new();
    for (leaf, merges) in leaves.iter().zip(merges_after(leaves.len())) {
        stack.push(*leaf);
        for _ in 0..merges {
            let (b, a) = (stack.pop().unwrap(), stack.pop().unwrap());
            stack.push(a + b);
        }
    }
    assert_eq!(stack.len(), 1);
    stack[0]
}

/// One output of a quantized product, by the formulas of the crate's documentation.
fn quantized_reference(parts: &[WeightPart], x: &[QuantizedBlock], bounds: &[usize]) -> f32 {
    let leaves: Vec<f32> = bounds
        .windows(2)
        .map(|leaf| {
            (leaf[0] / 32..leaf[1] / 32).fold(0.0_f32, |sum, index| {
                let (part, a) = (&parts[index], &x[index]);
                let dot: i32 = part.integers.iter().zip(&a.values).map(|(w, a)| w * a).sum();
                let sum = (dot as f32).mul_add(part.scale * a.scale, sum);
                match (part.minimum, part.minima) {
                    (None, _) => sum,
                    (Some(minimum), None) => minimum.mul_add(if part.rounded { a.rounded_sum } else { a.sum }, sum),
                    (Some(minimum), Some(minima)) => {
                        let half = |half: usize| -> i32 { a.values[16 * half..16 * half + 16].iter().sum() };
                        let minima = minima[0] * half(0) + minima[1] * half(1);
                        (minima as f32).mul_add(minimum * a.scale, sum)
                    }
                }
            })
        })
        .collect();
    tree_sum(&leaves)
}

/// One output of a dense product, by the formulas of the crate's documentation.
fn dense_reference(weights: &[f32], x: &[f32], bounds: &[usize]) -> f32 {
    let leaves: Vec<f32> = bounds
        .windows(2)
        .map(|leaf| {
            let mut lanes = [0.0_f32; 16];
            for column in leaf[0]..leaf[1] {
                let lane = &mut lanes[(column - leaf[0]) % 16];
                *lane = weights[column].mul_add(x[column], *lane);
            }
            for half in [8, 4, 2, 1] {
                for lane in 0..half {
                    lanes[lane] += lanes[lane + half];
                }
            }
            lanes[0]
        })
        .collect();
    tree_sum(&leaves)
}

fn reference(dtype: DType, bytes: &[u8], x: &[f32], rows: usize, columns: usize, bounds: &[usize], bias: Option<&[f32]>) -> Vec<f32> {
    let dense = dequantize(bytes, dtype);
    let parts: Vec<WeightPart> = match dtype.is_quantized() {
        true => bytes.chunks_exact(dtype.block_bytes()).flat_map(|block| weight_parts(dtype, block)).collect(),
        false => Vec::new(),
    };
    let mut out = Vec::new();
    for x in x.chunks_exact(columns) {
        let blocks: Vec<QuantizedBlock> = x.chunks(32).map(quantize_block).collect();
        for row in 0..rows {
            let sum = if dtype.is_quantized() {
                quantized_reference(&parts[row * columns / 32..][..columns / 32], &blocks, bounds)
            } else {
                dense_reference(&dense[row * columns..][..columns], x, bounds)
            };
            out.push(bias.map_or(sum, |bias| sum + bias[row]));
        }
    }
    out
}

/// Leaf boundaries of a product split into up to 8 leaves of whole blocks.
fn bounds(dtype: DType, columns: usize, split: bool) -> Vec<usize> {
    if !split {
        return vec![0, columns];
    }
    let block = dtype.block_elements();
    even_leaves(columns / block).into_iter().map(|bound| bound * block).collect()
}

/// Columns of about `blocks` · 32 values: whole blocks, or `tail` fewer for a dense type.
fn columns(dtype: DType, blocks: usize, tail: usize) -> usize {
    match dtype.block_elements() {
        1 => blocks * 32 - tail,
        block => (blocks * 32).next_multiple_of(block),
    }
}

#[test]
fn every_path_equals_the_formulas_bit_for_bit() {
    let mut random = Random(1);
    for backend in backends() {
        for dtype in DType::ALL {
            for (rows, blocks, tokens) in [(1, 1, 1), (5, 3, 2), (16, 2, 3), (17, 9, 5), (40, 18, 9), (67, 11, 37), (6, 33, 70)] {
                let columns = columns(dtype, blocks, 5);
                let bytes = random_matrix(&mut random, dtype, rows, columns);
                let x = random.normals(tokens * columns);
                let bias = random.normals(rows);
                for split in [false, true] {
                    let bounds = bounds(dtype, columns, split);
                    let segments = Segments::from_bounds(bounds.clone()).unwrap();
                    let weight = backend.weight(source(bytes.clone(), dtype, rows, columns, segments)).unwrap();
                    let bias = split.then_some(&bias[..]);
                    let actual = product(&backend, &weight, &x, tokens, rows, bias);
                    let expected = reference(dtype, &bytes, &x, rows, columns, &bounds, bias);
                    assert_eq!(bits(&actual), bits(&expected), "{} {dtype} {rows}×{columns}×{tokens}", backend.path());
                }
            }
        }
    }
}

/// One token of such a row is more than the activations that a core keeps at hand.
#[test]
fn rows_wider_than_the_cache_end() {
    let (rows, columns, tokens) = (3, 8200 * 32, 2);
    let mut random = Random(2);
    for path in CpuPath::ALL.into_iter().filter(|path| path.is_supported()) {
        let backend = backend(path, 2);
        for dtype in quantized() {
            let bytes = random_matrix(&mut random, dtype, rows, columns);
            let x = random.normals(tokens * columns);
            let bounds = bounds(dtype, columns, true);
            let segments = Segments::from_bounds(bounds.clone()).unwrap();
            let weight = backend.weight(source(bytes.clone(), dtype, rows, columns, segments)).unwrap();
            let expected = reference(dtype, &bytes, &x, rows, columns, &bounds, None);
            assert_eq!(bits(&product(&backend, &weight, &x, tokens, rows, None)), bits(&expected), "{path} {dtype}");
        }
    }
}

/// From subnormal to small: 127 over the greatest must not overflow, and zeros beside it must stay zeros.
#[test]
fn tiny_activations_make_no_infinity_and_no_nan() {
    let (rows, columns) = (17, 256);
    let mut random = Random(3);
    for magnitude in [f32::from_bits(1), 1e-40, f32::MIN_POSITIVE, 3.6e-37, 1.49e-36, 1.5e-36, 1e-30, 1e-6] {
        let mut x = vec![0.0; columns];
        x[3] = -magnitude;
        x[40] = magnitude;
        x[41] = magnitude / 2.0;
        for dtype in quantized() {
            let bytes = random_matrix(&mut random, dtype, rows, columns);
            let expected = reference(dtype, &bytes, &x, rows, columns, &[0, columns], None);
            assert!(expected.iter().all(|value| value.is_finite()));
            for backend in backends() {
                let segments = Segments::from_bounds(vec![0, columns]).unwrap();
                let weight = backend.weight(source(bytes.clone(), dtype, rows, columns, segments)).unwrap();
                let actual = product(&backend, &weight, &x, 1, rows, None);
                assert_eq!(bits(&actual), bits(&expected), "{} {dtype} {magnitude:e}", backend.path());
            }
        }
    }
}

/// A quantized product in f64 over dequantized weights and unquantized activations: how far quantizing them
/// takes the result; and dense products exactly.
#[test]
fn products_approximate_the_exact_sums() {
    let mut random = Random(2);
    let backend = backend(CpuPath::fastest(), 2);
    for dtype in DType::ALL {
        let (rows, columns, tokens) = (48, 1536, 10);
        let bytes = random_matrix(&mut random, dtype, rows, columns);
        let dense = dequantize(&bytes, dtype);
        let x = random.normals(tokens * columns);
        let mut expected = Vec::new();
        for x in x.chunks_exact(columns) {
            for w in dense.chunks_exact(columns) {
                expected.push(x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum::<f64>());
            }
        }
        let weight = backend.weight(source(bytes, dtype, rows, columns, Segments::whole(columns))).unwrap();
        let error = relative_error(&product(&backend, &weight, &x, tokens, rows, None), &expected);
        let bound = if dtype.is_quantized() { 1e-2 } else { 1e-5 };
        assert!(error < bound, "{dtype}: {error}");
    }
}

#[test]
fn shards_added_in_the_tree_equal_the_whole() {
    let mut random = Random(3);
    let backend = backend(CpuPath::fastest(), 2);
    for dtype in DType::ALL {
        for blocks in [3, 8, 11, 48] {
            let (rows, columns, tokens) = (20, blocks * dtype.block_elements().max(32), 3);
            let bounds = bounds(dtype, columns, true);
            let leaves = bounds.len() - 1;
            let bytes = random_matrix(&mut random, dtype, rows, columns);
            let x = random.normals(tokens * columns);
            let segments = Segments::from_bounds(bounds.clone()).unwrap();
            let whole = source(bytes, dtype, rows, columns, segments);
            let expected = product(&backend, &backend.weight(whole.clone()).unwrap(), &x, tokens, rows, None);
            for size in [1, 2, 4, 8] {
                let mut partials: Vec<Vec<f32>> = Vec::new();
                for rank in 0..size {
                    let own = share(leaves, rank, size);
                    if own.is_empty() {
                        partials.push(vec![-0.0; tokens * rows]);
                        continue;
                    }
                    let (first, last) = (bounds[own.start], bounds[own.end]);
                    let mut shard = whole.clone();
                    shard.offset = first / dtype.block_elements() * dtype.block_bytes();
                    shard.columns = last - first;
                    let relative = bounds[own.start..=own.end].iter().map(|bound| bound - first).collect();
                    shard.segments = Segments::from_bounds(relative).unwrap();
                    let x: Vec<f32> = x.chunks_exact(columns).flat_map(|x| x[first..last].to_vec()).collect();
                    partials.push(product(&backend, &backend.weight(shard).unwrap(), &x, tokens, rows, None));
                }
                while partials.len() > 1 {
                    partials = partials.chunks(2).map(|pair| pair[0].iter().zip(&pair[1]).map(|(a, b)| a + b).collect()).collect();
                }
                assert_eq!(bits(&partials[0]), bits(&expected), "{dtype}, {blocks} blocks on {size} ranks");
            }
        }
    }
}

#[test]
fn several_products_of_one_call_equal_single_calls() {
    let mut random = Random(4);
    for backend in backends() {
        let (columns, tokens) = (512, 19);
        let x = random.normals(tokens * columns);
        let shapes = [(DType::Q4_1, 40), (DType::Q6_K, 7), (DType::F16, 33), (DType::F8E4M3, 5), (DType::Q2_K, 100)];
        let weights: Vec<_> = shapes
            .iter()
            .map(|&(dtype, rows)| {
                let bytes = random_matrix(&mut random, dtype, rows, columns);
                backend.weight(source(bytes, dtype, rows, columns, Segments::whole(columns))).unwrap()
            })
            .collect();
        let mut outs: Vec<_> = shapes.iter().map(|&(_, rows)| backend.buffer(tokens, rows).unwrap()).collect();
        let mut products: Vec<_> = weights.iter().zip(&mut outs).map(|(weight, out)| Product { weight, bias: None, out }).collect();
        let input = buffer(&backend, &x, columns);
        backend.linear(&input, tokens, &mut products).unwrap();
        for ((weight, out), (dtype, rows)) in weights.iter().zip(&outs).zip(shapes) {
            let single = product(&backend, weight, &x, tokens, rows, None);
            assert_eq!(bits(&read(&backend, out, tokens)), bits(&single), "{dtype}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// A row's result is the same alone and in any batch, on any path, with any number of threads.
    #[test]
    fn a_row_does_not_see_its_batch(
        seed in any::<u64>(), dtype in 0..DType::ALL.len(), rows in 1..70_usize, blocks in 1..20_usize,
        tail in 0..31_usize, tokens in 2..64_usize, split in any::<bool>(),
    ) {
        let mut random = Random(seed);
        let dtype = DType::ALL[dtype];
        let columns = columns(dtype, blocks, tail);
        let bytes = random_matrix(&mut random, dtype, rows, columns);
        let segments = Segments::from_bounds(bounds(dtype, columns, split)).unwrap();
        let x = random.normals(tokens * columns);
        let chosen = random.below(tokens);
        let mut first: Option<Vec<u32>> = None;
        for backend in backends() {
            let weight = backend.weight(source(bytes.clone(), dtype, rows, columns, segments.clone())).unwrap();
            let all = product(&backend, &weight, &x, tokens, rows, None);
            let alone = product(&backend, &weight, &x[chosen * columns..][..columns], 1, rows, None);
            prop_assert_eq!(bits(&alone), bits(&all[chosen * rows..][..rows]));
            prop_assert_eq!(first.get_or_insert_with(|| bits(&all)), &bits(&all));
        }
    }
}

#[test]
fn extreme_activations_stay_equal_on_every_path() {
    let mut random = Random(5);
    for dtype in quantized() {
        let bytes = random_matrix(&mut random, dtype, 33, 512);
        let mut x = random.normals(4 * 512);
        x[..32].fill(0.0);
        x[32..64].iter_mut().for_each(|x| *x *= 1e-12);
        x[64..96].iter_mut().for_each(|x| *x *= 1e3);
        x[512..544].fill(-7.0);
        let mut first: Option<Vec<u32>> = None;
        for backend in backends() {
            let weight = backend.weight(source(bytes.clone(), dtype, 33, 512, Segments::whole(512))).unwrap();
            let all = product(&backend, &weight, &x, 4, 33, None);
            assert!(all.iter().all(|value| value.is_finite()));
            assert_eq!(first.get_or_insert_with(|| bits(&all)), &bits(&all), "{dtype} {}", backend.path());
        }
    }
}

#[test]
fn extreme_weights_have_exact_dot_products() {
    for dtype in quantized() {
        for byte in [0x00_u8, 0x80, 0x7f, 0xff] {
            let mut bytes = random_matrix(&mut Random(6), dtype, 16, 256);
            for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
                let whole = with_scales(dtype, &vec![byte; block.len()], 0.1, 0.2);
                block.copy_from_slice(&whole);
                if dtype == DType::MXFP4 {
                    block[0] = 127;
                }
            }
            for sign in [1.0, -1.0] {
                let x = vec![sign * 127.0; 256];
                let expected = reference(dtype, &bytes, &x, 16, 256, &[0, 256], None);
                for backend in backends() {
                    let weight = backend.weight(source(bytes.clone(), dtype, 16, 256, Segments::whole(256))).unwrap();
                    assert_eq!(bits(&product(&backend, &weight, &x, 1, 16, None)), bits(&expected), "{dtype}");
                }
            }
        }
    }
}

#[test]
fn weights_that_do_not_fit_their_bytes_are_refused() {
    let backend = backend(CpuPath::fastest(), 1);
    let good = source(vec![0; 20 * 20 * 2], DType::Q4_1, 20, 64, Segments::whole(64));
    assert!(backend.weight(good.clone()).is_ok());
    let refused = |change: fn(&mut forge_kernels::MatrixSource)| {
        let mut source = good.clone();
        change(&mut source);
        backend.weight(source).err().expect("must be refused").to_string()
    };
    assert!(refused(|source| source.offset = 1).contains("801 bytes"));
    assert!(refused(|source| source.rows = 21).contains("cut short"));
    assert!(refused(|source| source.rows = usize::MAX).contains("address space"));
    assert!(refused(|source| source.rows = 0).contains("hold nothing"));
    assert!(refused(|source| source.offset = usize::MAX).contains("address space"));
    assert!(refused(|source| source.row_stride_bytes = 39).contains("stride"));
    assert!(refused(|source| source.columns = 33).contains("whole Q4_1 blocks"));
    assert!(refused(|source| source.columns = 32).contains("leaves cover"));
    assert!(refused(|source| source.segments = Segments::from_bounds(vec![0, 40, 64]).unwrap()).contains("inside"));
}

#[test]
fn operands_of_the_wrong_size_are_refused() {
    let backend = backend(CpuPath::fastest(), 1);
    let weight = backend.weight(source(vec![0; 4 * 6 * 5], DType::F32, 5, 6, Segments::whole(6))).unwrap();
    let call = |x_width: usize, out_width: usize, out_rows: usize, bias: usize| {
        let x = backend.buffer(2, x_width).unwrap();
        let mut out = backend.buffer(out_rows, out_width).unwrap();
        let bias = backend.vector(&vec![0.0; bias]).unwrap();
        backend.linear(&x, 2, &mut [Product { weight: &weight, bias: Some(&bias), out: &mut out }])
    };
    assert!(call(6, 5, 2, 5).is_ok());
    assert!(call(7, 5, 2, 5).is_err());
    assert!(call(6, 6, 2, 5).is_err());
    assert!(call(6, 5, 1, 5).is_err());
    assert!(call(6, 5, 2, 4).is_err());
}
