//! Members of the raft group: their names and addresses by number, and the numbers of those that were removed.
//!
//! What it is not: who votes; raft's own configuration says that.
//!
//! Invariant: a number that was removed is given to nobody again, however many were removed.

use std::collections::BTreeSet;

use forge_shared::cluster::command::{CommandError, MemberRecord};
use forge_shared::cluster::event::{Change, Kind, Object};
use forge_shared::cluster::node::Role;
use serde::{Deserialize, Serialize};

use super::notices::Weight;
use super::{ClusterState, Effect, MAX_MEMBERS, MAX_REMOVED_MEMBERS, Step, checks};

/// Numbers of members that were removed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RemovedMembers {
    /// Numbers grow: of those up to here, all were removed that are not members.
    up_to: u64,
    later: BTreeSet<u64>,
}

impl RemovedMembers {
    /// Whether this number, which is no member's, was one's.
    pub fn has(&self, id: u64) -> bool {
        id <= self.up_to || self.later.contains(&id)
    }

    pub fn is_sound(&self) -> bool {
        self.later.len() <= MAX_REMOVED_MEMBERS && self.later.iter().all(|id| *id > self.up_to)
    }

    fn add(&mut self, id: u64) {
        if id > self.up_to {
            self.later.insert(id);
        }
        while self.later.len() > MAX_REMOVED_MEMBERS {
            self.up_to = self.later.pop_first().unwrap_or(self.up_to);
        }
    }
}

impl ClusterState {
    /// Whether a member of this number was removed.
    pub fn is_removed_member(&self, id: u64) -> bool {
        !self.members.contains_key(&id) && self.removed_members.has(id)
    }

    pub(super) fn put_member(&mut self, member: &MemberRecord, step: &mut Step) -> Result<Effect, CommandError> {
        checks::label("member.name", &member.name)?;
        checks::address("member.address", &member.address)?;
        self.check_build(Role::Coordinator, &member.name, &member.build())?;
        if member.id == 0 {
            return checks::invalid("member.id", "must not be 0");
        }
        if self.is_removed_member(member.id) {
            let reason =
                format!("member {} was removed, and its number is given to nobody again: join with an empty data folder", member.id);
            return Err(CommandError::Conflict { kind: "member".into(), name: member.name.clone(), reason });
        }
        if let Some(other) = self.members.values().find(|other| other.id != member.id && other.name == member.name) {
            let reason = format!("it is member {}; choose another name, or remove that member first", other.id);
            return Err(CommandError::Conflict { kind: "member".into(), name: member.name.clone(), reason });
        }
        match self.members.get(&member.id) {
            Some(known) if known == member => return Ok(Effect::NONE),
            Some(known) if known.name != member.name => {
                let name = known.name.clone();
                step.changes.push(Change::Deleted { kind: Kind::Member, name });
            }
            Some(_) => {}
            None => checks::bounded("members", self.members.len(), MAX_MEMBERS)?,
        }
        self.members.insert(member.id, member.clone());
        step.changes.push(Change::Put { object: Object::Member(member.clone()) });
        let message = format!("coordinator {} is member {}, at {}, and runs {}", member.name, member.id, member.address, member.build());
        self.notice(step, Weight::Normal, "MemberChanged", format!("member/{}", member.name), message);
        Ok(Effect::CHANGED)
    }

    pub(super) fn remove_member(&mut self, id: u64, step: &mut Step) -> Result<Effect, CommandError> {
        let Some(member) = self.members.remove(&id) else {
            return Err(checks::not_found("member", &id.to_string(), std::iter::empty()));
        };
        self.removed_members.add(id);
        step.changes.push(Change::Deleted { kind: Kind::Member, name: member.name.clone() });
        let message = format!("coordinator {} is no member any more", member.name);
        self.notice(step, Weight::Normal, "MemberRemoved", format!("member/{}", member.name), message);
        Ok(Effect::CHANGED)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::test_support::World;
    use forge_shared::cluster::command::Command;

    fn member(id: u64, name: &str) -> Command {
        Command::PutMember { member: MemberRecord::new(id, name, "c:7000", Default::default()) }
    }

    #[test]
    fn a_removed_number_comes_back_for_nobody() {
        let mut world = World::new();
        world.run(member(1, "c1")).expect("new");
        world.run(member(7, "c2")).expect("new");
        assert!(!world.state.is_removed_member(7) && !world.state.is_removed_member(9));
        world.run(Command::RemoveMember { id: 7 }).expect("removed");
        assert!(world.state.is_removed_member(7));
        world.run(member(7, "c2")).expect_err("its number is gone");
        world.run(member(57, "c2")).expect("its name is free");
        assert!(!world.state.is_removed_member(57));
        let bytes = world.state.encode();
        assert_eq!(ClusterState::decode(&bytes).expect("whole"), world.state);
    }

    #[test]
    fn what_is_remembered_of_them_is_bounded_and_forgets_none() {
        let mut removed = RemovedMembers::default();
        for id in 2..1_000 {
            removed.add(id);
            assert!(removed.is_sound());
        }
        assert!((2..1_000).all(|id| removed.has(id)) && !removed.has(1_000));
    }
}
