//! The cluster's certificate authority: it is made once by `forgectl cluster init`, and every coordinator can sign.
//!
//! Invariant: of a signing request only the public key is used; names, role and lifetime are the signer's decision.

use std::path::Path;
use std::time::Duration;

use forge_shared::cluster::node::Role;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer};
use sha2::{Digest, Sha256};

use super::credentials::{certificates_of, parse_certificate, public_key_of};
use super::files::{self, CA_CERTIFICATE_FILE, CA_KEY_FILE};
use super::{Identity, TlsError, check_name};

/// Life of the CA's certificate: ten years.
pub const CA_LIFETIME: Duration = Duration::from_secs(3650 * 24 * 3600);
/// Life of a node's certificate: ninety days; it is renewed after two thirds of it.
pub const NODE_LIFETIME: Duration = Duration::from_secs(90 * 24 * 3600);
/// Certificates begin this long before they are made, for clocks that are behind and signers that are an hour ahead.
pub(super) const SKEW_S: u64 = 7_200;
/// A signing request with one key has a few hundred bytes.
const MAX_REQUEST_BYTES: usize = 16 << 10;
const NAME_PREFIX: &str = "Forge CA of ";

/// The CA's certificate and key.
pub struct ClusterCa {
    certificate: CertificateDer<'static>,
    certificate_pem: String,
    issuer: Issuer<'static, KeyPair>,
    cluster_id: String,
}

impl std::fmt::Debug for ClusterCa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClusterCa").field("cluster_id", &self.cluster_id).finish_non_exhaustive()
    }
}

impl ClusterCa {
    /// A new CA. `now_s` is seconds since 1970.
    ///
    /// # Errors
    /// [`TlsError::Name`] for a cluster id that is no DNS label.
    pub fn create(cluster_id: &str, now_s: u64) -> Result<Self, TlsError> {
        check_name("cluster id", cluster_id)?;
        let key = KeyPair::generate().map_err(broken)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(&format!("{NAME_PREFIX}{cluster_id}"));
        set_validity(&mut params, now_s, CA_LIFETIME);
        params.serial_number = Some(serial()?);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
        let certificate = params.self_signed(&key).map_err(broken)?;
        ClusterCa::from_pem(&certificate.pem(), &key.serialize_pem())
    }

    /// Reads both from PEM. Of several certificates it is the first of which there is a key.
    ///
    /// # Errors
    /// [`TlsError::Certificate`] if one cannot be parsed or they do not belong together.
    pub fn from_pem(certificate_pem: &str, key_pem: &str) -> Result<Self, TlsError> {
        let certificates = certificates_of(certificate_pem)?;
        ClusterCa::all_from_pem(certificate_pem, key_pem)?.into_iter().next().ok_or_else(|| {
            let count = certificates.len();
            TlsError::Certificate { reason: format!("the CA's key does not belong to its certificate ({count} looked at)") }
        })
    }

    /// Reads all CAs of which there are certificate and key, in the certificates' order.
    ///
    /// # Errors
    /// [`TlsError::Certificate`] if one cannot be parsed.
    pub fn all_from_pem(certificate_pem: &str, key_pem: &str) -> Result<Vec<Self>, TlsError> {
        let wrong = |error: String| TlsError::Certificate { reason: format!("the CA's key: {error}") };
        let mut keys = Vec::new();
        for der in PrivateKeyDer::pem_slice_iter(key_pem.as_bytes()) {
            keys.push(KeyPair::try_from(&der.map_err(|error| wrong(error.to_string()))?).map_err(|error| wrong(error.to_string()))?);
        }
        if keys.is_empty() {
            return Err(wrong("there is none".into()));
        }
        let mut found = Vec::new();
        for certificate in certificates_of(certificate_pem)? {
            let public = public_key_of(&certificate)?;
            if let Some(at) = keys.iter().position(|key| key.subject_public_key_info() == public) {
                found.push(ClusterCa::of(certificate, keys.swap_remove(at))?);
            }
        }
        Ok(found)
    }

    fn of(certificate: CertificateDer<'static>, key: KeyPair) -> Result<Self, TlsError> {
        let cluster_id = cluster_of(&certificate)?;
        let certificate_pem = super::credentials::certificate_pem_of(&certificate);
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(broken)?;
        Ok(ClusterCa { certificate, certificate_pem, issuer, cluster_id })
    }

    /// Reads `ca.pem` and `ca.key` of a directory.
    ///
    /// # Errors
    /// [`TlsError::File`] or [`TlsError::Certificate`].
    pub fn load(directory: &Path) -> Result<Self, TlsError> {
        let certificate = files::read(&directory.join(CA_CERTIFICATE_FILE))?;
        ClusterCa::from_pem(&certificate, &files::read_private(&directory.join(CA_KEY_FILE))?)
    }

    /// Writes `ca.pem` and `ca.key` into a directory, which is made if need be. Never over another CA.
    ///
    /// # Errors
    /// [`TlsError::File`], also where another CA lies there already.
    pub fn save(&self, directory: &Path) -> Result<(), TlsError> {
        let certificate = directory.join(CA_CERTIFICATE_FILE);
        let other = |text: &str| certificates_of(text).is_ok_and(|found| !found.contains(&self.certificate));
        if certificate.exists() && other(&files::read(&certificate)?) {
            return Err(files::file_error(&certificate, "another cluster's CA is here already: name another directory".into()));
        }
        files::write_private(&directory.join(CA_KEY_FILE), &self.key_pem())?;
        files::write_public(&certificate, &self.certificate_pem)
    }

    /// Signs a certificate over the public key of a signing request (PKCS#10, DER), in PEM. `now_s` is seconds since 1970.
    ///
    /// # Errors
    /// [`TlsError::Certificate`] for a request that cannot be parsed or is not signed by its own key, or an identity of
    /// another cluster.
    pub fn sign(&self, request_der: &[u8], identity: &Identity, lifetime: Duration, now_s: u64) -> Result<String, TlsError> {
        if identity.cluster_id != self.cluster_id {
            let reason = format!("{identity} cannot be signed by the CA of cluster {}", self.cluster_id);
            return Err(TlsError::Certificate { reason });
        }
        if request_der.len() > MAX_REQUEST_BYTES {
            let reason = format!("signing request of {} bytes; at most {MAX_REQUEST_BYTES}", request_der.len());
            return Err(TlsError::Certificate { reason });
        }
        let request = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(request_der))
            .map_err(|error| TlsError::Certificate { reason: format!("signing request: {error}") })?;
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(&identity.name);
        set_validity(&mut params, now_s, lifetime);
        params.serial_number = Some(serial()?);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = match identity.role {
            Role::Coordinator | Role::Worker => vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
            Role::Gateway | Role::Admin => vec![ExtendedKeyUsagePurpose::ClientAuth],
        };
        params.use_authority_key_identifier_extension = true;
        params.subject_alt_names.push(SanType::URI(identity.uri().try_into().map_err(broken)?));
        for name in identity.dns_names() {
            params.subject_alt_names.push(SanType::DnsName(name.try_into().map_err(broken)?));
        }
        let certificate = params.signed_by(&request.public_key, &self.issuer).map_err(broken)?;
        Ok(certificate.pem())
    }

    /// Of the cluster.
    pub fn cluster_id(&self) -> &str {
        &self.cluster_id
    }

    /// Its certificate.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// Its key: give it to coordinators alone.
    pub fn key_pem(&self) -> String {
        self.issuer.key().serialize_pem()
    }

    /// SHA-256 over its certificate's DER: what a join token pins.
    pub fn digest(&self) -> [u8; 32] {
        Sha256::digest(&self.certificate).into()
    }

    /// The digest in hex.
    pub fn digest_text(&self) -> String {
        digest_text(&self.certificate)
    }
}

/// SHA-256 over the DER of a CA's certificate in PEM: what a join token pins.
///
/// # Errors
/// [`TlsError::Certificate`] for text that is none.
pub fn ca_digest(pem: &str) -> Result<[u8; 32], TlsError> {
    let certificates = certificates_of(pem)?;
    Ok(certificates.first().map(|first| Sha256::digest(first).into()).unwrap_or_default())
}

/// Hex of SHA-256 over a certificate's DER.
pub(super) fn digest_text(certificate: &CertificateDer<'_>) -> String {
    hex::encode(Sha256::digest(certificate))
}

/// Whether these are CAs of this cluster.
pub(super) fn check_cluster(cas: &[CertificateDer<'_>], cluster_id: &str) -> Result<(), TlsError> {
    for ca in cas {
        if cluster_of(ca)? != cluster_id {
            return Err(TlsError::WrongCa { whose: format!("cluster {cluster_id}") });
        }
    }
    Ok(())
}

/// The cluster a CA's certificate is of.
pub(super) fn cluster_of(certificate: &CertificateDer<'_>) -> Result<String, TlsError> {
    let parsed = parse_certificate(certificate)?;
    let name = parsed.subject().iter_common_name().next().and_then(|name| name.as_str().ok()).unwrap_or_default();
    let cluster_id = name.strip_prefix(NAME_PREFIX).ok_or_else(|| TlsError::Certificate {
        reason: format!("{name:?} is no CA of a Forge cluster: give the ca.pem of `forgectl cluster init`"),
    })?;
    check_name("cluster id", cluster_id)?;
    Ok(cluster_id.to_owned())
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn serial() -> Result<SerialNumber, TlsError> {
    let mut bytes = [0u8; 16];
    getrandom::fill(&mut bytes).map_err(|error| TlsError::Certificate { reason: format!("no random numbers: {error}") })?;
    // A serial number is positive.
    bytes[0] &= 0x7f;
    Ok(SerialNumber::from_slice(&bytes))
}

/// The latest time a certificate can carry is the end of year 9999.
const LAST_S: u64 = 253_402_300_799;

fn set_validity(params: &mut CertificateParams, now_s: u64, lifetime: Duration) {
    let begin = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = begin + Duration::from_secs(now_s.saturating_sub(SKEW_S).min(LAST_S));
    params.not_after = begin + Duration::from_secs(now_s.saturating_add(lifetime.as_secs()).min(LAST_S));
}

fn broken(error: rcgen::Error) -> TlsError {
    TlsError::Certificate { reason: error.to_string() }
}
