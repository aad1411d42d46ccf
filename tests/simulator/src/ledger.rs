//! What all coordinators together applied: the place where their states are compared.
//!
//! Invariants it checks after every entry: no member applies an index twice; all apply the same entry at an index and answer
//! the same. Every few entries, whenever a snapshot is begun and whenever one was taken: all members' whole states are the same,
//! field by field; and at every index all snapshots' bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use forge_coordinator::raft::{Frozen, StateMachine};
use forge_coordinator::replicated::{Machine, Replicated, decode_reply};
use forge_shared::cluster::command::{Command, Envelope};
use parking_lot::Mutex;

use crate::fingerprint::Fingerprint;
use crate::world::Violation;

/// The states are compared at every index that this divides.
const COMPARED_EVERY: u64 = 16;

/// What was applied where anyone applied it first.
#[derive(Debug, Default)]
pub struct Ledger {
    /// Entry and reply of each index, as hashes.
    entries: BTreeMap<u64, (u64, u64)>,
    /// Of the state after an index.
    states: BTreeMap<u64, u64>,
    /// Of the bytes of a snapshot of an index.
    snapshots: BTreeMap<u64, u64>,
    /// Requests that used a join token with success.
    pub uses: BTreeSet<String>,
    /// Nodes that the group took to be lost, not yet looked at: name, incarnation, reason.
    pub lost: Vec<(String, u64, String)>,
    /// The first thing that must not be.
    pub violation: Option<Violation>,
}

/// A ledger that all members of a run share.
pub type SharedLedger = Arc<Mutex<Ledger>>;

impl Ledger {
    fn violate(&mut self, invariant: &'static str, seen: String) {
        if self.violation.is_none() {
            self.violation = Some(Violation { invariant, seen });
        }
    }

    /// The highest index that anyone applied.
    pub fn last(&self) -> u64 {
        self.entries.last_key_value().map_or(0, |(index, _)| *index)
    }

    fn applied(&mut self, member: u16, index: u64, data: &[u8], reply: &[u8]) {
        let found = (Fingerprint::of_bytes(data), Fingerprint::of_bytes(reply));
        match self.entries.get(&index) {
            None => {
                self.entries.insert(index, found);
                self.look(data, reply);
            }
            Some(known) if known.0 != found.0 => {
                self.violate(
                    "all members apply the same entry",
                    format!("c{member} applied another entry at {index} than others before it"),
                );
            }
            Some(known) if known.1 != found.1 => {
                self.violate("an entry has the same effect everywhere", format!("c{member} answered entry {index} otherwise than others"));
            }
            Some(_) => {}
        }
    }

    /// Looks into an entry that is applied for the first time.
    fn look(&mut self, data: &[u8], reply: &[u8]) {
        let Ok(envelope) = serde_json::from_slice::<Envelope>(data) else { return };
        let is_good = |changed: bool| matches!(decode_reply(reply), Ok(Ok(applied)) if applied.changed || !changed);
        match envelope.command {
            Command::UseJoinToken { .. } if is_good(false) => {
                self.uses.insert(envelope.request_id);
            }
            Command::LoseNode { node, incarnation, reason } if is_good(true) => {
                self.lost.push((node.0, incarnation.0, reason));
            }
            _ => {}
        }
    }

    fn snapshot(&mut self, member: u16, index: u64, bytes: &[u8]) {
        let found = Fingerprint::of_bytes(bytes);
        if *self.snapshots.entry(index).or_insert(found) != found {
            self.violate("equal states have equal bytes", format!("the snapshot of c{member} at {index} has other bytes than others'"));
        }
    }

    fn state(&mut self, member: u16, index: u64, state: u64) {
        let known = *self.states.entry(index).or_insert(state);
        if known != state {
            self.violate("applied state is identical", format!("the state of c{member} after entry {index} is another than the others'"));
        }
    }
}

/// A member's state machine under the ledger's eyes.
pub struct Watched {
    member: u16,
    machine: Machine,
    replicated: Arc<Replicated>,
    ledger: SharedLedger,
    applied: u64,
}

impl Watched {
    /// Of a member that begins.
    pub fn new(member: u16, replicated: Arc<Replicated>, ledger: SharedLedger) -> Self {
        Watched { member, machine: Machine(replicated.clone()), replicated, ledger, applied: 0 }
    }

    fn compare(&self) {
        let state = Fingerprint::of(&*self.replicated.read());
        let mut ledger = self.ledger.lock();
        match state {
            Ok(state) => ledger.state(self.member, self.applied, state),
            Err(error) => ledger.violate("a state can be written down", error.to_string()),
        }
    }
}

impl StateMachine for Watched {
    fn apply(&mut self, index: u64, data: &[u8]) -> Vec<u8> {
        if index <= self.applied {
            let seen = format!("c{} applied entry {index} after entry {}", self.member, self.applied);
            self.ledger.lock().violate("an entry is applied once", seen);
        }
        let reply = self.machine.apply(index, data);
        self.applied = index;
        self.ledger.lock().applied(self.member, index, data, &reply);
        if index.is_multiple_of(COMPARED_EVERY) {
            self.compare();
        }
        reply
    }

    fn snapshot(&self) -> Frozen {
        if self.applied > 0 {
            self.compare();
        }
        let (frozen, ledger, member, index) = (self.machine.snapshot(), self.ledger.clone(), self.member, self.applied);
        Box::new(move || {
            let bytes = frozen();
            ledger.lock().snapshot(member, index, &bytes);
            bytes
        })
    }

    fn restore(&mut self, index: u64, data: &[u8]) -> Result<(), String> {
        self.machine.restore(index, data)?;
        self.applied = index;
        if index > 0 {
            self.compare();
        }
        Ok(())
    }
}
