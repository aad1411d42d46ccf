//! One answer being computed: its tokens, how far its KV reaches, and what its rows are for.
//!
//! There is no prefill or decode state: `computed` chases `target`, and the prompt, replayed tokens and sampled
//! tokens are all just tokens.

use std::cmp::Reverse;
use std::sync::Arc;

use forge_text::{PrefixHash, PrefixHasher};

use crate::blocks::BlockTable;

/// Names a sequence; its order is the scheduling order: higher priority, then those that go on, then earlier arrival, then
/// choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId {
    /// Larger runs first.
    pub priority: Reverse<i32>,
    /// Whether its request begins here. One that another engine began has a client who reads it already.
    pub is_fresh: bool,
    /// Number of the request it belongs to, in order of arrival.
    pub arrival: u64,
    /// Which of the request's answers, by place in its list.
    pub choice: u32,
}

/// Where a sequence stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Holds no blocks.
    Waiting,
    /// Has a seat in the batch and holds blocks.
    Running,
    /// Waits until another answer of its request has computed the prompt; holds nothing.
    Unforked,
}

#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) state: State,
    pub(super) prompt: Arc<[u32]>,
    pub(super) answer: Vec<u32>,
    /// Tokens whose KV is stored.
    pub(super) computed: usize,
    pub(super) table: BlockTable,
    /// Answers that fork from this one when the prompt is computed.
    pub(super) forks: Vec<SequenceId>,
    /// Prompt tokens are scored and this many of them are; `None` if they are not.
    pub(super) scored: Option<usize>,
    /// Whether tokens are sampled at all; else only the prompt is scored.
    pub(super) generates: bool,
    /// Whether it ever ran.
    pub(super) started: bool,
    /// Full blocks made known to the prefix cache, or taken from it.
    pub(super) registered: usize,
    root: PrefixHash,
    hashes: Vec<PrefixHash>,
}

impl Sequence {
    pub(super) fn new(prompt: Arc<[u32]>, answer: Vec<u32>, root: PrefixHash, scores_prompt: bool, generates: bool) -> Self {
        Sequence {
            state: State::Waiting,
            prompt,
            answer,
            computed: 0,
            table: BlockTable::default(),
            forks: Vec::new(),
            scored: scores_prompt.then_some(0),
            generates,
            started: false,
            registered: 0,
            root,
            hashes: Vec::new(),
        }
    }

    /// All tokens known: prompt and answer.
    pub(super) fn len(&self) -> usize {
        self.prompt.len() + self.answer.len()
    }

    pub(super) fn token(&self, position: usize) -> u32 {
        match position.checked_sub(self.prompt.len()) {
            None => self.prompt[position],
            Some(index) => self.answer[index],
        }
    }

    /// Tokens to compute before something else is to be decided: the prompt, if answers fork from it; all
    /// known tokens, so that the next can be sampled; all but the last, if the prompt is only scored.
    pub(super) fn target(&self) -> usize {
        match (self.forks.is_empty(), self.generates) {
            (_, false) => self.prompt.len() - 1,
            (false, true) => self.prompt.len(),
            (true, true) => self.len(),
        }
    }

    pub(super) fn pending(&self) -> usize {
        self.target() - self.computed
    }

    /// Of the next `rows` rows, those whose logits score a prompt token, as positions.
    pub(super) fn scoring_rows(&self, rows: usize) -> std::ops::Range<usize> {
        let end = (self.computed + rows).min(self.prompt.len() - 1);
        match self.scored {
            Some(scored) if scored.max(self.computed) < end => scored.max(self.computed)..end,
            _ => 0..0,
        }
    }

    /// Logits that the next `rows` rows need.
    pub(super) fn logits_for(&self, rows: usize) -> usize {
        self.scoring_rows(rows).len() + usize::from(self.generates && rows == self.pending())
    }

    /// Blocks of a cached prefix that may be used: the row whose logits are wanted next must be computed.
    pub(super) fn reusable_blocks(&self, block_size: usize) -> usize {
        let last = self.target().saturating_sub(1);
        self.scored.filter(|&scored| scored + 1 < self.prompt.len()).map_or(last, |scored| last.min(scored)) / block_size
    }

    /// Hashes of the first `count` blocks, all of which must be full.
    pub(super) fn hashes(&mut self, count: usize, block_size: usize) -> &[PrefixHash] {
        while self.hashes.len() < count {
            let start = self.hashes.len() * block_size;
            let parent = self.hashes.last().unwrap_or(&self.root);
            let hash = if start + block_size <= self.prompt.len() {
                PrefixHasher::next(parent, &self.prompt[start..start + block_size])
            } else {
                let tokens: Vec<u32> = (start..start + block_size).map(|position| self.token(position)).collect();
                PrefixHasher::next(parent, &tokens)
            };
            self.hashes.push(hash);
        }
        &self.hashes[..count]
    }

    /// Begins to run from a fork of another answer's prompt.
    pub(super) fn fork_from(&mut self, table: BlockTable, parent_registered: usize, block_size: usize) {
        self.table = table;
        self.computed = self.prompt.len();
        self.registered = parent_registered.min(self.prompt.len() / block_size);
        self.state = State::Running;
    }
}
