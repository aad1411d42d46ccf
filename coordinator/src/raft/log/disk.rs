//! Files of one folder, as the log needs them: a trait, and the real folder behind it.
//!
//! What it is not: it knows no format. Everything above it runs unchanged on [`super::MemoryDisk`], which crashes, tears
//! and fills up on demand.
//!
//! Invariant: what [`Disk::sync`] and [`Disk::sync_folder`] returned `Ok` for survives a crash; nothing else is promised.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt, FileExt as _, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use forge_shared::telemetry::RaftMetrics;

use super::{LogError, WriteAside};

/// One folder with plain files.
pub trait Disk: Send + 'static {
    /// Names of all files.
    fn list(&mut self) -> io::Result<Vec<String>>;
    /// All of a file, which may have at most `max_bytes`.
    fn read(&mut self, name: &str, max_bytes: u64) -> io::Result<Vec<u8>>;
    /// Makes an empty file, over one that is there.
    fn create(&mut self, name: &str) -> io::Result<()>;
    /// Makes an empty file, over one that is there, to be written at once by another thread.
    fn create_aside(&mut self, name: &str) -> io::Result<WriteAside>;
    /// Writes at `offset`. After an error any part may be written.
    fn write_at(&mut self, name: &str, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// Cuts a file to `len_bytes`.
    fn truncate(&mut self, name: &str, len_bytes: u64) -> io::Result<()>;
    /// Makes a file's content durable.
    fn sync(&mut self, name: &str) -> io::Result<()>;
    /// Gives a file another name, over one that is there.
    fn rename(&mut self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a file.
    fn remove(&mut self, name: &str) -> io::Result<()>;
    /// Makes creations, renames and removals durable.
    fn sync_folder(&mut self) -> io::Result<()>;
}

/// Called before every fsync: a test's slow disk.
#[derive(Clone)]
pub struct BeforeSync(pub Arc<dyn Fn() + Send + Sync>);

impl fmt::Debug for BeforeSync {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BeforeSync")
    }
}

const LOCK_FILE: &str = "LOCK";

/// A real folder, locked for this process as long as this lives.
pub struct Folder {
    path: PathBuf,
    /// Files that were written, open: closing and opening around every fsync costs.
    open: BTreeMap<String, File>,
    metrics: RaftMetrics,
    before_sync: Option<BeforeSync>,
    _lock: File,
}

impl Folder {
    /// Makes the folder if it is not there (for its owner alone: it holds what the cluster knows), and locks it.
    ///
    /// # Errors
    /// [`LogError::Locked`] when another process uses it.
    pub fn open(path: &Path) -> Result<Self, LogError> {
        let io = |operation| move |source| LogError::Io { operation, name: path.display().to_string(), source };
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io("make"))?;
        let lock_path = path.join(LOCK_FILE);
        let lock = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(lock_path).map_err(io("lock"))?;
        match fs4::fs_std::FileExt::try_lock_exclusive(&lock) {
            Ok(true) => {}
            Ok(false) => return Err(LogError::Locked { folder: path.display().to_string() }),
            Err(source) => return Err(io("lock")(source)),
        }
        Ok(Self { path: path.to_owned(), open: BTreeMap::new(), metrics: RaftMetrics::default(), before_sync: None, _lock: lock })
    }

    /// Tells `metrics` how long each fsync takes.
    #[must_use]
    pub fn measured(self, metrics: RaftMetrics) -> Self {
        Self { metrics, ..self }
    }

    /// Calls this before each fsync.
    #[must_use]
    pub fn slowed(self, before_sync: Option<BeforeSync>) -> Self {
        Self { before_sync, ..self }
    }

    fn wait_before_sync(&self) {
        if let Some(BeforeSync(wait)) = &self.before_sync {
            wait();
        }
    }

    fn new_file(&self, name: &str) -> io::Result<File> {
        OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(self.path.join(name))
    }

    fn file(&mut self, name: &str) -> io::Result<&File> {
        if !self.open.contains_key(name) {
            let file = OpenOptions::new().write(true).open(self.path.join(name))?;
            self.open.insert(name.to_owned(), file);
        }
        self.open.get(name).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl Disk for Folder {
    fn list(&mut self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.path)? {
            let entry = entry?;
            if entry.file_type()?.is_file()
                && let Ok(name) = entry.file_name().into_string()
                && name != LOCK_FILE
            {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    fn read(&mut self, name: &str, max_bytes: u64) -> io::Result<Vec<u8>> {
        let path = self.path.join(name);
        let len = std::fs::metadata(&path)?.len();
        if len > max_bytes {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("{len} bytes; at most {max_bytes} are expected")));
        }
        std::fs::read(path)
    }

    fn create(&mut self, name: &str) -> io::Result<()> {
        let file = self.new_file(name)?;
        self.open.insert(name.to_owned(), file);
        Ok(())
    }

    fn create_aside(&mut self, name: &str) -> io::Result<WriteAside> {
        let mut file = self.new_file(name)?;
        let metrics = self.metrics.clone();
        Ok(Box::new(move |parts| {
            parts.iter().try_for_each(|part| file.write_all(part))?;
            let began = Instant::now();
            file.sync_data()?;
            metrics.fsync_s.observe(began.elapsed().as_secs_f64());
            Ok(())
        }))
    }

    fn write_at(&mut self, name: &str, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file(name)?.write_all_at(bytes, offset)
    }

    fn truncate(&mut self, name: &str, len_bytes: u64) -> io::Result<()> {
        self.file(name)?.set_len(len_bytes)
    }

    fn sync(&mut self, name: &str) -> io::Result<()> {
        let began = Instant::now();
        self.wait_before_sync();
        let synced = self.file(name)?.sync_data();
        self.metrics.fsync_s.observe(began.elapsed().as_secs_f64());
        synced
    }

    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        self.open.remove(from);
        self.open.remove(to);
        std::fs::rename(self.path.join(from), self.path.join(to))
    }

    fn remove(&mut self, name: &str) -> io::Result<()> {
        self.open.remove(name);
        std::fs::remove_file(self.path.join(name))
    }

    fn sync_folder(&mut self) -> io::Result<()> {
        self.wait_before_sync();
        File::open(&self.path)?.sync_all()
    }
}
