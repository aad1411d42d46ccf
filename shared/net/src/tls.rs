//! What the data plane needs to know of identities, and no more.

use std::sync::Arc;

use forge_shared::ids::NodeId;

/// The certificates' policy, from above: this crate knows none.
///
/// Configurations are asked for at every new connection, so that renewed certificates are used. Both must speak TLS 1.3, and
/// the server's must ask clients for certificates; a client that shows none is refused.
pub trait PeerVerifier: Send + Sync + 'static {
    /// For connections to peers.
    ///
    /// # Errors
    /// Why there is none, in words.
    fn client_config(&self) -> Result<Arc<rustls::ClientConfig>, String>;

    /// For connections from peers.
    ///
    /// # Errors
    /// Why there is none, in words.
    fn server_config(&self) -> Result<Arc<rustls::ServerConfig>, String>;

    /// The host name in a node's certificate.
    fn server_name(&self, node: &NodeId) -> String;

    /// The node to which a certificate (DER) was given, which is already known to be of the right CA and time.
    ///
    /// # Errors
    /// Why it may not take part, in words.
    fn node_of(&self, certificate: &[u8]) -> Result<NodeId, String>;
}

/// The protocol's name in TLS, so that a data-plane port is not taken for another.
pub(crate) const PROTOCOL: &[u8] = b"forge-net/1";

pub(crate) fn client_config(verifier: &dyn PeerVerifier) -> Result<rustls::ClientConfig, String> {
    let mut config = (*verifier.client_config()?).clone();
    config.alpn_protocols = vec![PROTOCOL.to_vec()];
    // A resumed session would not be asked for its certificate again.
    config.resumption = rustls::client::Resumption::disabled();
    config.enable_early_data = false;
    Ok(config)
}

pub(crate) fn server_config(verifier: &dyn PeerVerifier) -> Result<rustls::ServerConfig, String> {
    let mut config = (*verifier.server_config()?).clone();
    config.alpn_protocols = vec![PROTOCOL.to_vec()];
    config.max_early_data_size = 0;
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// Whose certificate this chain begins with.
pub(crate) fn node_of_chain(
    verifier: &dyn PeerVerifier,
    chain: Option<&[rustls::pki_types::CertificateDer<'_>]>,
) -> Result<NodeId, String> {
    let certificate = chain.and_then(<[_]>::first).ok_or("it shows no certificate: only workers of this cluster may connect")?;
    verifier.node_of(certificate)
}
