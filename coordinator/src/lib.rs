//! The coordinator: what the cluster agrees on, what its leader decides, and everything that asks for it.
//!
//! [`raft`] keeps a log alike on all members, [`state`] is what its entries make of the cluster, [`placement`] says where
//! replicas go, [`control`] what the leader proposes and lends (leases, shares of budgets), [`watch`] tells of changes, and
//! [`Coordinator`] puts them together: behind gRPC as a process ([`prepare`]), which may be that of
//! `forgectl serve`: then a group of one, which its worker and gateway call without the wire.
//!
//! Invariant: `state`, `placement` and `control` have no clock, socket, disk or thread; time is an argument.

mod access;
mod backup;
mod certificates;
mod contact;
pub mod control;
mod coordinator;
mod dry_run;
mod error;
mod in_process;
mod leader;
pub mod leading;
mod member_file;
mod peers;
pub mod placement;
pub mod raft;
pub mod replicated;
pub mod reports;
mod run;
mod server;
mod session;
pub mod sessions;
mod signing;
pub mod state;
mod surroundings;
pub mod watch;

pub use backup::{BackupHeader, fuzz_backup, load_backup, read_backup, restore, write_backup};
pub use coordinator::{Coordinator, CoordinatorOptions};
pub use error::CoordinatorError;
pub use member_file::{MemberFile, fuzz_member_file};
pub use raft::BeforeSync;
pub use run::{CertificateOptions, Prepared, RunOptions, prepare};
pub use server::fuzz::{fuzz_request, fuzz_session};
pub use surroundings::Surroundings;
