//! Which prompt blocks a replica can reuse: a core fed by the engine's events.
//!
//! It holds 64 bits of each block's hash. A collision costs a worse choice of replica and nothing else: the engine
//! compares whole hashes. Invariant: at most [`BLOCKS_MAX`] hashes are held; beyond that new ones are not noted, so that
//! a replica is thought to hold less than it does.

use std::collections::HashSet;

use forge_shared::generate::GenerateRequest;
use forge_shared::link::PrefixUpdate;
use forge_text::PrefixHasher;

/// Most hashes held per replica: 8 MiB and a cache of 4 million tokens in blocks of 16.
pub const BLOCKS_MAX: usize = 1 << 18;
/// Blocks of a prompt that are looked up; longer prompts are told apart well before.
pub const LOOKUP_BLOCKS_MAX: usize = 512;

/// See the module documentation.
#[derive(Debug, Default)]
pub struct PrefixIndex {
    blocks: HashSet<u64>,
}

impl PrefixIndex {
    /// Takes what an engine told.
    pub fn apply(&mut self, update: &PrefixUpdate) {
        if update.reset {
            self.blocks.clear();
        }
        for hash in &update.removed {
            self.blocks.remove(hash);
        }
        let room = BLOCKS_MAX - self.blocks.len();
        self.blocks.extend(update.stored.iter().take(room));
    }

    /// How many blocks of a prompt are there, from its beginning without a gap.
    pub fn matched(&self, prompt: &PromptBlocks) -> usize {
        prompt.hashes.iter().take_while(|hash| self.blocks.contains(hash)).count()
    }

    /// Blocks noted.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether none is noted.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }
}

/// The block hashes of one prompt under one numerics id and block size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PromptBlocks {
    hashes: Vec<u64>,
}

impl PromptBlocks {
    /// The hashes, in order.
    pub fn hashes(&self) -> &[u64] {
        &self.hashes
    }

    /// Hashes a request's prompt as an engine of this numerics id and block size does.
    pub fn of(request: &GenerateRequest, numerics_id: &str, block_size: usize) -> Self {
        let block_size = block_size.max(1);
        let tokens = &request.prompt_tokens[..request.prompt_tokens.len().min(LOOKUP_BLOCKS_MAX.saturating_mul(block_size))];
        let root = PrefixHasher::root(&request.tenant.0, numerics_id);
        PromptBlocks { hashes: PrefixHasher::chain(&root, tokens, block_size).iter().map(|hash| hash.short()).collect() }
    }
}

#[cfg(test)]
mod tests {
    use forge_shared::generate::{Choice, SamplingParams, TenantSalt};
    use forge_shared::ids::RequestId;

    use super::*;

    fn request(tokens: std::ops::Range<u32>) -> GenerateRequest {
        GenerateRequest {
            id: RequestId::from("r"),
            tenant: TenantSalt::anonymous(),
            prompt_tokens: tokens.collect(),
            choices: vec![Choice { index: 0, emitted_tokens: Vec::new() }],
            seed: 0,
            params: SamplingParams::default(),
            priority: 0,
        }
    }

    #[test]
    fn a_prefix_is_found_up_to_the_first_missing_block() {
        let prompt = PromptBlocks::of(&request(0..70), "n", 16);
        assert_eq!(prompt.hashes.len(), 4, "the remainder has no hash");
        let mut index = PrefixIndex::default();
        index.apply(&PrefixUpdate { reset: true, stored: prompt.hashes.clone(), removed: vec![] });
        assert_eq!(index.matched(&prompt), 4);
        assert_eq!(index.matched(&PromptBlocks::of(&request(0..40), "n", 16)), 2);
        assert_eq!(index.matched(&PromptBlocks::of(&request(0..40), "other numerics", 16)), 0);
        assert_eq!(index.matched(&PromptBlocks::of(&request(1..40), "n", 16)), 0);
        index.apply(&PrefixUpdate { reset: false, stored: vec![], removed: vec![prompt.hashes[1]] });
        assert_eq!(index.matched(&prompt), 1);
        index.apply(&PrefixUpdate { reset: true, ..PrefixUpdate::default() });
        assert!(index.is_empty());
    }

    #[test]
    fn what_is_held_is_bounded() {
        let mut index = PrefixIndex::default();
        for round in 0..5u64 {
            let stored = (0..100_000).map(|block| round << 32 | block).collect();
            index.apply(&PrefixUpdate { reset: false, stored, removed: vec![] });
        }
        assert_eq!(index.len(), BLOCKS_MAX);
    }
}
