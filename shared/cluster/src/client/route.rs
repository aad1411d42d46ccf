//! Which coordinator to ask next: a pure core, without sockets or clock.
//!
//! Invariant: every known address is tried before any is tried twice, except for one that another coordinator named as
//! the leader; a pause comes after every round, never between two addresses of one.

use std::time::Duration;

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Addresses that are remembered.
const MAX_ADDRESSES: usize = 16;
/// Leaders that are followed by name within one round; coordinators that send each other around are not believed longer.
const MAX_HINTS: u32 = 3;

/// Addresses of the coordinators, the one that served last first.
#[derive(Debug, Clone, Default)]
pub struct Addresses {
    known: Vec<String>,
}

impl Addresses {
    /// These, in this order.
    pub fn new(known: &[String]) -> Self {
        let mut addresses = Addresses { known: Vec::new() };
        for address in known {
            addresses.learn(address);
        }
        addresses
    }

    /// Another one, named by a coordinator.
    pub fn learn(&mut self, address: &str) {
        if !self.known.iter().any(|known| known == address) && self.known.len() < MAX_ADDRESSES {
            self.known.push(address.to_owned());
        }
    }

    /// This one answered: it is asked first from now on.
    pub fn prefer(&mut self, address: &str) {
        if let Some(place) = self.known.iter().position(|known| known == address) {
            self.known[..=place].rotate_right(1);
        }
    }

    /// This one gave no answer: it is asked last from now on, until it answers again.
    pub fn demote(&mut self, address: &str) {
        if let Some(place) = self.known.iter().position(|known| known == address) {
            self.known[place..].rotate_left(1);
        }
    }

    /// All of them, in the order in which to ask.
    pub fn all(&self) -> &[String] {
        &self.known
    }
}

/// What to do after a failed try.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// Ask this one.
    Ask(String),
    /// Everyone was asked: wait, then begin a new round.
    Pause(Duration),
}

/// One call's way through the coordinators.
#[derive(Debug)]
pub struct Route {
    round: Vec<String>,
    hints: u32,
    pause: Duration,
}

impl Route {
    /// Begins with the address that served last.
    pub fn new(addresses: &Addresses) -> Self {
        let mut route = Route { round: Vec::new(), hints: 0, pause: FIRST_PAUSE };
        route.begin_round(addresses);
        route
    }

    /// The first or next address of the round.
    pub fn next_step(&mut self) -> Next {
        match self.round.pop() {
            Some(address) => Next::Ask(address),
            None => {
                let pause = self.pause;
                self.pause = (self.pause * 2).min(LONGEST_PAUSE);
                Next::Pause(pause)
            }
        }
    }

    /// Whether the round has somebody left to ask.
    pub fn has_more(&self) -> bool {
        !self.round.is_empty()
    }

    /// `failed` answered that `leader` leads.
    pub fn follow(&mut self, failed: &str, leader: &str) {
        if leader != failed && self.hints < MAX_HINTS {
            self.hints += 1;
            self.round.retain(|address| address != leader);
            self.round.push(leader.to_owned());
        }
    }

    /// After a pause.
    pub fn begin_round(&mut self, addresses: &Addresses) {
        self.hints = 0;
        self.round = addresses.all().iter().rev().cloned().collect();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn addresses(count: usize) -> Addresses {
        Addresses::new(&(0..count).map(|index| format!("host{index}:1")).collect::<Vec<_>>())
    }

    #[test]
    fn a_named_leader_is_asked_next_and_others_after() {
        let known = addresses(3);
        let mut route = Route::new(&known);
        assert_eq!(route.next_step(), Next::Ask("host0:1".into()));
        route.follow("host0:1", "host2:1");
        assert_eq!(route.next_step(), Next::Ask("host2:1".into()));
        assert_eq!(route.next_step(), Next::Ask("host1:1".into()));
        assert_eq!(route.next_step(), Next::Pause(FIRST_PAUSE));
        route.begin_round(&known);
        assert_eq!(route.next_step(), Next::Ask("host0:1".into()));
    }

    #[test]
    fn who_served_last_is_asked_first() {
        let mut known = addresses(3);
        known.prefer("host2:1");
        assert_eq!(known.all(), ["host2:1", "host0:1", "host1:1"]);
        known.demote("host2:1");
        assert_eq!(known.all(), ["host0:1", "host1:1", "host2:1"]);
        known.demote("host2:1");
        known.demote("nobody:1");
        known.prefer("nobody:1");
        assert_eq!(known.all(), ["host0:1", "host1:1", "host2:1"]);
        known.learn("host3:1");
        assert_eq!(known.all().len(), 4);
    }

    proptest! {
        #[test]
        fn a_round_asks_everyone_and_ends(count in 1usize..8, hints in prop::collection::vec((0usize..8, 0usize..8), 0..50)) {
            let known = addresses(count);
            let mut route = Route::new(&known);
            let mut asked = Vec::new();
            let mut hints = hints.into_iter();
            while let Next::Ask(address) = route.next_step() {
                if let Some((_, leader)) = hints.next() {
                    route.follow(&address, &format!("host{leader}:1"));
                }
                asked.push(address);
                prop_assert!(asked.len() <= count + MAX_HINTS as usize);
            }
            for address in known.all() {
                prop_assert!(asked.contains(address));
            }
        }
    }
}
