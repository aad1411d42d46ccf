//! Advisory file locks between the processes (and threads) that share a store. Lock files are never
//! deleted: a deleted one would let two holders lock two different files of one name.

use std::fs::{File, OpenOptions, TryLockError};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::error::{Result, StoreError};
use crate::progress::CancelFlag;

const POLL: Duration = Duration::from_millis(50);

/// How to wait for a lock.
pub(crate) struct LockWait<'a> {
    /// What is locked, for messages.
    pub(crate) what: &'a str,
    pub(crate) limit: Duration,
    pub(crate) cancel: &'a CancelFlag,
    /// Called once when the lock is not free.
    pub(crate) on_wait: &'a dyn Fn(),
}

/// Locks for this holder alone; the lock ends when the file is dropped.
pub(crate) fn exclusive(path: &Path, wait: &LockWait<'_>) -> Result<File> {
    let file = open(path)?;
    let start = Instant::now();
    let mut told = false;
    loop {
        if try_exclusive_on(&file, path)? {
            return Ok(file);
        }
        if !told {
            (wait.on_wait)();
            told = true;
        }
        if start.elapsed() >= wait.limit {
            return Err(StoreError::Busy { what: wait.what.into(), waited_s: wait.limit.as_secs() });
        }
        wait.cancel.sleep(POLL)?;
    }
}

/// Locks for this holder alone if nobody holds it.
pub(crate) fn try_exclusive(path: &Path) -> Result<Option<File>> {
    let file = open(path)?;
    Ok(try_exclusive_on(&file, path)?.then_some(file))
}

/// Locks together with other shared holders; waits only while a removal is under way.
pub(crate) fn shared(path: &Path, limit: Duration) -> Result<File> {
    let file = open(path)?;
    let start = Instant::now();
    loop {
        match file.try_lock_shared() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if start.elapsed() < limit => std::thread::sleep(POLL),
            Err(TryLockError::WouldBlock) => {
                return Err(StoreError::Busy { what: "the model".into(), waited_s: limit.as_secs() });
            }
            Err(TryLockError::Error(error)) => return Err(StoreError::io("lock", path)(error)),
        }
    }
}

fn try_exclusive_on(file: &File, path: &Path) -> Result<bool> {
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(StoreError::io("lock", path)(error)),
    }
}

fn open(path: &Path) -> Result<File> {
    OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path).map_err(StoreError::io("open", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_held_lock_is_waited_for_within_bounds() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("one.lock");
        let held = try_exclusive(&path).unwrap().unwrap();
        assert!(try_exclusive(&path).unwrap().is_none());
        let told = std::cell::Cell::new(0);
        let wait = LockWait {
            what: "model x",
            limit: Duration::from_millis(120),
            cancel: &CancelFlag::default(),
            on_wait: &|| told.set(told.get() + 1),
        };
        let error = exclusive(&path, &wait).unwrap_err();
        assert!(matches!(error, StoreError::Busy { ref what, .. } if what == "model x"), "{error}");
        assert_eq!(told.get(), 1);
        drop(held);
        let _held = exclusive(&path, &wait).unwrap();
        assert!(shared(&path, Duration::ZERO).is_err());
    }
}
