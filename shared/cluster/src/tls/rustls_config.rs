//! rustls configurations: TLS 1.3 with ring, HTTP/2, credentials that are looked up at every handshake.

use std::sync::Arc;

use rustls::client::danger::ServerCertVerifier;
use rustls::client::{ResolvesClientCert, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, RootCertStore, ServerConfig, SignatureScheme};
use rustls_pki_types::CertificateDer;

use super::credentials::{Credentials, SharedCredentials};
use super::error::TlsError;

const HTTP2: &[u8] = b"h2";

/// A server that takes clients with a certificate of the cluster's CA, or with none: what each may do is decided per call
/// ([`super::Peer`]).
///
/// # Errors
/// [`TlsError::Handshake`] if the credentials cannot be used.
pub fn server_config(credentials: &SharedCredentials) -> Result<ServerConfig, TlsError> {
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots(credentials.get().ca())?), provider())
        .allow_unauthenticated()
        .build()
        .map_err(|error| TlsError::Handshake { reason: error.to_string() })?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(unusable)?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(Resolver::new(credentials)?));
    config.alpn_protocols = vec![HTTP2.to_vec()];
    Ok(config)
}

/// A client that shows its certificate and believes servers of the cluster's CA.
///
/// # Errors
/// [`TlsError::Handshake`] if the credentials cannot be used.
pub fn client_config(credentials: &SharedCredentials) -> Result<ClientConfig, TlsError> {
    let verifier = server_verifier(credentials.get().ca())?;
    let config = client_builder(verifier)?.with_client_cert_resolver(Arc::new(Resolver::new(credentials)?));
    Ok(with_http2(config))
}

/// A client without a certificate that believes what `verifier` does.
pub(super) fn anonymous_client_config(verifier: Arc<dyn ServerCertVerifier>) -> Result<ClientConfig, TlsError> {
    Ok(with_http2(client_builder(verifier)?.with_no_client_auth()))
}

/// Believes certificates of this CA.
pub(super) fn server_verifier(ca: &CertificateDer<'_>) -> Result<Arc<dyn ServerCertVerifier>, TlsError> {
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots(ca)?), provider())
        .build()
        .map_err(|error| TlsError::Handshake { reason: error.to_string() })?;
    Ok(verifier)
}

pub(super) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn client_builder(
    verifier: Arc<dyn ServerCertVerifier>,
) -> Result<rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>, TlsError> {
    Ok(ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(unusable)?
        .dangerous()
        .with_custom_certificate_verifier(verifier))
}

fn with_http2(mut config: ClientConfig) -> ClientConfig {
    config.alpn_protocols = vec![HTTP2.to_vec()];
    // A resumed session would not be asked for its certificate again.
    config.resumption = rustls::client::Resumption::disabled();
    config
}

fn roots(ca: &CertificateDer<'_>) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.clone().into_owned()).map_err(unusable)?;
    Ok(roots)
}

fn unusable(error: rustls::Error) -> TlsError {
    TlsError::Handshake { reason: error.to_string() }
}

/// Gives the newest credentials.
#[derive(Debug)]
struct Resolver {
    shared: SharedCredentials,
}

impl Resolver {
    fn new(shared: &SharedCredentials) -> Result<Self, TlsError> {
        certified(&shared.get())?;
        Ok(Resolver { shared: shared.clone() })
    }

    fn current(&self) -> Option<Arc<CertifiedKey>> {
        // `Credentials` has parsed this key before; handshakes are rare enough to parse it again.
        certified(&self.shared.get()).ok()
    }
}

fn certified(credentials: &Credentials) -> Result<Arc<CertifiedKey>, TlsError> {
    CertifiedKey::from_der(credentials.chain(), credentials.key(), &provider()).map(Arc::new).map_err(unusable)
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.current()
    }
}

impl ResolvesClientCert for Resolver {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.current()
    }

    fn has_certs(&self) -> bool {
        true
    }
}
