//! A folder of a new group that begins with a state made elsewhere: restoring a backup.

use raft::eraftpb::{ConfState, SnapshotMetadata};

use super::log::{Folder, Identity, LogStore};
use super::{RaftError, RaftOptions};

/// Writes a folder for a group whose only member is `options.member_id` and whose state machine is, up to `index`, what
/// `state` restores. The member is started on it afterwards.
///
/// # Errors
/// Options that do not fit together, or a folder that cannot be written or holds a log.
pub fn begin_from_snapshot(options: &RaftOptions, index: u64, state: &[u8]) -> Result<(), RaftError> {
    options.check()?;
    let identity = Identity { cluster_id: options.cluster_id.clone(), member_id: options.member_id };
    let voters = ConfState { voters: vec![options.member_id], ..ConfState::default() };
    let folder = Folder::open(&options.data_dir)?;
    let mut opened = LogStore::open(folder, identity, &options.limits, Some((voters.clone(), state.to_vec())))?;
    if opened.persisted.snapshot.index > 1 {
        return Err(RaftError::Options(format!("{} holds a log already", options.data_dir.display())));
    }
    let meta = SnapshotMetadata { index, term: 1, conf_state: Some(voters).into(), ..SnapshotMetadata::default() };
    opened.store.write_snapshot(&meta, state)?;
    opened.store.restart_at(&meta, None)?;
    Ok(())
}
