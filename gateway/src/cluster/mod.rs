//! A gateway in a cluster: what it learns from the coordinators and what it tells them.
//!
//! Replicas, keys and limits come by watch and session; both go on for ever, reconnect by themselves, and leave what was
//! last known standing while no coordinator answers. What it is not: it parses no request and holds no policy of its own.

mod directory;
mod member;
mod replicas;
mod roster;
mod session;
mod shares;

pub use directory::{Directory, Wanted};
pub(crate) use member::SharedRecords;
pub use member::{ClusterMember, MemberParts, Published};
pub use replicas::FindText;
pub use roster::{Dialed, Roster, Serves, epochs, load, version};
pub use shares::Shares;
