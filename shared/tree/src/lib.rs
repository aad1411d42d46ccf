//! Which leaves of the reduction tree (DESIGN §5) a rank holds.
//!
//! What it is: the rule by which a worker divides a model among ranks, and by which placement counts what each of
//! them needs. What it is not: the order of a sum, which is the kernels' matter. It is a crate of its own so that the kernels,
//! which take long to build, know nothing else of what is shared.
//!
//! Invariant: ranks hold whole subtrees, in order; together they hold every leaf once.

/// The most leaves a product's sum is split into; more would not stay cheap in registers.
pub const MAX_LEAVES: usize = 8;

/// The leaves that rank `rank` of `size` (a power of two) holds: whole subtrees, perhaps none.
pub fn share(leaves: usize, rank: usize, size: usize) -> std::ops::Range<usize> {
    debug_assert!(size.is_power_of_two() && rank < size);
    let (mut start, mut end, mut ranks, mut index) = (0, leaves, size, rank);
    while ranks > 1 {
        let middle = start + (end - start).div_ceil(2);
        ranks /= 2;
        if index < ranks {
            end = middle;
        } else {
            start = middle;
            index -= ranks;
        }
    }
    start..end
}

/// The part of a layer that tensor rank `rank` of `size` is counted with, as a fraction: its share of the query heads or of
/// eight even leaves, whichever is larger.
pub fn layer_share(heads: usize, kv_heads: usize, rank: usize, size: usize) -> (usize, usize) {
    let bounds = attention_leaves(heads, kv_heads);
    let leaves = share(bounds.len() - 1, rank, size);
    let held = bounds[leaves.end] - bounds[leaves.start];
    let even = share(MAX_LEAVES, rank, size).len();
    if held * MAX_LEAVES > even * heads { (held, heads) } else { (even, MAX_LEAVES) }
}

/// Leaves of the attention output product over `heads` query heads in `kv_heads` groups, in units of query
/// heads: heads when there are at most 8, else KV groups when at most 8, else 8 runs of whole groups.
/// Returns boundaries in heads.
pub fn attention_leaves(heads: usize, kv_heads: usize) -> Vec<usize> {
    let group = heads / kv_heads.max(1);
    if heads <= MAX_LEAVES {
        (0..=heads).collect()
    } else if kv_heads <= MAX_LEAVES {
        (0..=kv_heads).map(|i| i * group).collect()
    } else {
        (0..=MAX_LEAVES).map(|i| i * kv_heads / MAX_LEAVES * group).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_hold_every_leaf_once_in_order() {
        for (leaves, size) in (0..=70).flat_map(|leaves| [1, 2, 4, 8, 16, 64].map(|size| (leaves, size))) {
            let mut next = 0;
            for held in (0..size).map(|rank| share(leaves, rank, size)) {
                assert_eq!(held.start, next);
                next = held.end;
            }
            assert_eq!(next, leaves, "{size} ranks");
        }
        assert_eq!([share(3, 0, 2), share(3, 1, 2), share(3, 3, 4)], [0..2, 2..3, 3..3]);
    }

    #[test]
    fn attention_has_heads_groups_or_runs_of_groups_as_leaves() {
        assert_eq!(attention_leaves(4, 2), [0, 1, 2, 3, 4]);
        assert_eq!(attention_leaves(9, 3), [0, 3, 6, 9]);
        assert_eq!(attention_leaves(24, 12), [0, 2, 6, 8, 12, 14, 18, 20, 24]);
    }
}
