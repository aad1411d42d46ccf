//! Who a process is, and how two processes make sure of it: the cluster's CA, certificates, join tokens, mTLS.
//!
//! What it is not: it opens no port by itself and asks no coordinator whether a name may be used; a coordinator does
//! that before it signs. Which CAs are believed and which certificates were revoked is the cluster's state; here it is
//! carried out ([`SharedCredentials::trust`]).
//!
//! Invariants: a process is what its certificate says and nothing else; a client never speaks to a server whose
//! certificate does not carry the name it means; private keys are only ever in files of mode 0600 and never printed.

mod ca;
mod clock;
mod connections;
mod connector;
mod credentials;
mod error;
mod files;
pub mod fuzz;
mod identity;
mod join;
mod listener;
mod peer;
mod rustls_config;
mod shared;
#[cfg(test)]
mod tests;
mod token;
mod trusted;

pub use ca::{CA_LIFETIME, ClusterCa, NODE_LIFETIME, ca_digest};
pub use clock::CertificateClock;
#[cfg(test)]
pub(crate) use clock::clock_s;
pub use connections::Guarded;
pub use connector::{ChannelOptions, PeerName, RenewedChannel, channel, pinned_channel};
pub use credentials::{Credentials, NodeKey, issued_s};
pub use error::{TlsError, diagnose};
pub use files::{CA_CERTIFICATE_FILE, CA_KEY_FILE, NODE_FILE, read_keys, write_private, write_public};
pub use identity::{Identity, check_name};
pub use join::{JoinWish, Joined, is_of_another_cluster, join};
pub use listener::{TlsIncoming, TlsStream};
pub use peer::{Peer, PeerCertificate};
pub use rustls_config::{client_config, server_config};
pub use shared::SharedCredentials;
pub use token::{JoinTokenText, secret_matches};
