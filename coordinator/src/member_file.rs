//! What a coordinator's data folder says of its membership: `member.json`, written once, when the member is founded, let
//! in or restored.
//!
//! Invariant: a folder belongs to one member of one raft group for good; without the file the folder is new.

use std::io::Write;
use std::path::{Path, PathBuf};

use forge_shared::cluster::command::MemberRecord;
use serde::{Deserialize, Serialize};

use crate::error::CoordinatorError;

const FILE: &str = "member.json";
/// A few peers.
const MAX_BYTES: u64 = 64 << 10;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MemberFile {
    /// The raft id.
    pub member_id: u64,
    /// The raft group: the cluster's id, with a suffix where the group was restored from a backup.
    pub group_id: String,
    /// Whether this member founded its group, alone.
    pub is_founder: bool,
    /// The group as it was when this member came: how it reaches the others before it knows them from the log.
    pub peers: Vec<MemberRecord>,
}

impl MemberFile {
    /// Where the raft log lies below a data folder.
    pub fn raft_folder(data_dir: &Path) -> PathBuf {
        data_dir.join("raft")
    }

    /// Reads it; `None` in a new folder.
    ///
    /// # Errors
    /// A file that cannot be read or is none of ours.
    pub fn load(data_dir: &Path) -> Result<Option<MemberFile>, CoordinatorError> {
        let path = data_dir.join(FILE);
        let failed = |source| CoordinatorError::File { path: path.clone(), source };
        let bytes = match std::fs::metadata(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
            Ok(facts) => facts.len(),
        };
        let wrong = |reason: String| CoordinatorError::Start { reason: format!("{}: {reason}", path.display()) };
        if bytes > MAX_BYTES {
            return Err(wrong(format!("it has {bytes} bytes and is none of Forge's")));
        }
        let text = std::fs::read(&path).map_err(failed)?;
        MemberFile::parse(&text).map(Some).map_err(wrong)
    }

    fn parse(text: &[u8]) -> Result<MemberFile, String> {
        let file: MemberFile = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        if file.member_id == 0 || file.group_id.is_empty() {
            return Err("memberId and groupId must be given".into());
        }
        Ok(file)
    }

    /// Writes it, so that it is whole or absent after a crash.
    ///
    /// # Errors
    /// What the system said.
    pub fn save(&self, data_dir: &Path) -> Result<(), CoordinatorError> {
        let path = data_dir.join(FILE);
        let failed = |source| CoordinatorError::File { path: path.clone(), source };
        let text = serde_json::to_vec_pretty(self).map_err(|error| failed(std::io::Error::other(error)))?;
        std::fs::create_dir_all(data_dir).map_err(failed)?;
        let temporary = data_dir.join(format!("{FILE}.tmp"));
        let mut file = std::fs::File::create(&temporary).map_err(failed)?;
        file.write_all(&text).and_then(|()| file.sync_all()).map_err(failed)?;
        std::fs::rename(&temporary, &path).map_err(failed)?;
        std::fs::File::open(data_dir).and_then(|folder| folder.sync_all()).map_err(failed)
    }
}

/// Entry for a fuzzer.
pub fn fuzz_member_file(bytes: &[u8]) {
    let _ = MemberFile::parse(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_comes_back_and_damage_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        assert_eq!(MemberFile::load(folder.path()).expect("new"), None);
        let file = MemberFile { member_id: 7, group_id: "c".into(), is_founder: false, peers: Vec::new() };
        file.save(folder.path()).expect("saved");
        assert_eq!(MemberFile::load(folder.path()).expect("read"), Some(file));
        std::fs::write(folder.path().join(FILE), b"{\"memberId\":0}").expect("written");
        let error = MemberFile::load(folder.path()).expect_err("damaged").to_string();
        assert!(error.contains(FILE), "{error}");
    }
}
