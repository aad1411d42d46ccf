//! Recent events in the order of the log, for all watchers at once.
//!
//! A core: no clock, socket or thread. A watcher is a position in it; what it has not read yet lies here once, whoever
//! else still has to read it.
//!
//! Invariants: every event after [`History::floor`] is here; a position that was given out either finds the next event or
//! learns that it has been overtaken, never a gap; events and bytes are bounded.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use forge_shared::cluster::Revision;
use forge_shared::cluster::event::{Change, Event, Kind};

/// A set of kinds: what a watcher asked for and may see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KindSet(u8);

impl KindSet {
    /// Every kind.
    pub const ALL: KindSet = KindSet(0b1111_1111);

    /// These kinds.
    pub fn of(kinds: &[Kind]) -> KindSet {
        KindSet(kinds.iter().fold(0, |set, kind| set | KindSet::bit(*kind)))
    }

    /// Whether `kind` is in it.
    pub fn has(self, kind: Kind) -> bool {
        self.0 & KindSet::bit(kind) != 0
    }

    /// Kinds that are in both.
    pub fn and(self, other: KindSet) -> KindSet {
        KindSet(self.0 & other.0)
    }

    /// Whether nothing is in it.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    fn bit(kind: Kind) -> u8 {
        1 << match kind {
            Kind::Node => 0,
            Kind::Service => 1,
            Kind::Key => 2,
            Kind::Member => 3,
            Kind::Token => 4,
            Kind::Notice => 5,
            Kind::Certificate => 6,
            Kind::Trust => 7,
        }
    }
}

/// An event and its JSON, made once.
#[derive(Debug)]
pub struct Published {
    /// The event.
    pub event: Event,
    /// Its JSON.
    pub json: Bytes,
    kind: Kind,
}

impl Published {
    /// Encodes an event. `None` where it has no JSON, which no event of ours is: it is logged and left out.
    pub fn new(event: Event) -> Option<Arc<Published>> {
        let kind = match &event.change {
            Change::Put { object } => object.kind(),
            Change::Deleted { kind, .. } => *kind,
        };
        match serde_json::to_vec(&event) {
            Ok(json) => Some(Arc::new(Published { event, json: json.into(), kind })),
            Err(error) => {
                tracing::error!(%error, ?kind, "an event has no JSON: watchers do not see it");
                None
            }
        }
    }

    /// What it is about.
    pub fn kind(&self) -> Kind {
        self.kind
    }
}

/// What a history may hold.
#[derive(Debug, Clone, Copy)]
pub struct HistoryBounds {
    /// Events.
    pub events: usize,
    /// Bytes of their JSON.
    pub json_bytes: usize,
}

impl Default for HistoryBounds {
    fn default() -> Self {
        HistoryBounds { events: 8192, json_bytes: 32 << 20 }
    }
}

/// What one message to a watcher may hold.
#[derive(Debug, Clone, Copy)]
pub struct BatchBounds {
    /// Events.
    pub events: usize,
    /// Bytes of JSON; one event alone may be larger.
    pub json_bytes: usize,
}

impl Default for BatchBounds {
    fn default() -> Self {
        BatchBounds { events: 256, json_bytes: 256 << 10 }
    }
}

/// A part of the history, as a watcher reads it.
#[derive(Debug)]
pub struct Slice {
    /// Those of the wished kinds.
    pub events: Vec<Arc<Published>>,
    /// Where to read on.
    pub next: u64,
    /// Everything up to here has been read.
    pub revision: Revision,
}

/// The position has been overtaken: begin with everything there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overtaken;

/// Recent events. Positions are counted from 0 for ever.
#[derive(Debug)]
pub struct History {
    bounds: HistoryBounds,
    events: VecDeque<Arc<Published>>,
    /// Position of `events[0]`.
    first: u64,
    floor: Revision,
    head: Revision,
    json_bytes: usize,
}

impl History {
    /// An empty history of a state at `revision`.
    pub fn new(bounds: HistoryBounds, revision: Revision) -> Self {
        History { bounds, events: VecDeque::new(), first: 0, floor: revision, head: revision, json_bytes: 0 }
    }

    /// Every event after this revision is here.
    pub fn floor(&self) -> Revision {
        self.floor
    }

    /// Revision of the last event.
    pub fn head(&self) -> Revision {
        self.head
    }

    /// The position after the last event.
    pub fn end(&self) -> u64 {
        self.first + self.events.len() as u64
    }

    /// Adds one revision's events.
    pub fn push(&mut self, revision: Revision, events: impl IntoIterator<Item = Arc<Published>>) {
        for event in events {
            self.json_bytes += event.json.len();
            self.events.push_back(event);
        }
        self.head = self.head.max(revision);
        while self.events.len() > self.bounds.events || (self.json_bytes > self.bounds.json_bytes && self.events.len() > 1) {
            let Some(event) = self.events.pop_front() else { break };
            self.json_bytes -= event.json.len();
            self.first += 1;
            self.floor = self.floor.max(event.event.revision);
        }
    }

    /// The state was replaced by a snapshot: all positions are overtaken.
    pub fn reset(&mut self, revision: Revision) {
        self.first = self.end() + 1;
        self.events.clear();
        self.json_bytes = 0;
        self.floor = revision;
        self.head = revision;
    }

    /// The position of the first event after `revision`.
    ///
    /// # Errors
    /// `Overtaken` where some of them are gone.
    pub fn position(&self, revision: Revision) -> Result<u64, Overtaken> {
        if revision < self.floor {
            return Err(Overtaken);
        }
        let index = self.events.partition_point(|event| event.event.revision <= revision);
        Ok(self.first + index as u64)
    }

    /// Whether everything from `position` on is here.
    pub fn has(&self, position: u64) -> bool {
        position >= self.first
    }

    /// Events from `position` on, within bounds.
    ///
    /// # Errors
    /// `Overtaken` where `position` is no longer here.
    pub fn read(&self, position: u64, kinds: KindSet, bounds: BatchBounds) -> Result<Slice, Overtaken> {
        let skip = position.checked_sub(self.first).ok_or(Overtaken)?;
        let skip = usize::try_from(skip).unwrap_or(usize::MAX).min(self.events.len());
        let mut slice = Slice { events: Vec::new(), next: self.first + skip as u64, revision: self.head };
        let mut json_bytes = 0;
        for event in self.events.range(skip..) {
            if kinds.has(event.kind) {
                let is_full = slice.events.len() >= bounds.events || json_bytes + event.json.len() > bounds.json_bytes;
                if is_full && !slice.events.is_empty() {
                    // This one comes next; of its revision not everything has been read.
                    slice.revision = Revision(event.event.revision.0.saturating_sub(1));
                    return Ok(slice);
                }
                json_bytes += event.json.len();
                slice.events.push(event.clone());
            }
            slice.next += 1;
        }
        Ok(slice)
    }
}

#[cfg(test)]
mod tests {
    use forge_shared::cluster::event::{Notice, Object};
    use proptest::prelude::*;

    use super::*;

    fn event(revision: u64, about: &str) -> Arc<Published> {
        let notice = Notice {
            number: revision,
            revision: Revision(revision),
            at_ms: 0,
            is_warning: false,
            reason: "Test".into(),
            about: about.into(),
            message: String::new(),
        };
        Published::new(Event { revision: Revision(revision), change: Change::Put { object: Object::Notice(notice) } })
            .expect("a notice has JSON")
    }

    #[test]
    fn kinds_are_told_apart() {
        let set = KindSet::of(&[Kind::Node, Kind::Notice]);
        assert!(set.has(Kind::Node) && set.has(Kind::Notice) && !set.has(Kind::Key));
        assert!(KindSet::of(&[]).is_empty());
        assert_eq!(KindSet::ALL.and(set), set);
    }

    #[test]
    fn a_reset_overtakes_every_position() {
        let mut history = History::new(HistoryBounds::default(), Revision(5));
        history.push(Revision(6), [event(6, "a")]);
        let end = history.end();
        history.reset(Revision(90));
        assert_eq!(history.read(end, KindSet::ALL, BatchBounds::default()).map(|_| ()), Err(Overtaken));
        assert!(!history.has(end) && history.has(history.end()));
        assert_eq!(history.position(Revision(6)), Err(Overtaken));
        assert_eq!(history.position(Revision(90)), Ok(history.end()));
    }

    #[test]
    fn kinds_that_were_not_asked_for_are_passed_over() {
        let mut history = History::new(HistoryBounds::default(), Revision(0));
        history.push(Revision(1), [event(1, "a")]);
        let slice = history.read(0, KindSet::of(&[Kind::Key]), BatchBounds::default()).expect("it is there");
        assert!(slice.events.is_empty());
        assert_eq!((slice.next, slice.revision), (1, Revision(1)));
    }

    proptest! {
        /// A reader with any pauses, batch sizes and resumptions sees every event once and in order, or is told that it
        /// was overtaken; memory stays bounded.
        #[test]
        fn readers_see_all_or_are_told(
            steps in prop::collection::vec((1usize..4, 0usize..6, any::<bool>()), 1..80),
            kept in 1usize..20,
        ) {
            let bounds = HistoryBounds { events: kept, json_bytes: 1 << 20 };
            let mut history = History::new(bounds, Revision(0));
            let (mut written, mut revision) = (0u64, 0u64);
            let (mut position, mut seen, mut done) = (0u64, 0u64, Revision(0));
            for (writes, reads, resumes) in steps {
                revision += 2;
                history.push(Revision(revision), (0..writes).map(|n| event(revision, &(written + n as u64).to_string())));
                written += writes as u64;
                prop_assert!(history.events.len() <= kept);
                if resumes {
                    // A new reader takes over where the old one knew everything had been read.
                    match history.position(done) {
                        Ok(at) => {
                            prop_assert!(at <= position, "nothing unread is passed over");
                            seen -= position - at;
                            position = at;
                        }
                        Err(Overtaken) => {
                            prop_assert!(written as usize > kept);
                            (position, seen, done) = (history.end(), written, history.head());
                        }
                    }
                }
                for _ in 0..reads {
                    match history.read(position, KindSet::ALL, BatchBounds { events: 2, json_bytes: 1 << 20 }) {
                        Ok(slice) => {
                            for event in &slice.events {
                                let Change::Put { object: Object::Notice(notice) } = &event.event.change else { unreachable!() };
                                prop_assert_eq!(&notice.about, &seen.to_string());
                                seen += 1;
                            }
                            position = slice.next;
                            done = done.max(slice.revision);
                        }
                        Err(Overtaken) => {
                            prop_assert!(written - seen > kept as u64);
                            (position, seen, done) = (history.end(), written, history.head());
                        }
                    }
                }
            }
        }
    }
}
