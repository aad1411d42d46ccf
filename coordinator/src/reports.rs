//! A node's reports on their way into the log: which is proposed next, and when again.
//!
//! A core: no clock and no task. Invariant: of a replica's reports that wait the newest is enough; each is proposed under one
//! request id until its end is known or its session is over; what waits is bounded.

use std::collections::BTreeMap;

use forge_shared::cluster::command::Command;
use forge_shared::cluster::node::NodeSpec;
use forge_shared::cluster::service::ReplicaReport;
use forge_shared::ids::{Epoch, ReplicaId};

use crate::error::CoordinatorError;

/// Replicas of one node with a report that waits.
const MAX_REPORTS: usize = 4096;

/// Reports that wait to be proposed, the newest of each replica.
#[derive(Debug, Default)]
pub struct Reports {
    pending: BTreeMap<(ReplicaId, Epoch), ReplicaReport>,
}

/// There is no room for another report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooMany;

impl Reports {
    /// Takes one in.
    ///
    /// # Errors
    /// The node speaks of more replicas than it can have: its session ends.
    pub fn put(&mut self, mut report: ReplicaReport) -> Result<(), TooMany> {
        let key = (report.replica.clone(), report.epoch);
        if self.pending.len() >= MAX_REPORTS && !self.pending.contains_key(&key) {
            return Err(TooMany);
        }
        if let Some(older) = self.pending.get(&key) {
            // What was found of the device stays true.
            report.found_memory_bytes = report.found_memory_bytes.or(older.found_memory_bytes);
        }
        self.pending.insert(key, report);
        Ok(())
    }

    /// The next one, as a command of this node.
    pub fn take(&mut self, spec: &NodeSpec) -> Option<Command> {
        let (_, report) = self.pending.pop_first()?;
        Some(Command::ReportReplica { node: spec.id.clone(), incarnation: spec.incarnation, report })
    }
}

/// Whether a report is to be proposed once more, under the same request id.
pub fn is_proposed_again(error: &CoordinatorError, is_session_over: bool) -> bool {
    // The next session repeats what was lost with this one.
    !matches!(error, CoordinatorError::Command(_)) && !is_session_over
}
