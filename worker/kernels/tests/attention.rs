//! Paged attention against a plain f64 reference, and the invariance of its bits.

mod common;

use common::*;
use forge_kernels::{
    AttentionBatch, AttentionParams, Backend, CpuBackend, CpuKvPool, CpuPath, KernelError, KvDType, KvShape, SequenceSlice,
};
use half::{bf16, f16};

/// One sequence's queries, keys and values, and how it is attended.
#[derive(Clone)]
struct Case {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    length: usize,
    window: Option<u32>,
    dtype: KvDType,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Case {
    #[allow(clippy::too_many_arguments)]
    fn random(
        random: &mut Random,
        heads: usize,
        kv_heads: usize,
        head_dim: usize,
        length: usize,
        window: Option<u32>,
        dtype: KvDType,
    ) -> Self {
        Case {
            heads,
            kv_heads,
            head_dim,
            length,
            window,
            dtype,
            q: random.normals(length * heads * head_dim),
            k: random.normals(length * kv_heads * head_dim),
            v: random.normals(length * kv_heads * head_dim),
        }
    }

    fn params(&self) -> AttentionParams<'static, CpuBackend> {
        AttentionParams {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            value_dim: self.head_dim,
            scale: 1.0 / (self.head_dim as f32).sqrt(),
            window: self.window,
            softcap: None,
            alibi: None,
            sinks: None,
        }
    }

    /// Softmax attention in f64 over the rounded keys and values.
    fn reference(&self) -> Vec<f64> {
        let round = |x: f32| match self.dtype {
            KvDType::F32 => f64::from(x),
            KvDType::F16 => f16::from_f32(x).to_f64(),
            KvDType::BF16 => bf16::from_f32(x).to_f64(),
            KvDType::Int8 => unreachable!(),
        };
        let (d, group) = (self.head_dim, self.heads / self.kv_heads);
        let mut out = vec![0.0; self.length * self.heads * d];
        for position in 0..self.length {
            let first = self.window.map_or(0, |window| (position + 1).saturating_sub(window as usize));
            for head in 0..self.heads {
                let q = &self.q[(position * self.heads + head) * d..][..d];
                let at = |key: usize| (key * self.kv_heads + head / group) * d;
                let scores: Vec<f64> = (first..=position)
                    .map(|key| {
                        let dot: f64 = (0..d).map(|i| f64::from(q[i]) * round(self.k[at(key) + i])).sum();
                        dot * f64::from(self.params().scale)
                    })
                    .collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = scores.iter().map(|score| (score - max).exp()).sum();
                for (key, score) in (first..=position).zip(&scores) {
                    for i in 0..d {
                        out[(position * self.heads + head) * d + i] += (score - max).exp() / sum * round(self.v[at(key) + i]);
                    }
                }
            }
        }
        out
    }

    /// A pool of `blocks` blocks whose unused slots hold NaN, as stale memory might.
    fn pool(&self, backend: &CpuBackend, block_size: usize, blocks: usize) -> CpuKvPool {
        let (kv_heads, head_dim, dtype) = (self.kv_heads, self.head_dim, self.dtype);
        let shape = KvShape { layers: 2, kv_heads, head_dim, value_dim: head_dim, block_size, blocks, dtype };
        let mut pool = backend.kv_pool(shape).unwrap();
        let slots: Vec<u32> = (0..(blocks * block_size) as u32).collect();
        let width = self.kv_heads * self.head_dim;
        let nan = buffer(backend, &vec![f32::NAN; slots.len() * width], width);
        for layer in 0..2 {
            backend.kv_write(&mut pool, layer, &nan, &nan, &slots).unwrap();
        }
        pool
    }
}

/// Runs the cases together in chunks of at most `chunk` rows each, and returns each case's output.
fn run(backend: &CpuBackend, cases: &[&Case], block_size: usize, chunk: usize) -> Vec<Vec<f32>> {
    let needed: Vec<usize> = cases.iter().map(|case| case.length.div_ceil(block_size)).collect();
    let blocks: usize = needed.iter().sum::<usize>() + 1;
    let first = cases[0];
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
            let width = case.kv_heads * case.head_dim;
            q.extend(&case.q[rows.start * case.heads * case.head_dim..rows.end * case.heads * case.head_dim]);
            k.extend(&case.k[rows.start * width..rows.end * width]);
            v.extend(&case.v[rows.start * width..rows.end * width]);
            slots.extend(
                rows.clone().map(|position| tables[index][position / block_size] * block_size as u32 + (position % block_size) as u32),
            );
            members.push((index, count));
            done[index] += count;
        }
        let (width, q_width) = (first.kv_heads * first.head_dim, first.heads * first.head_dim);
        let (q, k, v) = (buffer(backend, &q, q_width), buffer(backend, &k, width), buffer(backend, &v, width));
        backend.kv_write(&mut pool, 1, &k, &v, &slots).unwrap();
        let mut out = backend.buffer(slots.len(), q_width).unwrap();
        let batch = AttentionBatch { sequences: &sequences, block_tables: &block_tables, block_size };
        backend.attention(&q, &pool, 1, batch, first.params(), &mut out).unwrap();
        let values = read(backend, &out, slots.len());
        let mut row = 0;
        for (index, count) in members {
            outputs[index].extend(&values[row * q_width..(row + count) * q_width]);
            row += count;
        }
    }
    outputs
}

const KV_DTYPES: [KvDType; 3] = [KvDType::F32, KvDType::F16, KvDType::BF16];

#[test]
fn agrees_with_plain_softmax_in_f64() {
    let mut random = Random(7);
    let backend = backend(CpuPath::fastest(), 2);
    for dtype in KV_DTYPES {
        for (heads, kv_heads, head_dim, length, window) in [
            (1, 1, 8, 5, None),
            (9, 3, 64, 300, None),
            (4, 4, 80, 70, None),
            (8, 1, 20, 40, Some(7)),
            (6, 2, 128, 600, Some(270)),
            (2, 1, 16, 530, Some(3)),
        ] {
            let case = Case::random(&mut random, heads, kv_heads, head_dim, length, window, dtype);
            let expected = case.reference();
            let actual = run(&backend, &[&case], 16, length);
            let error = relative_error(&actual[0], &expected);
            assert!(error < 1e-5, "{dtype} {heads}/{kv_heads}×{head_dim}, {length} keys, window {window:?}: {error}");
        }
    }
}

#[test]
fn bits_depend_neither_on_paths_nor_blocks_nor_chunks() {
    let mut random = Random(8);
    for (dtype, window) in [(KvDType::F32, None), (KvDType::F16, None), (KvDType::BF16, Some(19)), (KvDType::F16, Some(258))] {
        for head_dim in [12, 64] {
            let case = Case::random(&mut random, 6, 2, head_dim, 290, window, dtype);
            let expected = bits(&run(&backend(CpuPath::fastest(), 1), &[&case], 16, case.length)[0]);
            for backend in backends().iter().filter(|backend| backend.threads() != 2) {
                for (block_size, chunk) in [(1, 290), (8, 37), (16, 100), (32, 290), (64, 64)] {
                    let actual = bits(&run(backend, &[&case], block_size, chunk)[0]);
                    assert!(actual == expected, "{} {dtype} block {block_size} chunk {chunk}", backend.path());
                }
            }
            let one_by_one = run(&backend(CpuPath::fastest(), 2), &[&case], 16, 1);
            assert!(bits(&one_by_one[0]) == expected, "one row at a time");
        }
    }
}

#[test]
fn bits_do_not_depend_on_the_batch() {
    let mut random = Random(9);
    let backend = backend(CpuPath::fastest(), 3);
    for length in [1, 15, 33, 257] {
        let cases: Vec<Case> = (0..5)
            .map(|index| {
                let length = if index == 0 { length } else { 1 + random.below(90) };
                Case::random(&mut random, 9, 3, 64, length, None, KvDType::F16)
            })
            .collect();
        let alone = bits(&run(&backend, &[&cases[0]], 16, 1000)[0]);
        for chunk in [1, 13, 1000] {
            let together = run(&backend, &cases.iter().collect::<Vec<_>>(), 16, chunk);
            assert!(bits(&together[0]) == alone, "{length} keys, chunks of {chunk}");
        }
    }
}

#[test]
fn copied_blocks_read_as_the_original() {
    let mut random = Random(10);
    let backend = backend(CpuPath::fastest(), 1);
    let case = Case::random(&mut random, 4, 2, 16, 12, None, KvDType::F16);
    let mut pool = case.pool(&backend, 4, 8);
    let (k, v) = (buffer(&backend, &case.k, 32), buffer(&backend, &case.v, 32));
    let slots: Vec<u32> = (0..12).collect();
    for layer in 0..2 {
        backend.kv_write(&mut pool, layer, &k, &v, &slots).unwrap();
    }
    backend.kv_copy(&mut pool, &[(0, 5), (2, 0), (1, 7)]).unwrap();
    let q = buffer(&backend, &case.q[11 * 64..], 64);
    let attend = |layer: usize, table: &[u32]| {
        let sequences = [SequenceSlice { row_start: 0, row_count: 1, first_position: 11, table_start: 0, table_len: 3 }];
        let mut out = backend.buffer(1, 64).unwrap();
        let batch = AttentionBatch { sequences: &sequences, block_tables: table, block_size: 4 };
        backend.attention(&q, &pool, layer, batch, case.params(), &mut out).unwrap();
        read(&backend, &out, 1)
    };
    let expected = &case.reference()[11 * 64..];
    for layer in 0..2 {
        for table in [[5, 1, 2], [5, 7, 0]] {
            assert!(relative_error(&attend(layer, &table), expected) < 1e-5, "layer {layer}, blocks {table:?}");
        }
    }
    assert!(matches!(backend.kv_copy(&mut pool, &[(0, 8)]), Err(KernelError::Shape { operation: "kv_copy", .. })));
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut random = Random(11);
    let backend = backend(CpuPath::fastest(), 1);
    let case = Case::random(&mut random, 4, 2, 8, 6, None, KvDType::F32);
    let mut pool = case.pool(&backend, 4, 2);
    let q = buffer(&backend, &case.q, 32);
    let mut out = backend.buffer(6, 32).unwrap();
    let good = SequenceSlice { row_start: 0, row_count: 6, first_position: 0, table_start: 0, table_len: 2 };
    let mut attend = |sequence: SequenceSlice, table: &[u32], block_size: usize, params: AttentionParams<'_, CpuBackend>| {
        let batch = AttentionBatch { sequences: &[sequence], block_tables: table, block_size };
        backend.attention(&q, &pool, 1, batch, params, &mut out).map_err(|error| error.to_string())
    };
    let params = case.params();
    assert_eq!(attend(good, &[0, 1], 4, params), Ok(()));
    assert!(attend(good, &[0, 2], 4, params).unwrap_err().contains("pool blocks"));
    assert!(attend(good, &[0], 4, params).unwrap_err().contains("block_tables"));
    assert!(attend(SequenceSlice { table_len: 1, ..good }, &[0, 1], 4, params).unwrap_err().contains("block table"));
    assert!(attend(SequenceSlice { row_count: 7, ..good }, &[0, 1], 4, params).unwrap_err().contains(": q has"));
    assert!(attend(SequenceSlice { row_start: 1, ..good }, &[0, 1], 4, params).unwrap_err().contains("row_start"));
    assert!(attend(good, &[0, 1], 8, params).unwrap_err().contains("block_size"));
    assert!(attend(good, &[0, 1], 4, AttentionParams { heads: 3, ..params }).unwrap_err().contains("whole groups"));
    assert!(attend(good, &[0, 1], 4, AttentionParams { window: Some(0), ..params }).unwrap_err().contains("window"));
    let (k, v) = (buffer(&backend, &case.k, 16), buffer(&backend, &case.v, 16));
    let result = backend.kv_write(&mut pool, 0, &k, &v, &[0, 8]);
    assert!(matches!(result, Err(KernelError::Shape { operand: "pool slots", .. })));
    assert!(backend.kv_write(&mut pool, 2, &k, &v, &[0]).is_err());
    let many = 1 << 20;
    let huge = KvShape { layers: many, kv_heads: many, head_dim: many, value_dim: 8, block_size: many, blocks: 1, dtype: KvDType::F32 };
    assert!(matches!(backend.kv_pool(huge), Err(KernelError::OutOfMemory { .. })));
}
