//! One node's session: begins with its joining, carries heartbeats and reports to the leader, ends with the lease, the
//! connection or the leadership.
//!
//! What it is not: it decides nothing; what follows from a message [`Leading::hear`] says.
//!
//! Invariants: a heartbeat never waits for a command; a node that says nothing for three leases has no session.

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use forge_cluster::api::{STREAM_DEPTH, Session};
use forge_shared::cluster::command::Command;
use forge_shared::cluster::node::{NodeSpec, Role};
use forge_shared::cluster::service::ReplicaReport;
use forge_shared::cluster::session::{NodeDown, NodeUp};
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};

use crate::coordinator::Coordinator;
use crate::error::CoordinatorError;
use crate::leading::Leading;
use crate::reports::{Reports, TooMany, is_proposed_again};
use crate::sessions::Handle;

/// For one try at a report.
const REPORT_WITHIN: Duration = Duration::from_secs(2);
/// Between two tries.
const REPORT_PAUSE: Duration = Duration::from_millis(100);

impl Coordinator {
    /// Begins a session. What refuses the node for good comes as the session's first and last message.
    pub(crate) async fn open_session(&self, hello: NodeSpec, timeout: Duration) -> Result<Session, CoordinatorError> {
        if !matches!(hello.role, Role::Worker | Role::Gateway) {
            return Err(CoordinatorError::message("spec.role", format!("{}: workers and gateways have sessions", hello.role)));
        }
        let leading = self.leading()?;
        let (up, received) = mpsc::channel(STREAM_DEPTH);
        let (down, down_received) = mpsc::channel(STREAM_DEPTH);
        let session = Session { up, down: down_received };

        let spec = self.0.replicated.read().known_spec(hello.clone());
        let join = Command::JoinNode { spec: Box::new(spec) };
        let submission = self.own(leading.request_id("join"), join);
        let first = match self.submit(submission, timeout).await {
            Ok(_) => leading.welcome(),
            Err(CoordinatorError::Command(error)) => {
                tracing::warn!(node = %hello.id, %error, "a node was refused");
                NodeDown::Refused { reason: error.to_string() }
            }
            Err(error) => return Err(error),
        };
        let is_welcome = matches!(first, NodeDown::Welcome { .. });
        // There is room: the channel is new.
        let _ = down.try_send(first);
        if !is_welcome {
            return Ok(session);
        }
        let handle = leading.begin(self.now_ms(), &self.0.replicated.read(), &hello, down.clone());
        let Some(handle) = handle else {
            return Err(CoordinatorError::Busy { reason: "this leader has as many sessions as it takes".into() });
        };
        if leading.ended.is_cancelled() {
            // The leadership went between the joining and here; nobody else would end this session.
            leading.sessions.end_all(self.leader_address());
        }
        leading.wake.notify_one();
        let running = Running { coordinator: self.clone(), leading, handle, spec: hello, down, reports: Arc::default() };
        self.0.tasks.spawn_on(running.run(received), &self.0.runtime);
        Ok(session)
    }
}

struct Running {
    coordinator: Coordinator,
    leading: Arc<Leading>,
    handle: Handle,
    spec: NodeSpec,
    down: mpsc::Sender<NodeDown>,
    reports: Arc<Waiting>,
}

/// Whether a session goes on after a message.
enum Then {
    GoesOn,
    Ends,
}

impl Running {
    async fn run(self, mut received: mpsc::Receiver<NodeUp>) {
        tracing::info!(node = %self.spec.id, role = %self.spec.role, incarnation = self.spec.incarnation.0, "a session began");
        let reporting = self.coordinator.0.tasks.spawn(report(
            self.coordinator.clone(),
            self.leading.clone(),
            self.handle.clone(),
            self.spec.clone(),
            self.reports.clone(),
        ));
        let silence = self.coordinator.0.options.lease * 3;
        loop {
            let message = tokio::select! {
                biased;
                () = self.handle.ended.cancelled() => break,
                () = self.leading.ended.cancelled() => {
                    // Where the session's end was told already, this one finds no reader.
                    let _ = self.down.try_send(NodeDown::Moved { leader: self.coordinator.leader_address() });
                    break;
                }
                () = self.coordinator.0.stop.cancelled() => break,
                message = tokio::time::timeout(silence, received.recv()) => message,
            };
            match message {
                Ok(Some(message)) => {
                    if let Then::Ends = self.take(message).await {
                        break;
                    }
                }
                Ok(None) => break,
                Err(_) => {
                    tracing::warn!(node = %self.spec.id, "a node says nothing: its session ends");
                    break;
                }
            }
        }
        self.leading.sessions.end(&self.handle);
        reporting.abort();
        tracing::info!(node = %self.spec.id, "a session ended");
    }

    async fn take(&self, message: NodeUp) -> Then {
        let heard = {
            let state = self.coordinator.0.replicated.read();
            let of = (&self.handle, &self.spec);
            self.leading.hear(self.coordinator.now_ms(), &state, of, message, self.coordinator.is_stalled())
        };
        if let Some(answer) = heard.answer
            && let Then::Ends = self.tell(answer)
        {
            return Then::Ends;
        }
        if let Some(report) = heard.report
            && self.reports.put(*report).is_err()
        {
            tracing::warn!(node = %self.spec.id, "a node reports of more replicas than it can have: its session ends");
            return Then::Ends;
        }
        if let Some((what, command)) = heard.propose {
            let submission = self.coordinator.own(self.leading.request_id(what), command);
            let (coordinator, node) = (self.coordinator.clone(), self.spec.id.clone());
            let proposed = async move {
                if let Err(error) = coordinator.submit(submission, REPORT_WITHIN).await {
                    // The lease runs out instead of a good-bye; the controller asks again for facts.
                    tracing::warn!(%node, what, %error, "what a node said was not recorded");
                }
            };
            if heard.ends {
                proposed.await;
            } else {
                self.coordinator.0.tasks.spawn(proposed);
            }
        }
        if heard.ends { Then::Ends } else { Then::GoesOn }
    }

    fn tell(&self, message: NodeDown) -> Then {
        match self.down.try_send(message) {
            Ok(()) => Then::GoesOn,
            Err(_) => {
                tracing::warn!(node = %self.spec.id, "a node does not read its messages: its session ends");
                Then::Ends
            }
        }
    }
}

/// Reports that wait to be proposed, and the news that there are some.
#[derive(Default)]
struct Waiting {
    reports: Mutex<Reports>,
    arrived: Notify,
}

impl Waiting {
    fn put(&self, report: ReplicaReport) -> Result<(), TooMany> {
        self.reports.lock().put(report)?;
        self.arrived.notify_one();
        Ok(())
    }
}

/// Proposes a node's reports, each until its end is known.
async fn report(coordinator: Coordinator, leading: Arc<Leading>, handle: Handle, spec: NodeSpec, waiting: Arc<Waiting>) {
    loop {
        waiting.arrived.notified().await;
        loop {
            let Some(command) = waiting.reports.lock().take(&spec) else { break };
            let submission = coordinator.own(leading.request_id("report"), command);
            while let Err(error) = coordinator.submit(submission.clone(), REPORT_WITHIN).await {
                let is_over = handle.ended.is_cancelled();
                if !is_proposed_again(&error, is_over) {
                    tracing::debug!(node = %spec.id, %error, is_over, "a report came to nothing");
                    break;
                }
                tokio::time::sleep(REPORT_PAUSE).await;
            }
            if handle.ended.is_cancelled() {
                return;
            }
        }
    }
}
