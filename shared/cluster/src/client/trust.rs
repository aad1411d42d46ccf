//! What the cluster says is believed, carried out by a process: CAs and revocations, in use first, then on disk.
//!
//! Invariant: whatever the coordinators agreed on is in use as soon as the watch brings it; connections of those that are
//! not believed any more are cut then.

use std::path::{Path, PathBuf};

use forge_shared::cluster::certificate::Trust;
use forge_shared::cluster::event::{Change, Event, Kind, Object};

use super::{RemoteCluster, keep_renewed};
use crate::api::{ClusterApi, WatchItem};
use crate::tls::{SharedCredentials, TlsError};

/// Keeps a worker's or gateway's certificate fresh and follows what the cluster believes, for ever. See [`keep_renewed`].
pub async fn keep_certificates(cluster: RemoteCluster, directory: PathBuf, left: impl Fn(i64) + Send) {
    let follow = follow_trust(&cluster, directory.clone());
    tokio::join!(keep_renewed(cluster.clone(), directory, left), follow);
}

async fn follow_trust(cluster: &RemoteCluster, directory: PathBuf) {
    let mut items = cluster.watch(vec![Kind::Trust], None);
    while let Some(item) = items.recv().await {
        let WatchItem::Event(Event { change: Change::Put { object: Object::Trust(trust) }, .. }) = item else { continue };
        let (credentials, directory) = (cluster.credentials().clone(), directory.clone());
        let believed = tokio::task::spawn_blocking(move || believe(&credentials, &trust, &directory)).await;
        match believed {
            Ok(Ok(())) => {}
            Ok(Err(error)) => ::tracing::error!(%error, "what the cluster believes cannot be carried out here"),
            Err(death) => ::tracing::error!(%death, "what the cluster believes cannot be carried out here"),
        }
    }
}

/// Carries out what the cluster believes: cuts connections, keeps the CAs beside the certificate, and asks for a new
/// certificate where the CA changes.
///
/// # Errors
/// CAs that cannot be used, files that cannot be written, or a certificate of a CA that is believed no more.
pub fn believe(credentials: &SharedCredentials, trust: &Trust, directory: &Path) -> Result<(), TlsError> {
    let held = credentials.get();
    let cas_pem = trust.cas_pem(held.ca_pem());
    for whose in credentials.trust(&cas_pem, trust.revoked.clone())? {
        ::tracing::warn!(whose, "cut a connection: its certificate was revoked, or is of a CA that is believed no more");
    }
    if held.ca_pem() != cas_pem {
        let beside = held.with_cas(&cas_pem)?;
        beside.save(directory)?;
        credentials.replace(beside)?;
    }
    if trust.rotation.is_some() {
        credentials.renew_soon();
    }
    Ok(())
}
