//! A member as one deterministic step function: core, log and state machine, driven from outside.
//!
//! What it is not: it has no thread, no clock and no socket; time is counted in ticks, messages and answers leave through
//! a [`Sink`], files are behind [`Disk`]. `node` drives it in production, a simulator in tests.
//!
//! Invariants: an answer `Ok` to a proposal leaves only when it is on a majority's disks and applied here; nothing that
//! depends on a write leaves before the write is on disk; while the disk is full nothing leaves at all.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use forge_proto::raft as wire;
use raft::eraftpb::{ConfState, HardState, Message, MessageType, SnapshotMetadata};

use super::core::{Batch, Committed, CommittedKind, CoreOptions, RaftCore, Refused};
use super::log::{Disk, Identity, LogError, LogStore};
use super::snapshot::{Making, SnapshotMade, SnapshotWork};
use super::{DiskState, MemberChange, Proposed, RaftError, RaftOptions, RaftRole, RaftStatus, StateMachine};

/// Names a request until its answer; chosen by the driver, never used twice.
pub type RequestId = u64;

/// What a member lets out.
pub trait Sink {
    /// Messages to peers.
    fn send(&mut self, messages: Vec<wire::Message>);
    /// A snapshot to a peer.
    fn send_snapshot(&mut self, to: u64, message: wire::Message, data: Bytes);
    /// The answer to a request.
    fn answer(&mut self, id: RequestId, answer: Answer);
}

/// The answer to a request.
#[derive(Debug)]
pub enum Answer {
    /// To [`Member::propose`].
    Proposed(Result<Proposed, RaftError>),
    /// To [`Member::change`] and [`Member::transfer`].
    Changed(Result<(), RaftError>),
    /// To [`Member::read`].
    Read(Result<u64, RaftError>),
}

/// A proposal that waits for its entry.
struct Pending {
    term: u64,
    id: RequestId,
    is_change: bool,
}

impl Pending {
    fn failed(&self, error: RaftError) -> Answer {
        if self.is_change { Answer::Changed(Err(error)) } else { Answer::Proposed(Err(error)) }
    }
}

/// Reads that travel under one context.
struct Asked {
    context: Bytes,
    ids: Vec<RequestId>,
    at_tick: u64,
}

/// See the module.
pub struct Member<D: Disk> {
    options: RaftOptions,
    core: RaftCore,
    store: LogStore<D>,
    machine: Box<dyn StateMachine>,
    applied: u64,
    ticks: u64,
    pending: BTreeMap<u64, Pending>,
    /// Term in which `pending` were taken.
    led_term: Option<u64>,
    /// Reads that wait to be asked for: one question is under way at a time.
    unasked: Vec<RequestId>,
    asked: Option<Asked>,
    /// Reads that wait until so much is applied.
    confirmed: VecDeque<(u64, Vec<RequestId>)>,
    read_counter: u64,
    nonce: u64,
    known_leader: Option<u64>,
    /// A batch that could not be written: nothing else happens until it is.
    stalled: Option<Batch>,
    /// The disk was full when a snapshot was to be made: not again before this tick.
    no_snapshot_before: u64,
    making: Making,
}

impl<D: Disk> Member<D> {
    /// Opens the disk and brings the state machine to where the newest snapshot is; what was committed after it is
    /// applied in the first turns. `seed` must differ from start to start.
    ///
    /// # Errors
    /// Options, the folder, or a snapshot that the state machine does not take.
    pub fn open(options: RaftOptions, seed: u64, disk: D, mut machine: Box<dyn StateMachine>) -> Result<Self, RaftError> {
        options.check()?;
        let identity = Identity { cluster_id: options.cluster_id.clone(), member_id: options.member_id };
        let first = options.bootstrap.clone().map(|voters| (ConfState { voters, ..ConfState::default() }, machine.snapshot()()));
        let opened = LogStore::open(disk, identity, &options.limits, first)?;
        if let Some(data) = opened.snapshot {
            let index = opened.persisted.snapshot.index;
            machine.restore(index, &data).map_err(|why| RaftError::Snapshot { index, why })?;
        }
        let core_options = CoreOptions {
            member_id: options.member_id,
            heartbeat_ticks: options.heartbeat_ticks,
            election_ticks: options.election_ticks,
            message_bytes: options.limits.message_bytes,
            uncommitted_bytes: options.limits.uncommitted_bytes,
            seed,
        };
        let applied = opened.persisted.snapshot.index;
        // Without entries after a snapshot in which it is alone nobody else can have been let in: there is no leader to wait for.
        let members = opened.persisted.snapshot.get_conf_state();
        let is_alone = members.voters == [options.member_id] && members.learners.is_empty() && members.voters_outgoing.is_empty();
        let leads_at_once = is_alone && opened.persisted.entries.is_empty();
        let unusable = |error: raft::Error| RaftError::Options(error.to_string());
        let mut core = RaftCore::new(core_options, opened.persisted).map_err(unusable)?;
        if leads_at_once {
            core.campaign().map_err(unusable)?;
        }
        Ok(Self {
            options,
            core,
            store: opened.store,
            machine,
            applied,
            ticks: 0,
            pending: BTreeMap::new(),
            led_term: None,
            unasked: Vec::new(),
            asked: None,
            confirmed: VecDeque::new(),
            read_counter: 0,
            nonce: seed,
            known_leader: None,
            stalled: None,
            no_snapshot_before: 0,
            making: Making::No,
        })
    }

    /// One unit of time has passed. Also the moment in which a full disk is tried again.
    ///
    /// # Errors
    /// When the member must stop.
    pub fn tick(&mut self, sink: &mut dyn Sink) -> Result<(), RaftError> {
        self.ticks += 1;
        self.turn(sink)?;
        if self.stalled.is_none() {
            self.core.tick();
        }
        Ok(())
    }

    /// Takes a checked message of a peer. While the disk is full it is lost, as on the way.
    ///
    /// # Errors
    /// When the member must stop.
    pub fn receive(&mut self, message: Message, sink: &mut dyn Sink) -> Result<(), RaftError> {
        if self.core.must_write_before(&message) {
            self.turn(sink)?;
        }
        if self.stalled.is_some() {
            return Ok(());
        }
        match self.core.step(message) {
            Ok(()) | Err(Refused::Useless { .. }) => {}
            Err(refused) => tracing::error!(member = self.options.member_id, "{refused}"),
        }
        Ok(())
    }

    /// Takes a checked snapshot of a leader. It is installed, or known to be of no use, when this returns.
    ///
    /// # Errors
    /// When the member must stop.
    pub fn receive_snapshot(&mut self, message: Message, sink: &mut dyn Sink) -> Result<(), RaftError> {
        self.turn(sink)?;
        self.receive(message, sink)?;
        self.turn(sink)
    }

    /// Appends data to the log, in order; each is answered.
    pub fn propose(&mut self, proposals: Vec<(RequestId, Bytes)>, sink: &mut dyn Sink) {
        if self.stalled.is_some() {
            for (id, _) in proposals {
                sink.answer(id, Answer::Proposed(Err(self.disk_full())));
            }
            return;
        }
        let (ids, data): (Vec<_>, Vec<_>) = proposals.into_iter().unzip();
        match self.core.propose(data) {
            Ok(first) => {
                let term = self.core.term();
                self.led_term = Some(term);
                self.pending.extend((first..).zip(ids.into_iter().map(|id| Pending { term, id, is_change: false })));
            }
            Err(refused) => {
                for id in ids {
                    sink.answer(id, Answer::Proposed(Err(self.refusal(&refused))));
                }
            }
        }
    }

    /// Changes the group; answered when applied, or at once where there is nothing to do.
    pub fn change(&mut self, id: RequestId, change: MemberChange, sink: &mut dyn Sink) {
        let answer = match self.judge(change) {
            Ok(true) => Ok(()),
            Ok(false) => match self.core.propose_change(change) {
                Ok(index) => {
                    let term = self.core.term();
                    self.led_term = Some(term);
                    self.pending.insert(index, Pending { term, id, is_change: true });
                    return;
                }
                Err(refused) => Err(self.refusal(&refused)),
            },
            Err(error) => Err(error),
        };
        sink.answer(id, Answer::Changed(answer));
    }

    /// Whether a change is made already; refuses those that make no sense or endanger the group.
    fn judge(&mut self, change: MemberChange) -> Result<bool, RaftError> {
        if self.stalled.is_some() {
            return Err(self.disk_full());
        }
        if !self.core.is_leader() {
            return Err(RaftError::NotLeader { leader: self.core.leader() });
        }
        let id = change.id();
        let (voters, learners) = (self.core.members().voters.clone(), self.core.members().learners.clone());
        if id == 0 || id > super::convert::MAX_NUMBER {
            return Err(RaftError::Members(format!("{id} is no member's id")));
        }
        let progress = self.core.progress();
        match change {
            MemberChange::AddLearner(_) if voters.contains(&id) => Err(RaftError::Members(format!("member {id} votes already"))),
            MemberChange::AddLearner(_) if learners.contains(&id) => Ok(true),
            MemberChange::AddLearner(_) if voters.len() + learners.len() >= super::convert::MAX_MEMBERS => {
                Err(RaftError::Members(format!("the group has {} members; at most that many", super::convert::MAX_MEMBERS)))
            }
            MemberChange::AddLearner(_) => Ok(false),
            MemberChange::Promote(_) if voters.contains(&id) => Ok(true),
            MemberChange::Promote(_) if !learners.contains(&id) => {
                Err(RaftError::Members(format!("member {id} is not of the group: add it as a learner first")))
            }
            MemberChange::Promote(_) => {
                // A voter that lags would take part in no majority and could cost one.
                let commit = self.core.commit_index();
                let least = commit.saturating_sub(100).max(self.core.log_range().0);
                let is_near = progress.iter().any(|member| member.id == id && member.is_active && member.matched_index >= least);
                if is_near {
                    Ok(false)
                } else {
                    Err(RaftError::Busy { what: format!("member {id} has not caught up with entry {commit}") })
                }
            }
            MemberChange::Remove(_) if !voters.contains(&id) => Ok(!learners.contains(&id)),
            MemberChange::Remove(_) if voters.len() == 1 => {
                Err(RaftError::Members(format!("member {id} is the only one that votes: promote another first")))
            }
            MemberChange::Remove(_) => {
                let left = || progress.iter().filter(|member| member.is_voter && member.id != id);
                let active = left().filter(|member| member.is_active).count();
                if active * 2 <= left().count() {
                    return Err(RaftError::Busy {
                        what: format!("without member {id}, {active} of {} voters are reachable", left().count()),
                    });
                }
                if id == self.options.member_id {
                    let heir = left().filter(|member| member.is_active).max_by_key(|member| member.matched_index).map(|member| member.id);
                    if let Some(heir) = heir {
                        // The refusal is the answer either way.
                        drop(self.core.transfer(heir));
                    }
                    return Err(RaftError::NotLeader { leader: heir });
                }
                Ok(false)
            }
        }
    }

    /// Begins to hand leadership to the voter `to`; the answer says whether it began.
    pub fn transfer(&mut self, id: RequestId, to: u64, sink: &mut dyn Sink) {
        let answer = if self.stalled.is_some() {
            Err(self.disk_full())
        } else if !self.core.is_leader() {
            Err(RaftError::NotLeader { leader: self.core.leader() })
        } else if self.core.members().voters.contains(&to) {
            self.core.transfer(to).map_err(|refused| self.refusal(&refused))
        } else {
            Err(RaftError::Members(format!("member {to} has no vote, and cannot lead")))
        };
        sink.answer(id, Answer::Changed(answer));
    }

    /// Answers each when the state machine has applied all that was acknowledged anywhere before this call.
    pub fn read(&mut self, ids: Vec<RequestId>) {
        self.unasked.extend(ids);
    }

    /// Forgets reads that nobody waits for any more.
    pub fn forget_reads(&mut self, is_gone: impl Fn(RequestId) -> bool) {
        self.unasked.retain(|&id| !is_gone(id));
        if let Some(asked) = &mut self.asked {
            asked.ids.retain(|&id| !is_gone(id));
        }
        for (_, ids) in &mut self.confirmed {
            ids.retain(|&id| !is_gone(id));
        }
    }

    /// Tells that messages to `id` are lost.
    pub fn report_unreachable(&mut self, id: u64) {
        if self.stalled.is_none() {
            self.core.report_unreachable(id);
        }
    }

    /// Tells how sending a snapshot to `id` ended.
    pub fn report_snapshot(&mut self, id: u64, is_ok: bool) {
        if self.stalled.is_none() {
            self.core.report_snapshot(id, is_ok);
        }
    }

    /// Does everything that is ready: writes, sends, applies, answers. Call it after any input.
    ///
    /// # Errors
    /// When the member must stop: the disk failed, or a snapshot was not understood.
    pub fn turn(&mut self, sink: &mut dyn Sink) -> Result<(), RaftError> {
        if let Some(batch) = self.stalled.take() {
            self.finish(batch, sink)?;
        }
        while self.stalled.is_none() {
            self.ask_for_reads();
            let Some(mut batch) = self.core.ready() else { break };
            self.send(std::mem::take(&mut batch.messages), sink)?;
            self.take_reads(std::mem::take(&mut batch.reads));
            self.finish(batch, sink)?;
        }
        if self.stalled.is_none() {
            self.answer_reads(sink);
            self.notice_leadership(sink);
            self.finish_snapshot()?;
            self.snapshot_if_due()?;
        }
        Ok(())
    }

    /// Writes a batch and does what follows from that.
    fn finish(&mut self, mut batch: Batch, sink: &mut dyn Sink) -> Result<(), RaftError> {
        match self.write(&batch) {
            Ok(()) => {}
            Err(RaftError::Log(error)) if error.is_full() => {
                self.stall(batch, &error, sink);
                return Ok(());
            }
            Err(error) => return Err(error),
        }
        let mut committed = std::mem::take(&mut batch.committed);
        if let Some((meta, _)) = &batch.snapshot {
            self.applied = meta.index;
            // Their entries are behind the snapshot, and what became of them is not told.
            let (settled, open) = std::mem::take(&mut self.pending).into_iter().partition(|(index, _)| *index <= meta.index);
            self.pending = open;
            lose(settled, sink);
        }
        self.send(std::mem::take(&mut batch.messages_after), sink)?;
        let (messages, more) = self.core.persisted();
        self.send(messages, sink)?;
        if batch.snapshot.is_some() {
            self.core.applied(self.applied);
        }
        committed.extend(more);
        self.apply(committed, sink)
    }

    fn write(&mut self, batch: &Batch) -> Result<(), RaftError> {
        if let Some((meta, data)) = &batch.snapshot {
            let index = meta.index;
            // Before it is on disk: what the state machine does not take must not be there after a restart.
            self.machine.restore(index, data).map_err(|why| RaftError::Snapshot { index, why })?;
            self.store.write_snapshot(meta, data)?;
            self.store.restart_at(meta, batch.hard_state.as_ref())?;
        }
        let state: Option<&HardState> = batch.hard_state.as_ref();
        self.store.write(&batch.entries, state, batch.must_sync && (state.is_some() || !batch.entries.is_empty()))?;
        Ok(())
    }

    /// The disk is full: others must lead, and nothing more is taken or told until the batch is written.
    fn stall(&mut self, batch: Batch, error: &LogError, sink: &mut dyn Sink) {
        tracing::error!(member = self.options.member_id, "{error}; this member takes no part until there is space");
        if let Some(resignation) = self.core.resignation() {
            sink.send(vec![resignation]);
        }
        lose(std::mem::take(&mut self.pending), sink);
        self.led_term = None;
        let asked = self.asked.take().into_iter().flat_map(|asked| asked.ids);
        let reads: Vec<_> = self.unasked.drain(..).chain(asked).chain(self.confirmed.drain(..).flat_map(|(_, ids)| ids)).collect();
        for id in reads {
            sink.answer(id, Answer::Read(Err(self.disk_full())));
        }
        self.stalled = Some(batch);
    }

    fn send(&mut self, messages: Vec<wire::Message>, sink: &mut dyn Sink) -> Result<(), RaftError> {
        let (snapshots, messages): (Vec<_>, Vec<_>) =
            messages.into_iter().partition(|message| message.kind == MessageType::MsgSnapshot as u32);
        if !messages.is_empty() {
            sink.send(messages);
        }
        for message in snapshots {
            let data = self.store.read_snapshot()?;
            sink.send_snapshot(message.to, message, data);
        }
        Ok(())
    }

    fn apply(&mut self, committed: Vec<Committed>, sink: &mut dyn Sink) -> Result<(), RaftError> {
        if committed.is_empty() {
            return Ok(());
        }
        for entry in committed {
            if let CommittedKind::Data(data) = &entry.what {
                let index = entry.index;
                self.machine.knows(data).map_err(|why| RaftError::Entry { index, why })?;
            }
            let pending = self.pending.remove(&entry.index);
            let is_ours = pending.as_ref().is_some_and(|pending| pending.term == entry.term);
            self.applied = entry.index;
            let answer = match entry.what {
                CommittedKind::Data(data) => {
                    let reply = self.machine.apply(entry.index, &data);
                    Answer::Proposed(Ok(Proposed { index: entry.index, reply }))
                }
                CommittedKind::Change(change) => {
                    let is_done = self.core.apply_change(change);
                    let refused = || RaftError::Members(format!("{change:?} does not fit the group"));
                    Answer::Changed(if is_done { Ok(()) } else { Err(refused()) })
                }
                // A change that raft refused when it was proposed.
                CommittedKind::Nothing => Answer::Changed(Err(RaftError::Busy { what: "another change of members is under way".into() })),
            };
            match pending {
                Some(pending) if is_ours => sink.answer(pending.id, answer),
                // Another leader's entry took the place.
                Some(pending) => {
                    let lost = RaftError::NotLeader { leader: self.core.leader() };
                    sink.answer(pending.id, pending.failed(lost));
                }
                None => {}
            }
        }
        self.core.applied(self.applied);
        Ok(())
    }

    /// Whoever proposed to a leader that is none any more learns that the outcome is open.
    fn notice_leadership(&mut self, sink: &mut dyn Sink) {
        if let Some(term) = self.led_term
            && (!self.core.is_leader() || self.core.term() != term)
        {
            self.led_term = None;
            lose(std::mem::take(&mut self.pending), sink);
        }
        let leader = self.core.leader();
        if std::mem::replace(&mut self.known_leader, leader) != leader
            && let Some(asked) = self.asked.take()
        {
            // The question went to one who does not lead any more.
            self.unasked.extend(asked.ids);
        }
    }

    fn ask_for_reads(&mut self) {
        let patience = self.options.election_ticks as u64;
        if let Some(asked) = self.asked.take_if(|asked| self.ticks - asked.at_tick >= patience) {
            self.unasked.extend(asked.ids);
        }
        if self.asked.is_some() || self.unasked.is_empty() || self.core.leader().is_none() {
            return;
        }
        self.read_counter += 1;
        // Never twice: an answer that is late must not be taken for one to another question.
        let context: Vec<u8> =
            [self.options.member_id, self.nonce, self.read_counter].iter().flat_map(|number| number.to_le_bytes()).collect();
        let context = Bytes::from(context);
        self.core.read(context.clone());
        self.asked = Some(Asked { context, ids: std::mem::take(&mut self.unasked), at_tick: self.ticks });
    }

    fn take_reads(&mut self, reads: Vec<super::core::ReadReady>) {
        for read in reads {
            if let Some(asked) = self.asked.take_if(|asked| asked.context == read.context) {
                self.confirmed.push_back((read.index, asked.ids));
            }
        }
    }

    fn answer_reads(&mut self, sink: &mut dyn Sink) {
        let applied = self.applied;
        self.confirmed.retain(|(index, ids)| {
            let is_due = *index <= applied;
            if is_due {
                ids.iter().for_each(|&id| sink.answer(id, Answer::Read(Ok(applied))));
            }
            !is_due
        });
    }

    fn snapshot_if_due(&mut self) -> Result<(), RaftError> {
        let limits = &self.options.limits;
        let behind = self.applied - self.core.snapshot_meta().index;
        let is_due =
            behind >= limits.snapshot_entries || (behind > limits.trailing_entries && self.core.log_bytes() >= limits.snapshot_bytes);
        let is_due = is_due || self.core.wants_snapshot() && behind > 0;
        if !is_due || self.ticks < self.no_snapshot_before || !matches!(self.making, Making::No) {
            return Ok(());
        }
        let Some(meta) = self.core.meta_at(self.applied) else { return Ok(()) };
        match self.store.begin_snapshot(&meta) {
            Ok(draft) => {
                self.making = Making::Begun(Box::new(SnapshotWork { frozen: self.machine.snapshot(), draft }));
                Ok(())
            }
            Err(error) => self.no_snapshot(error),
        }
    }

    /// What is to be encoded and written for a snapshot, if one was begun. Its end goes to [`Member::snapshot_made`].
    pub fn take_snapshot_work(&mut self) -> Option<SnapshotWork> {
        match std::mem::replace(&mut self.making, Making::Away) {
            Making::Begun(work) => Some(*work),
            other => {
                self.making = other;
                None
            }
        }
    }

    /// What came of [`Member::take_snapshot_work`]; the next turn makes it count.
    pub fn snapshot_made(&mut self, made: SnapshotMade) {
        self.making = Making::Made(made);
    }

    fn finish_snapshot(&mut self) -> Result<(), RaftError> {
        let SnapshotMade(written) = match std::mem::replace(&mut self.making, Making::No) {
            Making::Made(made) => made,
            other => {
                self.making = other;
                return Ok(());
            }
        };
        let meta = written.meta().clone();
        if meta.index <= self.core.snapshot_meta().index {
            // The leader's came meanwhile.
            self.store.discard_snapshot(&written);
            return Ok(());
        }
        match self.store.finish_snapshot(written).and_then(|()| self.compact(meta)) {
            Ok(()) => Ok(()),
            Err(error) => self.no_snapshot(error),
        }
    }

    /// Without space there is none for a while; any other failure is the member's end.
    fn no_snapshot(&mut self, error: LogError) -> Result<(), RaftError> {
        if !error.is_full() {
            return Err(error.into());
        }
        tracing::warn!(member = self.options.member_id, "no snapshot: {error}");
        self.no_snapshot_before = self.ticks + 10 * self.options.election_ticks as u64;
        Ok(())
    }

    fn compact(&mut self, meta: SnapshotMetadata) -> Result<(), LogError> {
        let limits = &self.options.limits;
        let mut index = meta.index.saturating_sub(limits.trailing_entries);
        if self.core.log_bytes() >= limits.snapshot_bytes {
            // Entries are large: those behind are worth less than their memory.
            index = meta.index;
        }
        self.core.snapshot_made(meta);
        if let Some(term) = self.core.term_at(index).filter(|_| index > 0) {
            self.core.compact(index);
            self.store.compact(index, term)?;
        }
        Ok(())
    }

    /// The member's view of the group.
    #[must_use]
    pub fn status(&self) -> RaftStatus {
        let is_full = self.stalled.is_some();
        let role = self.core.role();
        let (first_index, last_index) = self.core.log_range();
        RaftStatus {
            member_id: self.options.member_id,
            role: if is_full && role == RaftRole::Leader { RaftRole::Follower } else { role },
            leader: self.core.leader().filter(|&leader| !is_full || leader != self.options.member_id),
            term: self.core.term(),
            commit_index: self.core.commit_index(),
            applied_index: self.applied,
            first_index,
            last_index,
            snapshot_index: self.core.snapshot_meta().index,
            log_bytes: self.core.log_bytes(),
            open_proposals: self.pending.len(),
            members: self.core.progress(),
            disk: if is_full { DiskState::Full } else { DiskState::Writable },
            failure: None,
        }
    }

    /// Whether the disk is full, so that this member takes no part.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.stalled.is_some()
    }

    /// Proposals without an answer.
    #[must_use]
    pub fn open_proposals(&self) -> usize {
        self.pending.len()
    }

    /// The state machine.
    #[must_use]
    pub fn machine(&self) -> &dyn StateMachine {
        &*self.machine
    }

    /// The core, for invariants of a simulator.
    #[must_use]
    pub fn core(&self) -> &RaftCore {
        &self.core
    }

    fn disk_full(&self) -> RaftError {
        RaftError::DiskFull { member_id: self.options.member_id }
    }

    fn refusal(&self, refused: &Refused) -> RaftError {
        match refused {
            Refused::NotLeader => RaftError::NotLeader { leader: self.core.leader() },
            other => RaftError::Busy { what: other.to_string() },
        }
    }
}

fn lose(pending: BTreeMap<u64, Pending>, sink: &mut dyn Sink) {
    for pending in pending.into_values() {
        let unknown = RaftError::Unknown { why: "leadership was lost before a majority answered".into() };
        sink.answer(pending.id, pending.failed(unknown));
    }
}
