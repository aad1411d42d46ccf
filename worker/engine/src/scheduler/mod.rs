//! `Scheduler`: which tokens of which sequences the next step computes.
//!
//! One loop, no phases. Sequences are visited in order (priority, those that another engine began, arrival, choice). Each takes rows towards its
//! target from the step's budget, but leaves one row for every running sequence behind it, so a long prompt
//! never starves an answer. When blocks run out, the last in order is put back to wait and will be
//! recomputed; since it is last, nobody planned in this step ever loses its blocks. A waiting sequence starts
//! when a seat and the blocks of all its known tokens are free, strictly in order, and takes them from
//! sequences of lower priority if need be.
//!
//! Where the model's stages can work at once, several steps are under way ([`Scheduler::allow_under_way`]): each takes its
//! part of the sequences, and those of a step that has not come back are left alone, neither planned nor preempted. The
//! model runs steps in order, so a block that is given on is written by its new owner after its old one.
//!
//! What it is not: it has no clock, no channel and no logits; it does not know why a sequence ends.
//!
//! Invariants: the first running sequence that is not under way gets on in every step, so among equals in priority every
//! admitted one finishes (a lower priority waits for as long as higher ones keep coming); at most `max_batch_size`
//! sequences hold blocks; a step touches blocks of running sequences only; what a sequence computes is a function of its own tokens
//! (which blocks hold them is not visible to it).

mod plan;
mod sequence;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use forge_text::PrefixHash;

use crate::blocks::BlockManager;
pub use plan::{LogitsPurpose, LogitsUse};
pub use sequence::SequenceId;
use sequence::{Sequence, State};

/// What bounds a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SchedulerLimits {
    /// Most rows of a step.
    pub max_step_rows: usize,
    /// Most rows of logits of a step.
    pub max_logits_rows: usize,
    /// Most sequences that hold blocks; at most `max_step_rows` and `max_logits_rows`.
    pub max_batch_size: usize,
    /// Most rows of one sequence in a step.
    pub max_chunk_rows: usize,
    /// Whether full blocks are shared between requests.
    pub prefix_caching: bool,
}

/// A request as the scheduler sees it.
#[derive(Debug, Clone)]
pub struct NewRequest {
    /// Larger runs first.
    pub priority: i32,
    /// Never empty.
    pub prompt: Arc<[u32]>,
    /// Per answer the tokens it has already; never empty.
    pub answers: Vec<Vec<u32>>,
    /// Root of its prefix hashes: tenant and numerics id.
    pub root: PrefixHash,
    /// Whether logits of the prompt's rows are wanted.
    pub scores_prompt: bool,
    /// Whether anything is sampled; if not, the prompt has at least two tokens and there is one answer.
    pub generates: bool,
}

/// Counts since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SchedulerCounts {
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_queries: u64,
    /// Prompt tokens found there.
    pub prefix_hits: u64,
    /// Sequences put back to wait.
    pub preemptions: u64,
}

/// A request that began to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Started {
    /// Its number.
    pub arrival: u64,
    /// Prompt tokens whose KV was cached.
    pub cached_tokens: usize,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Scheduler {
    limits: SchedulerLimits,
    blocks: BlockManager,
    sequences: BTreeMap<SequenceId, Sequence>,
    running: BTreeSet<SequenceId>,
    waiting: BTreeSet<SequenceId>,
    /// Requests that are not to run for the moment: their client does not take what they have.
    stalled: BTreeSet<u64>,
    arrivals: u64,
    /// Who is in the step that is being planned.
    planned: Vec<plan::Planned>,
    /// Steps that were planned and have not come back, oldest first.
    steps: VecDeque<Vec<plan::Planned>>,
    /// Who is in them.
    under_way: BTreeSet<SequenceId>,
    /// Most of them.
    max_under_way: usize,
    started: Vec<Started>,
    counts: SchedulerCounts,
}

impl Scheduler {
    /// A scheduler without sequences over an unused block manager.
    pub fn new(limits: SchedulerLimits, blocks: BlockManager) -> Self {
        debug_assert!(limits.max_batch_size <= limits.max_step_rows && limits.max_batch_size <= limits.max_logits_rows);
        Scheduler {
            limits,
            blocks,
            sequences: BTreeMap::new(),
            running: BTreeSet::new(),
            waiting: BTreeSet::new(),
            stalled: BTreeSet::new(),
            arrivals: 0,
            planned: Vec::new(),
            steps: VecDeque::new(),
            under_way: BTreeSet::new(),
            max_under_way: 1,
            started: Vec::new(),
            counts: SchedulerCounts::default(),
        }
    }

    /// Lets so many steps be under way at once, 1 until then.
    pub fn allow_under_way(&mut self, steps: usize) {
        self.max_under_way = steps.max(1);
    }

    /// Steps that were planned and have not come back.
    pub fn under_way(&self) -> usize {
        self.steps.len()
    }

    /// Takes a request; its sequences wait, those of one that goes on (some of its answer is there) before all that begin.
    /// Ids are in the order of `answers`.
    pub fn submit(&mut self, request: NewRequest) -> Vec<SequenceId> {
        let arrival = self.arrivals;
        self.arrivals += 1;
        let is_fresh = request.answers.iter().all(Vec::is_empty);
        let ids: Vec<SequenceId> = (0..request.answers.len() as u32)
            .map(|choice| SequenceId { priority: std::cmp::Reverse(request.priority), is_fresh, arrival, choice })
            .collect();
        for (&id, answer) in ids.iter().zip(request.answers) {
            let first = id.choice == 0;
            let scores = request.scores_prompt && first;
            let mut sequence = Sequence::new(request.prompt.clone(), answer, request.root, scores, request.generates);
            if first {
                sequence.forks = ids[1..].to_vec();
                self.waiting.insert(id);
            } else {
                sequence.state = State::Unforked;
            }
            self.sequences.insert(id, sequence);
        }
        ids
    }

    /// Adds a sampled token.
    pub fn append(&mut self, id: SequenceId, token: u32) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.answer.push(token);
        }
    }

    /// Ends a sequence and frees its blocks; full ones stay known to the prefix cache. Ending one from which
    /// others are still to fork ends the request: the caller removes those too.
    pub fn remove(&mut self, id: SequenceId) {
        if let Some(mut sequence) = self.sequences.remove(&id) {
            self.blocks.release(&mut sequence.table);
            self.running.remove(&id);
            self.waiting.remove(&id);
        }
    }

    /// Says whether a request's sequences may run.
    pub fn set_stalled(&mut self, arrival: u64, stalled: bool) {
        if stalled {
            self.stalled.insert(arrival);
        } else {
            self.stalled.remove(&arrival);
        }
    }

    /// Sequences that hold blocks.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Sequences that wait to run or to run again, those that will fork from another left out.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Requests that never ran.
    pub fn queued_requests(&self) -> usize {
        self.waiting.iter().filter(|id| !self.sequences[id].started).count()
    }

    /// Whether there is no sequence at all.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// The block manager, for its counts.
    pub fn blocks(&self) -> &BlockManager {
        &self.blocks
    }

    /// The block manager, for those who are told of its changes.
    pub(crate) fn blocks_mut(&mut self) -> &mut BlockManager {
        &mut self.blocks
    }

    /// Counts since the start.
    pub fn counts(&self) -> SchedulerCounts {
        self.counts
    }

    /// Requests that began to run since the last call.
    pub fn take_started(&mut self) -> Vec<Started> {
        std::mem::take(&mut self.started)
    }

    /// Checks the invariants of scheduler and block manager. For tests.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self) -> Result<(), String> {
        self.blocks.check(self.sequences.values().map(|sequence| &sequence.table))?;
        if self.running.len() > self.limits.max_batch_size {
            return Err(format!("{} sequences run", self.running.len()));
        }
        for (id, sequence) in &self.sequences {
            let (running, waiting) = (self.running.contains(id), self.waiting.contains(id));
            let expected = match sequence.state {
                State::Running => (true, false),
                State::Waiting => (false, true),
                State::Unforked => (false, false),
            };
            if (running, waiting) != expected {
                return Err(format!("{id:?} is {:?} and in the wrong queue", sequence.state));
            }
            if sequence.state != State::Running && (!sequence.table.is_empty() || sequence.computed != 0) {
                return Err(format!("{id:?} does not run and holds blocks"));
            }
            if self.under_way.contains(id) && sequence.state != State::Running {
                return Err(format!("{id:?} is under way and {:?}", sequence.state));
            }
            if sequence.computed > sequence.len() {
                return Err(format!("{id:?} computed {} of {} tokens", sequence.computed, sequence.len()));
            }
        }
        Ok(())
    }

    /// Puts a running sequence back to wait. Its tokens stay, its blocks go; the prefix cache may keep them.
    fn preempt(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        self.blocks.release(&mut sequence.table);
        sequence.computed = 0;
        sequence.registered = 0;
        sequence.state = State::Waiting;
        self.running.remove(&id);
        self.waiting.insert(id);
        self.counts.preemptions += 1;
    }

    fn is_stalled(&self, id: &SequenceId) -> bool {
        self.stalled.contains(&id.arrival)
    }

    /// Who gives up its blocks for `requester`: a stalled sequence if there is one, else the last in order; never one that
    /// is under way. A running requester may be its own victim; a waiting one only takes from lower priority.
    fn victim(&self, requester: SequenceId, requester_runs: bool) -> Option<SequenceId> {
        let is_free = |id: &&SequenceId| !self.under_way.contains(id);
        let stalled = self.running.iter().rev().filter(is_free).find(|id| self.is_stalled(id)).copied();
        stalled.or_else(|| {
            // While the last is under way nobody gives way in its stead: its step comes back soon.
            let last = *self.running.last().filter(is_free)?;
            let allowed = if requester_runs { last >= requester } else { last.priority > requester.priority };
            allowed.then_some(last)
        })
    }
}
