//! Every storage type against the values that gguf-py and torch read from the same bytes
//! (`tests/fixtures/kernels/make_types.py`), and the search for what is no number.

mod common;

use std::path::Path;

use common::{Random, backend, backends, bits, product, quantized, random_matrix, read, source};
use forge_kernels::{Backend, BlockScales, CpuPath, DType, Segments, dequantize, holds_non_finite};

/// The bytes of a golden file.
fn golden(dtype: DType, what: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../../tests/fixtures/kernels/types/{dtype}.{what}"));
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn golden_values(dtype: DType) -> Vec<f32> {
    golden(dtype, "values").chunks_exact(4).map(|value| f32::from_le_bytes(value.try_into().unwrap())).collect()
}

#[test]
fn values_equal_the_reference_bit_for_bit() {
    for dtype in quantized() {
        let expected = golden_values(dtype);
        let mut actual = vec![0.0; expected.len()];
        dequantize(dtype, &golden(dtype, "blocks"), &mut actual);
        assert!(expected.len() >= 512, "{dtype}");
        assert_eq!(bits(&actual), bits(&expected), "{dtype}");
    }
}

#[test]
fn eight_bit_floats_equal_torchs() {
    let expected = golden_values(DType::F8E4M3);
    let mut actual = vec![0.0; 256];
    dequantize(DType::F8E4M3, &golden(DType::F8E4M3, "blocks"), &mut actual);
    for (code, (actual, expected)) in actual.iter().zip(&expected).enumerate() {
        assert!(actual.to_bits() == expected.to_bits() || actual.is_nan() && expected.is_nan(), "{code:#x}: {actual} {expected}");
        assert_eq!(holds_non_finite(DType::F8E4M3, &[0, code as u8]), expected.is_nan(), "{code:#x}");
    }
}

#[test]
fn golden_blocks_are_finite_and_damaged_scales_are_found() {
    for dtype in quantized() {
        let blocks = golden(dtype, "blocks");
        assert!(!holds_non_finite(dtype, &blocks), "{dtype}");
        // Every pair of bytes of the last block in turn becomes a half infinity; what is no scale may hold any bits.
        let start = blocks.len() - dtype.block_bytes();
        let mut values = vec![0.0; blocks.len() / dtype.block_bytes() * dtype.block_elements()];
        let mut found = 0;
        for at in start..blocks.len() - 1 {
            let mut damaged = blocks.clone();
            damaged[at..at + 2].copy_from_slice(&[0, 0x7c]);
            if dtype == DType::MXFP4 && at == start {
                damaged[at] = 255;
            }
            dequantize(dtype, &damaged, &mut values);
            let finite = values.iter().all(|value| value.is_finite());
            // An infinite scale of zeros makes NaN, so every bad scale shows in the values.
            if dtype != DType::MXFP4 {
                assert_eq!(holds_non_finite(dtype, &damaged), !finite, "{dtype} at {}", at - start);
            }
            found += usize::from(holds_non_finite(dtype, &damaged));
        }
        assert!(found > 0, "{dtype}");
    }
}

/// Embedding reads rows of a table: also in parts, with block scales.
#[test]
fn rows_of_8_bit_floats_are_multiplied_by_their_blocks_scale() {
    let backend = backend(CpuPath::fastest(), 1);
    let (rows, columns) = (6, 40);
    let bytes: Vec<u8> = (0..rows * columns).map(|index| (index * 5 % 127) as u8).collect();
    let scales = BlockScales {
        block_rows: 4,
        block_columns: 16,
        blocks_per_row: 4,
        first_row: 3,
        first_column: 8,
        values: (0..12_u8).map(|index| 0.3 + f32::from(index)).collect(),
    };
    let mut table = source(bytes.clone(), DType::F8E4M3, rows, columns, Segments::whole(columns));
    table.scales = Some(scales);
    let table = backend.weight(table).unwrap();
    let mut out = backend.buffer(rows, columns).unwrap();
    backend.embed(&table, 0..6, &[0, 1, 2, 3, 4, 5], 1.0, &mut out).unwrap();
    let mut stored = vec![0.0; rows * columns];
    dequantize(DType::F8E4M3, &bytes, &mut stored);
    for (index, (actual, stored)) in read(&backend, &out, rows).iter().zip(stored).enumerate() {
        let (row, column) = (index / columns + 3, index % columns + 8);
        let scale = 0.3 + (row / 4 * 4 + column / 16) as f32;
        assert_eq!(actual.to_bits(), (stored * scale).to_bits());
    }
}

/// A product with scaled 8-bit floats is that with their values in f32, also where a vector of 16 spans two scales.
#[test]
fn products_of_scaled_8_bit_floats_equal_those_of_their_values() {
    let mut random = Random(41);
    let (rows, columns, tokens) = (13, 75, 6);
    let bytes = random_matrix(&mut random, DType::F8E4M3, rows, columns);
    let x = random.normals(tokens * columns);
    for (block_columns, first_column) in [(16, 5), (8, 0), (128, 100), (usize::MAX, 9)] {
        let blocks_per_row = (first_column + columns - 1) / block_columns + 1;
        let values = (0..5 * blocks_per_row).map(|index| 0.7 + index as f32).collect();
        let scales = BlockScales { block_rows: 4, block_columns, blocks_per_row, first_row: 6, first_column, values };
        let mut scaled = source(bytes.clone(), DType::F8E4M3, rows, columns, Segments::whole(columns));
        scaled.scales = Some(scales);
        for backend in backends() {
            let weight = backend.weight(scaled.clone()).unwrap();
            let ids: Vec<u32> = (0..rows as u32).collect();
            let mut table = backend.buffer(rows, columns).unwrap();
            backend.embed(&weight, 0..rows as u32, &ids, 1.0, &mut table).unwrap();
            let wide = read(&backend, &table, rows).iter().flat_map(|value| value.to_le_bytes()).collect();
            let wide = backend.weight(source(wide, DType::F32, rows, columns, Segments::whole(columns))).unwrap();
            let expected = product(&backend, &wide, &x, tokens, rows, None);
            assert_eq!(bits(&product(&backend, &weight, &x, tokens, rows, None)), bits(&expected), "{}", backend.path());
        }
    }
}

/// Files promise no alignment: neither whole vectors nor a row's last few values, of products and of embeddings.
#[test]
fn weights_at_odd_offsets_are_read_as_aligned_ones() {
    let mut random = Random(43);
    for dtype in DType::ALL {
        let (rows, columns, tokens) = (21, if dtype.is_quantized() { 256 } else { 75 }, 5);
        let bytes = random_matrix(&mut random, dtype, rows, columns);
        let x = random.normals(tokens * columns);
        let ids: Vec<u32> = (0..rows as u32).collect();
        for backend in backends() {
            let mut expected: Option<(Vec<u32>, Vec<u32>)> = None;
            // Wherever the allocation begins, some of these are odd for elements of every size.
            for offset in 0..4 {
                let shifted = [&vec![0xff; offset][..], &bytes].concat();
                let mut weight = source(shifted, dtype, rows, columns, Segments::whole(columns));
                weight.offset = offset;
                let weight = backend.weight(weight).unwrap();
                let mut table = backend.buffer(rows, columns).unwrap();
                backend.embed(&weight, 0..rows as u32, &ids, 1.0, &mut table).unwrap();
                let products = product(&backend, &weight, &x, tokens, rows, None);
                let actual = (bits(&products), bits(&read(&backend, &table, rows)));
                assert_eq!(expected.get_or_insert_with(|| actual.clone()), &actual, "{dtype} at {offset}, {}", backend.path());
            }
        }
    }
}

#[test]
fn scales_that_do_not_fit_are_refused() {
    let backend = backend(CpuPath::fastest(), 1);
    let mut weight = source(vec![0; 64], DType::F8E4M3, 2, 32, Segments::whole(32));
    weight.scales = Some(BlockScales { blocks_per_row: 2, block_columns: 16, ..BlockScales::whole(1.0) });
    assert!(backend.weight(weight.clone()).err().unwrap().to_string().contains("do not cover it"));
    weight.scales = Some(BlockScales::whole(f32::INFINITY));
    assert!(backend.weight(weight.clone()).err().unwrap().to_string().contains("no finite number"));
    weight.scales = Some(BlockScales::whole(1.0));
    assert!(backend.weight(weight.clone()).is_ok());
    let mut block_type = source(vec![0; 68], DType::Q8_0, 2, 32, Segments::whole(32));
    block_type.scales = weight.scales;
    assert!(backend.weight(block_type).err().unwrap().to_string().contains("only F8_E4M3"));
}

/// An overflow upstream must not become a plausible number: its token's results are NaN, the others' as without it.
#[test]
fn what_is_no_number_stays_none() {
    let mut random = Random(43);
    let (rows, columns, tokens) = (5, 256, 3);
    let x = random.normals(tokens * columns);
    for dtype in quantized() {
        let bytes = random_matrix(&mut random, dtype, rows, columns);
        for backend in backends() {
            let weight = backend.weight(source(bytes.clone(), dtype, rows, columns, Segments::whole(columns))).unwrap();
            let sound = product(&backend, &weight, &x, tokens, rows, None);
            for (at, value) in (0..columns).step_by(13).zip([f32::NAN, f32::INFINITY, f32::NEG_INFINITY].into_iter().cycle()) {
                let mut damaged = x.clone();
                damaged[columns + at] = value;
                let actual = product(&backend, &weight, &damaged, tokens, rows, None);
                let path = backend.path();
                assert!(actual[rows..2 * rows].iter().all(|value| value.is_nan()), "{dtype} {path} {at}: {actual:?}");
                assert_eq!(bits(&actual[..rows]), bits(&sound[..rows]), "{dtype} {path} {at}");
                assert_eq!(bits(&actual[2 * rows..]), bits(&sound[2 * rows..]), "{dtype} {path} {at}");
                let alone = product(&backend, &weight, &damaged[columns..2 * columns], 1, rows, None);
                assert!(alone.iter().all(|value| value.is_nan()), "{dtype} {path} {at} alone: {alone:?}");
            }
        }
    }
}
