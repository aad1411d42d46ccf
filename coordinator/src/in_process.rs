//! A coordinator as [`ClusterApi`] for its own process: `forgectl serve` uses an embedded group of one through it, exactly
//! as other processes use a cluster through the wire.
//!
//! Invariant: calls wait for a leader within their time and no longer; streams follow the leadership and end with their
//! reader.

use std::future::Future;
use std::time::Duration;

use forge_cluster::api::{ClusterApi, ClusterError, ClusterLoads, GroupStatus, Listing, PlannedService, STREAM_DEPTH, Session, WatchItem};
use forge_shared::cluster::Revision;
use forge_shared::cluster::command::{Applied, Command};
use forge_shared::cluster::event::Kind;
use forge_shared::cluster::node::NodeSpec;
use forge_shared::spec::ModelService;
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::coordinator::{Coordinator, Submission};
use crate::error::CoordinatorError;
use crate::watch::{KindSet, Watcher};

/// Between two tries to find that this member leads.
const RETRY_PAUSE: Duration = Duration::from_millis(20);
/// Loads are sent no more often than this.
pub(crate) const MIN_LOADS_INTERVAL: Duration = Duration::from_millis(100);

impl Coordinator {
    /// Repeats a call while no leader is here to carry it out and nothing was proposed.
    async fn patiently<T, F>(&self, timeout: Duration, mut call: impl FnMut(Duration) -> F) -> Result<T, ClusterError>
    where
        F: Future<Output = Result<T, CoordinatorError>>,
    {
        let until = Instant::now() + timeout;
        loop {
            let error = match call(until.saturating_duration_since(Instant::now())).await {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            let is_worth_it = matches!(error, CoordinatorError::NotLeader { leader: None } | CoordinatorError::Busy { .. });
            if !is_worth_it || Instant::now() + RETRY_PAUSE >= until || self.0.stop.is_cancelled() {
                return Err(match ClusterError::from(error) {
                    ClusterError::Unavailable { reason, .. } => ClusterError::Unavailable { waited_ms: timeout.as_millis() as u64, reason },
                    error => error,
                });
            }
            tokio::time::sleep(RETRY_PAUSE).await;
        }
    }
}

impl ClusterApi for Coordinator {
    fn execute(&self, request_id: String, command: Command, timeout: Duration) -> BoxFuture<'_, Result<Applied, ClusterError>> {
        async move {
            if let Some(reason) = crate::access::internal(&command) {
                return Err(ClusterError::Forbidden { reason });
            }
            let submission = Submission { request_id, traceparent: forge_cluster::tracing::current_traceparent(), command };
            self.patiently(timeout, |left| self.submit(submission.clone(), left)).await
        }
        .boxed()
    }

    fn read(&self, kind: Kind, name: Option<String>, timeout: Duration) -> BoxFuture<'_, Result<Listing, ClusterError>> {
        async move {
            let name = name.as_deref();
            self.patiently(timeout, |left| self.list(kind, name, false, left)).await
        }
        .boxed()
    }

    fn watch(&self, kinds: Vec<Kind>, after: Option<Revision>) -> mpsc::Receiver<WatchItem> {
        let kinds = if kinds.is_empty() { KindSet::ALL } else { KindSet::of(&kinds) };
        let (items, received) = mpsc::channel(STREAM_DEPTH);
        let watcher = self.watcher(kinds, after);
        let stop = self.0.stop.clone();
        self.0.tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = items.closed() => {}
                () = forward(watcher, &items) => {}
            }
        });
        received
    }

    fn plan(&self, service: ModelService, timeout: Duration) -> BoxFuture<'_, Result<PlannedService, ClusterError>> {
        async move { self.patiently(timeout, |left| Coordinator::plan(self, service.clone(), left)).await }.boxed()
    }

    fn session(&self, hello: NodeSpec, timeout: Duration) -> BoxFuture<'_, Result<Session, ClusterError>> {
        async move { self.patiently(timeout, |left| self.open_session(hello.clone(), left)).await }.boxed()
    }

    fn status(&self, _: Duration) -> BoxFuture<'_, Result<GroupStatus, ClusterError>> {
        futures::future::ready(Ok(self.group_status())).boxed()
    }

    fn loads(&self, interval: Duration) -> mpsc::Receiver<ClusterLoads> {
        let (loads, received) = mpsc::channel(4);
        let coordinator = self.clone();
        self.0.tasks.spawn(async move {
            loop {
                if let Ok(leading) = coordinator.leading() {
                    let now = leading.sessions.loads(coordinator.now_ms());
                    if loads.send(now).await.is_err() {
                        return;
                    }
                }
                tokio::select! {
                    () = coordinator.0.stop.cancelled() => return,
                    () = loads.closed() => return,
                    () = tokio::time::sleep(interval.max(MIN_LOADS_INTERVAL)) => {}
                }
            }
        });
        received
    }
}

/// Gives a watcher's batches on, item by item; ends with the reader.
async fn forward(mut watcher: Watcher, items: &mpsc::Sender<WatchItem>) {
    let mut in_listing = false;
    loop {
        let batch = watcher.next().await;
        in_listing = (in_listing || batch.is_reset) && !batch.is_reset_end;
        let reset = batch.is_reset.then_some(WatchItem::Reset);
        let events = batch.events.iter().map(|published| WatchItem::Event(published.event.clone()));
        let current = (!in_listing).then_some(WatchItem::Current(batch.revision));
        for item in reset.into_iter().chain(events).chain(current) {
            if items.send(item).await.is_err() {
                return;
            }
        }
    }
}
