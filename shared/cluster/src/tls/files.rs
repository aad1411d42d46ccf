//! Where certificates and keys lie, and how they are written: whole or not at all, keys for the owner alone.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use super::TlsError;

/// The CA's certificate; no secret.
pub const CA_CERTIFICATE_FILE: &str = "ca.pem";
/// The CA's key; on coordinators and with whoever ran `cluster init`.
pub const CA_KEY_FILE: &str = "ca.key";
/// A process's certificate and its key, in one file so that a renewal replaces both at once.
pub const NODE_FILE: &str = "node.pem";

/// Counts files that were written.
static WRITTEN: AtomicU64 = AtomicU64::new(0);

/// Largest file that is read; a chain of certificates has a few KiB.
const MAX_FILE_BYTES: u64 = 256 << 10;

/// Writes a file for its owner alone (mode 0600): whole or not at all.
///
/// # Errors
/// [`TlsError::File`].
pub fn write_private(path: &Path, text: &str) -> Result<(), TlsError> {
    write(path, text, 0o600)
}

/// Writes a file that everybody may read: whole or not at all.
///
/// # Errors
/// [`TlsError::File`].
pub fn write_public(path: &Path, text: &str) -> Result<(), TlsError> {
    write(path, text, 0o644)
}

fn write(path: &Path, text: &str, mode: u32) -> Result<(), TlsError> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // Of its own: two threads may write one file, and the last is whole.
    let number = WRITTEN.fetch_add(1, Ordering::Relaxed);
    let temporary = directory.join(format!(".{name}.{}.{number}.new", std::process::id()));
    let attempt = || -> std::io::Result<()> {
        fs::create_dir_all(directory)?;
        let _ = fs::remove_file(&temporary);
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        fs::File::open(directory)?.sync_all()
    };
    attempt().map_err(|error| {
        let _ = fs::remove_file(&temporary);
        file_error(path, format!("cannot be written: {error}"))
    })
}

pub(super) fn read(path: &Path) -> Result<String, TlsError> {
    let length = fs::metadata(path).map_err(|error| file_error(path, format!("cannot be read: {error}")))?.len();
    if length > MAX_FILE_BYTES {
        return Err(file_error(path, format!("has {length} bytes; certificates and keys have a few thousand")));
    }
    fs::read_to_string(path).map_err(|error| file_error(path, format!("cannot be read: {error}")))
}

/// Reads a file with a key in it: refuses one that others may read.
pub(super) fn read_private(path: &Path) -> Result<String, TlsError> {
    let mode = fs::metadata(path).map_err(|error| file_error(path, format!("cannot be read: {error}")))?.permissions().mode();
    if mode & 0o077 != 0 {
        let reason = format!("holds a private key and its mode {:o} lets others read it: chmod 600 it", mode & 0o777);
        return Err(file_error(path, reason));
    }
    read(path)
}

/// The keys in a coordinator's `ca.key`, in PEM, one after the other.
///
/// # Errors
/// [`TlsError::File`].
pub fn read_keys(directory: &Path) -> Result<String, TlsError> {
    read_private(&directory.join(CA_KEY_FILE))
}

pub(super) fn file_error(path: &Path, reason: String) -> TlsError {
    TlsError::File { path: path.display().to_string(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_who_write_one_file_are_both_done_and_it_is_whole() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(NODE_FILE);
        let texts = ["a".repeat(10_000), "b".repeat(20_000)];
        std::thread::scope(|scope| {
            for text in &texts {
                scope.spawn(|| (0..100).for_each(|_| write_private(&path, text).expect("written")));
            }
        });
        assert!(texts.contains(&fs::read_to_string(&path).expect("there")));
        assert_eq!(fs::read_dir(folder.path()).expect("there").count(), 1, "nothing is left beside it");
    }
}
