//! The `Nodes` service: sessions of workers and gateways, and new certificates for who has one.
//!
//! Invariant: a node speaks for itself alone: name and role are those of its certificate.

use std::time::Duration;

use forge_cluster::api::Session;
use forge_cluster::tls::{Identity, Peer, PeerCertificate};
use forge_proto::node::nodes_server::Nodes;
use forge_proto::node::{
    ConfirmReply, ConfirmRequest, RenewReply, RenewRequest, SessionDown, SessionUp, SigningKeyReply, SigningKeyRequest,
};
use forge_shared::cluster::command::CommandError;
use forge_shared::cluster::node::{NodeSpec, Role};
use forge_shared::cluster::session::NodeUp;
use forge_shared::ids::NodeId;
use futures::StreamExt;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::Shared;
use super::call::{json, refuse, timeout, to_json, unknown_caller};
use super::cluster::Answers;
use crate::certificates::{record_of, seen_record_of};
use crate::error::CoordinatorError;

/// For the first message of a session, and for joining.
const BEGIN_WITHIN: Duration = Duration::from_secs(5);
/// A node that reads nothing for this long has no session.
const READ_WITHIN: Duration = Duration::from_secs(10);
/// Messages on their way to the connection.
const DEPTH: usize = 16;
/// CAs that a caller may say it believes.
const MAX_BELIEVED: usize = 4;

pub(super) struct NodesService(pub(super) Shared);

#[tonic::async_trait]
impl Nodes for NodesService {
    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<RenewReply>, Status> {
        let shown = Peer::certificate(&request).map_err(unknown_caller)?;
        let caller = &shown.identity;
        let _place = self.0.place()?;
        let timeout = timeout(&request);
        self.0.coordinator.0.raft.read_index(timeout).await.map_err(|error| refuse(self.0.coordinator.raft_error(error)))?;
        still_belongs(&self.0, caller).map_err(refuse)?;
        // Written down by the leader, before its holder has it.
        self.0.coordinator.leading().map_err(refuse)?;
        let RenewRequest { signing_request_der, mut believed_ca_sha256 } = request.into_inner();
        believed_ca_sha256.truncate(MAX_BELIEVED);
        let signed = self.0.sign(&signing_request_der, caller).map_err(refuse)?;
        self.0.write_down(&signed, Asked::Renewal { with: &shown, believes: believed_ca_sha256 }, timeout).await.map_err(refuse)?;
        tracing::info!(%caller, "a certificate was renewed");
        Ok(Response::new(RenewReply {
            certificate_pem: signed.certificate_pem,
            ca_certificate_pem: signed.cas_pem,
            coordinators: self.0.addresses(),
        }))
    }

    async fn confirm(&self, request: Request<ConfirmRequest>) -> Result<Response<ConfirmReply>, Status> {
        let shown = Peer::certificate(&request).map_err(unknown_caller)?;
        let _place = self.0.place()?;
        let timeout = timeout(&request);
        let term = self.0.coordinator.leading().map_err(refuse)?.term();
        still_belongs(&self.0, &shown.identity).map_err(refuse)?;
        let is_known = self.0.coordinator.0.replicated.read().certificate(&shown.serial).is_some_and(|known| known.is_used);
        if !is_known {
            self.0.write_shown(&shown, &format!("to-{term}"), timeout).await.map_err(refuse)?;
        }
        Ok(Response::new(ConfirmReply {}))
    }

    async fn signing_key(&self, request: Request<SigningKeyRequest>) -> Result<Response<SigningKeyReply>, Status> {
        let caller = self.0.caller(&request, &[Role::Coordinator])?;
        still_belongs(&self.0, &caller).map_err(refuse)?;
        let sha256 = request.into_inner().ca_sha256;
        let missing = || refuse(CoordinatorError::Busy { reason: "this coordinator does not have that CA's key: ask another".into() });
        let key_pem = self.0.cas.key_pem(&sha256).ok_or_else(missing)?;
        tracing::info!(%caller, ca = sha256.get(..12), "a coordinator was given a CA's key");
        Ok(Response::new(SigningKeyReply { key_pem }))
    }

    type SessionStream = Answers<SessionDown>;

    async fn session(&self, request: Request<Streaming<SessionUp>>) -> Result<Response<Self::SessionStream>, Status> {
        let caller = self.0.caller(&request, &[Role::Worker, Role::Gateway])?;
        // Before the hello is read, so that a node at the wrong coordinator learns it at once.
        self.0.coordinator.leading().map_err(refuse)?;
        let mut received = request.into_inner();
        let late = |_| refuse(CoordinatorError::message("hello", format!("it did not come within {} s", BEGIN_WITHIN.as_secs())));
        let first = tokio::time::timeout(BEGIN_WITHIN, received.message()).await.map_err(late)??;
        let hello = hello_of(first, &caller)?;
        let place = self.0.place()?;
        let session = self.0.coordinator.open_session(hello, BEGIN_WITHIN).await.map_err(refuse)?;
        drop(place);
        let (answers, sent) = mpsc::channel(DEPTH);
        self.0.coordinator.0.tasks.spawn(carry(session, received, answers));
        Ok(Response::new(ReceiverStream::new(sent).boxed()))
    }
}

/// What was signed.
pub(super) struct Signed {
    pub(super) certificate_pem: String,
    /// All CAs to believe, the one that signed first.
    pub(super) cas_pem: String,
    /// Hex of their digests.
    cas_sha256: Vec<String>,
}

/// How somebody asked for a certificate.
pub(super) enum Asked<'a> {
    /// With a join token: he will believe what comes with it.
    Join,
    /// With the certificate that he has, and he said which CAs he believes.
    Renewal { with: &'a PeerCertificate, believes: Vec<String> },
}

impl Shared {
    /// Signs with the CA that signs now.
    pub(super) fn sign(&self, signing_request_der: &[u8], identity: &Identity) -> Result<Signed, CoordinatorError> {
        let trust = self.coordinator.0.replicated.read().trust().clone();
        let ca = self.cas.signing(&trust)?;
        let signed = ca.sign(signing_request_der, identity, self.life, self.credentials.clock().now_s());
        let certificate_pem = signed.map_err(|error| CoordinatorError::message("signing_request_der", error))?;
        let cas_sha256 = match trust.cas.as_slice() {
            [] => vec![ca.digest_text()],
            cas => cas.iter().map(|ca| ca.sha256.clone()).collect(),
        };
        Ok(Signed { certificate_pem, cas_pem: trust.cas_pem(ca.certificate_pem()), cas_sha256 })
    }

    /// Writes a signed certificate into the log.
    pub(super) async fn write_down(&self, signed: &Signed, asked: Asked<'_>, timeout: Duration) -> Result<(), CoordinatorError> {
        let broken = |what: String| CoordinatorError::message("certificate", what);
        let certificate = PeerCertificate::from_pem(&signed.certificate_pem).map_err(|error| broken(error.to_string()))?;
        let (believes, with) = match asked {
            Asked::Join => (signed.cas_sha256.clone(), None),
            Asked::Renewal { with, believes } => (believes, Some(with)),
        };
        if let Some(with) = with.filter(|with| self.coordinator.0.replicated.read().certificate(&with.serial).is_none()) {
            // What is asked for with it is then known to be.
            self.write_shown(with, &format!("for-{}", certificate.serial), timeout).await?;
        }
        let record = record_of(&certificate, &signed.cas_pem, believes);
        let record = record.ok_or_else(|| broken("it is of none of the CAs".into()))?;
        let written = self.coordinator.record_signed(record, with.map(|with| with.serial.clone()), timeout).await;
        unless_older(written)
    }

    async fn write_shown(&self, shown: &PeerCertificate, occasion: &str, timeout: Duration) -> Result<(), CoordinatorError> {
        let foreign = || CoordinatorError::message("certificate", "it is of none of the CAs");
        let record = seen_record_of(shown, self.credentials.get().ca_pem()).ok_or_else(foreign)?;
        unless_older(self.coordinator.record_shown(record, occasion, timeout).await)
    }

    /// `host:port` of all coordinators.
    pub(super) fn addresses(&self) -> Vec<String> {
        self.coordinator.0.replicated.read().members().values().map(|member| member.address.clone()).collect()
    }
}

/// Nobody is shut out because a process is of an older version, which knows no list of certificates: the leader writes down
/// later what it sees.
fn unless_older(written: Result<(), CoordinatorError>) -> Result<(), CoordinatorError> {
    match written {
        Err(CoordinatorError::Command(error @ CommandError::Level { .. })) => {
            tracing::warn!(%error, "a certificate is in use and not written down yet");
            Ok(())
        }
        written => written,
    }
}

/// Whether a caller with a good certificate was not removed meanwhile.
fn still_belongs(shared: &Shared, caller: &Identity) -> Result<(), CoordinatorError> {
    let state = shared.coordinator.0.replicated.read();
    let is_known = match caller.role {
        Role::Admin => true,
        Role::Coordinator => state.members().values().any(|member| member.name == caller.name),
        Role::Worker | Role::Gateway => {
            state.nodes().get(&NodeId::from(caller.name.as_str())).is_some_and(|record| record.spec.role == caller.role)
        }
    };
    if is_known {
        return Ok(());
    }
    Err(CoordinatorError::Forbidden { reason: format!("{caller} is not known any more: let it join anew with a join token") })
}

pub(super) fn hello_of(first: Option<SessionUp>, caller: &Identity) -> Result<NodeSpec, Status> {
    let wrong = |reason: String| refuse(CoordinatorError::Message { field: "hello", reason });
    let Some(first) = first else { return Err(wrong("the stream ended before it".into())) };
    let NodeUp::Hello { spec } = json("message_json", &first.message_json)? else {
        return Err(wrong("a session begins with it".into()));
    };
    if spec.id.0 != caller.name || spec.role != caller.role {
        let reason = format!("the certificate is of {caller}; it cannot speak for the {} {}", spec.role, spec.id);
        return Err(refuse(CoordinatorError::Forbidden { reason }));
    }
    Ok(*spec)
}

/// Carries messages both ways until one side ends. Dropping the session's ends ends it for the coordinator.
async fn carry(mut session: Session, mut received: Streaming<SessionUp>, answers: mpsc::Sender<Result<SessionDown, Status>>) {
    loop {
        let answer = tokio::select! {
            message = received.message() => match message {
                Ok(Some(message)) => match json::<NodeUp>("message_json", &message.message_json) {
                    // Its reader never waits long: it puts messages into places.
                    Ok(message) => match session.up.send(message).await {
                        Ok(()) => continue,
                        Err(_) => None,
                    },
                    Err(status) => Some(Err(status)),
                },
                Ok(None) => return,
                Err(status) => {
                    tracing::debug!(%status, "a session's connection ended");
                    return;
                }
            },
            message = session.down.recv() => message.map(|message| to_json(&message).map(|message_json| SessionDown { message_json })),
        };
        let Some(answer) = answer else {
            // The session ended; its last words come first.
            while let Ok(message) = session.down.try_recv() {
                let last = to_json(&message).map(|message_json| SessionDown { message_json });
                let _ = tokio::time::timeout(READ_WITHIN, answers.send(last)).await;
            }
            return;
        };
        let is_end = answer.is_err();
        let is_sent = matches!(tokio::time::timeout(READ_WITHIN, answers.send(answer)).await, Ok(Ok(())));
        if is_end || !is_sent {
            return;
        }
    }
}
