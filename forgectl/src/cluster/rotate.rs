//! `forgectl cluster certs rotate-ca`: a new CA takes the old one's place while everything runs.
//!
//! What it is not: the one that knows how far it is. That is the cluster's state; this drives it from step to step and shows
//! for whom it waits, and another run goes on where this one ended.

use std::time::Duration;

use forge_cluster::api::{ClusterApi, ClusterError};
use forge_cluster::client::RemoteCluster;
use forge_shared::cluster::certificate::CaRotation;
use forge_shared::cluster::command::{Command, CommandError};
use tokio::time::Instant;

use super::certs::read_trust;
use super::connect::{TIMEOUT, freshen, request_id, with_cluster};
use crate::cli::cluster::RotateCaArgs;
use crate::failure::{Failure, Result};
use crate::output::print_text;

/// How often a step is tried.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// See the module.
///
/// # Errors
/// Processes that do not follow in time, no leader.
pub fn rotate(args: &RotateCaArgs) -> Result<()> {
    with_cluster(&args.server, |cluster| async move {
        if args.abandon {
            cluster.execute(request_id(), Command::AbandonCaRotation, TIMEOUT).await?;
            return print_text("the new CA is taken back; nothing was signed by it\n");
        }
        if read_trust(&cluster, TIMEOUT).await?.rotation.is_none() {
            cluster.begin_ca_rotation(TIMEOUT).await?;
        }
        loop {
            // This operator's certificate is one of those that the steps wait for.
            freshen(&args.server, &cluster).await;
            let trust = read_trust(&cluster, TIMEOUT).await?;
            let name = |index: usize| trust.cas.get(index).map(|ca| ca.sha256.chars().take(12).collect::<String>()).unwrap_or_default();
            match trust.rotation {
                Some(CaRotation::Introduced) => {
                    eprintln!("1/2  CA {} is introduced beside {}: all processes learn of it", name(1), name(0));
                    step(args, &cluster, |force| Command::SwitchCa { force }).await?;
                }
                Some(CaRotation::Switched) => {
                    eprintln!("2/2  CA {} signs: all processes get a certificate of it", name(0));
                    step(args, &cluster, |force| Command::FinishCaRotation { force }).await?;
                }
                None => {
                    return print_text(&format!(
                        "CA {} has taken the old one's place\n\
                         join tokens and backups of ca.pem and ca.key that were made before are void: make new ones, and keep a copy of a \
                         coordinator's ca.pem and ca.key offline\n",
                        name(0)
                    ));
                }
            }
        }
    })
}

/// Tries a step until everybody has followed.
async fn step(args: &RotateCaArgs, cluster: &RemoteCluster, command: impl Fn(bool) -> Command) -> Result<()> {
    let ends = Instant::now() + Duration::from_secs(args.timeout);
    let mut told = String::new();
    loop {
        let is_late = Instant::now() >= ends;
        let refused = match cluster.execute(request_id(), command(args.force && is_late), TIMEOUT).await {
            Ok(_) => return Ok(()),
            Err(ClusterError::Command(CommandError::Unsafe { reason })) => reason,
            Err(error) => return Err(error.into()),
        };
        if is_late {
            return Err(
                Failure::new(refused).help("the same command goes on from here; `--abandon` takes a CA back that does not sign yet")
            );
        }
        if told != refused {
            eprintln!("     waiting: {refused}");
            told = refused;
        }
        freshen(&args.server, cluster).await;
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}
