//! The draws of one step, on two threads where there are enough of them.
//!
//! A draw is a function of its row, its request and its place (see [`Sampler`]), so who computes it and when cannot
//! change it; what follows from the draws is done afterwards, in order, on one thread.

use std::collections::BTreeMap;

use crate::active::Active;
use crate::sampler::{Sampled, Sampler};
use crate::scheduler::{LogitsPurpose, LogitsUse};

/// Below this many draws a second thread costs more than it saves (a draw takes 10 to 25 µs, a thread 30 to 50).
const SECOND_THREAD_DRAWS: usize = 8;

/// What was drawn; `None` where a row is scored, or its request is gone.
pub(crate) type Draw = Option<Result<Sampled, String>>;

/// Scratch memory of both threads.
#[derive(Debug)]
pub(crate) struct Samplers([Sampler; 2]);

impl Samplers {
    pub(crate) fn new(vocab_size: usize) -> Self {
        Samplers([Sampler::new(vocab_size), Sampler::new(vocab_size)])
    }

    /// For rows that are scored, not drawn from.
    pub(crate) fn first(&mut self) -> &mut Sampler {
        &mut self.0[0]
    }

    /// Draws for every use in turn. `logits` is [rows, vocabulary]; rows are changed on the way and restored.
    pub(crate) fn draw(
        &mut self,
        uses: &[LogitsUse],
        logits: &mut [f32],
        vocab_size: usize,
        requests: &BTreeMap<u64, Active>,
    ) -> Vec<Draw> {
        let [first, second] = &mut self.0;
        let middle = match uses.is_sorted_by_key(|used| used.row) && uses.len() >= SECOND_THREAD_DRAWS {
            // Uses of one row stay together: a row belongs to one thread.
            true => uses.partition_point(|used| used.row < uses[uses.len() / 2].row),
            false => 0,
        };
        if middle == 0 {
            return Rows { logits, first_row: 0, vocab_size }.draw(first, uses, requests);
        }
        let (left, right) = uses.split_at(middle);
        let first_row = right[0].row;
        let (left_logits, right_logits) = logits.split_at_mut(first_row * vocab_size);
        std::thread::scope(|scope| {
            let rows = Rows { logits: right_logits, first_row, vocab_size };
            let handle = scope.spawn(move || rows.draw(second, right, requests));
            let mut draws = Rows { logits: left_logits, first_row: 0, vocab_size }.draw(first, left, requests);
            match handle.join() {
                Ok(more) => draws.extend(more),
                Err(panic) => std::panic::resume_unwind(panic),
            }
            draws
        })
    }
}

/// A run of the step's rows of logits.
struct Rows<'a> {
    /// [rows, vocabulary].
    logits: &'a mut [f32],
    /// Which row of the step comes first.
    first_row: usize,
    vocab_size: usize,
}

impl Rows<'_> {
    fn draw(self, sampler: &mut Sampler, uses: &[LogitsUse], requests: &BTreeMap<u64, Active>) -> Vec<Draw> {
        let Rows { logits, first_row, vocab_size } = self;
        let draw = |used: &LogitsUse| {
            let LogitsPurpose::Sample = used.purpose else { return None };
            let start = (used.row - first_row) * vocab_size;
            let row = &mut logits[start..start + vocab_size];
            requests.get(&used.id.arrival).map(|active| active.draw(sampler, row, used.id))
        };
        uses.iter().map(draw).collect()
    }
}
