//! Sequences to attend, the f64 reference that reads what a pool of each type stores, and a driver in chunks.

use forge_kernels::{Alibi, AttentionBatch, AttentionParams, Backend, CpuBackend, CpuKvPool, CpuVector, KvDType, KvShape, SequenceSlice};
use half::{bf16, f16};

use super::{Random, buffer, read};

pub const KV_DTYPES: [KvDType; 4] = [KvDType::F32, KvDType::F16, KvDType::BF16, KvDType::Int8];

/// Head counts and widths.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Heads {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub value_dim: usize,
}

impl Heads {
    pub const fn of(heads: usize, kv_heads: usize, head_dim: usize, value_dim: usize) -> Self {
        Heads { heads, kv_heads, head_dim, value_dim }
    }
}

/// What a layer does beside plain attention.
#[derive(Debug, Clone, Copy, Default)]
pub struct Extras {
    pub window: Option<u32>,
    pub softcap: Option<f32>,
    /// Factor, and whether products are rounded to bfloat16.
    pub alibi: Option<(f32, bool)>,
    pub sinks: bool,
}

pub const PLAIN: Extras = Extras { window: None, softcap: None, alibi: None, sinks: false };

/// One sequence's queries, keys and values, and how it is attended.
#[derive(Clone)]
pub struct Case {
    pub shape: Heads,
    pub length: usize,
    pub extras: Extras,
    pub dtype: KvDType,
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    slopes: Vec<f32>,
    sinks: Vec<f32>,
}

/// A case's vectors on a backend: slopes, sinks.
pub type Vectors = (CpuVector, CpuVector);

impl Case {
    pub fn random(random: &mut Random, shape: Heads, length: usize, extras: Extras, dtype: KvDType) -> Self {
        Case {
            shape,
            length,
            extras,
            dtype,
            q: random.normals(length * shape.heads * shape.head_dim),
            k: random.normals(length * shape.kv_heads * shape.head_dim),
            v: random.normals(length * shape.kv_heads * shape.value_dim),
            slopes: (0..shape.heads).map(|head| 0.7_f32.powi(2 * head as i32 + 3)).collect(),
            sinks: random.normals(shape.heads),
        }
    }

    pub fn vectors(&self, backend: &CpuBackend) -> Vectors {
        (backend.vector(&self.slopes).unwrap(), backend.vector(&self.sinks).unwrap())
    }

    fn scale(&self) -> f32 {
        1.0 / (self.shape.head_dim as f32).sqrt()
    }

    pub fn params<'a>(&self, vectors: &'a Vectors) -> AttentionParams<'a, CpuBackend> {
        let Heads { heads, kv_heads, head_dim, value_dim } = self.shape;
        AttentionParams {
            heads,
            kv_heads,
            head_dim,
            value_dim,
            scale: self.scale(),
            window: self.extras.window,
            softcap: self.extras.softcap,
            alibi: self.extras.alibi.map(|(factor, rounded)| Alibi { slopes: &vectors.0, factor, rounded }),
            sinks: self.extras.sinks.then_some(&vectors.1),
        }
    }

    /// Attention in f64 over what a pool of the case's type stores.
    pub fn reference(&self) -> Vec<f64> {
        self.reference_over(|row| stored(self.dtype, row))
    }

    /// Attention in f64 over keys and values as `stored` gives them, head by head.
    pub fn reference_over(&self, stored: impl Fn(&[f32]) -> Vec<f64>) -> Vec<f64> {
        let Heads { heads, kv_heads, head_dim, value_dim } = self.shape;
        let k: Vec<Vec<f64>> = self.k.chunks(head_dim).map(&stored).collect();
        let v: Vec<Vec<f64>> = self.v.chunks(value_dim).map(&stored).collect();
        let mut out = vec![0.0; self.length * heads * value_dim];
        for (index, (out, q)) in out.chunks_mut(value_dim).zip(self.q.chunks(head_dim)).enumerate() {
            let (position, head) = (index / heads, index % heads);
            let first = self.extras.window.map_or(0, |window| (position + 1).saturating_sub(window as usize));
            let at = |key: usize| key * kv_heads + head / (heads / kv_heads);
            let scores: Vec<f64> = (first..=position)
                .map(|key| {
                    let dot: f64 = q.iter().zip(&k[at(key)]).map(|(q, k)| f64::from(*q) * k).sum();
                    self.biased(dot * f64::from(self.scale()), head, position, key)
                })
                .collect();
            let sink = if self.extras.sinks { f64::from(self.sinks[head]) } else { f64::NEG_INFINITY };
            let max = scores.iter().copied().fold(sink, f64::max);
            let sum: f64 = scores.iter().map(|score| (score - max).exp()).sum::<f64>() + (sink - max).exp();
            for (key, score) in (first..=position).zip(&scores) {
                for (out, value) in out.iter_mut().zip(&v[at(key)]) {
                    *out += (score - max).exp() / sum * value;
                }
            }
        }
        out
    }

    /// A score after the cap and the linear bias.
    fn biased(&self, score: f64, head: usize, position: usize, key: usize) -> f64 {
        let score = self.extras.softcap.map_or(score, |cap| (score / f64::from(cap)).tanh() * f64::from(cap));
        let slope = self.slopes[head];
        match self.extras.alibi {
            None => score,
            Some((factor, false)) => score - f64::from(slope) * f64::from(factor) * (position - key) as f64,
            Some((factor, true)) => {
                let product = bf16::from_f32(slope).to_f32() * bf16::from_f32(key as f32).to_f32();
                score + bf16::from_f32(product).to_f64() * f64::from(factor)
            }
        }
    }

    /// A pool of `blocks` blocks whose unused slots hold NaN, as stale memory might.
    pub fn pool(&self, backend: &CpuBackend, block_size: usize, blocks: usize) -> CpuKvPool {
        let Heads { kv_heads, head_dim, value_dim, .. } = self.shape;
        let shape = KvShape { layers: 2, kv_heads, head_dim, value_dim, block_size, blocks, dtype: self.dtype };
        let mut pool = backend.kv_pool(shape).unwrap();
        let slots: Vec<u32> = (0..(blocks * block_size) as u32).collect();
        let nan = |width: usize| buffer(backend, &vec![f32::NAN; slots.len() * width], width);
        let (k, v) = (nan(kv_heads * head_dim), nan(kv_heads * value_dim));
        for layer in 0..2 {
            backend.kv_write(&mut pool, layer, &k, &v, &slots).unwrap();
        }
        pool
    }
}

/// What a pool stores of one head's row, by the definition.
pub fn stored(dtype: KvDType, row: &[f32]) -> Vec<f64> {
    match dtype {
        KvDType::F32 => row.iter().map(|&x| f64::from(x)).collect(),
        KvDType::F16 => row.iter().map(|&x| f16::from_f32(x).to_f64()).collect(),
        KvDType::BF16 => row.iter().map(|&x| bf16::from_f32(x).to_f64()).collect(),
        KvDType::Int8 => {
            let turned = rotated(&row.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>());
            let greatest = turned.iter().fold(0.0_f64, |greatest, x| greatest.max(x.abs()));
            let exact = greatest as f32 / 127.0;
            let nearest = bf16::from_f32(exact);
            let scale = if nearest.to_f32() < exact { bf16::from_bits(nearest.to_bits() + 1) } else { nearest }.to_f64();
            let bytes = turned.iter().map(|x| if scale > 0.0 { (x / scale).round_ties_even() * scale } else { 0.0 });
            // The matrix is its own inverse.
            rotated(&bytes.collect::<Vec<f64>>())
        }
    }
}

/// The Hadamard matrix of the row's width times the row, where the width is a power of two.
fn rotated(row: &[f64]) -> Vec<f64> {
    if !row.len().is_power_of_two() {
        return row.to_vec();
    }
    let sign = |i: usize, j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
    let norm = (row.len() as f64).sqrt();
    (0..row.len()).map(|i| row.iter().enumerate().map(|(j, x)| sign(i, j) * x).sum::<f64>() / norm).collect()
}

/// Runs the cases together in chunks of at most `chunk` rows each, and returns each case's output.
pub fn run(backend: &CpuBackend, cases: &[&Case], block_size: usize, chunk: usize) -> Vec<Vec<f32>> {
    let needed: Vec<usize> = cases.iter().map(|case| case.length.div_ceil(block_size)).collect();
    let blocks: usize = needed.iter().sum::<usize>() + 1;
    let first = cases[0];
    let Heads { heads, kv_heads, head_dim, value_dim } = first.shape;
    let (q_width, k_width, v_width, out_width) = (heads * head_dim, kv_heads * head_dim, kv_heads * value_dim, heads * value_dim);
    let vectors = first.vectors(backend);
    let mut pool = first.pool(backend, block_size, blocks);
    // Blocks are given out from the end, interleaved, so that tables are not trivial.
    let mut free: Vec<u32> = (0..blocks as u32).collect();
    let mut tables: Vec<Vec<u32>> = vec![Vec::new(); cases.len()];
    for index in 0..needed.iter().copied().max().unwrap() {
        for (table, needed) in tables.iter_mut().zip(&needed) {
            if index < *needed {
                table.push(free.pop().unwrap());
            }
        }
    }
    let mut outputs: Vec<Vec<f32>> = vec![Vec::new(); cases.len()];
    let mut done = vec![0; cases.len()];
    while cases.iter().zip(&done).any(|(case, done)| *done < case.length) {
        let (mut q, mut k, mut v, mut slots) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (mut sequences, mut block_tables, mut members) = (Vec::new(), Vec::new(), Vec::new());
        for (index, case) in cases.iter().enumerate() {
            let count = chunk.min(case.length - done[index]);
            if count == 0 {
                continue;
            }
            let rows = done[index]..done[index] + count;
            sequences.push(SequenceSlice {
                row_start: slots.len() as u32,
                row_count: count as u32,
                first_position: done[index] as u32,
                table_start: block_tables.len() as u32,
                table_len: tables[index].len() as u32,
            });
            block_tables.extend(&tables[index]);
            for (all, own, width) in [(&mut q, &case.q, q_width), (&mut k, &case.k, k_width), (&mut v, &case.v, v_width)] {
                all.extend(&own[rows.start * width..rows.end * width]);
            }
            slots.extend(
                rows.clone().map(|position| tables[index][position / block_size] * block_size as u32 + (position % block_size) as u32),
            );
            members.push((index, count));
            done[index] += count;
        }
        let (q, k, v) = (buffer(backend, &q, q_width), buffer(backend, &k, k_width), buffer(backend, &v, v_width));
        backend.kv_write(&mut pool, 1, &k, &v, &slots).unwrap();
        let mut out = backend.buffer(slots.len(), out_width).unwrap();
        let batch = AttentionBatch { sequences: &sequences, block_tables: &block_tables, block_size };
        backend.attention(&q, &pool, 1, batch, first.params(&vectors), &mut out).unwrap();
        let values = read(backend, &out, slots.len());
        let mut row = 0;
        for (index, count) in members {
            outputs[index].extend(&values[row * out_width..(row + count) * out_width]);
            row += count;
        }
    }
    outputs
}
