//! Opening a data directory: everything in it is read and checked once.

use bytes::Bytes;
use forge_proto::raft as wire;
use prost::Message as _;
use raft::eraftpb::{ConfState, HardState, SnapshotMetadata};
use wire::log_record::Record;

use super::{Disk, Entries, FORMAT, Identity, LogError, LogStore, Segment, frame, segment_name};
use crate::raft::RaftLimits;
use crate::raft::cache::Persisted;
use crate::raft::convert::{self, ConvertError};

/// What a member starts from.
pub struct Opened<D: Disk> {
    /// To write on.
    pub store: LogStore<D>,
    /// What the log holds.
    pub persisted: Persisted,
    /// The newest snapshot's data, unless there is none.
    pub snapshot: Option<Bytes>,
}

/// What the segments say when read in order.
#[derive(Default)]
struct Replay {
    base: Option<(u64, u64)>,
    entries: Entries,
    hard_state: HardState,
}

impl<D: Disk> LogStore<D> {
    /// Opens the folder for this member. A new one is begun: with `first` (the voters, and the state machine's state) as a
    /// member of a new group, without as one that waits to be added.
    ///
    /// # Errors
    /// A folder of another cluster, member or version; damage; the disk's own errors.
    pub fn open(mut disk: D, identity: Identity, limits: &RaftLimits, first: Option<(ConfState, Vec<u8>)>) -> Result<Opened<D>, LogError> {
        let mut names = disk.list().map_err(|error| LogError::of("list", "the data directory", error))?;
        // Half-written files never counted.
        for name in names.iter().filter(|name| name.ends_with(".tmp")) {
            disk.remove(name).map_err(|error| LogError::of("remove", name, error))?;
        }
        names.retain(|name| !name.ends_with(".tmp"));
        let snapshots: Vec<String> = names.iter().filter(|name| name.starts_with("snapshot-")).cloned().collect();
        let logs: Vec<String> = names.iter().filter(|name| name.starts_with("log-")).cloned().collect();

        let mut store = Self {
            disk,
            identity,
            segment_bytes: limits.segment_bytes,
            max_snapshot_bytes: limits.max_snapshot_bytes,
            segments: Vec::new(),
            active_bytes: 0,
            next_sequence: 1,
            hard_state: HardState::default(),
            base: (0, 0),
            snapshot: SnapshotMetadata::default(),
            is_dirty: false,
            is_rotating: false,
        };
        let mut snapshot = None;
        if let Some((newest, older)) = snapshots.split_last() {
            let (meta, data) = read_snapshot(&mut store.disk, &store.identity, newest, limits.max_snapshot_bytes)?;
            (store.snapshot, snapshot) = (meta, Some(data));
            for name in older {
                store.disk.remove(name).map_err(|error| LogError::of("remove", name, error))?;
            }
        }
        let replay = store.replay(&logs, limits)?;
        if store.segments.is_empty() {
            return store.begin(snapshot, first);
        }
        let persisted = store.join(replay)?;
        Ok(Opened { store, persisted, snapshot })
    }

    /// A folder without a log.
    fn begin(mut self, snapshot: Option<Bytes>, first: Option<(ConfState, Vec<u8>)>) -> Result<Opened<D>, LogError> {
        if self.snapshot.index > 1 {
            let name = super::snapshot_name(self.snapshot.index);
            return Err(corrupt(&name, 0, "the log that goes with this snapshot is gone"));
        }
        let mut snapshot = snapshot;
        if let (None, Some((members, data))) = (&snapshot, first) {
            let mut meta = SnapshotMetadata::default();
            (meta.index, meta.term) = (1, 1);
            meta.set_conf_state(members);
            self.write_snapshot(&meta, &data)?;
            snapshot = Some(Bytes::from(data));
        }
        self.base = (self.snapshot.index, self.snapshot.term);
        (self.hard_state.term, self.hard_state.commit) = (self.base.1, self.base.0);
        self.rotate()?;
        let persisted = Persisted {
            hard_state: self.hard_state.clone(),
            snapshot: self.snapshot.clone(),
            base_index: self.base.0,
            base_term: self.base.1,
            entries: Vec::new(),
        };
        Ok(Opened { store: self, persisted, snapshot })
    }

    /// Reads the segments, cuts off a torn end, and leaves the last one open for writing.
    fn replay(&mut self, names: &[String], limits: &RaftLimits) -> Result<Replay, LogError> {
        let mut replay = Replay::default();
        for (position, name) in names.iter().enumerate() {
            let is_last = position + 1 == names.len();
            let first: u64 = name
                .strip_prefix("log-")
                .and_then(|number| number.parse().ok())
                .filter(|&number| segment_name(number) == *name && number < convert::MAX_NUMBER)
                .ok_or_else(|| corrupt(name, 0, "the name is not one of this log"))?;
            if position > 0 && first != self.next_sequence {
                return Err(corrupt(name, 0, format!("the segment with frame {} is missing before it", self.next_sequence)));
            }
            let max_bytes = limits.segment_bytes.saturating_add(frame::MAX_PAYLOAD_BYTES as u64 + 4096);
            let bytes = self.disk.read(name, max_bytes).map_err(|error| LogError::of("read", name, error))?;
            let header = frame::first(&bytes).map(|(_, payload, _)| check_header(name, payload, &self.identity)).transpose()?;
            let frames = frame::read(&bytes, first, is_last).map_err(|damage| corrupt(name, damage.offset, damage.why))?;
            let (Some(header), Some((_, rest))) = (header, frames.frames.split_first()) else {
                // A crash while the segment was begun: nothing of it counts. Without another before it, the folder is new.
                self.disk.remove(name).map_err(|error| LogError::of("remove", name, error))?;
                self.sync_folder()?;
                continue;
            };
            let mut segment = Segment { name: name.clone(), max_index: 0 };
            replay.take(name, header.records, &mut segment)?;
            for (_, payload) in rest {
                let batch = wire::LogBatch::decode(*payload);
                let batch = batch.map_err(|error| corrupt(name, 0, format!("a frame holds no batch: {error}")))?;
                replay.take(name, batch.records, &mut segment)?;
            }
            if frames.is_torn {
                tracing::warn!(file = name, at = frames.end, "the last write before a crash was not complete; it is cut off");
                self.disk.truncate(name, frames.end as u64).map_err(|error| LogError::of("truncate", name, error))?;
                self.disk.sync(name).map_err(|error| LogError::of("sync", name, error))?;
            }
            self.next_sequence = first + frames.frames.len() as u64;
            self.active_bytes = frames.end as u64;
            self.segments.push(segment);
        }
        Ok(replay)
    }

    /// Puts log and snapshot together.
    fn join(&mut self, mut replay: Replay) -> Result<Persisted, LogError> {
        let (index, term) = (self.snapshot.index, self.snapshot.term);
        let name = self.segments.last().map(|segment| segment.name.clone()).unwrap_or_default();
        let mut base = replay.base.unwrap_or_default();
        if base.0 > index {
            return Err(corrupt(&name, 0, format!("entries up to {} are in a snapshot, and the newest there is holds {index}", base.0)));
        }
        let holds_snapshot = base == (index, term) || replay.entries.get(&index).is_some_and(|entry| entry.term == term);
        let is_superseded = index > base.0 && !holds_snapshot;
        if is_superseded {
            // A leader's snapshot arrived, and the process died before the log began anew behind it.
            replay.entries.clear();
            base = (index, term);
        }
        replay.entries = replay.entries.split_off(&(base.0 + 1));
        for (expected, entry) in (base.0 + 1..).zip(replay.entries.values()) {
            if entry.index != expected {
                return Err(corrupt(&name, 0, format!("entry {expected} is missing before {}", entry.index)));
            }
        }
        let last = replay.entries.last_key_value().map_or(base.0, |(&index, _)| index);
        let mut hard_state = replay.hard_state;
        if hard_state.term < term {
            // The snapshot came with a later term, in which this member cannot have voted: votes are written first.
            (hard_state.term, hard_state.vote) = (term, 0);
        }
        if hard_state.commit > last {
            return Err(corrupt(&name, 0, format!("entry {} was committed, and the log ends at {last}", hard_state.commit)));
        }
        hard_state.commit = hard_state.commit.max(index);
        (self.base, self.hard_state) = (base, hard_state.clone());
        if is_superseded {
            // Said in the log too, before anything is written behind it.
            self.restart_at(&self.snapshot.clone(), Some(&hard_state))?;
        }
        Ok(Persisted {
            hard_state,
            snapshot: self.snapshot.clone(),
            base_index: base.0,
            base_term: base.1,
            entries: replay.entries.into_values().collect(),
        })
    }
}

impl Replay {
    fn take(&mut self, name: &str, records: Vec<wire::LogRecord>, segment: &mut Segment) -> Result<(), LogError> {
        let record = |source: ConvertError| LogError::Record { name: name.into(), source };
        for item in records {
            match item.record {
                Some(Record::Entry(entry)) => {
                    let entry = convert::entry_in(entry).map_err(record)?;
                    if entry.index == 0 || entry.term == 0 {
                        return Err(corrupt(name, 0, "an entry with index or term 0"));
                    }
                    segment.max_index = segment.max_index.max(entry.index);
                    // Over what it conflicts with.
                    drop(self.entries.split_off(&entry.index));
                    self.entries.insert(entry.index, entry);
                }
                Some(Record::HardState(state)) => self.hard_state = convert::hard_state_in(state).map_err(record)?,
                Some(Record::Compacted(base)) => {
                    self.base = Some(base_of(name, &base)?);
                    self.entries = self.entries.split_off(&(base.index + 1));
                }
                Some(Record::Restarted(base)) => {
                    self.base = Some(base_of(name, &base)?);
                    self.entries.clear();
                }
                None => return Err(corrupt(name, 0, "a record of a kind that this version does not know")),
            }
        }
        Ok(())
    }
}

fn base_of(name: &str, base: &wire::SnapshotMeta) -> Result<(u64, u64), LogError> {
    if base.index > convert::MAX_NUMBER || base.term > convert::MAX_NUMBER {
        return Err(corrupt(name, 0, "the log begins beyond 2^62"));
    }
    Ok((base.index, base.term))
}

fn corrupt(name: &str, offset: usize, why: impl Into<String>) -> LogError {
    LogError::Corrupt { name: name.into(), offset: offset as u64, why: why.into() }
}

fn check_header(name: &str, payload: &[u8], identity: &Identity) -> Result<wire::FileHeader, LogError> {
    let header = wire::FileHeader::decode(payload).map_err(|error| corrupt(name, 0, format!("no header: {error}")))?;
    if header.version > FORMAT {
        return Err(LogError::Newer { name: name.into(), version: header.version, known: FORMAT });
    }
    let foreign = |what, found: String, expected: String| LogError::Foreign { name: name.into(), what, found, expected };
    if header.version == 0 {
        return Err(corrupt(name, 0, "the header has no version"));
    }
    if header.cluster_id != identity.cluster_id {
        return Err(foreign("cluster", header.cluster_id, identity.cluster_id.clone()));
    }
    if header.member_id != identity.member_id {
        return Err(foreign("member", header.member_id.to_string(), identity.member_id.to_string()));
    }
    Ok(header)
}

/// Reads and checks a snapshot's file.
pub(super) fn read_snapshot<D: Disk>(
    disk: &mut D,
    identity: &Identity,
    name: &str,
    max_bytes: u64,
) -> Result<(SnapshotMetadata, Bytes), LogError> {
    let bytes = disk.read(name, max_bytes.saturating_add(1 << 16)).map_err(|error| LogError::of("read", name, error))?;
    let Some((_, payload, header_bytes)) = frame::first(&bytes) else { return Err(corrupt(name, 0, "the header is damaged")) };
    let header = check_header(name, payload, identity)?;
    let data = Bytes::from(bytes).slice(header_bytes..);
    if data.len() as u64 != header.data_bytes || crc32c::crc32c(&data) != header.data_crc32c {
        return Err(corrupt(name, header_bytes, "the data is not what was written"));
    }
    let Some(meta) = header.snapshot else { return Err(corrupt(name, 0, "the header describes no snapshot")) };
    let meta = convert::meta_in(meta).map_err(|source| LogError::Record { name: name.into(), source })?;
    if super::snapshot_name(meta.index) != *name {
        return Err(corrupt(name, 0, format!("it holds entries up to {}", meta.index)));
    }
    Ok((meta, data))
}
