//! Sessions of nodes at a coordinator: what arrives goes to `Leading`, what it says goes back.

use forge_coordinator::CoordinatorError;
use forge_coordinator::reports::{Reports, is_proposed_again};
use forge_coordinator::sessions::Handle;
use forge_shared::cluster::command::Command;
use forge_shared::cluster::node::NodeSpec;
use forge_shared::cluster::session::{NodeDown, NodeUp};
use tokio::sync::mpsc;

use super::leadership::PROPOSE_WITHIN_MS;
use super::{Coordinator, Process, Purpose, envelope};
use crate::host::Host;
use crate::message::{Message, StreamId, Timer};
use crate::world::World;

/// Messages that wait for a node: production's depth of a stream.
const DEPTH: usize = 64;
/// Between two tries at a report, milliseconds.
const REPORT_PAUSE_MS: u64 = 100;

/// One node's session.
pub struct NodeSession {
    spec: NodeSpec,
    /// Once its joining was applied.
    handle: Option<Handle>,
    down: mpsc::Sender<NodeDown>,
    sent: mpsc::Receiver<NodeDown>,
    reports: Reports,
    /// The report that is being proposed, under its request id, and until when an answer is waited for.
    reporting: Option<(String, Command, u64)>,
}

impl Coordinator {
    /// A node wants a session.
    pub(super) fn hello(&mut self, world: &mut World, stream: StreamId, spec: NodeSpec) {
        let (host, wall_ms) = (self.host, self.wall_ms(world));
        let Some(process) = &mut self.process else {
            return world.close(stream, host);
        };
        let Some(leader) = &process.leader else {
            let leader = process.address_of(process.member.core().leader());
            world.stream(stream, host, Message::NoSession { leader });
            return world.close(stream, host);
        };
        let request_id = leader.core.request_id("join");
        let (down, sent) = mpsc::channel(DEPTH);
        let join = Command::JoinNode { spec: Box::new(spec.clone()) };
        process.sessions.insert(stream, NodeSession { spec, handle: None, down, sent, reports: Reports::default(), reporting: None });
        self.step(world, |process, world, out| {
            process.propose(world, envelope(request_id, wall_ms, join), Purpose::Join { stream }, out);
            Ok(())
        });
    }

    /// A node says something.
    pub(super) fn up(&mut self, world: &mut World, stream: StreamId, message: NodeUp) {
        let (host, wall_ms) = (self.host, self.wall_ms(world));
        let Some(process) = &mut self.process else { return };
        let (Some(session), Some(leader)) = (process.sessions.get_mut(&stream), &process.leader) else { return };
        let Some(handle) = session.handle.clone().filter(|handle| !handle.is_over()) else { return };
        let heard = leader.core.hear(world.now_ms, &process.replicated.read(), (&handle, &session.spec), message, false);
        let mut ends = heard.ends;
        if let Some(answer) = heard.answer {
            ends |= session.down.try_send(answer).is_err();
        }
        let has_report = heard.report.is_some();
        if let Some(report) = heard.report {
            ends |= session.reports.put(*report).is_err();
        }
        let purpose = if ends { Purpose::Goodbye { stream } } else { Purpose::Nothing };
        match heard.propose {
            Some((what, command)) => {
                let request_id = leader.core.request_id(what);
                self.step(world, |process, world, out| {
                    process.propose(world, envelope(request_id, wall_ms, command), purpose, out);
                    Ok(())
                });
            }
            None if ends => process.end_session(world, host, stream),
            None => process.flush_one(world, host, stream),
        }
        if has_report {
            self.report(world, stream);
        }
    }

    /// Proposes the session's next report, or the one under way again.
    pub(super) fn report(&mut self, world: &mut World, stream: StreamId) {
        let (host, life, wall_ms) = (self.host, self.life, self.wall_ms(world));
        let Some(process) = &mut self.process else { return };
        let (Some(session), Some(leader)) = (process.sessions.get_mut(&stream), &process.leader) else { return };
        let command = match &mut session.reporting {
            Some((.., until_ms)) if world.now_ms < *until_ms => return,
            Some((id, command, until_ms)) => {
                *until_ms = world.now_ms + PROPOSE_WITHIN_MS;
                (id.clone(), command.clone())
            }
            none => {
                let Some(command) = session.reports.take(&session.spec) else { return };
                let id = leader.core.request_id("report");
                *none = Some((id.clone(), command.clone(), world.now_ms + PROPOSE_WITHIN_MS));
                (id, command)
            }
        };
        world.remind(host, life, PROPOSE_WITHIN_MS, Timer::Report(stream));
        self.step(world, |process, world, out| {
            process.propose(world, envelope(command.0, wall_ms, command.1), Purpose::Report { stream }, out);
            Ok(())
        });
    }

    /// The stream of a node is gone.
    pub(super) fn closed(&mut self, stream: StreamId) {
        let Some(process) = &mut self.process else { return };
        process.watches.end(stream);
        if let Some(session) = process.sessions.remove(&stream)
            && let (Some(handle), Some(leader)) = (&session.handle, &process.leader)
        {
            leader.core.forget(handle);
        }
    }

    /// Sends what lies in sessions' queues, and ends those that are over.
    pub(super) fn flush(&mut self, world: &mut World) {
        let host = self.host;
        let Some(process) = &mut self.process else { return };
        if std::mem::take(&mut process.is_stirred) {
            let all: Vec<StreamId> = process.sessions.keys().copied().collect();
            all.into_iter().for_each(|stream| process.flush_one(world, host, stream));
        }
        let has_leader = process.member.core().leader().is_some();
        process.watches.go_on(world, host, &process.replicated, has_leader);
    }
}

impl Process {
    /// A node's joining came to this.
    pub(super) fn joined(&mut self, world: &mut World, host: Host, stream: StreamId, joined: Result<(), CoordinatorError>) {
        let Some(session) = self.sessions.get_mut(&stream) else { return };
        match (joined, &mut self.leader) {
            (Ok(()), Some(leader)) => {
                // There is room: the queue is new.
                let _ = session.down.try_send(leader.core.welcome());
                session.handle = leader.core.begin(world.now_ms, &self.replicated.read(), &session.spec, session.down.clone());
                let is_taken = session.handle.is_some();
                world.say(host, format!("takes in {}", session.spec.id));
                if is_taken {
                    leader.is_woken = true;
                } else {
                    self.end_session(world, host, stream);
                }
            }
            (Err(CoordinatorError::Command(error)), _) => {
                world.say(host, format!("refuses {}: {error}", session.spec.id));
                let _ = session.down.try_send(NodeDown::Refused { reason: error.to_string() });
                self.end_session(world, host, stream);
            }
            (joined, _) => {
                let leader = match joined {
                    Err(CoordinatorError::NotLeader { leader }) => leader,
                    _ => None,
                };
                world.stream(stream, host, Message::NoSession { leader });
                self.end_session(world, host, stream);
            }
        }
    }

    /// A report came to this.
    pub(super) fn reported(&mut self, world: &mut World, host: Host, stream: StreamId, done: Result<(), CoordinatorError>) {
        let _ = host;
        let Some(session) = self.sessions.get_mut(&stream) else { return };
        let is_over = session.handle.as_ref().is_none_or(Handle::is_over);
        let is_again = done.err().is_some_and(|error| is_proposed_again(&error, is_over));
        match &mut session.reporting {
            Some((.., until_ms)) if is_again => *until_ms = world.now_ms + REPORT_PAUSE_MS,
            reporting => *reporting = None,
        }
        self.due_reports.push((stream, if is_again { REPORT_PAUSE_MS } else { 0 }));
    }

    /// Sends what lies in a session's queue; ends it where it is over.
    pub(super) fn flush_one(&mut self, world: &mut World, host: Host, stream: StreamId) {
        let Some(session) = self.sessions.get_mut(&stream) else { return };
        if session.handle.as_ref().is_some_and(Handle::is_over) {
            return self.end_session(world, host, stream);
        }
        while let Ok(message) = session.sent.try_recv() {
            world.stream(stream, host, Message::Down(message));
        }
    }

    /// Ends a session from this side.
    pub(super) fn end_session(&mut self, world: &mut World, host: Host, stream: StreamId) {
        let Some(mut session) = self.sessions.remove(&stream) else { return };
        let mut last = String::new();
        while let Ok(message) = session.sent.try_recv() {
            last = word(&message);
            world.stream(stream, host, Message::Down(message));
        }
        world.say(host, format!("ends the session of {}{last}", session.spec.id));
        if let (Some(handle), Some(leader)) = (&session.handle, &self.leader) {
            leader.core.forget(handle);
        }
        world.close(stream, host);
    }
}

/// A node's last message in a few words.
fn word(message: &NodeDown) -> String {
    match message {
        NodeDown::Moved { leader } => format!(": moved to {leader:?}"),
        NodeDown::Refused { reason } => format!(": {reason}"),
        _ => String::new(),
    }
}
