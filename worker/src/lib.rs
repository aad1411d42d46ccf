//! The worker: a node agent and the supervised actors that hold models and engines.
//!
//! What it is not: it makes no placement (the coordinator does) and speaks no HTTP (the gateway does).
//! Invariant: nothing a replica does can end the process; its death is an input of the [`agent`].

pub mod actors;
pub mod agent;
pub mod data_plane;
mod error;
#[cfg(debug_assertions)]
mod fault;
pub mod inspect;
pub mod launcher;
pub mod ledger;
pub mod link;
pub mod local;
pub mod logs;
pub mod machine;
mod meeting;
pub mod models;
pub mod node;
pub mod prepare;
pub mod probe;
pub mod process;
pub mod ranks;
pub mod service;
pub mod session;
pub mod threads;
mod time;

pub use error::WorkerError;
