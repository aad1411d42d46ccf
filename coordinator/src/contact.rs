//! Whether this coordinator hears its group: what it shows to watchers is only worth something while it does.
//!
//! What it is not: a lease on the truth; reads that must be new go through raft.
//!
//! Invariant: watches go on while there is a leader, and over elections; they end when this member has heard of none for
//! longer than elections take, or was removed, so that clients go to another.

use std::time::Duration;

use parking_lot::RwLock;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::coordinator::Coordinator;
use crate::error::CoordinatorError;

/// How often it is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// Longest election timeouts that may pass without a leader.
const TIMEOUTS: u32 = 2;

/// A token for as long as the group is heard.
#[derive(Debug)]
pub(crate) struct Contact(RwLock<CancellationToken>);

impl Contact {
    /// In contact, until shown otherwise or `stop`.
    pub(crate) fn new(stop: &CancellationToken) -> Contact {
        Contact(RwLock::new(stop.child_token()))
    }
}

impl Coordinator {
    /// Cancelled when this coordinator loses its group, or stops.
    ///
    /// # Errors
    /// It hears nothing of its group now.
    pub(crate) fn in_contact(&self) -> Result<CancellationToken, CoordinatorError> {
        let token = self.0.contact.0.read().clone();
        if token.is_cancelled() {
            let reason = "this coordinator hears of no leader, and what it knows may be old: ask another".into();
            return Err(CoordinatorError::Busy { reason });
        }
        Ok(token)
    }

    fn hears_its_group(&self) -> bool {
        let status = self.raft_status();
        let belongs = status.members.iter().any(|member| member.id == status.member_id);
        status.failure.is_none() && status.leader.is_some() && belongs && !self.is_stalled()
    }
}

/// Follows what raft says, until the coordinator stops.
pub(crate) async fn follow_contact(coordinator: Coordinator) {
    let raft = &coordinator.0.options.raft;
    let longest_ticks = u32::try_from(2 * raft.election_ticks).unwrap_or(u32::MAX);
    let patience = raft.tick.saturating_mul(longest_ticks.saturating_mul(TIMEOUTS));
    let mut heard = Instant::now();
    loop {
        tokio::select! {
            () = coordinator.0.stop.cancelled() => return,
            () = tokio::time::sleep(LOOK_INTERVAL) => {}
        }
        let is_cancelled = coordinator.0.contact.0.read().is_cancelled();
        if coordinator.hears_its_group() {
            heard = Instant::now();
            if is_cancelled {
                tracing::info!("the group is heard again");
                *coordinator.0.contact.0.write() = coordinator.0.stop.child_token();
            }
        } else if heard.elapsed() >= patience && !is_cancelled {
            tracing::warn!(silent_ms = heard.elapsed().as_millis() as u64, "this coordinator hears of no leader: its watches end");
            coordinator.0.contact.0.read().cancel();
        }
    }
}
