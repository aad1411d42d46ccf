//! The weighted sum of a token's experts, in the tree's order over expert indices.
//!
//! The tree is that over all experts of the layer; absent ones are skipped: a node with one absent child is the other
//! child. So a rank that holds a whole subtree's experts has that subtree's sum, and ranks combine as leaves do.
//! A sum of nothing is −0.0, which adds nothing.

use crate::backend::ExpertEntry;
use crate::lanes::{LANES, Lanes, kernel};

/// Most sums that wait for their neighbour: one per level of a tree over less than 2³¹ experts.
const MAX_DEPTH: usize = 32;

/// After each of a token's entries (experts ascending, below `leaves`), how many times to add the two topmost sums.
/// Appends to `merges`.
pub(crate) fn merges_after_present(entries: &[ExpertEntry], leaves: usize, merges: &mut Vec<u8>) {
    fn walk(entries: &[ExpertEntry], start: usize, end: usize, merges: &mut [u8]) {
        if entries.len() < 2 {
            return;
        }
        let middle = start + (end - start).div_ceil(2);
        let left = entries.partition_point(|entry| (entry.expert as usize) < middle);
        walk(&entries[..left], start, middle, &mut merges[..left]);
        walk(&entries[left..], middle, end, &mut merges[left..]);
        if left > 0 && left < entries.len() {
            merges[entries.len() - 1] += 1;
        }
    }
    let first = merges.len();
    merges.resize(first + entries.len(), 0);
    walk(entries, 0, leaves, &mut merges[first..]);
}

/// One token.
#[derive(Clone, Copy)]
pub(crate) struct CombineTask<'a> {
    /// Row 0 of the experts' outputs.
    pub(crate) y: *const f32,
    pub(crate) entries: &'a [ExpertEntry],
    pub(crate) merges: &'a [u8],
    /// The token's row of the shared expert's output, and its factor.
    pub(crate) shared: Option<(*const f32, f32)>,
    pub(crate) out: *mut f32,
    pub(crate) width: usize,
}

/// # Safety
/// All rows of the entries exist in `y`; `out` and the shared row hold `width` elements; entries are distinct leaves of
/// one tree, with their merges.
#[inline(always)]
unsafe fn combine_body<L: Lanes>(task: CombineTask<'_>) {
    // Written once: a sum is read only after it was put there, except the first, that of nothing.
    // SAFETY: the caller's contract.
    let mut waiting = unsafe { [L::splat(-0.0); MAX_DEPTH] };
    for column in (0..task.width).step_by(LANES) {
        let count = LANES.min(task.width - column);
        // SAFETY: columns below `width` are touched.
        unsafe {
            waiting[0] = L::splat(-0.0);
            let mut depth = 0;
            for (entry, &merges) in task.entries.iter().zip(task.merges) {
                let y = L::load_partial(task.y.add(entry.row as usize * task.width + column), count);
                let mut top = y.mul(L::splat(entry.weight));
                for _ in 0..merges {
                    depth -= 1;
                    top = waiting[depth].add(top);
                }
                waiting[depth] = top;
                depth += 1;
            }
            let mut sum = waiting[0];
            if let Some((shared, weight)) = task.shared {
                sum = sum.add(L::load_partial(shared.add(column), count).mul(L::splat(weight)));
            }
            sum.store_partial(task.out.add(column), count);
        }
    }
}

kernel! {
    /// Combines one token's experts.
    ///
    /// # Safety
    /// All rows of the entries exist in `y`; `out` and the shared row hold `width` elements; entries are distinct leaves
    /// of one tree, with their merges.
    pub(crate) unsafe fn combine_token(task: CombineTask<'_>) = combine_body
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merges(experts: &[u32], leaves: usize) -> Vec<u8> {
        let entries: Vec<ExpertEntry> = experts.iter().map(|&expert| ExpertEntry { expert, row: 0, weight: 1.0 }).collect();
        let mut merges = Vec::new();
        merges_after_present(&entries, leaves, &mut merges);
        merges
    }

    #[test]
    fn all_experts_give_the_tree_itself() {
        for leaves in 1..40 {
            let all: Vec<u32> = (0..leaves as u32).collect();
            assert_eq!(merges(&all, leaves), crate::tree::merges_after(leaves), "{leaves}");
        }
    }

    #[test]
    fn absent_experts_are_skipped() {
        assert_eq!(merges(&[], 8), Vec::<u8>::new());
        assert_eq!(merges(&[5], 8), [0]);
        // ((0 1) (2 3)) ((4 5) (6 7)): 1 waits for (2 3), then for 6.
        assert_eq!(merges(&[1, 2, 3, 6], 8), [0, 0, 2, 1]);
        assert_eq!(merges(&[0, 4, 5, 7], 8), [0, 0, 1, 2]);
        assert_eq!(merges(&[0, u32::MAX >> 1], 1 << 31), [0, 1]);
    }
}
