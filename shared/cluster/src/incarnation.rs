//! A process's incarnation: a number that grows at each start, though the clock may go back.
//!
//! Invariant: two starts over one folder never get the same number, and the later one gets the larger.

use std::io::{Error, ErrorKind, Result, Write};
use std::path::Path;

use forge_shared::ids::Incarnation;

const FILE: &str = "incarnation";

/// The incarnation of a process that starts now, milliseconds since 1970 by its clock: larger than any before.
///
/// # Errors
/// The file in `folder` cannot be read or written, or holds something else; the message names it.
pub fn next(folder: &Path, now_ms: u64) -> Result<Incarnation> {
    let path = folder.join(FILE);
    let named = |error: Error| Error::new(error.kind(), format!("{}: {error}", path.display()));
    let last = match std::fs::read_to_string(&path) {
        Ok(text) => text.trim().parse::<u64>().map_err(|_| {
            let reason = "it does not hold a number; if this folder is another process's, use one of its own";
            named(Error::new(ErrorKind::InvalidData, reason))
        })?,
        Err(error) if error.kind() == ErrorKind::NotFound => 0,
        Err(error) => return Err(named(error)),
    };
    let incarnation = last.saturating_add(1).max(now_ms);
    let write = || {
        let new = folder.join(format!("{FILE}.new"));
        let mut file = std::fs::File::create(&new)?;
        file.write_all(format!("{incarnation}\n").as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&new, &path)?;
        std::fs::File::open(folder)?.sync_all()
    };
    write().map_err(named)?;
    Ok(Incarnation(incarnation))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_grows_though_the_clock_goes_back() {
        let folder = tempfile::tempdir().unwrap();
        let times = [1_000, 2_000, 1_500, 0, 9_000].map(|now_ms| next(folder.path(), now_ms).unwrap().0);
        assert_eq!(times, [1_000, 2_000, 2_001, 2_002, 9_000]);
        std::fs::write(folder.path().join(FILE), "yesterday").unwrap();
        let error = next(folder.path(), 1).unwrap_err().to_string();
        assert!(error.contains("does not hold a number") && error.contains("incarnation"), "{error}");
        assert!(next(&folder.path().join("missing"), 1).is_err());
    }
}
