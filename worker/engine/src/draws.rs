//! The draws of one step, on a few threads where there are enough of them.
//!
//! A draw is a function of its row, its request and its place (see [`Sampler`]), so who computes it and when cannot
//! change it; what follows from the draws is done afterwards, in order, on one thread.

use std::collections::BTreeMap;

use forge_kernels::ThreadPool;
use parking_lot::Mutex;

use crate::active::Active;
use crate::sampler::{Sampled, Sampler};
use crate::scheduler::{LogitsPurpose, LogitsUse};

/// Rows of one task: enough that handing it out (1 µs) costs nothing beside its draws (5 to 15 µs each), and few
/// enough that a helper which wakes up late still finds work.
const TASK_ROWS: usize = 2;
/// More threads than this would wait for memory.
const MAX_THREADS: usize = 4;

/// What was drawn; `None` where a row is scored, or its request is gone.
pub(crate) type Draw = Option<Result<Sampled, String>>;

/// The threads that draw, and their scratch memory.
pub(crate) struct Samplers {
    /// Helpers that sleep between steps. A panic of theirs becomes the caller's; dropping the pool joins them.
    pool: ThreadPool,
    /// One per thread; a task borrows any.
    free: Mutex<Vec<Sampler>>,
    /// For rows that are scored, not drawn from.
    scoring: Sampler,
}

impl std::fmt::Debug for Samplers {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Samplers").field("threads", &self.pool.threads()).finish_non_exhaustive()
    }
}

impl Samplers {
    /// As many threads as help on this machine.
    pub(crate) fn threads() -> usize {
        std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS)
    }

    /// On so many threads, the caller's included.
    ///
    /// # Errors
    /// The system's, where it gives no thread.
    pub(crate) fn new(vocab_size: usize, threads: usize) -> std::io::Result<Self> {
        let pool = ThreadPool::new(threads)?;
        let free = (0..pool.threads()).map(|_| Sampler::new(vocab_size)).collect();
        Ok(Samplers { pool, free: Mutex::new(free), scoring: Sampler::new(vocab_size) })
    }

    /// For rows that are scored.
    pub(crate) fn scoring(&mut self) -> &mut Sampler {
        &mut self.scoring
    }

    /// Draws for every use in turn. `uses` are in the order of rows; `logits` is [rows, vocabulary], whose rows are
    /// changed on the way and restored.
    pub(crate) fn draw(&self, uses: &[LogitsUse], logits: &mut [f32], vocab_size: usize, requests: &BTreeMap<u64, Active>) -> Vec<Draw> {
        debug_assert!(uses.is_sorted_by_key(|used| used.row));
        let mut draws: Vec<Draw> = vec![None; uses.len()];
        let tasks: Vec<Mutex<Task<'_>>> = split(uses, logits, vocab_size, &mut draws).into_iter().map(Mutex::new).collect();
        self.pool.run(tasks.len(), |index| {
            // No more threads than samplers; one that is lost to a panic is replaced.
            let mut sampler = self.free.lock().pop().unwrap_or_else(|| Sampler::new(vocab_size));
            tasks[index].lock().draw(&mut sampler, vocab_size, requests);
            self.free.lock().push(sampler);
        });
        drop(tasks);
        draws
    }
}

/// Some rows of the step that follow each other, and what is drawn from them.
struct Task<'a> {
    uses: &'a [LogitsUse],
    /// Which row of the step `logits` begins with.
    first_row: usize,
    /// [rows, vocabulary].
    logits: &'a mut [f32],
    draws: &'a mut [Draw],
}

/// Cuts the step into tasks of [`TASK_ROWS`]. Uses of one row stay together: a row belongs to one thread.
fn split<'a>(mut uses: &'a [LogitsUse], mut logits: &'a mut [f32], vocab_size: usize, mut draws: &'a mut [Draw]) -> Vec<Task<'a>> {
    let mut tasks = Vec::with_capacity(uses.len().div_ceil(TASK_ROWS));
    let mut row = 0;
    while let Some(first) = uses.first() {
        let count = uses.partition_point(|used| used.row < first.row + TASK_ROWS);
        let (now, later) = uses.split_at(count);
        let (_, from_first) = logits.split_at_mut((first.row - row) * vocab_size);
        let end = now[count - 1].row + 1;
        let (rows, rest) = from_first.split_at_mut((end - first.row) * vocab_size);
        let (drawn, undrawn) = draws.split_at_mut(count);
        tasks.push(Task { uses: now, first_row: first.row, logits: rows, draws: drawn });
        (uses, logits, draws, row) = (later, rest, undrawn, end);
    }
    tasks
}

impl Task<'_> {
    fn draw(&mut self, sampler: &mut Sampler, vocab_size: usize, requests: &BTreeMap<u64, Active>) {
        for (used, draw) in self.uses.iter().zip(self.draws.iter_mut()) {
            let LogitsPurpose::Sample = used.purpose else { continue };
            let start = (used.row - self.first_row) * vocab_size;
            let row = &mut self.logits[start..start + vocab_size];
            *draw = requests.get(&used.id.arrival).map(|active| active.draw(sampler, row, used.id));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cmp::Reverse;

    use crate::scheduler::SequenceId;

    fn uses(rows: &[usize]) -> Vec<LogitsUse> {
        let used = |(place, &row): (usize, &usize)| LogitsUse {
            row,
            id: SequenceId { priority: Reverse(0), is_fresh: true, arrival: place as u64, choice: 0 },
            purpose: LogitsPurpose::Sample,
        };
        rows.iter().enumerate().map(used).collect()
    }

    #[test]
    fn every_use_is_in_one_task_with_its_row() {
        let vocab_size = 3;
        for rows in [&[][..], &[0], &[0, 0, 0], &[0, 1, 2, 3, 4], &[1, 1, 2, 5, 5, 5, 6, 9], &[7]] {
            let uses = uses(rows);
            let mut logits: Vec<f32> = (0..10 * vocab_size).map(|i| (i / vocab_size) as f32).collect();
            let mut draws: Vec<Draw> = vec![None; uses.len()];
            let tasks = split(&uses, &mut logits, vocab_size, &mut draws);
            let seen: Vec<LogitsUse> = tasks.iter().flat_map(|task| task.uses).copied().collect();
            assert_eq!(seen, uses);
            for task in &tasks {
                assert_eq!(task.draws.len(), task.uses.len());
                for used in task.uses {
                    assert_eq!(task.logits[(used.row - task.first_row) * vocab_size], used.row as f32);
                }
            }
        }
    }
}
