//! Measured read bandwidth of the machine: what decoding is judged against.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::error::Result;
use crate::memory::AlignedBuffer;
use crate::pool::ThreadPool;

/// Bytes read per pass: far beyond the caches.
const BYTES: usize = 256 << 20;
/// Bytes per task.
const TASK_BYTES: usize = 1 << 20;
/// Passes; the fastest counts.
const PASSES: usize = 4;

/// Bytes per second that `threads` threads read from memory together. Takes about 0.2 s and 256 MB.
///
/// # Errors
/// When the memory or the threads cannot be had.
pub fn measure_read_bandwidth(threads: usize) -> Result<f64> {
    let pool = ThreadPool::new(threads).map_err(|error| crate::KernelError::Unsupported {
        backend: "cpu",
        what: format!("starting {threads} threads ({error})"),
        remedy: "ask for fewer threads".into(),
    })?;
    let mut buffer = AlignedBuffer::<f32>::zeroed(BYTES / size_of::<f32>(), "the bandwidth measurement")?;
    // Zeroed pages are not there until they are written.
    for (index, value) in buffer.iter_mut().enumerate() {
        *value = (index & 7) as f32;
    }
    let words = TASK_BYTES / size_of::<f32>();
    let checksum = AtomicU64::new(0);
    let mut seconds = f64::INFINITY;
    for _ in 0..PASSES {
        let start = Instant::now();
        pool.run(BYTES / TASK_BYTES, |task| {
            let sum = sum_words(&buffer[task * words..(task + 1) * words]);
            checksum.fetch_add(u64::from(sum), Ordering::Relaxed);
        });
        seconds = seconds.min(start.elapsed().as_secs_f64());
    }
    black_box(checksum);
    Ok(BYTES as f64 / seconds)
}

/// A sum the compiler turns into wide loads.
fn sum_words(words: &[f32]) -> u32 {
    let (lines, _) = words.as_chunks::<32>();
    let mut sums = [0_u32; 32];
    for line in lines {
        for (sum, word) in sums.iter_mut().zip(line) {
            *sum = sum.wrapping_add(word.to_bits());
        }
    }
    sums.into_iter().fold(0, u32::wrapping_add)
}
