//! What a process shows and believes: its certificate, its key, and the cluster's CA; two of those while one takes the
//! other's place.
//!
//! Invariant: a `Credentials` is complete: the certificate belongs to the key, is signed by one of the CAs beside it, and
//! carries an identity of their cluster.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rcgen::{CertificateParams, KeyPair, PublicKeyData};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use sha2::{Digest, Sha256};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::ca::{SKEW_S, check_cluster};
use super::files::{self, CA_CERTIFICATE_FILE, NODE_FILE};
use super::trusted::{Trusted, issuer_among};
use super::{Identity, TlsError};

/// A cluster has one CA, and two while it changes it.
const MAX_CAS: usize = 8;

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

/// A certificate with its key and the CAs to believe.
pub struct Credentials {
    identity: Identity,
    certificate: CertificateDer<'static>,
    /// That signed the certificate.
    issuer: CertificateDer<'static>,
    trusted: Arc<Trusted>,
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
            issuer: self.issuer.clone(),
            trusted: self.trusted.clone(),
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
    /// Reads and checks all three; `ca_pem` is one CA, or several one after the other.
    ///
    /// # Errors
    /// [`TlsError::Certificate`] or [`TlsError::WrongCa`] for parts that cannot be used or do not belong together.
    pub fn from_pem(certificate_pem: &str, key_pem: &str, ca_pem: &str) -> Result<Self, TlsError> {
        let part = |what: &str, error: rustls_pki_types::pem::Error| TlsError::Certificate { reason: format!("{what}: {error}") };
        let certificate =
            CertificateDer::from_pem_slice(certificate_pem.as_bytes()).map_err(|error| part("certificate", error))?.into_owned();
        let cas = certificates_of(ca_pem)?;
        let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes()).map_err(|error| part("private key", error))?.clone_key();
        let pair = KeyPair::try_from(&key).map_err(|error| TlsError::Certificate { reason: format!("private key: {error}") })?;
        if public_key_of(&certificate)? != pair.subject_public_key_info() {
            return Err(TlsError::Certificate { reason: "the private key does not belong to the certificate".into() });
        }
        let identity = identity_of(&certificate)?;
        let whose = || TlsError::WrongCa { whose: identity.to_string() };
        check_cluster(&cas, &identity.cluster_id).map_err(|error| match error {
            TlsError::WrongCa { .. } => whose(),
            error => error,
        })?;
        let issuer = issuer_among(&cas, &certificate).ok_or_else(whose)?.clone();
        let (begins_s, ends_s) = validity_of(&parse_certificate(&certificate)?);
        Ok(Credentials {
            identity,
            certificate_pem: certificate_pem_of(&certificate),
            key_pem: pair.serialize_pem(),
            ca_pem: cas.iter().map(|ca| certificate_pem_of(ca)).collect(),
            trusted: Arc::new(Trusted::new(cas, BTreeSet::new())?),
            certificate,
            issuer,
            key,
            begins_s,
            ends_s,
        })
    }

    /// The same certificate beside other CAs.
    ///
    /// # Errors
    /// As [`Credentials::from_pem`].
    pub fn with_cas(&self, cas_pem: &str) -> Result<Self, TlsError> {
        Credentials::from_pem(&self.certificate_pem, &self.key_pem, cas_pem)
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

    /// The certificates of the CAs to believe, one after the other.
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

    /// SHA-256 over the DER of the certificate of the CA that signed this: what a join token pins.
    pub fn ca_digest(&self) -> [u8; 32] {
        Sha256::digest(&self.issuer).into()
    }

    /// Its serial number, in hex.
    ///
    /// # Errors
    /// None that `from_pem` lets through.
    pub fn serial(&self) -> Result<String, TlsError> {
        serial_of(&self.certificate)
    }

    /// When it was issued, seconds since 1970: it begins a little earlier, for clocks that are behind.
    pub fn issued_s(&self) -> u64 {
        issued_s(self.begins_s, self.ends_s)
    }

    /// When it ends, seconds since 1970.
    pub fn ends_s(&self) -> u64 {
        self.ends_s
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
        let issued_s = self.issued_s();
        issued_s + self.ends_s.saturating_sub(issued_s) * 2 / 3
    }

    pub(super) fn chain(&self) -> Vec<CertificateDer<'static>> {
        // The CA comes along so that a joining process can hold it against its token.
        vec![self.certificate.clone(), self.issuer.clone()]
    }

    pub(super) fn key(&self) -> PrivateKeyDer<'static> {
        self.key.clone_key()
    }

    pub(super) fn trusted(&self) -> &Arc<Trusted> {
        &self.trusted
    }
}

/// When a certificate with this validity was issued, seconds since 1970.
pub fn issued_s(begins_s: u64, ends_s: u64) -> u64 {
    begins_s.saturating_add(SKEW_S).min(ends_s)
}

/// All certificates of a text in PEM, at least one.
pub(super) fn certificates_of(pem: &str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let wrong = |reason: String| TlsError::Certificate { reason: format!("certificate of the CA: {reason}") };
    let mut found = Vec::new();
    for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
        if found.len() == MAX_CAS {
            return Err(wrong(format!("there are more than {MAX_CAS}")));
        }
        found.push(certificate.map_err(|error| wrong(error.to_string()))?.into_owned());
    }
    if found.is_empty() { Err(wrong("there is none".into())) } else { Ok(found) }
}

pub(super) fn certificate_pem_of(certificate: &CertificateDer<'_>) -> String {
    let text = STANDARD.encode(certificate);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in text.as_bytes().chunks(64) {
        pem.push_str(&String::from_utf8_lossy(line));
        pem.push('\n');
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
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

/// Its serial number as hex digits without zeros before it.
pub(super) fn serial_of(certificate: &CertificateDer<'_>) -> Result<String, TlsError> {
    let parsed = parse_certificate(certificate)?;
    let bytes = parsed.raw_serial();
    let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
    Ok(hex::encode(&bytes[zeros..]))
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
