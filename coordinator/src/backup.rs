//! Backups: the applied state in one file that says what it is, and a new group of one made from it.
//!
//! A file is one line of JSON (the header), a newline, and the snapshot. The header has the snapshot's length and SHA-256.
//!
//! Invariants: a damaged or foreign file is refused before anything is written; a restored group is another raft group
//! than the one that was backed up, so that a member of the old one can neither join it nor be joined; its revisions and
//! epochs are above all that the old one, or a group restored earlier, has given out: watchers begin again, and workers
//! take its plans.

use std::path::Path;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use forge_shared::cluster::Revision;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::coordinator::Coordinator;
use crate::error::CoordinatorError;
use crate::member_file::MemberFile;
use crate::raft::{self, RaftOptions};
use crate::state::ClusterState;
use crate::surroundings::system_ms;

const FORMAT: &str = "forge-backup-1";
/// Longest header.
const MAX_HEADER_BYTES: usize = 4096;
/// Largest backup that is read.
const MAX_BACKUP_BYTES: u64 = 2 << 30;

/// Revisions of a restored group begin at least so far above the backup's …
const REVISION_GAP: u64 = 1 << 36;
/// … and where the time is that it was restored, in this part of a millisecond: no group proposes as fast for long, so that
/// one that is restored later is above one that was restored earlier, from whichever backup, if only by a few milliseconds.
/// (More than the 2^16 a second of earlier versions.)
const REVISIONS_PER_MS: u64 = 66;
/// The raft id of who founds a group.
const FOUNDER: u64 = 1;

/// What a backup says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BackupHeader {
    /// The file's format.
    pub format: String,
    /// Of the cluster.
    pub cluster_id: String,
    /// The state's revision.
    pub revision: Revision,
    /// When it was made, milliseconds since 1970.
    pub made_ms: u64,
    /// Forge's version that made it.
    pub version: String,
    /// Bytes of the snapshot.
    pub snapshot_bytes: u64,
    /// Hex of SHA-256 over the snapshot.
    pub snapshot_sha256: String,
}

impl BackupHeader {
    /// What to tell who has restored it.
    pub fn restored_into(&self, data_dir: &Path) -> String {
        format!("restored cluster {} as of revision {} into {}", self.cluster_id, self.revision, data_dir.display())
    }
}

impl Coordinator {
    /// The state, no older than this call, as a backup file's bytes.
    ///
    /// # Errors
    /// No leader within `timeout`.
    pub async fn backup(&self, timeout: Duration) -> Result<Bytes, CoordinatorError> {
        self.0.raft.read_index(timeout).await.map_err(|error| self.raft_error(error))?;
        // A copy: applying waits for that, and not for the encoding.
        let state = self.0.replicated.read().clone();
        write_backup(&self.0.options.cluster_id, state.revision(), &state.encode(), self.wall_ms())
    }
}

/// A backup file's bytes, of a state's snapshot (`ClusterState::encode`) at a revision. `made_ms` is milliseconds since 1970.
///
/// # Errors
/// [`CoordinatorError::Backup`] if the header cannot be written.
pub fn write_backup(cluster_id: &str, revision: Revision, snapshot: &[u8], made_ms: u64) -> Result<Bytes, CoordinatorError> {
    let header = BackupHeader {
        format: FORMAT.into(),
        cluster_id: cluster_id.into(),
        revision,
        made_ms,
        version: env!("CARGO_PKG_VERSION").into(),
        snapshot_bytes: snapshot.len() as u64,
        snapshot_sha256: hex::encode(Sha256::digest(snapshot)),
    };
    let line = serde_json::to_vec(&header).map_err(|error| wrong(format!("its header has no JSON: {error}")))?;
    let mut file = BytesMut::with_capacity(line.len() + 1 + snapshot.len());
    file.put_slice(&line);
    file.put_u8(b'\n');
    file.put_slice(snapshot);
    Ok(file.freeze())
}

/// Reads and checks a backup: its header and the snapshot.
///
/// # Errors
/// [`CoordinatorError::Backup`] or [`CoordinatorError::State`], saying what does not fit.
pub fn read_backup(bytes: &[u8]) -> Result<(BackupHeader, &[u8]), CoordinatorError> {
    let head = &bytes[..bytes.len().min(MAX_HEADER_BYTES)];
    let end = head.iter().position(|byte| *byte == b'\n').ok_or_else(|| wrong("it does not begin as a backup of Forge".into()))?;
    let header: BackupHeader =
        serde_json::from_slice(&head[..end]).map_err(|error| wrong(format!("its header cannot be read: {error}")))?;
    if header.format != FORMAT {
        return Err(wrong(format!(
            "its format is {:?}; this version reads {FORMAT:?}: use the Forge that made it ({})",
            header.format, header.version
        )));
    }
    let snapshot = &bytes[end + 1..];
    if snapshot.len() as u64 != header.snapshot_bytes {
        return Err(wrong(format!("it has {} bytes of state, its header says {}: it was cut off", snapshot.len(), header.snapshot_bytes)));
    }
    if hex::encode(Sha256::digest(snapshot)) != header.snapshot_sha256 {
        return Err(wrong("its checksum does not fit: it was damaged".into()));
    }
    let state = ClusterState::decode(snapshot)?;
    if state.cluster_id() != header.cluster_id {
        return Err(wrong("its header and its state are of two clusters".into()));
    }
    Ok((header, snapshot))
}

/// Entry for a fuzzer.
pub fn fuzz_backup(bytes: &[u8]) {
    let _ = read_backup(bytes);
}

/// Reads a backup file.
///
/// # Errors
/// As [`read_backup`], and for a file that cannot be read.
pub fn load_backup(path: &Path) -> Result<Vec<u8>, CoordinatorError> {
    let failed = |source| CoordinatorError::File { path: path.to_owned(), source };
    let bytes = std::fs::metadata(path).map_err(failed)?.len();
    if bytes > MAX_BACKUP_BYTES {
        return Err(wrong(format!("{} has {bytes} bytes; at most {MAX_BACKUP_BYTES} are read", path.display())));
    }
    let bytes = std::fs::read(path).map_err(failed)?;
    read_backup(&bytes)?;
    Ok(bytes)
}

fn wrong(reason: String) -> CoordinatorError {
    CoordinatorError::Backup { reason }
}

/// Makes a new group of one from a backup, in an empty folder: the data folder of a coordinator that is started next.
/// The old group's members are not in it, and let in anew by join tokens.
///
/// # Errors
/// A folder that is not empty, and as [`load_backup`].
pub fn restore(file: &Path, data_dir: &Path) -> Result<BackupHeader, CoordinatorError> {
    let failed = |source| CoordinatorError::File { path: data_dir.to_owned(), source };
    let bytes = load_backup(file)?;
    let (header, snapshot) = read_backup(&bytes)?;
    std::fs::create_dir_all(data_dir).map_err(failed)?;
    if std::fs::read_dir(data_dir).map_err(failed)?.next().is_some() {
        return Err(wrong(format!("{} is not empty: restore into a new folder", data_dir.display())));
    }
    let mut state = ClusterState::decode(snapshot)?;
    let above = header.revision.max(state.revision()).0.saturating_add(REVISION_GAP);
    // Two within one millisecond begin at different places in it, most likely.
    let mut place = [0u8; 1];
    getrandom::fill(&mut place).map_err(|error| wrong(format!("no random numbers: {error}")))?;
    let now = system_ms().saturating_mul(REVISIONS_PER_MS).saturating_add(u64::from(place[0]) % REVISIONS_PER_MS);
    let index = above.max(now);
    state.begin_history(Revision(index));
    let mut suffix = [0u8; 8];
    getrandom::fill(&mut suffix).map_err(|error| wrong(format!("no random numbers: {error}")))?;
    let group_id = format!("{}-{}", header.cluster_id, hex::encode(suffix));
    let options = RaftOptions::new(FOUNDER, group_id.clone(), MemberFile::raft_folder(data_dir));
    raft::begin_from_snapshot(&options, index, &state.encode()).map_err(CoordinatorError::Raft)?;
    // Last: without it the folder is no member's, and an interrupted restoring cannot be mistaken for a whole one.
    MemberFile { member_id: FOUNDER, group_id, is_founder: true, peers: Vec::new() }.save(data_dir)?;
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> Vec<u8> {
        write_backup("c", Revision(0), &ClusterState::new("c").encode(), 1).expect("a header has JSON").to_vec()
    }

    #[test]
    fn every_prefix_and_every_changed_byte_is_refused_or_harmless() {
        let file = file();
        assert!(read_backup(&file).is_ok());
        let end = file.iter().position(|byte| *byte == b'\n').expect("there is a header");
        for cut in 0..file.len() {
            assert!(read_backup(&file[..cut]).is_err(), "cut at {cut}");
        }
        for place in 0..file.len() {
            let mut changed = file.clone();
            changed[place] ^= 0x15;
            let taken = read_backup(&changed);
            assert!(place < end || taken.is_err(), "byte {place}");
        }
    }
}
