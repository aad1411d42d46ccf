//! Which instruction set the kernels run on, chosen once when a backend is made.
//!
//! Invariant: all paths give equal bits, so the choice is not part of the numerics id.

use std::fmt;

use crate::error::{KernelError, Result};

/// Environment variable that forces a path (`portable`, `avx2` or `avx512`): for tests and for bisecting.
pub const PATH_VARIABLE: &str = "FORGE_CPU_PATH";

/// An instruction set the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CpuPath {
    /// Plain Rust; runs everywhere.
    Portable,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ, VL and VNNI.
    Avx512,
}

impl CpuPath {
    /// Every path, slowest first.
    pub const ALL: [CpuPath; 3] = [CpuPath::Portable, CpuPath::Avx2, CpuPath::Avx512];

    /// Whether this machine can run the path.
    pub fn is_supported(self) -> bool {
        match self {
            CpuPath::Portable => true,
            #[cfg(target_arch = "x86_64")]
            CpuPath::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c"),
            #[cfg(target_arch = "x86_64")]
            CpuPath::Avx512 => {
                CpuPath::Avx2.is_supported()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(not(target_arch = "x86_64"))]
            CpuPath::Avx2 | CpuPath::Avx512 => false,
        }
    }

    /// The fastest path of this machine.
    pub fn fastest() -> CpuPath {
        CpuPath::ALL.into_iter().rev().find(|path| path.is_supported()).unwrap_or(CpuPath::Portable)
    }

    /// The path of that name.
    fn named(name: &str) -> Result<CpuPath> {
        CpuPath::ALL.into_iter().find(|path| path.to_string() == name).ok_or_else(|| KernelError::Unsupported {
            backend: "cpu",
            what: format!("{PATH_VARIABLE}={name}"),
            remedy: "use portable, avx2 or avx512, or unset it".into(),
        })
    }

    /// The path asked for, else the one named by [`PATH_VARIABLE`], else the fastest.
    ///
    /// # Errors
    /// A name that is unknown, or a path this machine cannot run.
    pub fn choose(asked: Option<CpuPath>) -> Result<CpuPath> {
        let chosen = match (asked, std::env::var(PATH_VARIABLE)) {
            (Some(path), _) => path,
            (None, Ok(name)) => CpuPath::named(&name)?,
            (None, Err(_)) => CpuPath::fastest(),
        };
        if chosen.is_supported() {
            return Ok(chosen);
        }
        Err(KernelError::Unsupported {
            backend: "cpu",
            what: format!("the {chosen} path on this machine"),
            remedy: format!("unset {PATH_VARIABLE}; the fastest path here is {}", CpuPath::fastest()),
        })
    }
}

impl fmt::Display for CpuPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CpuPath::Portable => "portable",
            CpuPath::Avx2 => "avx2",
            CpuPath::Avx512 => "avx512",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_to_their_paths() {
        for path in CpuPath::ALL {
            assert_eq!(CpuPath::named(&path.to_string()).unwrap(), path);
        }
        let refusal = CpuPath::named("sse9").unwrap_err().to_string();
        assert!(refusal.contains("FORGE_CPU_PATH=sse9") && refusal.contains("portable, avx2 or avx512"), "{refusal}");
    }

    #[test]
    fn unsupported_paths_are_refused() {
        for path in CpuPath::ALL {
            assert_eq!(CpuPath::choose(Some(path)).is_ok(), path.is_supported(), "{path}");
        }
        assert!(CpuPath::fastest().is_supported());
    }
}
