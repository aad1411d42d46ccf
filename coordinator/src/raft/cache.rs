//! The log in memory, where raft-rs reads it: all entries since the last compaction.
//!
//! What it is not: it is not the log; [`super::log`] is, and holds the same entries on disk.
//!
//! Invariant: entries are consecutive and start behind (`base_index`, `base_term`); only what is on disk is in here.

use std::cell::Cell;
use std::collections::VecDeque;

use raft::eraftpb::{ConfState, Entry, HardState, Snapshot, SnapshotMetadata};
use raft::{GetEntriesContext, RaftState, Storage, StorageError};

/// What a member found on its disk.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Persisted {
    /// Term, vote, commit.
    pub hard_state: HardState,
    /// The newest snapshot; of index 0 before the first.
    pub snapshot: SnapshotMetadata,
    /// The entry before the first of `entries`.
    pub base_index: u64,
    /// Its term.
    pub base_term: u64,
    /// The log.
    pub entries: Vec<Entry>,
}

/// See the module.
pub(super) struct Cache {
    start: RaftState,
    base_index: u64,
    base_term: u64,
    entries: VecDeque<Entry>,
    entry_bytes: u64,
    pub snapshot: SnapshotMetadata,
    /// A peer needs a snapshot, and the newest does not name it as a member.
    pub wants_snapshot: Cell<bool>,
}

impl Cache {
    pub fn new(persisted: Persisted) -> Self {
        let entry_bytes = persisted.entries.iter().map(size).sum();
        Self {
            start: RaftState { hard_state: persisted.hard_state, conf_state: persisted.snapshot.get_conf_state().clone() },
            base_index: persisted.base_index,
            base_term: persisted.base_term,
            entries: persisted.entries.into(),
            entry_bytes,
            snapshot: persisted.snapshot,
            wants_snapshot: Cell::new(false),
        }
    }

    pub fn first(&self) -> u64 {
        self.base_index + 1
    }

    pub fn last(&self) -> u64 {
        self.base_index + self.entries.len() as u64
    }

    /// Bytes of entries held.
    pub fn entry_bytes(&self) -> u64 {
        self.entry_bytes
    }

    /// Appends what is now on disk, over what it conflicts with.
    pub fn append(&mut self, entries: &[Entry]) {
        let Some(first) = entries.first() else { return };
        let keep = first.index.saturating_sub(self.first()) as usize;
        for dropped in self.entries.drain(keep.min(self.entries.len())..) {
            self.entry_bytes -= size(&dropped);
        }
        for entry in entries {
            self.entry_bytes += size(entry);
            self.entries.push_back(entry.clone());
        }
    }

    /// Forgets entries up to `index`, which a snapshot holds.
    pub fn compact(&mut self, index: u64) {
        while self.base_index < index {
            let Some(entry) = self.entries.pop_front() else { return };
            self.entry_bytes -= size(&entry);
            (self.base_index, self.base_term) = (entry.index, entry.term);
        }
    }

    /// Starts anew behind a snapshot that a leader sent.
    pub fn install(&mut self, meta: SnapshotMetadata) {
        (self.base_index, self.base_term) = (meta.index, meta.term);
        self.entries.clear();
        self.entry_bytes = 0;
        self.snapshot = meta;
    }

    fn at(&self, index: u64) -> Option<&Entry> {
        self.entries.get(usize::try_from(index.checked_sub(self.first())?).ok()?)
    }

    pub fn term_at(&self, index: u64) -> Option<u64> {
        if index == self.base_index { Some(self.base_term) } else { self.at(index).map(|entry| entry.term) }
    }

    pub fn members(&self) -> &ConfState {
        self.snapshot.get_conf_state()
    }
}

fn size(entry: &Entry) -> u64 {
    64 + entry.data.len() as u64
}

impl Storage for Cache {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(self.start.clone())
    }

    fn entries(&self, low: u64, high: u64, max_size: impl Into<Option<u64>>, _: GetEntriesContext) -> raft::Result<Vec<Entry>> {
        if low < self.first() {
            return Err(raft::Error::Store(StorageError::Compacted));
        }
        if high > self.last() + 1 {
            return Err(raft::Error::Store(StorageError::Unavailable));
        }
        let max_bytes = max_size.into().unwrap_or(u64::MAX);
        let (mut taken, mut bytes) = (Vec::new(), 0_u64);
        for entry in self.entries.range((low - self.first()) as usize..(high - self.first()) as usize) {
            bytes = bytes.saturating_add(size(entry));
            if bytes > max_bytes && !taken.is_empty() {
                break;
            }
            taken.push(entry.clone());
        }
        Ok(taken)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index < self.base_index {
            return Err(raft::Error::Store(StorageError::Compacted));
        }
        self.term_at(index).ok_or(raft::Error::Store(StorageError::Unavailable))
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.first())
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last())
    }

    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<Snapshot> {
        let members = self.members();
        let knows = members.voters.contains(&to) || members.learners.contains(&to);
        if self.snapshot.index == 0 || self.snapshot.index < request_index || !knows {
            self.wants_snapshot.set(true);
            return Err(raft::Error::Store(StorageError::SnapshotTemporarilyUnavailable));
        }
        let mut snapshot = Snapshot::default();
        snapshot.set_metadata(self.snapshot.clone());
        Ok(snapshot)
    }
}
