use proptest::prelude::*;

use super::*;
use crate::hello::Lane;

const LANES: usize = 2;

fn id(epoch: u64) -> GroupId {
    GroupId { name: "chat/0".into(), purpose: "tensor".into(), epoch: Epoch(epoch) }
}

fn node(rank: usize) -> NodeId {
    // Two ranks on each node.
    NodeId(format!("n{}", rank / 2))
}

fn group(rank: usize, size: usize, epoch: u64) -> Group {
    let membership = Membership { id: id(epoch), nodes: (0..size).map(node).collect(), rank, agreement: "digest".into() };
    Group::new(membership, LANES).unwrap()
}

fn hello(from: usize, to: usize, size: usize, epoch: u64) -> Hello {
    Hello { group: id(epoch), lane: Lane::Group, from, to, size, agreement: "digest".into() }
}

/// What may happen to a set of groups, one per rank.
#[derive(Debug, Clone)]
enum Event {
    Open { from: usize, to: usize, epoch: u64, as_node: usize, agreement: bool },
    End { rank: usize },
}

fn events(size: usize) -> impl Strategy<Value = Vec<Event>> {
    let open = (0..size, 0..size, 4u64..7, 0..size, prop::bool::weighted(0.9)).prop_map(|(from, to, epoch, other, agreement)| {
        // Mostly the right node and epoch.
        let as_node = if other == 0 { (from + 2) % 8 } else { from };
        Event::Open { from, to, epoch: if epoch == 4 { 4 } else { 5 }, as_node, agreement }
    });
    proptest::collection::vec(prop_oneof![30 => open, 1 => (0..size).prop_map(|rank| Event::End { rank })], 0..160)
}

proptest! {
    /// Whatever comes in whatever order: a group is formed only when every peer's streams came from its own node with the
    /// same epoch and agreement, and what is over stays over.
    #[test]
    fn groups_are_formed_of_their_members_and_end_once(size in 2usize..6, events in (2usize..6).prop_flat_map(events)) {
        let mut groups: Vec<Group> = (0..size).map(|rank| group(rank, size, 5)).collect();
        let mut sound = vec![vec![0; size]; size];
        let mut over = vec![false; size];
        for event in events {
            match event {
                Event::Open { from, to, epoch, as_node, agreement } if from < size && to < size => {
                    let mut said = hello(from, to, size, epoch);
                    if !agreement {
                        said.agreement = "other".into();
                    }
                    let belongs = epoch == 5 && node(as_node) == node(from) && agreement && from < to;
                    let taken = groups[to].hello(&node(as_node), &said);
                    let room = sound[to][from] < LANES;
                    prop_assert_eq!(taken.is_ok(), belongs && room && !over[to], "{:?}", taken);
                    if taken.is_ok() {
                        sound[to][from] += 1;
                        if !over[from] {
                            groups[from].welcomed(to).unwrap();
                            sound[from][to] += 1;
                        }
                    }
                }
                Event::Open { .. } => {}
                Event::End { rank } if rank < size => {
                    prop_assert_eq!(groups[rank].end("first"), !over[rank]);
                    prop_assert!(!groups[rank].end("second"));
                    over[rank] = true;
                }
                Event::End { .. } => {}
            }
            for rank in 0..size {
                let complete = (0..size).all(|peer| peer == rank || sound[rank][peer] == LANES);
                prop_assert_eq!(groups[rank].is_formed(), complete && !over[rank]);
                let expected = if over[rank] { Err(GroupError::Over { group: Box::new(id(5)), reason: "first".into() }) } else { Ok(()) };
                prop_assert_eq!(groups[rank].check_open(), expected);
            }
        }
    }

    /// The fence: what was closed, and what is older, is never formed again; names do not touch each other.
    #[test]
    fn a_closed_epoch_and_older_ones_stay_closed(closes in proptest::collection::vec((0usize..3, 0u64..20), 0..40)) {
        let named = |which: usize, epoch: u64| GroupId { purpose: format!("p{which}"), ..id(epoch) };
        let mut epochs = Epochs::default();
        let mut newest = [None; 3];
        for (which, epoch) in closes {
            epochs.close(&named(which, epoch));
            newest[which] = newest[which].max(Some(epoch));
            for (which, newest) in newest.iter().enumerate() {
                for epoch in 0..21 {
                    prop_assert_eq!(epochs.check(&named(which, epoch)).is_ok(), newest.is_none_or(|newest| epoch > newest));
                }
            }
        }
    }
}

#[test]
fn what_a_process_remembers_is_bounded() {
    let mut epochs = Epochs::default();
    for index in 0..MAX_REMEMBERED + 10 {
        epochs.close(&GroupId { name: format!("job/{index}"), ..id(1) });
    }
    assert_eq!((epochs.closed.len(), epochs.order.len()), (MAX_REMEMBERED, MAX_REMEMBERED));
}

#[test]
fn refusals_name_the_field_and_what_to_do() {
    let refused = |membership: Membership| Group::new(membership, LANES).unwrap_err().to_string();
    let sound = group(0, 2, 5).membership().clone();
    assert!(refused(Membership { nodes: Vec::new(), ..sound.clone() }).contains("members is 0"));
    assert!(refused(Membership { rank: 2, ..sound.clone() }).contains("rank is 2"));
    assert!(refused(Membership { agreement: "x".repeat(MAX_AGREEMENT_BYTES + 1), ..sound }).contains("agreement is 1025 bytes"));

    let mut group = group(1, 3, 5);
    let said = |group: &mut Group, node: &str, hello: Hello| group.hello(&node.into(), &hello).unwrap_err().to_string();
    assert!(said(&mut group, "n7", hello(0, 1, 3, 5)).contains("node n7 says that it is rank 0"));
    assert!(said(&mut group, "n1", hello(2, 1, 3, 5)).contains("rank 2"), "the lower rank opens");
    assert!(said(&mut group, "n0", hello(0, 1, 4, 5)).contains("members \"4\", this rank \"3\""));
}
