//! The table of GGUF pre-tokenizers: `tokenizer.ggml.pre` to the patterns that cut text into
//! words before byte-pair merging.
//!
//! GGUF stores the name only; the patterns are those that the models' own `tokenizer.json`
//! files hold. Patterns apply one after another, each cutting what the one before left.
//! A new name is a new row.

use crate::{Result, TextError};

/// Contractions, then words, numbers and punctuation each with one leading space, then spaces.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const ONE_DIGIT: &str = r"\p{N}";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// How one family cuts text.
#[derive(Debug)]
pub(crate) struct PreTokenizer {
    /// Values of `tokenizer.ggml.pre` that mean this row.
    names: &'static [&'static str],
    /// Regular expressions, applied in order.
    pub(crate) patterns: &'static [&'static str],
    /// A word that is a token as it stands is not merged from its parts.
    pub(crate) ignore_merges: bool,
    /// Whether the text starts with the BOS token where the metadata does not say.
    pub(crate) add_bos: bool,
}

const TABLE: &[PreTokenizer] = &[
    PreTokenizer {
        names: &["gpt-2", "phi-2", "mpt", "olmo", "jais", "roberta-bpe"],
        patterns: &[GPT2],
        ignore_merges: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["default"],
        patterns: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
        ignore_merges: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell"],
        patterns: &[ONE_DIGIT, GPT2],
        ignore_merges: false,
        add_bos: false,
    },
    PreTokenizer { names: &["llama-bpe", "llama3", "llama-v3", "falcon3"], patterns: &[LLAMA3], ignore_merges: true, add_bos: true },
    PreTokenizer { names: &["dbrx", "smaug-bpe"], patterns: &[LLAMA3], ignore_merges: false, add_bos: false },
    PreTokenizer { names: &["qwen2", "stablelm2", "deepseek-r1-qwen"], patterns: &[QWEN2], ignore_merges: false, add_bos: false },
];

impl PreTokenizer {
    /// The row of a name.
    pub(crate) fn named(name: &str) -> Result<&'static Self> {
        TABLE.iter().find(|row| row.names.contains(&name)).ok_or_else(|| TextError::Unsupported {
            field: "tokenizer.ggml.pre",
            value: name.to_string(),
            supported: Self::names().join(", "),
        })
    }

    /// All names there are.
    pub(crate) fn names() -> Vec<&'static str> {
        TABLE.iter().flat_map(|row| row.names).copied().collect()
    }
}
