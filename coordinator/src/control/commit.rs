//! A placement in the making, bounded so that it fits into one entry of the log.
//!
//! Invariant: of what there is to say only what differs from the state is in it; a commit that is full is applied as it is,
//! and the next one goes on where it ended.

use forge_shared::cluster::Revision;
use forge_shared::cluster::command::{Command, PlannedReplica};
use forge_shared::ids::{Epoch, ReplicaId, ServiceName};
use forge_shared::plan::Refusal;
use serde::Serialize;

/// Plans and removals in one proposal: what is left comes with the next.
const COMMIT_PLANS: usize = 512;
/// Bytes of one proposal's JSON after which nothing is added. An entry of the log may have twice as many; no plan of one
/// rank and no refusal has more than a small part of that.
const COMMIT_BYTES: usize = 512 << 10;

#[derive(Default)]
pub(super) struct Commit {
    plans: Vec<PlannedReplica>,
    removed: Vec<(ReplicaId, Epoch)>,
    refusals: Vec<Refusal>,
    settled: Vec<ServiceName>,
    bytes: usize,
}

impl Commit {
    /// Whether what comes must wait for the next one.
    pub fn is_full(&self) -> bool {
        self.plans.len() + self.removed.len() >= COMMIT_PLANS || self.bytes >= COMMIT_BYTES
    }

    pub fn plan(&mut self, planned: PlannedReplica) {
        self.bytes += json_bytes(&planned);
        self.plans.push(planned);
    }

    pub fn remove(&mut self, replica: ReplicaId, epoch: Epoch) {
        self.bytes += json_bytes(&(&replica, epoch));
        self.removed.push((replica, epoch));
    }

    /// What is refused of a service now, beside what the state says.
    pub fn say(&mut self, name: &ServiceName, said: Option<&Refusal>, now: Option<Refusal>) {
        match now {
            now if said == now.as_ref() => {}
            Some(refusal) => {
                self.bytes += json_bytes(&refusal);
                self.refusals.push(refusal);
            }
            None => {
                self.bytes += json_bytes(name);
                self.settled.push(name.clone());
            }
        }
    }

    /// `None` where there is nothing to change.
    pub fn into_command(self, basis: Revision) -> Option<Command> {
        let Commit { plans, removed, refusals, settled, .. } = self;
        let is_empty = plans.is_empty() && removed.is_empty() && refusals.is_empty() && settled.is_empty();
        (!is_empty).then_some(Command::CommitPlans { basis, plans, removed, refusals, settled })
    }
}

/// With the comma after it. What has no JSON, which is nothing of ours, fills the commit.
fn json_bytes(value: &impl Serialize) -> usize {
    serde_json::to_vec(value).map_or(COMMIT_BYTES, |json| json.len() + 1)
}
