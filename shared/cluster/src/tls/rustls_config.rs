//! rustls configurations: TLS 1.3 with ring, HTTP/2; credentials and trust are looked up at every handshake.

use std::sync::Arc;

use rustls::client::ResolvesClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::clock::CertificateClock;
use super::credentials::Credentials;
use super::error::TlsError;
use super::shared::SharedCredentials;

const HTTP2: &[u8] = b"h2";

/// A server that takes clients with a certificate of the cluster, or with none: what each may do is decided per call
/// ([`super::Peer`]).
///
/// # Errors
/// [`TlsError::Handshake`] if the credentials cannot be used.
pub fn server_config(credentials: &SharedCredentials) -> Result<ServerConfig, TlsError> {
    let mut config = ServerConfig::builder_with_details(provider(), Arc::new(credentials.clock().clone()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(unusable)?
        .with_client_cert_verifier(Arc::new(Believed(credentials.clone())))
        .with_cert_resolver(Arc::new(Resolver::new(credentials)?));
    config.alpn_protocols = vec![HTTP2.to_vec()];
    // A resumed session would not be asked for its certificate again.
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// A client that shows its certificate and believes servers of the cluster.
///
/// # Errors
/// [`TlsError::Handshake`] if the credentials cannot be used.
pub fn client_config(credentials: &SharedCredentials) -> Result<ClientConfig, TlsError> {
    let verifier = Arc::new(Believed(credentials.clone()));
    let resolver = Arc::new(Resolver::new(credentials)?);
    Ok(with_http2(client_builder(verifier, credentials.clock())?.with_client_cert_resolver(resolver)))
}

/// A client without a certificate that believes what `verifier` does.
pub(super) fn anonymous_client_config(verifier: Arc<dyn ServerCertVerifier>) -> Result<ClientConfig, TlsError> {
    Ok(with_http2(client_builder(verifier, &CertificateClock::default())?.with_no_client_auth()))
}

pub(super) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn client_builder(
    verifier: Arc<dyn ServerCertVerifier>,
    clock: &CertificateClock,
) -> Result<rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>, TlsError> {
    Ok(ClientConfig::builder_with_details(provider(), Arc::new(clock.clone()))
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

fn unusable(error: rustls::Error) -> TlsError {
    TlsError::Handshake { reason: error.to_string() }
}

/// Believes what the process believes at the time of the handshake.
#[derive(Debug)]
struct Believed(SharedCredentials);

impl ServerCertVerifier for Believed {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let trusted = self.0.trusted();
        let verified = trusted.servers.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)?;
        trusted.check_revoked(end_entity)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.trusted().servers.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.trusted().servers.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Believed {
    fn offer_client_auth(&self) -> bool {
        true
    }

    fn client_auth_mandatory(&self) -> bool {
        false
    }

    /// None: a client has one certificate and shows it unasked for names.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let trusted = self.0.trusted();
        let verified = trusted.clients.verify_client_cert(end_entity, intermediates, now)?;
        trusted.check_revoked(end_entity)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.trusted().clients.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.trusted().clients.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
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
