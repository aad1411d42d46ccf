//! raft-rs without I/O: ticks, messages and proposals go in, a [`Batch`] of things to do comes out.
//!
//! What it is not: it writes nothing, sends nothing, knows no time but ticks, and no randomness but its seed.
//!
//! Invariants: a message from a peer cannot make raft-rs panic (shapes are checked by [`super::convert`], what depends
//! on the state by `admit`); messages that tell of something persisted leave only after [`RaftCore::persisted`]; the same
//! inputs in the same order give the same outputs.

use bytes::Bytes;
use forge_proto::raft as wire;
use raft::eraftpb::{ConfState, Entry, EntryType, HardState, Message, MessageType, SnapshotMetadata};
use raft::{Config, RawNode, Ready, SnapshotStatus, StateRole};

use super::cache::{Cache, Persisted};
use super::convert::{change_for_raft, change_in, change_out, message_out};
use super::{MemberChange, MemberProgress, RaftRole};

/// How a core is set up; see [`super::RaftOptions`].
#[derive(Debug, Clone)]
pub struct CoreOptions {
    /// This member.
    pub member_id: u64,
    /// Ticks between heartbeats.
    pub heartbeat_ticks: usize,
    /// Least ticks without a leader before an election; the most is below twice as many.
    pub election_ticks: usize,
    /// Entries in one message, in bytes.
    pub message_bytes: u64,
    /// Entries that wait for a majority, in bytes.
    pub uncommitted_bytes: u64,
    /// What elections draw from.
    pub seed: u64,
}

/// What is to be done, in this order: send `messages`, install `snapshot`, write `entries` and `hard_state` (and wait
/// for the disk if `must_sync`), call [`RaftCore::persisted`], send `messages_after`, apply `committed`.
#[derive(Debug, Default)]
pub struct Batch {
    /// A leader's messages, which may leave before anything is written.
    pub messages: Vec<wire::Message>,
    /// A leader's snapshot, which replaces log and state.
    pub snapshot: Option<(SnapshotMetadata, Bytes)>,
    /// Entries to append, over what they conflict with.
    pub entries: Vec<Entry>,
    /// Term, vote and commit to remember.
    pub hard_state: Option<HardState>,
    /// Whether something of this must be on disk before `messages_after` leave.
    pub must_sync: bool,
    /// Messages that promise what was written.
    pub messages_after: Vec<wire::Message>,
    /// Entries to apply.
    pub committed: Vec<Committed>,
    /// Reads that may be answered once the state machine has applied up to `index`.
    pub reads: Vec<ReadReady>,
}

/// An entry to apply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// Its place.
    pub index: u64,
    /// Its term.
    pub term: u64,
    /// What it is.
    pub what: CommittedKind,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CommittedKind {
    /// For the state machine.
    Data(Bytes),
    /// For [`RaftCore::apply_change`].
    Change(MemberChange),
    /// Raft's own, or a change that raft refused when it was proposed.
    Nothing,
}

/// The leader's answer to a read request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadReady {
    /// What was given to [`RaftCore::read`].
    pub context: Bytes,
    /// Up to where the state machine must have applied.
    pub index: u64,
}

/// Why a message or a request was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Ask the leader.
    #[error("not the leader")]
    NotLeader,
    /// Too much waits for a majority, or leadership is being handed over.
    #[error("too much waits for a majority, or leadership is being handed over")]
    Busy,
    /// The leader says that this member has entries which it has not.
    #[error(
        "the leader counts on entry {commit} at this member, whose log ends at {last}: its data directory has lost what was \
         on disk; remove this member from the group and add it again under a new id with an empty directory"
    )]
    LostLog {
        /// The leader's commit index for this member.
        commit: u64,
        /// The last entry here.
        last: u64,
    },
    /// A peer says that it has entries which nobody can have.
    #[error("member {from} answers for entry {index}, and the log ends at {last}")]
    BeyondLog {
        /// Who.
        from: u64,
        /// Which.
        index: u64,
        /// The last entry here.
        last: u64,
    },
    /// A message without use now.
    #[error("a message of member {from} is of no use now")]
    Useless {
        /// Who sent it.
        from: u64,
    },
}

/// See the module.
pub struct RaftCore {
    raw: RawNode<Cache>,
    options: CoreOptions,
    /// The batch that was given out and is not yet written.
    open: Option<Ready>,
    members: ConfState,
    campaigns: u64,
}

impl RaftCore {
    /// A member with what its disk has. The state machine must hold `persisted.snapshot`.
    ///
    /// # Errors
    /// When options do not fit together.
    pub fn new(options: CoreOptions, mut persisted: Persisted) -> raft::Result<Self> {
        let applied = persisted.snapshot.index;
        let last = persisted.base_index + persisted.entries.len() as u64;
        // The commit index is written without waiting for the disk, and may lag.
        let hard_state = &mut persisted.hard_state;
        hard_state.commit = hard_state.commit.clamp(applied.min(last), last.max(applied));
        // Term 0 is that of nobody: raft-rs may not answer in it.
        hard_state.term = hard_state.term.max(1);
        let config = Config {
            id: options.member_id,
            election_tick: options.election_ticks,
            heartbeat_tick: options.heartbeat_ticks,
            applied,
            max_size_per_msg: options.message_bytes,
            max_inflight_msgs: 256,
            check_quorum: true,
            pre_vote: true,
            max_uncommitted_size: options.uncommitted_bytes,
            max_committed_size_per_ready: 16 << 20,
            ..Config::default()
        };
        let members = persisted.snapshot.get_conf_state().clone();
        let raw = RawNode::new(&config, Cache::new(persisted), &super::logger::to_tracing())?;
        let mut core = Self { raw, options, open: None, members, campaigns: 0 };
        core.draw_timeout();
        Ok(core)
    }

    /// raft-rs draws election timeouts from the thread's randomness; ours replaces it after every call that may draw.
    fn draw_timeout(&mut self) {
        let range = self.options.election_ticks as u64;
        let drawn = mix(self.options.seed ^ mix(self.options.member_id ^ mix(self.raw.raft.term ^ mix(self.campaigns)))) % range;
        self.raw.raft.set_randomized_election_timeout(self.options.election_ticks + drawn as usize);
    }

    /// Asks for votes without waiting for a leader's silence.
    ///
    /// # Errors
    /// When this member may not be elected now.
    pub fn campaign(&mut self) -> raft::Result<()> {
        self.raw.campaign()
    }

    /// One unit of time has passed.
    pub fn tick(&mut self) {
        let was_waiting = self.raw.raft.election_elapsed;
        self.raw.tick();
        if self.raw.raft.election_elapsed < was_waiting && self.raw.raft.state != StateRole::Leader {
            self.campaigns += 1;
        }
        self.draw_timeout();
    }

    /// Whether the open batch must be written before `message` may be stepped: raft-rs assumes that a member that wins
    /// an election has its log on disk.
    #[must_use]
    pub fn must_write_before(&self, message: &Message) -> bool {
        let may_elect = matches!(
            message.get_msg_type(),
            MessageType::MsgTimeoutNow | MessageType::MsgRequestVoteResponse | MessageType::MsgRequestPreVoteResponse
        );
        may_elect && self.raw.has_ready()
    }

    /// Takes a peer's message that passed [`super::convert`]. No batch may be open.
    ///
    /// # Errors
    /// When it does not fit this member's state.
    pub fn step(&mut self, message: Message) -> Result<(), Refused> {
        self.admit(&message)?;
        let from = message.from;
        let stepped = self.raw.step(message);
        self.draw_timeout();
        stepped.map_err(|_| Refused::Useless { from })
    }

    fn admit(&self, message: &Message) -> Result<(), Refused> {
        let raft = &self.raw.raft;
        let last = raft.raft_log.last_index();
        match message.get_msg_type() {
            MessageType::MsgHeartbeat if message.term >= raft.term && message.commit > last => {
                Err(Refused::LostLog { commit: message.commit, last })
            }
            MessageType::MsgAppendResponse if !message.reject && message.term == raft.term && message.index > last => {
                Err(Refused::BeyondLog { from: message.from, index: message.index, last })
            }
            _ => Ok(()),
        }
    }

    /// Appends data to the log, in order; the index of the first.
    ///
    /// # Errors
    /// [`Refused::NotLeader`] and [`Refused::Busy`]: nothing was taken.
    pub fn propose(&mut self, data: Vec<Bytes>) -> Result<u64, Refused> {
        self.append(data.into_iter().map(|data| Entry { data, ..Entry::default() }).collect())
    }

    /// Appends a change of members; its index.
    ///
    /// # Errors
    /// As [`RaftCore::propose`]; [`Refused::Busy`] too while another change is not applied.
    pub fn propose_change(&mut self, change: MemberChange) -> Result<u64, Refused> {
        if self.is_leader() && self.raw.raft.has_pending_conf() {
            return Err(Refused::Busy);
        }
        let mut entry = Entry::default();
        entry.set_entry_type(EntryType::EntryConfChangeV2);
        entry.data = change_out(change);
        self.append(vec![entry])
    }

    fn append(&mut self, entries: Vec<Entry>) -> Result<u64, Refused> {
        // A follower would forward it, and the proposer would not learn its place.
        if !self.is_leader() {
            return Err(Refused::NotLeader);
        }
        let first = self.raw.raft.raft_log.last_index() + 1;
        let mut message = Message::default();
        message.set_msg_type(MessageType::MsgPropose);
        message.from = self.options.member_id;
        message.set_entries(entries.into());
        self.raw.step(message).map_err(|_| Refused::Busy)?;
        Ok(first)
    }

    /// Asks the leader (maybe this member) up to where a read must wait; the answer comes in [`Batch::reads`], or never.
    /// `context` must never be used twice, also not after a restart.
    pub fn read(&mut self, context: Bytes) {
        self.raw.read_index(context.to_vec());
    }

    /// Begins to hand leadership to the voter `to`.
    ///
    /// # Errors
    /// [`Refused::NotLeader`].
    pub fn transfer(&mut self, to: u64) -> Result<(), Refused> {
        if !self.is_leader() {
            return Err(Refused::NotLeader);
        }
        self.raw.transfer_leader(to);
        Ok(())
    }

    /// Tells that messages to `id` are lost.
    pub fn report_unreachable(&mut self, id: u64) {
        self.raw.report_unreachable(id);
    }

    /// Tells how sending a snapshot to `id` ended.
    pub fn report_snapshot(&mut self, id: u64, is_ok: bool) {
        self.raw.report_snapshot(id, if is_ok { SnapshotStatus::Finish } else { SnapshotStatus::Failure });
    }

    /// What is to be done, if anything. Until [`RaftCore::persisted`], no other input may be given.
    pub fn ready(&mut self) -> Option<Batch> {
        if self.open.is_some() || !self.raw.has_ready() {
            return None;
        }
        let mut ready = self.raw.ready();
        let snapshot = (!ready.snapshot().is_empty()).then(|| {
            let snapshot = ready.snapshot();
            (snapshot.get_metadata().clone(), snapshot.data.clone())
        });
        let batch = Batch {
            messages: self.out(ready.messages()),
            snapshot,
            entries: ready.entries().clone(),
            hard_state: ready.hs().cloned(),
            must_sync: ready.must_sync(),
            messages_after: self.out(ready.persisted_messages()),
            committed: ready.take_committed_entries().into_iter().map(committed).collect(),
            reads: ready
                .take_read_states()
                .into_iter()
                .map(|read| ReadReady { context: read.request_ctx.into(), index: read.index })
                .collect(),
        };
        self.open = Some(ready);
        Some(batch)
    }

    /// This member's own messages. One that leads no more would pass another's question on in that one's name, maybe to the
    /// very member that asked, which refuses what seems to come from itself; who asked asks again.
    fn out(&self, messages: &[Message]) -> Vec<wire::Message> {
        messages.iter().filter(|message| message.from == self.options.member_id).map(message_out).collect()
    }

    /// The batch is on disk. What follows from that: more to send, more to apply.
    pub fn persisted(&mut self) -> (Vec<wire::Message>, Vec<Committed>) {
        let Some(ready) = self.open.take() else { return (Vec::new(), Vec::new()) };
        if !ready.snapshot().is_empty() {
            let meta = ready.snapshot().get_metadata().clone();
            self.members = meta.get_conf_state().clone();
            self.raw.mut_store().install(meta);
        }
        self.raw.mut_store().append(ready.entries());
        let mut light = self.raw.advance_append(ready);
        (self.out(light.messages()), light.take_committed_entries().into_iter().map(committed).collect())
    }

    /// The state machine has applied up to `index`.
    pub fn applied(&mut self, index: u64) {
        self.raw.advance_apply_to(index);
    }

    /// Applies a change of members that was committed; whether it made sense (every member answers alike).
    pub fn apply_change(&mut self, change: MemberChange) -> bool {
        let is_known_voter = self.members.voters.contains(&change.id());
        // raft-rs would make the voter a learner.
        if matches!(change, MemberChange::AddLearner(_)) && is_known_voter {
            return false;
        }
        match self.raw.apply_conf_change(&change_for_raft(change)) {
            Ok(members) => {
                self.members = members;
                let raft = &mut self.raw.raft;
                if raft.state == StateRole::Leader && !self.members.voters.contains(&self.options.member_id) {
                    // Removed while leading: others elect.
                    let term = raft.term;
                    raft.become_follower(term, raft::INVALID_ID);
                }
                self.draw_timeout();
                true
            }
            Err(_) => false,
        }
    }

    /// A snapshot of the state up to `meta.index`, which is applied, is on disk.
    pub fn snapshot_made(&mut self, meta: SnapshotMetadata) {
        let store = self.raw.mut_store();
        store.snapshot = meta;
        store.wants_snapshot.set(false);
    }

    /// Forgets entries up to `index`, which a snapshot holds.
    pub fn compact(&mut self, index: u64) {
        self.raw.mut_store().compact(index);
    }

    /// Whether a peer waits for a newer snapshot than there is.
    #[must_use]
    pub fn wants_snapshot(&self) -> bool {
        self.raw.store().wants_snapshot.get()
    }

    /// The newest snapshot; of index 0 before the first.
    #[must_use]
    pub fn snapshot_meta(&self) -> &SnapshotMetadata {
        &self.raw.store().snapshot
    }

    /// What a snapshot of the state up to `index` says of itself, if `index` is in the log.
    #[must_use]
    pub fn meta_at(&self, index: u64) -> Option<SnapshotMetadata> {
        let term = self.raw.store().term_at(index)?;
        let mut meta = SnapshotMetadata { index, term, ..SnapshotMetadata::default() };
        meta.set_conf_state(self.members.clone());
        Some(meta)
    }

    /// The term of an entry in the log, or of the one before its first.
    #[must_use]
    pub fn term_at(&self, index: u64) -> Option<u64> {
        self.raw.store().term_at(index)
    }

    /// Bytes of the entries in the log.
    #[must_use]
    pub fn log_bytes(&self) -> u64 {
        self.raw.store().entry_bytes()
    }

    /// First and last entry of the log on disk.
    #[must_use]
    pub fn log_range(&self) -> (u64, u64) {
        (self.raw.store().first(), self.raw.store().last())
    }

    /// Raft's term.
    #[must_use]
    pub fn term(&self) -> u64 {
        self.raw.raft.term
    }

    /// Last entry known to be on a majority's disks.
    #[must_use]
    pub fn commit_index(&self) -> u64 {
        self.raw.raft.raft_log.committed
    }

    /// Who leads, if known.
    #[must_use]
    pub fn leader(&self) -> Option<u64> {
        // Who has no vote never asks for votes, and raft-rs goes on naming a leader that it no longer hears.
        let raft = &self.raw.raft;
        if !raft.promotable() && raft.election_elapsed >= 2 * self.options.election_ticks {
            return None;
        }
        Some(self.raw.raft.leader_id).filter(|&id| id != raft::INVALID_ID)
    }

    /// Whether this member orders proposals.
    #[must_use]
    pub fn is_leader(&self) -> bool {
        self.raw.raft.state == StateRole::Leader
    }

    /// This member's part.
    #[must_use]
    pub fn role(&self) -> RaftRole {
        match self.raw.raft.state {
            StateRole::Leader => RaftRole::Leader,
            _ if !self.members.voters.contains(&self.options.member_id) => RaftRole::Learner,
            StateRole::Follower => RaftRole::Follower,
            StateRole::Candidate | StateRole::PreCandidate => RaftRole::Candidate,
        }
    }

    /// The group's voters and learners, as applied.
    #[must_use]
    pub fn members(&self) -> &ConfState {
        &self.members
    }

    /// The group as this member sees it, by id.
    #[must_use]
    pub fn progress(&self) -> Vec<MemberProgress> {
        let is_leader = self.is_leader();
        let mut members: Vec<_> = self
            .members
            .voters
            .iter()
            .map(|&id| (id, true))
            .chain(self.members.learners.iter().map(|&id| (id, false)))
            .map(|(id, is_voter)| {
                let progress = self.raw.raft.prs().get(id).filter(|_| is_leader);
                let is_self = id == self.options.member_id;
                MemberProgress {
                    id,
                    is_voter,
                    matched_index: progress.map_or(0, |progress| progress.matched),
                    is_active: is_self || progress.is_some_and(|progress| progress.recent_active),
                }
            })
            .collect();
        members.sort_by_key(|member| member.id);
        members
    }

    /// The message by which a leader that cannot write asks the most advanced voter to take over.
    #[must_use]
    pub fn resignation(&self) -> Option<wire::Message> {
        let heir = self.progress().into_iter().filter(|member| member.is_voter && member.id != self.options.member_id && member.is_active);
        let heir = heir.max_by_key(|member| member.matched_index)?;
        self.is_leader().then(|| wire::Message {
            kind: MessageType::MsgTimeoutNow as u32,
            to: heir.id,
            from: self.options.member_id,
            term: self.raw.raft.term,
            ..wire::Message::default()
        })
    }
}

fn committed(entry: Entry) -> Committed {
    let what = match entry.get_entry_type() {
        EntryType::EntryNormal if entry.data.is_empty() => CommittedKind::Nothing,
        EntryType::EntryNormal => CommittedKind::Data(entry.data),
        // What reached the log passed `convert`; the same bytes are the same nothing at every member.
        EntryType::EntryConfChange | EntryType::EntryConfChangeV2 => {
            change_in(&entry.data).map_or(CommittedKind::Nothing, CommittedKind::Change)
        }
    };
    Committed { index: entry.index, term: entry.term, what }
}

/// A number that looks random and depends on `value` alone (splitmix64).
fn mix(value: u64) -> u64 {
    let mut mixed = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}
