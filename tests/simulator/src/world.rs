//! The world of the simulated processes: time, network and randomness, all from one seed.
//!
//! What it is not: it knows nothing of what the processes do. Disks are `MemoryDisk`s that the processes hold; faults reach
//! them through their owners.
//!
//! Invariant: events happen in the order of (time, when they were put in), and nothing else orders them.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

use crate::host::Host;
use crate::message::{Event, Message, StreamId, Timer};
use crate::random::Random;
use crate::trace::Trace;

/// After so long an end of a cut connection notices it, milliseconds.
const CUT_NOTICED_MS: (u64, u64) = (500, 4_000);
/// A stream's packet that is lost is sent again after so long, milliseconds.
const SENT_AGAIN_MS: u64 = 200;

/// What must hold and did not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Which invariant.
    pub invariant: &'static str,
    /// What was seen.
    pub seen: String,
}

/// When something happens, and where it is kept until then: the heap moves its items about.
struct Due {
    at_ms: u64,
    number: u64,
    place: usize,
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Due {}
impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Due {
    fn cmp(&self, other: &Self) -> Ordering {
        // The heap gives the greatest first.
        (other.at_ms, other.number).cmp(&(self.at_ms, self.number))
    }
}

#[derive(Debug)]
struct Stream {
    ends: [Host; 2],
    /// When the last message arrives at each end.
    arrived_ms: [u64; 2],
    is_broken: bool,
}

/// How the network behaves now.
#[derive(Debug, Clone)]
pub struct Weather {
    /// Messages that are lost, of a hundred.
    pub loss_percent: u64,
    /// Messages that arrive twice, of a hundred.
    pub duplicate_percent: u64,
    /// Longest time on the way, milliseconds; messages overtake each other within it.
    pub delay_ms: u64,
}

impl Weather {
    /// A good day.
    pub const FAIR: Weather = Weather { loss_percent: 0, duplicate_percent: 0, delay_ms: 2 };
}

/// See the module.
pub struct World {
    /// Simulated milliseconds since the beginning.
    pub now_ms: u64,
    /// For the network.
    pub random: Random,
    /// What happened.
    pub trace: Trace,
    /// Of all links.
    pub weather: Weather,
    /// Pairs (from, to) that do not reach each other.
    pub cuts: BTreeSet<(Host, Host)>,
    /// The first thing that must not be.
    pub violation: Option<Violation>,
    /// Faults that came about, by kind.
    pub faults: BTreeMap<&'static str, u64>,
    queue: BinaryHeap<Due>,
    /// Events to come, and places that are free.
    events: Vec<Option<Event>>,
    free: Vec<usize>,
    streams: BTreeMap<StreamId, Stream>,
    next: u64,
}

impl World {
    /// A world without events.
    pub fn new(seed: u64, prints: bool) -> Self {
        World {
            now_ms: 0,
            random: Random::new(seed, 1),
            trace: Trace::new(prints),
            weather: Weather::FAIR,
            cuts: BTreeSet::new(),
            violation: None,
            faults: BTreeMap::new(),
            queue: BinaryHeap::new(),
            events: Vec::new(),
            free: Vec::new(),
            streams: BTreeMap::new(),
            next: 0,
        }
    }

    /// A number that was never given out.
    pub fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Puts in what happens at `at_ms`.
    pub fn put(&mut self, at_ms: u64, event: Event) {
        let number = self.number();
        let place = self.free.pop().unwrap_or_else(|| {
            self.events.push(None);
            self.events.len() - 1
        });
        self.events[place] = Some(event);
        self.queue.push(Due { at_ms: at_ms.max(self.now_ms), number, place });
    }

    /// Reminds a process of something after `after_ms`, if it still lives this life.
    pub fn remind(&mut self, host: Host, life: u64, after_ms: u64, timer: Timer) {
        self.put(self.now_ms + after_ms, Event::Timer { host, life, timer });
    }

    /// The next event before `until_ms`; time moves to it.
    pub fn advance(&mut self, until_ms: u64) -> Option<Event> {
        if self.queue.peek().is_none_or(|due| due.at_ms > until_ms) {
            self.now_ms = self.now_ms.max(until_ms);
            return None;
        }
        let due = self.queue.pop()?;
        self.now_ms = due.at_ms;
        self.free.push(due.place);
        self.events[due.place].take()
    }

    /// Whether something gets from one process to another now.
    pub fn reaches(&self, from: Host, to: Host) -> bool {
        !self.cuts.contains(&(from, to))
    }

    /// Sends a message by itself: it may be lost, come late, twice, or after one that was sent later. False where it is lost for
    /// certain, which nobody is told.
    pub fn send(&mut self, from: Host, to: Host, message: Message) -> bool {
        let (loss, twice) = (self.weather.loss_percent, self.weather.duplicate_percent);
        if !self.reaches(from, to) || self.random.chance(loss) {
            *self.faults.entry("message lost").or_default() += 1;
            return false;
        }
        let delay_ms = self.delay();
        if self.random.chance(twice) {
            *self.faults.entry("message twice").or_default() += 1;
            let later_ms = delay_ms + self.delay();
            self.put(self.now_ms + later_ms, Event::Arrives { from, to, stream: None, message: message.clone() });
        }
        self.put(self.now_ms + delay_ms, Event::Arrives { from, to, stream: None, message });
        true
    }

    fn delay(&mut self) -> u64 {
        self.random.between(1, self.weather.delay_ms.max(1))
    }

    /// Opens a stream.
    pub fn open(&mut self, from: Host, to: Host) -> StreamId {
        let id = self.number();
        self.streams.insert(id, Stream { ends: [from, to], arrived_ms: [0; 2], is_broken: false });
        id
    }

    /// Sends on a stream: in order, or the stream breaks.
    pub fn stream(&mut self, stream: StreamId, from: Host, message: Message) {
        let Some(known) = self.streams.get(&stream).filter(|known| !known.is_broken) else { return };
        let end = usize::from(known.ends[0] == from);
        let to = known.ends[end];
        if !self.reaches(from, to) {
            self.break_off(stream);
            return;
        }
        let mut delay_ms = self.delay();
        while self.random.chance(self.weather.loss_percent) {
            delay_ms += SENT_AGAIN_MS;
        }
        let Some(known) = self.streams.get_mut(&stream) else { return };
        let at_ms = (self.now_ms + delay_ms).max(known.arrived_ms[end]);
        known.arrived_ms[end] = at_ms;
        self.put(at_ms, Event::Arrives { from, to, stream: Some(stream), message });
    }

    /// The stream is cut: each end notices some time later, by itself.
    fn break_off(&mut self, stream: StreamId) {
        let Some(known) = self.streams.get_mut(&stream) else { return };
        known.is_broken = true;
        for at in known.ends {
            let after_ms = self.random.between(CUT_NOTICED_MS.0, CUT_NOTICED_MS.1);
            self.put(self.now_ms + after_ms, Event::Closed { at, stream });
        }
    }

    /// One end closes a stream; the other hears of it after all that was sent before.
    pub fn close(&mut self, stream: StreamId, by: Host) {
        let Some(known) = self.streams.get(&stream) else { return };
        let (end, is_broken) = (usize::from(known.ends[0] == by), known.is_broken);
        let (at, arrived_ms) = (known.ends[end], known.arrived_ms[end]);
        let is_heard = self.reaches(by, at) && !is_broken;
        let after_ms = if is_heard { self.delay() } else { self.random.between(CUT_NOTICED_MS.0, CUT_NOTICED_MS.1) };
        self.streams.remove(&stream);
        self.put((self.now_ms + after_ms).max(arrived_ms), Event::Closed { at, stream });
    }

    /// Whether an end of a stream still holds it.
    pub fn is_open(&self, stream: StreamId) -> bool {
        self.streams.contains_key(&stream)
    }

    /// A process died: its streams end.
    pub fn died(&mut self, host: Host) {
        let of_it: Vec<_> = self.streams.iter().filter(|(_, stream)| stream.ends.contains(&host)).map(|(id, _)| *id).collect();
        of_it.into_iter().for_each(|stream| self.close(stream, host));
    }

    /// Notes that an invariant does not hold. The first one counts.
    pub fn violate(&mut self, invariant: &'static str, seen: String) {
        if self.violation.is_none() {
            self.violation = Some(Violation { invariant, seen });
        }
    }

    /// Adds a line to the timeline.
    pub fn say(&mut self, host: Host, what: impl Into<String>) {
        self.trace.line(self.now_ms, host, what.into());
    }
}
