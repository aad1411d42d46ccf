//! `forgectl cluster certs rotate-ca`: a new CA takes the old one's place while everything runs.
//!
//! What it is not: the one that knows how far it is. That is the cluster's state; this drives it from step to step and shows
//! for whom it waits, and another run goes on where this one ended.

use std::time::Duration;

use forge_cluster::api::{ClusterApi, ClusterError};
use forge_cluster::client::RemoteCluster;
use forge_shared::cluster::certificate::{CaRotation, Trust};
use forge_shared::cluster::command::{Command, CommandError};
use tokio::time::Instant;

use super::certs::read_trust;
use super::connect::{TIMEOUT, freshen, request_id, with_cluster};
use crate::cli::cluster::RotateCaArgs;
use crate::failure::{Failure, Result};
use crate::output::print_text;

/// How often a step is tried.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// How far this very CA has come, by what is believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    Introduced,
    Switched,
    Done,
    /// It is believed no more, or another one takes the old one's place.
    Gone,
}

impl Progress {
    fn of(trust: &Trust, to: &str) -> Progress {
        let is = |index: usize| trust.cas.get(index).is_some_and(|ca| ca.sha256 == to);
        match trust.rotation {
            Some(CaRotation::Introduced) if is(1) => Progress::Introduced,
            Some(CaRotation::Switched) if is(0) => Progress::Switched,
            None if is(0) => Progress::Done,
            Some(_) | None => Progress::Gone,
        }
    }
}

/// The CA that is on its way, if one is.
fn coming(trust: &Trust) -> Option<String> {
    let new = match trust.rotation? {
        CaRotation::Introduced => trust.cas.get(1),
        CaRotation::Switched => trust.cas.first(),
    };
    new.map(|ca| ca.sha256.clone())
}

/// See the module.
///
/// # Errors
/// Processes that do not follow in time, no leader, a CA that somebody took back meanwhile.
pub fn rotate(args: &RotateCaArgs) -> Result<()> {
    with_cluster(&args.server, |cluster| async move {
        if args.abandon {
            cluster.execute(request_id(), Command::AbandonCaRotation, TIMEOUT).await?;
            return print_text("the new CA is taken back; nothing was signed by it\n");
        }
        let to = begin(&cluster).await?;
        let name = |sha256: &str| sha256.chars().take(12).collect::<String>();
        loop {
            // This operator's certificate is one of those that the steps wait for.
            freshen(&args.server, &cluster).await;
            let trust = read_trust(&cluster, TIMEOUT).await?;
            let progress = Progress::of(&trust, &to);
            let to = to.clone();
            match progress {
                Progress::Introduced => {
                    let old = trust.cas.first().map(|ca| name(&ca.sha256)).unwrap_or_default();
                    eprintln!("1/2  CA {} is introduced beside {old}: all processes learn of it", name(&to));
                    step(args, &cluster, progress, &to, |force| Command::SwitchCa { to: to.clone(), force }).await?;
                }
                Progress::Switched => {
                    eprintln!("2/2  CA {} signs: all processes get a certificate of it", name(&to));
                    step(args, &cluster, progress, &to, |force| Command::FinishCaRotation { to: to.clone(), force }).await?;
                }
                Progress::Done => {
                    return print_text(&format!(
                        "CA {} has taken the old one's place\n\
                         join tokens and backups of ca.pem and ca.key that were made before are void: make new ones, and keep a copy of a \
                         coordinator's ca.pem and ca.key offline\n",
                        name(&to)
                    ));
                }
                Progress::Gone => {
                    return Err(Failure::new(format!("CA {} was taken back, or another one takes its place", name(&to)))
                        .help("`forgectl cluster status` says whether a CA is being rotated; `forgectl get events` what was done"));
                }
            }
        }
    })
}

/// The CA that takes the old one's place: one that is on its way, or a new one.
async fn begin(cluster: &RemoteCluster) -> Result<String> {
    if let Some(coming) = coming(&read_trust(cluster, TIMEOUT).await?) {
        return Ok(coming);
    }
    match cluster.begin_ca_rotation(TIMEOUT).await {
        Ok(sha256) => Ok(sha256),
        // Somebody else has begun, or this one: its answer was lost.
        Err(error) => coming(&read_trust(cluster, TIMEOUT).await?).ok_or_else(|| error.into()),
    }
}

/// Tries a step until everybody has followed, or it is not the one to take any more.
async fn step(args: &RotateCaArgs, cluster: &RemoteCluster, from: Progress, to: &str, command: impl Fn(bool) -> Command) -> Result<()> {
    let ends = Instant::now() + Duration::from_secs(args.timeout);
    let mut told = String::new();
    loop {
        let is_late = Instant::now() >= ends;
        let Err(error) = cluster.execute(request_id(), command(args.force && is_late), TIMEOUT).await else { return Ok(()) };
        // Another operator may have taken it, or this one: its answer was lost.
        if Progress::of(&read_trust(cluster, TIMEOUT).await?, to) != from {
            return Ok(());
        }
        let ClusterError::Command(CommandError::Unsafe { reason: refused }) = error else { return Err(error.into()) };
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

#[cfg(test)]
mod tests {
    use forge_shared::cluster::certificate::CaRecord;

    use super::*;

    #[test]
    fn a_change_is_that_of_one_ca_and_not_of_any() {
        let trust = |cas: &[&str], rotation| {
            let cas = cas.iter().map(|sha256| CaRecord { sha256: (*sha256).into(), certificate_pem: String::new() });
            Trust { cas: cas.collect(), rotation, ..Trust::default() }
        };
        let introduced = trust(&["old", "new"], Some(CaRotation::Introduced));
        let switched = trust(&["new", "old"], Some(CaRotation::Switched));
        assert_eq!((coming(&introduced).as_deref(), coming(&switched).as_deref()), (Some("new"), Some("new")));
        assert_eq!(Progress::of(&introduced, "new"), Progress::Introduced);
        assert_eq!(Progress::of(&switched, "new"), Progress::Switched);
        assert_eq!(Progress::of(&trust(&["new"], None), "new"), Progress::Done);
        // Taken back, and another one begun: no success of this one.
        assert_eq!(Progress::of(&trust(&["old"], None), "new"), Progress::Gone);
        assert_eq!(Progress::of(&trust(&["old", "other"], Some(CaRotation::Introduced)), "new"), Progress::Gone);
        assert_eq!(Progress::of(&trust(&[], None), "new"), Progress::Gone);
        assert_eq!(coming(&trust(&["old"], None)), None);
    }
}
