//! Which replica answers, as a pure function of what is known about the replicas.
//!
//! A request goes where most of its prompt is cached, and among equals to the one its session or beginning hashes to, as
//! long as that replica is not clearly busier than the others. Invariant: the choice is eligible, and its load exceeds
//! the least load among eligible replicas by at most a quarter plus [`AFFINITY_SLACK`].

/// Sequences by which the preferred replica may exceed the idlest one.
pub const AFFINITY_SLACK: usize = 4;

/// What is known of a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplicaLoad {
    /// Stays the same while the replica lives, whatever others come and go.
    pub identity: u64,
    /// May be chosen: ready, not held back by its breaker, and of the numerics a replay needs.
    pub eligible: bool,
    /// Sequences running and waiting there.
    pub load: usize,
    /// Blocks of this request's prompt that it can reuse.
    pub cached_blocks: usize,
}

/// The replica for a request whose session or beginning hashes to `affinity`; `None` if none is eligible.
pub fn pick(replicas: &[ReplicaLoad], affinity: u64) -> Option<usize> {
    let eligible = || replicas.iter().enumerate().filter(|(_, replica)| replica.eligible);
    let least = eligible().map(|(_, replica)| replica.load).min()?;
    let most = least + least / 4 + AFFINITY_SLACK;
    eligible()
        .filter(|(_, replica)| replica.load <= most)
        .max_by_key(|(_, replica)| (replica.cached_blocks, rendezvous(affinity, replica.identity)))
        .map(|(index, _)| index)
}

/// Highest random weight: when a replica goes or comes, only its share of requests moves. The mixer is splitmix64's.
fn rendezvous(affinity: u64, identity: u64) -> u64 {
    let mut z = affinity ^ identity.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn replicas() -> impl Strategy<Value = Vec<ReplicaLoad>> {
        let replica = (any::<u64>(), any::<bool>(), 0usize..500, 0usize..5)
            .prop_map(|(identity, eligible, load, cached_blocks)| ReplicaLoad { identity, eligible, load, cached_blocks });
        prop::collection::vec(replica, 0..9)
    }

    fn equal(count: usize) -> Vec<ReplicaLoad> {
        (0..count as u64).map(|identity| ReplicaLoad { identity, eligible: true, load: 3, cached_blocks: 0 }).collect()
    }

    proptest! {
        #[test]
        fn choice_is_eligible_and_not_clearly_busier(replicas in replicas(), affinity: u64) {
            let least = replicas.iter().filter(|r| r.eligible).map(|r| r.load).min();
            match (pick(&replicas, affinity), least) {
                (None, None) => {}
                (Some(index), Some(least)) => {
                    prop_assert!(replicas[index].eligible);
                    prop_assert!(replicas[index].load <= least + least / 4 + AFFINITY_SLACK);
                }
                other => prop_assert!(false, "{other:?}"),
            }
        }

        #[test]
        fn losing_a_replica_moves_only_its_requests(count in 2usize..8, lost in 0usize..8, affinity: u64) {
            let mut replicas = equal(count);
            let before = replicas[pick(&replicas, affinity).unwrap()].identity;
            let lost = replicas.remove(lost % count).identity;
            let after = replicas[pick(&replicas, affinity).unwrap()].identity;
            prop_assert!(before == lost || after == before);
        }
    }

    #[test]
    fn equal_replicas_share_the_load() {
        let replicas = equal(4);
        let mut counts = [0usize; 4];
        for affinity in 0..4000u64 {
            counts[pick(&replicas, affinity.wrapping_mul(0x2545_F491_4F6C_DD1D)).unwrap()] += 1;
        }
        assert!(counts.iter().all(|&count| count > 800), "{counts:?}");
    }

    #[test]
    fn a_cached_prompt_draws_a_request_unless_its_replica_is_clearly_busier() {
        let mut replicas = equal(3);
        replicas[1].cached_blocks = 7;
        assert!((0..100).all(|affinity| pick(&replicas, affinity) == Some(1)));
        replicas[1].load = 3 + AFFINITY_SLACK + 1;
        assert!((0..100).all(|affinity| pick(&replicas, affinity) != Some(1)));
    }
}
