//! A simulated coordinator: production's raft member, state machine and leader, with the world for a shell.
//!
//! What it is not: it decides nothing. It hands events to the cores and carries out what they say, as `raft::node`, `leader`
//! and `session` do in production.

mod leadership;
mod nodes;
mod watches;

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use forge_coordinator::raft::convert;
use forge_coordinator::raft::log::MemoryDisk;
use forge_coordinator::raft::member::{self, Member, RequestId, Sink};
use forge_coordinator::raft::snapshot::SnapshotWork;
use forge_coordinator::raft::{RaftError, RaftOptions};
use forge_coordinator::replicated::{Replicated, decode_reply, encode_envelope};
use forge_coordinator::state::ClusterState;
use forge_proto::raft as wire;
use forge_shared::cluster::command::{Command, Envelope};
use forge_shared::cluster::event::{Kind, Object};
use forge_shared::version::Build;
use prost::Message as _;

use crate::host::Host;
use crate::ledger::{SharedLedger, Watched};
use crate::message::{Answer, Ask, CallId, Event, Message, StreamId, Timer};
use crate::random::Random;
use crate::streams::Wire;
use crate::world::World;
use leadership::Leader;
use nodes::NodeSession;
use watches::Watches;

/// Raft's unit of time, milliseconds.
const TICK_MS: u64 = 50;
/// The wall clocks at the beginning, milliseconds since 1970.
const WALL_MS: u64 = 1_800_000_000_000;
/// The cluster's name.
pub const CLUSTER: &str = "sim";

/// What a request of the member was for.
#[derive(Debug)]
enum Purpose {
    /// The new leader waits until everything of earlier terms is applied here.
    Lead { term: u64 },
    /// One of the leader's own, of a pass.
    Pass,
    /// A node joins by this stream.
    Join { stream: StreamId },
    /// A node's report.
    Report { stream: StreamId },
    /// A node says good-bye: its session ends.
    Goodbye { stream: StreamId },
    /// Nobody waits.
    Nothing,
    /// A client waits.
    Call { from: Host, call: CallId },
}

/// A running process.
struct Process {
    member: Member<MemoryDisk>,
    replicated: Arc<Replicated>,
    /// A snapshot that is being written.
    work: Option<SnapshotWork>,
    requests: BTreeMap<RequestId, Purpose>,
    /// The term that it waits to lead in.
    awaited_term: Option<u64>,
    leader: Option<Leader>,
    sessions: BTreeMap<StreamId, NodeSession>,
    watches: Watches,
    /// Any session may have something to send, or may be over.
    is_stirred: bool,
    /// Sessions whose next report is due after so many milliseconds.
    due_reports: Vec<(StreamId, u64)>,
    known_term: u64,
}

/// See the module.
pub struct Coordinator {
    /// Which.
    pub host: Host,
    id: u16,
    /// Its disk, which outlives its processes.
    pub disk: MemoryDisk,
    /// Which process of it this is.
    pub life: u64,
    /// How far its wall clock is off, milliseconds.
    pub clock_off_ms: i64,
    /// Does not come back by itself.
    pub is_held_down: bool,
    voters: Vec<u64>,
    random: Random,
    ledger: SharedLedger,
    process: Option<Process>,
    /// The newest term that it has spoken in.
    spoken_term: u64,
}

#[derive(Default)]
struct Out {
    messages: Vec<(wire::Message, Option<Bytes>)>,
    answers: Vec<(RequestId, member::Answer)>,
}

impl Sink for Out {
    fn send(&mut self, messages: Vec<wire::Message>) {
        self.messages.extend(messages.into_iter().map(|message| (message, None)));
    }

    fn send_snapshot(&mut self, _: u64, message: wire::Message, data: Bytes) {
        self.messages.push((message, Some(data)));
    }

    fn answer(&mut self, id: RequestId, answer: member::Answer) {
        self.answers.push((id, answer));
    }
}

impl Coordinator {
    /// One of `voters`, not started.
    pub fn new(id: u16, voters: &[u64], seed: u64, ledger: SharedLedger) -> Self {
        Coordinator {
            host: Host::Coordinator(id),
            id,
            disk: MemoryDisk::new(),
            life: 0,
            clock_off_ms: 0,
            is_held_down: false,
            voters: voters.to_vec(),
            random: Random::new(seed, 100 + u64::from(id)),
            ledger,
            process: None,
            spoken_term: 0,
        }
    }

    fn options(&mut self) -> RaftOptions {
        let mut options = RaftOptions::new(u64::from(self.id), CLUSTER, "unused");
        options.bootstrap = Some(self.voters.clone());
        options.limits.snapshot_entries = 60;
        options.limits.trailing_entries = 15;
        options.limits.segment_bytes = 8_192;
        options
    }

    /// Starts a process on what the disk holds.
    pub fn start(&mut self, world: &mut World) {
        if self.process.is_some() || self.is_held_down {
            return;
        }
        self.life = world.number();
        let replicated = Replicated::new(ClusterState::new(CLUSTER), Build::default());
        let machine = Box::new(Watched::new(self.id, replicated.clone(), self.ledger.clone()));
        let seed = self.random.number();
        match Member::open(self.options(), seed, self.disk.clone(), machine) {
            Ok(member) => {
                let term = member.core().term();
                if term < self.spoken_term {
                    let seen = format!("{} spoke in term {}, and starts in term {term}: it may vote again", self.host, self.spoken_term);
                    world.violate("a member remembers the terms that it spoke in", seen);
                }
                self.process = Some(Process {
                    member,
                    replicated,
                    work: None,
                    requests: BTreeMap::new(),
                    awaited_term: None,
                    leader: None,
                    sessions: BTreeMap::new(),
                    watches: Watches::default(),
                    is_stirred: false,
                    due_reports: Vec::new(),
                    known_term: 0,
                });
                world.say(self.host, "starts");
                world.remind(self.host, self.life, 1 + self.random.below(TICK_MS), Timer::Tick);
            }
            Err(error) => {
                let is_full = matches!(&error, RaftError::Log(error) if error.is_full());
                if self.disk.is_crashed() || is_full {
                    world.say(self.host, format!("does not start: {error}"));
                    self.recover(world);
                } else {
                    world.violate("a coordinator starts on what it wrote", format!("{}: {error}", self.host));
                }
            }
        }
    }

    /// The process is gone; another comes later.
    fn recover(&mut self, world: &mut World) {
        self.process = None;
        self.disk.crash();
        self.disk.restart(self.random.number());
        world.died(self.host);
        self.life = world.number();
        let after_ms = self.random.between(50, 1_500);
        world.remind(self.host, self.life, after_ms, Timer::Restart);
    }

    /// The process is killed; another starts after a while, or by [`Coordinator::start`] where it is held down.
    pub fn kill(&mut self, world: &mut World) {
        if self.process.is_some() {
            world.say(self.host, "is killed");
            self.recover(world);
        }
    }

    /// Whether a process of it runs.
    pub fn is_up(&self) -> bool {
        self.process.is_some()
    }

    /// Whether it leads and decides.
    pub fn leads(&self) -> bool {
        self.process.as_ref().is_some_and(|process| process.leader.is_some())
    }

    /// The term that it leads in, as raft sees it.
    pub fn led_term(&self) -> Option<u64> {
        let core = self.process.as_ref()?.member.core();
        core.is_leader().then(|| core.term())
    }

    /// What it has applied.
    pub fn applied_index(&self) -> Option<u64> {
        self.process.as_ref().map(|process| process.member.status().applied_index)
    }

    /// Its state, if it runs.
    pub fn replicated(&self) -> Option<&Arc<Replicated>> {
        self.process.as_ref().map(|process| &process.replicated)
    }

    fn wall_ms(&self, world: &World) -> u64 {
        (WALL_MS + world.now_ms).saturating_add_signed(self.clock_off_ms)
    }

    /// Something happens here.
    pub fn handle(&mut self, world: &mut World, event: Event) {
        match event {
            Event::Timer { timer: Timer::Restart, .. } => self.start(world),
            Event::Timer { timer, .. } => self.timer(world, timer),
            Event::Arrives { from, message, stream, .. } => self.arrives(world, from, stream, message),
            Event::Closed { stream, .. } => self.closed(stream),
            Event::FaultBegins(_) | Event::FaultEnds(_) => {}
        }
    }

    fn timer(&mut self, world: &mut World, timer: Timer) {
        match timer {
            Timer::Tick => {
                world.remind(self.host, self.life, TICK_MS, Timer::Tick);
                self.step(world, |process, _, out| process.member.tick(out));
            }
            Timer::SnapshotMade => self.step(world, |process, _, _| {
                if let Some(work) = process.work.take() {
                    process.member.snapshot_made(work.run());
                }
                Ok(())
            }),
            Timer::Pass => self.pass(world),
            Timer::Report(stream) => self.report(world, stream),
            _ => {}
        }
    }

    fn arrives(&mut self, world: &mut World, from: Host, stream: Option<StreamId>, message: Message) {
        match (message, stream) {
            (Message::Raft { bytes, snapshot }, _) => self.take_raft(world, from, &bytes, snapshot),
            (Message::SnapshotSent { to, is_ok }, _) => self.step(world, |process, _, _| {
                process.member.report_snapshot(u64::from(to), is_ok);
                Ok(())
            }),
            (Message::Ask { call, ask }, _) => self.ask(world, from, call, ask),
            (Message::Hello { spec }, Some(stream)) => self.hello(world, stream, *spec),
            (Message::Up(up), Some(stream)) => self.up(world, stream, up),
            (Message::Watch { after }, Some(stream)) => match &mut self.process {
                Some(process) => {
                    process.watches.begin(world.now_ms, &process.replicated, stream, after);
                    self.flush(world);
                }
                None => world.close(stream, self.host),
            },
            (Message::Wire(_), Some(stream)) if self.process.is_some() => {
                world.stream(stream, self.host, Message::Wire(Box::new(Wire::Pong)));
            }
            _ => {}
        }
    }

    fn take_raft(&mut self, world: &mut World, from: Host, bytes: &[u8], snapshot: Option<Bytes>) {
        let to = u64::from(self.id);
        let Ok(message) = wire::Message::decode(bytes) else {
            return world.violate("members send what members take", format!("{} cannot decode a message of {from}", self.host));
        };
        let is_snapshot = snapshot.is_some();
        let converted = match snapshot {
            None => convert::message_in(message, to),
            Some(data) => convert::snapshot_in(message, data, to),
        };
        match converted {
            Err(error) => world.violate("members send what members take", format!("{} refuses a message of {from}: {error}", self.host)),
            Ok(message) if is_snapshot => {
                let is_taken = self.process.is_some();
                self.step(world, |process, _, out| process.member.receive_snapshot(message, out));
                let told = Message::SnapshotSent { to: self.id, is_ok: is_taken };
                world.send(self.host, from, told);
            }
            Ok(message) => self.step(world, |process, _, out| process.member.receive(message, out)),
        }
    }

    fn ask(&mut self, world: &mut World, from: Host, call: CallId, ask: Ask) {
        let host = self.host;
        if self.process.is_none() {
            // Its machine answers that nobody listens.
            world.send(host, from, Message::Answer { call, answer: Answer::Failed { leader: None, is_open: false } });
            return;
        }
        let wall_ms = self.wall_ms(world);
        self.step(world, |process, world, out| {
            match ask {
                Ask::Execute { request_id, command } => {
                    let data = envelope(request_id, wall_ms, *command);
                    process.propose(world, data, Purpose::Call { from, call }, out);
                }
                Ask::Read => {
                    let id = world.number();
                    process.requests.insert(id, Purpose::Call { from, call });
                    process.member.read(vec![id]);
                }
                Ask::Status => {
                    let answer = Answer::Status { has_leader: process.member.status().leader.is_some() };
                    world.send(host, from, Message::Answer { call, answer });
                }
            }
            Ok(())
        });
    }

    /// Gives the process an input, and carries out all that follows.
    fn step(&mut self, world: &mut World, act: impl FnOnce(&mut Process, &mut World, &mut Out) -> Result<(), RaftError>) {
        let Some(process) = &mut self.process else { return };
        let mut out = Out::default();
        let mut done = act(process, world, &mut out);
        loop {
            done = done.and_then(|()| process.member.turn(&mut out));
            for (message, snapshot) in out.messages.drain(..) {
                if !is_of_no_term(message.kind) {
                    self.spoken_term = self.spoken_term.max(message.term);
                }
                post(world, self.host, process, message, snapshot);
            }
            if done.is_err() || out.answers.is_empty() {
                break;
            }
            for (id, answer) in std::mem::take(&mut out.answers) {
                process.answered(world, self.host, id, answer, &mut out);
            }
        }
        if let Err(error) = done {
            if self.disk.is_crashed() {
                *world.faults.entry("crash in an fsync").or_default() += 1;
                world.say(self.host, "dies in an fsync");
            } else {
                world.violate("a member stops only with its disk", format!("{}: {error}", self.host));
            }
            return self.recover(world);
        }
        if process.work.is_none()
            && let Some(work) = process.member.take_snapshot_work()
        {
            process.work = Some(work);
            let after_ms = self.random.between(1, 80);
            world.remind(self.host, self.life, after_ms, Timer::SnapshotMade);
        }
        for (stream, after_ms) in std::mem::take(&mut process.due_reports) {
            world.remind(self.host, self.life, after_ms, Timer::Report(stream));
        }
        self.follow(world);
        self.flush(world);
    }
}

fn envelope(request_id: String, proposed_ms: u64, command: Command) -> Bytes {
    let envelope = Envelope { request_id, proposed_ms, traceparent: String::new(), command };
    encode_envelope(&envelope).unwrap_or_default()
}

/// Whether a kind of message speaks for a term that may never come.
fn is_of_no_term(kind: u32) -> bool {
    const PRE_VOTE: u32 = 17;
    const PRE_VOTE_ANSWER: u32 = 18;
    matches!(kind, PRE_VOTE | PRE_VOTE_ANSWER)
}

fn post(world: &mut World, host: Host, process: &mut Process, message: wire::Message, snapshot: Option<Bytes>) {
    let to = message.to;
    let is_snapshot = snapshot.is_some();
    let message = Message::Raft { bytes: message.encode_to_vec().into(), snapshot };
    let is_lost = !world.send(host, Host::Coordinator(to as u16), message);
    if is_snapshot && is_lost {
        process.member.report_snapshot(to, false);
    }
}

impl Process {
    fn propose(&mut self, world: &mut World, data: Bytes, purpose: Purpose, out: &mut Out) -> RequestId {
        let id = world.number();
        self.requests.insert(id, purpose);
        self.member.propose(vec![(id, data)], out);
        id
    }

    fn address_of(&self, leader: Option<u64>) -> Option<String> {
        let state = self.replicated.read();
        leader.and_then(|id| state.members().get(&id).map(|member| member.address.clone()))
    }

    fn failed(&self, error: &RaftError) -> Answer {
        match error {
            RaftError::NotLeader { leader } => Answer::Failed { leader: self.address_of(*leader), is_open: false },
            RaftError::Unknown { .. } | RaftError::Timeout { .. } => Answer::Failed { leader: None, is_open: true },
            _ => Answer::Failed { leader: None, is_open: false },
        }
    }

    fn answered(&mut self, world: &mut World, host: Host, id: RequestId, answer: member::Answer, out: &mut Out) {
        let Some(purpose) = self.requests.remove(&id) else {
            return world.violate("a request is answered once", format!("{host} answered request {id} again"));
        };
        match (purpose, answer) {
            (Purpose::Call { from, call }, member::Answer::Proposed(Ok(proposed))) => match decode_reply(&proposed.reply) {
                Ok(reply) => drop(world.send(host, from, Message::Answer { call, answer: Answer::Executed(reply) })),
                Err(error) => world.violate("replies can be read", error.to_string()),
            },
            (Purpose::Call { from, call }, member::Answer::Read(Ok(_))) => {
                let state = self.replicated.read();
                let name = |object| match object {
                    Object::Key(key) => Some(key.name),
                    _ => None,
                };
                let keys = state.objects(Kind::Key).into_iter().filter_map(name).collect();
                let answer = Answer::Read { revision: state.revision(), keys };
                world.send(host, from, Message::Answer { call, answer });
            }
            (Purpose::Call { from, call }, member::Answer::Proposed(Err(error)) | member::Answer::Read(Err(error))) => {
                let answer = self.failed(&error);
                world.send(host, from, Message::Answer { call, answer });
            }
            (purpose, answer) => self.answered_leader(world, host, (id, purpose), answer, out),
        }
    }
}
