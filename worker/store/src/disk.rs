//! The disk below the store, behind a small trait: how much is free, and how bytes get written.
//! Tests and embedders with a quota put their own in its place.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use crate::error::{Result, StoreError};

/// Kept free beside what is downloaded, for manifests and other programs.
const HEADROOM_BYTES: u64 = 16 << 20;

/// The disk the store writes to.
pub trait Disk: Send + Sync {
    /// Bytes that may still be written below `folder`.
    ///
    /// # Errors
    /// Whatever the system reports.
    fn available_bytes(&self, folder: &Path) -> io::Result<u64>;

    /// Appends a chunk to an open file.
    ///
    /// # Errors
    /// [`io::ErrorKind::StorageFull`] or [`io::ErrorKind::QuotaExceeded`] when there is no room.
    fn write(&self, file: &mut File, chunk: &[u8]) -> io::Result<()>;
}

/// The real disk.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemDisk;

impl Disk for SystemDisk {
    fn available_bytes(&self, folder: &Path) -> io::Result<u64> {
        fs4::available_space(folder)
    }

    fn write(&self, file: &mut File, chunk: &[u8]) -> io::Result<()> {
        file.write_all(chunk)
    }
}

/// Refuses before the first byte if `needed_bytes` will not fit.
pub(crate) fn check_room(disk: &dyn Disk, folder: &Path, needed_bytes: u64, partial_kept: bool) -> Result<()> {
    let available = disk.available_bytes(folder).map_err(StoreError::io("ask for free space in", folder))?;
    if available >= needed_bytes.saturating_add(HEADROOM_BYTES) {
        return Ok(());
    }
    Err(StoreError::DiskFull { path: folder.to_owned(), needed_bytes, available_bytes: Some(available), partial_kept })
}

/// Turns a failed write into "disk full" where it is that.
pub(crate) fn write_error(error: io::Error, path: &Path, needed_bytes: u64, partial_kept: bool) -> StoreError {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            StoreError::DiskFull { path: path.parent().unwrap_or(path).to_owned(), needed_bytes, available_bytes: None, partial_kept }
        }
        _ => StoreError::io("write", path)(error),
    }
}
