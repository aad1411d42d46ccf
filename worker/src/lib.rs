//! The worker: a node agent and the supervised actors that hold models and engines.
//!
//! What it is not: it makes no placement (the coordinator does) and speaks no HTTP (the gateway does).
//! Invariant: nothing a replica does can end the process; its death is an input of the [`agent`].

pub mod agent;
pub mod machine;
