//! API keys of a cluster: made here, kept there as hashes, told to gateways by watch.

use forge_cluster::api::ClusterApi;
use forge_gateway::KeyLimits;
use forge_gateway::keys::KeyRecord;
use forge_shared::cluster::command::Command;

use super::connect::{TIMEOUT, request_id, with_cluster};
use super::errors::explained;
use crate::cli::cluster::{GetArgs, Listed, ServerArgs};
use crate::cli::{KeysCommand, ListArgs};
use crate::commands::keys::ShownKey;
use crate::failure::{Failure, Result};
use crate::output::{OutputFormat, print_facts, print_text};
use crate::time::Utc;

/// `forgectl keys --cluster`.
///
/// # Errors
/// A name that is taken, unknown or not allowed; no leader.
pub fn keys(command: &KeysCommand, server: &ServerArgs) -> Result<()> {
    match command {
        KeysCommand::Create { name, rpm, tpm, list } => {
            let created = KeyRecord::generate(name, KeyLimits { rpm: *rpm, tpm: *tpm }, Utc::now().0)?;
            let command = Command::PutKey { key: Box::new(created.record.clone().into()) };
            with_cluster(server, |cluster| async move { Ok(cluster.execute(request_id(), command, TIMEOUT).await?) })?;
            match list.output {
                OutputFormat::Table | OutputFormat::Wide => {
                    eprintln!("Key {name:?} of the cluster. It is shown this once and stored only as a hash:");
                    print_text(&format!("{}\n", created.plaintext))
                }
                output => print_facts(output, &ShownKey::created(&created), &[]),
            }
        }
        KeysCommand::List(ListArgs { output }) => {
            super::get(&GetArgs { kind: Listed::Keys, name: None, output: *output, watch: false, server: server.clone() })
        }
        KeysCommand::Revoke { name } => {
            let command = Command::RevokeKey { name: name.clone() };
            let applied = with_cluster(server, |cluster| async move {
                match cluster.execute(request_id(), command, TIMEOUT).await {
                    Ok(applied) => Ok(applied),
                    Err(error) => Err(explained(&cluster, error).await),
                }
            })?;
            if !applied.changed {
                return Err(Failure::new(format!("key {name:?} was revoked before")));
            }
            print_text(&format!("revoked {name}; gateways notice at once\n"))
        }
    }
}
