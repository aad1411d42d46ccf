//! Products against plain references, and the invariance of their bits.

mod common;

use common::*;
use forge_kernels::tree::{even_leaves, merges_after, share};
use forge_kernels::{Backend, CpuPath, DType, Product, Segments};
use half::f16;
use proptest::prelude::*;

/// A block of activations as the format's products see it: values, scale, f16(scale · sum).
struct QuantizedBlock {
    values: Vec<i32>,
    scale: f32,
    scaled_sum: f32,
}

fn quantize_block(x: &[f32]) -> QuantizedBlock {
    let greatest = x.iter().fold(0.0_f32, |a, b| a.max(b.abs()));
    let scale = greatest / 127.0;
    let inverse = if greatest == 0.0 { 0.0 } else { 127.0 / greatest };
    let values: Vec<i32> = x.iter().map(|x| (x * inverse).round_ties_even() as i32).collect();
    let sum: i32 = values.iter().sum();
    QuantizedBlock { scale: f16::from_f32(scale).to_f32(), scaled_sum: f16::from_f32(scale * sum as f32).to_f32(), values }
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
fn quantized_reference(dtype: DType, row: &[u8], x: &[f32], bounds: &[usize]) -> f32 {
    let leaves: Vec<f32> = bounds
        .windows(2)
        .map(|leaf| {
            (leaf[0] / 32..leaf[1] / 32).fold(0.0_f32, |sum, index| {
                let block = &row[index * dtype.block_bytes()..][..dtype.block_bytes()];
                let a = quantize_block(&x[index * 32..][..32]);
                let weights: Vec<i32> = match dtype {
                    DType::Q8_0 => block[2..].iter().map(|&q| i32::from(q as i8)).collect(),
                    _ => {
                        let (start, offset) = if dtype == DType::Q4_0 { (2, 8) } else { (4, 0) };
                        let low = block[start..].iter().map(|q| i32::from(q & 15) - offset);
                        low.chain(block[start..].iter().map(|q| i32::from(q >> 4) - offset)).collect()
                    }
                };
                let dot: i32 = weights.iter().zip(&a.values).map(|(w, a)| w * a).sum();
                let scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
                let sum = (dot as f32).mul_add(scale * a.scale, sum);
                if dtype != DType::Q4_1 {
                    return sum;
                }
                f16::from_le_bytes([block[2], block[3]]).to_f32().mul_add(a.scaled_sum, sum)
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
    let row_bytes = dtype.row_bytes(columns).unwrap();
    let dense = dequantize(bytes, dtype);
    let mut out = Vec::new();
    for x in x.chunks_exact(columns) {
        for row in 0..rows {
            let sum = if dtype.is_quantized() {
                quantized_reference(dtype, &bytes[row * row_bytes..][..row_bytes], x, bounds)
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

#[test]
fn every_path_equals_the_formulas_bit_for_bit() {
    let mut random = Random(1);
    for backend in backends() {
        for dtype in DTYPES {
            for (rows, blocks, tokens) in [(1, 1, 1), (5, 3, 2), (16, 2, 3), (17, 9, 5), (40, 18, 9), (67, 11, 37)] {
                let columns = if dtype.is_quantized() { blocks * 32 } else { blocks * 32 - 5 };
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
