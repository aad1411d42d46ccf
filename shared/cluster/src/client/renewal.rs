//! Keeps a process's certificate fresh: renews it after two thirds of its life, on disk first, then in use, and then says so.
//!
//! Invariants: what runs goes on over a renewal; one that fails is tried again, sooner the less is left, and says so in the
//! log each time.

use std::path::PathBuf;
use std::time::Duration;

use super::RemoteCluster;
use tokio::time::Instant;

use super::calls::jittered;

/// How often the clock is looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
const RENEW_TIMEOUT: Duration = Duration::from_secs(30);
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(5);
/// After a first failure; doubled after each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// Of what is left, the part that may pass until the next try.
const PAUSE_PART: u64 = 20;
/// Of a certificate's life, the part that is left when failures are errors.
const ALARM_PART: i64 = 6;

/// Runs for ever beside a process. `directory` is where its `node.pem` lies; `left` is told the certificate's seconds left
/// at each look.
pub async fn keep_renewed(cluster: RemoteCluster, directory: PathBuf, left: impl Fn(i64) + Send) {
    let mut pause = FIRST_PAUSE;
    // Not known: a process may have ended before it said so.
    let mut confirmed: Option<String> = None;
    let (mut confirm_at, mut confirm_pause) = (Instant::now(), FIRST_PAUSE);
    loop {
        let credentials = cluster.credentials();
        let held = credentials.get();
        left(credentials.left_s());
        let wish = credentials.wish();
        if wish.is_none() && credentials.clock().now_s() < held.renew_at_s() {
            let serial = held.serial().ok();
            if confirmed != serial && Instant::now() >= confirm_at {
                match cluster.confirm(CONFIRM_TIMEOUT).await {
                    // What was replaced meanwhile is confirmed at the next look.
                    Ok(()) => (confirmed, confirm_pause) = (serial, FIRST_PAUSE),
                    Err(error) => {
                        ::tracing::debug!(%error, "the coordinators do not know yet that this process has its new certificate");
                        confirm_at = Instant::now() + jittered(confirm_pause);
                        confirm_pause = (confirm_pause * 2).min(LONGEST_PAUSE);
                    }
                }
            }
            tokio::time::sleep(jittered(LOOK_INTERVAL)).await;
            continue;
        }
        match renew(&cluster, directory.clone()).await {
            Ok(()) => {
                ::tracing::info!(identity = %held.identity(), left_s = credentials.left_s(), "renewed the certificate");
                pause = FIRST_PAUSE;
                (confirm_at, confirm_pause) = (Instant::now(), FIRST_PAUSE);
                wish.inspect(|wish| credentials.fulfil(*wish));
                tokio::time::sleep(jittered(LOOK_INTERVAL)).await;
            }
            Err(error) => {
                let left_s = credentials.left_s();
                let life_s = i64::try_from(held.ends_s().saturating_sub(held.issued_s())).unwrap_or(i64::MAX);
                let help = "see that this process reaches the coordinators (`forgectl cluster status`), that its clock is right and \
                            that its folder of certificates can be written";
                if left_s < life_s / ALARM_PART {
                    ::tracing::error!(%error, left_s, help, "the certificate ends soon and could not be renewed");
                } else {
                    ::tracing::warn!(%error, left_s, help, "could not renew the certificate; it is tried again");
                }
                let soon = Duration::from_secs(u64::try_from(left_s).unwrap_or(0) / PAUSE_PART).max(FIRST_PAUSE);
                tokio::time::sleep(jittered(pause.min(soon))).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
}

async fn renew(cluster: &RemoteCluster, directory: PathBuf) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let renewed = cluster.renew(RENEW_TIMEOUT).await?;
    let credentials = cluster.credentials().clone();
    tokio::task::spawn_blocking(move || credentials.keep(renewed, &directory)).await??;
    Ok(())
}
