//! Block formats and quantized products against candle, which reads and multiplies them independently.

mod common;

use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{Device, Module, Tensor};
use common::*;
use forge_kernels::{Backend, CpuPath, DType, Segments};

/// The types that candle has too.
const FORMATS: [(DType, GgmlDType); 10] = [
    (DType::Q4_0, GgmlDType::Q4_0),
    (DType::Q4_1, GgmlDType::Q4_1),
    (DType::Q5_0, GgmlDType::Q5_0),
    (DType::Q5_1, GgmlDType::Q5_1),
    (DType::Q8_0, GgmlDType::Q8_0),
    (DType::Q2_K, GgmlDType::Q2K),
    (DType::Q3_K, GgmlDType::Q3K),
    (DType::Q4_K, GgmlDType::Q4K),
    (DType::Q5_K, GgmlDType::Q5K),
    (DType::Q6_K, GgmlDType::Q6K),
];

/// A random matrix as candle quantizes it.
fn quantized(random: &mut Random, format: GgmlDType, rows: usize, columns: usize) -> QTensor {
    let values = Tensor::from_vec(random.normals(rows * columns), (rows, columns), &Device::Cpu).unwrap();
    QTensor::quantize(&values, format).unwrap()
}

#[test]
fn dequantized_rows_equal_candles_bit_for_bit() {
    let mut random = Random(31);
    let backend = backend(CpuPath::fastest(), 1);
    for (dtype, format) in FORMATS {
        let (rows, columns) = (6, 768);
        let tensor = quantized(&mut random, format, rows, columns);
        let expected = tensor.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let bytes = tensor.data().unwrap().into_owned();
        let table = backend.weight(source(bytes, dtype, rows, columns, Segments::whole(columns))).unwrap();
        let mut out = backend.buffer(rows, columns).unwrap();
        backend.embed(&table, 0..6, &[0, 1, 2, 3, 4, 5], 1.0, &mut out).unwrap();
        assert_eq!(bits(&read(&backend, &out, rows)), bits(&expected), "{dtype}");
    }
}

#[test]
fn products_agree_with_candles() {
    let mut random = Random(32);
    for (dtype, format) in FORMATS {
        let (rows, columns, tokens) = (33, 512, 5);
        let tensor = quantized(&mut random, format, rows, columns);
        let bytes = tensor.data().unwrap().into_owned();
        let x = random.normals(tokens * columns);
        let input = Tensor::from_vec(x.clone(), (tokens, columns), &Device::Cpu).unwrap();
        let output = QMatMul::from_qtensor(tensor).unwrap().forward(&input).unwrap();
        let expected: Vec<f64> = output.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f64::from).collect();
        for backend in backends() {
            let weight = backend.weight(source(bytes.clone(), dtype, rows, columns, Segments::whole(columns))).unwrap();
            let error = relative_error(&product(&backend, &weight, &x, tokens, rows, None), &expected);
            // For blocks of 256 candle rounds activations with one scale for all of them.
            let bound = if dtype.block_elements() == 32 { 2e-3 } else { 2e-2 };
            assert!(error < bound, "{dtype} on {}: {error}", backend.path());
        }
    }
}
