//! Whom a process believes: CAs (two while one takes the other's place) and certificates that were taken back.
//!
//! Invariant: a certificate is believed if and only if one of these CAs signed it and its serial number was not revoked;
//! its names and its time are checked at the handshake besides.

use std::collections::BTreeSet;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{CertificateError, RootCertStore};
use rustls_pki_types::CertificateDer;
use x509_parser::prelude::FromDer;
use x509_parser::prelude::X509Certificate;

use super::credentials::serial_of;
use super::error::TlsError;
use super::peer::PeerCertificate;
use super::rustls_config::provider;

/// See the module.
pub(super) struct Trusted {
    cas: Vec<CertificateDer<'static>>,
    revoked: BTreeSet<String>,
    pub(super) servers: Arc<dyn ServerCertVerifier>,
    pub(super) clients: Arc<dyn ClientCertVerifier>,
}

impl std::fmt::Debug for Trusted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trusted").field("cas", &self.cas.len()).field("revoked", &self.revoked.len()).finish_non_exhaustive()
    }
}

impl Trusted {
    /// # Errors
    /// [`TlsError::Handshake`] for a CA that rustls cannot use.
    pub(super) fn new(cas: Vec<CertificateDer<'static>>, revoked: BTreeSet<String>) -> Result<Self, TlsError> {
        let unusable = |reason: String| TlsError::Handshake { reason };
        let roots = Arc::new(roots(&cas)?);
        let servers =
            WebPkiServerVerifier::builder_with_provider(roots.clone(), provider()).build().map_err(|error| unusable(error.to_string()))?;
        let clients = WebPkiClientVerifier::builder_with_provider(roots, provider())
            .allow_unauthenticated()
            .build()
            .map_err(|error| unusable(error.to_string()))?;
        Ok(Trusted { cas, revoked, servers, clients })
    }

    pub(super) fn cas(&self) -> &[CertificateDer<'static>] {
        &self.cas
    }

    pub(super) fn revoked(&self) -> &BTreeSet<String> {
        &self.revoked
    }

    /// Refuses one that was taken back, in a handshake.
    pub(super) fn check_revoked(&self, certificate: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        let serial = serial_of(certificate).map_err(|_| rustls::Error::InvalidCertificate(CertificateError::BadEncoding))?;
        if self.revoked.contains(&serial) { Err(rustls::Error::InvalidCertificate(CertificateError::Revoked)) } else { Ok(()) }
    }

    /// Whether a certificate that was believed once still is.
    pub(super) fn believes(&self, peer: &PeerCertificate) -> bool {
        !self.revoked.contains(&peer.serial) && issuer_among(&self.cas, &peer.certificate).is_some()
    }
}

/// The CA that signed a certificate, of these.
pub(super) fn issuer_among<'a>(
    cas: &'a [CertificateDer<'static>],
    certificate: &CertificateDer<'_>,
) -> Option<&'a CertificateDer<'static>> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    cas.iter().find(|ca| {
        let Ok((_, ca)) = X509Certificate::from_der(ca) else { return false };
        parsed.verify_signature(Some(ca.public_key())).is_ok()
    })
}

fn roots(cas: &[CertificateDer<'static>]) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for ca in cas {
        roots.add(ca.clone()).map_err(|error| TlsError::Handshake { reason: error.to_string() })?;
    }
    Ok(roots)
}
