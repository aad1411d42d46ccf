//! The folder of one embedded cluster: new for each process, held by a lock while it runs, removed with it.
//!
//! What a process that was killed left is removed by the next one that begins: nobody holds its lock any more.
//!
//! Invariant: a folder whose process lives is never removed by another.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::failure::{Failure, Result};

/// Held while folders are made and swept.
const ALL_LOCK: &str = "lock";
/// Held by a folder's process.
const LOCK: &str = "lock";
/// For another process to make its folder.
const WAIT: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(5);
/// Folders of one process number: as many containers may share a home.
const MAX_TRIES: u32 = 1000;

/// See the module documentation.
#[derive(Debug)]
pub struct LocalFolder {
    path: PathBuf,
    _lock: File,
}

impl LocalFolder {
    /// Makes a folder below a home, for the owner alone, and removes those that were left.
    ///
    /// # Errors
    /// If the home cannot be written.
    pub fn make(home: &Path) -> Result<Self> {
        let parent = home.join("local");
        let failed = |error: std::io::Error| {
            Failure::of(&error)
                .while_doing(&format!("cannot keep the cluster's state in {}", parent.display()))
                .help("FORGE_HOME names the folder for models and state: it must be writable, and its file system must have locks")
        };
        private().recursive(true).create(&parent).map_err(failed)?;
        let all = File::create(parent.join(ALL_LOCK)).map_err(failed)?;
        let began = Instant::now();
        while !is_locked_now(&all).map_err(failed)? {
            if began.elapsed() > WAIT {
                return Err(Failure::new(format!("{} is locked for more than {} s", parent.display(), WAIT.as_secs()))
                    .help("another `forgectl serve` hangs while it starts: end it"));
            }
            std::thread::sleep(POLL);
        }
        sweep(&parent);
        let pid = std::process::id();
        let names = (0..MAX_TRIES).map(|number| if number == 0 { format!("serve-{pid}") } else { format!("serve-{pid}-{number}") });
        for path in names.map(|name| parent.join(name)) {
            match private().create(&path) {
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => continue,
                made => made.map_err(failed)?,
            }
            let lock = File::create(path.join(LOCK)).map_err(failed)?;
            if is_locked_now(&lock).map_err(failed)? {
                return Ok(LocalFolder { path, _lock: lock });
            }
        }
        Err(Failure::new(format!("{} has a folder for every name", parent.display())).help("remove those of processes that have ended"))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for LocalFolder {
    fn drop(&mut self) {
        // What is left is swept by the next.
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::debug!(%error, folder = %self.path.display(), "the cluster's folder was not removed");
        }
    }
}

fn private() -> DirBuilder {
    let mut builder = DirBuilder::new();
    builder.mode(0o700);
    builder
}

fn is_locked_now(file: &File) -> std::io::Result<bool> {
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Removes folders whose process has ended. What cannot be looked at is left.
fn sweep(parent: &Path) {
    let entries = fs::read_dir(parent).into_iter().flatten().filter_map(|entry| entry.ok());
    for folder in entries.map(|entry| entry.path()).filter(|path| path.is_dir()) {
        let is_left = match File::open(folder.join(LOCK)) {
            Ok(lock) => is_locked_now(&lock).unwrap_or(false),
            // Ended between making the folder and its lock; both are made under the lock that this process holds.
            Err(error) => error.kind() == std::io::ErrorKind::NotFound,
        };
        if is_left && fs::remove_dir_all(&folder).is_ok() {
            tracing::debug!(folder = %folder.display(), "removed what a process left that was killed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_live_as_long_as_their_process_and_leftovers_go() {
        let home = tempfile::tempdir().unwrap();
        let first = LocalFolder::make(home.path()).unwrap();
        let left = home.path().join("local/serve-1");
        fs::create_dir_all(left.join("data")).unwrap();
        fs::write(left.join(LOCK), "").unwrap();
        let second = LocalFolder::make(home.path()).unwrap();
        assert!(!left.exists(), "nobody holds it");
        assert!(first.path().is_dir() && second.path().is_dir() && first.path() != second.path());
        let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(first.path()).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o700);
        let path = first.path().to_owned();
        drop(first);
        assert!(!path.exists());
    }

    #[test]
    fn a_home_that_cannot_be_written_is_named() {
        let home = tempfile::tempdir().unwrap();
        fs::write(home.path().join("local"), "a file").unwrap();
        let error = LocalFolder::make(home.path()).unwrap_err().to_string();
        assert!(error.contains("local") && error.contains("FORGE_HOME"), "{error}");
    }
}
