//! Which part of every tensor a rank holds: whole subtrees of the reduction tree (DESIGN §5).
//!
//! It is computed from the architecture and the storage types alone, so admission and placement can ask before
//! anything is loaded. The leaves are the same for every tensor-parallel size: that is what makes their bits equal.

use std::ops::Range;

use forge_kernels::tree::{self, MAX_LEAVES};
use forge_kernels::{KvShape, Segments};

use super::options::{DecoderOptions, Shard};
use crate::arch::{Architecture, AttentionSpec, MlpSpec};
use crate::error::{ModelError, Result};
use crate::weights::{DecoderRefs, ExpandRefs, FeedForwardRefs, LayerRefs, LinearRef, QkvRefs};

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
    /// How sums over all query heads and over all key heads are split.
    pub query_sums: HeadSums,
    pub key_sums: HeadSums,
    /// Whether plain keys and values come from latents by a product each, in all layers.
    pub expands_apart: bool,
    /// Inner units of layers without experts.
    pub mlp: Inner,
    /// Inner units of every expert.
    pub expert: Inner,
    /// Inner units of the shared expert.
    pub shared: Inner,
    /// Experts of every layer that has any.
    pub experts: Range<usize>,
    /// Rows of embedding and head.
    pub vocabulary: Range<usize>,
}

/// A rank's inner units of an MLP.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Inner {
    pub units: Range<usize>,
    /// How the down projection's columns (of this rank) are summed; `None` where there are none.
    pub segments: Option<Segments>,
}

/// A rank's leaves of a sum over all heads of a kind, where each head counts once.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct HeadSums {
    /// Which local heads count, ascending. A KV head that several ranks hold counts where its group's first query
    /// head is.
    pub heads: Vec<usize>,
    /// Leaves over the columns of those heads; `None` where there are none.
    pub segments: Option<Segments>,
}

impl Layout {
    /// The part of `shard`.
    ///
    /// # Errors
    /// [`ModelError::Layout`] for a degree or stage that cannot be had, naming the nearest that can.
    pub fn new(architecture: &Architecture, refs: &DecoderRefs, shard: &Shard) -> Result<Layout> {
        check_degree(shard)?;
        check_experts(architecture, shard)?;
        let layers = stage(architecture, shard)?;
        let (group, head_dim) = (architecture.group_size(), architecture.attention.head_dim);
        // One set of leaves for all layers, by the coarsest block: the KV pool's shape is the same in all of them.
        let blocks = Blocks::of(refs);
        let head_bounds = head_bounds(&architecture.attention, blocks.attention);
        let local_bounds = part(&head_bounds, shard);
        let heads = local_bounds[0]..local_bounds[local_bounds.len() - 1];
        let kv_heads = kv_heads(&heads, group);
        let experts = architecture.experts.as_ref();
        let inner = |mlp: Option<&MlpSpec>, block| mlp.map_or_else(Inner::default, |mlp| Inner::new(mlp, block, shard));
        let vocabulary = part(&tree::even_leaves(architecture.vocab_size), shard);
        Ok(Layout {
            first_stage: layers.start == 0,
            last_stage: layers.end == architecture.layers,
            layers,
            attention_segments: segments(&local_bounds, architecture.attention.value_dim),
            query_sums: HeadSums { heads: (0..heads.len()).collect(), segments: segments(&local_bounds, head_dim) },
            key_sums: key_sums(&local_bounds, &kv_heads, group, head_dim),
            kv_heads,
            heads,
            expands_apart: refs.layers.iter().any(expands_apart),
            mlp: inner(Some(&architecture.mlp), blocks.mlp),
            expert: inner(experts.map(|experts| &experts.expert), blocks.expert),
            shared: inner(experts.and_then(|experts| experts.shared.as_ref()).map(|shared| &shared.mlp), blocks.shared),
            experts: tree::share(experts.map_or(0, |experts| experts.count), shard.ep_rank, shard.ep_size),
            vocabulary: vocabulary[0]..vocabulary[vocabulary.len() - 1],
        })
    }

    /// Shape of this rank's KV pool.
    pub fn kv_shape(&self, architecture: &Architecture, options: &DecoderOptions) -> KvShape {
        let AttentionSpec { head_dim, value_dim, .. } = architecture.attention;
        KvShape {
            layers: self.layers.len(),
            kv_heads: self.kv_heads.len(),
            head_dim,
            value_dim,
            block_size: options.block_size,
            blocks: options.kv_blocks,
            dtype: options.kv_dtype,
        }
    }

    /// Rows of this rank's query heads, each `width` wide.
    pub fn head_rows(&self, width: usize) -> Range<usize> {
        self.heads.start * width..self.heads.end * width
    }

    /// Runs of rows of this rank's KV heads, each `width` wide.
    pub fn kv_rows(&self, width: usize) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for &head in &self.kv_heads {
            let rows = head * width..(head + 1) * width;
            match runs.last_mut() {
                Some(run) if run.end == rows.start => run.end = rows.end,
                _ => runs.push(rows),
            }
        }
        runs
    }
}

impl Inner {
    fn new(mlp: &MlpSpec, block: usize, shard: &Shard) -> Self {
        let blocks = tree::even_leaves(mlp.intermediate_size / block);
        let bounds = part(&blocks.iter().map(|bound| bound * block).collect::<Vec<_>>(), shard);
        Inner { units: bounds[0]..bounds[bounds.len() - 1], segments: segments(&bounds, 1) }
    }
}

/// Values per block of the row-split matrices of each kind: the most of any layer.
struct Blocks {
    attention: usize,
    mlp: usize,
    expert: usize,
    shared: usize,
}

impl Blocks {
    fn of(refs: &DecoderRefs) -> Self {
        let mut blocks = Blocks { attention: 1, mlp: 1, expert: 1, shared: 1 };
        let raise = |block: &mut usize, linear: &LinearRef| *block = (*block).max(linear.weight.dtype.block_elements());
        for layer in &refs.layers {
            raise(&mut blocks.attention, &layer.attention.out);
            match &layer.mlp {
                FeedForwardRefs::Dense(mlp) => raise(&mut blocks.mlp, &mlp.down),
                FeedForwardRefs::Experts(experts) => {
                    experts.experts.iter().for_each(|expert| raise(&mut blocks.expert, &expert.down));
                    experts.shared.iter().for_each(|shared| raise(&mut blocks.shared, &shared.down));
                }
            }
        }
        blocks
    }
}

fn expands_apart(layer: &LayerRefs) -> bool {
    matches!(&layer.attention.qkv, QkvRefs::Latent(latent) if matches!(latent.expand, ExpandRefs::Apart { .. }))
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

/// Experts are divided by whole subtrees of the tree over their indices, and each rank has at least one.
fn check_experts(architecture: &Architecture, shard: &Shard) -> Result<()> {
    let Shard { ep_rank, ep_size, .. } = *shard;
    let count = architecture.experts.as_ref().map_or(0, |experts| experts.count);
    let most = ep_size.clamp(1, count.max(1));
    let nearest = 1_usize << most.ilog2();
    if ep_size != nearest {
        return Err(ModelError::Layout {
            requested: format!("expert parallelism of {ep_size}"),
            reason: match count {
                0 => "the model has no experts to divide".to_owned(),
                _ => format!("its {count} experts are divided over 1, 2, 4, … ranks, of which each has at least one"),
            },
            nearest: nearest.to_string(),
        });
    }
    if ep_rank >= ep_size {
        let value = ep_rank.to_string();
        return Err(ModelError::Option { option: "shard.ep_rank", value, reason: format!("must be below ep_size = {ep_size}") });
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

/// Leaves of the attention output product, in heads: none ends inside a quantization block of its columns.
fn head_bounds(attention: &AttentionSpec, block: usize) -> Vec<usize> {
    let heads = tree::attention_leaves(attention.heads, attention.kv_heads);
    let columns: Vec<usize> = heads.iter().map(|head| head * attention.value_dim).collect();
    tree::merge_cut_leaves(&columns, block).iter().map(|column| column / attention.value_dim).collect()
}

/// Bounds of this rank's leaves.
fn part(bounds: &[usize], shard: &Shard) -> Vec<usize> {
    let leaves = tree::share(bounds.len() - 1, shard.tp_rank, shard.tp_size);
    bounds[leaves.start..=leaves.end].to_vec()
}

/// Leaves over a rank's own columns, of bounds in units of `width` columns.
fn segments(bounds: &[usize], width: usize) -> Option<Segments> {
    Segments::from_bounds(bounds.iter().map(|bound| (bound - bounds[0]) * width).collect())
}

/// Leaves of a sum over key heads: those of the query heads, a KV head lying where its group's first query head does.
/// Leaves without any are left out; the tree over the others is the same tree (see the tests).
fn key_sums(local_bounds: &[usize], kv_heads: &[usize], group: usize, head_dim: usize) -> HeadSums {
    let (mut heads, mut bounds) = (Vec::new(), vec![0]);
    for leaf in local_bounds.windows(2) {
        for (local, &head) in kv_heads.iter().enumerate() {
            // Where a head is there several times, the first counts.
            let is_first = local == 0 || kv_heads[local - 1] != head;
            if is_first && (leaf[0]..leaf[1]).contains(&(head * group)) {
                heads.push(local);
            }
        }
        if bounds.last() != Some(&(heads.len() * head_dim)) {
            bounds.push(heads.len() * head_dim);
        }
    }
    HeadSums { heads, segments: Segments::from_bounds(bounds) }
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

    fn shards(size: usize) -> impl Iterator<Item = Shard> {
        (0..size).map(move |tp_rank| Shard { tp_rank, tp_size: size, ..Shard::default() })
    }

    fn of(bounds: &[usize], size: usize) -> Vec<Range<usize>> {
        shards(size).map(|shard| part(bounds, &shard)).map(|part| part[0]..part[part.len() - 1]).collect()
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

    /// The order in which a tree over leaves adds the heads that they hold, as brackets; empty leaves add nothing.
    fn tree_of(leaves: &[Vec<usize>]) -> Option<String> {
        match leaves {
            [] => None,
            [leaf] => (!leaf.is_empty()).then(|| format!("{leaf:?}")),
            _ => {
                let (left, right) = leaves.split_at(leaves.len().div_ceil(2));
                match (tree_of(left), tree_of(right)) {
                    (Some(left), Some(right)) => Some(format!("({left} + {right})")),
                    (left, right) => left.or(right),
                }
            }
        }
    }

    /// The same of neighbouring ranks.
    fn tree_of_ranks(ranks: &[Option<String>]) -> Option<String> {
        match ranks {
            [rank] => rank.clone(),
            _ => {
                let (left, right) = ranks.split_at(ranks.len() / 2);
                match (tree_of_ranks(left), tree_of_ranks(right)) {
                    (Some(left), Some(right)) => Some(format!("({left} + {right})")),
                    (left, right) => left.or(right),
                }
            }
        }
    }

    #[test]
    fn a_sum_over_key_heads_is_the_same_for_every_number_of_ranks() {
        for (heads, group) in (1..=24).flat_map(|heads| (1..=heads).map(move |group| (heads, group))) {
            if heads % group != 0 {
                continue;
            }
            for block_heads in 1..=4 {
                let bounds = tree::merge_cut_leaves(&tree::attention_leaves(heads, heads / group), block_heads);
                let rank = |shard: Shard| {
                    let local = part(&bounds, &shard);
                    let kv_heads = kv_heads(&(local[0]..local[local.len() - 1]), group);
                    let sums = key_sums(&local, &kv_heads, group, 1);
                    let segments = sums.segments?;
                    let head = |&index: &usize| kv_heads[sums.heads[index]];
                    let leaf = |pair: &[usize]| (pair[0]..pair[1]).collect::<Vec<_>>().iter().map(head).collect();
                    tree_of(&segments.bounds().windows(2).map(leaf).collect::<Vec<_>>())
                };
                let expected = shards(1).map(rank).next().flatten();
                for size in [2, 4, 8] {
                    let ranks: Vec<_> = shards(size).map(rank).collect();
                    assert_eq!(tree_of_ranks(&ranks), expected, "{heads} heads in groups of {group}, {size} ranks");
                }
            }
        }
    }

    #[test]
    fn impossible_degrees_name_the_nearest() {
        for (size, nearest) in [(3, "2"), (6, "4"), (7, "4"), (16, "8"), (0, "1")] {
            match check_degree(&Shard { tp_size: size, ..Shard::default() }) {
                Err(ModelError::Layout { nearest: found, .. }) => assert_eq!(found, nearest, "{size}"),
                other => panic!("{size}: {other:?}"),
            }
        }
    }
}
