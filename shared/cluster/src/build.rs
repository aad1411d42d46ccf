//! What this process is a build of, as it states it to the cluster.
//!
//! Invariant: it never states more than it is. A test of upgrades may have it state, and keep to, an older level, so that
//! one build stands for two.

use forge_shared::version::{Build, FIRST_LEVEL, LEVEL};

/// Names the level of an older build that this process is to stand for; for tests of upgrades.
pub const LEVEL_VARIABLE: &str = "FORGE_TEST_LEVEL";

/// This process's build.
///
/// # Errors
/// A level in [`LEVEL_VARIABLE`] that no build up to this one has.
pub fn of_this_process() -> Result<Build, String> {
    match std::env::var(LEVEL_VARIABLE) {
        Ok(text) if !text.is_empty() => lowered(&text),
        _ => Ok(Build::default()),
    }
}

fn lowered(text: &str) -> Result<Build, String> {
    match text.parse() {
        Ok(level) if (FIRST_LEVEL..=LEVEL).contains(&level) => Ok(Build { level, ..Build::default() }),
        _ => Err(format!("{LEVEL_VARIABLE}={text}: this build stands for levels {FIRST_LEVEL} to {LEVEL}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_build_stands_for_older_ones_and_for_no_newer() {
        assert_eq!(lowered("1").map(|build| build.level), Ok(1));
        for wrong in ["0", "3", "x", "-1"] {
            assert!(lowered(wrong).expect_err("no level").contains("1 to 2"), "{wrong}");
        }
    }
}
