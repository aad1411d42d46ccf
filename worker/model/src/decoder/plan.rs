//! Is a step plan one this decoder can run? Checked whole before anything is touched: a plan may come from another
//! process, and kernels index by what it says.

use forge_shared::ids::Epoch;

use crate::error::{ModelError, Result};
use crate::step::{StepModelInfo, StepPlan};

fn wrong<T>(field: &'static str, reason: String) -> Result<T> {
    Err(ModelError::Plan { field, reason })
}

/// Checks sizes, ids, positions, slots and tables against each other and against the model, and that the plan's epoch is
/// not older than `current`.
///
/// # Errors
/// [`ModelError::Plan`], naming the field; [`ModelError::StaleEpoch`].
pub(crate) fn check(plan: &StepPlan, info: &StepModelInfo, current: Epoch) -> Result<()> {
    if plan.epoch < current {
        return Err(ModelError::StaleEpoch { plan: plan.epoch, current });
    }
    let rows = plan.tokens.len();
    if rows > info.max_step_rows {
        return wrong("tokens", format!("{rows} rows, the most is {}", info.max_step_rows));
    }
    for (field, length) in [("positions", plan.positions.len()), ("slots", plan.slots.len())] {
        if length != rows {
            return wrong(field, format!("has {length} entries for {rows} rows"));
        }
    }
    if let Some(token) = plan.tokens.iter().find(|&&token| token as usize >= info.vocab_size) {
        return wrong("tokens", format!("id {token} is outside the vocabulary of {}", info.vocab_size));
    }
    check_sequences(plan, info)?;
    check_logits_rows(&plan.logits_rows, rows)?;
    let outside = |&&(from, to): &&(u32, u32)| from.max(to) as usize >= info.kv_blocks;
    if let Some((from, to)) = plan.block_copies.iter().find(outside) {
        return wrong("block_copies", format!("({from}, {to}) is outside the pool of {} blocks", info.kv_blocks));
    }
    Ok(())
}

fn check_logits_rows(logits_rows: &[u32], rows: usize) -> Result<()> {
    if let Some(pair) = logits_rows.windows(2).find(|pair| pair[0] >= pair[1]) {
        return wrong("logits_rows", format!("{} before {}: must ascend", pair[0], pair[1]));
    }
    match logits_rows.last() {
        Some(&last) if last as usize >= rows => wrong("logits_rows", format!("row {last} of {rows}")),
        _ => Ok(()),
    }
}

fn check_sequences(plan: &StepPlan, info: &StepModelInfo) -> Result<()> {
    let rows = plan.tokens.len();
    let mut next_row = 0;
    for (index, sequence) in plan.sequences.iter().enumerate() {
        let (start, count) = (sequence.row_start as usize, sequence.row_count as usize);
        if start != next_row || count == 0 || count > rows - start.min(rows) {
            return wrong("sequences", format!("sequence {index} has rows {start}..{}, after {next_row} of {rows}", start + count));
        }
        next_row = start + count;
        let (table_start, table_len) = (sequence.table_start as usize, sequence.table_len as usize);
        let Some(table) = plan.block_tables.get(table_start..).and_then(|tables| tables.get(..table_len)) else {
            let entries = plan.block_tables.len();
            return wrong("block_tables", format!("sequence {index} has {table_len} entries from {table_start}, there are {entries}"));
        };
        let first = sequence.first_position as usize;
        let end = first + count;
        if end > info.max_model_len {
            return wrong("positions", format!("sequence {index} reaches position {end}, the most is {}", info.max_model_len));
        }
        if table_len < end.div_ceil(info.block_size) {
            return wrong("block_tables", format!("sequence {index} has {table_len} blocks of {} for {end} positions", info.block_size));
        }
        if let Some(block) = table.iter().find(|&&block| block as usize >= info.kv_blocks) {
            return wrong("block_tables", format!("block {block} is outside the pool of {}", info.kv_blocks));
        }
        for row in start..next_row {
            let position = first + row - start;
            if plan.positions[row] as usize != position {
                return wrong("positions", format!("row {row} has {}, its sequence says {position}", plan.positions[row]));
            }
            let slot = table[position / info.block_size] as usize * info.block_size + position % info.block_size;
            if plan.slots[row] as usize != slot {
                return wrong("slots", format!("row {row} has {}, its block table says {slot}", plan.slots[row]));
            }
        }
    }
    if next_row != rows {
        return wrong("sequences", format!("cover {next_row} of {rows} rows"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use forge_kernels::SequenceSlice;

    use super::*;

    fn info() -> StepModelInfo {
        StepModelInfo {
            vocab_size: 10,
            max_model_len: 12,
            block_size: 4,
            kv_blocks: 5,
            kv_block_bytes: 0,
            max_step_rows: 8,
            max_logits_rows: 2,
            numerics_id: String::new(),
        }
    }

    /// Two sequences: rows 0..3 at positions 2..5 in blocks 4, 1; row 3 at position 0 in block 2.
    fn plan() -> StepPlan {
        StepPlan {
            tokens: vec![1, 2, 3, 9],
            positions: vec![2, 3, 4, 0],
            slots: vec![18, 19, 4, 8],
            sequences: vec![
                SequenceSlice { row_start: 0, row_count: 3, first_position: 2, table_start: 0, table_len: 2 },
                SequenceSlice { row_start: 3, row_count: 1, first_position: 0, table_start: 2, table_len: 1 },
            ],
            block_tables: vec![4, 1, 2],
            logits_rows: vec![2, 3],
            block_copies: vec![(0, 4)],
            ..StepPlan::default()
        }
    }

    #[test]
    fn a_sound_plan_passes() {
        check(&plan(), &info(), Epoch(0)).unwrap();
        check(&StepPlan::default(), &info(), Epoch(0)).unwrap();
        let stale = check(&plan(), &info(), Epoch(1));
        assert!(matches!(stale, Err(ModelError::StaleEpoch { plan: Epoch(0), current: Epoch(1) })), "{stale:?}");
    }

    #[test]
    fn every_damage_is_refused_by_its_field() {
        type Damage = fn(&mut StepPlan);
        let damages: &[(&str, Damage)] = &[
            ("tokens", |plan| plan.tokens[0] = 10),
            ("tokens", |plan| plan.tokens = vec![0; 9]),
            ("positions", |plan| plan.positions[1] = 4),
            ("positions", |plan| {
                plan.positions.pop();
            }),
            ("positions", |plan| plan.sequences[0].first_position = 10),
            ("positions", |plan| plan.sequences[0].first_position = u32::MAX),
            ("slots", |plan| plan.slots[2] = 5),
            ("slots", |plan| plan.slots.push(0)),
            ("sequences", |plan| plan.sequences[1].row_start = 2),
            ("sequences", |plan| plan.sequences[1].row_count = 0),
            ("sequences", |plan| plan.sequences[1].row_count = u32::MAX),
            ("sequences", |plan| {
                plan.sequences.pop();
            }),
            ("block_tables", |plan| plan.block_tables[1] = 5),
            ("block_tables", |plan| plan.sequences[1].table_len = 9),
            ("block_tables", |plan| plan.sequences[1].table_start = u32::MAX),
            ("block_tables", |plan| plan.sequences[0].table_len = 1),
            ("logits_rows", |plan| plan.logits_rows = vec![3, 2]),
            ("logits_rows", |plan| plan.logits_rows = vec![1, 1]),
            ("logits_rows", |plan| plan.logits_rows = vec![4]),
            ("block_copies", |plan| plan.block_copies = vec![(0, 5)]),
            ("block_copies", |plan| plan.block_copies = vec![(u32::MAX, 0)]),
        ];
        for (expected, damage) in damages {
            let mut plan = plan();
            damage(&mut plan);
            match check(&plan, &info(), Epoch(0)) {
                Err(ModelError::Plan { field, .. }) => assert_eq!(field, *expected, "{plan:?}"),
                other => panic!("{expected}: {other:?} for {plan:?}"),
            }
        }
    }
}
