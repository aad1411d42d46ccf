//! Connections to the coordinators: one per address, made when needed, kept until the certificate is renewed.

use std::collections::HashMap;
use std::sync::Arc;

use forge_proto::cluster::cluster_client::ClusterClient;
use forge_proto::node::nodes_client::NodesClient;
use forge_shared::cluster::node::Role;
use parking_lot::Mutex;
use tonic::transport::Channel;

use super::MAX_REPLY_BYTES;
use super::route::Addresses;
use crate::tls::{PeerName, RenewedChannel, SharedCredentials, TlsError};

/// Name that every coordinator's certificate carries.
pub(super) const EXPECTED: &str = "coordinator.forge";

#[derive(Debug)]
pub(super) struct Channels {
    credentials: SharedCredentials,
    open: Mutex<HashMap<String, Arc<RenewedChannel>>>,
    addresses: Mutex<Addresses>,
}

impl Channels {
    pub(super) fn new(addresses: &[String], credentials: &SharedCredentials) -> Result<Self, TlsError> {
        if addresses.is_empty() {
            return Err(TlsError::Handshake { reason: "no address of a coordinator is known: name at least one, as host:port".into() });
        }
        let channels = Channels {
            credentials: credentials.clone(),
            open: Mutex::new(HashMap::new()),
            addresses: Mutex::new(Addresses::new(addresses)),
        };
        for address in addresses {
            channels.channel(address)?;
        }
        Ok(channels)
    }

    pub(super) fn credentials(&self) -> &SharedCredentials {
        &self.credentials
    }

    pub(super) fn addresses(&self) -> Addresses {
        self.addresses.lock().clone()
    }

    pub(super) fn learn(&self, address: &str) {
        self.addresses.lock().learn(address);
    }

    pub(super) fn prefer(&self, address: &str) {
        self.addresses.lock().prefer(address);
    }

    pub(super) fn demote(&self, address: &str) {
        self.addresses.lock().demote(address);
    }

    pub(super) fn cluster(&self, address: &str) -> Result<ClusterClient<Channel>, TlsError> {
        Ok(ClusterClient::new(self.channel(address)?).max_decoding_message_size(MAX_REPLY_BYTES))
    }

    pub(super) fn nodes(&self, address: &str) -> Result<NodesClient<Channel>, TlsError> {
        Ok(NodesClient::new(self.channel(address)?).max_decoding_message_size(MAX_REPLY_BYTES))
    }

    fn channel(&self, address: &str) -> Result<Channel, TlsError> {
        let new = || Arc::new(RenewedChannel::new(address, PeerName::Any(Role::Coordinator), &self.credentials));
        let channel = self.open.lock().entry(address.to_owned()).or_insert_with(new).clone();
        channel.get()
    }
}
