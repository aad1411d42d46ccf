//! How the workers that share a replica's ranks come together: nobody loads before all are there and have the model, and
//! whoever cannot go on ends the run for all.
//!
//! What it is not: it carries no steps and no activations (`forge_model::sharded` does, once this is done).
//!
//! Invariants: a run that was met is ended for all its workers when any of them ends it, is lost, or drops its side; no wait
//! outlives the run's cancellation by more than a look.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use forge_model::ModelError;
use forge_model::sharded::Reach;
use forge_net::{Fabric, Member, MessageLinks, NetError};
use forge_shared::cluster::session::Assignment;
use forge_shared::ids::NodeId;
use forge_store::{CancelFlag, Digest, StoreError};

use crate::WorkerError;
use crate::data_plane::resolve;
use crate::ranks::STEP_DEADLINE;

/// The longest wait for the other workers: they get the assignment when this one does, or are lost.
const FORM_TIMEOUT: Duration = Duration::from_secs(30);
/// One look at a link, between looks at whether the run is still wanted.
const LOOK: Duration = Duration::from_millis(100);
/// One look at a link by whoever has nothing else to do.
const LONG_LOOK: Duration = Duration::from_secs(1);

/// From a following worker: it has the model and the memory.
const READY: u8 = 1;
/// From the leading worker: all have.
const GO: u8 = 2;
/// From a following worker: it ends within so many milliseconds.
const DRAIN: u8 = 3;

/// One run, as one of its workers has it.
pub(crate) struct Meeting {
    reach: Reach,
    links: Arc<MessageLinks>,
}

impl Meeting {
    /// Meets the other workers of an assignment.
    ///
    /// # Errors
    /// [`WorkerError::Setting`] where this worker or a peer has no data plane; the data plane's where somebody does not come.
    pub(crate) fn begin(
        fabric: Option<&Arc<Fabric>>,
        assignment: &Assignment,
        node: &NodeId,
        cancel: &CancelFlag,
    ) -> Result<Self, WorkerError> {
        let wrong = |reason: String| WorkerError::Setting { field: "plan.ranks.node", reason };
        let Some(fabric) = fabric else {
            return Err(wrong(format!("the plan has ranks on other workers, and {node} has no data plane")));
        };
        let plan = &assignment.plan;
        let mut addresses = BTreeMap::new();
        for peer in &assignment.peers {
            addresses.insert(&peer.node, resolve(&peer.data_plane.address).map_err(wrong)?);
        }
        let member = |node: &NodeId| Member { node: node.clone(), address: addresses.get(node).copied() };
        let members: Vec<Member> = plan.ranks.iter().map(|rank| member(&rank.node)).collect();
        if let Some(missing) = members.iter().find(|member| member.address.is_none() && member.node != *node) {
            return Err(wrong(format!("the plan has ranks on {}, whose data plane it does not name", missing.node)));
        }
        // All that must be alike: the decision, the weights, and what computes.
        let decision = serde_json::to_vec(&(plan, &assignment.weights_digest, env!("CARGO_PKG_VERSION")));
        let decision = decision.map_err(|error| wrong(error.to_string()))?;
        let reach = Reach {
            fabric: Arc::clone(fabric),
            name: plan.replica.to_string(),
            epoch: plan.epoch,
            members,
            node: node.clone(),
            agreement: Digest::of(&decision).to_string(),
            form_timeout: FORM_TIMEOUT,
            deadline: STEP_DEADLINE,
            fault: Arc::new(OnceLock::new()),
        };
        let until = Instant::now() + FORM_TIMEOUT;
        loop {
            match reach.links("run") {
                Ok(links) => return Ok(Meeting { links: Arc::new(links), reach }),
                // A connection that died before this run was not known to be dead yet: the next try makes another.
                Err(ModelError::Net(NetError::PeerLost { .. })) if Instant::now() < until && !cancel.is_cancelled() => {
                    std::thread::sleep(LOOK);
                }
                Err(error) => {
                    reach.blame(&error);
                    return Err(of_several(&reach, error.into()));
                }
            }
        }
    }

    /// For the model's ranks.
    pub(crate) fn reach(&self) -> &Reach {
        &self.reach
    }

    /// Waits until every worker has the model and the memory for its ranks.
    ///
    /// # Errors
    /// A worker that is lost or ended the run; that this one was cancelled.
    pub(crate) fn all_ready(&self, cancel: &CancelFlag) -> Result<(), WorkerError> {
        if !self.reach.leads() {
            self.links.send(0, &[READY])?;
            return self.wait(0, GO, cancel);
        }
        (1..self.links.size()).try_for_each(|member| self.wait(member, READY, cancel))?;
        Ok((1..self.links.size()).try_for_each(|member| self.links.send(member, &[GO]))?)
    }

    fn wait(&self, member: usize, wanted: u8, cancel: &CancelFlag) -> Result<(), WorkerError> {
        loop {
            if cancel.is_cancelled() {
                return Err(StoreError::Cancelled.into());
            }
            match self.links.recv(member, LOOK)?.as_deref() {
                None => {}
                Some([first, ..]) if *first == wanted => return Ok(()),
                // It will end in a moment, and says so by its links.
                Some([DRAIN, ..]) => {}
                Some(other) => return Err(NetError::Setup { what: "ranks", reason: format!("a worker said {other:?}") }.into()),
            }
        }
    }

    /// An error of this worker's, with whose fault it is, as the others are told.
    pub(crate) fn failed(&self, error: WorkerError) -> WorkerError {
        let error = of_several(&self.reach, error);
        self.links.abort(&format!("{}: {error}", self.reach.node));
        error
    }

    /// Calls `drain` when another worker says that it must end; the thread goes with the run.
    ///
    /// # Errors
    /// The system gives no thread.
    pub(crate) fn hear_drains(&self, drain: impl Fn(Duration) + Send + Sync + 'static) -> Result<(), WorkerError> {
        let drain = Arc::new(drain);
        for (member, place) in self.reach.nodes().into_iter().enumerate().skip(1) {
            let (links, drain, fault) = (Arc::clone(&self.links), drain.clone(), self.reach.fault.clone());
            let hear = move || {
                while let Ok(message) = links.recv(member, LONG_LOOK) {
                    if let Some([DRAIN, timeout_ms @ ..]) = message.as_deref()
                        && let Ok(timeout_ms) = timeout_ms.try_into()
                    {
                        let _ = fault.set(place.node.clone());
                        drain(Duration::from_millis(u64::from_le_bytes(timeout_ms)));
                    }
                }
            };
            let thread = std::thread::Builder::new().name("forge-run".into()).spawn(hear);
            thread.map_err(|error| WorkerError::EngineDied { reason: format!("the system gives no thread: {error}") })?;
        }
        Ok(())
    }

    /// The way to say that this worker must end.
    pub(crate) fn say_drain(&self) -> impl Fn(Duration) + Send + 'static {
        let links = Arc::clone(&self.links);
        move |timeout| {
            let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
            // A run that is over needs no end.
            let _ = links.send(0, &[[DRAIN].as_slice(), &timeout_ms.to_le_bytes()].concat());
        }
    }

    /// The run is over.
    pub(crate) fn end(&self) {
        self.links.abort("the run is over");
    }
}

/// An error of a run that several workers share: by whose fault, as far as that is known.
fn of_several(reach: &Reach, error: WorkerError) -> WorkerError {
    let fault = match &error {
        WorkerError::Several { .. } => return error,
        // Those that the model met it has judged already; the others say nothing of this worker.
        WorkerError::Model(_) | WorkerError::Store(StoreError::Cancelled) => None,
        WorkerError::Net(NetError::PeerLost { node, .. } | NetError::Unreachable { node, .. } | NetError::Refused { node, .. }) => {
            Some(node)
        }
        WorkerError::Net(_) => None,
        _ => Some(&reach.node),
    };
    if let Some(node) = fault {
        // Only the first counts.
        let _ = reach.fault.set(node.clone());
    }
    WorkerError::Several { node: reach.fault.get().cloned(), source: Box::new(error) }
}
