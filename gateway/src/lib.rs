//! The gateway: OpenAI's HTTP API over engines that may be anywhere.
//!
//! `HTTP → key, limits → parse → template, tokenize → route → engine → server-sent events`
//!
//! It links no kernel, no model and no engine; it reaches them through [`forge_shared::link::EngineLink`] alone.
//! What a request may contain is a table ([`request::fields`]), which also is docs/api.md.
//!
//! | concept | where | I/O |
//! |---|---|---|
//! | what a request does next, from submission to its last event | [`core::Course`] | none |
//! | what was accepted and sent, replay after an engine's death | [`journal`] | none |
//! | which replicas there are, are dialed and are served | [`cluster::Directory`], [`cluster::Roster`], [`core::Models`] | none |
//! | which replica answers | [`router`] | none |
//! | rate limits | [`limits`] | none |
//! | idempotency keys | [`idempotency`] | none |
//! | parsing and refusing | [`request`] | none |
//! | shapes of answers | [`response`] | none |
//! | carrying a request's course out | `driver` | channels |
//! | API keys | [`keys`] | a file |
//! | routes, sockets, drain | `routes`, `server` | sockets |

mod body;
pub mod breaker;
pub mod clock;
pub mod cluster;
mod config;
pub mod core;
mod course;
mod driver;
mod error;
mod gateway;
mod generation;
mod health;
pub mod idempotency;
pub mod journal;
pub mod keys;
mod lifecycle;
pub mod limits;
mod meter;
mod middleware;
mod model_table;
mod models;
pub mod prefix_index;
mod prepare;
pub mod process;
pub mod request;
pub mod response;
pub mod retry_budget;
pub mod router;
mod routes;
mod server;
mod sse;
mod trace;
mod write_stall;

pub use config::{GatewayConfig, RequestLimits, Timeouts};
pub use error::{ApiError, GatewayError};
pub use gateway::{Gateway, ReplicaPrefixes, ServedModel, ServedReplica};
pub use keys::{KeyLimits, KeyRing, KeyStore};
pub use model_table::NameClash;
pub use server::Listeners;
