//! One node's session: begins with its joining, carries heartbeats and reports to the leader, ends with the lease, the
//! connection or the leadership.
//!
//! Invariants: a heartbeat never waits for a command, and is answered, with another lease, only while the state has this
//! process of the node as ready and raft's thread goes on; of a replica's reports that wait to be proposed the newest is enough;
//! a node that says nothing for three leases has no session.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use forge_cluster::api::{STREAM_DEPTH, Session};
use forge_shared::cluster::command::Command;
use forge_shared::cluster::node::{NodePhase, NodeRecord, NodeSpec, Role};
use forge_shared::cluster::service::ReplicaReport;
use forge_shared::cluster::session::{KeyShare, NodeDown, NodeUp};
use forge_shared::ids::{Epoch, ReplicaId, ServiceName};
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

use crate::coordinator::Coordinator;
use crate::error::CoordinatorError;
use crate::leader::Leading;
use crate::sessions::{Handle, Inspection, Purpose};

/// Replicas of one node with a report that waits.
const MAX_REPORTS: usize = 4096;
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

        let join = Command::JoinNode { spec: Box::new(hello.clone()) };
        let submission = self.own(leading.request_id("join"), join);
        let first = match self.submit(submission, timeout).await {
            Ok(_) => {
                let options = &self.0.options;
                NodeDown::Welcome { lease_ms: options.lease.as_millis() as u64, heartbeat_ms: options.heartbeat.as_millis() as u64 }
            }
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
        {
            let state = self.0.replicated.read();
            let mut leases = leading.leases.lock();
            leases.follow(self.now_ms(), &state);
            leases.renew(&hello.id, hello.incarnation, self.now_ms());
        }
        if hello.role == Role::Gateway {
            leading.shares.lock().begin(&hello.id);
        }
        let Some(handle) = leading.sessions.begin(hello.clone(), down.clone(), Instant::now()) else {
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
    reports: Arc<Reports>,
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
        match message {
            NodeUp::Heartbeat { number, load, usage } => {
                // A leader that stands still may be one no more, and must not hold its nodes: the next one counts them as lost.
                if self.coordinator.is_stalled() || !self.renew() {
                    // It may come again, here or elsewhere, and is then told what it is to run.
                    let _ = self.down.try_send(NodeDown::Moved { leader: None });
                    return Then::Ends;
                }
                self.leading.sessions.heard(&self.handle, load, Instant::now());
                let shares: Vec<KeyShare> = if self.spec.role == Role::Gateway {
                    let state = self.coordinator.0.replicated.read();
                    let mut shares = self.leading.shares.lock();
                    shares.heard(&self.spec.id, &usage);
                    shares.grant(&state, &self.spec.id)
                } else {
                    Vec::new()
                };
                let ack = NodeDown::Ack { number, lease_ms: self.coordinator.0.options.lease.as_millis() as u64, shares };
                self.tell(ack)
            }
            NodeUp::Replica { report } => {
                if self.reports.put(*report) {
                    Then::GoesOn
                } else {
                    tracing::warn!(node = %self.spec.id, "a node reports of more replicas than it can have: its session ends");
                    Then::Ends
                }
            }
            NodeUp::Inspected { number, result } => {
                match self.leading.sessions.answered(&self.handle, number, Instant::now()) {
                    None => tracing::debug!(node = %self.spec.id, number, "an answer to no question, or too late"),
                    Some(Purpose::DryRun(asker)) => {
                        // Who asked may have gone meanwhile.
                        let _ = asker.send(result);
                    }
                    Some(Purpose::Service { name }) => self.found(&name, Some(result)),
                }
                Then::GoesOn
            }
            NodeUp::Busy { number } => {
                // No verdict: a dry run goes to the next worker when its question is dropped.
                if let Some(Purpose::Service { name }) = self.leading.sessions.answered(&self.handle, number, Instant::now()) {
                    self.found(&name, None);
                }
                Then::GoesOn
            }
            NodeUp::Goodbye => {
                let command =
                    Command::LoseNode { node: self.spec.id.clone(), incarnation: self.spec.incarnation, reason: "it said good-bye".into() };
                let submission = self.coordinator.own(self.leading.request_id("goodbye"), command);
                if let Err(error) = self.coordinator.submit(submission, REPORT_WITHIN).await {
                    tracing::warn!(node = %self.spec.id, %error, "a good-bye was not recorded: the lease runs out instead");
                }
                Then::Ends
            }
            NodeUp::Hello { .. } => {
                tracing::warn!(node = %self.spec.id, "a second hello: the session ends");
                Then::Ends
            }
        }
    }

    /// Renews the node's lease. False where the node is lost, removed or another process of it joined.
    fn renew(&self) -> bool {
        let NodeSpec { id, incarnation, .. } = &self.spec;
        let state = self.coordinator.0.replicated.read();
        let is_known = |node: &NodeRecord| node.phase == NodePhase::Ready && node.spec.incarnation == *incarnation;
        let is_present = state.nodes().get(id).is_some_and(is_known);
        is_present && self.leading.leases.lock().renew(id, *incarnation, self.coordinator.now_ms())
    }

    /// What a worker found of a service's model (`None`: it was busy) is for the controller to judge.
    fn found(&self, name: &ServiceName, result: Option<Inspection>) {
        let command = {
            let state = self.coordinator.0.replicated.read();
            let mut controller = self.leading.controller.lock();
            controller.inspected(self.coordinator.now_ms(), &state, (&self.spec.id, name), result)
        };
        let Some(command) = command else { return };
        let submission = self.coordinator.own(self.leading.request_id("facts"), command);
        let (coordinator, node) = (self.coordinator.clone(), self.spec.id.clone());
        self.coordinator.0.tasks.spawn(async move {
            if let Err(error) = coordinator.submit(submission, REPORT_WITHIN).await {
                // The controller asks again.
                tracing::warn!(%node, %error, "what a worker found of a model was not recorded");
            }
        });
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

/// Reports that wait to be proposed, the newest of each replica.
#[derive(Default)]
struct Reports {
    pending: Mutex<HashMap<(ReplicaId, Epoch), ReplicaReport>>,
    arrived: Notify,
}

impl Reports {
    /// False where there is no room.
    fn put(&self, mut report: ReplicaReport) -> bool {
        let mut pending = self.pending.lock();
        let key = (report.replica.clone(), report.epoch);
        if pending.len() >= MAX_REPORTS && !pending.contains_key(&key) {
            return false;
        }
        if let Some(older) = pending.get(&key) {
            // What was found of the device stays true.
            report.found_memory_bytes = report.found_memory_bytes.or(older.found_memory_bytes);
        }
        pending.insert(key, report);
        self.arrived.notify_one();
        true
    }

    fn take(&self) -> Vec<ReplicaReport> {
        self.pending.lock().drain().map(|(_, report)| report).collect()
    }
}

/// Proposes a node's reports, each until its end is known.
async fn report(coordinator: Coordinator, leading: Arc<Leading>, handle: Handle, spec: NodeSpec, reports: Arc<Reports>) {
    loop {
        reports.arrived.notified().await;
        for report in reports.take() {
            let about = report.replica.to_string();
            let command = Command::ReportReplica { node: spec.id.clone(), incarnation: spec.incarnation, report };
            let submission = coordinator.own(leading.request_id("report"), command);
            loop {
                match coordinator.submit(submission.clone(), REPORT_WITHIN).await {
                    Ok(_) => break,
                    Err(CoordinatorError::Command(error)) => {
                        tracing::debug!(node = %spec.id, replica = about, %error, "a report was refused");
                        break;
                    }
                    Err(error) if handle.ended.is_cancelled() => {
                        tracing::debug!(node = %spec.id, %error, "a report was lost with its session: the next session repeats it");
                        return;
                    }
                    Err(_) => tokio::time::sleep(REPORT_PAUSE).await,
                }
            }
        }
    }
}
