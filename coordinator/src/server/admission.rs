//! The `Admission` service: lets processes in that have a join token and no certificate yet.
//!
//! Invariants: a token is used up through the log, so that two coordinators cannot both take its last use; the same
//! request again (name, role, key and address) uses nothing up and is answered for the token's life, also after its last
//! use; who is let in gets the name and role that were asked for and that the token allows, never one that somebody living
//! has.

use std::time::Duration;

use forge_cluster::tls::{Identity, check_name, secret_matches};
use forge_proto::node::admission_server::Admission;
use forge_proto::node::{JoinReply, JoinRequest};
use forge_shared::cluster::command::{Command, CommandError, MemberRecord};
use forge_shared::cluster::node::{NodePhase, Role};
use forge_shared::ids::NodeId;
use forge_shared::version::{Build, FIRST_LEVEL};
use sha2::{Digest, Sha256};
use tonic::{Request, Response, Status};

use super::Shared;
use super::call::{place_among, refuse, timeout};
use super::nodes::Asked;
use crate::coordinator::{Coordinator, Submission};
use crate::error::CoordinatorError;
use crate::raft::MemberChange;

/// Longest id of a token.
const MAX_TOKEN_ID: usize = 64;
/// Secrets have 32 bytes.
const MAX_SECRET_BYTES: usize = 64;

pub(super) struct AdmissionService(pub(super) Shared);

#[tonic::async_trait]
impl Admission for AdmissionService {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinReply>, Status> {
        let _place = place_among(&self.0.joins, "requests to be let in").map_err(refuse)?;
        let timeout = timeout(&request);
        let reply = self.admit(request.into_inner(), timeout).await.map_err(refuse)?;
        Ok(Response::new(reply))
    }
}

/// As what the request wants in; its name and address are such as that role has.
pub(super) fn named_role(request: &JoinRequest) -> Result<Role, CoordinatorError> {
    let role: Role = request.role.parse().map_err(|reason| CoordinatorError::message("role", reason))?;
    check_name("name", &request.name).map_err(|error| CoordinatorError::message("name", error))?;
    if (role == Role::Coordinator) == request.address.is_empty() {
        return Err(CoordinatorError::message("address", "coordinators give host:port where they will be reached, others nothing"));
    }
    Ok(role)
}

impl AdmissionService {
    async fn admit(&self, request: JoinRequest, timeout: Duration) -> Result<JoinReply, CoordinatorError> {
        let coordinator = &self.0.coordinator;
        let role = named_role(&request)?;
        let is_coordinator = role == Role::Coordinator;
        coordinator.leading()?;

        // The same request again, after its answer was lost, has this id again.
        let digest = Sha256::new().chain_update(&request.signing_request_der).chain_update(&request.address).finalize();
        let id = format!("join-{}-{role}-{}", request.name, hex::encode(&digest[..16]));
        let command = Command::UseJoinToken { id: request.token_id.clone(), role, node: request.name.clone() };
        // Who guesses costs the group next to nothing. A token that is not known here may have been made a moment ago, by
        // another leader.
        let doubted = match self.check_token(&request, &id, &command) {
            Ok(()) => None,
            Err(_) => Some(place_among(&self.0.doubted_joins, "requests with tokens that it does not know")?),
        };
        coordinator.0.raft.read_index(timeout).await.map_err(|error| coordinator.raft_error(error))?;
        self.check_token(&request, &id, &command)?;
        drop(doubted);
        let build = Build { version: request.version.clone(), level: request.level.max(FIRST_LEVEL) };
        // Later it would be refused as well, and the token used up.
        coordinator.0.replicated.read().check_build(role, &request.name, &build)?;
        let identity = Identity::new(&coordinator.0.options.cluster_id, role, &request.name)
            .map_err(|error| CoordinatorError::message("name", error))?;
        // Before the token is used up: a request that cannot be signed uses nothing.
        let signed = self.0.sign(&request.signing_request_der, &identity)?;
        check_free(coordinator, role, &request.name, &request.address)?;

        let submission = Submission { request_id: id, traceparent: String::new(), command };
        let applied = coordinator.submit(submission, timeout).await?;
        let member_id = if is_coordinator {
            // No member ever had this number: it is the place of this very use in the log.
            self.add_member(MemberRecord::new(applied.revision.0, &request.name, &request.address, build), timeout).await?
        } else {
            0
        };
        self.0.write_down(&signed, Asked::Join, timeout).await?;
        tracing::info!(%identity, "joined");
        Ok(JoinReply {
            cluster_id: coordinator.0.options.cluster_id.clone(),
            certificate_pem: signed.certificate_pem,
            ca_certificate_pem: signed.cas_pem,
            coordinators: self.0.addresses(),
            ca_key_pem: if is_coordinator { self.0.cas.keys_pem() } else { String::new() },
            member_id,
        })
    }

    /// One answer for every token that is not good, so that ids cannot be guessed.
    fn check_token(&self, request: &JoinRequest, request_id: &str, command: &Command) -> Result<(), CoordinatorError> {
        let refused = || {
            let reason = "it is unknown, used up, over or taken back: make one with `forgectl cluster join-token`".into();
            CoordinatorError::Command(CommandError::Token { reason })
        };
        if request.token_id.len() > MAX_TOKEN_ID || request.token_secret.len() > MAX_SECRET_BYTES {
            return Err(refused());
        }
        let state = self.0.coordinator.0.replicated.read();
        let token = state.token(&request.token_id).ok_or_else(refused)?;
        let lets_in = token.uses_left > 0 || state.was_taken(request_id, command);
        if lets_in && secret_matches(token, &request.token_secret) { Ok(()) } else { Err(refused()) }
    }

    /// Makes it a learner; the leader lets it vote once it has caught up.
    async fn add_member(&self, member: MemberRecord, timeout: Duration) -> Result<u64, CoordinatorError> {
        let coordinator = &self.0.coordinator;
        let id = member.id;
        let submission = coordinator.own(format!("add-member-{id}"), Command::PutMember { member });
        coordinator.submit(submission, timeout).await?;
        // The reply to a request of long ago may be remembered, and its member removed since.
        if coordinator.0.replicated.read().is_removed_member(id) {
            let reason = format!("member {id} was removed: join with an empty folder for its data and its certificate");
            return Err(CoordinatorError::Forbidden { reason });
        }
        if coordinator.raft_status().members.iter().any(|member| member.id == id) {
            return Ok(id);
        }
        let added = coordinator.0.raft.change_members(MemberChange::AddLearner(id), timeout).await;
        added.map_err(|error| coordinator.raft_error(error))?;
        Ok(id)
    }
}

/// Whether nobody living has this name.
fn check_free(coordinator: &Coordinator, role: Role, name: &str, address: &str) -> Result<(), CoordinatorError> {
    let state = coordinator.0.replicated.read();
    let conflict = |kind: &str, reason: &str| {
        Err(CoordinatorError::Command(CommandError::Conflict { kind: kind.into(), name: name.into(), reason: reason.into() }))
    };
    match role {
        Role::Admin => Ok(()),
        Role::Coordinator => match state.members().values().find(|member| member.name == name) {
            // The same one again, after its answer was lost.
            Some(member) if member.address == address => Ok(()),
            Some(_) => conflict("member", "choose another name, or `forgectl cluster members remove` it first"),
            None => Ok(()),
        },
        Role::Worker | Role::Gateway => match state.nodes().get(&NodeId::from(name)) {
            Some(record) if record.spec.role != role => conflict("node", "another role has this name: choose another"),
            Some(record) if record.phase == NodePhase::Ready => {
                conflict("node", &format!("it is connected: choose another name, or stop it and `forgectl delete node {name}`"))
            }
            Some(_) | None => Ok(()),
        },
    }
}
