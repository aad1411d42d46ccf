//! A folder in memory that fails as disks fail: for tests and the simulator.
//!
//! A crash keeps what was synced, and of what was not a part that depends on a number: none, some, all, or with sectors
//! missing; of folder changes a first part. Writes beyond the capacity fail after having written what fits.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use parking_lot::Mutex;

use super::{Disk, WriteAside};

const SECTOR_BYTES: usize = 512;

#[derive(Clone, Default)]
struct Content {
    durable: Vec<u8>,
    current: Vec<u8>,
}

#[derive(Clone)]
enum FolderChange {
    Link { name: String, file: u64 },
    Unlink { name: String },
    Rename { from: String, to: String },
}

fn apply(names: &mut BTreeMap<String, u64>, change: &FolderChange) {
    match change {
        FolderChange::Link { name, file } => drop(names.insert(name.clone(), *file)),
        FolderChange::Unlink { name } => drop(names.remove(name)),
        FolderChange::Rename { from, to } => {
            if let Some(file) = names.remove(from) {
                names.insert(to.clone(), file);
            }
        }
    }
}

#[derive(Default)]
struct State {
    files: BTreeMap<u64, Content>,
    names: BTreeMap<String, u64>,
    durable_names: BTreeMap<String, u64>,
    unsynced: Vec<FolderChange>,
    next_file: u64,
    capacity_bytes: Option<usize>,
    syncs: u64,
    crash_at_sync: Option<u64>,
    is_crashed: bool,
}

/// See the module. Clones share the folder, as a restarted process does.
#[derive(Clone, Default)]
pub struct MemoryDisk {
    state: Arc<Mutex<State>>,
}

impl MemoryDisk {
    /// An empty folder without a limit.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How much all files may hold; `None`: no limit.
    pub fn set_capacity_bytes(&self, capacity_bytes: Option<usize>) {
        self.state.lock().capacity_bytes = capacity_bytes;
    }

    /// Bytes of all files.
    #[must_use]
    pub fn used_bytes(&self) -> usize {
        self.state.lock().used()
    }

    /// How many times something was made durable.
    #[must_use]
    pub fn syncs(&self) -> u64 {
        self.state.lock().syncs
    }

    /// Lets the process die in its sync number `at`, counted from the first ever: that sync and everything after it fails
    /// until [`MemoryDisk::restart`].
    pub fn crash_at_sync(&self, at: Option<u64>) {
        self.state.lock().crash_at_sync = at;
    }

    /// Whether the process died.
    #[must_use]
    pub fn is_crashed(&self) -> bool {
        self.state.lock().is_crashed
    }

    /// Lets the process die now.
    pub fn crash(&self) {
        self.state.lock().is_crashed = true;
    }

    /// What a new process finds. `seed` says how much of what was not synced survived.
    pub fn restart(&self, seed: u64) {
        let mut state = self.state.lock();
        let mut numbers = Numbers(seed);
        state.crash_at_sync = None;
        state.is_crashed = false;
        for content in state.files.values_mut() {
            let survived = survive(content, &mut numbers);
            content.current.clone_from(&survived);
            content.durable = survived;
        }
        let changes = std::mem::take(&mut state.unsynced);
        let kept = numbers.below(changes.len() + 1);
        let mut names = state.durable_names.clone();
        for change in &changes[..kept] {
            apply(&mut names, change);
        }
        state.durable_names.clone_from(&names);
        state.names = names;
        let names: Vec<u64> = state.names.values().copied().collect();
        state.files.retain(|file, _| names.contains(file));
    }

    /// Changes a file behind the process's back.
    ///
    /// # Errors
    /// When there is no such file.
    pub fn tamper(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) -> io::Result<()> {
        let mut state = self.state.lock();
        let content = state.content(name)?;
        change(&mut content.current);
        content.durable = content.current.clone();
        Ok(())
    }

    /// Puts a file there.
    pub fn put(&self, name: &str, bytes: Vec<u8>) {
        let mut state = self.state.lock();
        let file = state.next_file;
        state.next_file += 1;
        state.files.insert(file, Content { durable: bytes.clone(), current: bytes });
        state.names.insert(name.into(), file);
        state.durable_names.insert(name.into(), file);
    }
}

/// What is left of a file after a crash.
fn survive(content: &Content, numbers: &mut Numbers) -> Vec<u8> {
    if content.current == content.durable {
        return content.durable.clone();
    }
    match numbers.below(4) {
        0 => content.durable.clone(),
        1 => content.current.clone(),
        2 if content.current.len() > content.durable.len() => {
            let kept = content.durable.len() + numbers.below(content.current.len() - content.durable.len());
            content.current[..kept].to_vec()
        }
        _ => {
            let mut mixed = content.current.clone();
            for start in (0..mixed.len()).step_by(SECTOR_BYTES) {
                let end = (start + SECTOR_BYTES).min(mixed.len());
                if mixed[start..end] != *content.durable.get(start..end).unwrap_or_default() && numbers.below(2) == 0 {
                    let older = content.durable.get(start..).unwrap_or_default().iter().copied().chain(std::iter::repeat(0));
                    mixed[start..end].iter_mut().zip(older).for_each(|(byte, older)| *byte = older);
                }
            }
            mixed
        }
    }
}

struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % bound.max(1) as u64) as usize
    }
}

impl State {
    fn used(&self) -> usize {
        self.names.values().filter_map(|file| self.files.get(file)).map(|content| content.current.len()).sum()
    }

    fn alive(&mut self) -> io::Result<&mut Self> {
        if self.is_crashed { Err(io::Error::other("the process is dead")) } else { Ok(self) }
    }

    fn content(&mut self, name: &str) -> io::Result<&mut Content> {
        let file = self.names.get(name).ok_or(io::ErrorKind::NotFound)?;
        self.files.get_mut(file).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn count_sync(&mut self) -> io::Result<()> {
        self.syncs += 1;
        if self.crash_at_sync == Some(self.syncs) {
            self.is_crashed = true;
        }
        self.alive().map(|_| ())
    }

    fn change(&mut self, change: FolderChange) {
        apply(&mut self.names, &change);
        self.unsynced.push(change);
    }
}

impl Disk for MemoryDisk {
    fn list(&mut self) -> io::Result<Vec<String>> {
        Ok(self.state.lock().alive()?.names.keys().cloned().collect())
    }

    fn read(&mut self, name: &str, max_bytes: u64) -> io::Result<Vec<u8>> {
        let mut state = self.state.lock();
        let content = state.alive()?.content(name)?;
        if content.current.len() as u64 > max_bytes {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        Ok(content.current.clone())
    }

    fn create(&mut self, name: &str) -> io::Result<()> {
        let mut state = self.state.lock();
        let state = state.alive()?;
        if let Ok(content) = state.content(name) {
            content.current.clear();
            return Ok(());
        }
        let file = state.next_file;
        state.next_file += 1;
        state.files.insert(file, Content::default());
        state.change(FolderChange::Link { name: name.into(), file });
        Ok(())
    }

    fn create_aside(&mut self, name: &str) -> io::Result<WriteAside> {
        self.create(name)?;
        let (mut folder, name) = (self.clone(), name.to_owned());
        Ok(Box::new(move |parts| {
            let mut offset = 0;
            for part in parts {
                folder.write_at(&name, offset, part)?;
                offset += part.len() as u64;
            }
            folder.sync(&name)
        }))
    }

    fn write_at(&mut self, name: &str, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.state.lock();
        let state = state.alive()?;
        let free = state.capacity_bytes.map_or(usize::MAX, |capacity| capacity.saturating_sub(state.used()));
        let content = state.content(name)?;
        let offset = usize::try_from(offset).map_err(io::Error::other)?;
        let grown = (offset + bytes.len()).saturating_sub(content.current.len());
        let fits = bytes.len() - grown.saturating_sub(free).min(bytes.len());
        if content.current.len() < offset + fits {
            content.current.resize(offset + fits, 0);
        }
        content.current[offset..offset + fits].copy_from_slice(&bytes[..fits]);
        if fits < bytes.len() { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    fn truncate(&mut self, name: &str, len_bytes: u64) -> io::Result<()> {
        let mut state = self.state.lock();
        let content = state.alive()?.content(name)?;
        content.current.truncate(usize::try_from(len_bytes).map_err(io::Error::other)?);
        Ok(())
    }

    fn sync(&mut self, name: &str) -> io::Result<()> {
        let mut state = self.state.lock();
        state.alive()?.count_sync()?;
        let content = state.content(name)?;
        content.durable = content.current.clone();
        Ok(())
    }

    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.state.lock();
        let state = state.alive()?;
        state.content(from)?;
        state.change(FolderChange::Rename { from: from.into(), to: to.into() });
        Ok(())
    }

    fn remove(&mut self, name: &str) -> io::Result<()> {
        let mut state = self.state.lock();
        let state = state.alive()?;
        state.content(name)?;
        state.change(FolderChange::Unlink { name: name.into() });
        Ok(())
    }

    fn sync_folder(&mut self) -> io::Result<()> {
        let mut state = self.state.lock();
        let state = state.alive()?;
        state.count_sync()?;
        state.durable_names = state.names.clone();
        state.unsynced.clear();
        Ok(())
    }
}
