//! Looks through weights for NaN and infinities while loading: every dense value, every scale of quantized blocks.
//! One pass at memory speed over the shard's own bytes, shared by all cores.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use forge_kernels::{MatrixSource, holds_non_finite};

use crate::error::{ModelError, Result};
use crate::progress::LoadProgress;

/// Looks through all matrices of the model at `path`, and tells how many bytes it has seen.
///
/// # Errors
/// [`ModelError::NonFinite`] for the first matrix in order that holds one.
pub(crate) fn scan(path: &Path, matrices: &[MatrixSource], progress: &LoadProgress) -> Result<()> {
    let workers = std::thread::available_parallelism().map_or(1, usize::from).min(matrices.len());
    let next = AtomicUsize::new(0);
    let found: Mutex<Option<(usize, usize)>> = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(matrix) = matrices.get(index) else { return };
                    if let Some(at) = first_non_finite(matrix, progress) {
                        let mut found = found.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                        if found.is_none_or(|(first, _)| index < first) {
                            *found = Some((index, at));
                        }
                    }
                }
            });
        }
    });
    match found.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        None => Ok(()),
        Some((matrix, index)) => Err(ModelError::NonFinite { path: path.to_owned(), tensor: matrices[matrix].name.clone(), index }),
    }
}

/// Index of the first block (element of a dense type), within the slice, that holds a NaN or an infinity.
fn first_non_finite(matrix: &MatrixSource, progress: &LoadProgress) -> Option<usize> {
    let bytes = (*matrix.bytes).as_ref();
    let row_bytes = matrix.dtype.row_bytes(matrix.columns)?;
    let blocks = matrix.columns / matrix.dtype.block_elements();
    (0..matrix.rows).find_map(|row| {
        let start = matrix.offset + row * matrix.row_stride_bytes;
        let row_bytes = bytes.get(start..start + row_bytes)?;
        progress.add(row_bytes.len());
        // First the fast question for the row, then where.
        holds_non_finite(matrix.dtype, row_bytes).then(|| {
            let block_bytes = matrix.dtype.block_bytes();
            let block = row_bytes.chunks_exact(block_bytes).position(|block| holds_non_finite(matrix.dtype, block));
            row * blocks + block.unwrap_or(0)
        })
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use forge_kernels::{DType, Segments};

    use super::*;

    fn matrix(dtype: DType, rows: usize, columns: usize, bytes: Vec<u8>) -> MatrixSource {
        MatrixSource {
            name: "m".to_owned(),
            bytes: Arc::new(bytes),
            offset: 0,
            row_stride_bytes: dtype.row_bytes(columns).unwrap(),
            rows,
            columns,
            dtype,
            scales: None,
            segments: Segments::whole(columns),
        }
    }

    #[test]
    fn finds_the_first_bad_value_of_each_type() {
        for dtype in [DType::F32, DType::F16, DType::BF16, DType::Q4_0, DType::Q4_1, DType::Q8_0] {
            let (rows, columns) = (3, 64);
            let bytes = dtype.row_bytes(columns).unwrap() * rows;
            assert!(scan(Path::new("p"), &[matrix(dtype, rows, columns, vec![0; bytes])], &LoadProgress::default()).is_ok());
            let blocks = columns / dtype.block_elements();
            let bad = blocks + 1;
            for infinity in [false, true] {
                let mut damaged = vec![0; bytes];
                let at = bad * dtype.block_bytes();
                match dtype {
                    DType::F32 => damaged[at..at + 4].copy_from_slice(&(if infinity { f32::INFINITY } else { f32::NAN }).to_le_bytes()),
                    DType::BF16 => damaged[at..at + 2].copy_from_slice(&[if infinity { 0x80 } else { 0xc0 }, 0xff]),
                    _ => damaged[at..at + 2].copy_from_slice(&[if infinity { 0 } else { 1 }, 0xfc]),
                }
                match scan(Path::new("p"), &[matrix(dtype, rows, columns, damaged)], &LoadProgress::default()) {
                    Err(ModelError::NonFinite { tensor, index, .. }) => assert_eq!((tensor.as_str(), index), ("m", bad), "{dtype}"),
                    other => panic!("{dtype}: {other:?}"),
                }
            }
        }
    }
}
