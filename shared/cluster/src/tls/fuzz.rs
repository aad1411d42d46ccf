//! Entry points for fuzzing: certificates, and a coordinator's answer to a joining process. Taken or refused in words.

use std::sync::LazyLock;

use forge_proto::node::JoinReply;
use forge_shared::cluster::node::Role;
use prost::Message;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use super::ca::cluster_of;
use super::credentials::{Credentials, NodeKey, check_time, identity_of, parse_certificate, public_key_of, validity_of};
use super::join::{JoinWish, accept};
use super::{ClusterCa, Identity, JoinTokenText};
use crate::api::ClusterError;

/// A key is the costly part.
static KEY: LazyLock<Option<NodeKey>> = LazyLock::new(|| NodeKey::generate().ok());

/// A certificate in PEM as DER.
pub fn der(pem: &str) -> Option<Vec<u8>> {
    Some(CertificateDer::from_pem_slice(pem.as_bytes()).ok()?.to_vec())
}

/// Who a certificate in PEM is of.
pub fn identity_in(pem: &str) -> Option<Identity> {
    identity_of(&CertificateDer::from_pem_slice(pem.as_bytes()).ok()?).ok()
}

/// A peer's certificate (DER), as read before its chain was checked.
///
/// # Panics
/// If what was taken does not come back unchanged.
pub fn certificate(bytes: &[u8]) {
    let certificate = CertificateDer::from(bytes);
    if let Ok(parsed) = parse_certificate(&certificate) {
        drop(check_time("it", validity_of(&parsed), 1_700_000_000));
    }
    drop((cluster_of(&certificate), public_key_of(&certificate)));
    if let Ok(identity) = identity_of(&certificate) {
        assert_eq!(Identity::from_uri(&identity.uri()).as_ref(), Ok(&identity), "an identity changed on its way");
    }
}

/// The files of a process (`node.pem`, `ca.pem`) and of a CA (`ca.pem`, `ca.key`) as one text.
pub fn certificate_files(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    for error in [Credentials::from_pem(text, text, text).err(), ClusterCa::from_pem(text, text).err()].into_iter().flatten() {
        assert!(!error.to_string().is_empty(), "a refusal without words");
    }
}

/// A coordinator's answer (`JoinReply`) to the worker `w1`, whose token pins a CA.
///
/// # Panics
/// If an answer for another process is taken.
pub fn join_reply(bytes: &[u8]) {
    let (Some(key), Ok(reply)) = (KEY.as_ref(), JoinReply::decode(bytes)) else { return };
    let Ok(token) = JoinTokenText::generate([7; 32], vec!["c1:7000".into()]) else { return };
    let wish = JoinWish { role: Role::Worker, name: "w1".into(), address: String::new(), build: Default::default() };
    match accept(&token, &wish, key, reply) {
        Err(ClusterError::Protocol { reason }) => assert!(!reason.is_empty(), "a refusal without words"),
        other => panic!("an answer of no CA that the token knows: {other:?}"),
    }
}
