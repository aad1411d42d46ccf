//! The worker's actors: thin shells that carry out what the [`crate::agent::Agent`] core decides.
//!
//! ```text
//! NodeActor ── drives Agent, supervises ──> ReplicaActor ── owns ──> engine thread ── steps ──> ranks
//! ```
//!
//! A replica's death reaches the node as a supervision event and becomes an input of the core; there is no
//! other path by which a replica is started, stopped or counted.

mod node;
mod replica;
#[cfg(test)]
mod tests;

pub use node::{NodeActor, NodeArguments, NodeEvent, NodeMessage};
pub use replica::{CountTokens, Launch, LaunchWatch, Launched, ListenPrefixes, ReplicaActor, ReplicaArguments, ReplicaMessage, StopEngine};
