//! What a process shows and believes: its certificate, its key, and the cluster's CA.
//!
//! Invariant: a `Credentials` is complete: the certificate belongs to the key, is signed by the CA beside it, and carries
//! an identity of the CA's cluster.

use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use parking_lot::RwLock;
use rcgen::{CertificateParams, KeyPair, PublicKeyData};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use sha2::{Digest, Sha256};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::ca::cluster_of;
use super::files::{self, CA_CERTIFICATE_FILE, NODE_FILE};
use super::{Identity, TlsError};

/// A process's private key, before it has a certificate.
pub struct NodeKey(KeyPair);

impl std::fmt::Debug for NodeKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("NodeKey(..)")
    }
}

impl NodeKey {
    /// A new key (ECDSA, P-256).
    ///
    /// # Errors
    /// [`TlsError::Certificate`] if the system gives no random numbers.
    pub fn generate() -> Result<Self, TlsError> {
        KeyPair::generate().map(NodeKey).map_err(|error| TlsError::Certificate { reason: format!("key: {error}") })
    }

    /// A signing request for its public key: PKCS#10, DER.
    ///
    /// # Errors
    /// [`TlsError::Certificate`].
    pub fn signing_request_der(&self) -> Result<Vec<u8>, TlsError> {
        let request = CertificateParams::default().serialize_request(&self.0);
        let request = request.map_err(|error| TlsError::Certificate { reason: format!("signing request: {error}") })?;
        Ok(request.der().to_vec())
    }

    /// In PEM (PKCS#8).
    pub fn pem(&self) -> String {
        self.0.serialize_pem()
    }
}

/// A certificate with its key and the CA to believe.
pub struct Credentials {
    identity: Identity,
    certificate: CertificateDer<'static>,
    ca: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
    certificate_pem: String,
    key_pem: String,
    ca_pem: String,
    begins_s: u64,
    ends_s: u64,
}

impl Clone for Credentials {
    fn clone(&self) -> Self {
        Credentials {
            identity: self.identity.clone(),
            certificate: self.certificate.clone(),
            ca: self.ca.clone(),
            key: self.key.clone_key(),
            certificate_pem: self.certificate_pem.clone(),
            key_pem: self.key_pem.clone(),
            ca_pem: self.ca_pem.clone(),
            begins_s: self.begins_s,
            ends_s: self.ends_s,
        }
    }
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("identity", &self.identity).field("ends_s", &self.ends_s).finish_non_exhaustive()
    }
}

impl Credentials {
    /// Reads and checks all three.
    ///
    /// # Errors
    /// [`TlsError::Certificate`] or [`TlsError::WrongCa`] for parts that cannot be used or do not belong together.
    pub fn from_pem(certificate_pem: &str, key_pem: &str, ca_pem: &str) -> Result<Self, TlsError> {
        let part = |what: &str, error: rustls_pki_types::pem::Error| TlsError::Certificate { reason: format!("{what}: {error}") };
        let certificate =
            CertificateDer::from_pem_slice(certificate_pem.as_bytes()).map_err(|error| part("certificate", error))?.into_owned();
        let ca = CertificateDer::from_pem_slice(ca_pem.as_bytes()).map_err(|error| part("certificate of the CA", error))?.into_owned();
        let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes()).map_err(|error| part("private key", error))?.clone_key();
        let pair = KeyPair::try_from(&key).map_err(|error| TlsError::Certificate { reason: format!("private key: {error}") })?;
        if public_key_of(&certificate)? != pair.subject_public_key_info() {
            return Err(TlsError::Certificate { reason: "the private key does not belong to the certificate".into() });
        }
        let cluster_id = cluster_of(&ca)?;
        let identity = identity_of(&certificate)?;
        let (parsed, parsed_ca) = (parse_certificate(&certificate)?, parse_certificate(&ca)?);
        let whose = || TlsError::WrongCa { whose: identity.to_string() };
        parsed.verify_signature(Some(parsed_ca.public_key())).map_err(|_| whose())?;
        if identity.cluster_id != cluster_id {
            return Err(whose());
        }
        let (begins_s, ends_s) = validity_of(&parsed);
        Ok(Credentials {
            identity,
            certificate_pem: certificate_pem_of(&certificate),
            key_pem: pair.serialize_pem(),
            ca_pem: certificate_pem_of(&ca),
            certificate,
            ca,
            key,
            begins_s,
            ends_s,
        })
    }

    /// Reads `node.pem` and `ca.pem` of a directory.
    ///
    /// # Errors
    /// [`TlsError::File`], and as [`Credentials::from_pem`].
    pub fn load(directory: &Path) -> Result<Self, TlsError> {
        let node = files::read_private(&directory.join(NODE_FILE))?;
        Credentials::from_pem(&node, &node, &files::read(&directory.join(CA_CERTIFICATE_FILE))?)
    }

    /// Writes `node.pem` (certificate and key) and `ca.pem` into a directory, which is made if need be.
    ///
    /// # Errors
    /// [`TlsError::File`].
    pub fn save(&self, directory: &Path) -> Result<(), TlsError> {
        files::write_public(&directory.join(CA_CERTIFICATE_FILE), &self.ca_pem)?;
        files::write_private(&directory.join(NODE_FILE), &format!("{}{}", self.certificate_pem, self.key_pem))
    }

    /// Who this is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The CA's certificate.
    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// The certificate, without the key.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// The key, for whoever stores it.
    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// SHA-256 over the CA certificate's DER: what a join token pins.
    pub fn ca_digest(&self) -> [u8; 32] {
        Sha256::digest(&self.ca).into()
    }

    /// Whether it may be shown at `now_s` (seconds since 1970).
    ///
    /// # Errors
    /// [`TlsError::Expired`] or [`TlsError::NotYetValid`].
    pub fn check_time(&self, now_s: u64) -> Result<(), TlsError> {
        check_time(&self.identity.to_string(), (self.begins_s, self.ends_s), now_s)
    }

    /// From when on it should be renewed: two thirds of its life, seconds since 1970.
    pub fn renew_at_s(&self) -> u64 {
        self.begins_s + (self.ends_s - self.begins_s) / 3 * 2
    }

    pub(super) fn chain(&self) -> Vec<CertificateDer<'static>> {
        // The CA comes along so that a joining process can hold it against its token.
        vec![self.certificate.clone(), self.ca.clone()]
    }

    pub(super) fn key(&self) -> PrivateKeyDer<'static> {
        self.key.clone_key()
    }

    pub(super) fn ca(&self) -> &CertificateDer<'static> {
        &self.ca
    }
}

/// Credentials that can be replaced while connections use them: new handshakes take the newest.
#[derive(Debug, Clone)]
pub struct SharedCredentials(Arc<RwLock<Arc<Credentials>>>);

impl SharedCredentials {
    /// Begins with these.
    pub fn new(credentials: Credentials) -> Self {
        SharedCredentials(Arc::new(RwLock::new(Arc::new(credentials))))
    }

    /// The newest.
    pub fn get(&self) -> Arc<Credentials> {
        self.0.read().clone()
    }

    /// From now on these, of the same process.
    ///
    /// # Errors
    /// [`TlsError::WrongPeer`] for another process's.
    pub fn replace(&self, credentials: Credentials) -> Result<(), TlsError> {
        let mut held = self.0.write();
        if held.identity != credentials.identity || held.ca != credentials.ca {
            return Err(TlsError::WrongPeer { expected: held.identity.to_string() });
        }
        *held = Arc::new(credentials);
        Ok(())
    }
}

fn certificate_pem_of(certificate: &CertificateDer<'_>) -> String {
    let text = STANDARD.encode(certificate);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in text.as_bytes().chunks(64) {
        pem.push_str(&String::from_utf8_lossy(line));
        pem.push('\n');
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
}

/// Seconds since 1970 by this machine's clock, for checks of certificates.
pub(crate) fn clock_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

pub(super) fn check_time(whose: &str, (begins_s, ends_s): (u64, u64), now_s: u64) -> Result<(), TlsError> {
    if now_s < begins_s {
        return Err(TlsError::NotYetValid { whose: whose.into() });
    }
    if now_s > ends_s {
        return Err(TlsError::Expired { whose: whose.into() });
    }
    Ok(())
}

/// Beginning and end, seconds since 1970.
pub(super) fn validity_of(certificate: &X509Certificate<'_>) -> (u64, u64) {
    let seconds = |time: x509_parser::time::ASN1Time| u64::try_from(time.timestamp()).unwrap_or(0);
    (seconds(certificate.validity().not_before), seconds(certificate.validity().not_after))
}

pub(super) fn parse_certificate<'a>(certificate: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, TlsError> {
    match X509Certificate::from_der(certificate) {
        Ok(([], parsed)) => Ok(parsed),
        Ok(_) => Err(TlsError::Certificate { reason: "bytes follow it".into() }),
        Err(error) => Err(TlsError::Certificate { reason: format!("cannot be parsed: {error}") }),
    }
}

/// SubjectPublicKeyInfo, DER.
pub(super) fn public_key_of(certificate: &CertificateDer<'_>) -> Result<Vec<u8>, TlsError> {
    Ok(parse_certificate(certificate)?.public_key().raw.to_vec())
}

/// The one `forge://` URI of a certificate.
pub(super) fn identity_of(certificate: &CertificateDer<'_>) -> Result<Identity, TlsError> {
    let parsed = parse_certificate(certificate)?;
    let names = parsed.subject_alternative_name().map_err(|error| TlsError::Certificate { reason: format!("its names: {error}") })?;
    let uris: Vec<&str> = names
        .iter()
        .flat_map(|names| &names.value.general_names)
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect();
    match uris.as_slice() {
        [uri] => Identity::from_uri(uri),
        _ => Err(TlsError::Certificate { reason: format!("it has {} identities (SAN URI); a Forge certificate has one", uris.len()) }),
    }
}
