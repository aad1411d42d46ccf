//! The client's end: channels that speak to one named process, or to any of a role.
//!
//! Invariant: a channel never sends a request before the server's certificate was found to carry the expected name.

use std::collections::BTreeSet;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use forge_shared::cluster::node::Role;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use rustls::ClientConfig;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{verify_tls12_signature, verify_tls13_signature};
use rustls::{CertificateError, DigitallySignedStruct, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tokio::net::TcpStream;
use tonic::codegen::{Service, http};
use tonic::transport::{Channel, Endpoint};

use super::connections::{Caller, Connections, Guarded};
use super::error::TlsError;
use super::peer::PeerCertificate;
use super::rustls_config::{anonymous_client_config, client_config, provider};
use super::shared::SharedCredentials;
use super::trusted::Trusted;

/// Whom a client means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerName {
    /// Any process of this role.
    Any(Role),
    /// This process.
    One(Role, String),
}

impl PeerName {
    /// The host name its certificate must carry.
    pub fn dns_name(&self) -> String {
        match self {
            PeerName::Any(role) => format!("{role}.forge"),
            PeerName::One(role, name) => format!("{name}.{role}.forge"),
        }
    }
}

/// Times of a channel.
#[derive(Debug, Clone, Copy)]
pub struct ChannelOptions {
    /// For TCP and TLS together.
    pub connect_timeout: Duration,
    /// An idle or silent connection is asked whether it lives, this often.
    pub keep_alive_interval: Duration,
    /// Without an answer for this long it is dead, and all its calls fail.
    pub keep_alive_timeout: Duration,
}

impl Default for ChannelOptions {
    fn default() -> Self {
        ChannelOptions {
            connect_timeout: Duration::from_secs(1),
            keep_alive_interval: Duration::from_millis(500),
            keep_alive_timeout: Duration::from_millis(1500),
        }
    }
}

/// A channel to `host:port`. It connects at the first call and again after a loss, each time with the newest credentials.
///
/// # Errors
/// [`TlsError`] for credentials that cannot be used or an address that is none.
pub fn channel(address: &str, peer: &PeerName, credentials: &SharedCredentials, options: ChannelOptions) -> Result<Channel, TlsError> {
    let connector = Connector {
        config: Arc::new(client_config(credentials)?),
        name: server_name(&peer.dns_name())?,
        credentials: Some(credentials.clone()),
    };
    Ok(endpoint(address, options)?.connect_with_connector_lazy(connector))
}

/// A channel without a client certificate to a coordinator whose CA has this digest: for joining.
///
/// # Errors
/// [`TlsError`] for an address that is none.
pub fn pinned_channel(address: &str, ca_sha256: [u8; 32], options: ChannelOptions) -> Result<Channel, TlsError> {
    let connector = Connector {
        config: Arc::new(anonymous_client_config(Arc::new(PinnedCa { ca_sha256 }))?),
        name: server_name(&PeerName::Any(Role::Coordinator).dns_name())?,
        credentials: None,
    };
    Ok(endpoint(address, options)?.connect_with_connector_lazy(connector))
}

fn endpoint(address: &str, options: ChannelOptions) -> Result<Endpoint, TlsError> {
    let wrong = |reason: String| TlsError::Handshake { reason: format!("{address:?} is no address: write host:port ({reason})") };
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|error| wrong(error.to_string()))?;
    if endpoint.uri().port().is_none() || endpoint.uri().path().len() > 1 {
        return Err(wrong("a port and nothing behind it".into()));
    }
    Ok(endpoint
        .connect_timeout(options.connect_timeout)
        .http2_keep_alive_interval(options.keep_alive_interval)
        .keep_alive_timeout(options.keep_alive_timeout)
        .keep_alive_while_idle(true)
        .tcp_nodelay(true))
}

fn server_name(name: &str) -> Result<ServerName<'static>, TlsError> {
    ServerName::try_from(name.to_owned()).map_err(|_| TlsError::Name { what: "server", name: name.into() })
}

/// A channel that is made anew when the credentials were replaced, so that calls never go over a connection whose
/// certificate has ended; streams that run stay where they are.
#[derive(Debug)]
pub struct RenewedChannel {
    address: String,
    peer: PeerName,
    credentials: SharedCredentials,
    made: Mutex<Option<(u64, Channel)>>,
}

impl RenewedChannel {
    /// To `host:port`, with the usual times.
    pub fn new(address: &str, peer: PeerName, credentials: &SharedCredentials) -> Self {
        RenewedChannel { address: address.into(), peer, credentials: credentials.clone(), made: Mutex::new(None) }
    }

    /// For the next call.
    ///
    /// # Errors
    /// As [`channel`].
    pub fn get(&self) -> Result<Channel, TlsError> {
        let generation = self.credentials.generation();
        let mut made = self.made.lock();
        match made.as_ref() {
            Some((of, channel)) if *of == generation => Ok(channel.clone()),
            _ => {
                let new = channel(&self.address, &self.peer, &self.credentials, ChannelOptions::default())?;
                *made = Some((generation, new.clone()));
                Ok(new)
            }
        }
    }

    /// Whom it means.
    pub fn peer(&self) -> &PeerName {
        &self.peer
    }
}

/// TCP, then TLS with the expected name, whatever the address.
#[derive(Clone)]
struct Connector {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    credentials: Option<SharedCredentials>,
}

impl Service<http::Uri> for Connector {
    type Response = TokioIo<Guarded<tokio_rustls::client::TlsStream<TcpStream>>>;
    type Error = std::io::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: http::Uri) -> Self::Future {
        let Connector { config, name, credentials } = self.clone();
        Box::pin(async move {
            // The server would refuse it in words that TLS does not carry back.
            if let Some(credentials) = &credentials {
                credentials.get().check_time(credentials.clock().now_s()).map_err(std::io::Error::other)?;
            }
            let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']').to_owned();
            let stream = TcpStream::connect((host, uri.port_u16().unwrap_or_default())).await?;
            stream.set_nodelay(true)?;
            let stream = tokio_rustls::TlsConnector::from(config).connect(name, stream).await?;
            let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
            let peer = shown.map(PeerCertificate::read).transpose().map_err(std::io::Error::other)?;
            Ok(TokioIo::new(match credentials {
                Some(credentials) => credentials.guard(stream, peer),
                None => Arc::<Connections>::default().guard(stream, Caller::default()),
            }))
        })
    }
}

/// Believes a coordinator whose chain has the CA with this digest in it, and nothing else.
#[derive(Debug)]
struct PinnedCa {
    ca_sha256: [u8; 32],
}

impl ServerCertVerifier for PinnedCa {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let pinned = |certificate: &&CertificateDer<'_>| bool::from(Sha256::digest(certificate).as_slice().ct_eq(&self.ca_sha256));
        let ca = intermediates.iter().find(pinned).ok_or(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer))?;
        let pinned = Trusted::new(vec![ca.clone().into_owned()], BTreeSet::new());
        let pinned = pinned.map_err(|error| rustls::Error::General(error.to_string()))?;
        pinned.servers.verify_server_cert(end_entity, &[], server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &provider().signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}
