//! Measured multiply-add rate of the machine: what prefill is judged against.
//!
//! Independent chains of f32 multiply-adds in registers, on all threads at once; no memory is touched. Products over
//! 8-bit quantized weights use other instructions and may be faster than this.

use std::hint::black_box;
use std::time::Instant;

use crate::error::Result;
use crate::path::CpuPath;
use crate::pool::ThreadPool;

/// Steps of a pass, some tens of milliseconds on a slow machine.
const STEPS: usize = 1 << 21;
/// Passes; the fastest counts.
const PASSES: usize = 4;
/// Chains that do not wait for each other: more than two units of four cycles latency can hold.
const CHAINS: usize = 12;

/// Floating-point operations (two per multiply-add) per second that `threads` threads do together in f32. Takes about
/// 0.1 s.
///
/// # Errors
/// When the threads cannot be had.
pub fn measure_peak_flops(threads: usize) -> Result<f64> {
    let pool = ThreadPool::new(threads).map_err(|error| crate::KernelError::Unsupported {
        backend: "cpu",
        what: format!("starting {threads} threads ({error})"),
        remedy: "ask for fewer threads".into(),
    })?;
    let path = CpuPath::choose(None)?;
    let mut best = 0.0_f64;
    for _ in 0..PASSES {
        let start = Instant::now();
        pool.run(threads, |_| {
            black_box(run(path));
        });
        let operations = threads * STEPS * CHAINS * lanes(path) * 2;
        best = best.max(operations as f64 / start.elapsed().as_secs_f64());
    }
    Ok(best)
}

fn lanes(path: CpuPath) -> usize {
    match path {
        CpuPath::Portable => 4,
        CpuPath::Avx2 => 8,
        CpuPath::Avx512 => 16,
    }
}

fn run(path: CpuPath) -> f32 {
    match path {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a path is chosen only where the machine supports its instructions (`CpuPath::choose`).
        CpuPath::Avx2 => unsafe { avx2() },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        CpuPath::Avx512 => unsafe { avx512() },
        _ => portable(),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn avx2() -> f32 {
    use std::arch::x86_64::{_mm256_cvtss_f32, _mm256_fmadd_ps, _mm256_set1_ps};
    let (factor, term) = (_mm256_set1_ps(black_box(0.75)), _mm256_set1_ps(black_box(0.25)));
    let mut sums = [_mm256_set1_ps(black_box(1.0)); CHAINS];
    for _ in 0..STEPS {
        for sum in &mut sums {
            *sum = _mm256_fmadd_ps(*sum, factor, term);
        }
    }
    sums.into_iter().map(|sum| _mm256_cvtss_f32(sum)).sum()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn avx512() -> f32 {
    use std::arch::x86_64::{_mm512_fmadd_ps, _mm512_reduce_add_ps, _mm512_set1_ps};
    let (factor, term) = (_mm512_set1_ps(black_box(0.75)), _mm512_set1_ps(black_box(0.25)));
    let mut sums = [_mm512_set1_ps(black_box(1.0)); CHAINS];
    for _ in 0..STEPS {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(*sum, factor, term);
        }
    }
    sums.into_iter().map(|sum| _mm512_reduce_add_ps(sum)).sum()
}

/// The chains as the compiler makes them for any machine.
fn portable() -> f32 {
    // Unknown to the compiler, and such that sums neither vanish nor grow.
    let (factor, term) = (black_box([0.75_f32; 4]), black_box([0.25_f32; 4]));
    let mut sums = [[1.0_f32; 4]; CHAINS];
    for _ in 0..STEPS {
        for sum in &mut sums {
            for lane in 0..4 {
                sum[lane] = sum[lane] * factor[lane] + term[lane];
            }
        }
    }
    sums.iter().flatten().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_measured() {
        let flops = measure_peak_flops(1).expect("one thread");
        println!("{:.1} GFLOP/s", flops / 1e9);
        assert!(flops > 1e8 && flops < 1e13, "{flops:e}");
    }
}
