//! The coordinators over a wire: [`ClusterApi`] for workers, gateways and `forgectl`.
//!
//! What it is not: it holds no state of the cluster; what it remembers is which addresses answered and who led last.
//!
//! Invariants: a command keeps its request id over all tries, so that asking again is safe; it ends within the caller's
//! time; after `Unavailable` nothing was proposed, and where that is not certain the error is `Unknown`.

mod calls;
mod channels;
pub mod fuzz;
mod operator;
mod renewal;
pub mod route;
mod streams;
#[cfg(test)]
mod tests;
mod trust;

use std::sync::Arc;
use std::time::Duration;

use forge_proto::cluster::{ExecuteRequest, PlanRequest, ReadRequest, StatusReply, StatusRequest};
use forge_shared::cluster::Revision;
use forge_shared::cluster::command::{Applied, Command};
use forge_shared::cluster::event::{Kind, Object};
use forge_shared::cluster::node::NodeSpec;
use forge_shared::spec::ModelService;
use futures::FutureExt;
use futures::future::BoxFuture;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

use crate::api::{ClusterApi, ClusterError, ClusterLoads, GroupStatus, Listing, PlannedService, Session, WatchItem};
use crate::tls::{SharedCredentials, TlsError};

use calls::Patience;
use channels::Channels;

pub use operator::{LogSource, MemberAction};
pub use renewal::keep_renewed;
pub use streams::{Position, watch_items};
pub use trust::{believe, keep_certificates};

/// Largest message that is taken from a coordinator: a listing of a thousand nodes has a few MiB.
const MAX_REPLY_BYTES: usize = 64 << 20;

/// The coordinators of one cluster. Clones share connections.
#[derive(Debug, Clone)]
pub struct RemoteCluster {
    channels: Arc<Channels>,
}

impl RemoteCluster {
    /// Coordinators at these addresses (`host:port`, at least one). Connects at the first call.
    ///
    /// # Errors
    /// [`TlsError`] for an address that is none, or credentials that cannot be used.
    pub fn new(addresses: &[String], credentials: &SharedCredentials) -> Result<Self, TlsError> {
        Ok(RemoteCluster { channels: Arc::new(Channels::new(addresses, credentials)?) })
    }

    /// What it shows; replace them there after a renewal.
    pub fn credentials(&self) -> &SharedCredentials {
        self.channels.credentials()
    }
}

impl ClusterApi for RemoteCluster {
    fn execute(&self, request_id: String, command: Command, timeout: Duration) -> BoxFuture<'_, Result<Applied, ClusterError>> {
        async move {
            let request = ExecuteRequest { request_id, command_json: to_json(&command)? };
            let reply = self
                .channels
                .call(Patience::changing(timeout), move |mut client, request| async move { client.execute(request).await }, request)
                .await?;
            from_json("applied", &reply.applied_json)
        }
        .boxed()
    }

    fn read(&self, kind: Kind, name: Option<String>, timeout: Duration) -> BoxFuture<'_, Result<Listing, ClusterError>> {
        async move {
            let request = ReadRequest { kind: kind_name(kind)?, name: name.unwrap_or_default(), is_local: false };
            let reply = self
                .channels
                .call(Patience::reading(timeout), |mut client, request| async move { client.read(request).await }, request)
                .await?;
            let objects = reply.objects_json.iter().map(|object| from_json::<Object>("object", object)).collect::<Result<Vec<_>, _>>()?;
            if let Some(other) = objects.iter().find(|object| object.kind() != kind) {
                return Err(ClusterError::Protocol { reason: format!("asked for {kind:?}, got {:?}", other.kind()) });
            }
            Ok(Listing { revision: Revision(reply.revision), objects })
        }
        .boxed()
    }

    fn watch(&self, kinds: Vec<Kind>, after: Option<Revision>) -> mpsc::Receiver<WatchItem> {
        streams::watch(self.channels.clone(), kinds, after)
    }

    fn plan(&self, service: ModelService, timeout: Duration) -> BoxFuture<'_, Result<PlannedService, ClusterError>> {
        async move {
            let request = PlanRequest { service_json: to_json(&service)? };
            let reply = self
                .channels
                .call(Patience::working(timeout), |mut client, request| async move { client.plan(request).await }, request)
                .await?;
            from_json("plan", &reply.planned_json)
        }
        .boxed()
    }

    fn session(&self, hello: NodeSpec, timeout: Duration) -> BoxFuture<'_, Result<Session, ClusterError>> {
        streams::session(self.channels.clone(), hello, timeout).boxed()
    }

    fn status(&self, timeout: Duration) -> BoxFuture<'_, Result<GroupStatus, ClusterError>> {
        async move {
            let request = StatusRequest {};
            let is_best = |reply: &StatusReply| serde_json::from_slice::<GroupStatus>(&reply.status_json).is_ok_and(knows_leader);
            let reply = self
                .channels
                .call_all(timeout, is_best, |mut client, request| async move { client.status(request).await }, request)
                .await?;
            from_json("status", &reply.status_json)
        }
        .boxed()
    }

    fn loads(&self, interval: Duration) -> mpsc::Receiver<ClusterLoads> {
        streams::loads(self.channels.clone(), interval)
    }
}

/// Whether a member's answer is worth taking before the others'. One that has just been let in hears the leader before it
/// has read who the members are.
fn knows_leader(status: GroupStatus) -> bool {
    status.members.iter().any(|member| member.id == status.leader_id && !member.address.is_empty())
}

/// Bytes of a document for the wire.
fn to_json<T: Serialize>(value: &T) -> Result<bytes::Bytes, ClusterError> {
    serde_json::to_vec(value).map(Into::into).map_err(|error| ClusterError::Protocol { reason: format!("cannot be written: {error}") })
}

/// A document from the wire. Unknown keys are refused: the other side is of a newer version.
fn from_json<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T, ClusterError> {
    serde_json::from_slice(bytes).map_err(|error| ClusterError::Protocol {
        reason: format!("the coordinator's {what} cannot be read ({error}): bring both sides to one version of Forge"),
    })
}

/// As the wire writes a kind.
fn kind_name(kind: Kind) -> Result<String, ClusterError> {
    match serde_json::to_value(kind) {
        Ok(serde_json::Value::String(name)) => Ok(name),
        other => Err(ClusterError::Protocol { reason: format!("a kind without a name: {other:?}") }),
    }
}
