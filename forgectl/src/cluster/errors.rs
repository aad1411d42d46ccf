//! The cluster's errors as failures with exit codes and remedies.

use forge_cluster::api::ClusterError;
use forge_cluster::tls::TlsError;
use forge_shared::cluster::command::CommandError;

use crate::failure::{Exit, Failure};

impl From<ClusterError> for Failure {
    fn from(error: ClusterError) -> Self {
        let failure = Failure::of(&error);
        match error {
            ClusterError::Command(CommandError::Invalid { .. }) => failure.exit(Exit::Usage),
            ClusterError::Command(CommandError::Stale { .. }) => failure.help("the cluster changed meanwhile: run the command again"),
            ClusterError::Command(_) => failure,
            ClusterError::NotPlaceable(_) => failure
                .exit(Exit::NotPlaceable)
                .help("take the nearest settings, add a worker, or `forgectl get nodes -o wide` to see what there is"),
            ClusterError::Unavailable { .. } => failure
                .exit(Exit::LostContact)
                .help("check that a coordinator runs and that the address is right: `forgectl context list`, `forgectl cluster status`"),
            // The remedy is in the reason: it is the worker's matter, not the coordinators'.
            ClusterError::Unfinished { .. } => failure,
            ClusterError::Away { .. } => failure.exit(Exit::LostContact),
            ClusterError::Unknown { .. } => {
                failure.exit(Exit::LostContact).help("it may have been done: look with `forgectl get`; the same command again does no harm")
            }
            ClusterError::Forbidden { .. } => failure.help("`forgectl context list` shows which certificate is used"),
            ClusterError::Protocol { .. } => failure,
        }
    }
}

impl From<TlsError> for Failure {
    fn from(error: TlsError) -> Self {
        let is_usage = matches!(error, TlsError::Name { .. });
        let failure = Failure::of(&error);
        if is_usage { failure.exit(Exit::Usage) } else { failure }
    }
}
