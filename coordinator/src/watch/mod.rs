//! Watching the cluster: one history for all watchers, each of which is a position in it.
//!
//! What it is not: a queue per watcher. One that reads slowly is overtaken by the bounded [`History`] and begins again
//! with everything there is; memory does not grow with what it has not read. An event's JSON is made once.
//!
//! Invariant: a watcher sees a reset with everything there is, or continues after the revision it names; then every event
//! of its kinds in the order of the log, each once.

mod history;
#[cfg(test)]
mod tests;
mod watcher;

use std::sync::Arc;
use std::time::Duration;

use forge_shared::cluster::Revision;
use forge_shared::cluster::event::{Change, Event, Object};
use parking_lot::{Mutex, RwLock};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

pub use history::{BatchBounds, History, HistoryBounds, KindSet, Published};
pub use watcher::{AHEAD, Batch, Watcher};

/// Watchers are woken at most this often, so that a burst of commands is one wake for each of them.
const WAKE_INTERVAL: Duration = Duration::from_millis(5);
/// A listing is given to new watchers until this many events have passed since it was made.
const LISTING_EVENTS: u64 = 256;

/// Sees the state's revision and a way to list its objects.
pub type See<'a> = dyn FnMut(Revision, &dyn Fn() -> Vec<Object>) + 'a;

/// Where everything there is can be read.
pub trait Source: Send + Sync {
    /// Calls `see` while nothing can change or be published.
    fn visit(&self, see: &mut See<'_>);
}

/// Everything there was at one revision, encoded once for all who begin about then.
#[derive(Debug)]
struct Listing {
    revision: Revision,
    /// Where to read on.
    position: u64,
    objects: Vec<Arc<Published>>,
}

/// Gives what is published to all watchers.
pub struct Hub {
    history: RwLock<History>,
    /// The last listing. Watchers hold it weakly: one that stalls in the middle of it begins again.
    listing: Mutex<Option<Arc<Listing>>>,
    published: Notify,
    head: watch::Sender<u64>,
}

impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hub").field("watchers", &self.watchers()).finish_non_exhaustive()
    }
}

impl Hub {
    /// A hub of a state at `revision`. [`Hub::run`] must run for watchers to be woken.
    pub fn new(bounds: HistoryBounds, revision: Revision) -> Arc<Hub> {
        Arc::new(Hub {
            history: RwLock::new(History::new(bounds, revision)),
            listing: Mutex::new(None),
            published: Notify::new(),
            head: watch::Sender::new(0),
        })
    }

    /// Adds one applied entry's changes. The caller holds the state's lock, so that a listing and the position after it
    /// belong together.
    pub fn publish(&self, revision: Revision, changes: Vec<Change>) {
        if changes.is_empty() {
            return;
        }
        let events: Vec<_> = changes.into_iter().filter_map(|change| Published::new(Event { revision, change })).collect();
        self.history.write().push(revision, events);
        self.published.notify_one();
    }

    /// The state was replaced by a snapshot: every watcher begins again. The caller holds the state's lock, so this must not
    /// wait for the listing, whose maker waits for the state: the history alone says that the last one is over.
    pub fn reset(&self, revision: Revision) {
        self.history.write().reset(revision);
        self.published.notify_one();
    }

    /// Wakes watchers: everything published so far is theirs to read.
    pub fn wake(&self) {
        let end = self.history.read().end();
        self.head.send_replace(end);
    }

    /// Wakes watchers until `stop`; a burst is one wake.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        let wake = async {
            loop {
                self.published.notified().await;
                self.wake();
                tokio::time::sleep(WAKE_INTERVAL).await;
            }
        };
        tokio::select! {
            () = wake => {}
            () = stop.cancelled() => {}
        }
    }

    /// Watchers there are.
    pub fn watchers(&self) -> usize {
        self.head.receiver_count()
    }

    /// Revision of the last event.
    pub fn revision(&self) -> Revision {
        self.history.read().head()
    }

    /// Begins to watch: after a revision, or with everything there is.
    pub fn watch(self: &Arc<Self>, source: Arc<dyn Source>, kinds: KindSet, after: Option<Revision>) -> Watcher {
        Watcher::new(self.clone(), source, kinds, after)
    }

    fn listing(&self, source: &dyn Source) -> Arc<Listing> {
        let mut kept = self.listing.lock();
        if let Some(listing) = kept.as_ref() {
            let history = self.history.read();
            if history.has(listing.position) && history.end() - listing.position <= LISTING_EVENTS {
                return listing.clone();
            }
        }
        let mut made = None;
        source.visit(&mut |revision, objects| {
            let position = self.history.read().end();
            let put = |object| Published::new(Event { revision, change: Change::Put { object } });
            made = Some(Listing { revision, position, objects: objects().into_iter().filter_map(put).collect() });
        });
        let listing = Arc::new(made.unwrap_or(Listing { revision: Revision(0), position: 0, objects: Vec::new() }));
        *kept = Some(listing.clone());
        listing
    }
}
