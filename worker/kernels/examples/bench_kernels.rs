//! Speed of the CPU kernels beside the machine's measured read bandwidth.
//!
//! `cargo run --release -p forge-kernels --example bench_kernels [threads] [model]`. Prints GFLOP/s (2 · weights ·
//! tokens / time) and GB/s of weights for every type, with the shapes of the default model and of one of
//! half a billion parameters,
//! then one decode step's products and one prefill's, and attention (only these with `model`). Each matrix has enough copies that
//! its weights come from memory, as they do when a model is decoded.

use std::sync::Arc;
use std::time::Instant;

use forge_kernels::{
    AttentionBatch, AttentionParams, Backend, CpuBackend, CpuBuffer, CpuOptions, CpuWeight, DType, KernelError, KvDType, KvShape,
    MatrixSource, Product, Segments, SequenceSlice, measure_read_bandwidth, tree,
};

/// Bytes of weights to cycle through: beyond the caches.
const RESIDENT_BYTES: usize = 128 << 20;
/// Seconds per measurement.
const SECONDS: f64 = 0.15;

fn main() -> Result<(), KernelError> {
    let threads = std::env::args().nth(1).and_then(|threads| threads.parse().ok());
    let options = threads.map_or_else(CpuOptions::default, |threads| CpuOptions { threads, ..Default::default() });
    let backend = CpuBackend::new(options)?;
    let bandwidth = measure_read_bandwidth(options.threads)?;
    println!("{} threads, {} path, read bandwidth {:.1} GB/s", options.threads, backend.path(), bandwidth / 1e9);
    if std::env::args().nth(2).as_deref() == Some("model") {
        bench_model(&backend, bandwidth)?;
        return bench_attention(&backend);
    }
    println!("{:>6} {:>12} {:>6} {:>10} {:>8} {:>6}", "type", "shape", "tokens", "GFLOP/s", "GB/s", "of bw");
    for (rows, columns) in [(960, 576), (3072, 576), (576, 1536), (4096, 1024), (1024, 4096)] {
        for dtype in DType::ALL.into_iter().filter(|dtype| columns % dtype.block_elements() == 0) {
            bench_products(&backend, dtype, rows, columns, bandwidth)?;
        }
    }
    bench_model(&backend, bandwidth)?;
    bench_attention(&backend)
}

/// Bytes that decode to moderate values in every type.
fn matrix(dtype: DType, rows: usize, columns: usize, leaves: &[usize]) -> MatrixSource {
    let row_stride_bytes = dtype.row_bytes(columns).unwrap_or_default();
    let bytes: Vec<u8> = (0..rows * row_stride_bytes).map(|index| (index * 7 % 61) as u8).collect();
    MatrixSource {
        name: "bench".into(),
        bytes: Arc::new(bytes),
        offset: 0,
        row_stride_bytes,
        rows,
        columns,
        dtype,
        scales: None,
        segments: Segments::from_bounds(leaves.to_vec()).unwrap_or_else(|| Segments::whole(columns)),
    }
}

fn filled(backend: &CpuBackend, rows: usize, width: usize) -> Result<CpuBuffer, KernelError> {
    let mut buffer = backend.buffer(rows, width)?;
    let values: Vec<f32> = (0..rows * width).map(|index| (index * 13 % 97) as f32 / 48.0 - 1.0).collect();
    backend.write_rows(&mut buffer, 0..rows, &values)?;
    Ok(buffer)
}

/// Shortest time of one call of `function`, in seconds.
fn time(mut function: impl FnMut() -> Result<(), KernelError>) -> Result<f64, KernelError> {
    function()?;
    let (start, mut best) = (Instant::now(), f64::INFINITY);
    while start.elapsed().as_secs_f64() < SECONDS {
        let call = Instant::now();
        function()?;
        best = best.min(call.elapsed().as_secs_f64());
    }
    Ok(best)
}

fn bench_products(backend: &CpuBackend, dtype: DType, rows: usize, columns: usize, bandwidth: f64) -> Result<(), KernelError> {
    let bytes = rows * dtype.row_bytes(columns).unwrap_or_default();
    let copies = RESIDENT_BYTES / bytes + 1;
    let weights: Vec<CpuWeight> =
        (0..copies).map(|_| backend.weight(matrix(dtype, rows, columns, &[0, columns]))).collect::<Result<_, _>>()?;
    for tokens in [1, 8, 32, 512] {
        let x = filled(backend, tokens, columns)?;
        let mut out = backend.buffer(tokens, rows)?;
        let used = if tokens > 8 { 4.min(copies) } else { copies };
        let seconds = time(|| {
            for weight in &weights[..used] {
                backend.linear(&x, tokens, &mut [Product { weight, bias: None, out: &mut out }])?;
            }
            Ok(())
        })? / used as f64;
        let rate = bytes as f64 / seconds;
        println!(
            "{:>6} {:>12} {tokens:>6} {:>10.1} {:>8.1} {:>5.0}%",
            dtype.to_string(),
            format!("{rows}x{columns}"),
            2.0 * (rows * columns * tokens) as f64 / seconds / 1e9,
            rate / 1e9,
            100.0 * rate / bandwidth
        );
    }
    Ok(())
}

/// The products of one step of the default model: 30 layers of Q4_1, a head of Q8_0.
fn bench_model(backend: &CpuBackend, bandwidth: f64) -> Result<(), KernelError> {
    let mut layers = Vec::new();
    for _ in 0..30 {
        let load = |rows, columns, leaves: &[usize]| backend.weight(matrix(DType::Q4_1, rows, columns, leaves));
        let down: Vec<usize> = tree::even_leaves(48).iter().map(|block| block * 32).collect();
        layers.push([
            load(576, 576, &[0, 576])?,
            load(192, 576, &[0, 576])?,
            load(192, 576, &[0, 576])?,
            load(576, 576, &[0, 192, 384, 576])?,
            load(1536, 576, &[0, 576])?,
            load(1536, 576, &[0, 576])?,
            load(576, 1536, &down)?,
        ]);
    }
    let head = backend.weight(matrix(DType::Q8_0, 49152, 576, &[0, 576]))?;
    for tokens in [1, 8, 512] {
        let (hidden, inner) = (filled(backend, tokens, 576)?, filled(backend, tokens, 1536)?);
        let mut outs = [576, 192, 192, 576, 1536, 1536, 576].map(|width| backend.buffer(tokens, width));
        let mut logits = backend.buffer(tokens, 49152)?;
        let seconds = time(|| {
            for layer in &layers {
                let mut products: Vec<Product<'_, CpuBackend>> = Vec::new();
                for (weight, out) in layer.iter().zip(&mut outs) {
                    let out = out.as_mut().map_err(|_| KernelError::OutOfMemory { bytes: 0, what: "a bench" })?;
                    products.push(Product { weight, bias: None, out });
                }
                let (attention, rest) = products.split_at_mut(3);
                let (output, rest) = rest.split_at_mut(1);
                let (gate_up, down) = rest.split_at_mut(2);
                backend.linear(&hidden, tokens, attention)?;
                backend.linear(&hidden, tokens, output)?;
                backend.linear(&hidden, tokens, gate_up)?;
                backend.linear(&inner, tokens, down)?;
            }
            let rows = if tokens > 8 { 1 } else { tokens };
            backend.linear(&hidden, rows, &mut [Product { weight: &head, bias: None, out: &mut logits }])
        })?;
        println!(
            "default model, {tokens} tokens: {:.2} ms, {:.0} tokens/s, {:.0} GFLOP/s, {:.0}% of bandwidth",
            seconds * 1e3,
            tokens as f64 / seconds,
            2.0 * 135e6 * tokens as f64 / seconds / 1e9,
            100.0 * 96.5e6 / seconds / bandwidth
        );
    }
    Ok(())
}

/// Attention of all 30 layers of the default model: a prefill of 512 tokens, and one token after 1023 and after 16383.
fn bench_attention(backend: &CpuBackend) -> Result<(), KernelError> {
    for dtype in [KvDType::F16, KvDType::BF16, KvDType::Int8] {
        for (name, rows, positions) in
            [("prefill of 512", 512, 512), ("one token after 1023", 1, 1024), ("one token after 16383", 1, 16384)]
        {
            let seconds = time_attention(backend, dtype, rows, positions)?;
            println!("attention, {dtype}, {name}: {:.3} ms for 30 layers", 30.0 * seconds * 1e3);
        }
    }
    Ok(())
}

/// Shortest time of one layer's attention of the last `rows` of `positions`.
fn time_attention(backend: &CpuBackend, dtype: KvDType, rows: usize, positions: usize) -> Result<f64, KernelError> {
    let blocks = positions / 16;
    let mut pool = backend.kv_pool(KvShape { layers: 1, kv_heads: 3, head_dim: 64, value_dim: 64, block_size: 16, blocks, dtype })?;
    let slots: Vec<u32> = (0..positions as u32).collect();
    let kv = filled(backend, positions, 192)?;
    backend.kv_write(&mut pool, 0, &kv, &kv, &slots)?;
    let params = AttentionParams {
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        value_dim: 64,
        scale: 0.125,
        window: None,
        softcap: None,
        alibi: None,
        sinks: None,
    };
    let q = filled(backend, rows, 576)?;
    let mut out = backend.buffer(rows, 576)?;
    let sequence = SequenceSlice {
        row_start: 0,
        row_count: rows as u32,
        first_position: (positions - rows) as u32,
        table_start: 0,
        table_len: blocks as u32,
    };
    let block_tables: Vec<u32> = (0..blocks as u32).collect();
    let batch = AttentionBatch { sequences: &[sequence], block_tables: &block_tables, block_size: 16 };
    time(|| backend.attention(&q, &pool, 0, batch, params, &mut out))
}
