//! The thread that drives a member: takes what waits, ticks, lets the member do what is ready, carries answers back.
//!
//! What it is not: it decides nothing. Its thread has the process's priority; kernels run below it.
//!
//! Invariant: every request that was taken is answered, at the latest when the thread ends (then its asker's channel
//! closes); one turn handles everything that waited, so one fsync serves all of it.

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use bytes::Bytes;
use forge_proto::raft as wire;
use forge_shared::telemetry::RaftMetrics;
use tokio::sync::watch;

use super::inbox::{Inbox, Reply, Waiting};
use super::log::Folder;
use super::member::{Answer, Member, RequestId, Sink};
use super::snapshot::SnapshotWork;
use super::{PeerTransport, Proposed, RaftError, RaftHandle, RaftOptions, RaftStatus, StateMachine};

/// Entries taken from messages or proposals in one write.
const TURN_BYTES: usize = 16 << 20;

/// Opens the data directory and starts the member's thread.
///
/// # Errors
/// Options that do not fit together; a folder that another process uses, that belongs to another cluster or member, that
/// a newer version wrote, or that is damaged.
pub fn start(options: RaftOptions, machine: Box<dyn StateMachine>, transport: Arc<dyn PeerTransport>) -> Result<RaftHandle, RaftError> {
    options.check()?;
    let seed = match options.seed {
        Some(seed) => seed,
        None => getrandom::u64().map_err(|error| RaftError::Options(format!("no randomness from the system: {error}")))?,
    };
    let metrics = options.metrics.clone();
    let folder = Folder::open(&options.data_dir)?.measured(metrics.clone()).slowed(options.before_sync.clone());
    let (limits, member_id, tick) = (options.limits.clone(), options.member_id, options.tick);
    let heartbeat = u32::try_from(options.heartbeat_ticks).unwrap_or(u32::MAX);
    let member = Member::open(options, seed, folder, machine)?;
    let inbox = Arc::new(Inbox::new(limits.clone()));
    let (sender, status) = watch::channel(member.status());
    let mut driver = Driver {
        member,
        inbox: inbox.clone(),
        status: sender,
        tick,
        most_ticks: heartbeat,
        snapshots: snapshot_thread(inbox.clone(), member_id, metrics.clone())?,
        metrics,
        outside: Outside { transport, replies: BTreeMap::new(), next_id: 0 },
    };
    std::thread::Builder::new()
        .name(format!("raft-{member_id}"))
        .spawn(move || driver.run_to_end())
        .map_err(|error| RaftError::Options(format!("no thread: {error}")))?;
    Ok(RaftHandle { inbox, status, limits, member_id })
}

/// A thread that encodes and writes snapshots, until nobody sends it any more.
fn snapshot_thread(inbox: Arc<Inbox>, member_id: u64, metrics: RaftMetrics) -> Result<mpsc::Sender<SnapshotWork>, RaftError> {
    let (sender, works) = mpsc::channel::<SnapshotWork>();
    let run = move || {
        for work in works {
            let began = Instant::now();
            let made = catch_unwind(AssertUnwindSafe(|| work.run())).map_err(|panic| panic_text(&*panic));
            metrics.snapshot_s.observe(began.elapsed().as_secs_f64());
            inbox.made_snapshot(made);
        }
    };
    let thread = std::thread::Builder::new().name(format!("raft-snap-{member_id}")).spawn(run);
    thread.map(|_| sender).map_err(|error| RaftError::Options(format!("no thread for snapshots: {error}")))
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(|&text| text.into()));
    text.unwrap_or_default()
}

enum AnyReply {
    Proposed(Reply<Proposed>),
    Changed(Reply<()>),
    Read(Reply<u64>),
}

/// Peers and askers.
struct Outside {
    transport: Arc<dyn PeerTransport>,
    replies: BTreeMap<RequestId, AnyReply>,
    next_id: RequestId,
}

impl Outside {
    fn keep(&mut self, reply: AnyReply) -> RequestId {
        self.next_id += 1;
        self.replies.insert(self.next_id, reply);
        self.next_id
    }
}

impl Sink for Outside {
    fn send(&mut self, messages: Vec<wire::Message>) {
        let mut by_peer: BTreeMap<u64, Vec<wire::Message>> = BTreeMap::new();
        for message in messages {
            by_peer.entry(message.to).or_default().push(message);
        }
        for (to, messages) in by_peer {
            self.transport.send(to, messages);
        }
    }

    fn send_snapshot(&mut self, to: u64, message: wire::Message, data: Bytes) {
        self.transport.send_snapshot(to, message, data);
    }

    fn answer(&mut self, id: RequestId, answer: Answer) {
        // An asker that has gone needs no answer.
        match (self.replies.remove(&id), answer) {
            (Some(AnyReply::Proposed(reply)), Answer::Proposed(answer)) => drop(reply.send(answer)),
            (Some(AnyReply::Changed(reply)), Answer::Changed(answer)) => drop(reply.send(answer)),
            (Some(AnyReply::Read(reply)), Answer::Read(answer)) => drop(reply.send(answer)),
            _ => {}
        }
    }
}

struct Driver {
    member: Member<Folder>,
    inbox: Arc<Inbox>,
    status: watch::Sender<RaftStatus>,
    tick: Duration,
    most_ticks: u32,
    metrics: RaftMetrics,
    snapshots: mpsc::Sender<SnapshotWork>,
    outside: Outside,
}

impl Driver {
    fn run_to_end(&mut self) {
        // A panic of raft-rs or of the state machine ends this member, not the process: others see it stop.
        let why = match catch_unwind(AssertUnwindSafe(|| self.run())) {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(panic) => Some(format!("a defect: {}", panic_text(&*panic))),
        };
        if let Some(why) = &why {
            tracing::error!("the raft member stops: {why}");
        }
        self.status.send_modify(|status| {
            status.role = super::RaftRole::Follower;
            status.leader = None;
            status.failure.clone_from(&why);
        });
        self.inbox.end(why);
        self.outside.replies.clear();
    }

    fn run(&mut self) -> Result<(), RaftError> {
        let mut next_tick = Instant::now() + self.tick;
        // A group of one has something to do before anybody asks.
        self.member.turn(&mut self.outside)?;
        self.publish();
        loop {
            let Some(waiting) = self.inbox.take(next_tick, self.member.open_proposals()) else { return Ok(()) };
            let began = Instant::now();
            self.feed(waiting)?;
            let mut ticked = 0;
            while Instant::now() >= next_tick {
                self.member.tick(&mut self.outside)?;
                next_tick += self.tick;
                ticked += 1;
                if ticked >= self.most_ticks {
                    // Time that was slept through (a stopped process, a slow disk) is not made up for: peers' messages of that
                    // time are still to come, and without them this would look like a leader's silence.
                    next_tick = next_tick.max(Instant::now() + self.tick);
                }
            }
            if ticked > 0 {
                let replies = &mut self.outside.replies;
                replies.retain(|_, reply| !matches!(reply, AnyReply::Read(reply) if reply.is_closed()));
                let replies = &self.outside.replies;
                self.member.forget_reads(|id| !replies.contains_key(&id));
            }
            self.member.turn(&mut self.outside)?;
            if let Some(work) = self.member.take_snapshot_work() {
                // Its thread ends after this one.
                drop(self.snapshots.send(work));
            }
            self.publish();
            self.metrics.turn_s.observe(began.elapsed().as_secs_f64());
        }
    }

    fn feed(&mut self, waiting: Waiting) -> Result<(), RaftError> {
        let outside = &mut self.outside;
        let mut bytes = 0;
        for message in waiting.messages {
            bytes += message.entries.iter().map(|entry| entry.data.len()).sum::<usize>();
            self.member.receive(message, outside)?;
            if bytes >= TURN_BYTES {
                self.member.turn(outside)?;
                bytes = 0;
            }
        }
        for arrived in waiting.snapshots {
            self.member.receive_snapshot(arrived.message, outside)?;
            drop(arrived.done.send(Ok(())));
        }
        match waiting.made_snapshot {
            Some(Ok(made)) => self.member.snapshot_made(made),
            Some(Err(why)) => {
                let index = self.member.status().applied_index;
                return Err(RaftError::Snapshot { index, why: format!("a defect in its making: {why}") });
            }
            None => {}
        }
        for (to, is_ok) in waiting.sent_snapshots {
            self.member.report_snapshot(to, is_ok);
        }
        for id in waiting.unreachable {
            self.member.report_unreachable(id);
        }
        for (change, reply) in waiting.changes {
            let id = outside.keep(AnyReply::Changed(reply));
            self.member.change(id, change, outside);
        }
        for (to, reply) in waiting.transfers {
            let id = outside.keep(AnyReply::Changed(reply));
            self.member.transfer(id, to, outside);
        }
        let reads = waiting.reads.into_iter().map(|reply| outside.keep(AnyReply::Read(reply))).collect();
        self.member.read(reads);
        let mut proposals = Vec::new();
        let mut bytes = 0;
        for (data, reply) in waiting.proposals {
            // Its asker has given up before it was taken: nothing of it need happen.
            if reply.is_closed() {
                continue;
            }
            bytes += data.len();
            proposals.push((outside.keep(AnyReply::Proposed(reply)), data));
            if bytes >= TURN_BYTES {
                self.member.propose(std::mem::take(&mut proposals), outside);
                self.member.turn(outside)?;
                bytes = 0;
            }
        }
        if !proposals.is_empty() {
            self.member.propose(proposals, outside);
        }
        Ok(())
    }

    fn publish(&self) {
        let status = self.member.status();
        self.status.send_if_modified(|old| {
            let is_changed = *old != status;
            if is_changed {
                *old = status;
            }
            is_changed
        });
    }
}
