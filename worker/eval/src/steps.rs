//! Driving a model through known text (teacher forcing), a bounded number of logits at a time.

use forge_kernels::SequenceSlice;
use forge_model::{StepModel, StepModelInfo, StepPlan};

use crate::protocol::Window;
use crate::{EvalError, Result};

/// Logits held at a time: 64 MiB of f32.
const LOGITS_MAX: usize = 16 << 20;

/// One step of a window.
pub(crate) struct Step {
    pub(crate) plan: StepPlan,
    /// Tokens of the text that the plan's rows of logits score, by index.
    pub(crate) scored: std::ops::Range<usize>,
}

/// Refuses a window that the model cannot hold.
pub(crate) fn check_fits(info: &StepModelInfo, tokens: usize) -> Result<()> {
    let longest = info.max_model_len.min(info.kv_blocks * info.block_size);
    if tokens > longest {
        let reason = format!("the model was opened for at most {longest} tokens");
        return Err(EvalError::Option { option: "context", value: tokens, reason });
    }
    Ok(())
}

/// The steps of a window: rows in order, as many at a time as the model takes and its logits allow.
pub(crate) fn steps(info: &StepModelInfo, tokens: &[u32], window: &Window) -> Vec<Step> {
    let input = window.input(tokens);
    let first_row = window.first_row();
    let rows_max = (LOGITS_MAX / info.vocab_size.max(1)).clamp(1, info.max_step_rows);
    let chunks = input.chunks(rows_max).enumerate();
    let step = |(index, rows): (usize, &[u32])| {
        let start = index * rows_max;
        let end = start + rows.len();
        let scored_from = first_row.clamp(start, end);
        // Row r scores the token r − first_row after the first scored one.
        let scored = window.scored.start + scored_from.saturating_sub(first_row)..window.scored.start + end.saturating_sub(first_row);
        Step { plan: one_sequence_plan(rows, start, scored_from, info.block_size), scored }
    };
    chunks.map(step).collect()
}

/// A step of one sequence that lies in blocks 0, 1, 2, …, so that slots equal positions. Logits are wanted of
/// position `scored_from` and later.
fn one_sequence_plan(tokens: &[u32], start: usize, scored_from: usize, block_size: usize) -> StepPlan {
    let end = start + tokens.len();
    let positions: Vec<u32> = (start..end).map(|position| position as u32).collect();
    let blocks = end.div_ceil(block_size) as u32;
    StepPlan {
        tokens: tokens.to_vec(),
        slots: positions.clone(),
        sequences: vec![SequenceSlice {
            row_start: 0,
            row_count: tokens.len() as u32,
            first_position: start as u32,
            table_start: 0,
            table_len: blocks,
        }],
        block_tables: (0..blocks).collect(),
        logits_rows: (scored_from - start..tokens.len()).map(|row| row as u32).collect(),
        positions,
        ..StepPlan::default()
    }
}

/// Logits after each of `tokens` from row `first` on: [tokens.len() − first, vocab_size], row-major.
///
/// The tokens form one sequence from position 0 and are computed in chunks of at most `chunk` rows. All rows are
/// returned at once: for short sequences and comparisons.
///
/// # Errors
/// A sequence longer than the model was built for, ids outside the vocabulary, a failed step.
pub fn teacher_forced_logits(model: &mut dyn StepModel, tokens: &[u32], first: usize, chunk: usize) -> Result<Vec<f32>> {
    let info = model.info().clone();
    if chunk == 0 || chunk > info.max_step_rows {
        let reason = format!("must be from 1 to {}", info.max_step_rows);
        return Err(EvalError::Option { option: "chunk", value: chunk, reason });
    }
    check_fits(&info, tokens.len())?;
    let (mut all, mut logits) = (Vec::new(), Vec::new());
    for (index, rows) in tokens.chunks(chunk).enumerate() {
        let start = index * chunk;
        let plan = one_sequence_plan(rows, start, first.clamp(start, start + rows.len()), info.block_size);
        model.step(&plan, &mut logits)?;
        all.extend_from_slice(&logits[..plan.logits_rows.len() * info.vocab_size]);
    }
    Ok(all)
}

/// Applies `function` to every row of logits and the index of the token it scores, on as many threads as the machine
/// has; results in order. Rows do not meet, so threads change nothing.
pub(crate) fn map_rows<T: Send>(step: &Step, vocab_size: usize, logits: &[f32], function: impl Fn(usize, &[f32]) -> T + Sync) -> Vec<T> {
    map_indices(step.scored.len(), |row| function(step.scored.start + row, &logits[row * vocab_size..(row + 1) * vocab_size]))
}

/// `function` of 0 to `count`, on as many threads as the machine has; results in order.
pub(crate) fn map_indices<T: Send>(count: usize, function: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(count.div_ceil(8)).max(1);
    let share = count.div_ceil(threads).max(1);
    let part = |start: usize| (start..(start + share).min(count)).map(&function).collect::<Vec<T>>();
    if threads == 1 {
        return part(0);
    }
    std::thread::scope(|scope| {
        let part = &part;
        let handles: Vec<_> = (0..count).step_by(share).map(|start| scope.spawn(move || part(start))).collect();
        let joined = handles.into_iter().map(|handle| handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        joined.flatten().collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info() -> StepModelInfo {
        StepModelInfo {
            vocab_size: 10,
            max_model_len: 64,
            block_size: 4,
            kv_blocks: 16,
            kv_block_bytes: 1,
            max_step_rows: 3,
            max_logits_rows: 1,
            numerics_id: String::new(),
        }
    }

    #[test]
    fn the_steps_of_a_window_cover_it_and_score_each_token_once() {
        let tokens: Vec<u32> = (0..20).collect();
        let window = Window { prefix: Some(9), range: 4..11, scored: 8..12 };
        let steps = steps(&info(), &tokens, &window);
        let computed: Vec<u32> = steps.iter().flat_map(|step| step.plan.tokens.clone()).collect();
        assert_eq!(computed, [9, 4, 5, 6, 7, 8, 9, 10]);
        let scored: Vec<usize> = steps.iter().flat_map(|step| step.scored.clone()).collect();
        assert_eq!(scored, [8, 9, 10, 11]);
        // The row before token 8 holds token 7: row 4 of the window, row 1 of the second step.
        assert_eq!(steps[1].plan.logits_rows, [1, 2]);
        assert_eq!(steps[1].plan.positions, [3, 4, 5]);
        assert_eq!(steps[1].plan.block_tables, [0, 1]);
        assert!(steps[0].plan.logits_rows.is_empty() && steps[0].scored.is_empty());
    }

    #[test]
    fn threads_keep_the_order() {
        assert_eq!(map_indices(1000, |index| index * 2), (0..1000).map(|index| index * 2).collect::<Vec<_>>());
        assert!(map_indices(0, |index| index).is_empty());
    }
}
