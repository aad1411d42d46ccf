//! Paged attention against a plain f64 reference, and the invariance of its bits.

mod common;

use common::attention::*;
use common::*;
use forge_kernels::{AttentionBatch, AttentionParams, Backend, CpuBackend, CpuPath, KernelError, KvDType, KvShape, SequenceSlice};

/// Every combination that families have, and some that none has.
const EXTRAS: [Extras; 6] = [
    Extras { softcap: Some(3.0), ..PLAIN },
    Extras { softcap: Some(50.0), window: Some(70), ..PLAIN },
    Extras { alibi: Some((1.0, false)), ..PLAIN },
    Extras { alibi: Some((0.125, true)), window: Some(261), ..PLAIN },
    Extras { sinks: true, window: Some(5), ..PLAIN },
    Extras { sinks: true, softcap: Some(20.0), alibi: Some((0.5, false)), window: Some(280) },
];

/// Bytes are rounded by the same rule in f32 and in f64; near a tie they may differ by one.
fn tolerance(dtype: KvDType) -> f64 {
    if dtype == KvDType::Int8 { 2e-3 } else { 1e-5 }
}

#[test]
fn agrees_with_plain_softmax_in_f64() {
    let mut random = Random(7);
    let backend = backend(CpuPath::fastest(), 2);
    for dtype in KV_DTYPES {
        for (shape, length, window) in [
            (Heads::of(1, 1, 8, 8), 5, None),
            (Heads::of(9, 3, 64, 64), 300, None),
            (Heads::of(4, 4, 80, 80), 70, None),
            (Heads::of(8, 1, 20, 20), 40, Some(7)),
            (Heads::of(6, 2, 128, 128), 600, Some(270)),
            (Heads::of(2, 1, 16, 16), 530, Some(3)),
            (Heads::of(4, 4, 24, 16), 270, None),
            (Heads::of(3, 1, 12, 50), 40, None),
        ] {
            let case = Case::random(&mut random, shape, length, Extras { window, ..PLAIN }, dtype);
            let error = relative_error(&run(&backend, &[&case], 16, length)[0], &case.reference());
            assert!(error < tolerance(dtype), "{dtype} {shape:?}, {length} keys, window {window:?}: {error}");
        }
    }
}

#[test]
fn caps_biases_and_sinks_agree_with_f64() {
    let mut random = Random(12);
    let backend = backend(CpuPath::fastest(), 2);
    for dtype in [KvDType::F32, KvDType::BF16, KvDType::Int8] {
        for extras in EXTRAS {
            for (shape, length) in [(Heads::of(6, 2, 16, 16), 300), (Heads::of(4, 4, 24, 8), 530)] {
                let mut case = Case::random(&mut random, shape, length, extras, dtype);
                // Large enough that caps bend the scores.
                case.q.iter_mut().for_each(|q| *q *= 4.0);
                let error = relative_error(&run(&backend, &[&case], 16, length)[0], &case.reference());
                assert!(error < tolerance(dtype), "{dtype} {shape:?} {extras:?}: {error}");
            }
        }
    }
}

#[test]
fn bits_depend_neither_on_paths_nor_blocks_nor_chunks() {
    let mut random = Random(8);
    let plain =
        [(KvDType::F32, None), (KvDType::F16, None), (KvDType::BF16, Some(19)), (KvDType::F16, Some(258)), (KvDType::Int8, Some(258))];
    let plain = plain.map(|(dtype, window)| (dtype, Extras { window, ..PLAIN }));
    let extras = EXTRAS.iter().enumerate().map(|(index, &extras)| (KV_DTYPES[index % KV_DTYPES.len()], extras));
    for (dtype, extras) in plain.into_iter().chain(extras).chain([(KvDType::Int8, PLAIN)]) {
        for shape in [Heads::of(6, 2, 12, 12), Heads::of(6, 2, 64, 64), Heads::of(2, 2, 24, 16)] {
            let case = Case::random(&mut random, shape, 290, extras, dtype);
            let expected = bits(&run(&backend(CpuPath::fastest(), 1), &[&case], 16, case.length)[0]);
            for backend in backends().iter().filter(|backend| backend.threads() == 3) {
                for (block_size, chunk) in [(1, 290), (8, 37), (16, 100), (32, 290), (64, 64)] {
                    let actual = bits(&run(backend, &[&case], block_size, chunk)[0]);
                    assert!(actual == expected, "{} {dtype} {extras:?} {shape:?} block {block_size} chunk {chunk}", backend.path());
                }
            }
            let one_by_one = run(&backend(CpuPath::fastest(), 2), &[&case], 16, 1);
            assert!(bits(&one_by_one[0]) == expected, "{dtype} {extras:?}: one row at a time");
        }
    }
}

#[test]
fn bits_do_not_depend_on_the_batch() {
    let mut random = Random(9);
    let backend = backend(CpuPath::fastest(), 3);
    for (length, dtype, extras) in [
        (1, KvDType::F16, PLAIN),
        (15, KvDType::Int8, EXTRAS[5]),
        (33, KvDType::F16, EXTRAS[3]),
        (257, KvDType::F16, PLAIN),
        (257, KvDType::Int8, PLAIN),
    ] {
        let cases: Vec<Case> = (0..5)
            .map(|index| {
                let length = if index == 0 { length } else { 1 + random.below(90) };
                Case::random(&mut random, Heads::of(9, 3, 64, 64), length, extras, dtype)
            })
            .collect();
        let alone = bits(&run(&backend, &[&cases[0]], 16, 1000)[0]);
        for chunk in [1, 13, 1000] {
            let together = run(&backend, &cases.iter().collect::<Vec<_>>(), 16, chunk);
            assert!(bits(&together[0]) == alone, "{length} keys of {dtype}, chunks of {chunk}");
        }
    }
}

#[test]
fn copied_blocks_read_as_the_original() {
    let mut random = Random(10);
    let backend = backend(CpuPath::fastest(), 1);
    for dtype in [KvDType::F16, KvDType::Int8] {
        let case = Case::random(&mut random, Heads::of(4, 2, 16, 8), 12, PLAIN, dtype);
        let vectors = case.vectors(&backend);
        let mut pool = case.pool(&backend, 4, 8);
        let (k, v) = (buffer(&backend, &case.k, 32), buffer(&backend, &case.v, 16));
        let slots: Vec<u32> = (0..12).collect();
        for layer in 0..2 {
            backend.kv_write(&mut pool, layer, &k, &v, &slots).unwrap();
        }
        backend.kv_copy(&mut pool, &[(0, 5), (2, 0), (1, 7)]).unwrap();
        let q = buffer(&backend, &case.q[11 * 64..], 64);
        let attend = |layer: usize, table: &[u32]| {
            let sequences = [SequenceSlice { row_start: 0, row_count: 1, first_position: 11, table_start: 0, table_len: 3 }];
            let mut out = backend.buffer(1, 32).unwrap();
            let batch = AttentionBatch { sequences: &sequences, block_tables: table, block_size: 4 };
            backend.attention(&q, &pool, layer, batch, case.params(&vectors), &mut out).unwrap();
            read(&backend, &out, 1)
        };
        let expected = &case.reference()[11 * 32..];
        for layer in 0..2 {
            for table in [[5, 1, 2], [5, 7, 0]] {
                let error = relative_error(&attend(layer, &table), expected);
                assert!(error < tolerance(dtype), "{dtype}, layer {layer}, blocks {table:?}: {error}");
            }
        }
        assert!(matches!(backend.kv_copy(&mut pool, &[(0, 8)]), Err(KernelError::Shape { operation: "kv_copy", .. })));
    }
}

/// A few channels far greater than the rest, as trained models have them in keys, cost the others little precision.
#[test]
fn bytes_bear_outlying_channels() {
    let mut random = Random(13);
    let backend = backend(CpuPath::fastest(), 1);
    let mut case = Case::random(&mut random, Heads::of(2, 1, 64, 64), 100, PLAIN, KvDType::Int8);
    for row in case.k.chunks_mut(64).chain(case.v.chunks_mut(64)) {
        row[5] *= 60.0;
    }
    // The scores of such keys are huge unless the queries are small where the keys are large.
    for row in case.q.chunks_mut(64) {
        row[5] /= 60.0;
    }
    let exact = case.reference_over(|row| stored(KvDType::F32, row));
    let actual = run(&backend, &[&case], 16, 100);
    let without = |values: &mut dyn Iterator<Item = f64>| {
        values.enumerate().filter(|(index, _)| index % 64 != 5).map(|(_, x)| x).collect::<Vec<f64>>()
    };
    let exact = without(&mut exact.into_iter());
    let actual: Vec<f32> = without(&mut actual[0].iter().map(|&x| f64::from(x))).iter().map(|&x| x as f32).collect();
    // Without the rotation the other channels would be rounded in steps of 60·3/127, greater than most of them.
    let error = relative_error(&actual, &exact);
    assert!(error < 0.1, "{error}");
}

#[test]
fn bytes_keep_zeros_and_what_is_not_a_number() {
    let mut random = Random(14);
    for backend in backends().iter().filter(|backend| backend.threads() == 1) {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut case = Case::random(&mut random, Heads::of(2, 2, 16, 16), 20, PLAIN, KvDType::Int8);
            case.k[..4 * 32].fill(0.0);
            case.v[..6 * 32].fill(0.0);
            // Position 10, head 1.
            case.v[10 * 32 + 16 + 3] = bad;
            let out = run(backend, &[&case], 16, 20);
            for (index, row) in out[0].chunks(16).enumerate() {
                let (position, head) = (index / 2, index % 2);
                if position < 6 {
                    assert!(row.iter().all(|x| *x == 0.0), "position {position}");
                }
                assert_eq!(row.iter().all(|x| x.is_finite()), position < 10 || head == 0, "position {position}, head {head}");
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut random = Random(11);
    let backend = backend(CpuPath::fastest(), 1);
    let case = Case::random(&mut random, Heads::of(4, 2, 8, 8), 6, EXTRAS[5], KvDType::F32);
    let vectors = case.vectors(&backend);
    let short = (backend.vector(&[1.0; 3]).unwrap(), backend.vector(&[1.0; 3]).unwrap());
    let mut pool = case.pool(&backend, 4, 2);
    let q = buffer(&backend, &case.q, 32);
    let mut out = backend.buffer(6, 32).unwrap();
    let good = SequenceSlice { row_start: 0, row_count: 6, first_position: 0, table_start: 0, table_len: 2 };
    let mut attend = |sequence: SequenceSlice, table: &[u32], block_size: usize, params: AttentionParams<'_, CpuBackend>| {
        let batch = AttentionBatch { sequences: &[sequence], block_tables: table, block_size };
        backend.attention(&q, &pool, 1, batch, params, &mut out).map_err(|error| error.to_string())
    };
    let params = case.params(&vectors);
    assert_eq!(attend(good, &[0, 1], 4, params), Ok(()));
    assert!(attend(good, &[0, 2], 4, params).unwrap_err().contains("pool blocks"));
    assert!(attend(good, &[0], 4, params).unwrap_err().contains("block_tables"));
    assert!(attend(SequenceSlice { table_len: 1, ..good }, &[0, 1], 4, params).unwrap_err().contains("block table"));
    assert!(attend(SequenceSlice { row_count: 7, ..good }, &[0, 1], 4, params).unwrap_err().contains(": q has"));
    assert!(attend(SequenceSlice { row_start: 1, ..good }, &[0, 1], 4, params).unwrap_err().contains("row_start"));
    assert!(attend(good, &[0, 1], 8, params).unwrap_err().contains("block_size"));
    assert!(attend(good, &[0, 1], 4, AttentionParams { heads: 3, ..params }).unwrap_err().contains("whole groups"));
    assert!(attend(good, &[0, 1], 4, AttentionParams { value_dim: 4, ..params }).unwrap_err().contains("value_dim"));
    assert!(attend(good, &[0, 1], 4, AttentionParams { window: Some(0), ..params }).unwrap_err().contains("window"));
    let few = case.params(&short);
    assert!(attend(good, &[0, 1], 4, few).unwrap_err().contains("slopes"));
    assert!(attend(good, &[0, 1], 4, AttentionParams { alibi: None, ..few }).unwrap_err().contains("sinks"));
    let (k, v) = (buffer(&backend, &case.k, 16), buffer(&backend, &case.v, 16));
    let result = backend.kv_write(&mut pool, 0, &k, &v, &[0, 8]);
    assert!(matches!(result, Err(KernelError::Shape { operand: "pool slots", .. })));
    assert!(backend.kv_write(&mut pool, 2, &k, &v, &[0]).is_err());
    assert!(matches!(backend.kv_write(&mut pool, 0, &k, &q, &[0]), Err(KernelError::Shape { operand: "v", .. })));
    let many = 1 << 20;
    for (head_dim, value_dim) in [(many, 8), (8, many)] {
        let huge = KvShape { layers: many, kv_heads: many, head_dim, value_dim, block_size: many, blocks: 1, dtype: KvDType::Int8 };
        assert!(matches!(backend.kv_pool(huge), Err(KernelError::OutOfMemory { .. })));
    }
}

#[test]
fn blocks_of_bytes_take_half_and_a_scale() {
    let shape = |dtype| KvShape { layers: 30, kv_heads: 3, head_dim: 64, value_dim: 32, block_size: 16, blocks: 5, dtype };
    assert_eq!(shape(KvDType::BF16).block_bytes(), 30 * 3 * 16 * (64 + 32) * 2);
    assert_eq!(shape(KvDType::Int8).block_bytes(), 30 * 3 * 16 * (64 + 2 + 32 + 2));
}
