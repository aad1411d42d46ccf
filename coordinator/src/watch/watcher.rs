//! One watcher: a position in the history, or in a listing of everything there is.

use std::sync::{Arc, Weak};
use std::time::Duration;

use forge_proto::cluster::WatchBatch;
use forge_shared::cluster::Revision;
use tokio::sync::watch;
use tokio::time::Instant;

use super::history::Overtaken;
use super::{BatchBounds, Hub, KindSet, Listing, Published, Source};

/// Events of other kinds that may pass before a watcher is told how far it is, so that it can resume.
const SILENT_EVENTS: u64 = 1024;
/// How long a coordinator that is behind the asked revision may take to get there before the watcher begins again: a
/// revision of a history that is no more (a restored cluster) would else be waited for in vain.
pub const AHEAD: Duration = Duration::from_secs(5);

/// What a watcher gets at once.
#[derive(Debug)]
pub struct Batch {
    /// Everything up to here has been sent; 0 in the middle of a listing.
    pub revision: Revision,
    /// In order.
    pub events: Vec<Arc<Published>>,
    /// First of a listing of everything there is; what came before is void.
    pub is_reset: bool,
    /// Last of a listing; it may be the first one too.
    pub is_reset_end: bool,
}

impl From<Batch> for WatchBatch {
    fn from(batch: Batch) -> WatchBatch {
        WatchBatch {
            revision: batch.revision.0,
            events_json: batch.events.iter().map(|event| event.json.clone()).collect(),
            is_reset: batch.is_reset,
            is_reset_end: batch.is_reset_end,
        }
    }
}

enum Place {
    /// Asked to go on after a revision that this coordinator has not reached yet.
    Ahead { after: Revision, until: Instant },
    /// Begins with everything.
    Begin,
    /// In the middle of a listing.
    Listing { listing: Weak<Listing>, next: usize },
    /// Follows the history.
    Live { position: u64, silent: u64 },
}

/// See the module.
pub struct Watcher {
    hub: Arc<Hub>,
    source: Arc<dyn Source>,
    head: watch::Receiver<u64>,
    kinds: KindSet,
    place: Place,
}

impl std::fmt::Debug for Watcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watcher").field("kinds", &self.kinds).finish_non_exhaustive()
    }
}

impl Watcher {
    pub(super) fn new(hub: Arc<Hub>, source: Arc<dyn Source>, kinds: KindSet, after: Option<Revision>) -> Watcher {
        let head = hub.head.subscribe();
        let place = match after {
            None => Place::Begin,
            Some(after) => Place::Ahead { after, until: Instant::now() + AHEAD },
        };
        Watcher { hub, source, head, kinds, place }
    }

    /// The next batch; waits until there is one. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Batch {
        loop {
            // Before reading, so that what is published in between wakes.
            self.head.borrow_and_update();
            let deadline = match &self.place {
                Place::Ahead { until, .. } => Some(*until),
                _ => None,
            };
            if let Some(batch) = self.step() {
                return batch;
            }
            match deadline {
                None => {
                    if self.head.changed().await.is_err() {
                        // The hub holds the sender and we hold the hub: this cannot end while we wait.
                        std::future::pending::<()>().await;
                    }
                }
                Some(deadline) => {
                    if tokio::time::timeout_at(deadline, self.head.changed()).await.is_err() {
                        self.begin_again();
                    }
                }
            }
        }
    }

    /// The next batch, if there is one now: for a shell that waits by itself and knows when something was published.
    pub fn poll(&mut self) -> Option<Batch> {
        self.step()
    }

    /// Whether it waits for this coordinator to reach the revision that was asked for; after [`AHEAD`] it is to
    /// [`Watcher::begin_again`].
    pub fn is_ahead(&self) -> bool {
        matches!(self.place, Place::Ahead { .. })
    }

    /// Begins with everything there is.
    pub fn begin_again(&mut self) {
        self.place = Place::Begin;
    }

    fn step(&mut self) -> Option<Batch> {
        loop {
            match &mut self.place {
                Place::Ahead { after, .. } => {
                    let history = self.hub.history.read();
                    match history.position(*after) {
                        Err(Overtaken) => self.place = Place::Begin,
                        Ok(_) if history.head() < *after => {
                            // Entries without events may lie between: the state itself says where it is.
                            let (after, mut reached) = (*after, false);
                            drop(history);
                            self.source.visit(&mut |revision, _| reached = revision >= after);
                            if !reached {
                                return None;
                            }
                            let position = self.hub.history.read().position(after);
                            self.place = position.map_or(Place::Begin, |position| Place::Live { position, silent: 0 });
                        }
                        Ok(position) => {
                            drop(history);
                            self.place = Place::Live { position, silent: 0 };
                        }
                    }
                }
                Place::Begin => {
                    let listing = self.hub.listing(self.source.as_ref());
                    self.place = Place::Listing { listing: Arc::downgrade(&listing), next: 0 };
                }
                Place::Listing { listing, next } => match listing.upgrade() {
                    None => self.place = Place::Begin,
                    Some(listing) => {
                        let (batch, after) = part(&listing, *next, self.kinds);
                        self.place = match after {
                            Some(next) => Place::Listing { listing: Arc::downgrade(&listing), next },
                            None => Place::Live { position: listing.position, silent: 0 },
                        };
                        return Some(batch);
                    }
                },
                Place::Live { position, silent } => {
                    let slice = match self.hub.history.read().read(*position, self.kinds, BatchBounds::default()) {
                        Ok(slice) => slice,
                        Err(Overtaken) => {
                            self.place = Place::Begin;
                            continue;
                        }
                    };
                    *silent += slice.next - *position;
                    *position = slice.next;
                    if slice.events.is_empty() && *silent < SILENT_EVENTS {
                        return None;
                    }
                    *silent = 0;
                    return Some(Batch { revision: slice.revision, events: slice.events, is_reset: false, is_reset_end: false });
                }
            }
        }
    }
}

/// A batch of a listing, and where the next one begins, if there is one.
fn part(listing: &Listing, from: usize, kinds: KindSet) -> (Batch, Option<usize>) {
    let bounds = BatchBounds::default();
    let is_reset = from == 0;
    let mut events: Vec<Arc<Published>> = Vec::new();
    let mut json_bytes = 0;
    for (index, object) in listing.objects.iter().enumerate().skip(from).filter(|(_, object)| kinds.has(object.kind())) {
        let is_full = events.len() >= bounds.events || json_bytes + object.json.len() > bounds.json_bytes;
        if is_full && !events.is_empty() {
            return (Batch { revision: Revision(0), events, is_reset, is_reset_end: false }, Some(index));
        }
        json_bytes += object.json.len();
        events.push(object.clone());
    }
    (Batch { revision: listing.revision, events, is_reset, is_reset_end: true }, None)
}
