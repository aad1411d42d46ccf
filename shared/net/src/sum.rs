//! Sums of the ranks' parts in the order of the reduction tree.
//!
//! Invariant: the result depends on the parts and their order alone, not on how an implementation cuts the work, so
//! every implementation that calls this gives the same bits.

use crate::{NetError, Result};

/// Elements summed at a time: small enough that the parts and the sums of subtrees stay in the fastest cache.
const BLOCK: usize = 1024;

/// `out` = the sum of `parts` (one per rank, each as long as `out`), neighbours first.
pub(crate) fn tree_sum(parts: &[&[f32]], out: &mut [f32]) {
    debug_assert!(parts.len().is_power_of_two() && parts.iter().all(|part| part.len() == out.len()));
    // One partial sum per level of the tree below the root.
    let mut scratch = vec![[0.0; BLOCK]; parts.len().ilog2() as usize];
    let mut at = 0;
    for block in out.chunks_mut(BLOCK) {
        subtree(parts, at, block, &mut scratch);
        at += block.len();
    }
}

fn subtree(parts: &[&[f32]], at: usize, out: &mut [f32], scratch: &mut [[f32; BLOCK]]) {
    let range = at..at + out.len();
    match parts {
        [] => out.fill(-0.0),
        [part] => out.copy_from_slice(&part[range]),
        [low, high] => {
            for ((sum, low), high) in out.iter_mut().zip(&low[range.clone()]).zip(&high[range]) {
                *sum = low + high;
            }
        }
        _ => {
            let (low, high) = parts.split_at(parts.len() / 2);
            subtree(low, at, out, scratch);
            if let Some((own, deeper)) = scratch.split_first_mut() {
                let own = &mut own[..out.len()];
                subtree(high, at, own, deeper);
                out.iter_mut().zip(own).for_each(|(sum, high)| *sum += *high);
            }
        }
    }
}

/// Whether `size` ranks can walk the tree.
pub(crate) fn check_size(size: usize) -> Result<()> {
    if size.is_power_of_two() {
        return Ok(());
    }
    Err(NetError::GroupSize { size, nearest: 1 << size.max(1).ilog2() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(parts: &[f32]) -> f32 {
        match parts {
            [value] => *value,
            _ => {
                let (low, high) = parts.split_at(parts.len() / 2);
                one(low) + one(high)
            }
        }
    }

    #[test]
    fn a_sum_by_blocks_has_the_bits_of_a_sum_by_elements() {
        for (size, length) in [1, 2, 4, 8, 16].into_iter().flat_map(|size| [0, 1, 1023, 1024, 2500].map(|length| (size, length))) {
            let value = |rank: usize, index: usize| ((rank * 7919 + index * 104_729) % 1000) as f32 * 1.7e-3 - [1e4, 0.0][rank % 2];
            let parts: Vec<Vec<f32>> = (0..size).map(|rank| (0..length).map(|index| value(rank, index)).collect()).collect();
            let mut out = vec![f32::NAN; length];
            tree_sum(&parts.iter().map(Vec::as_slice).collect::<Vec<_>>(), &mut out);
            for (index, sum) in out.iter().enumerate() {
                let column: Vec<f32> = (0..size).map(|rank| value(rank, index)).collect();
                assert_eq!(sum.to_bits(), one(&column).to_bits(), "{size} ranks, element {index}");
            }
        }
    }
}
