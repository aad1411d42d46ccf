//! What a raft member offers and asks of its surroundings: plain data and two traits.

use bytes::Bytes;

/// All of a state as it was when this was made, to be encoded by any thread.
pub type Frozen = Box<dyn FnOnce() -> Vec<u8> + Send>;

/// What the group replicates. Lives on the raft thread: `apply` must be quick, deterministic and must not fail.
pub trait StateMachine: Send + 'static {
    /// Whether this build knows how to apply an entry. Asked before each [`StateMachine::apply`].
    ///
    /// # Errors
    /// Which build does; the member then stops rather than go on with another state than its peers.
    fn knows(&self, data: &[u8]) -> Result<(), String> {
        let _ = data;
        Ok(())
    }
    /// Applies the entry at `index`; the reply goes to the proposer if it is at this member. Called once per index, in
    /// order, with gaps where raft itself used an index.
    fn apply(&mut self, index: u64, data: &[u8]) -> Vec<u8>;
    /// All of the state as it is now; its bytes are what [`StateMachine::restore`] takes. Quick: applying waits for this,
    /// and not for the encoding.
    fn snapshot(&self) -> Frozen;
    /// Replaces the state by a snapshot's, which has everything up to `index`.
    ///
    /// # Errors
    /// What is wrong with `data`; the member then stops rather than go on with another state than its peers.
    fn restore(&mut self, index: u64, data: &[u8]) -> Result<(), String>;
}

/// How messages reach other members. Never blocks; drops when a peer is slow or away (raft sends again).
pub trait PeerTransport: Send + Sync + 'static {
    /// Sends messages to the member `to`, in order where it can.
    fn send(&self, to: u64, messages: Vec<forge_proto::raft::Message>);
    /// Sends a snapshot: `message` (of kind MsgSnapshot) and its data. Its end is reported by
    /// [`super::RaftHandle::snapshot_sent`].
    fn send_snapshot(&self, to: u64, message: forge_proto::raft::Message, data: Bytes);
}

/// A proposal that is on the disks of a majority and applied at this member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proposed {
    /// Its place in the log.
    pub index: u64,
    /// What [`StateMachine::apply`] returned.
    pub reply: Vec<u8>,
}

/// A change of who belongs to the group. One at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemberChange {
    /// Adds a member that follows and does not vote.
    AddLearner(u64),
    /// Lets a learner vote, once it has caught up.
    Promote(u64),
    /// Removes a voter or a learner. Its id is never used again.
    Remove(u64),
}

impl MemberChange {
    /// The member it is about.
    #[must_use]
    pub fn id(self) -> u64 {
        match self {
            Self::AddLearner(id) | Self::Promote(id) | Self::Remove(id) => id,
        }
    }
}

/// What a member is in its group.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum RaftRole {
    /// Orders proposals.
    Leader,
    /// Follows a leader, or waits for one.
    #[default]
    Follower,
    /// Asks for votes.
    Candidate,
    /// Follows without a vote, or is not yet or no more of the group.
    Learner,
}

/// Whether the data directory takes writes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DiskState {
    /// It does.
    #[default]
    Writable,
    /// It is full: the member neither accepts, votes nor leads until space returns.
    Full,
}

/// A member of the group as this one sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberProgress {
    /// Its id.
    pub id: u64,
    /// Whether it votes.
    pub is_voter: bool,
    /// The last entry that it is known to have; 0 unless this member leads.
    pub matched_index: u64,
    /// Whether it was heard of within an election timeout; true of this member itself, false of others unless it leads.
    pub is_active: bool,
}

/// A member's view of the group.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RaftStatus {
    /// This member.
    pub member_id: u64,
    /// Its part.
    pub role: RaftRole,
    /// Who leads, if known.
    pub leader: Option<u64>,
    /// Raft's term.
    pub term: u64,
    /// Last entry known to be on a majority's disks.
    pub commit_index: u64,
    /// Last entry applied here.
    pub applied_index: u64,
    /// First and last entry in the log; the first is one more than the last when it is empty.
    pub first_index: u64,
    /// See `first_index`.
    pub last_index: u64,
    /// What the newest snapshot holds.
    pub snapshot_index: u64,
    /// Bytes of the entries in the log.
    pub log_bytes: u64,
    /// Proposals that were taken and not answered.
    pub open_proposals: usize,
    /// The group, by id.
    pub members: Vec<MemberProgress>,
    /// The data directory.
    pub disk: DiskState,
    /// Why this member has stopped for good, if it has.
    pub failure: Option<String>,
}

impl RaftStatus {
    /// Whether this member leads and has an entry of its term committed, so that it may act for the group.
    #[must_use]
    pub fn is_leader(&self) -> bool {
        self.role == RaftRole::Leader
    }
}
