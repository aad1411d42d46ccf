//! Measured speeds of a CPU, kept by its name and number of threads: the measurement takes some tenths of a second and as
//! much memory as a small model.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

const FILE: &str = "speeds.json";
/// A file of thousands of machines is not ours.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// See the module documentation. 0 where not measured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Speeds {
    /// Bytes per second that all threads read from memory together.
    pub read_bandwidth_bytes_per_s: u64,
    /// Floating-point operations per second of all threads together.
    pub matrix_flops: u64,
}

impl Speeds {
    /// Of `threads` threads of the CPU of this name, from the folder `cache` or measured now and put there. Without a
    /// folder nothing is measured.
    pub fn of(cpu: &str, threads: usize, cache: Option<&Path>) -> Self {
        let Some(folder) = cache else { return Speeds::default() };
        let key = format!("{cpu} x{threads}");
        let file = folder.join(FILE);
        let mut known = read(&file);
        if let Some(speeds) = known.get(&key) {
            return *speeds;
        }
        let speeds = measure(threads);
        known.insert(key, speeds);
        // What cannot be kept is measured again at the next start.
        if let Err(error) = serde_json::to_vec_pretty(&known).map_err(std::io::Error::other).and_then(|text| std::fs::write(&file, text)) {
            tracing::warn!(%error, file = %file.display(), "measured speeds are not kept");
        }
        speeds
    }
}

/// A file that is missing or damaged is an empty one: it holds nothing that cannot be had again.
fn read(file: &Path) -> BTreeMap<String, Speeds> {
    let small = std::fs::metadata(file).is_ok_and(|metadata| metadata.len() <= MAX_FILE_BYTES);
    if !small {
        return BTreeMap::new();
    }
    std::fs::read(file).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

fn measure(threads: usize) -> Speeds {
    let whole = |result: Result<f64, forge_kernels::KernelError>, what: &str| match result {
        // A rate is positive and far below 2^63.
        Ok(rate) => rate as u64,
        Err(error) => {
            tracing::warn!(%error, what, "not measured");
            0
        }
    };
    Speeds {
        read_bandwidth_bytes_per_s: whole(forge_kernels::measure_read_bandwidth(threads), "read bandwidth"),
        matrix_flops: whole(forge_kernels::measure_peak_flops(threads), "matrix peak"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speeds_are_measured_once_and_a_damaged_file_is_measured_over() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(folder.path().join(FILE), "{ not json").expect("writable");
        let first = Speeds::of("cpu", 1, Some(folder.path()));
        assert!(first.read_bandwidth_bytes_per_s > 0 && first.matrix_flops > 0, "{first:?}");
        assert_eq!(Speeds::of("cpu", 1, Some(folder.path())), first);
        assert_eq!(Speeds::of("cpu", 1, None), Speeds::default());
    }
}
