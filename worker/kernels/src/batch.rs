//! The ragged batch as attention sees it: which rows belong to which sequence, and where its keys lie.
//!
//! It is plain data that a step plan carries to every rank; it says nothing about scheduling.

/// One sequence's part of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SequenceSlice {
    /// First row of this sequence among the step's rows.
    pub row_start: u32,
    /// Rows (tokens) computed in this step, at least 1. Row `row_start + i` has position `first_position + i`.
    pub row_count: u32,
    /// Absolute position of the first row; keys of positions `0..first_position` are already stored.
    pub first_position: u32,
    /// Where this sequence's block table begins in [`AttentionBatch::block_tables`].
    pub table_start: u32,
    /// Blocks in the table: at least ceil((first_position + row_count) / block_size).
    pub table_len: u32,
}

/// Borrowed view of a step for `Backend::attention`.
#[derive(Debug, Clone, Copy)]
pub struct AttentionBatch<'a> {
    /// Sequences in row order; their rows cover `0..rows` without gaps.
    pub sequences: &'a [SequenceSlice],
    /// Concatenated block tables: entry i of a sequence is the pool block that holds positions
    /// `i * block_size .. (i + 1) * block_size`.
    pub block_tables: &'a [u32],
    /// Token slots per block.
    pub block_size: usize,
}
