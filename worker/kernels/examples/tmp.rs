//! tmp
use forge_kernels::*;
use std::sync::Arc;
use std::time::Instant;
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let b = CpuBackend::new(CpuOptions { threads: 1, path: None }).unwrap();
    for (dtype, rows, columns) in
        [(DType::Q4_1, 960, 576), (DType::Q8_0, 960, 576), (DType::Q4_1, 576, 1536), (DType::Q4_1, 64, 4096), (DType::F16, 256, 576)]
    {
        for copies in [1, 200] {
            let stride = dtype.row_bytes(columns).unwrap();
            let ws: Vec<_> = (0..copies)
                .map(|_| {
                    b.weight(MatrixSource {
                        name: "x".into(),
                        bytes: Arc::new(vec![33u8; rows * stride]),
                        offset: 0,
                        row_stride_bytes: stride,
                        rows,
                        columns,
                        dtype,
                        segments: Segments::whole(columns),
                    })
                    .unwrap()
                })
                .collect();
            for tokens in [1, 2, 4, 8] {
                let x = b.buffer(tokens, columns).unwrap();
                let mut out = b.buffer(tokens, rows).unwrap();
                let mut best = f64::MAX;
                for _ in 0..(if copies == 1 { 3000 } else { 20 }) {
                    for w in &ws {
                        let t = Instant::now();
                        b.linear(&x, tokens, &mut [Product { weight: w, bias: None, out: &mut out }]).unwrap();
                        best = best.min(t.elapsed().as_secs_f64());
                    }
                }
                let blocks = (rows * columns / 32) as f64 / 16.0;
                println!(
                    "{dtype} {rows}x{columns} copies {copies} m={tokens}: {:.1} us, {:.1} GB/s, {:.1} ns per 16 blocks = {:.0} cycles; {:.0} GFLOP/s",
                    best * 1e6,
                    (rows * stride) as f64 / best / 1e9,
                    best * 1e9 / blocks,
                    best * 3.85e9 / blocks,
                    2.0 * (rows * columns * tokens) as f64 / best / 1e9
                );
            }
        }
    }
    let _ = a;
}
