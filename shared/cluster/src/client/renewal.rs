//! Keeps a process's certificate fresh: renews it after two thirds of its life, on disk first, then in use.

use std::path::PathBuf;
use std::time::Duration;

use super::RemoteCluster;
use super::calls::jittered;
use crate::tls::clock_s;

/// How often to look, and to try again.
const LOOK_INTERVAL: Duration = Duration::from_secs(600);
const RENEW_TIMEOUT: Duration = Duration::from_secs(30);

/// Runs for ever beside a process. `directory` is where its `node.pem` lies.
pub async fn keep_renewed(cluster: RemoteCluster, directory: PathBuf) {
    loop {
        let held = cluster.credentials().get();
        if clock_s() >= held.renew_at_s() {
            match renew(&cluster, directory.clone()).await {
                Ok(()) => ::tracing::info!(identity = %held.identity(), "renewed the certificate"),
                Err(error) => ::tracing::warn!(%error, "could not renew the certificate; trying again later"),
            }
        }
        tokio::time::sleep(jittered(LOOK_INTERVAL)).await;
    }
}

async fn renew(cluster: &RemoteCluster, directory: PathBuf) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let renewed = cluster.renew(RENEW_TIMEOUT).await?;
    let saved = renewed.clone();
    tokio::task::spawn_blocking(move || saved.save(&directory)).await??;
    cluster.credentials().replace(renewed)?;
    Ok(())
}
