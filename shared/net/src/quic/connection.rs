//! One connection: its protocol state, its streams, and what a change of it means to the layer above.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use forge_shared::ids::NodeId;
use parking_lot::{Condvar, Mutex};
use quinn_proto::{
    ConnectionError, ConnectionHandle, Dir, Event, ReadError, ReadableError, StreamEvent, StreamId, TransportErrorCode, VarInt, WriteError,
};
use rustls::pki_types::CertificateDer;

use super::driver::Driver;
use super::wire::Urgency;
use crate::frame::{Frame, FrameReader};
use crate::stream::{Failure, Inbox};
use crate::tls::node_of_chain;
use crate::transport::Lost;

/// Code of a connection or stream that is closed because what the peer shows or says is refused.
const REFUSED: VarInt = VarInt::from_u32(1);
/// Code of one that is no longer needed.
const DONE: VarInt = VarInt::from_u32(0);
/// Code of a stream whose group was aborted: a notice, which is told first, says why.
pub(super) const ABORTED: VarInt = VarInt::from_u32(2);
/// Notices that wait for room in a connection; the oldest makes room.
const MAX_UNTOLD: usize = 4096;

/// One connection.
pub(crate) struct Connection {
    pub(super) handle: ConnectionHandle,
    pub(super) state: Mutex<State>,
    changed: Condvar,
    /// Counts what writers and dialers wait for.
    progress: AtomicU64,
    /// When its timers are due, in the driver's microseconds.
    pub(super) due_us: AtomicU64,
}

pub(super) struct State {
    pub(super) proto: quinn_proto::Connection,
    streams: HashMap<StreamId, Entry>,
    /// The node that must answer, where this process dialed.
    expected: Option<NodeId>,
    peer: Option<NodeId>,
    lost: Option<Lost>,
    /// What the peer must hear as soon as there is room, oldest first.
    untold: VecDeque<Notice>,
    out: Vec<u8>,
}

/// A frame on its way, on a stream of its own.
struct Notice {
    stream: Option<StreamId>,
    rest: Vec<u8>,
}

struct Entry {
    inbox: Arc<Inbox>,
    stage: Stage,
}

/// How far a stream is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// A peer opened it and has not said what for.
    HelloDue,
    /// The layer above has not accepted it: nothing more is read.
    Waiting,
    /// It is read as far as there is room.
    Open,
}

/// What the layer above must hear, once the connection is unlocked.
pub(super) enum Effect {
    Connected,
    Opened { node: NodeId, id: StreamId, inbox: Arc<Inbox>, first: Frame },
    Lost(Lost),
}

impl Connection {
    pub(super) fn new(handle: ConnectionHandle, proto: quinn_proto::Connection, expected: Option<NodeId>) -> Arc<Self> {
        let state = State { proto, streams: HashMap::new(), expected, peer: None, lost: None, untold: VecDeque::new(), out: Vec::new() };
        Arc::new(Connection {
            handle,
            state: Mutex::new(state),
            changed: Condvar::new(),
            progress: AtomicU64::new(0),
            due_us: AtomicU64::new(u64::MAX),
        })
    }

    /// The node at the other end, once its certificate is known.
    pub(crate) fn peer(&self) -> Option<NodeId> {
        self.state.lock().peer.clone()
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.state.lock().lost.is_some()
    }

    pub(super) fn progress(&self) -> u64 {
        self.progress.load(Ordering::Acquire)
    }

    /// Sleeps until there is progress beyond `seen`, or `until`.
    pub(super) fn sleep(&self, seen: u64, until: Instant) {
        let mut state = self.state.lock();
        if self.progress() == seen {
            self.changed.wait_until(&mut state, until);
        }
    }

    pub(super) fn advance(&self) {
        self.progress.fetch_add(1, Ordering::AcqRel);
        self.changed.notify_all();
    }

    /// Carries out what the protocol wants after any change: events, datagrams, timers.
    pub(super) fn pump(&self, state: &mut State, driver: &Driver, effects: &mut Vec<Effect>) {
        let now = Instant::now();
        loop {
            while let Some(event) = state.proto.poll() {
                self.event(state, driver, event, effects);
            }
            state.tell();
            loop {
                state.out.clear();
                let train = driver.socket.train(state.proto.current_mtu());
                let Some(transmit) = state.proto.poll_transmit(now, train, &mut state.out) else { break };
                driver.socket.send(&transmit, &state.out);
            }
            let mut answered = false;
            while let Some(event) = state.proto.poll_endpoint_events() {
                if let Some(answer) = driver.endpoint_event(self.handle, event) {
                    state.proto.handle_event(answer);
                    answered = true;
                }
            }
            if !answered {
                break;
            }
        }
        driver.set_due(self, state.proto.poll_timeout());
    }

    fn event(&self, state: &mut State, driver: &Driver, event: Event, effects: &mut Vec<Effect>) {
        match event {
            Event::Connected => {
                match state.identify(driver) {
                    Ok(node) if driver.takes(self.handle, &node, state.expected.is_none()) => {
                        state.peer = Some(node);
                        effects.push(Effect::Connected);
                    }
                    Ok(node) => self.close(state, &format!("node {node} has too many connections open"), effects),
                    Err(reason) => self.close(state, &reason, effects),
                }
                self.advance();
            }
            Event::ConnectionLost { reason } => {
                let silent = match &reason {
                    ConnectionError::TimedOut | ConnectionError::Reset => true,
                    // It takes no more just now.
                    ConnectionError::ConnectionClosed(close) => close.error_code == TransportErrorCode::CONNECTION_REFUSED,
                    _ => false,
                };
                self.lose(state, Lost { reason: reason.to_string(), silent }, effects);
            }
            Event::Stream(StreamEvent::Opened { dir }) => {
                while let Some(id) = state.proto.streams().accept(dir) {
                    let inbox = Inbox::new(FrameReader::opened_by_peer());
                    state.streams.insert(id, Entry { inbox, stage: Stage::HelloDue });
                    state.read(id, effects);
                }
            }
            Event::Stream(StreamEvent::Readable { id }) => state.read(id, effects),
            Event::Stream(StreamEvent::Stopped { id, .. }) => {
                // The peer reads no more. What it wrote before still comes, but nobody waits for that on a stream that
                // was not accepted.
                if let Some(entry) = state.streams.get(&id).filter(|entry| entry.stage == Stage::Waiting) {
                    entry.inbox.fail(Failure::Left);
                }
                self.advance();
            }
            Event::Stream(_) => self.advance(),
            Event::HandshakeDataReady | Event::DatagramReceived | Event::DatagramsUnblocked => {}
        }
    }

    /// Ends the connection from this side.
    pub(super) fn close(&self, state: &mut State, reason: &str, effects: &mut Vec<Effect>) {
        state.proto.close(Instant::now(), REFUSED, reason.as_bytes().to_vec().into());
        self.lose(state, Lost { reason: reason.to_owned(), silent: false }, effects);
    }

    fn lose(&self, state: &mut State, lost: Lost, effects: &mut Vec<Effect>) {
        if state.lost.is_none() {
            for (_, entry) in state.streams.drain() {
                entry.inbox.fail(Failure::Lost(lost.reason.clone()));
            }
            state.untold.clear();
            state.lost = Some(lost.clone());
            effects.push(Effect::Lost(lost));
        }
        self.advance();
    }
}

impl State {
    /// Whom the peer's certificate names.
    pub(super) fn identify(&self, driver: &Driver) -> Result<NodeId, String> {
        let chain = self.proto.crypto_session().peer_identity();
        let chain = chain.as_ref().and_then(|chain| chain.downcast_ref::<Vec<CertificateDer<'static>>>());
        let node = node_of_chain(&*driver.verifier, chain.map(Vec::as_slice))?;
        match &self.expected {
            Some(expected) if *expected != node => Err(format!("node {node} answers where node {expected} was expected")),
            _ => Ok(node),
        }
    }

    /// Why it ended, if it has.
    pub(super) fn lost(&self) -> Option<&Lost> {
        self.lost.as_ref()
    }

    pub(super) fn is_connected(&self) -> bool {
        self.peer.is_some()
    }

    /// Opens a stream, whose frames from the peer go to `inbox`.
    pub(super) fn open(&mut self, dir: Dir, inbox: Option<Arc<Inbox>>) -> Option<StreamId> {
        let id = self.proto.streams().open(dir)?;
        if let Some(inbox) = inbox {
            self.streams.insert(id, Entry { inbox, stage: Stage::Open });
        }
        Some(id)
    }

    /// Notes what the peer must hear ahead of everything else.
    pub(super) fn notify(&mut self, bytes: Vec<u8>) {
        if self.lost.is_some() {
            return;
        }
        if self.untold.len() >= MAX_UNTOLD {
            self.untold.pop_front();
        }
        self.untold.push_back(Notice { stream: None, rest: bytes });
    }

    /// Writes notices as far as there is room.
    fn tell(&mut self) {
        while let Some(notice) = self.untold.front_mut() {
            let Some(id) = notice.stream.or_else(|| self.proto.streams().open(Dir::Uni)) else { return };
            let mut stream = self.proto.send_stream(id);
            if notice.stream.replace(id).is_none() {
                // Fails only for a stream that has ended.
                let _ = stream.set_priority(Urgency::Abort as i32);
            }
            match stream.write(&notice.rest) {
                Ok(written) if written < notice.rest.len() => {
                    notice.rest.drain(..written);
                    continue;
                }
                Err(WriteError::Blocked) => return,
                // Told, or of no interest to the peer.
                Ok(_) | Err(WriteError::Stopped(_) | WriteError::ClosedStream) => {}
            }
            let _ = stream.finish();
            self.untold.pop_front();
        }
    }

    /// The layer above wants what comes on a stream, and has room.
    pub(super) fn resume(&mut self, id: StreamId, effects: &mut Vec<Effect>) {
        if let Some(entry) = self.streams.get_mut(&id) {
            entry.stage = Stage::Open;
        }
        self.read(id, effects);
    }

    /// Reads what a stream has, as far as its inbox has room.
    pub(super) fn read(&mut self, id: StreamId, effects: &mut Vec<Effect>) {
        let Some(entry) = self.streams.get_mut(&id).filter(|entry| entry.stage != Stage::Waiting) else { return };
        let mut refused = false;
        let ended_early;
        {
            let mut stream = self.proto.recv_stream(id);
            let mut chunks = match stream.read(true) {
                Ok(chunks) => chunks,
                Err(ReadableError::ClosedStream | ReadableError::IllegalOrderedRead) => return,
            };
            while entry.stage == Stage::HelloDue || entry.inbox.has_room() {
                match chunks.next(usize::MAX) {
                    Ok(Some(chunk)) => {
                        if entry.inbox.push(&chunk.bytes).is_err() {
                            refused = true;
                            break;
                        }
                        if entry.stage == Stage::HelloDue
                            && let Some(Ok((first, _))) = entry.inbox.take()
                        {
                            entry.stage = Stage::Waiting;
                            if let Some(node) = &self.peer {
                                let inbox = Arc::clone(&entry.inbox);
                                effects.push(Effect::Opened { node: node.clone(), id, inbox, first });
                            }
                            break;
                        }
                    }
                    Ok(None) => {
                        entry.inbox.end();
                        break;
                    }
                    Err(ReadError::Blocked) => break,
                    // The notice fails it, with the reason.
                    Err(ReadError::Reset(ABORTED)) if entry.stage == Stage::Open => break,
                    Err(ReadError::Reset(_)) => {
                        entry.inbox.fail(Failure::Left);
                        break;
                    }
                }
            }
            // Nobody else knows of a stream that ends before it says what it is for.
            ended_early = entry.stage == Stage::HelloDue && entry.inbox.failure().is_some();
            // Credit goes out with the datagrams that follow.
            let _ = chunks.finalize();
        }
        if refused || ended_early {
            self.end(id, REFUSED);
        }
    }

    /// Ends both directions of a stream at once: what was not sent is given up, which makes room for others.
    pub(super) fn abort_stream(&mut self, id: StreamId) {
        self.end(id, ABORTED);
    }

    /// Ends both directions of a stream; what was written still goes out where all is well.
    pub(super) fn close_stream(&mut self, id: StreamId) {
        self.end(id, DONE);
    }

    fn end(&mut self, id: StreamId, code: VarInt) {
        if self.streams.remove(&id).is_none() || self.lost.is_some() {
            return;
        }
        // A direction that has ended already, or that a stream has not got, needs nothing.
        if id.dir() == Dir::Bi {
            let mut out = self.proto.send_stream(id);
            let _ = if code == DONE { out.finish().is_ok() } else { out.reset(code).is_ok() };
        }
        if id.dir() == Dir::Bi || id.initiator() != self.proto.side() {
            let _ = self.proto.recv_stream(id).stop(code);
        }
    }
}
