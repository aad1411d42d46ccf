//! Who called: read from the connection's certificate, checked per call.

use std::sync::Arc;

use forge_shared::cluster::node::Role;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use tonic::Request;

use super::connections::Caller;
use super::credentials::{check_time, identity_of, parse_certificate, serial_of, validity_of};
use super::{Identity, TlsError};

/// What a peer showed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerCertificate {
    /// Who it is.
    pub identity: Identity,
    /// Its serial number, in hex.
    pub serial: String,
    /// When it begins, seconds since 1970.
    pub begins_s: u64,
    /// When it ends, seconds since 1970.
    pub ends_s: u64,
    /// All of it.
    pub(super) certificate: CertificateDer<'static>,
}

impl PeerCertificate {
    /// Of a certificate in PEM.
    ///
    /// # Errors
    /// [`TlsError::Certificate`] for one that is none of Forge's.
    pub fn from_pem(pem: &str) -> Result<Self, TlsError> {
        let certificate = CertificateDer::from_pem_slice(pem.as_bytes());
        PeerCertificate::read(&certificate.map_err(|error| TlsError::Certificate { reason: error.to_string() })?)
    }

    /// # Errors
    /// [`TlsError::Certificate`] for one that is none of Forge's.
    pub(super) fn read(certificate: &CertificateDer<'_>) -> Result<Self, TlsError> {
        let (begins_s, ends_s) = validity_of(&parse_certificate(certificate)?);
        Ok(PeerCertificate {
            identity: identity_of(certificate)?,
            serial: serial_of(certificate)?,
            begins_s,
            ends_s,
            certificate: certificate.clone().into_owned(),
        })
    }

    /// Hex of SHA-256 over the CA's certificate that signed it, of these (PEM).
    pub fn issuer_sha256(&self, cas_pem: &str) -> Option<String> {
        let cas = super::credentials::certificates_of(cas_pem).ok()?;
        super::trusted::issuer_among(&cas, &self.certificate).map(super::ca::digest_text)
    }
}

/// Reads callers' identities.
#[derive(Debug, Clone, Copy)]
pub struct Peer;

impl Peer {
    /// Who made this call. A connection may live longer than its certificate: the time is checked too.
    ///
    /// # Errors
    /// [`TlsError::NoCertificate`], or [`TlsError::Expired`].
    pub fn of<T>(request: &Request<T>) -> Result<Identity, TlsError> {
        Ok(Peer::certificate(request)?.identity.clone())
    }

    /// The certificate of who made this call.
    ///
    /// # Errors
    /// As [`Peer::of`].
    pub fn certificate<T>(request: &Request<T>) -> Result<Arc<PeerCertificate>, TlsError> {
        let caller = request.extensions().get::<Caller>().ok_or(TlsError::NoCertificate)?;
        let certificate = caller.certificate.as_ref().ok_or(TlsError::NoCertificate)?;
        check_time(&certificate.identity.to_string(), (certificate.begins_s, certificate.ends_s), caller.clock.now_s())?;
        Ok(certificate.clone())
    }

    /// Who made this call, if it has one of these roles.
    ///
    /// # Errors
    /// As [`Peer::of`], and [`TlsError::WrongRole`].
    pub fn require<T>(request: &Request<T>, allowed: &[Role]) -> Result<Identity, TlsError> {
        let identity = Peer::of(request)?;
        if allowed.contains(&identity.role) {
            return Ok(identity);
        }
        Err(TlsError::wrong_role(&identity, allowed))
    }
}
