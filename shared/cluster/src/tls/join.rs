//! How a process without a certificate gets one: it shows a token to a coordinator whose CA the token pins.
//!
//! Invariant: the secret is sent only to a server whose chain has the pinned CA in it, and what comes back is used only
//! if it is a certificate of that CA, for the wished name and role, over the key made here.

use std::time::Duration;

use forge_proto::node::admission_client::AdmissionClient;
use forge_proto::node::{JoinReply, JoinRequest};
use forge_shared::cluster::node::Role;
use forge_shared::version::Build;
use tokio::time::Instant;

use super::connector::{ChannelOptions, pinned_channel};
use super::credentials::{Credentials, NodeKey};
use super::error::{TlsError, diagnose};
use super::identity::check_name;
use super::token::JoinTokenText;
use crate::api::ClusterError;
use crate::status::from_status;

/// For a coordinator to show whose it is.
const LOOK_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest single try.
const TRY_TIMEOUT: Duration = Duration::from_secs(5);
/// Certificates, a key and addresses.
const MAX_REPLY_BYTES: usize = 1 << 20;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Who wants in.
#[derive(Debug, Clone)]
pub struct JoinWish {
    /// As which role; must be the token's.
    pub role: Role,
    /// Under which name.
    pub name: String,
    /// `host:port` where a coordinator will be reached; empty for other roles.
    pub address: String,
    /// What it is a build of: one older than the cluster is not let in.
    pub build: Build,
}

/// What it got.
#[derive(Debug)]
pub struct Joined {
    /// Its certificate, key and CA, checked.
    pub credentials: Credentials,
    /// `host:port` of all coordinators.
    pub coordinators: Vec<String>,
    /// The CA's key, for a coordinator.
    pub ca_key_pem: Option<String>,
    /// The raft id given to it, for a coordinator.
    pub member_id: Option<u64>,
}

/// Joins. Tries the token's addresses, and the leader they name, until `timeout` or until all of them refused, one after the
/// other; one key over all tries.
///
/// # Errors
/// [`ClusterError::Forbidden`] for a token that is not taken or servers of another CA, [`ClusterError::Unavailable`] if
/// nobody answered, [`ClusterError::Protocol`] for an answer that is not what was asked for.
pub async fn join(token: &JoinTokenText, wish: &JoinWish, timeout: Duration) -> Result<Joined, ClusterError> {
    check_name("name", &wish.name).map_err(forbidden)?;
    let key = NodeKey::generate().map_err(forbidden)?;
    let request = JoinRequest {
        token_id: token.id.clone(),
        token_secret: token.secret().to_vec().into(),
        role: wish.role.to_string(),
        name: wish.name.clone(),
        signing_request_der: key.signing_request_der().map_err(forbidden)?.into(),
        address: wish.address.clone(),
        version: wish.build.version.clone(),
        level: wish.build.level,
    };
    let begun = Instant::now();
    let mut pause = FIRST_PAUSE;
    let mut leader: Option<String> = None;
    let mut turn = 0;
    let mut refusals_in_a_row = 0;
    loop {
        let address = leader.take().unwrap_or_else(|| token.addresses[turn % token.addresses.len()].clone());
        turn += 1;
        let left = timeout.saturating_sub(begun.elapsed());
        let failure = match ask(&address, token, request.clone(), left.min(TRY_TIMEOUT)).await {
            Ok(reply) => return accept(token, wish, &key, reply),
            Err(status) => from_status(&status, "coordinator.forge"),
        };
        // The token pins one cluster: a server of another CA at one address is no reason to give up the others. Where all
        // are of another, waiting changes nothing.
        refusals_in_a_row = if matches!(failure.error, ClusterError::Forbidden { .. }) { refusals_in_a_row + 1 } else { 0 };
        let everyone_refused = refusals_in_a_row >= token.addresses.len();
        let was_last = !failure.is_retryable || everyone_refused || begun.elapsed() + pause >= timeout;
        if was_last {
            return Err(match failure.error {
                ClusterError::Unavailable { reason, .. } | ClusterError::Unknown { reason } => {
                    ClusterError::Unavailable { waited_ms: begun.elapsed().as_millis() as u64, reason: format!("{address}: {reason}") }
                }
                other => other,
            });
        }
        leader = failure.leader.filter(|leader| *leader != address);
        if leader.is_none() {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

/// Whether a coordinator answers at this address and is of another cluster than the token's. Nothing of the token is shown.
pub async fn is_of_another_cluster(address: &str, token: &JoinTokenText) -> bool {
    match ask(address, token, JoinRequest::default(), LOOK_TIMEOUT).await {
        Ok(_) => false,
        Err(status) => matches!(diagnose(&status, "coordinator.forge"), Some(TlsError::WrongCa { .. })),
    }
}

async fn ask(address: &str, token: &JoinTokenText, request: JoinRequest, timeout: Duration) -> Result<JoinReply, tonic::Status> {
    let channel = pinned_channel(address, token.ca_sha256, ChannelOptions::default())?;
    let mut request = tonic::Request::new(request);
    request.set_timeout(timeout);
    let mut client = AdmissionClient::new(channel).max_decoding_message_size(MAX_REPLY_BYTES);
    match tokio::time::timeout(timeout, client.join(request)).await {
        Ok(reply) => Ok(reply?.into_inner()),
        Err(_) => Err(tonic::Status::unavailable(format!("no answer within {} ms", timeout.as_millis()))),
    }
}

pub(super) fn accept(token: &JoinTokenText, wish: &JoinWish, key: &NodeKey, reply: JoinReply) -> Result<Joined, ClusterError> {
    let protocol = |reason: String| ClusterError::Protocol { reason };
    let credentials = Credentials::from_pem(&reply.certificate_pem, &key.pem(), &reply.ca_certificate_pem)
        .map_err(|error| protocol(format!("the coordinator's answer: {error}")))?;
    if credentials.ca_digest() != token.ca_sha256 {
        return Err(protocol("the coordinator's answer has another CA than the token".into()));
    }
    let identity = credentials.identity();
    if identity.role != wish.role || identity.name != wish.name || identity.cluster_id != reply.cluster_id {
        return Err(protocol(format!("the coordinator's certificate is for {identity}, not for {} {}", wish.role, wish.name)));
    }
    let is_coordinator = wish.role == Role::Coordinator;
    if is_coordinator && (reply.ca_key_pem.is_empty() || reply.member_id == 0) {
        return Err(protocol("the coordinator's answer has no CA key or member id for a new coordinator".into()));
    }
    Ok(Joined {
        credentials,
        coordinators: reply.coordinators,
        ca_key_pem: is_coordinator.then_some(reply.ca_key_pem),
        member_id: is_coordinator.then_some(reply.member_id),
    })
}

fn forbidden(error: TlsError) -> ClusterError {
    ClusterError::Forbidden { reason: error.to_string() }
}
