//! Tokenizers from GGUF metadata, by `tokenizer.ggml.model`: byte-level BPE (`gpt2`),
//! SentencePiece's byte-pair merging (`llama`) and unigram (`t5`).
//!
//! Reading the file is another crate's; this one takes the metadata as a plain struct and checks
//! all of it before building. Other models are refused by name.

mod byte_level;
mod pre_tokenizer;
mod sentencepiece;

use std::collections::BTreeMap;

pub(crate) use self::pre_tokenizer::PreTokenizer;
use crate::tokenizer::{SpecialIds, Tokenizer};
use crate::vocabulary::check_size;
use crate::{Result, TextError};

/// Token types of `tokenizer.ggml.token_type`.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

/// Control tokens that end an answer under these names in published models, whatever the
/// metadata's single `eos_token_id` says.
const END_NAMES: &[&str] = &[
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "</s>",
    "<EOT>",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
];

/// Where a vocabulary has both of these, `<|end|>` ends a message and not the answer.
const MESSAGE_NAMES: [&str; 2] = ["<|return|>", "<|call|>"];

/// The tokenizer's part of a GGUF file's metadata (`tokenizer.ggml.*`), field by field.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GgufTokenizer {
    /// `general.name`, which tells models whose special tokens take the spaces behind them.
    pub name: Option<String>,
    /// `tokenizer.ggml.model`: `gpt2`, `llama` or `t5`.
    pub model: String,
    /// `tokenizer.ggml.pre`: how byte-level BPE cuts text into words; empty means `default`.
    pub pre: String,
    /// `tokenizer.ggml.tokens`, by id.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.token_type`, by id: 1 normal, 2 unknown, 3 control, 4 user defined,
    /// 5 unused, 6 byte. Empty where the file has none: all normal.
    pub token_types: Vec<i32>,
    /// `tokenizer.ggml.scores`, by id; byte-level BPE has no use for them.
    pub scores: Option<Vec<f32>>,
    /// `tokenizer.ggml.merges`, best first, each two tokens with a space between.
    pub merges: Vec<String>,
    /// `tokenizer.ggml.bos_token_id`.
    pub bos_id: Option<u32>,
    /// `tokenizer.ggml.eos_token_id`.
    pub eos_id: Option<u32>,
    /// `tokenizer.ggml.eot_token_id`.
    pub eot_id: Option<u32>,
    /// `tokenizer.ggml.unknown_token_id`.
    pub unknown_id: Option<u32>,
    /// `tokenizer.ggml.padding_token_id`.
    pub padding_id: Option<u32>,
    /// `tokenizer.ggml.add_bos_token`; without it `llama` adds one, `t5` does not, and for `gpt2` the row of `pre`
    /// decides.
    pub add_bos_token: Option<bool>,
    /// `tokenizer.ggml.add_eos_token`; without it only `t5` adds one.
    pub add_eos_token: Option<bool>,
    /// `tokenizer.ggml.add_space_prefix`; without it `llama` and `t5` add a space.
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.ggml.remove_extra_whitespaces`; without it spaces stay as they are.
    pub remove_extra_whitespaces: Option<bool>,
    /// `tokenizer.ggml.precompiled_charsmap`: SentencePiece's replacement rules.
    pub precompiled_charsmap: Option<Vec<u8>>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
}

/// The values of `tokenizer.ggml.pre` that [`Tokenizer::from_gguf`] takes.
pub fn supported_gguf_pre_tokenizers() -> Vec<&'static str> {
    PreTokenizer::names()
}

impl Tokenizer {
    /// Builds the tokenizer of a GGUF file.
    ///
    /// # Errors
    /// [`TextError::Unsupported`] for a `model` or `pre` there is no row for, and
    /// [`TextError::Invalid`], naming the metadata field, for anything that does not fit
    /// together: ids outside the vocabulary, lists of different lengths, tokens twice, merges of
    /// tokens that do not exist, scores that are no numbers.
    pub fn from_gguf(metadata: &GgufTokenizer) -> Result<Self> {
        metadata.check()?;
        let parts = match metadata.model.as_str() {
            "gpt2" => byte_level::parts(metadata),
            "llama" => sentencepiece::parts(metadata, sentencepiece::LLAMA),
            "t5" => sentencepiece::parts(metadata, sentencepiece::T5),
            other => Err(TextError::Unsupported {
                field: "tokenizer.ggml.model",
                value: other.to_string(),
                supported: "gpt2 (byte-level BPE), llama (SentencePiece), t5 (unigram)".to_string(),
            }),
        };
        Ok(Self::new(parts?))
    }
}

impl GgufTokenizer {
    /// Everything that does not need the vocabulary as a map.
    fn check(&self) -> Result<()> {
        let size = self.tokens.len();
        if size == 0 {
            return Err(TextError::invalid("tokenizer.ggml.tokens", "it is empty"));
        }
        check_size(size)?;
        if !self.token_types.is_empty() && self.token_types.len() != size {
            return Err(TextError::invalid("tokenizer.ggml.token_type", format!("{} types for {size} tokens", self.token_types.len())));
        }
        if let Some((id, kind)) = (self.token_types.iter().enumerate()).find(|(_, kind)| !(1..=6).contains(*kind)) {
            return Err(TextError::invalid("tokenizer.ggml.token_type", format!("token {id} has type {kind}, expected 1 to 6")));
        }
        let ids = [
            ("tokenizer.ggml.bos_token_id", self.bos_id),
            ("tokenizer.ggml.eos_token_id", self.eos_id),
            ("tokenizer.ggml.eot_token_id", self.eot_id),
            ("tokenizer.ggml.unknown_token_id", self.unknown_id),
            ("tokenizer.ggml.padding_token_id", self.padding_id),
        ];
        for (field, id) in ids {
            if let Some(id) = id.filter(|&id| id as usize >= size) {
                return Err(TextError::invalid(field, format!("{id} is outside the vocabulary of {size} tokens")));
            }
        }
        Ok(())
    }

    fn token_type(&self, id: usize) -> i32 {
        self.token_types.get(id).copied().unwrap_or(NORMAL)
    }

    /// Whether a special token takes the spaces behind it. GGUF does not store that; of the known
    /// models, Phi-3's do, but for three.
    fn strips_right(&self, token: &str) -> bool {
        let name = self.name.as_deref().unwrap_or_default().to_lowercase();
        (name.contains("phi-3") || name.contains("phi3")) && !["<unk>", "<s>", "<|endoftext|>"].contains(&token)
    }

    fn special_ids(&self) -> SpecialIds {
        let is_named = |id: usize, name: &str| self.token_type(id) == CONTROL && self.tokens[id] == name;
        let has_messages = MESSAGE_NAMES.iter().all(|name| (0..self.tokens.len()).any(|id| is_named(id, name)));
        let named = (0..self.tokens.len() as u32).filter(|&id| {
            let token = self.tokens[id as usize].as_str();
            self.token_type(id as usize) == CONTROL && END_NAMES.contains(&token) && !(has_messages && token == "<|end|>")
        });
        let mut eos: Vec<u32> = Vec::new();
        for id in self.eos_id.into_iter().chain(self.eot_id).chain(named) {
            if !eos.contains(&id) {
                eos.push(id);
            }
        }
        SpecialIds { bos: self.bos_id, eos, padding: self.padding_id, unknown: self.unknown_id }
    }

    /// The text of special tokens under the names that chat templates use.
    pub(crate) fn special_token_texts(&self) -> BTreeMap<String, String> {
        [("bos_token", self.bos_id), ("eos_token", self.eos_id), ("unk_token", self.unknown_id), ("pad_token", self.padding_id)]
            .into_iter()
            .filter_map(|(name, id)| {
                let text = self.tokens.get(id? as usize)?;
                Some((name.to_string(), text.clone()))
            })
            .collect()
    }
}
