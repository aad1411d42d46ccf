//! Who called: read from the connection's certificate, checked per call.

use forge_shared::cluster::node::Role;
use tonic::Request;
use tonic::transport::server::{TcpConnectInfo, TlsConnectInfo};

use super::credentials::{check_time, clock_s, identity_of, parse_certificate, validity_of};
use super::{Identity, TlsError};

/// Reads callers' identities.
#[derive(Debug, Clone, Copy)]
pub struct Peer;

impl Peer {
    /// Who made this call. A connection may live longer than its certificate: the time is checked too.
    ///
    /// # Errors
    /// [`TlsError::NoCertificate`], [`TlsError::Expired`], or [`TlsError::Certificate`] for one that is none of Forge's.
    pub fn of<T>(request: &Request<T>) -> Result<Identity, TlsError> {
        let certificates = request.extensions().get::<TlsConnectInfo<TcpConnectInfo>>().and_then(TlsConnectInfo::peer_certs);
        let certificates = certificates.ok_or(TlsError::NoCertificate)?;
        let certificate = certificates.first().ok_or(TlsError::NoCertificate)?;
        let identity = identity_of(certificate)?;
        check_time(&identity.to_string(), validity_of(&parse_certificate(certificate)?), clock_s())?;
        Ok(identity)
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
