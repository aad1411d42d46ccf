//! Which part of every tensor a rank holds: whole subtrees of the reduction tree (DESIGN §5).
//!
//! It is computed from the architecture and the storage types alone, so admission and placement can ask before
//! anything is loaded. The leaves are the same for every tensor-parallel size: that is what makes their bits equal.

use std::ops::Range;

use forge_kernels::tree::{self, MAX_LEAVES};
use forge_kernels::{KvDType, KvShape, Segments};

use super::options::{DecoderOptions, Shard};
use crate::arch::{Architecture, AttentionSpec};
use crate::error::{ModelError, Result};
use crate::weights::{DecoderRefs, MatrixRef};

/// A rank's part. Ranges may be empty: such a rank only takes part in the collectives.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Layout {
    /// Layers of this stage.
    pub layers: Range<usize>,
    /// Whether this stage embeds tokens.
    pub first_stage: bool,
    /// Whether this stage has the final norm and the head.
    pub last_stage: bool,
    /// Query heads.
    pub heads: Range<usize>,
    /// For each local KV head, which of the model's it is. One may be there several times, where the query heads'
    /// leaves cut a group unevenly.
    pub kv_heads: Vec<usize>,
    /// How the attention output's columns (of this rank) are summed; `None` where it has no heads.
    pub attention_segments: Option<Segments>,
    /// Inner MLP units.
    pub mlp: Range<usize>,
    /// How the down projection's columns are summed; `None` where there are none.
    pub mlp_segments: Option<Segments>,
    /// Rows of embedding and head.
    pub vocabulary: Range<usize>,
}

impl Layout {
    /// The part of `shard`.
    ///
    /// # Errors
    /// [`ModelError::Layout`] for a degree or stage that cannot be had, naming the nearest that can.
    pub fn new(architecture: &Architecture, refs: &DecoderRefs, shard: &Shard) -> Result<Layout> {
        check_degree(shard)?;
        let layers = stage(architecture, shard)?;
        let head_dim = architecture.attention.head_dim;
        // One set of leaves for all layers, by the coarsest block: the KV pool's shape is the same in all of them.
        let attention_bounds = attention_bounds(architecture, coarsest(refs, |layer| &layer.out.weight));
        let mlp_bounds = mlp_bounds(architecture, coarsest(refs, |layer| &layer.down.weight));
        let (columns, attention_segments) = part(&attention_bounds, shard);
        let (mlp, mlp_segments) = part(&mlp_bounds, shard);
        let (vocabulary, _) = part(&tree::even_leaves(architecture.vocab_size), shard);
        let heads = columns.start / head_dim..columns.end / head_dim;
        Ok(Layout {
            first_stage: layers.start == 0,
            last_stage: layers.end == architecture.layers,
            layers,
            kv_heads: kv_heads(&heads, architecture.group_size()),
            heads,
            attention_segments,
            mlp,
            mlp_segments,
            vocabulary,
        })
    }

    /// Shape of this rank's KV pool.
    pub fn kv_shape(&self, architecture: &Architecture, options: &DecoderOptions) -> KvShape {
        self.shape_of_blocks(architecture, options.block_size, options.kv_blocks, options.kv_dtype)
    }

    fn shape_of_blocks(&self, architecture: &Architecture, block_size: usize, blocks: usize, dtype: KvDType) -> KvShape {
        let kv_heads = self.kv_heads.len();
        let AttentionSpec { head_dim, value_dim, .. } = architecture.attention;
        KvShape { layers: self.layers.len(), kv_heads, head_dim, value_dim, block_size, blocks, dtype }
    }

    /// Runs of rows of the k (or v) matrix that this rank's KV heads are.
    pub fn kv_rows(&self, head_dim: usize) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for &head in &self.kv_heads {
            let rows = head * head_dim..(head + 1) * head_dim;
            match runs.last_mut() {
                Some(run) if run.end == rows.start => run.end = rows.end,
                _ => runs.push(rows),
            }
        }
        runs
    }
}

fn check_degree(shard: &Shard) -> Result<()> {
    let Shard { tp_rank, tp_size, .. } = *shard;
    if !tp_size.is_power_of_two() || tp_size > MAX_LEAVES {
        let nearest = tp_size.clamp(1, MAX_LEAVES);
        let below = nearest.next_power_of_two() / if nearest.is_power_of_two() { 1 } else { 2 };
        return Err(ModelError::Layout {
            requested: format!("tensor parallelism of {tp_size}"),
            reason: format!("sums have at most {MAX_LEAVES} leaves in a binary tree, so 1, 2, 4 and 8 ranks can share them"),
            nearest: below.to_string(),
        });
    }
    if tp_rank >= tp_size {
        let value = tp_rank.to_string();
        return Err(ModelError::Option { option: "shard.tp_rank", value, reason: format!("must be below tp_size = {tp_size}") });
    }
    Ok(())
}

fn stage(architecture: &Architecture, shard: &Shard) -> Result<Range<usize>> {
    let layers = shard.layers.clone().unwrap_or(0..architecture.layers);
    if layers.is_empty() || layers.end > architecture.layers {
        return Err(ModelError::Layout {
            requested: format!("a stage of layers {layers:?}"),
            reason: format!("the model has layers 0..{}, and a stage has at least one", architecture.layers),
            nearest: format!("0..{}", architecture.layers),
        });
    }
    Ok(layers)
}

/// The largest block among the row-split matrices of one kind.
fn coarsest(refs: &DecoderRefs, matrix: impl Fn(&crate::weights::LayerRefs) -> &MatrixRef) -> usize {
    refs.layers.iter().map(|layer| matrix(layer).dtype.block_elements()).max().unwrap_or(1)
}

/// Leaves of the attention output product, in its columns.
fn attention_bounds(architecture: &Architecture, block: usize) -> Vec<usize> {
    let attention = &architecture.attention;
    let heads = tree::attention_leaves(attention.heads, attention.kv_heads);
    let columns: Vec<usize> = heads.iter().map(|head| head * attention.head_dim).collect();
    tree::merge_cut_leaves(&columns, block)
}

/// Leaves of the down projection, in its columns.
fn mlp_bounds(architecture: &Architecture, block: usize) -> Vec<usize> {
    let blocks = architecture.mlp.intermediate_size / block;
    tree::even_leaves(blocks).iter().map(|bound| bound * block).collect()
}

/// This rank's range and how it is split into leaves.
fn part(bounds: &[usize], shard: &Shard) -> (Range<usize>, Option<Segments>) {
    let leaves = tree::share(bounds.len() - 1, shard.tp_rank, shard.tp_size);
    let range = bounds[leaves.start]..bounds[leaves.end];
    let local = bounds[leaves.start..=leaves.end].iter().map(|bound| bound - range.start).collect();
    (range, Segments::from_bounds(local))
}

/// KV heads that query heads `heads` read, arranged so that each local KV head serves equally many of them.
fn kv_heads(heads: &Range<usize>, group: usize) -> Vec<usize> {
    if heads.is_empty() {
        return Vec::new();
    }
    let (first, last) = (heads.start / group, (heads.end - 1) / group);
    let whole_groups = heads.start.is_multiple_of(group) && heads.end.is_multiple_of(group);
    if first == last || whole_groups { (first..=last).collect() } else { heads.clone().map(|head| head / group).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(bounds: &[usize], size: usize) -> Vec<Range<usize>> {
        (0..size).map(|tp_rank| part(bounds, &Shard { tp_rank, tp_size: size, layers: None }).0).collect()
    }

    #[test]
    fn shares_are_whole_subtrees_and_cover_everything() {
        // SmolLM2: nine heads in three groups are leaves of three heads: 2 + 1, and one of four ranks has none.
        let bounds: Vec<usize> = tree::attention_leaves(9, 3);
        assert_eq!(of(&bounds, 2), [0..6, 6..9]);
        assert_eq!(of(&bounds, 4), [0..3, 3..6, 6..9, 9..9]);
        for (leaves, size) in (1..=8).flat_map(|leaves| [1, 2, 4, 8].map(|size| (leaves, size))) {
            let bounds: Vec<usize> = (0..=leaves).map(|leaf| leaf * 32).collect();
            let parts = of(&bounds, size);
            assert_eq!(parts[0].start, 0);
            assert_eq!(parts[size - 1].end, leaves * 32);
            assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start));
        }
    }

    #[test]
    fn kv_heads_are_repeated_only_where_a_group_is_cut_unevenly() {
        assert_eq!(kv_heads(&(0..6), 3), [0, 1]);
        assert_eq!(kv_heads(&(6..9), 3), [2]);
        assert_eq!(kv_heads(&(1..2), 4), [0]);
        assert_eq!(kv_heads(&(4..6), 4), [1]);
        assert_eq!(kv_heads(&(0..3), 2), [0, 0, 1]);
        assert_eq!(kv_heads(&(3..6), 2), [1, 2, 2]);
        assert!(kv_heads(&(3..3), 2).is_empty());
    }

    #[test]
    fn impossible_degrees_name_the_nearest() {
        for (size, nearest) in [(3, "2"), (6, "4"), (7, "4"), (16, "8"), (0, "1")] {
            match check_degree(&Shard { tp_rank: 0, tp_size: size, layers: None }) {
                Err(ModelError::Layout { nearest: found, .. }) => assert_eq!(found, nearest, "{size}"),
                other => panic!("{size}: {other:?}"),
            }
        }
    }
}
