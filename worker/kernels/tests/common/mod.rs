//! Helpers of the integration tests: a small random generator, weights in every format, and plain references.

#![allow(dead_code)]

pub mod attention;

use std::sync::Arc;

use forge_kernels::{Backend, CpuBackend, CpuBuffer, CpuOptions, CpuPath, CpuWeight, DType, MatrixSource, Product, Segments};
use half::{bf16, f16};

/// Every quantized type.
pub fn quantized() -> impl Iterator<Item = DType> {
    DType::ALL.into_iter().filter(|dtype| dtype.is_quantized())
}

/// SplitMix64: small and repeatable.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// Roughly normal, deviation 1.
    pub fn normal(&mut self) -> f32 {
        let sum: f64 = (0..6).map(|_| (self.next() >> 11) as f64 / (1_u64 << 53) as f64).sum();
        ((sum - 3.0) * std::f64::consts::SQRT_2) as f32
    }

    pub fn normals(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.normal()).collect()
    }
}

/// Every supported path with 1 to 3 threads.
pub fn backends() -> Vec<CpuBackend> {
    let paths = CpuPath::ALL.into_iter().filter(|path| path.is_supported());
    paths.flat_map(|path| (1..=3).map(move |threads| backend(path, threads))).collect()
}

pub fn backend(path: CpuPath, threads: usize) -> CpuBackend {
    CpuBackend::new(CpuOptions { threads, path: Some(path) }).unwrap()
}

/// Where the f16 scales of a block lie.
pub fn half_scales(dtype: DType) -> &'static [usize] {
    match dtype {
        DType::F16 | DType::Q4_0 | DType::Q5_0 | DType::Q8_0 | DType::IQ4_NL | DType::IQ4_XS => &[0],
        DType::Q4_1 | DType::Q5_1 | DType::Q4_K | DType::Q5_K => &[0, 2],
        DType::Q2_K => &[80, 82],
        DType::Q3_K => &[108],
        DType::Q6_K => &[208],
        _ => &[],
    }
}

/// Random bytes of `rows` × `columns` in a format, with sensible scales.
pub fn random_matrix(random: &mut Random, dtype: DType, rows: usize, columns: usize) -> Vec<u8> {
    let blocks = rows * columns / dtype.block_elements();
    let mut bytes = Vec::new();
    for _ in 0..blocks {
        let start = bytes.len();
        match dtype {
            DType::F32 => bytes.extend(random.normal().to_le_bytes()),
            DType::BF16 => bytes.extend(bf16::from_f32(random.normal()).to_le_bytes()),
            _ => bytes.extend((0..dtype.block_bytes()).map(|_| random.next() as u8)),
        }
        let block = &mut bytes[start..];
        match dtype {
            // No NaN, nothing above 15.
            DType::F8E4M3 => block[0] &= 0xbf,
            DType::MXFP4 => block[0] = 120 + block[0] % 8,
            _ => {}
        }
        for &at in half_scales(dtype) {
            block[at..at + 2].copy_from_slice(&f16::from_f32(random.normal() * 0.1).to_le_bytes());
        }
    }
    bytes
}

/// A whole matrix as a source.
pub fn source(bytes: Vec<u8>, dtype: DType, rows: usize, columns: usize, segments: Segments) -> MatrixSource {
    MatrixSource {
        name: "test".into(),
        bytes: Arc::new(bytes),
        offset: 0,
        row_stride_bytes: dtype.row_bytes(columns).unwrap(),
        rows,
        columns,
        dtype,
        scales: None,
        segments,
    }
}

/// The matrix's values.
pub fn dequantize(bytes: &[u8], dtype: DType) -> Vec<f32> {
    let mut values = vec![0.0; bytes.len() / dtype.block_bytes() * dtype.block_elements()];
    forge_kernels::dequantize(dtype, bytes, &mut values);
    values
}

/// A buffer holding `values`.
pub fn buffer(backend: &CpuBackend, values: &[f32], width: usize) -> CpuBuffer {
    let rows = values.len() / width;
    let mut buffer = backend.buffer(rows, width).unwrap();
    backend.write_rows(&mut buffer, 0..rows, values).unwrap();
    buffer
}

/// The first `rows` rows.
pub fn read(backend: &CpuBackend, buffer: &CpuBuffer, rows: usize) -> Vec<f32> {
    let mut values = vec![0.0; rows * backend.width(buffer)];
    backend.read_rows(buffer, 0..rows, &mut values).unwrap();
    values
}

/// x · weightᵀ + bias through the backend.
pub fn product(backend: &CpuBackend, weight: &CpuWeight, x: &[f32], rows: usize, out_width: usize, bias: Option<&[f32]>) -> Vec<f32> {
    let x = buffer(backend, x, x.len() / rows);
    let mut out = backend.buffer(rows, out_width).unwrap();
    let bias = bias.map(|bias| backend.vector(bias).unwrap());
    let mut products = [Product { weight, bias: bias.as_ref(), out: &mut out }];
    backend.linear(&x, rows, &mut products).unwrap();
    read(backend, &out, rows)
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Largest difference relative to the largest magnitude of `expected`.
pub fn relative_error(actual: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(actual.len(), expected.len());
    let scale = expected.iter().fold(1e-30_f64, |scale, value| scale.max(value.abs()));
    actual.iter().zip(expected).fold(0.0, |error: f64, (a, e)| error.max((f64::from(*a) - e).abs())) / scale
}
