//! The cluster's errors as failures with exit codes and remedies.

use forge_cluster::api::{ClusterApi, ClusterError};
use forge_cluster::client::RemoteCluster;
use forge_cluster::tls::TlsError;
use forge_shared::cluster::command::CommandError;
use forge_shared::cluster::event::{Kind, Object};
use forge_shared::config::nearest;

use super::connect::TIMEOUT;
use crate::failure::{Exit, Failure};

impl From<ClusterError> for Failure {
    fn from(error: ClusterError) -> Self {
        let failure = Failure::of(&error);
        match error {
            ClusterError::Command(CommandError::Invalid { .. }) => failure.exit(Exit::Usage),
            ClusterError::Command(CommandError::Stale { .. }) => failure.help("the cluster changed meanwhile: run the command again"),
            ClusterError::Command(CommandError::Level { .. }) => {
                failure.help("`forgectl cluster status` and `forgectl get nodes -o wide` show what every process runs")
            }
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

/// Most names that a failure lists.
const MAX_NAMES: usize = 8;

/// The error of a command, with the names there are where it named something that is not there.
pub(super) async fn explained(cluster: &RemoteCluster, error: ClusterError) -> Failure {
    let ClusterError::Command(CommandError::NotFound { kind, name, .. }) = &error else { return error.into() };
    let (kind, name) = (kind.clone(), name.clone());
    let known = match kind.as_str() {
        "node" => Kind::Node,
        "service" | "placed replica" => Kind::Service,
        "key" => Kind::Key,
        _ => return error.into(),
    };
    with_names(cluster, error.into(), known, &name).await
}

/// A failure with the names of a kind, those most like the wanted one first.
pub(super) async fn with_names(cluster: &RemoteCluster, failure: Failure, kind: Kind, wanted: &str) -> Failure {
    if kind == Kind::Notice {
        return failure.help("`forgectl get events -o json` shows their numbers");
    }
    // A list that cannot be had must not hide what failed.
    let Ok(listing) = cluster.read(kind, None, TIMEOUT).await else { return failure };
    let mut names: Vec<String> = listing.objects.iter().map(Object::name).collect();
    if names.is_empty() {
        return failure.help("there are none");
    }
    // Listings are sorted; the one that is probably meant comes first, however many there are.
    if let Some(at) = nearest(wanted, names.iter().cloned()).and_then(|meant| names.iter().position(|name| *name == meant)) {
        names[..=at].rotate_right(1);
    }
    let more = names.len().saturating_sub(MAX_NAMES);
    names.truncate(MAX_NAMES);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    failure.help(format!("there are: {}{more}", names.join(", ")))
}

impl From<TlsError> for Failure {
    fn from(error: TlsError) -> Self {
        let is_usage = matches!(error, TlsError::Name { .. });
        let failure = Failure::of(&error);
        if is_usage { failure.exit(Exit::Usage) } else { failure }
    }
}
