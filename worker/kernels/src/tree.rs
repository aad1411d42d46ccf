//! The reduction tree (DESIGN §5): in which order the parts of a sum are added.
//!
//! `tree(leaves)` splits after ceil(n/2) leaves, recursively. A rank holds whole subtrees; collectives combine
//! neighbours first. So tp = 1, 2, 4, 8 give the same bits, and an empty share contributes −0.0.
//!
//! What it is not: it holds no numbers; kernels and collectives walk it. Which leaves a rank holds is
//! [`forge_tree`]: placement counts with the same rule.

pub use forge_tree::{MAX_LEAVES, attention_leaves, share};

/// Column boundaries of a product's leaves: leaf i covers columns `bounds[i]..bounds[i + 1]`.
///
/// A product that tensor parallelism never splits by columns has one leaf.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segments {
    bounds: Vec<usize>,
}

impl Segments {
    /// One leaf over all columns.
    pub fn whole(columns: usize) -> Self {
        Segments { bounds: vec![0, columns] }
    }

    /// Leaves from explicit boundaries: starts at 0, strictly increasing, at most [`MAX_LEAVES`] leaves.
    pub fn from_bounds(bounds: Vec<usize>) -> Option<Self> {
        let increasing = bounds.windows(2).all(|pair| pair[0] < pair[1]);
        (bounds.len() >= 2 && bounds.len() <= MAX_LEAVES + 1 && bounds[0] == 0 && increasing).then_some(Segments { bounds })
    }

    /// Boundaries, first 0, last the number of columns.
    pub fn bounds(&self) -> &[usize] {
        &self.bounds
    }

    /// Leaves.
    pub fn leaves(&self) -> usize {
        self.bounds.len() - 1
    }

    /// Columns covered.
    pub fn columns(&self) -> usize {
        self.bounds[self.bounds.len() - 1]
    }
}

/// After leaf i of `leaves` has been pushed on a stack, how many times to replace the two topmost values by
/// their sum (lower one first) so that at the end one value remains: the tree walked in order.
pub fn merges_after(leaves: usize) -> Vec<u8> {
    fn walk(start: usize, end: usize, merges: &mut [u8]) {
        let count = end - start;
        if count < 2 {
            return;
        }
        let middle = start + count.div_ceil(2);
        walk(start, middle, merges);
        walk(middle, end, merges);
        merges[end - 1] += 1;
    }
    let mut merges = vec![0; leaves];
    walk(0, leaves, &mut merges);
    merges
}

/// Leaves of a row-split product or of the vocabulary: S = min(8, units) runs, run i being units
/// floor(i·B/S) to floor((i+1)·B/S). `units` are quantization blocks (or elements of a dense type).
pub fn even_leaves(units: usize) -> Vec<usize> {
    let leaves = units.clamp(1, MAX_LEAVES);
    (0..=leaves).map(|i| i * units / leaves).collect()
}

/// Merges every leaf that would end inside a block of `block` elements with the next one.
/// `bounds` are in elements; the last bound is kept.
pub fn merge_cut_leaves(bounds: &[usize], block: usize) -> Vec<usize> {
    let last = bounds.len() - 1;
    bounds
        .iter()
        .enumerate()
        .filter(|&(index, bound)| index == 0 || index == last || bound.is_multiple_of(block))
        .map(|(_, &bound)| bound)
        .collect()
}
