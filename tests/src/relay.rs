//! A network that is bad on purpose: packets between hosts go through it and are lost, held back, reordered, doubled or
//! counted out, as named faults say.
//!
//! It is the core: it has no clock and no device. Time is an argument (microseconds of any monotonic clock), packets go in by
//! [`Relay::take`] and come out by [`Relay::due`]; the program `relay` carries them. Chance comes from a seed.
//!
//! Invariant: between two hosts packets leave in the order in which they came, unless a fault says `reorder`; and what no
//! fault touches leaves at the time it came.

mod command;
#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::net::Ipv4Addr;

use serde::Serialize;

pub use command::Command;

/// Packets held at once; what comes beyond is lost, as in any router.
const MOST_HELD: usize = 16 * 1024;
/// A link of limited rate holds packets for so long and loses the rest.
const LONGEST_QUEUE_US: u64 = 500_000;

/// A host, by its place in the list that the relay was made with.
pub type Host = usize;

/// What a fault does to packets of one direction.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Rule {
    /// Share of packets that are lost, 0 to 1; 1 is a cut.
    pub loss: f64,
    /// Time that every packet is held.
    pub delay_us: u64,
    /// Up to so much more, evenly drawn.
    pub jitter_us: u64,
    /// Share of packets that are not held, and so overtake the others.
    pub reorder: f64,
    /// Share of packets that arrive twice.
    pub duplicate: f64,
    /// Bytes a second, if limited.
    pub rate_bytes: Option<u64>,
}

/// A rule, where it holds, and what it belongs to.
#[derive(Debug)]
struct Fault {
    name: String,
    from: Option<Host>,
    to: Option<Host>,
    rule: Rule,
    /// When a link of limited rate has sent what it was given.
    sent_us: u64,
}

/// What happened to packets so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Counts {
    /// Given out.
    pub carried: u64,
    /// Lost by a fault.
    pub lost: u64,
    /// Held by a fault.
    pub delayed: u64,
    /// Let overtake others.
    pub reordered: u64,
    /// Given out twice.
    pub duplicated: u64,
    /// Lost because too much was waiting.
    pub overflowed: u64,
    /// For no host of this network.
    pub unroutable: u64,
}

/// A packet that is held, earliest first and then by arrival.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Held {
    due_us: u64,
    number: u64,
    to: Host,
    bytes: Vec<u8>,
}

/// See the module.
#[derive(Debug)]
pub struct Relay {
    addresses: Vec<Ipv4Addr>,
    faults: Vec<Fault>,
    held: BinaryHeap<Reverse<Held>>,
    /// When the last packet in order leaves, by sender and receiver.
    last_us: Vec<u64>,
    arrived: u64,
    chance: u64,
    counts: Counts,
}

impl Relay {
    /// A relay between hosts of these addresses, without faults.
    pub fn new(addresses: Vec<Ipv4Addr>, seed: u64) -> Self {
        let pairs = addresses.len() * addresses.len();
        Relay {
            addresses,
            faults: Vec::new(),
            held: BinaryHeap::new(),
            last_us: vec![0; pairs],
            arrived: 0,
            chance: seed,
            counts: Counts::default(),
        }
    }

    /// Adds a rule to the fault of this name, for packets between these hosts (`None`: any). Rules add up: a packet meets all
    /// that hold for it.
    pub fn begin(&mut self, name: &str, from: Option<Host>, to: Option<Host>, rule: Rule) {
        self.faults.push(Fault { name: name.to_owned(), from, to, rule, sent_us: 0 });
    }

    /// Ends the fault of this name; whether there was one. Packets that it holds still leave when it said.
    pub fn heal(&mut self, name: &str) -> bool {
        let before = self.faults.len();
        self.faults.retain(|fault| fault.name != name);
        self.faults.len() < before
    }

    /// Ends all faults.
    pub fn heal_all(&mut self) {
        self.faults.clear();
    }

    /// What happened so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Takes an IP packet that a host sent.
    pub fn take(&mut self, now_us: u64, from: Host, bytes: Vec<u8>) {
        let Some(to) = destination(&bytes).and_then(|address| self.addresses.iter().position(|known| *known == address)) else {
            self.counts.unroutable += 1;
            return;
        };
        let mut due_us = now_us;
        let (mut overtakes, mut copies) = (false, 1);
        for at in 0..self.faults.len() {
            let fault = &self.faults[at];
            if fault.from.is_some_and(|host| host != from) || fault.to.is_some_and(|host| host != to) {
                continue;
            }
            let Rule { loss, delay_us, jitter_us, reorder, duplicate, rate_bytes } = fault.rule;
            if self.happens(loss) {
                self.counts.lost += 1;
                return;
            }
            if let Some(rate) = rate_bytes {
                let begins_us = self.faults[at].sent_us.max(due_us);
                if begins_us - due_us > LONGEST_QUEUE_US {
                    self.counts.overflowed += 1;
                    return;
                }
                due_us = begins_us + (bytes.len() as u64 * 1_000_000).div_ceil(rate.max(1));
                self.faults[at].sent_us = due_us;
            }
            due_us += delay_us + (self.draw() * jitter_us as f64) as u64;
            overtakes |= self.happens(reorder);
            copies += usize::from(self.happens(duplicate));
        }
        if self.held.len() + copies > MOST_HELD {
            self.counts.overflowed += 1;
            return;
        }
        let last_us = &mut self.last_us[from * self.addresses.len() + to];
        if overtakes {
            due_us = now_us;
            self.counts.reordered += 1;
        } else {
            due_us = due_us.max(*last_us);
            *last_us = due_us;
            self.counts.delayed += u64::from(due_us > now_us);
        }
        self.counts.duplicated += copies as u64 - 1;
        for _ in 1..copies {
            self.hold(due_us, to, bytes.clone());
        }
        self.hold(due_us, to, bytes);
    }

    /// The next packet whose time has come, and whom it goes to.
    pub fn due(&mut self, now_us: u64) -> Option<(Host, Vec<u8>)> {
        if self.next_us()? > now_us {
            return None;
        }
        let Reverse(held) = self.held.pop()?;
        self.counts.carried += 1;
        Some((held.to, held.bytes))
    }

    /// When the next packet leaves.
    pub fn next_us(&self) -> Option<u64> {
        self.held.peek().map(|Reverse(held)| held.due_us)
    }

    fn hold(&mut self, due_us: u64, to: Host, bytes: Vec<u8>) {
        self.arrived += 1;
        self.held.push(Reverse(Held { due_us, number: self.arrived, to, bytes }));
    }

    fn happens(&mut self, share: f64) -> bool {
        share > 0.0 && self.draw() < share
    }

    /// The next number from the seed (splitmix64), 0 to below 1.
    fn draw(&mut self) -> f64 {
        self.chance = self.chance.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.chance;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)) as f64 / 2f64.powi(64)
    }
}

/// Whom an IPv4 packet is for; nothing for anything else.
fn destination(packet: &[u8]) -> Option<Ipv4Addr> {
    let head = packet.get(..20)?;
    let address: [u8; 4] = head[16..20].try_into().ok()?;
    (head[0] >> 4 == 4).then(|| Ipv4Addr::from(address))
}
