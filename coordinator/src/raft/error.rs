//! Why raft refuses.

use std::time::Duration;

/// Errors of a raft member, for its callers.
#[derive(Debug, thiserror::Error)]
pub enum RaftError {
    /// Ask the leader.
    #[error("this member does not lead the group; {}", leader_text(*.leader))]
    NotLeader {
        /// Who leads, if known.
        leader: Option<u64>,
    },
    /// Try again soon.
    #[error("raft is busy: {what}; try again")]
    Busy {
        /// Which limit was met.
        what: String,
    },
    /// The proposal may or may not be applied; ask again with the same request id.
    #[error("the outcome is unknown: {why}; ask again with the same request id")]
    Unknown {
        /// What happened.
        why: String,
    },
    /// The answer did not come in time. Nothing was changed.
    #[error("no answer of the group within {} ms: is a majority of its members running and connected?", .after.as_millis())]
    Timeout {
        /// How long was waited.
        after: Duration,
    },
    /// A proposal beyond the limit.
    #[error("the proposal has {bytes} bytes; at most {limit_bytes} are taken")]
    TooLarge {
        /// Its size.
        bytes: usize,
        /// The limit.
        limit_bytes: usize,
    },
    /// The data directory is full.
    #[error("the disk with the data directory of member {member_id} is full: free space there; the member goes on by itself")]
    DiskFull {
        /// Whose disk.
        member_id: u64,
    },
    /// A change of members that makes no sense now.
    #[error("members stay as they are: {0}")]
    Members(String),
    /// The member has stopped.
    #[error("the raft member has stopped{}", .why.as_ref().map(|why| format!(": {why}")).unwrap_or_default())]
    Stopped {
        /// Why, unless it was asked to.
        why: Option<String>,
    },
    /// A message that no member of this group sends.
    #[error("a message from a peer is refused: {0}")]
    Message(#[from] super::convert::ConvertError),
    /// The data directory.
    #[error(transparent)]
    Log(#[from] super::log::LogError),
    /// A snapshot that the state machine does not take.
    #[error("the snapshot up to entry {index} cannot be used: {why}; do all members run versions that work together?")]
    Snapshot {
        /// Its last entry.
        index: u64,
        /// The state machine's word.
        why: String,
    },
    /// An entry that this build does not know.
    #[error("entry {index} of the log cannot be applied: {why}")]
    Entry {
        /// Its place in the log.
        index: u64,
        /// The state machine's word.
        why: String,
    },
    /// Options that do not fit together.
    #[error("raft options: {0}")]
    Options(String),
}

fn leader_text(leader: Option<u64>) -> String {
    leader.map_or_else(|| "it knows of no leader now".into(), |leader| format!("member {leader} does"))
}
