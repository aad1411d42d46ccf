//! The engine service: how gateways use this worker's replicas, over mTLS or in the same process.
//!
//! What it is not: it admits nothing and queues nothing. A request goes to the engine of exactly the epoch it names, or is
//! refused as unavailable.
//!
//! Invariant: a caller that goes away takes its requests with it within a step: nothing but the stream's own receiver
//! holds them.

mod dialer;
mod feed;
mod replies;
mod server;
mod watch;

pub use dialer::LocalDialer;
pub use server::{EngineService, serve};

use std::sync::Arc;

use forge_shared::ids::{Epoch, ReplicaId};

use crate::agent::RunId;
use crate::link::{ReplicaBoard, ReplicaLink};

/// The link of the epoch that is meant, or why there is none.
fn find(board: &ReplicaBoard, replica: &ReplicaId, epoch: Epoch) -> Result<Arc<ReplicaLink>, String> {
    let run = RunId { replica: replica.to_string(), epoch };
    board.get(&run).ok_or_else(|| match board.newest_epoch(&run.replica) {
        Some(newest) => format!("this worker runs epoch {newest} of {}, not {epoch}: ask the coordinators for its place", run.replica),
        None => format!("this worker does not run {}: ask the coordinators for its place", run.replica),
    })
}
