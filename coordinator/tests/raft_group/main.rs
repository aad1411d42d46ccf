//! Groups of raft members under faults. A failure prints what was expected; the seed is in the test.

mod world;

use forge_coordinator::raft::{DiskState, MemberChange, RaftError, RaftOptions, RaftRole};
use world::World;

fn number(number: u64) -> Vec<u8> {
    format!("number {number}").into_bytes()
}

/// Snapshots after few entries, small segments.
fn small(options: &mut RaftOptions) {
    options.limits.snapshot_entries = 20;
    options.limits.trailing_entries = 5;
    options.limits.segment_bytes = 600;
}

#[test]
fn groups_of_one_three_and_five_elect_and_agree() {
    for voters in [&[1][..], &[1, 2, 3], &[1, 2, 3, 4, 5]] {
        for seed in 0..10 {
            let mut world = World::new(voters, seed);
            world.most_delay_ticks = 3;
            world.loss_percent = if seed % 2 == 0 { 0 } else { 20 };
            let leader = world.await_leader();
            let requests: Vec<_> = (0..20).map(|it| world.propose(leader, number(it))).collect();
            world.run(40);
            assert!(voters.len() > 1 && seed % 2 == 1 || world.good_answers(&requests) == 20);
            world.settle();
        }
    }
}

#[test]
fn equal_seeds_give_equal_histories() {
    let run = |seed| {
        let mut world = World::new(&[1, 2, 3], seed);
        (world.loss_percent, world.most_delay_ticks) = (20, 4);
        for it in 0..100 {
            if let Some(leader) = world.leader() {
                world.propose(leader, number(it));
            }
            world.tick();
        }
        (world.statuses(), world.acknowledged)
    };
    assert_eq!(run(3), run(3));
    assert_ne!(run(3), run(4));
}

#[test]
fn a_new_leader_is_there_within_two_seconds_and_nothing_acknowledged_is_lost() {
    for seed in 0..20 {
        let mut world = World::with_options(&[1, 2, 3], seed, small);
        for round in 0..3 {
            let leader = world.await_leader();
            for it in 0..30 {
                world.propose(leader, number(round * 100 + it));
                if it % 5 == 0 {
                    world.tick();
                }
            }
            world.crash(leader);
            // A tick is 50 ms.
            let ticks = world.until(40, "a new leader", |world| world.leader().is_some_and(|next| next != leader));
            assert!(ticks <= 40);
            assert!(world.start(leader));
        }
        world.settle();
    }
}

/// The leader's process dies in its first fsync under load, then in its second, and so on; every other one too.
#[test]
fn nothing_acknowledged_is_lost_at_any_fsync() {
    for voters in [&[1][..], &[1, 2, 3]] {
        for sync in 1..60 {
            let mut world = World::with_options(voters, sync, small);
            for &id in voters {
                let at = sync + 3 * (id - 1);
                world.hosts[&id].disk.crash_at_sync(Some(world.hosts[&id].disk.syncs() + at));
            }
            let mut proposed = 0;
            for it in 0..120 {
                if let Some(leader) = world.leader()
                    && proposed < 60
                {
                    world.propose(leader, number(proposed));
                    proposed += 1;
                }
                world.tick();
                for &id in voters {
                    if world.hosts[&id].member.is_none() && it % 7 == 0 {
                        world.start(id);
                    }
                }
            }
            assert!(world.acknowledged.len() > 10, "{} were acknowledged", world.acknowledged.len());
            world.settle();
        }
    }
}

#[test]
fn crashes_cuts_and_losses_at_random() {
    for seed in 0..25 {
        let mut world = World::with_options(&[1, 2, 3, 4, 5], seed, small);
        (world.loss_percent, world.most_delay_ticks) = (5, 4);
        for it in 0..300 {
            match world.random(30) {
                0 => {
                    let id = 1 + world.random(5);
                    if world.hosts[&id].member.is_some() {
                        world.crash(id);
                    }
                }
                1 => {
                    let island = [1 + world.random(5), 1 + world.random(5)];
                    world.part(&island);
                }
                2 => world.cut.clear(),
                3 => {
                    let pair = (1 + world.random(5), 1 + world.random(5));
                    world.cut.insert(pair);
                }
                4..=8 => {
                    for id in 1..=5 {
                        if world.hosts[&id].member.is_none() {
                            world.start(id);
                        }
                    }
                }
                _ => {}
            }
            for id in 1..=5 {
                if world.hosts[&id].member.as_ref().is_some_and(|member| member.core().is_leader()) {
                    world.propose(id, number(it));
                    world.read(id);
                } else if it % 3 == 0 {
                    world.read(id);
                }
            }
            world.tick();
        }
        world.settle();
        assert!(world.acknowledged.len() > 30, "seed {seed}: {} were acknowledged", world.acknowledged.len());
    }
}

#[test]
fn a_member_that_lags_gets_a_snapshot() {
    let mut world = World::with_options(&[1, 2, 3], 5, small);
    let leader = world.await_leader();
    let behind = if leader == 1 { 2 } else { 1 };
    world.part(&[behind]);
    for it in 0..200 {
        world.propose(leader, number(it));
        world.tick();
    }
    assert!(world.status(leader).first_index > world.status(behind).last_index + 1, "the log is still whole");
    world.cut.clear();
    world.until(100, "the lagging member", |world| world.status(behind).applied_index == world.status(leader).applied_index);
    assert!(world.sent_snapshots > 0);
    world.crash(behind);
    world.start(behind);
    world.settle();
}

#[test]
fn members_come_as_learners_and_go() {
    for seed in 0..5 {
        let mut world = World::with_options(&[1], seed, small);
        let leader = world.await_leader();
        for it in 0..100 {
            world.propose(leader, number(it));
        }
        for id in [2, 3] {
            world.add_host(id, None);
            assert_eq!(world.status(id).role, RaftRole::Learner);
            world.change_to_end(MemberChange::AddLearner(id));
            world.change_to_end(MemberChange::AddLearner(id));
            world.change_to_end(MemberChange::Promote(id));
            assert!(world.status(leader).members.iter().any(|member| member.id == id && member.is_voter));
        }
        assert!(world.sent_snapshots >= 2);
        // The leader leaves: it hands over first.
        world.change_to_end(MemberChange::Remove(1));
        let next = world.await_leader();
        assert!(next != 1);
        let request = world.propose(next, number(1000));
        world.run(20);
        assert_eq!(world.good_answers(&[request]), 1);
        assert_eq!(world.status(1).role, RaftRole::Learner);
        world.crash(1);
        world.hosts.remove(&1);
        for id in [2, 3] {
            world.crash(id);
            world.start(id);
        }
        world.settle();
        assert_eq!(world.status(2).members.iter().map(|member| member.id).collect::<Vec<_>>(), [2, 3]);
    }
}

#[test]
fn a_voter_is_not_removed_when_the_rest_would_have_no_majority() {
    let mut world = World::new(&[1, 2, 3], 1);
    let leader = world.await_leader();
    let others: Vec<u64> = [1, 2, 3].into_iter().filter(|&id| id != leader).collect();
    world.part(&[others[0]]);
    world.run(30);
    let request = world.change(leader, MemberChange::Remove(others[1]));
    world.run(5);
    assert!(matches!(world.answers[&request], Err(RaftError::Busy { .. })), "{:?}", world.answers[&request]);
    world.settle();
}

#[test]
fn leadership_is_handed_over_under_load() {
    for seed in 0..10 {
        let mut world = World::new(&[1, 2, 3], seed);
        let leader = world.await_leader();
        let to = if leader == 3 { 1 } else { 3 };
        for it in 0..20 {
            world.propose(leader, number(it));
        }
        let request = world.transfer(leader, to);
        assert_eq!(world.good_answers(&[request]), 1);
        world.until(10, "the new leader", |world| world.leader() == Some(to));
        world.settle();
    }
}

#[test]
fn a_leader_without_its_majority_answers_no_read_and_steps_down() {
    for seed in 0..10 {
        let mut world = World::new(&[1, 2, 3], seed);
        let old = world.await_leader();
        world.run(5);
        let read = world.read(old);
        world.run(5);
        assert_eq!(world.good_answers(&[read]), 1);
        world.part(&[old]);
        let lost = world.propose(old, number(1));
        let read = world.read(old);
        let next = {
            world.until(60, "a new leader", |world| world.leader().is_some_and(|leader| leader != old));
            world.leader().unwrap()
        };
        let request = world.propose(next, number(2));
        world.run(30);
        assert_eq!(world.good_answers(&[request]), 1);
        assert_eq!(world.good_answers(&[read]), 0, "the old leader answered a read");
        assert!(matches!(world.answers.get(&lost), Some(Err(RaftError::Unknown { .. }))), "{:?}", world.answers.get(&lost));
        assert_ne!(world.status(old).role, RaftRole::Leader);
        // The read waits, and is right when the cut ends.
        world.cut.clear();
        world.run(60);
        assert_eq!(world.good_answers(&[read]), 1);
        world.settle();
    }
}

#[test]
fn followers_read_what_was_acknowledged() {
    let mut world = World::new(&[1, 2, 3], 2);
    (world.loss_percent, world.most_delay_ticks) = (10, 3);
    let leader = world.await_leader();
    let mut reads = Vec::new();
    for it in 0..100 {
        world.propose(leader, number(it));
        reads.extend([world.read(1), world.read(2), world.read(3)]);
        world.tick();
    }
    world.loss_percent = 0;
    world.run(100);
    // Each answer was compared with what was acknowledged before its question.
    assert_eq!(world.good_answers(&reads), reads.len());
}

#[test]
fn a_follower_whose_disk_is_full_waits_and_comes_back() {
    let mut world = World::new(&[1, 2, 3], 1);
    let leader = world.await_leader();
    let full = if leader == 1 { 2 } else { 1 };
    world.hosts[&full].disk.set_capacity_bytes(Some(world.hosts[&full].disk.used_bytes() + 300));
    let requests: Vec<_> = (0..50)
        .map(|it| {
            world.tick();
            world.propose(leader, number(it))
        })
        .collect();
    world.run(20);
    assert_eq!(world.good_answers(&requests), 50, "two of three are enough");
    assert_eq!(world.status(full).disk, DiskState::Full);
    let read = world.read(full);
    world.run(3);
    assert_eq!(world.good_answers(&[read]), 0);
    world.hosts[&full].disk.set_capacity_bytes(None);
    world.until(100, "the member with space", |world| world.status(full).applied_index == world.status(leader).applied_index);
    assert_eq!(world.status(full).disk, DiskState::Writable);
    world.crash(full);
    world.settle();
}

#[test]
fn a_leader_whose_disk_is_full_hands_over_and_acknowledges_nothing_more() {
    for seed in 0..10 {
        let mut world = World::with_options(&[1, 2, 3], seed, small);
        let leader = world.await_leader();
        world.hosts[&leader].disk.set_capacity_bytes(Some(world.hosts[&leader].disk.used_bytes() + 500));
        for it in 0..30 {
            world.propose(leader, number(it));
            world.tick();
        }
        let status = world.status(leader);
        assert_eq!((status.disk, status.role), (DiskState::Full, RaftRole::Follower));
        let refused = world.propose(leader, number(1000));
        assert!(matches!(world.answers.get(&refused), Some(Err(RaftError::DiskFull { .. }))));
        world.until(20, "the heir", |world| world.leader().is_some_and(|next| next != leader));
        // It dies while full: what it has is what it had synced.
        if seed % 2 == 0 {
            world.crash(leader);
            world.hosts[&leader].disk.set_capacity_bytes(None);
            world.start(leader);
        }
        world.settle();
        assert_eq!(world.status(leader).disk, DiskState::Writable);
    }
}

#[test]
fn a_group_of_one_with_a_full_disk_goes_on_when_there_is_space() {
    let mut world = World::with_options(&[1], 1, small);
    world.await_leader();
    world.hosts[&1].disk.set_capacity_bytes(Some(world.hosts[&1].disk.used_bytes() + 100));
    let requests: Vec<_> = (0..10).map(|it| world.propose(1, number(it))).collect();
    world.run(3);
    assert!(world.good_answers(&requests) < 10);
    world.hosts[&1].disk.set_capacity_bytes(None);
    world.run(3);
    let request = world.propose(1, number(11));
    world.run(1);
    assert_eq!(world.good_answers(&[request]), 1);
    world.settle();
}

/// The leader believes that it has entries that are gone with its disk.
#[test]
fn a_member_that_lost_its_log_takes_no_part() {
    let mut world = World::new(&[1, 2, 3], 1);
    let leader = world.await_leader();
    for it in 0..20 {
        world.propose(leader, number(it));
        world.tick();
    }
    let lost = if leader == 1 { 2 } else { 1 };
    world.crash(lost);
    world.add_host(lost, Some(vec![1, 2, 3]));
    world.run(30);
    let request = world.propose(leader, number(100));
    world.run(5);
    assert_eq!(world.good_answers(&[request]), 1, "the others go on");
}
