//! The gateway's session with the leader: heartbeats, use of keys, shares. A shell around [`SessionCore`], which says when to
//! connect and when to send.
//!
//! Invariant: use of keys is taken from the books only where there is room to send it; without a session everything goes on
//! with what was granted last.

use std::time::Duration;

use forge_cluster::api::{ClusterError, Session};
use forge_cluster::session::{SessionAction, SessionCore, SessionInput};
use forge_shared::cluster::session::{NodeDown, NodeUp};
use futures::future::{BoxFuture, FutureExt, OptionFuture};
use tokio::sync::watch;
use tokio::time::Instant;

use super::MemberParts;
use super::roster::{Serves, load};
use crate::gateway::Gateway;

/// For a connection and its hello.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

struct Shell {
    parts: MemberParts,
    gateway: Gateway,
    /// What the other task publishes.
    serves: watch::Receiver<Serves>,
    link: Option<Session>,
    connecting: Option<BoxFuture<'static, Result<Session, ClusterError>>>,
}

/// Keeps a session for ever; ends where the coordinators refuse this gateway for good, and says so.
pub(super) async fn keep(parts: MemberParts, gateway: Gateway, serves: watch::Receiver<Serves>, refused: watch::Sender<Option<String>>) {
    let begun = Instant::now();
    let now_ms = || u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    let jitter = parts.spec.id.0.bytes().fold(17_u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(byte)));
    let mut core = SessionCore::serving_on(jitter);
    let mut shell = Shell { parts, gateway, serves, link: None, connecting: None };
    loop {
        // Rounded up: a tick before its time would find nothing to do.
        let wait = Duration::from_millis(core.next_tick_ms().saturating_sub(now_ms()).saturating_add(1)).min(CONNECT_TIMEOUT);
        let input = tokio::select! {
            biased;
            () = tokio::time::sleep(wait) => Some(SessionInput::Tick),
            Some(connected) = OptionFuture::from(shell.connecting.as_mut()) => Some(shell.connected(connected)),
            Some(message) = OptionFuture::from(shell.link.as_mut().map(|link| link.down.recv())) => shell.heard(message),
        };
        let Some(input) = input else { continue };
        let was_welcome = core.is_welcome();
        for action in core.handle(now_ms(), input) {
            if let SessionAction::End { reason } = action {
                tracing::error!(reason, "the coordinators refuse this gateway");
                refused.send_replace(Some(reason));
                return;
            }
            shell.act(action);
        }
        match (was_welcome, core.is_welcome()) {
            (false, true) => tracing::info!("session with the coordinators begun"),
            (true, false) => tracing::warn!("the session with the leader is lost; serving goes on with what is known"),
            _ => {}
        }
    }
}

impl Shell {
    fn connected(&mut self, connected: Result<Session, ClusterError>) -> SessionInput {
        self.connecting = None;
        match connected {
            Ok(session) => {
                self.link = Some(session);
                SessionInput::Connected(true)
            }
            Err(error) => {
                tracing::warn!(%error, "no session with the coordinators; serving goes on with what is known");
                SessionInput::Connected(false)
            }
        }
    }

    fn heard(&mut self, message: Option<NodeDown>) -> Option<SessionInput> {
        match message {
            Some(NodeDown::Welcome { lease_ms, heartbeat_ms }) => Some(SessionInput::Welcome { lease_ms, heartbeat_ms }),
            Some(NodeDown::Refused { reason }) => Some(SessionInput::Refused { reason }),
            Some(NodeDown::Ack { number, lease_ms, shares }) => {
                self.parts.shares.grant(shares);
                Some(SessionInput::Ack { number, lease_ms })
            }
            // For workers.
            Some(NodeDown::Assignments { .. } | NodeDown::Inspect { .. }) => None,
            Some(NodeDown::Moved { leader }) => {
                tracing::info!(?leader, "the leader moved");
                self.link = None;
                Some(SessionInput::Closed)
            }
            None => {
                self.link = None;
                Some(SessionInput::Closed)
            }
        }
    }

    fn act(&mut self, action: SessionAction) {
        match action {
            SessionAction::Connect => {
                let (api, spec) = (self.parts.api.clone(), self.parts.spec.clone());
                self.connecting = Some(async move { api.session(spec, CONNECT_TIMEOUT).await }.boxed());
            }
            SessionAction::Disconnect => (self.link, self.connecting) = (None, None),
            SessionAction::Heartbeat(number) => {
                // One that does not fit is not heard in time anyway.
                let Some(room) = self.link.as_ref().and_then(|link| link.up.try_reserve().ok()) else { return };
                let usage = self.parts.shares.take_usage(&self.parts.keys.limited());
                let load = load(self.serves.borrow().clone(), self.gateway.in_flight() as u64, forge_cluster::resident_bytes());
                room.send(NodeUp::Heartbeat { number, load, usage });
            }
            // A gateway serves on without a lease; its core asks for none of these, and the end is its caller's.
            SessionAction::AskGroup | SessionAction::Expire | SessionAction::End { .. } => {}
        }
    }
}
