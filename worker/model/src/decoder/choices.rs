//! What the tokens of a step chose among the experts that a rank holds, sorted by expert, so that each expert sees its
//! tokens as a run of rows.
//!
//! Invariant: every choice of an expert held here has one row, however many tokens choose it; rows of an expert are in the order of tokens, entries of a token in the order
//! of experts.

use std::ops::Range;

use forge_kernels::ExpertEntry;

/// The choices of a step that fall on a rank's experts. Rows and runs count experts from the rank's first, entries from
/// the model's: the tree that adds them is over all.
#[derive(Debug, PartialEq)]
pub(crate) struct Choices {
    tokens: Vec<u32>,
    experts: Vec<u32>,
    runs: Vec<Run>,
    starts: Vec<u32>,
    entries: Vec<ExpertEntry>,
}

/// The rows of an expert that was chosen, counted from the rank's first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Run {
    pub expert: usize,
    pub rows: Range<usize>,
}

impl Choices {
    /// Sorts those of `chosen` (experts and weights of `tokens` tokens, equally many for each) that are in `held`.
    pub fn new(chosen: &[(u32, f32)], tokens: usize, held: &Range<usize>) -> Self {
        let per_token = chosen.len() / tokens.max(1);
        let count = held.len();
        let local = |expert: u32| held.contains(&(expert as usize)).then(|| expert as usize - held.start);
        // Where each expert's rows begin, then where its next one goes.
        let mut next = vec![0_u32; count + 1];
        chosen.iter().filter_map(|&(expert, _)| local(expert)).for_each(|expert| next[expert + 1] += 1);
        for expert in 0..count {
            next[expert + 1] += next[expert];
        }
        let run = |expert: usize| Run { expert, rows: next[expert] as usize..next[expert + 1] as usize };
        let runs = (0..count).map(run).filter(|run| !run.rows.is_empty()).collect();
        let rows = next[count] as usize;
        let mut sorted = Choices {
            tokens: vec![0; rows],
            experts: vec![0; rows],
            runs,
            starts: Vec::with_capacity(tokens + 1),
            entries: Vec::with_capacity(rows),
        };
        sorted.starts.push(0);
        for (token, of_token) in chosen.chunks(per_token.max(1)).enumerate() {
            for &(expert, weight) in of_token {
                let Some(own) = local(expert) else { continue };
                let row = next[own];
                next[own] += 1;
                sorted.tokens[row as usize] = token as u32;
                sorted.experts[row as usize] = own as u32;
                sorted.entries.push(ExpertEntry { expert, row, weight });
            }
            sorted.starts.push(sorted.entries.len() as u32);
        }
        sorted
    }

    /// The token of every row.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The expert of every row, counted from the rank's first.
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
        let choices = Choices::new(&chosen, 3, &(0..5));
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
    fn a_rank_sees_the_choices_that_fall_on_its_experts() {
        let chosen = [(1, 0.1), (3, 0.2), (0, 0.3), (3, 0.4), (0, 0.5), (1, 0.6)];
        let choices = Choices::new(&chosen, 3, &(2..4));
        assert_eq!((choices.tokens(), choices.experts()), (&[0, 1][..], &[1, 1][..]));
        assert_eq!(choices.runs(), [Run { expert: 1, rows: 0..2 }]);
        assert_eq!(choices.starts(), [0, 1, 2, 2], "the last token is another rank's");
        assert_eq!(choices.entries().iter().map(|entry| (entry.expert, entry.row)).collect::<Vec<_>>(), [(3, 0), (3, 1)]);
        let elsewhere = Choices::new(&chosen, 3, &(4..6));
        assert!(elsewhere.tokens().is_empty() && elsewhere.runs().is_empty());
        assert_eq!(elsewhere.starts(), [0; 4]);
    }

    #[test]
    fn a_step_without_tokens_has_no_runs() {
        let choices = Choices::new(&[], 0, &(0..4));
        assert!(choices.runs().is_empty() && choices.tokens().is_empty());
        assert_eq!(choices.starts(), [0]);
    }
}
