//! Replies remembered by request id, so that a command asked twice is applied once.
//!
//! Invariant: as many ids in the order as replies, at most the bound; the oldest is forgotten first.

use std::collections::{BTreeMap, VecDeque};
use std::io;

use forge_shared::cluster::command::{Applied, Command, CommandError};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Lately given replies.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Replies {
    order: VecDeque<String>,
    by_id: BTreeMap<String, Given>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Given {
    /// Of the command, so that one id is not two commands.
    digest: String,
    reply: Result<Applied, CommandError>,
}

impl Replies {
    /// The reply given to this id, or the refusal of an id that was another command's.
    pub fn get(&self, request_id: &str, digest: &str) -> Option<Result<Applied, CommandError>> {
        let given = self.by_id.get(request_id)?;
        if given.digest == digest {
            return Some(given.reply.clone());
        }
        Some(Err(CommandError::Conflict {
            kind: "request".into(),
            name: request_id.to_owned(),
            reason: "it was another command; choose a new request id for each command".into(),
        }))
    }

    pub fn remember(&mut self, request_id: &str, digest: String, reply: &Result<Applied, CommandError>, limit: usize) {
        if self.by_id.insert(request_id.to_owned(), Given { digest, reply: reply.clone() }).is_none() {
            self.order.push_back(request_id.to_owned());
        }
        while self.order.len() > limit {
            if let Some(oldest) = self.order.pop_front() {
                self.by_id.remove(&oldest);
            }
        }
    }

    /// Whether it is as this module leaves it.
    pub fn is_sound(&self, limit: usize) -> bool {
        self.order.len() <= limit && self.order.len() == self.by_id.len() && self.order.iter().all(|id| self.by_id.contains_key(id))
    }
}

/// Half of the SHA-256 of a command's JSON, in hex.
pub(super) fn digest(command: &Command) -> String {
    struct Hashing(Sha256);
    impl io::Write for Hashing {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.update(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut hashing = Hashing(Sha256::new());
    // Commands are plain data, and hashing cannot fail: a failure would only make all digests alike in their tail.
    let written = serde_json::to_writer(&mut hashing, command);
    debug_assert!(written.is_ok());
    hex::encode(&hashing.0.finalize()[..16])
}
