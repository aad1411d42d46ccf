//! `ClusterMember`: the tasks that tie a gateway to its coordinators.
//!
//! One follows the cluster by watch and publishes what is served; one keeps the session: heartbeats, use of keys, shares.
//! Invariant: neither ever ends by itself while the member lives, and neither blocks a request.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forge_cluster::api::{ClusterApi, ClusterError};
use forge_cluster::engine::EngineDialer;
use forge_shared::cluster::command::{Applied, Command, IdempotencyRecord};
use forge_shared::cluster::event::Kind;
use forge_shared::cluster::node::NodeSpec;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

use super::directory::Directory;
use super::replicas::{FindText, Replicas};
use super::roster::{Serves, epochs};
use super::session;
use super::shares::Shares;
use crate::gateway::Gateway;
use crate::idempotency::command_id;
use crate::keys::KeyRing;
use crate::model_table::NameClash;

/// Between two tries to watch.
const WATCH_RETRY: Duration = Duration::from_millis(500);
/// For writing down an idempotency key before a request is admitted.
const RECORD_TIMEOUT: Duration = Duration::from_secs(5);

/// What a member is made of.
#[derive(Clone)]
pub struct MemberParts {
    /// The coordinators.
    pub api: Arc<dyn ClusterApi>,
    /// The way to replicas.
    pub dialer: Arc<dyn EngineDialer>,
    /// Who this gateway is.
    pub spec: NodeSpec,
    /// Told the keys of the cluster.
    pub keys: KeyRing,
    /// Given the shares of their limits.
    pub shares: Arc<Shares>,
    /// Finds text parts that this process has built, if it may have any; others are fetched and built here.
    pub built_texts: Option<FindText>,
}

/// What a gateway serves of a service.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Published {
    /// Replicas that are wished.
    pub wished: u32,
    /// Replicas that requests go to.
    pub served: u32,
}

/// See the module documentation. Dropping it ends its tasks.
pub struct ClusterMember {
    tasks: Vec<JoinHandle<()>>,
    published: watch::Receiver<Option<BTreeMap<String, Published>>>,
    refused: watch::Receiver<Option<String>>,
}

impl Drop for ClusterMember {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl ClusterMember {
    /// Begins to follow the cluster and to publish into `gateway`.
    pub fn start(parts: MemberParts, gateway: Gateway) -> Self {
        let (sender, published) = watch::channel(None);
        let (refused_sender, refused) = watch::channel(None);
        let (serves_sender, serves) = watch::channel(Serves::new());
        let following = tokio::spawn(follow(parts.clone(), gateway.clone(), sender, serves_sender));
        let session = tokio::spawn(session::keep(parts, gateway, serves, refused_sender));
        ClusterMember { tasks: vec![following, session], published, refused }
    }

    /// Resolves once the services and keys of the cluster are known.
    pub async fn known(&self) {
        // The sender lives in a task that never ends before this is dropped.
        let _ = self.published.clone().wait_for(Option::is_some).await;
    }

    /// Resolves once what is served of a service, if it is wanted at all, is as asked.
    pub async fn publishes(&self, service: &str, is_enough: impl Fn(Published) -> bool) {
        let is_so = |published: &Option<BTreeMap<String, Published>>| {
            published.as_ref().and_then(|published| published.get(service)).is_some_and(|published| is_enough(*published))
        };
        // As above.
        let _ = self.published.clone().wait_for(is_so).await;
    }

    /// Resolves when the coordinators refuse this gateway for good, with the reason: a newer process has its name.
    pub async fn refused(&self) -> String {
        let mut refused = self.refused.clone();
        let reason = refused.wait_for(Option::is_some).await.ok().and_then(|reason| reason.clone());
        match reason {
            Some(reason) => reason,
            // The sender is gone with its task: nobody will refuse it any more.
            None => std::future::pending().await,
        }
    }
}

async fn follow(
    parts: MemberParts,
    gateway: Gateway,
    published: watch::Sender<Option<BTreeMap<String, Published>>>,
    serves: watch::Sender<Serves>,
) {
    let changed = Arc::new(Notify::new());
    let mut directory = Directory::default();
    let mut replicas = Replicas::new(parts.dialer.clone(), parts.built_texts.clone(), changed.clone());
    let mut items = parts.api.watch(vec![Kind::Node, Kind::Service, Kind::Key], None);
    let mut clashes: Vec<NameClash> = Vec::new();
    loop {
        tokio::select! {
            item = items.recv() => match item {
                Some(item) => {
                    if !directory.apply(item) || !directory.is_known() {
                        continue;
                    }
                    // What waits is taken at once: a burst of changes is one reconciliation.
                    while let Ok(item) = items.try_recv() {
                        directory.apply(item);
                    }
                    parts.keys.replace(directory.keys().cloned().map(Into::into).collect());
                    parts.shares.retain(|id| directory.keys().any(|key| key.id == id));
                    replicas.reconcile(&directory.wanted());
                }
                None => {
                    tracing::error!("the watch of the cluster ended; beginning again");
                    tokio::time::sleep(WATCH_RETRY).await;
                    items = parts.api.watch(vec![Kind::Node, Kind::Service, Kind::Key], None);
                    continue;
                }
            },
            () = changed.notified() => {}
        }
        let served = replicas.served();
        let found = gateway.publish(&served, &directory.services());
        let count = |service: &String| served.iter().filter(|replica| replica.service == *service).count();
        let of = |(service, wished)| {
            let served = u32::try_from(count(&service)).unwrap_or(u32::MAX);
            (service, Published { wished, served })
        };
        published.send_replace(Some(directory.wishes().into_iter().map(of).collect()));
        // After the publishing: what the cluster is told to be served is.
        serves.send_replace(epochs(&served));
        for clash in found.iter().filter(|clash| !clashes.contains(clash)) {
            tracing::warn!(%clash, "ask for the other service by its own name");
        }
        clashes = found;
    }
}

/// Idempotency keys that all gateways of the cluster know.
pub(crate) struct SharedRecords {
    api: Arc<dyn ClusterApi>,
}

impl SharedRecords {
    pub(crate) fn new(api: Arc<dyn ClusterApi>) -> Self {
        SharedRecords { api }
    }

    /// Writes a record down, or gives the one that is there already.
    ///
    /// # Errors
    /// No coordinator answered in time, or the cluster refused it.
    pub(crate) async fn record(&self, record: IdempotencyRecord) -> Result<IdempotencyRecord, ClusterError> {
        let request_id = command_id(&record);
        let began = Instant::now();
        let command = Command::RecordIdempotency { record: record.clone() };
        let Applied { existing, .. } = self.api.execute(request_id, command, RECORD_TIMEOUT).await?;
        tracing::debug!(milliseconds = began.elapsed().as_millis() as u64, known = existing.is_some(), "idempotency key recorded");
        Ok(existing.unwrap_or(record))
    }
}
