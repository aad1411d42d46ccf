//! A cluster in a deterministic simulator: production's cores in one thread, with one world for time, network, disk and
//! randomness, all from a seed.
//!
//! [`world`] is that world, [`faults`] what goes wrong in it; [`coordinators`], [`workers`] (with their [`tie`] to the leader and
//! their [`engines`]) and [`gateways`] are shells around cores, [`clients`] and [`callers`] ask them for changes and answers,
//! [`ledger`] compares what members apply (by [`fingerprint`]), [`stub`] knows the undisturbed answers, [`simulation`] is a run,
//! [`batch`] are many, [`mod@shrink`] and [`report`] are for people.
//!
//! What it is not: a second implementation. Where a shell of production decides something, that decision belongs into a core.
//!
//! Invariant: equal plans give equal runs, event by event.

pub mod batch;
pub mod callers;
pub mod clients;
pub mod coordinators;
pub mod engines;
pub mod faults;
pub mod fingerprint;
pub mod gateways;
pub mod host;
pub mod ledger;
pub mod message;
pub mod random;
pub mod report;
pub mod shrink;
pub mod simulation;
pub mod streams;
pub mod stub;
pub mod tie;
pub mod trace;
pub mod workers;
pub mod world;
