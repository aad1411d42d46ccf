//! A state that goes on in another group than the one that made it: after a backup was restored.
//!
//! Invariant: nothing that the new group gives out (revisions, epochs, request ids) was given out by the old one after the
//! backup was made. What runs by plans of before the backup may go on.

use forge_shared::cluster::Revision;
use forge_shared::ids::Epoch;

use super::{ClusterState, RemovedMembers, Shared};

impl ClusterState {
    /// Begins a new history at `index`, which must be above every revision and every epoch of the old one: no members, no
    /// replies remembered, no CA but that of who goes on, and epochs that go on from there. Times of tokens and records stay as they are.
    pub(crate) fn begin_history(&mut self, index: Revision) {
        self.members.clear();
        self.removed_members = RemovedMembers::default();
        self.certificates.begin_history();
        // Requests of the old group's leaders had ids that the new one's will have too.
        self.asked = Shared::default();
        self.reported = Shared::default();
        let floor = Epoch(index.0);
        for service in self.services.values_mut() {
            service.last_epoch = service.last_epoch.max(floor);
        }
        self.epoch_floor = self.epoch_floor.max(floor);
        (self.applied, self.revision, self.placement_revision) = (index, index, index);
    }
}

#[cfg(test)]
mod tests {
    use forge_shared::cluster::certificate::CaRecord;
    use forge_shared::cluster::command::{Command, MemberRecord};
    use forge_shared::spec::ModelServiceSpec;

    use super::*;
    use crate::state::test_support::World;

    #[test]
    fn it_goes_on_with_numbers_that_nobody_has_seen() {
        let mut world = World::new();
        world.join("a", 1, &[64]).expect("joins");
        world.apply("s", ModelServiceSpec::default()).expect("applied");
        world.run(Command::PutMember { member: MemberRecord::new(1, "c1", "c:7000", Default::default()) }).expect("new");
        world.run(Command::RemoveMember { id: 1 }).expect("removed");
        let ca = |digits: &str| CaRecord { sha256: digits.repeat(32), certificate_pem: "pem".into() };
        world.run(Command::BeginCaRotation { from: ca("aa"), to: ca("bb") }).expect("begun");
        let join = world.envelope(Command::CordonNode { node: "a".into(), cordoned: true });
        world.run_envelope(&join).expect("cordoned");
        let index = 1 << 40;
        world.state.begin_history(Revision(index));
        world.index = index;
        assert_eq!(ClusterState::decode(&world.state.encode()).expect("it keeps the rules"), world.state);
        assert!(world.state.members().is_empty() && !world.state.is_removed_member(1));
        assert!(world.state.trust().cas.is_empty() && world.state.trust().rotation.is_none());
        assert!(world.state.services().values().all(|service| service.last_epoch == Epoch(index)));
        assert_eq!((world.state.revision(), world.state.epoch_floor()), (Revision(index), Epoch(index)));
        let other = Command::CordonNode { node: "a".into(), cordoned: false };
        let again = forge_shared::cluster::command::Envelope { command: other, ..join };
        assert!(world.run_envelope(&again).expect("its id is nobody's now").changed);
    }
}
