//! Where a request's events go: a bounded channel, and what did not fit in it.
//!
//! The engine never waits for a client. When the channel is full, events queue here in order and the request
//! is *stalled*: its sequences are not computed until the client has caught up. So at most one step's events
//! queue. A client that went away is noticed by [`Outlet::is_closed`].

use std::collections::VecDeque;

use forge_shared::generate::EngineEvent;
use tokio::sync::mpsc::Sender;
use tokio::sync::mpsc::error::TrySendError;

#[derive(Debug)]
pub(crate) struct Outlet {
    sender: Sender<EngineEvent>,
    pending: VecDeque<EngineEvent>,
}

impl Outlet {
    pub(crate) fn new(sender: Sender<EngineEvent>) -> Self {
        Outlet { sender, pending: VecDeque::new() }
    }

    /// Sends an event, or keeps it behind those that wait already.
    pub(crate) fn send(&mut self, event: EngineEvent) {
        self.pending.push_back(event);
        self.flush();
    }

    /// Sends what fits.
    pub(crate) fn flush(&mut self) {
        while let Some(event) = self.pending.pop_front() {
            match self.sender.try_send(event) {
                Ok(()) => {}
                Err(TrySendError::Full(event)) => {
                    self.pending.push_front(event);
                    return;
                }
                // Nobody listens: `is_closed` says so.
                Err(TrySendError::Closed(_)) => self.pending.clear(),
            }
        }
    }

    /// Whether events wait for room.
    pub(crate) fn is_stalled(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Whether the client went away.
    pub(crate) fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(reason: &str) -> EngineEvent {
        EngineEvent::Failed { reason: reason.into(), retryable: false }
    }

    #[test]
    fn events_keep_their_order_over_a_full_channel() {
        let (sender, mut receiver) = tokio::sync::mpsc::channel(2);
        let mut outlet = Outlet::new(sender);
        for reason in ["a", "b", "c", "d"] {
            outlet.send(failed(reason));
        }
        assert!(outlet.is_stalled());
        assert_eq!(receiver.try_recv().unwrap(), failed("a"));
        outlet.send(failed("e"));
        let mut rest = Vec::new();
        while let Ok(event) = receiver.try_recv() {
            rest.push(event);
            outlet.flush();
        }
        assert_eq!(rest, ["b", "c", "d", "e"].map(failed));
        assert!(!outlet.is_stalled() && !outlet.is_closed());
        drop(receiver);
        outlet.send(failed("f"));
        assert!(outlet.is_closed() && !outlet.is_stalled());
    }
}
