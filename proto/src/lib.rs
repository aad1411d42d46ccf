//! The messages and services between Forge's processes, generated from `proto/forge/*.proto`; nothing else.
//!
//! Nothing here is checked: `forge-cluster` and `forge-coordinator` convert to checked types at the edge, and nothing
//! behind them sees these.
#![allow(missing_docs, clippy::all)]

pub mod codec;

/// Raft: the wire between coordinators, and the records on their disks.
pub mod raft {
    tonic::include_proto!("forge.raft.v1");
}
/// What operators and programs ask of the cluster.
pub mod cluster {
    tonic::include_proto!("forge.cluster.v1");
}
/// How nodes join and stay.
pub mod node {
    tonic::include_proto!("forge.node.v1");
}
/// How a gateway uses a worker's engines.
pub mod engine {
    tonic::include_proto!("forge.engine.v1");
}
