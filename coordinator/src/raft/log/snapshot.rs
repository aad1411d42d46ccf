//! A snapshot's file on its way to the disk: begun and finished in the log's turn, encoded and written by whoever has time.
//!
//! Invariant: the file has its name only when all of it is durable; until then it is a temporary one, which the next start
//! removes.

use std::io;

use forge_proto::raft as wire;
use prost::Message as _;
use raft::eraftpb::SnapshotMetadata;

use super::{Disk, LogError, LogStore, frame, snapshot_name};
use crate::raft::convert::meta_out;

/// Writes these bytes, one after the other, to an empty file and makes them durable; on any thread.
pub type WriteAside = Box<dyn FnOnce(&[&[u8]]) -> io::Result<()> + Send>;

/// A snapshot that is to be written.
pub struct Draft {
    meta: SnapshotMetadata,
    header: wire::FileHeader,
    temporary: String,
    write: WriteAside,
}

/// A snapshot that was written, or not; [`LogStore::finish_snapshot`] takes it.
#[must_use]
pub struct Written {
    meta: SnapshotMetadata,
    temporary: String,
    outcome: io::Result<()>,
}

impl Draft {
    /// Writes it, with the state as bytes. Takes as long as the disk needs.
    pub fn write(self, data: &[u8]) -> Written {
        let Draft { meta, header, temporary, write } = self;
        let header = wire::FileHeader {
            snapshot: Some(meta_out(&meta)),
            data_bytes: data.len() as u64,
            data_crc32c: crc32c::crc32c(data),
            ..header
        };
        let header = frame::write(meta.index, &header.encode_to_vec());
        let outcome = write(&[&header, data]);
        Written { meta, temporary, outcome }
    }
}

impl Written {
    /// What it holds.
    #[must_use]
    pub fn meta(&self) -> &SnapshotMetadata {
        &self.meta
    }
}

impl<D: Disk> LogStore<D> {
    /// Begins a snapshot of the state up to `meta.index`.
    ///
    /// # Errors
    /// As [`LogStore::write`].
    pub fn begin_snapshot(&mut self, meta: &SnapshotMetadata) -> Result<Draft, LogError> {
        let temporary = format!("{}.tmp", snapshot_name(meta.index));
        let write = self.disk.create_aside(&temporary).map_err(|error| LogError::of("create", &temporary, error))?;
        Ok(Draft { meta: meta.clone(), header: self.header(), temporary, write })
    }

    /// Gives a written snapshot its name, and then forgets the older one.
    ///
    /// # Errors
    /// As [`LogStore::write`]; also when it could not be written.
    pub fn finish_snapshot(&mut self, written: Written) -> Result<(), LogError> {
        let Written { meta, temporary, outcome } = written;
        let name = snapshot_name(meta.index);
        let finished = outcome.map_err(|error| LogError::of("write", &temporary, error)).and_then(|()| {
            self.disk.rename(&temporary, &name).map_err(|error| LogError::of("rename", &temporary, error))?;
            self.sync_folder()
        });
        if let Err(error) = finished {
            if error.is_full() {
                // What was written of it takes space that the log needs; the next attempt begins anew.
                drop(self.disk.remove(&temporary));
            }
            return Err(error);
        }
        let older = std::mem::replace(&mut self.snapshot, meta.clone());
        if older.index > 0 && older.index != meta.index {
            let older = snapshot_name(older.index);
            self.disk.remove(&older).map_err(|error| LogError::of("remove", &older, error))?;
        }
        Ok(())
    }

    /// Forgets a snapshot that is of no use any more: a newer one came meanwhile.
    pub fn discard_snapshot(&mut self, written: &Written) {
        // What stays is removed at the next start.
        drop(self.disk.remove(&written.temporary));
    }

    /// Writes a snapshot of the state up to `meta.index`, and then forgets the older one.
    ///
    /// # Errors
    /// As [`LogStore::write`].
    pub fn write_snapshot(&mut self, meta: &SnapshotMetadata, data: &[u8]) -> Result<(), LogError> {
        let written = self.begin_snapshot(meta)?.write(data);
        self.finish_snapshot(written)
    }
}
