//! The worker: a node agent and the supervised actors that hold models and engines.
//!
//! What it is not: it makes no placement (the coordinator does) and speaks no HTTP (the gateway does).
//! Invariant: nothing a replica does can end the process; its death is an input of the [`agent`].

pub mod actors;
pub mod agent;
mod error;
#[cfg(debug_assertions)]
mod fault;
mod launcher;
pub mod link;
pub mod local;
pub mod machine;
pub mod prepare;

pub use error::WorkerError;
