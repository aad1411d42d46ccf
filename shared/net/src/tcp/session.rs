//! Whether a node lives: pings over a connection of their own, and what must go ahead of bulk.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use forge_shared::ids::{Epoch, NodeId};
use parking_lot::Mutex;

use super::TcpDriver;
use super::pipe::Pipe;
use crate::frame::{Frame, Head, Kind};
use crate::hello::Hello;
use crate::stream::{Failure, Inbox};
use crate::tls::PeerVerifier;
use crate::transport::{Carrier, Events, keep_alive};

/// One look at the connection.
const LOOK: Duration = Duration::from_millis(100);

pub(crate) struct Session {
    node: NodeId,
    control: Arc<Pipe>,
    inbox: Arc<Inbox>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    lost: Option<String>,
    streams: Vec<(Weak<Inbox>, Weak<Pipe>)>,
}

impl Session {
    pub(super) fn new(node: NodeId, control: Arc<Pipe>, inbox: Arc<Inbox>) -> Arc<Self> {
        Arc::new(Session { node, control, inbox, state: Mutex::default() })
    }

    pub(crate) fn node(&self) -> &NodeId {
        &self.node
    }

    /// Whom the certificate of its connection names, if that is believed.
    pub(super) fn peer(&self, verifier: &dyn PeerVerifier) -> Result<NodeId, String> {
        self.control.peer(verifier)
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.state.lock().lost.is_some()
    }

    /// A stream with this node, which fails with the session.
    pub(super) fn add(&self, inbox: &Arc<Inbox>, pipe: &Arc<Pipe>) {
        let mut state = self.state.lock();
        state.streams.retain(|(inbox, _)| inbox.strong_count() > 0);
        state.streams.push((Arc::downgrade(inbox), Arc::downgrade(pipe)));
        if let Some(reason) = &state.lost {
            inbox.fail(Failure::Lost(reason.clone()));
        }
    }

    /// Ends it from this side.
    pub(super) fn end(&self, reason: &str) {
        let streams = {
            let mut state = self.state.lock();
            if state.lost.is_some() {
                return;
            }
            state.lost = Some(reason.to_owned());
            std::mem::take(&mut state.streams)
        };
        for (inbox, pipe) in streams {
            if let Some(inbox) = inbox.upgrade() {
                inbox.fail(Failure::Lost(reason.to_owned()));
            }
            if let Some(pipe) = pipe.upgrade() {
                pipe.close();
            }
        }
        self.control.close();
    }

    /// Sends one small frame and waits for little.
    pub(crate) fn tell(&self, epoch: Epoch, head: Head, body: &[u8]) {
        let body = [epoch.0.to_le_bytes().as_slice(), body].concat();
        // The peer's own deadline replaces what does not get through.
        let _ = self.control.write(head, &body, Instant::now() + LOOK);
    }

    /// Pings and listens until the peer is silent for too long.
    pub(super) fn run(self: &Arc<Self>, driver: &Arc<TcpDriver>, events: &dyn Events) {
        events.connected(Carrier::Tcp(Arc::clone(self)));
        let mut heard = Instant::now();
        let mut pinged: Option<Instant> = None;
        let reason = loop {
            if let Some(reason) = self.state.lock().lost.clone() {
                break reason;
            }
            if pinged.is_none_or(|pinged| pinged.elapsed() >= keep_alive(driver.silence)) {
                // A ping that cannot be sent shows in what does not come back.
                let _ = self.control.write(Head::bytes(Kind::Ping), &[], Instant::now() + LOOK);
                pinged = Some(Instant::now());
            }
            match self.control.read_into(&self.inbox, LOOK) {
                Ok(true) => {}
                Ok(false) => break "the peer has closed the connection".to_owned(),
                Err(error) => break error.to_string(),
            }
            while let Some(Ok((frame, _))) = self.inbox.take() {
                heard = Instant::now();
                self.hear(&frame, events);
            }
            if heard.elapsed() > driver.silence {
                break "timed out".to_owned();
            }
            if driver.is_stopped() {
                break "the process ends".to_owned();
            }
        };
        self.end(&reason);
        events.lost(&Carrier::Tcp(Arc::clone(self)), &reason);
    }

    fn hear(&self, frame: &Frame, events: &dyn Events) {
        if frame.head.kind != Kind::Abort {
            return;
        }
        if let Some((epoch, body)) = frame.body.split_first_chunk::<8>()
            && let Ok(notice) = Hello::decode(Epoch(u64::from_le_bytes(*epoch)), body)
        {
            events.told(&self.node, &notice);
        }
    }
}
