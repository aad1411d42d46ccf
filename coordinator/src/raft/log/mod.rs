//! A member's data directory: the log in segments, and the newest snapshot.
//!
//! A segment (`log-NUMBER`, the number of its first frame) and a snapshot (`snapshot-INDEX`) begin with a header that
//! names format, cluster and member. A frame of a segment is what one fsync made durable: entries, term and vote. The
//! order of writes: a snapshot is complete under its name before the log says that entries are gone; a segment begins
//! with the state it needs before older ones are removed.
//!
//! What it is not: it does not know what entries mean, and keeps none in memory.
//!
//! Invariants: after [`LogStore::write`] returned `Ok`, the entries survive any crash; a folder in which something that
//! was synced is missing is refused, never repaired by guessing.

mod disk;
mod error;
mod frame;
mod memory;
mod open;
mod snapshot;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use bytes::Bytes;
use forge_proto::raft as wire;
use prost::Message as _;
use raft::eraftpb::{Entry, HardState, SnapshotMetadata};
use wire::log_record::Record;

pub use disk::{BeforeSync, Disk, Folder};
pub use error::LogError;
pub use frame::MAX_PAYLOAD_BYTES;
pub use memory::MemoryDisk;
pub use open::Opened;
pub use snapshot::{Draft, WriteAside, Written};

use super::convert::{entry_out, hard_state_out};

/// The format that is written, and the newest that is read.
const FORMAT: u32 = 1;

/// Whose folder it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The group.
    pub cluster_id: String,
    /// The member.
    pub member_id: u64,
}

/// A closed or open file of the log.
#[derive(Debug, Clone)]
struct Segment {
    name: String,
    /// The highest index of an entry in it; 0 without entries.
    max_index: u64,
}

/// See the module.
pub struct LogStore<D: Disk> {
    disk: D,
    identity: Identity,
    segment_bytes: u64,
    max_snapshot_bytes: u64,
    /// Oldest first; the last one is written to.
    segments: Vec<Segment>,
    active_bytes: u64,
    /// The number of the frame to write next.
    next_sequence: u64,
    hard_state: HardState,
    base: (u64, u64),
    snapshot: SnapshotMetadata,
    /// The last write failed for want of space: the file may be longer than `active_bytes`.
    is_dirty: bool,
    /// A new segment is due.
    is_rotating: bool,
}

pub(in crate::raft) fn segment_name(first_sequence: u64) -> String {
    format!("log-{first_sequence:020}")
}

pub(in crate::raft) fn snapshot_name(index: u64) -> String {
    format!("snapshot-{index:020}")
}

impl<D: Disk> LogStore<D> {
    /// Writes entries (over what they conflict with) and the hard state, with one fsync. A hard state that changes the
    /// commit index only is kept for the next write: it may be lost in a crash.
    ///
    /// # Errors
    /// [`LogError::Full`]: nothing counts, and the same may be tried again. Others: the member must stop.
    pub fn write(&mut self, entries: &[Entry], hard_state: Option<&HardState>, must_sync: bool) -> Result<(), LogError> {
        let hard_state = hard_state.cloned().unwrap_or_else(|| self.hard_state.clone());
        if must_sync || !entries.is_empty() {
            let mut records: Vec<Record> = entries.iter().map(|entry| Record::Entry(entry_out(entry))).collect();
            records.push(Record::HardState(hard_state_out(&hard_state)));
            self.append(records)?;
            if let (Some(segment), Some(last)) = (self.segments.last_mut(), entries.last()) {
                segment.max_index = segment.max_index.max(last.index);
            }
        }
        self.hard_state = hard_state;
        Ok(())
    }

    /// The newest snapshot's data.
    ///
    /// # Errors
    /// When it cannot be read as it was written.
    pub fn read_snapshot(&mut self) -> Result<Bytes, LogError> {
        let name = snapshot_name(self.snapshot.index);
        let (_, data) = open::read_snapshot(&mut self.disk, &self.identity, &name, self.max_snapshot_bytes)?;
        Ok(data)
    }

    /// A leader's snapshot replaces the log: `write_snapshot` has returned for it.
    ///
    /// # Errors
    /// As [`LogStore::write`].
    pub fn restart_at(&mut self, meta: &SnapshotMetadata, hard_state: Option<&HardState>) -> Result<(), LogError> {
        let mut hard_state = hard_state.cloned().unwrap_or_else(|| self.hard_state.clone());
        hard_state.commit = hard_state.commit.max(meta.index);
        let restarted = Record::Restarted(wire::SnapshotMeta { index: meta.index, term: meta.term, conf_state: None });
        self.append(vec![restarted, Record::HardState(hard_state_out(&hard_state))])?;
        self.base = (meta.index, meta.term);
        self.hard_state = hard_state;
        self.remove_segments()
    }

    /// Forgets entries up to `index` of term `term`, which the newest snapshot holds.
    ///
    /// # Errors
    /// As [`LogStore::write`].
    pub fn compact(&mut self, index: u64, term: u64) -> Result<(), LogError> {
        if index <= self.base.0 || index > self.snapshot.index {
            return Ok(());
        }
        self.base = (index, term);
        // The oldest segments may hold what says where the log begins: this one must, before they go.
        if self.removable() > 0 {
            self.append(vec![self.base_record(), Record::HardState(hard_state_out(&self.hard_state))])?;
            self.remove_segments()?;
        }
        Ok(())
    }

    fn removable(&self) -> usize {
        let closed = self.segments.len().saturating_sub(1);
        self.segments[..closed].iter().take_while(|segment| segment.max_index <= self.base.0).count()
    }

    fn remove_segments(&mut self) -> Result<(), LogError> {
        for segment in self.segments.drain(..self.removable()).collect::<Vec<_>>() {
            self.disk.remove(&segment.name).map_err(|error| LogError::of("remove", &segment.name, error))?;
            // One by one: a crash must not bring back an older one without the next.
            self.sync_folder()?;
        }
        Ok(())
    }

    fn base_record(&self) -> Record {
        Record::Compacted(wire::SnapshotMeta { index: self.base.0, term: self.base.1, conf_state: None })
    }

    fn header(&self) -> wire::FileHeader {
        wire::FileHeader {
            version: FORMAT,
            cluster_id: self.identity.cluster_id.clone(),
            member_id: self.identity.member_id,
            ..wire::FileHeader::default()
        }
    }

    fn sync_folder(&mut self) -> Result<(), LogError> {
        self.disk.sync_folder().map_err(|error| LogError::of("sync", "the data directory", error))
    }

    fn append(&mut self, records: Vec<Record>) -> Result<(), LogError> {
        let payload = wire::LogBatch { records: logged(records) }.encode_to_vec();
        if self.is_rotating || self.active_bytes >= self.segment_bytes {
            self.rotate()?;
        }
        let Some(name) = self.segments.last().map(|segment| segment.name.clone()) else { return Ok(()) };
        if self.is_dirty {
            self.disk.truncate(&name, self.active_bytes).map_err(|error| LogError::of("truncate", &name, error))?;
        }
        let frame = frame::write(self.next_sequence, &payload);
        self.is_dirty = true;
        self.disk.write_at(&name, self.active_bytes, &frame).map_err(|error| LogError::of("write", &name, error))?;
        self.disk.sync(&name).map_err(|error| LogError::of("sync", &name, error))?;
        self.is_dirty = false;
        self.active_bytes += frame.len() as u64;
        self.next_sequence += 1;
        Ok(())
    }

    /// Begins a segment: its header, and what would be lost with the older ones.
    fn rotate(&mut self) -> Result<(), LogError> {
        self.is_rotating = true;
        if self.is_dirty
            && let Some(name) = self.segments.last().map(|segment| segment.name.clone())
        {
            // The closed segment must end with a whole frame.
            self.disk.truncate(&name, self.active_bytes).map_err(|error| LogError::of("truncate", &name, error))?;
            self.disk.sync(&name).map_err(|error| LogError::of("sync", &name, error))?;
            self.is_dirty = false;
        }
        let name = segment_name(self.next_sequence);
        let records = vec![self.base_record(), Record::HardState(hard_state_out(&self.hard_state))];
        let header = wire::FileHeader { records: logged(records), ..self.header() };
        let bytes = frame::write(self.next_sequence, &header.encode_to_vec());
        self.disk.create(&name).map_err(|error| LogError::of("create", &name, error))?;
        let written = self.disk.write_at(&name, 0, &bytes).map_err(|error| LogError::of("write", &name, error));
        written.and_then(|()| self.disk.sync(&name).map_err(|error| LogError::of("sync", &name, error)))?;
        self.sync_folder()?;
        self.segments.push(Segment { name, max_index: 0 });
        self.active_bytes = bytes.len() as u64;
        self.next_sequence += 1;
        self.is_rotating = false;
        Ok(())
    }

    /// How many files the log has.
    #[must_use]
    pub fn segments(&self) -> usize {
        self.segments.len()
    }
}

fn logged(records: Vec<Record>) -> Vec<wire::LogRecord> {
    records.into_iter().map(|record| wire::LogRecord { record: Some(record) }).collect()
}

/// Entries by index: what is read back.
type Entries = BTreeMap<u64, Entry>;
