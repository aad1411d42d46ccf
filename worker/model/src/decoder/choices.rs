//! What the tokens of a step chose, sorted by expert, so that each expert sees its tokens as a run of rows.
//!
//! Invariant: every choice has one row; rows of an expert are in the order of tokens, entries of a token in the order
//! of experts.

use std::ops::Range;

use forge_kernels::ExpertEntry;

/// The choices of a step.
#[derive(Debug, PartialEq)]
pub(crate) struct Choices {
    tokens: Vec<u32>,
    experts: Vec<u32>,
    runs: Vec<Run>,
    starts: Vec<u32>,
    entries: Vec<ExpertEntry>,
}

/// The rows of an expert that was chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Run {
    pub expert: usize,
    pub rows: Range<usize>,
}

impl Choices {
    /// Sorts `chosen`: experts and weights of `tokens` tokens, equally many for each.
    pub fn new(chosen: &[(u32, f32)], tokens: usize, count: usize) -> Self {
        let per_token = chosen.len() / tokens.max(1);
        // Where each expert's rows begin, then where its next one goes.
        let mut next = vec![0_u32; count + 1];
        chosen.iter().for_each(|&(expert, _)| next[expert as usize + 1] += 1);
        for expert in 0..count {
            next[expert + 1] += next[expert];
        }
        let run = |expert: usize| Run { expert, rows: next[expert] as usize..next[expert + 1] as usize };
        let runs = (0..count).map(run).filter(|run| !run.rows.is_empty()).collect();
        let mut sorted = Choices {
            tokens: vec![0; chosen.len()],
            experts: vec![0; chosen.len()],
            runs,
            starts: (0..=tokens).map(|token| (token * per_token) as u32).collect(),
            entries: Vec::with_capacity(chosen.len()),
        };
        for (index, &(expert, weight)) in chosen.iter().enumerate() {
            let row = next[expert as usize];
            next[expert as usize] += 1;
            sorted.tokens[row as usize] = (index / per_token) as u32;
            sorted.experts[row as usize] = expert;
            sorted.entries.push(ExpertEntry { expert, row, weight });
        }
        sorted
    }

    /// The token of every row.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The expert of every row.
    pub fn experts(&self) -> &[u32] {
        &self.experts
    }

    /// The chosen experts and their rows, ascending.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Where each token's entries begin; one more than tokens.
    pub fn starts(&self) -> &[u32] {
        &self.starts
    }

    /// Per token, its experts with rows and weights.
    pub fn entries(&self) -> &[ExpertEntry] {
        &self.entries
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_sorted_by_expert_then_token() {
        let chosen = [(1, 0.1), (3, 0.2), (0, 0.3), (3, 0.4), (1, 0.5), (3, 0.6)];
        let choices = Choices::new(&chosen, 3, 5);
        assert_eq!(choices.tokens(), [1, 0, 2, 0, 1, 2]);
        assert_eq!(choices.experts(), [0, 1, 1, 3, 3, 3]);
        let run = |expert, rows| Run { expert, rows };
        assert_eq!(choices.runs(), [run(0, 0..1), run(1, 1..3), run(3, 3..6)]);
        assert_eq!(choices.starts(), [0, 2, 4, 6]);
        let rows: Vec<u32> = choices.entries().iter().map(|entry| entry.row).collect();
        assert_eq!(rows, [1, 3, 0, 4, 2, 5]);
        for (entry, chosen) in choices.entries().iter().zip(chosen) {
            assert_eq!((entry.expert, entry.weight), chosen);
        }
    }

    #[test]
    fn a_step_without_tokens_has_no_runs() {
        let choices = Choices::new(&[], 0, 4);
        assert!(choices.runs().is_empty() && choices.tokens().is_empty());
        assert_eq!(choices.starts(), [0]);
    }
}
