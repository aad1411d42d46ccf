//! What operators ask beyond [`crate::api::ClusterApi`]: logs, backups, members.

use std::time::Duration;

use bytes::Bytes;
use forge_proto::cluster::change_members_request::Change;
use forge_proto::cluster::{BackupRequest, BeginCaRotationRequest, ChangeMembersRequest, LogLine, LogsRequest};
use forge_proto::node::{ConfirmRequest, RenewRequest, SigningKeyRequest};
use futures::StreamExt;
use tokio::sync::mpsc;
use tonic::{Request, Streaming};

use super::RemoteCluster;
use super::calls::Patience;
use super::channels::EXPECTED;
use super::streams::untimed;
use crate::api::{ClusterError, STREAM_DEPTH};
use crate::status::from_status;
use crate::tls::{Credentials, NodeKey};

/// Longest silence of a backup.
const BACKUP_PAUSE: Duration = Duration::from_secs(30);

/// Whose log lines.
#[derive(Debug, Clone)]
pub struct LogSource {
    /// `service`, `service/index`, or a node's name.
    pub target: String,
    /// Whether `target` is a node.
    pub is_node: bool,
    /// Go on with new lines.
    pub is_following: bool,
    /// Last lines to begin with.
    pub tail_lines: u32,
}

/// A change of the group's membership. Coordinators are added by joining with a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemberAction {
    /// A learner votes from now on.
    Promote(u64),
    /// No longer a member.
    Remove(u64),
    /// Leads from now on.
    TransferLeadership(u64),
}

impl RemoteCluster {
    /// Has the leader change the group's members.
    ///
    /// # Errors
    /// [`ClusterError`].
    pub async fn change_members(&self, action: MemberAction, timeout: Duration) -> Result<(), ClusterError> {
        let change = match action {
            MemberAction::Promote(id) => Change::PromoteId(id),
            MemberAction::Remove(id) => Change::RemoveId(id),
            MemberAction::TransferLeadership(id) => Change::TransferToId(id),
        };
        let request = ChangeMembersRequest { change: Some(change) };
        let send = |mut client: forge_proto::cluster::cluster_client::ClusterClient<_>, request| async move {
            client.change_members(request).await
        };
        self.channels.call(Patience::changing(timeout), send, request).await?;
        Ok(())
    }

    /// Log lines of a replica or node. `timeout` bounds the beginning; the lines end with the source, an error, or the
    /// reader.
    ///
    /// # Errors
    /// [`ClusterError`].
    pub async fn logs(&self, source: LogSource, timeout: Duration) -> Result<mpsc::Receiver<Result<LogLine, ClusterError>>, ClusterError> {
        let request = LogsRequest { target: source.target, is_node: source.is_node, follow: source.is_following, tail: source.tail_lines };
        let opened = self
            .channels
            .call(Patience::working(timeout), |mut client, request| async move { client.logs(untimed(request)).await }, request)
            .await?;
        Ok(relay(opened, None))
    }

    /// The applied state in pieces, to be written to a file in this order. It is whole when the pieces end without an
    /// error.
    ///
    /// # Errors
    /// [`ClusterError`].
    pub async fn backup(&self, timeout: Duration) -> Result<mpsc::Receiver<Result<Bytes, ClusterError>>, ClusterError> {
        let opened = self
            .channels
            .call(Patience::working(timeout), |mut client, request| async move { client.backup(untimed(request)).await }, BackupRequest {})
            .await?;
        let mut chunks = relay(opened, Some(BACKUP_PAUSE));
        let (pieces, received) = mpsc::channel(STREAM_DEPTH);
        tokio::spawn(async move {
            while let Some(chunk) = chunks.recv().await {
                if pieces.send(chunk.map(|chunk| chunk.data)).await.is_err() {
                    return;
                }
            }
        });
        Ok(received)
    }

    /// New credentials for this process, with a new key. Nothing is replaced: the caller saves and then replaces them.
    ///
    /// # Errors
    /// [`ClusterError`], also where what came back is not for this process.
    pub async fn renew(&self, timeout: Duration) -> Result<Credentials, ClusterError> {
        let protocol = |error: crate::tls::TlsError| ClusterError::Protocol { reason: format!("renewal: {error}") };
        let key = NodeKey::generate().map_err(protocol)?;
        let request = RenewRequest {
            signing_request_der: key.signing_request_der().map_err(protocol)?.into(),
            believed_ca_sha256: self.credentials().believed_cas(),
        };
        let attempt = |address: String, wait: Duration| {
            let (client, message) = (self.channels.nodes(&address), request.clone());
            async move {
                let mut request = Request::new(message);
                request.set_timeout(wait);
                Ok(client?.renew(request).await?.into_inner())
            }
        };
        // Two certificates for one process do no harm: an answer that was lost needs no care.
        let reply = self.channels.attempts(Patience::reading(timeout), attempt).await?;
        let held = self.credentials().get();
        // A coordinator says which CAs are believed: one that is believed itself.
        let renewed = Credentials::from_pem(&reply.certificate_pem, &key.pem(), &reply.ca_certificate_pem).map_err(protocol)?;
        if renewed.identity() != held.identity() {
            return Err(ClusterError::Protocol { reason: format!("the renewed certificate is for {}", renewed.identity()) });
        }
        renewed.check_time(self.credentials().clock().now_s()).map_err(protocol)?;
        for address in &reply.coordinators {
            self.channels.learn(address);
        }
        Ok(renewed)
    }

    /// Says that this process has kept the certificate that it shows: a change of the CA waits for that.
    ///
    /// # Errors
    /// [`ClusterError`].
    pub async fn confirm(&self, timeout: Duration) -> Result<(), ClusterError> {
        let attempt = |address: String, wait: Duration| {
            let client = self.channels.nodes(&address);
            async move {
                let mut request = Request::new(ConfirmRequest {});
                request.set_timeout(wait);
                match client?.confirm(request).await {
                    // A coordinator of the first level, which has no list of certificates.
                    Err(status) if status.code() == tonic::Code::Unimplemented => Ok(()),
                    confirmed => confirmed.map(drop),
                }
            }
        };
        self.channels.attempts(Patience::reading(timeout), attempt).await
    }

    /// A CA's key, which only coordinators are given, from one that has it.
    ///
    /// # Errors
    /// [`ClusterError`].
    pub async fn signing_key(&self, ca_sha256: &str, timeout: Duration) -> Result<String, ClusterError> {
        let request = SigningKeyRequest { ca_sha256: ca_sha256.to_owned() };
        let attempt = |address: String, wait: Duration| {
            let (client, message) = (self.channels.nodes(&address), request.clone());
            async move {
                let mut request = Request::new(message);
                request.set_timeout(wait);
                Ok(client?.signing_key(request).await?.into_inner())
            }
        };
        Ok(self.channels.attempts(Patience::reading(timeout), attempt).await?.key_pem)
    }

    /// Has the leader make a new CA, believed beside the one that signs; hex of its digest.
    ///
    /// # Errors
    /// [`ClusterError`].
    pub async fn begin_ca_rotation(&self, timeout: Duration) -> Result<String, ClusterError> {
        let send = |mut client: forge_proto::cluster::cluster_client::ClusterClient<_>, request| async move {
            client.begin_ca_rotation(request).await
        };
        Ok(self.channels.call(Patience::changing(timeout), send, BeginCaRotationRequest {}).await?.ca_sha256)
    }
}

/// A stream's messages as they come. `pause` is the longest wait for the next one.
fn relay<T: Send + 'static>(mut stream: Streaming<T>, pause: Option<Duration>) -> mpsc::Receiver<Result<T, ClusterError>> {
    let (items, received) = mpsc::channel(STREAM_DEPTH);
    tokio::spawn(async move {
        loop {
            let silence = async {
                match pause {
                    Some(pause) => tokio::time::sleep(pause).await,
                    None => std::future::pending().await,
                }
            };
            let item = tokio::select! {
                item = stream.next() => item,
                () = items.closed() => return,
                () = silence => Some(Err(tonic::Status::deadline_exceeded("nothing came for too long"))),
            };
            let (item, is_last) = match item {
                Some(Ok(item)) => (Ok(item), false),
                Some(Err(status)) => (Err(from_status(&status, EXPECTED).error), true),
                None => return,
            };
            if items.send(item).await.is_err() || is_last {
                return;
            }
        }
    });
    received
}
