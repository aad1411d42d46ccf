//! A gateway's way to a worker's replicas, whether the worker is in this process or behind a wire.
//!
//! Invariant: a client belongs to one epoch of one replica. When the worker runs another, submissions are refused as
//! unavailable and nothing is computed; the gateway learns of the new epoch from the coordinators and dials again.

mod dialer;
mod error;
pub mod fuzz;
mod prefixes;
mod remote;
#[cfg(test)]
mod remote_tests;
pub mod reply;
pub mod request;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use forge_shared::ids::{Epoch, NodeId, ReplicaId};
use forge_shared::link::EngineLink;
pub use forge_shared::link::PrefixUpdate;
use futures::future::BoxFuture;
use tokio::sync::mpsc;

use crate::api::ClusterError;

pub use dialer::RemoteDialer;
pub use error::WireError;

/// How often a replica that cannot answer yet is looked at.
pub const STATUS_POLL: Duration = Duration::from_millis(50);

/// Which replica, where, and under which plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineTarget {
    /// Node of its leading rank: the name its certificate must carry.
    pub node: NodeId,
    /// `host:port` of that node's engine service.
    pub address: String,
    /// Which copy.
    pub replica: ReplicaId,
    /// Of the plan.
    pub epoch: Epoch,
}

/// One replica as a gateway uses it. Dropping it closes what belongs to it.
pub trait ReplicaClient: EngineLink {
    /// Tokenizer and chat template in forge-text's portable form.
    fn model_text(&self, timeout: Duration) -> BoxFuture<'_, Result<Bytes, ClusterError>>;
    /// Changes of the engine's prefix cache; each call begins with a reset. A reader that falls behind gets a reset.
    fn prefixes(&self) -> mpsc::Receiver<PrefixUpdate>;
    /// Token slots of a block, which a prefix hash covers; 0 until known.
    fn block_size(&self) -> usize;
    /// Resolves when its status may be another, or after a moment: for waiting until it can answer.
    fn changed(&self) -> BoxFuture<'_, ()> {
        Box::pin(tokio::time::sleep(STATUS_POLL))
    }
}

/// Makes clients. A wire's dialer connects in the background: the client's status says when it can answer.
pub trait EngineDialer: Send + Sync + 'static {
    /// A client of this replica.
    fn dial(&self, target: EngineTarget) -> Arc<dyn ReplicaClient>;
}
