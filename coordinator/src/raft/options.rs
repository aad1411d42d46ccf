//! How a member is set up.

use std::path::PathBuf;
use std::time::Duration;

use forge_shared::telemetry::RaftMetrics;

use super::RaftError;
use super::log::BeforeSync;

/// A member's identity, times and limits.
#[derive(Debug, Clone)]
pub struct RaftOptions {
    /// This member; never 0, never used by another, also not after it is removed.
    pub member_id: u64,
    /// The group. Messages and folders of another are refused.
    pub cluster_id: String,
    /// The log and the snapshots. One process at a time.
    pub data_dir: PathBuf,
    /// The unit of the counts below.
    pub tick: Duration,
    /// A leader sends heartbeats every so many ticks.
    pub heartbeat_ticks: usize,
    /// A follower that hears nothing for this many ticks to twice as many (drawn anew) asks for votes.
    pub election_ticks: usize,
    /// Bounds.
    pub limits: RaftLimits,
    /// The voters of a new group, this member among them; the same list at each. Ignored once the folder has a log.
    /// `None`: wait to be added by a leader.
    pub bootstrap: Option<Vec<u64>>,
    /// Randomness of elections and read requests; another at every start (`None`: drawn from the system).
    pub seed: Option<u64>,
    /// What the member measures of itself goes here.
    pub metrics: RaftMetrics,
    /// Called before each fsync of the log.
    pub before_sync: Option<BeforeSync>,
}

/// Bounds of memory, queues and files.
#[derive(Debug, Clone)]
pub struct RaftLimits {
    /// Of one proposal.
    pub entry_bytes: usize,
    /// Proposals that wait for their turn or for a majority.
    pub pending_proposals: usize,
    /// Reads that wait for the leader's word.
    pub pending_reads: usize,
    /// Messages from peers that wait for their turn; more are dropped (peers send again).
    pub queued_messages: usize,
    /// Bytes of these.
    pub queued_message_bytes: usize,
    /// Entries in one message, in bytes; a larger entry travels alone.
    pub message_bytes: u64,
    /// Entries that wait for a majority, in bytes; more proposals are refused.
    pub uncommitted_bytes: u64,
    /// A file of the log is closed beyond this size.
    pub segment_bytes: u64,
    /// A snapshot is made after so many entries …
    pub snapshot_entries: u64,
    /// … or bytes of entries.
    pub snapshot_bytes: u64,
    /// Entries kept behind a snapshot for slow followers.
    pub trailing_entries: u64,
    /// The largest snapshot that is taken from a peer.
    pub max_snapshot_bytes: u64,
}

impl Default for RaftLimits {
    fn default() -> Self {
        Self {
            entry_bytes: 1 << 20,
            pending_proposals: 4096,
            pending_reads: 16_384,
            queued_messages: 4096,
            queued_message_bytes: 64 << 20,
            message_bytes: 1 << 20,
            uncommitted_bytes: 64 << 20,
            segment_bytes: 64 << 20,
            snapshot_entries: 10_000,
            snapshot_bytes: 64 << 20,
            trailing_entries: 1_000,
            max_snapshot_bytes: 1 << 30,
        }
    }
}

impl RaftOptions {
    /// Usual times: ticks of 50 ms, heartbeats every 100 ms, elections after 0.5 to 1 s.
    #[must_use]
    pub fn new(member_id: u64, cluster_id: impl Into<String>, data_dir: impl Into<PathBuf>) -> Self {
        Self {
            member_id,
            cluster_id: cluster_id.into(),
            data_dir: data_dir.into(),
            tick: Duration::from_millis(50),
            heartbeat_ticks: 2,
            election_ticks: 10,
            limits: RaftLimits::default(),
            bootstrap: None,
            seed: None,
            metrics: RaftMetrics::default(),
            before_sync: None,
        }
    }

    /// Refuses what cannot work.
    ///
    /// # Errors
    /// Names the option.
    pub fn check(&self) -> Result<(), RaftError> {
        let refuse = |text: String| Err(RaftError::Options(text));
        if self.member_id == 0 || self.member_id > super::convert::MAX_NUMBER {
            return refuse(format!("member_id is {}; give 1 to {}", self.member_id, super::convert::MAX_NUMBER));
        }
        if self.cluster_id.is_empty() || self.cluster_id.len() > super::convert::MAX_CLUSTER_ID_BYTES {
            return refuse(format!("cluster_id has {} bytes; give 1 to {}", self.cluster_id.len(), super::convert::MAX_CLUSTER_ID_BYTES));
        }
        if self.tick.is_zero() || self.heartbeat_ticks == 0 || self.election_ticks <= 2 * self.heartbeat_ticks {
            return refuse(format!(
                "tick {:?}, heartbeat_ticks {} and election_ticks {}: none may be 0, and election_ticks must be over twice heartbeat_ticks",
                self.tick, self.heartbeat_ticks, self.election_ticks
            ));
        }
        if self.limits.entry_bytes > super::convert::MAX_ENTRY_BYTES {
            return refuse(format!("limits.entry_bytes is {}; at most {}", self.limits.entry_bytes, super::convert::MAX_ENTRY_BYTES));
        }
        let message_bytes = self.limits.message_bytes.saturating_add(self.limits.entry_bytes as u64);
        if message_bytes > super::convert::MAX_MESSAGE_BYTES as u64 || self.limits.uncommitted_bytes < self.limits.message_bytes {
            return refuse(format!(
                "limits.message_bytes is {}: with an entry it may have at most {}, and not more than uncommitted_bytes",
                self.limits.message_bytes,
                super::convert::MAX_MESSAGE_BYTES
            ));
        }
        if let Some(voters) = &self.bootstrap {
            super::convert::check_voters(voters, &[]).map_err(|error| RaftError::Options(format!("bootstrap: {error}")))?;
            if !voters.contains(&self.member_id) {
                return refuse(format!("bootstrap {voters:?} lacks this member, {}", self.member_id));
            }
        }
        Ok(())
    }
}
