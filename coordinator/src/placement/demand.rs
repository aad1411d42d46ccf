//! What each rank of a replica needs: its stage's layers, its share of every layer, of the vocabulary and of KV.
//!
//! Shares are those of the reduction tree (DESIGN §5): whole subtrees of at most eight leaves, so 3 KV groups on two ranks
//! are 2 + 1. Where a layer's parts are shared unequally the larger share counts for the whole layer, so a rank is never
//! given less than it will hold.
//!
//! Expert ranks divide the routed experts of their stage likewise, by index; attention, router, shared experts, tables and
//! KV are on each of them, divided among its tensor ranks only.
//!
//! Invariant: the stages of a demand cover every layer once, in order, and the expert ranks of a stage every expert.

use std::ops::Range;

use forge_shared::plan::{ModelFacts, ModelShape};
use forge_shared::spec::{ByteSize, Layout, ModelServiceSpec};
use forge_shared::tree::{MAX_LEAVES, attention_leaves, layer_share, share};

/// The shortest context worth serving; below it a wish is refused rather than shrunk.
pub(super) const MIN_MODEL_LEN: usize = 16;

/// A replica's ranks, stage by stage, and what all of them share.
#[derive(Debug, Clone)]
pub(super) struct Demand {
    pub ranks: Vec<RankDemand>,
    pub layout: Layout,
    /// Context to aim for.
    pub wanted_len: usize,
    /// Whether it may be no less.
    pub is_len_stated: bool,
    /// KV blocks that one sequence of the shortest acceptable context needs.
    pub min_blocks: u64,
    /// KV blocks of one whole context.
    pub context_blocks: u64,
    /// KV blocks of a full batch of whole contexts.
    pub full_blocks: u64,
    /// KV blocks that the operator's KV memory makes.
    pub stated_blocks: Option<u64>,
    pub block_size: usize,
}

/// One rank's part.
#[derive(Debug, Clone)]
pub(super) struct RankDemand {
    pub layers: Range<usize>,
    pub tensor_rank: usize,
    pub expert_rank: usize,
    /// Of each layer that has any.
    pub experts: Range<usize>,
    pub weights_bytes: u64,
    pub workspace_bytes: u64,
    /// Of one KV block; the same number of blocks is on every rank.
    pub block_bytes: u64,
}

impl RankDemand {
    pub fn fixed_bytes(&self) -> u64 {
        self.weights_bytes.saturating_add(self.workspace_bytes)
    }

    /// Least bytes with so many KV blocks.
    pub fn need_bytes(&self, blocks: u64) -> u64 {
        self.fixed_bytes().saturating_add(blocks.saturating_mul(self.block_bytes))
    }
}

impl Demand {
    /// What a replica of this wish needs. With `fixed_len`, its context is that of its siblings.
    ///
    /// # Errors
    /// What about the layout does not go with the model, in words.
    pub fn of(spec: &ModelServiceSpec, facts: &ModelFacts, fixed_len: Option<usize>) -> Result<Demand, String> {
        let stated_len = spec.max_model_len.or(fixed_len);
        let wanted_len = stated_len.unwrap_or(facts.context_length);
        let block_bytes = facts.kv_slot_bytes.saturating_mul(spec.block_size as u64).max(1);
        let ranks = ranks(spec, facts, block_bytes)?;
        let all_block_bytes: u64 = ranks.iter().map(|rank| rank.block_bytes).fold(0, u64::saturating_add).max(1);
        let context_blocks = blocks_for(wanted_len, spec.block_size);
        let shortest = stated_len.unwrap_or(MIN_MODEL_LEN.min(wanted_len));
        Ok(Demand {
            ranks,
            layout: spec.layout,
            wanted_len,
            is_len_stated: stated_len.is_some(),
            min_blocks: blocks_for(shortest, spec.block_size),
            context_blocks,
            full_blocks: context_blocks.saturating_mul(spec.max_batch_size as u64),
            stated_blocks: spec.kv_memory.map(|ByteSize(bytes)| bytes / all_block_bytes),
            block_size: spec.block_size,
        })
    }

    /// KV blocks below which no device is worth looking at; `None` where the operator's KV memory holds no sequence.
    pub fn least_blocks(&self) -> Option<u64> {
        match self.stated_blocks {
            Some(stated) => (stated >= self.min_blocks).then_some(stated),
            None => Some(self.min_blocks),
        }
    }
}

pub(super) fn blocks_for(tokens: usize, block_size: usize) -> u64 {
    tokens.div_ceil(block_size.max(1)) as u64
}

fn ranks(spec: &ModelServiceSpec, facts: &ModelFacts, block_bytes: u64) -> Result<Vec<RankDemand>, String> {
    let Layout { tensor, pipeline, expert } = spec.layout;
    let shape = &facts.shape;
    if spec.layout.ranks() == 1 {
        return Ok(vec![RankDemand {
            layers: 0..facts.layers,
            tensor_rank: 0,
            expert_rank: 0,
            experts: 0..shape.experts,
            weights_bytes: facts.weights_bytes,
            workspace_bytes: facts.workspace_bytes,
            block_bytes,
        }]);
    }
    check_layout(spec.layout, facts)?;
    // The head is the embedding table again where it has no bytes of its own, and then the last stage has a copy.
    let head_bytes = match shape.head_bytes {
        0 if pipeline > 1 => shape.embedding_bytes,
        bytes => bytes,
    };
    let named_bytes = sum(&shape.layer_bytes).saturating_add(shape.embedding_bytes).saturating_add(shape.head_bytes);
    let rest_bytes = facts.weights_bytes.saturating_sub(named_bytes);
    // A layer as an expert rank holds it: its experts divided, all else whole.
    let layer_bytes = |experts: usize| -> Vec<u64> {
        let routed = |layer: usize| shape.expert_bytes.get(layer).copied().unwrap_or(0);
        let held = |(layer, bytes): (usize, &u64)| {
            bytes.saturating_sub(routed(layer)).saturating_add(part_of(routed(layer), (experts, shape.experts)))
        };
        shape.layer_bytes.iter().enumerate().map(held).collect()
    };
    let workspace_bytes = facts.workspace_bytes.saturating_add(shared_workspace_bytes(spec, shape));
    // The first rank has most: a subtree is split after ceil(n/2).
    let heaviest = layer_bytes(share(shape.experts, 0, expert).len());
    let stages = stages(&heaviest, pipeline, shape.embedding_bytes, head_bytes.saturating_add(rest_bytes));
    let mut ranks = Vec::with_capacity(spec.layout.ranks());
    for (number, layers) in stages.iter().enumerate() {
        // What several ranks have; where nobody counted it, norms and biases.
        let row_bytes = if tensor > 1 { 16 * shape.hidden_size as u64 } else { 0 };
        let extra_bytes = (tensor.ilog2() as usize).checked_sub(1).map(|at| shape.tensor_extra_bytes.get(at).copied().unwrap_or(row_bytes));
        // Slopes of linear biases, a number per head, are on every stage.
        let slopes_bytes = if pipeline > 1 { 4 * shape.heads as u64 } else { 0 };
        let whole_bytes = (layers.len() as u64).saturating_mul(extra_bytes.unwrap_or(0)).saturating_add(slopes_bytes);
        for (expert_rank, tensor_rank) in (0..expert).flat_map(|expert_rank| (0..tensor).map(move |tensor_rank| (expert_rank, tensor_rank)))
        {
            let experts = share(shape.experts, expert_rank, expert);
            let share = Share::of(shape.heads, shape.kv_heads, tensor_rank, tensor);
            let stage_bytes = sum(&layer_bytes(experts.len())[layers.clone()]);
            let mut weights_bytes = part_of(stage_bytes, share.layer).saturating_add(whole_bytes);
            if number == 0 {
                let positions_bytes = if pipeline > 1 { rest_bytes } else { 0 };
                let part_bytes = part_of(shape.embedding_bytes, share.vocabulary).saturating_add(row_bytes);
                weights_bytes = weights_bytes.saturating_add(part_bytes).saturating_add(positions_bytes);
            }
            if number + 1 == stages.len() {
                let part_bytes = part_of(head_bytes, share.vocabulary).saturating_add(row_bytes);
                weights_bytes = weights_bytes.saturating_add(part_bytes).saturating_add(rest_bytes);
            }
            let stage_block_bytes = part_of(block_bytes, (layers.len(), facts.layers));
            let block_bytes = part_of(stage_block_bytes, share.kv);
            let layers = layers.clone();
            ranks.push(RankDemand { layers, tensor_rank, expert_rank, experts, weights_bytes, workspace_bytes, block_bytes });
        }
    }
    Ok(ranks)
}

/// What a rank works in beside what a whole model does: logits gathered from its tensor peers, and its part of a sum over
/// experts.
fn shared_workspace_bytes(spec: &ModelServiceSpec, shape: &ModelShape) -> u64 {
    let floats = |rows: usize, width: usize| (rows as u64).saturating_mul(width as u64).saturating_mul(4);
    let logits_rows = spec.max_batch_size.min(spec.max_step_tokens);
    let gathered_bytes = if spec.layout.tensor > 1 { floats(logits_rows, shape.vocab_size) } else { 0 };
    let subtree_bytes = if spec.layout.expert > 1 { floats(spec.max_step_tokens, shape.hidden_size) } else { 0 };
    gathered_bytes.saturating_add(subtree_bytes)
}

/// Whether a model can be divided like this at all.
fn check_layout(layout: Layout, facts: &ModelFacts) -> Result<(), String> {
    let Layout { tensor, pipeline, expert } = layout;
    let shape = &facts.shape;
    if !tensor.is_power_of_two() || tensor > MAX_LEAVES {
        return Err(format!("layout.tensor={tensor}: sums are shared by 1, 2, 4 or 8 ranks"));
    }
    if pipeline == 0 || pipeline > facts.layers {
        return Err(format!("layout.pipeline={pipeline}: the model has {} layers, and a stage has at least one", facts.layers));
    }
    if let Some(reason) = no_such_experts(layout, facts) {
        return Err(reason);
    }
    let is_known = shape.layer_bytes.len() == facts.layers
        && (expert == 1 || shape.expert_bytes.len() == facts.layers)
        && shape.heads > 0
        && shape.kv_heads > 0;
    if !is_known {
        let reason = "the model's parts are not known, so it is not divided; use layout.tensor=1, layout.pipeline=1 and layout.expert=1";
        return Err(reason.into());
    }
    Ok(())
}

/// Why this model's experts are not divided among so many ranks on any machine.
pub(super) fn no_such_experts(layout: Layout, facts: &ModelFacts) -> Option<String> {
    let (expert, experts) = (layout.expert, facts.shape.experts);
    if expert == 1 {
        return None;
    }
    if experts == 0 {
        return Some(format!("layout.expert={expert}: the model has no experts to divide"));
    }
    let most = nearest_expert(expert, facts);
    (expert != most).then(|| {
        format!("layout.expert={expert}: the model's {experts} experts are divided over 1, 2, 4, … ranks, of which each has at least one")
    })
}

/// The largest number of ranks up to `expert` that this model's experts are divided over: whole subtrees, none of them empty.
pub(super) fn nearest_expert(expert: usize, facts: &ModelFacts) -> usize {
    1 << expert.min(facts.shape.experts).max(1).ilog2()
}

fn sum(bytes: &[u64]) -> u64 {
    bytes.iter().fold(0, |sum, &bytes| sum.saturating_add(bytes))
}

/// A rank's shares as fractions, each rounded up by nobody yet.
#[derive(Debug, PartialEq, Eq)]
struct Share {
    layer: (usize, usize),
    vocabulary: (usize, usize),
    kv: (usize, usize),
}

impl Share {
    fn of(heads: usize, kv_heads: usize, rank: usize, size: usize) -> Share {
        let group = (heads / kv_heads).max(1);
        let bounds = attention_leaves(heads, kv_heads);
        let leaves = share(bounds.len() - 1, rank, size);
        let held = bounds[leaves.start]..bounds[leaves.end];
        let even = share(MAX_LEAVES, rank, size).len();
        Share { layer: layer_share(heads, kv_heads, rank, size), vocabulary: (even, MAX_LEAVES), kv: (kv_held(&held, group), kv_heads) }
    }
}

/// KV heads that query heads `held` read; one that serves unequally many of them is there once for each.
fn kv_held(held: &Range<usize>, group: usize) -> usize {
    if held.is_empty() {
        return 0;
    }
    let (first, last) = (held.start / group, (held.end - 1) / group);
    let is_whole = held.start.is_multiple_of(group) && held.end.is_multiple_of(group);
    if first == last || is_whole { last - first + 1 } else { held.len() }
}

fn part_of(bytes: u64, (numerator, denominator): (usize, usize)) -> u64 {
    let part = (u128::from(bytes) * numerator as u128).div_ceil(denominator.max(1) as u128);
    u64::try_from(part).unwrap_or(u64::MAX)
}

/// Consecutive layers for each stage, so that the heaviest stage is as light as can be.
fn stages(layer_bytes: &[u64], count: usize, first_extra: u64, last_extra: u64) -> Vec<Range<usize>> {
    let (mut low, mut high) = (0, sum(layer_bytes).saturating_add(first_extra).saturating_add(last_extra));
    while low < high {
        let middle = low + (high - low) / 2;
        if fill(layer_bytes, count, first_extra, last_extra, middle).is_some() { high = middle } else { low = middle + 1 }
    }
    // One stage of everything is within the sum, and more stages are lighter: the last bound is always feasible.
    fill(layer_bytes, count, first_extra, last_extra, high).unwrap_or_else(|| even(layer_bytes.len(), count))
}

/// Fills stages from the front up to `limit` bytes, leaving at least one layer for each later stage.
fn fill(layer_bytes: &[u64], count: usize, first_extra: u64, last_extra: u64, limit: u64) -> Option<Vec<Range<usize>>> {
    let mut stages = Vec::with_capacity(count);
    let mut start = 0;
    for stage in 0..count {
        let most = layer_bytes.len() - (count - stage - 1);
        let extra = if stage == 0 { first_extra } else { 0 }.saturating_add(if stage + 1 == count { last_extra } else { 0 });
        let mut bytes = extra;
        let mut end = start;
        while end < most && bytes.saturating_add(layer_bytes[end]) <= limit {
            bytes = bytes.saturating_add(layer_bytes[end]);
            end += 1;
        }
        if end == start {
            return None;
        }
        stages.push(start..end);
        start = end;
    }
    (start == layer_bytes.len()).then_some(stages)
}

fn even(layers: usize, count: usize) -> Vec<Range<usize>> {
    (0..count).map(|stage| stage * layers / count..(stage + 1) * layers / count).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::test_support::mixture;

    #[test]
    fn three_groups_on_two_ranks_are_two_and_one() {
        assert_eq!(Share::of(9, 3, 0, 2), Share { layer: (6, 9), vocabulary: (4, 8), kv: (2, 3) });
        assert_eq!(Share::of(9, 3, 1, 2), Share { layer: (4, 8), vocabulary: (4, 8), kv: (1, 3) });
        assert_eq!(Share::of(9, 3, 3, 4).kv, (0, 3));
        assert_eq!(Share::of(32, 8, 5, 8), Share { layer: (1, 8), vocabulary: (1, 8), kv: (1, 8) });
        // Four ranks over two KV heads: each head is there twice.
        assert_eq!((0..4).map(|rank| Share::of(8, 2, rank, 4).kv.0).sum::<usize>(), 4);
    }

    #[test]
    fn expert_ranks_divide_the_routed_experts_and_hold_all_else() {
        let facts = mixture(1_000, 6);
        let layout = Layout { tensor: 1, pipeline: 1, expert: 4 };
        let ranks = ranks(&ModelServiceSpec { layout, ..Default::default() }, &facts, 16).expect("divides");
        let held: Vec<Range<usize>> = ranks.iter().map(|rank| rank.experts.clone()).collect();
        assert_eq!(held, [0..2, 2..3, 3..5, 5..6]);
        let routed_bytes = sum(&facts.shape.expert_bytes);
        let shared_bytes = facts.weights_bytes - routed_bytes;
        for rank in &ranks {
            let expected = shared_bytes + routed_bytes * rank.experts.len() as u64 / 6;
            assert!(rank.weights_bytes.abs_diff(expected) <= 64, "{} and {expected}", rank.weights_bytes);
            assert_eq!((rank.block_bytes, rank.layers.clone()), (16, 0..30), "keys and values are on each");
        }
        let bad = |expert: usize, facts: &ModelFacts| check_layout(Layout { expert, ..layout }, facts).expect_err("cannot be had");
        assert!(bad(2, &crate::state::test_support::facts(100)).contains("no experts"));
        assert!(bad(8, &facts).contains("6 experts") && bad(3, &facts).contains("1, 2, 4"));
        assert_eq!([nearest_expert(8, &facts), nearest_expert(3, &facts), nearest_expert(2, &facts)], [4, 2, 2]);
    }

    #[test]
    fn stages_balance_bytes_with_embedding_and_head() {
        assert_eq!(stages(&[1; 8], 2, 0, 0), [0..4, 4..8]);
        assert_eq!(stages(&[1; 8], 2, 2, 0), [0..3, 3..8]);
        assert_eq!(stages(&[10, 1, 1, 1], 2, 0, 0), [0..1, 1..4]);
        assert_eq!(stages(&[1, 1], 2, 100, 0), [0..1, 1..2]);
    }
}
