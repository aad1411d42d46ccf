//! Join tokens as text: what an operator copies to a new host.
//!
//! `forge1.ID.SECRET.CA.ADDRESSES`: the token's id, 32 secret bytes in hex, SHA-256 of the CA's certificate (DER) in hex,
//! and `host:port` of coordinators joined by commas. The CA's digest lets a process that has no certificate yet know that
//! it speaks to the right cluster.
//!
//! Invariant: the cluster keeps only the secret's hash, and compares it in constant time.

use forge_shared::cluster::command::JoinToken;
use forge_shared::cluster::node::Role;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::TlsError;

const PREFIX: &str = "forge1";
const SECRET_BYTES: usize = 32;
const ID_BYTES: usize = 5;
const MAX_TOKEN_CHARS: usize = 4096;
const MAX_ADDRESSES: usize = 16;

/// A join token with its secret.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinTokenText {
    /// Names it in the cluster.
    pub id: String,
    secret: [u8; SECRET_BYTES],
    /// SHA-256 of the CA's certificate, DER.
    pub ca_sha256: [u8; 32],
    /// `host:port` of coordinators, at least one.
    pub addresses: Vec<String>,
}

impl std::fmt::Debug for JoinTokenText {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JoinTokenText").field("id", &self.id).field("addresses", &self.addresses).finish_non_exhaustive()
    }
}

impl JoinTokenText {
    /// A new token with a random id and secret.
    ///
    /// # Errors
    /// [`TlsError::Token`] without addresses, or if the system gives no random numbers.
    pub fn generate(ca_sha256: [u8; 32], addresses: Vec<String>) -> Result<Self, TlsError> {
        let mut id = [0u8; ID_BYTES];
        let mut secret = [0u8; SECRET_BYTES];
        for bytes in [id.as_mut_slice(), secret.as_mut_slice()] {
            getrandom::fill(bytes).map_err(|error| wrong(format!("no random numbers: {error}")))?;
        }
        check_addresses(&addresses)?;
        Ok(JoinTokenText { id: hex::encode(id), secret, ca_sha256, addresses })
    }

    /// Reads a token.
    ///
    /// # Errors
    /// [`TlsError::Token`] saying which part is wrong; never with the secret in it.
    pub fn parse(text: &str) -> Result<Self, TlsError> {
        let text = text.trim();
        if text.len() > MAX_TOKEN_CHARS {
            return Err(wrong(format!("longer than {MAX_TOKEN_CHARS} characters")));
        }
        let mut parts = text.splitn(5, '.');
        if parts.next() != Some(PREFIX) {
            return Err(wrong(format!("does not begin with {PREFIX:?}: copy the whole line that `forgectl cluster join-token` printed")));
        }
        let mut part = |what: &str| parts.next().filter(|part| !part.is_empty()).ok_or_else(|| wrong(format!("it ends before its {what}")));
        let id = part("id")?.to_owned();
        if id.len() > 64 || !id.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return Err(wrong("its id is not letters and digits".into()));
        }
        let secret = fixed(part("secret")?, "secret")?;
        let ca_sha256 = fixed(part("digest of the CA")?, "digest of the CA")?;
        let addresses: Vec<String> = part("addresses")?.split(',').map(str::to_owned).collect();
        check_addresses(&addresses)?;
        Ok(JoinTokenText { id, secret, ca_sha256, addresses })
    }

    /// The text. Whoever has it can join: print it once.
    pub fn to_text(&self) -> String {
        format!("{PREFIX}.{}.{}.{}.{}", self.id, hex::encode(self.secret), hex::encode(self.ca_sha256), self.addresses.join(","))
    }

    /// What the cluster keeps of it.
    pub fn record(&self, role: Role, expires_ms: u64, uses_left: u32) -> JoinToken {
        JoinToken { id: self.id.clone(), secret_sha256: hex::encode(Sha256::digest(self.secret)), role, expires_ms, uses_left }
    }

    /// The secret, for the one request that shows it.
    pub fn secret(&self) -> &[u8] {
        &self.secret
    }
}

/// Whether this is the secret of a stored token, in constant time.
pub fn secret_matches(token: &JoinToken, secret: &[u8]) -> bool {
    let shown = hex::encode(Sha256::digest(secret));
    shown.as_bytes().ct_eq(token.secret_sha256.as_bytes()).into()
}

fn fixed(text: &str, what: &str) -> Result<[u8; 32], TlsError> {
    let mut bytes = [0u8; 32];
    hex::decode_to_slice(text, &mut bytes).map_err(|_| wrong(format!("its {what} is not 64 hex digits: copy the whole line")))?;
    Ok(bytes)
}

fn check_addresses(addresses: &[String]) -> Result<(), TlsError> {
    if addresses.is_empty() || addresses.len() > MAX_ADDRESSES {
        return Err(wrong(format!("{} addresses of coordinators; 1 to {MAX_ADDRESSES} are needed", addresses.len())));
    }
    let is_address = |address: &String| {
        let (host, port) = address.rsplit_once(':').unwrap_or_default();
        !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0) && !address.contains([' ', '/', ','])
    };
    match addresses.iter().find(|address| !is_address(address)) {
        Some(address) => Err(wrong(format!("{address:?} is no address: write host:port"))),
        None => Ok(()),
    }
}

fn wrong(reason: String) -> TlsError {
    TlsError::Token { reason }
}
