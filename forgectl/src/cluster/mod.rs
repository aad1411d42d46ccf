//! Commands that speak to a cluster: which one is meant, what is asked, how the answers are shown.
//!
//! What it is not: it decides nothing about the cluster; the coordinators do, and their refusals are shown as they are.
//!
//! Invariant: a command that changes something carries one request id over all its tries.

mod apply;
mod certs;
mod connect;
mod contexts;
mod data;
mod errors;
mod get;
mod init;
mod keys;
mod members;
mod rollout;
mod rotate;
mod rows;
#[cfg(test)]
mod tests;
mod top;
mod verbs;
mod wait;
mod watching;

pub use apply::apply;
pub use contexts::{ContextStore, HeldContext, LOCAL_CONTEXT, context};
pub use get::{describe, get};
pub use init::{admin, init, issue};
pub use keys::keys;
pub use members::{backup, change_members, join_token, restore, status};
pub use rollout::rollout;
pub use top::top;
pub use verbs::{cordon, delete, drain, logs, scale};

use crate::cli::cluster::{ClusterArgs, ClusterCommand};
use crate::failure::Result;

/// `forgectl cluster`.
///
/// # Errors
/// The command's own.
pub fn cluster(args: &ClusterArgs) -> Result<()> {
    match &args.command {
        ClusterCommand::Init(args) => init(args),
        ClusterCommand::JoinToken(args) => join_token(args),
        ClusterCommand::Admin(args) => admin(args),
        ClusterCommand::Status { list, server } => status(list.output, server),
        ClusterCommand::Members { command } => change_members(command),
        ClusterCommand::Certs { command } => certs::certs(command),
        ClusterCommand::Backup { file, server } => backup(file, server),
        ClusterCommand::Restore(args) => restore(args),
    }
}
