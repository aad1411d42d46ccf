//! Prompts of a wanted number of tokens, as the server counts them, without knowing its tokenizer.
//!
//! Prompts are common English words, each one token with the space before it in nearly every vocabulary. Two requests
//! of known numbers of words tell what the server counts for a word and for what is around the text (a template, a
//! beginning token); from there a prompt of so many tokens follows. Reports tell what was really counted.

use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

/// Words of one token.
const WORDS: [&str; 64] = [
    "the", "of", "and", "to", "in", "is", "that", "for", "on", "was", "with", "as", "by", "at", "from", "are", "this", "be", "have", "or",
    "one", "had", "not", "but", "what", "all", "were", "when", "we", "there", "can", "an", "your", "which", "their", "said", "if", "will",
    "each", "about", "how", "up", "out", "them", "then", "she", "many", "some", "so", "these", "would", "other", "into", "has", "more",
    "two", "like", "him", "see", "time", "could", "no", "make", "than",
];

/// How many tokens a server counts.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Counting {
    /// Tokens around the text.
    pub around: f64,
    /// Tokens per word.
    pub per_word: f64,
}

impl Counting {
    /// Of a server that counts nothing: a word is a token.
    pub const UNKNOWN: Counting = Counting { around: 0.0, per_word: 1.0 };

    /// From what the server counted for two numbers of words; `None` where that cannot be.
    pub fn from_two((few, few_tokens): (usize, usize), (many, many_tokens): (usize, usize)) -> Option<Self> {
        let per_word = (many_tokens as f64 - few_tokens as f64) / (many as f64 - few as f64);
        let around = few_tokens as f64 - per_word * few as f64;
        (per_word > 0.0 && per_word.is_finite()).then_some(Counting { around, per_word })
    }

    /// Words of a prompt of so many tokens; at least one.
    pub fn words(&self, tokens: usize) -> usize {
        ((tokens as f64 - self.around) / self.per_word).round().max(1.0) as usize
    }
}

/// So many random words, so that no two prompts begin alike.
pub fn words(count: usize, random: &mut StdRng) -> String {
    let mut text = String::new();
    for index in 0..count {
        if index > 0 {
            text.push(' ');
        }
        text.push_str(WORDS.choose(random).unwrap_or(&WORDS[0]));
    }
    text
}

/// A seed for one part of a run, so that parts do not depend on each other's length.
pub fn branch(random: &mut StdRng) -> u64 {
    random.random()
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn two_counts_give_the_words_of_any_length() {
        // A template of 21 tokens, one token a word.
        let counting = Counting::from_two((16, 37), (80, 101)).expect("possible");
        assert_eq!(counting, Counting { around: 21.0, per_word: 1.0 });
        assert_eq!((counting.words(512), counting.words(5)), (491, 1));
        assert_eq!(Counting::from_two((16, 30), (80, 30)), None);
        assert_eq!(Counting::UNKNOWN.words(128), 128);
    }

    #[test]
    fn prompts_repeat_with_their_seed_only() {
        let text = |seed| words(12, &mut StdRng::seed_from_u64(seed));
        assert_eq!(text(3), text(3));
        assert_ne!(text(3), text(4));
        assert_eq!(text(3).split(' ').count(), 12);
    }
}
