//! The loop that makes a step plan, and what becomes of it when the step has run.

use forge_kernels::SequenceSlice;
use forge_model::StepPlan;

use super::sequence::State;
use super::{Scheduler, SequenceId, Started};

/// What a row of logits is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogitsPurpose {
    /// Score the prompt's token at this position (the one after the row's own).
    Score {
        /// Position of the token that is scored.
        position: usize,
    },
    /// Sample the next token.
    Sample,
}

/// One use of a row of logits; answers that share a prompt use its last row together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogitsUse {
    /// Row of the step's logits.
    pub row: usize,
    /// For whom.
    pub id: SequenceId,
    /// What for.
    pub purpose: LogitsPurpose,
}

/// A sequence's part in the step that is being computed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Planned {
    id: SequenceId,
    rows: usize,
    /// Rows of logits.
    logits: usize,
}

#[cfg(test)]
impl Planned {
    pub(super) fn id(&self) -> SequenceId {
        self.id
    }
}

/// What is left of the step.
struct Budget {
    rows: usize,
    logits: usize,
}

/// Who comes after a sequence in this step.
#[derive(Clone, Copy)]
struct Behind {
    /// Running sequences; each is sure of one row and one row of logits.
    running: usize,
    /// Whether one of them, or one that could start, wants more than one row.
    contended: bool,
}

impl Scheduler {
    /// Makes the next step. Returns whether there is anything to compute; if so [`Self::complete`] must follow
    /// once the model has run it, and the steps before it. `plan.epoch` and `plan.step` are left alone.
    pub fn plan(&mut self, plan: &mut StepPlan) -> bool {
        clear(plan);
        self.planned.clear();
        if self.steps.len() >= self.max_under_way {
            return false;
        }
        let most = self.part();
        let mut budget = Budget { rows: self.limits.max_step_rows, logits: self.limits.max_logits_rows };
        let free = self.running.iter().filter(|id| !self.is_stalled(id) && !self.under_way.contains(id));
        let running: Vec<SequenceId> = free.take(most).copied().collect();
        let mut next_running = running.iter().copied().peekable();
        let mut behind = running.len();
        let mut prefills = running.iter().filter(|id| self.sequences[id].pending() > 1).count();
        let mut may_start = true;
        while self.planned.len() < most {
            let waiting = if may_start { self.first_waiting() } else { None };
            let visit_waiting = match (waiting, next_running.peek()) {
                (None, None) => break,
                (Some(waiting), Some(&running)) => waiting < running,
                (waiting, None) => waiting.is_some(),
                (None, Some(_)) => false,
            };
            let preemptions = self.counts.preemptions;
            if let (true, Some(id)) = (visit_waiting, waiting) {
                may_start = budget.rows > behind && budget.logits > behind && self.start(id);
                if may_start {
                    let contended = prefills > 0 || self.could_start();
                    self.place(id, &mut budget, Behind { running: behind, contended }, plan);
                }
            } else if let Some(id) = next_running.next() {
                behind -= 1;
                if self.running.contains(&id) {
                    prefills -= usize::from(self.sequences[&id].pending() > 1);
                    let contended = prefills > 0 || (may_start && self.could_start());
                    self.place(id, &mut budget, Behind { running: behind, contended }, plan);
                }
            }
            // Who was just preempted must not start again in the same step.
            may_start &= preemptions == self.counts.preemptions;
        }
        if self.planned.is_empty() {
            return false;
        }
        let step = std::mem::take(&mut self.planned);
        self.under_way.extend(step.iter().map(|planned| planned.id));
        self.steps.push_back(step);
        true
    }

    /// Most sequences of a step: all of them where one step is under way at a time, else an equal part for each.
    fn part(&self) -> usize {
        if self.max_under_way == 1 {
            return usize::MAX;
        }
        let running = self.running.iter().filter(|id| !self.is_stalled(id)).count();
        let waiting = self.waiting.iter().filter(|id| !self.is_stalled(id)).count();
        (running + waiting).min(self.limits.max_batch_size).div_ceil(self.max_under_way).max(1)
    }

    fn first_waiting(&self) -> Option<SequenceId> {
        self.waiting.iter().find(|id| !self.is_stalled(id)).copied()
    }

    fn could_start(&self) -> bool {
        self.running.len() < self.limits.max_batch_size && self.first_waiting().is_some()
    }

    /// Gives a waiting sequence a seat and blocks for all its known tokens, taking over a cached prefix.
    fn start(&mut self, id: SequenceId) -> bool {
        if self.running.len() >= self.limits.max_batch_size {
            let Some(victim) = self.victim(id, false) else { return false };
            self.preempt(victim);
        }
        loop {
            // Blocks left for those who run to grow into, so that starting one does not evict another at once.
            let active = self.running.iter().filter(|other| !self.is_stalled(other)).count();
            let guard = if active == 0 { 0 } else { active.max(self.blocks.total() / 100) };
            let Some(sequence) = self.sequences.get_mut(&id) else { return false };
            let block_size = self.blocks.block_size();
            let limit = if self.limits.prefix_caching { sequence.reusable_blocks(block_size) } else { 0 };
            let slots = sequence.target();
            let hashes = sequence.hashes(limit, block_size);
            let prefix = self.blocks.lookup(hashes);
            let needed = self.blocks.blocks_for(slots) - prefix.blocks + prefix.unheld;
            if needed + guard <= self.blocks.available() {
                let hashes = hashes[..prefix.blocks].to_vec();
                let first_start = !sequence.started;
                if self.blocks.start(&mut sequence.table, &hashes, slots).is_err() {
                    return false;
                }
                sequence.computed = prefix.blocks * block_size;
                sequence.registered = prefix.blocks;
                sequence.state = State::Running;
                sequence.started = true;
                let prompt_len = sequence.prompt.len();
                self.waiting.remove(&id);
                self.running.insert(id);
                if first_start {
                    self.count_start(id, prompt_len, (prefix.blocks * block_size).min(prompt_len));
                }
                return true;
            }
            let Some(victim) = self.victim(id, false) else { return false };
            self.preempt(victim);
        }
    }

    fn count_start(&mut self, id: SequenceId, prompt_tokens: usize, cached_tokens: usize) {
        if self.limits.prefix_caching {
            self.counts.prefix_queries += prompt_tokens as u64;
            self.counts.prefix_hits += cached_tokens as u64;
        }
        self.started.push(Started { arrival: id.arrival, cached_tokens });
    }

    /// Gives a running sequence as many rows as it wants and the budget allows, and blocks for them. A quarter of
    /// what is left stays for those behind who compute a prompt too, so that a short one overtakes a long one.
    fn place(&mut self, id: SequenceId, budget: &mut Budget, behind: Behind, plan: &mut StepPlan) {
        let sequence = &self.sequences[&id];
        let share = |left: usize| {
            let available = left - behind.running;
            if behind.contended && available > 1 { available - (available / 4).max(1) } else { available }
        };
        let mut rows = sequence.pending().min(self.limits.max_chunk_rows).min(share(budget.rows));
        let logits = share(budget.logits);
        while sequence.logits_for(rows) > logits {
            rows -= 1;
        }
        if rows == 0 || !self.make_room(id, rows, plan) {
            return;
        }
        let sequence = &self.sequences[&id];
        budget.rows -= rows;
        let logits = sequence.logits_for(rows);
        budget.logits -= logits;
        let block_size = self.blocks.block_size();
        let (first, end) = (sequence.computed, sequence.computed + rows);
        let row_start = plan.tokens.len() as u32;
        let blocks = &sequence.table.blocks()[..self.blocks.blocks_for(end)];
        plan.sequences.push(SequenceSlice {
            row_start,
            row_count: rows as u32,
            first_position: first as u32,
            table_start: plan.block_tables.len() as u32,
            table_len: blocks.len() as u32,
        });
        plan.block_tables.extend_from_slice(blocks);
        for position in first..end {
            plan.tokens.push(sequence.token(position));
            plan.positions.push(position as u32);
            plan.slots.push(sequence.table.slot(position, block_size));
        }
        plan.logits_rows.extend(sequence.scoring_rows(rows).map(|position| row_start + (position - first) as u32));
        if sequence.generates && rows == sequence.pending() {
            plan.logits_rows.push(row_start + rows as u32 - 1);
        }
        self.planned.push(Planned { id, rows, logits });
    }

    /// Makes the next `rows` slots of a running sequence writable, preempting from the end of the order.
    /// Returns false if the sequence itself was the last.
    fn make_room(&mut self, id: SequenceId, rows: usize, plan: &mut StepPlan) -> bool {
        loop {
            let Some(sequence) = self.sequences.get_mut(&id) else { return false };
            if let Ok(copies) = self.blocks.reserve(&mut sequence.table, sequence.computed, sequence.computed + rows) {
                plan.block_copies.extend(copies);
                return true;
            }
            let Some(victim) = self.victim(id, true) else { return false };
            self.preempt(victim);
            if victim == id {
                return false;
            }
        }
    }

    /// Takes note that the oldest planned step has run and says what its logits are for, in the order of rows. Answers
    /// that waited for a prompt fork from it here.
    pub fn complete(&mut self) -> Vec<LogitsUse> {
        let mut uses = Vec::new();
        let step = self.steps.pop_front().unwrap_or_default();
        for planned in &step {
            self.under_way.remove(&planned.id);
        }
        let mut next_row = 0;
        for Planned { id, rows, logits } in step {
            let mut row = next_row;
            next_row += logits;
            // Who ended meanwhile has no use for its rows.
            let Some(sequence) = self.sequences.get_mut(&id) else { continue };
            for position in sequence.scoring_rows(rows) {
                uses.push(LogitsUse { row, id, purpose: LogitsPurpose::Score { position: position + 1 } });
                sequence.scored = Some(position + 1);
                row += 1;
            }
            let reached = rows == sequence.pending();
            sequence.computed += rows;
            self.register(id);
            let sequence = &self.sequences[&id];
            if !(reached && sequence.generates) {
                continue;
            }
            if sequence.forks.is_empty() {
                uses.push(LogitsUse { row, id, purpose: LogitsPurpose::Sample });
            } else {
                let samplers = self.fork(id);
                uses.extend(samplers.into_iter().map(|id| LogitsUse { row, id, purpose: LogitsPurpose::Sample }));
            }
        }
        uses
    }

    /// Makes newly filled blocks known to the prefix cache.
    fn register(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        let block_size = self.blocks.block_size();
        let full = sequence.computed / block_size;
        if !self.limits.prefix_caching || full <= sequence.registered {
            return;
        }
        let registered = sequence.registered;
        sequence.registered = full;
        let hashes = sequence.hashes(full, block_size)[registered..].to_vec();
        for (offset, hash) in hashes.into_iter().enumerate() {
            self.blocks.register(&sequence.table, registered + offset, hash);
        }
    }

    /// Lets the waiting answers share the prompt that `id` has computed. Those without a seat wait. Returns
    /// who samples its first token from the prompt's last row.
    fn fork(&mut self, id: SequenceId) -> Vec<SequenceId> {
        let Some(parent) = self.sequences.get_mut(&id) else { return Vec::new() };
        let forks = std::mem::take(&mut parent.forks);
        let (prompt_len, registered) = (parent.prompt.len(), parent.registered);
        let block_size = self.blocks.block_size();
        for &fork in &forks {
            let seat = self.running.len() < self.limits.max_batch_size;
            let table = seat.then(|| self.blocks.fork(&self.sequences[&id].table, prompt_len));
            let Some(sequence) = self.sequences.get_mut(&fork) else { continue };
            sequence.started = true;
            match table {
                Some(table) => {
                    sequence.fork_from(table, registered, block_size);
                    self.running.insert(fork);
                }
                None => {
                    sequence.state = State::Waiting;
                    self.waiting.insert(fork);
                }
            }
        }
        let empty = |id: &SequenceId| self.sequences.get(id).is_some_and(|sequence| sequence.answer.is_empty());
        std::iter::once(id).chain(forks).filter(empty).collect()
    }
}

fn clear(plan: &mut StepPlan) {
    plan.tokens.clear();
    plan.positions.clear();
    plan.slots.clear();
    plan.sequences.clear();
    plan.block_tables.clear();
    plan.logits_rows.clear();
    plan.block_copies.clear();
}
