//! What the cluster says is believed, carried out by a process: CAs and revocations, in use first, then on disk.
//!
//! Invariant: whatever the coordinators agreed on is in use as soon as the watch brings it; connections of those that are
//! not believed any more are cut then; what cannot be kept on disk is tried again until it is.

use std::path::{Path, PathBuf};
use std::time::Duration;

use forge_shared::cluster::certificate::Trust;
use forge_shared::cluster::event::{Change, Event, Kind, Object};

use super::calls::jittered;
use super::{RemoteCluster, keep_renewed};
use crate::api::{ClusterApi, WatchItem};
use crate::tls::{SharedCredentials, TlsError};

/// After what could not be carried out; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Keeps a worker's or gateway's certificate fresh and follows what the cluster believes, for ever. See [`keep_renewed`].
pub async fn keep_certificates(cluster: RemoteCluster, directory: PathBuf, left: impl Fn(i64) + Send) {
    let follow = follow_trust(&cluster, directory.clone());
    tokio::join!(keep_renewed(cluster.clone(), directory, left), follow);
}

async fn follow_trust(cluster: &RemoteCluster, directory: PathBuf) {
    let mut items = cluster.watch(vec![Kind::Trust], None);
    // What is not carried out yet, and for how long to wait with it.
    let mut open: Option<Box<Trust>> = None;
    let mut pause = FIRST_PAUSE;
    loop {
        let again = async { if open.is_some() { tokio::time::sleep(jittered(pause)).await } else { std::future::pending().await } };
        tokio::select! {
            item = items.recv() => match item {
                Some(WatchItem::Event(Event { change: Change::Put { object: Object::Trust(trust) }, .. })) => {
                    (open, pause) = (Some(trust), FIRST_PAUSE);
                }
                Some(_) => continue,
                None => return,
            },
            () = again => pause = (pause * 2).min(LONGEST_PAUSE),
        }
        let Some(trust) = open.clone() else { continue };
        let (credentials, directory) = (cluster.credentials().clone(), directory.clone());
        let believed = tokio::task::spawn_blocking(move || believe(&credentials, &trust, &directory)).await;
        match believed.map_err(|death| death.to_string()).and_then(|believed| believed.map_err(|error| error.to_string())) {
            Ok(()) => open = None,
            Err(error) => ::tracing::error!(error, "what the cluster believes is not carried out here yet; it is tried again"),
        }
    }
}

/// Carries out what the cluster believes: cuts connections, keeps the CAs beside the certificate, and asks for a new
/// certificate where the CA changes.
///
/// # Errors
/// CAs that cannot be used, files that cannot be written, or a certificate of a CA that is believed no more.
pub fn believe(credentials: &SharedCredentials, trust: &Trust, directory: &Path) -> Result<(), TlsError> {
    for whose in credentials.carry_out(trust, directory)? {
        ::tracing::warn!(whose, "cut a connection: its certificate was revoked, or is of a CA that is believed no more");
    }
    if trust.rotation.is_some() {
        credentials.renew_soon();
    }
    Ok(())
}
