//! A coordinator's certificates: it carries out what the log says is believed, and writes down whom it sees.
//!
//! Invariant: a certificate that is given out stands in the log before its holder has it, or it is not given out; any other,
//! as those made by hand with the CA's key and those of the first level, stands there once the leader has seen it.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use forge_cluster::client::{RemoteCluster, believe};
use forge_cluster::tls::{ClusterCa, PeerCertificate, SharedCredentials, TlsError, issued_s};
use forge_shared::cluster::Revision;
use forge_shared::cluster::certificate::{CertificateRecord, Trust};
use forge_shared::cluster::command::{Command, CommandError};

use crate::coordinator::Coordinator;
use crate::error::CoordinatorError;
use crate::server::Shared;
use crate::signing::{SigningCas, ca_record};

/// How often the leader looks at who is connected.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Certificates written down at one look.
const AT_ONCE: usize = 64;
/// For a CA's key from another coordinator.
const FETCH_WITHIN: Duration = Duration::from_secs(5);
/// For one of them.
const RECORD_WITHIN: Duration = Duration::from_secs(5);

/// What the log keeps of a certificate that was signed. `cas_pem` are the CAs that may have signed it.
pub(crate) fn record_of(certificate: &PeerCertificate, cas_pem: &str, believes: Vec<String>) -> Option<CertificateRecord> {
    Some(CertificateRecord {
        serial: certificate.serial.clone(),
        role: certificate.identity.role,
        name: certificate.identity.name.clone(),
        issued_s: issued_s(certificate.begins_s, certificate.ends_s),
        expires_s: certificate.ends_s,
        ca_sha256: certificate.issuer_sha256(cas_pem)?,
        believes,
        is_used: false,
        written: Revision::default(),
        revoked_s: None,
    })
}

/// The same of one that somebody showed.
pub(crate) fn seen_record_of(certificate: &PeerCertificate, cas_pem: &str) -> Option<CertificateRecord> {
    Some(CertificateRecord { is_used: true, ..record_of(certificate, cas_pem, Vec::new())? })
}

impl Coordinator {
    /// Writes a signed certificate down; `asked_with` is the serial number of the one that asked for it.
    pub(crate) async fn record_signed(
        &self,
        certificate: CertificateRecord,
        asked_with: Option<String>,
        timeout: Duration,
    ) -> Result<(), CoordinatorError> {
        let id = format!("certificate-{}", certificate.serial);
        self.submit(self.own(id, Command::RecordCertificate { certificate: Box::new(certificate), asked_with }), timeout).await?;
        Ok(())
    }

    /// Writes down that somebody showed a certificate; `occasion` tells this time from others.
    pub(crate) async fn record_shown(
        &self,
        certificate: CertificateRecord,
        occasion: &str,
        timeout: Duration,
    ) -> Result<(), CoordinatorError> {
        let id = format!("shown-{}-{occasion}", certificate.serial);
        let command = Command::RecordCertificate { certificate: Box::new(certificate), asked_with: None };
        self.submit(self.own(id, command), timeout).await?;
        Ok(())
    }
}

impl Shared {
    /// Makes a CA, keeps its key here, and has it believed beside the one that signs; hex of its digest.
    pub(crate) async fn begin_ca_rotation(&self, timeout: Duration) -> Result<String, CoordinatorError> {
        let coordinator = &self.coordinator;
        let term = coordinator.leading()?.term();
        coordinator.0.raft.read_index(timeout).await.map_err(|error| coordinator.raft_error(error))?;
        let trust = coordinator.0.replicated.read().trust().clone();
        if trust.rotation.is_some() {
            let reason = "a CA is rotated already: `forgectl cluster certs rotate-ca` goes on with it".into();
            return Err(CoordinatorError::Command(CommandError::Unsafe { reason }));
        }
        let from = ca_record(&*self.cas.signing(&trust)?);
        let wrong = |error: TlsError| CoordinatorError::message("ca", error);
        let new = ClusterCa::create(&coordinator.0.options.cluster_id, self.credentials.clock().now_s()).map_err(wrong)?;
        let to = ca_record(&new);
        let sha256 = to.sha256.clone();
        let command = Command::BeginCaRotation { from, to };
        coordinator.0.replicated.read().check_level(&command)?;
        // Before anybody believes it: a leader that dies in between leaves a key that means nothing.
        self.cas.introduce(new).map_err(wrong)?;
        let id = format!("rotate-ca-{term}-{}", &sha256[..16]);
        let begun = coordinator.submit(coordinator.own(id, command), timeout).await;
        if let Err(CoordinatorError::Command(_)) = &begun {
            self.cas.give_up(&sha256);
        }
        begun?;
        Ok(sha256)
    }
}

/// What a coordinator carries the cluster's trust out on.
pub(crate) struct Keeper {
    pub(crate) credentials: SharedCredentials,
    pub(crate) cas: Arc<SigningCas>,
    /// Of its certificate and the CAs.
    pub(crate) directory: PathBuf,
}

/// Follows what the log says is believed, until the coordinator stops. Revocations count at once; a new CA is believed, and
/// that said, only when its key is here too: every coordinator can sign with it by the time that it signs.
pub(crate) async fn follow_trust(coordinator: Coordinator, keeper: Keeper) {
    let mut changes = coordinator.0.replicated.changes();
    let mut done: Option<Trust> = None;
    loop {
        changes.borrow_and_update();
        let trust = coordinator.0.replicated.read().trust().clone();
        let mut is_done = done.as_ref() == Some(&trust);
        if !is_done {
            match carry_out(&coordinator, &keeper, &trust).await {
                Ok(()) => is_done = true,
                Err(reason) => tracing::warn!(reason, "what the cluster believes is not carried out here yet"),
            }
            done = is_done.then_some(trust);
        }
        let again = async { if is_done { std::future::pending().await } else { tokio::time::sleep(LOOK_INTERVAL).await } };
        tokio::select! {
            () = coordinator.0.stop.cancelled() => return,
            changed = changes.changed() => if changed.is_err() { return },
            () = again => {}
        }
    }
}

async fn carry_out(coordinator: &Coordinator, keeper: &Keeper, trust: &Trust) -> Result<(), String> {
    let Keeper { credentials, cas, directory } = keeper;
    let said = |error: TlsError| error.to_string();
    for whose in credentials.revoke(trust.revoked.clone()).map_err(said)? {
        tracing::warn!(whose, "cut a connection: its certificate was revoked");
    }
    for missing in cas.adopt(trust).map_err(said)? {
        let key = fetch_key(coordinator, credentials, &missing.sha256).await?;
        cas.add(ClusterCa::from_pem(&missing.certificate_pem, &key).map_err(said)?).map_err(said)?;
        tracing::info!(ca = missing.sha256, "the key of a CA came from another coordinator");
    }
    believe(credentials, trust, directory).map_err(said)?;
    if trust.rotation.is_none() { cas.retain(trust).map_err(said) } else { Ok(()) }
}

async fn fetch_key(coordinator: &Coordinator, credentials: &SharedCredentials, sha256: &str) -> Result<String, String> {
    let own = &coordinator.0.options.address;
    let members = coordinator.group_status().members.into_iter().map(|member| member.address);
    let others: Vec<String> = members.filter(|address| !address.is_empty() && address != own).collect();
    let others = RemoteCluster::new(&others, credentials).map_err(|error| error.to_string())?;
    others.signing_key(sha256, FETCH_WITHIN).await.map_err(|error| format!("the key of CA {sha256}: {error}"))
}

/// While this coordinator leads, writes down certificates that it sees and the log does not have, or not as used: its own,
/// and those that were made with the CA's key.
pub(crate) async fn record_seen(coordinator: Coordinator, credentials: SharedCredentials) {
    // What was written down once is not told again, whatever became of it.
    let mut told: BTreeSet<String> = BTreeSet::new();
    loop {
        tokio::select! {
            () = coordinator.0.stop.cancelled() => return,
            () = tokio::time::sleep(LOOK_INTERVAL) => {}
        }
        let Ok(term) = coordinator.leading().map(|leading| leading.term()) else {
            told.clear();
            continue;
        };
        let held = credentials.get();
        let own = PeerCertificate::from_pem(held.certificate_pem());
        let mut seen: Vec<PeerCertificate> = credentials.peers().iter().map(|peer| PeerCertificate::clone(peer)).collect();
        seen.extend(own.inspect_err(|error| tracing::error!(%error, "this coordinator's own certificate")));
        let unknown: Vec<PeerCertificate> = {
            let state = coordinator.0.replicated.read();
            let now_s = credentials.clock().now_s();
            let mut serials = BTreeSet::new();
            seen.retain(|peer| serials.insert(peer.serial.clone()));
            told.retain(|serial| serials.contains(serial));
            let is_known = |peer: &PeerCertificate| state.certificate(&peer.serial).is_some_and(|known| known.is_used);
            let is_new = |peer: &PeerCertificate| !is_known(peer) && peer.ends_s > now_s && !told.contains(&peer.serial);
            seen.into_iter().filter(is_new).take(AT_ONCE).collect()
        };
        for peer in unknown {
            let Some(record) = seen_record_of(&peer, held.ca_pem()) else { continue };
            match coordinator.record_shown(record, &format!("to-{term}"), RECORD_WITHIN).await {
                Ok(()) => drop(told.insert(peer.serial)),
                Err(error) => tracing::debug!(%error, "a certificate that was seen is not written down yet"),
            }
        }
    }
}
