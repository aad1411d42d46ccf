//! Which replica answers, as a pure function of what is known about the replicas.
//!
//! Requests that share a beginning go to the same replica, where their prefix is cached, as long as it is not
//! clearly busier than the others. Invariant: the choice is ready, and its load exceeds the least load among ready
//! replicas by at most a quarter plus [`AFFINITY_SLACK`].

/// Sequences by which the preferred replica may exceed the idlest one.
pub const AFFINITY_SLACK: usize = 4;

/// What is known of a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplicaLoad {
    /// May be chosen: ready, and of the numerics a replay needs.
    pub eligible: bool,
    /// Sequences running and waiting there.
    pub load: usize,
}

/// The replica for a request whose beginning hashes to `affinity`; `None` if none is eligible.
pub fn pick(replicas: &[ReplicaLoad], affinity: u64) -> Option<usize> {
    let eligible = || replicas.iter().enumerate().filter(|(_, replica)| replica.eligible);
    let least = eligible().map(|(_, replica)| replica.load).min()?;
    let most = least + least / 4 + AFFINITY_SLACK;
    eligible()
        .filter(|(_, replica)| replica.load <= most)
        .max_by_key(|(index, _)| rendezvous(affinity, *index as u64))
        .map(|(index, _)| index)
}

/// Highest random weight: when a replica goes or comes, only its share of requests moves. The mixer is splitmix64's.
fn rendezvous(affinity: u64, index: u64) -> u64 {
    let mut z = affinity ^ index.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn replicas() -> impl Strategy<Value = Vec<ReplicaLoad>> {
        let replica = (any::<bool>(), 0usize..500).prop_map(|(eligible, load)| ReplicaLoad { eligible, load });
        prop::collection::vec(replica, 0..9)
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
            let mut replicas = vec![ReplicaLoad { eligible: true, load: 3 }; count];
            let before = pick(&replicas, affinity).unwrap();
            let lost = lost % count;
            replicas[lost].eligible = false;
            let after = pick(&replicas, affinity).unwrap();
            prop_assert!(before == lost || after == before);
        }
    }

    #[test]
    fn equal_replicas_share_the_load() {
        let replicas = [ReplicaLoad { eligible: true, load: 0 }; 4];
        let mut counts = [0usize; 4];
        for affinity in 0..4000u64 {
            counts[pick(&replicas, affinity.wrapping_mul(0x2545_F491_4F6C_DD1D)).unwrap()] += 1;
        }
        assert!(counts.iter().all(|&count| count > 800), "{counts:?}");
    }
}
