//! Which tokens of a text are scored, each after which context: the three protocols people publish numbers of.
//!
//! They differ by several per cent on the same model and text, so a figure without its protocol says nothing:
//! - **chunked** (llama.cpp): chunks of `context` tokens, each from an empty context that begins with the model's
//!   beginning-of-text token; only the second half of a chunk is scored.
//! - **sliding** (Hugging Face's guide): windows of `context` tokens that advance by `stride`; each token is scored
//!   once, in the first window that holds it.
//! - **rolling** (lm-eval): every token is scored once; windows do not overlap but for one token of context, the first
//!   begins with a prefix token, the last is filled up with tokens that were scored before.
//!
//! Invariant: no token is scored twice, and every scored token has at least one token before it.

use std::ops::Range;

use crate::{EvalError, Result};

/// Tokens of the shortest chunk that can be scored.
pub const SHORTEST_CHUNK: usize = 4;

/// How a text is cut into windows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// llama.cpp's.
    Chunked {
        /// Tokens of a chunk.
        context: usize,
        /// What each chunk begins with in place of its first token; `None` where the model wants none.
        beginning: Option<u32>,
    },
    /// Hugging Face's.
    Sliding {
        /// Tokens of a window.
        context: usize,
        /// Tokens between the beginnings of two windows.
        stride: usize,
    },
    /// lm-eval's.
    Rolling {
        /// Tokens of a window.
        context: usize,
        /// What the text begins with, so that its first token can be scored.
        prefix: u32,
    },
}

/// One sequence to compute and what to score in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// A token before the text's.
    pub prefix: Option<u32>,
    /// Tokens of the text that are computed.
    pub range: Range<usize>,
    /// Tokens of the text that are scored; the last may be one beyond `range`.
    pub scored: Range<usize>,
}

impl Window {
    /// Tokens to compute, in order.
    pub fn input(&self, tokens: &[u32]) -> Vec<u32> {
        self.prefix.iter().chain(&tokens[self.range.clone()]).copied().collect()
    }

    /// The first row whose logits score a token: the one before that token.
    pub fn first_row(&self) -> usize {
        usize::from(self.prefix.is_some()) + self.scored.start - self.range.start - 1
    }
}

impl Protocol {
    /// Tokens of its longest window.
    pub fn context(&self) -> usize {
        match *self {
            Protocol::Chunked { context, .. } | Protocol::Sliding { context, .. } | Protocol::Rolling { context, .. } => context,
        }
    }

    fn check(&self) -> Result<()> {
        let wrong = |option, value, reason: &str| Err(EvalError::Option { option, value, reason: reason.to_owned() });
        match *self {
            Protocol::Chunked { context, .. } if context < SHORTEST_CHUNK => {
                wrong("context", context, &format!("a chunk needs at least {SHORTEST_CHUNK} tokens"))
            }
            Protocol::Sliding { context, .. } if context < 2 => wrong("context", context, "a window needs at least 2 tokens"),
            Protocol::Rolling { context: 0, .. } => wrong("context", 0, "a window needs at least 1 token"),
            Protocol::Sliding { context, stride } if stride == 0 || stride > context => {
                wrong("stride", stride, &format!("must be from 1 to the context of {context} tokens"))
            }
            _ => Ok(()),
        }
    }
}

/// Cuts a text of `tokens` tokens into windows, in the order of the text.
///
/// # Errors
/// [`EvalError::Option`] for sizes that make no window, [`EvalError::TooShort`] for a text that fills none.
pub fn windows(protocol: &Protocol, tokens: usize) -> Result<Vec<Window>> {
    protocol.check()?;
    let (found, needed) = match *protocol {
        Protocol::Chunked { context, beginning } => (chunked(tokens, context, beginning), context),
        Protocol::Sliding { context, stride } => (sliding(tokens, context, stride), 2),
        Protocol::Rolling { context, prefix } => (rolling(tokens, context, prefix), 1),
    };
    if found.is_empty() {
        let reason = match protocol {
            Protocol::Chunked { .. } => "a chunk is that long; give a longer text or a smaller context".to_owned(),
            _ => "give a longer text".to_owned(),
        };
        return Err(EvalError::TooShort { tokens, needed, reason });
    }
    Ok(found)
}

fn chunked(tokens: usize, context: usize, beginning: Option<u32>) -> Vec<Window> {
    let starts = (0..tokens / context).map(|chunk| chunk * context);
    let window = |start: usize| Window {
        prefix: beginning,
        // The last token of a chunk is only predicted.
        range: start + usize::from(beginning.is_some())..start + context - 1,
        scored: start + context / 2 + 1..start + context,
    };
    starts.map(window).collect()
}

fn sliding(tokens: usize, context: usize, stride: usize) -> Vec<Window> {
    let mut windows = Vec::new();
    let mut scored_to = 0;
    for start in (0..tokens).step_by(stride) {
        let end = (start + context).min(tokens);
        // The first token of a window has nothing before it.
        let scored = scored_to.max(start + 1)..end;
        if !scored.is_empty() {
            windows.push(Window { prefix: None, range: start..end - 1, scored });
        }
        scored_to = end;
        if end == tokens {
            break;
        }
    }
    windows
}

fn rolling(tokens: usize, context: usize, prefix: u32) -> Vec<Window> {
    let mut windows = Vec::new();
    let mut scored_to = 0;
    while scored_to < tokens {
        let end = (scored_to + context).min(tokens);
        let window = if scored_to == 0 {
            Window { prefix: Some(prefix), range: 0..end - 1, scored: 0..end }
        } else {
            // `context` tokens before the last scored one, whether they were scored before or not.
            Window { prefix: None, range: end - 1 - context..end - 1, scored: scored_to..end }
        };
        windows.push(window);
        scored_to = end;
    }
    windows
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn plain(windows: &[Window]) -> Vec<(Range<usize>, Range<usize>)> {
        windows.iter().map(|window| (window.range.clone(), window.scored.clone())).collect()
    }

    #[test]
    fn chunks_score_their_second_half() {
        let with_beginning = windows(&Protocol::Chunked { context: 8, beginning: Some(1) }, 20).expect("fits");
        assert_eq!(plain(&with_beginning), [(1..7, 5..8), (9..15, 13..16)]);
        assert_eq!(with_beginning[1].first_row(), 4);
        assert_eq!(with_beginning[0].input(&(100..120).collect::<Vec<_>>()), [1, 101, 102, 103, 104, 105, 106]);
        let without = windows(&Protocol::Chunked { context: 8, beginning: None }, 20).expect("fits");
        assert_eq!(plain(&without), [(0..7, 5..8), (8..15, 13..16)]);
        assert_eq!(without[1].first_row(), 4);
    }

    #[test]
    fn sliding_windows_overlap_and_score_once() {
        let found = windows(&Protocol::Sliding { context: 6, stride: 3 }, 11).expect("fits");
        assert_eq!(plain(&found), [(0..5, 1..6), (3..8, 6..9), (6..10, 9..11)]);
        let disjoint = windows(&Protocol::Sliding { context: 4, stride: 4 }, 9).expect("fits");
        assert_eq!(plain(&disjoint), [(0..3, 1..4), (4..7, 5..8)], "a lone last token has nothing before it");
    }

    #[test]
    fn rolling_windows_are_those_of_lm_eval() {
        // Its get_rolling_token_windows(list(range(10)), 99, 4, 1) after make_disjoint_window.
        let found = windows(&Protocol::Rolling { context: 4, prefix: 99 }, 10).expect("fits");
        let tokens: Vec<u32> = (0..10).collect();
        let inputs: Vec<_> = found.iter().map(|window| window.input(&tokens)).collect();
        assert_eq!(inputs, [vec![99, 0, 1, 2], vec![3, 4, 5, 6], vec![5, 6, 7, 8]]);
        let rows: Vec<_> = found.iter().map(|window| (window.first_row(), window.scored.clone())).collect();
        assert_eq!(rows, [(0, 0..4), (0, 4..8), (2, 8..10)]);
    }

    #[test]
    fn what_makes_no_window_is_refused() {
        for (protocol, tokens, expected) in [
            (Protocol::Chunked { context: 8, beginning: None }, 7, "8 are needed"),
            (Protocol::Chunked { context: 3, beginning: None }, 7, "at least 4"),
            (Protocol::Sliding { context: 8, stride: 9 }, 20, "from 1 to the context of 8"),
            (Protocol::Sliding { context: 8, stride: 0 }, 20, "stride is 0"),
            (Protocol::Sliding { context: 8, stride: 4 }, 1, "2 are needed"),
            (Protocol::Rolling { context: 8, prefix: 0 }, 0, "1 are needed"),
        ] {
            let message = windows(&protocol, tokens).expect_err("refused").to_string();
            assert!(message.contains(expected), "{message}");
        }
    }

    proptest! {
        #[test]
        fn no_token_is_scored_twice_and_each_has_a_row(tokens in 1..400_usize, context in 4..40_usize, stride in 1..40_usize, kind in 0..4_u8) {
            let stride = stride.min(context);
            let protocol = match kind {
                0 => Protocol::Chunked { context, beginning: None },
                1 => Protocol::Chunked { context, beginning: Some(7) },
                2 => Protocol::Sliding { context, stride },
                _ => Protocol::Rolling { context, prefix: 7 },
            };
            let Ok(windows) = windows(&protocol, tokens) else { return Ok(()) };
            let mut scored_to = 0;
            for window in &windows {
                prop_assert!(window.scored.start >= scored_to && !window.scored.is_empty() && window.scored.end <= tokens);
                scored_to = window.scored.end;
                let rows = usize::from(window.prefix.is_some()) + window.range.len();
                prop_assert!(rows <= context);
                prop_assert_eq!(window.first_row() + window.scored.len(), rows, "the last row scores the last token");
            }
            let scored: usize = windows.iter().map(|window| window.scored.len()).sum();
            if let Protocol::Rolling { .. } = protocol {
                prop_assert_eq!(scored, tokens);
            }
        }
    }
}
