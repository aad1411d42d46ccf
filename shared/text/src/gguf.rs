//! Tokenizers from GGUF metadata: byte-level BPE (`tokenizer.ggml.model` = `gpt2`).
//!
//! Reading the file is another crate's; this one takes the metadata as a plain struct and checks
//! all of it before building. SentencePiece and WordPiece models are refused by name.

use std::collections::BTreeMap;

use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use crate::decoding::{Decoding, TextStart};
use crate::pre_tokenizer::PreTokenizer;
use crate::tokenizer::{SpecialIds, Tokenizer, TokenizerParts};
use crate::vocabulary::{Vocabulary, VocabularyEntry, bytes_of_name, check_size};
use crate::{Result, TextError};

/// Token types of `tokenizer.ggml.token_type`.
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

/// Control tokens that end an answer under these names in published models, whatever the
/// metadata's single `eos_token_id` says.
const END_NAMES: &[&str] =
    &["<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "<|return|>", "<end_of_turn>", "</s>"];

/// The tokenizer's part of a GGUF file's metadata (`tokenizer.ggml.*`), field by field.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GgufTokenizer {
    /// `tokenizer.ggml.model`; `gpt2` is byte-level BPE.
    pub model: String,
    /// `tokenizer.ggml.pre`: how text is cut into words; empty means `default`.
    pub pre: String,
    /// `tokenizer.ggml.tokens`, by id.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.token_type`, by id: 1 normal, 2 unknown, 3 control, 4 user defined,
    /// 5 unused, 6 byte. Empty where the file has none: all normal.
    pub token_types: Vec<i32>,
    /// `tokenizer.ggml.scores`; byte-level BPE has no use for them.
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
    /// `tokenizer.ggml.add_bos_token`; without it the row of `pre` decides.
    pub add_bos_token: Option<bool>,
    /// `tokenizer.ggml.add_eos_token`; without it no EOS is added.
    pub add_eos_token: Option<bool>,
    /// `tokenizer.ggml.add_space_prefix`; without it no space is added.
    pub add_space_prefix: Option<bool>,
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
    /// tokens that do not exist.
    pub fn from_gguf(metadata: &GgufTokenizer) -> Result<Self> {
        if metadata.model != "gpt2" {
            return Err(TextError::Unsupported {
                field: "tokenizer.ggml.model",
                value: metadata.model.clone(),
                supported: "gpt2 (byte-level BPE)".to_string(),
            });
        }
        let pre = match metadata.pre.as_str() {
            "" => PreTokenizer::named("default")?,
            name => PreTokenizer::named(name)?,
        };
        metadata.check()?;

        let mut library = tokenizers::Tokenizer::new(metadata.model(pre)?);
        library.with_pre_tokenizer(Some(pipeline(pre)?));
        library.with_decoder(Some(ByteLevel::new(false, true, false)));
        library.add_tokens(metadata.added_tokens()).map_err(|error| TextError::invalid("tokenizer.ggml.tokens", error))?;

        let special = metadata.special_ids();
        let around = |add: bool, id: Option<u32>| id.filter(|_| add).into_iter().collect();
        Ok(Self::new(TokenizerParts {
            vocabulary: Vocabulary::new(metadata.entries())?,
            decoding: Decoding::Bytes(TextStart::Keep),
            prefix: around(metadata.add_bos_token.unwrap_or(pre.add_bos), special.bos),
            suffix: around(metadata.add_eos_token.unwrap_or(false), metadata.eos_id),
            special,
            library,
        }))
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
        if self.merges.is_empty() {
            return Err(TextError::invalid("tokenizer.ggml.merges", "it is empty; byte-level BPE needs merges"));
        }
        if self.add_space_prefix == Some(true) {
            return Err(TextError::invalid("tokenizer.ggml.add_space_prefix", "true is not supported with byte-level BPE"));
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
        self.token_types.get(id).copied().unwrap_or(1)
    }

    /// The merge model. Every merge is checked here, since the library may panic on a bad one.
    fn model(&self, pre: &PreTokenizer) -> Result<BPE> {
        let mut vocabulary = tokenizers::models::bpe::Vocab::with_capacity(self.tokens.len());
        for (id, token) in self.tokens.iter().enumerate() {
            if let Some(first) = vocabulary.insert(token.clone(), id as u32) {
                return Err(TextError::invalid("tokenizer.ggml.tokens", format!("{token:?} is both token {first} and token {id}")));
            }
        }
        let mut merges = Vec::with_capacity(self.merges.len());
        for (rank, merge) in self.merges.iter().enumerate() {
            let bad = |reason: &str| TextError::invalid("tokenizer.ggml.merges", format!("merge {rank} {merge:?}: {reason}"));
            let (left, right) = merge
                .split_once(' ')
                .filter(|(left, right)| !left.is_empty() && !right.is_empty())
                .ok_or_else(|| bad("expected two tokens with a space between"))?;
            if !(vocabulary.contains_key(left) && vocabulary.contains_key(right) && vocabulary.contains_key(&[left, right].concat())) {
                return Err(bad("a part or the whole is not in tokenizer.ggml.tokens"));
            }
            merges.push((left.to_string(), right.to_string()));
        }
        BPE::builder()
            .vocab_and_merges(vocabulary, merges)
            .ignore_merges(pre.ignore_merges)
            .build()
            .map_err(|error| TextError::invalid("tokenizer.ggml.merges", error))
    }

    /// Tokens that are found in text before it is cut.
    fn added_tokens(&self) -> Vec<AddedToken> {
        (self.tokens.iter().enumerate())
            .filter(|(id, token)| matches!(self.token_type(*id), CONTROL | USER_DEFINED) && !token.is_empty())
            .map(|(id, token)| AddedToken::from(token.clone(), self.token_type(id) == CONTROL).normalized(false))
            .collect()
    }

    fn entries(&self) -> Vec<VocabularyEntry> {
        (self.tokens.iter().enumerate())
            .map(|(id, token)| {
                let raw = || token.as_bytes().to_vec();
                VocabularyEntry {
                    id: id as u32,
                    name: token.clone(),
                    bytes: match self.token_type(id) {
                        CONTROL | USER_DEFINED | UNUSED => raw(),
                        _ => bytes_of_name(token).unwrap_or_else(raw),
                    },
                    special: self.token_type(id) == CONTROL,
                }
            })
            .collect()
    }

    fn special_ids(&self) -> SpecialIds {
        let named = (0..self.tokens.len() as u32).filter(|&id| {
            let id = id as usize;
            self.token_type(id) == CONTROL && END_NAMES.contains(&self.tokens[id].as_str())
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

/// The cuts of a row, then bytes to their characters.
fn pipeline(pre: &PreTokenizer) -> Result<Sequence> {
    let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
    for pattern in pre.patterns {
        let split = Split::new(SplitPattern::Regex((*pattern).to_string()), SplitDelimiterBehavior::Isolated, false)
            .map_err(|error| TextError::invalid("tokenizer.ggml.pre", error))?;
        steps.push(split.into());
    }
    steps.push(ByteLevel::new(false, true, false).into());
    Ok(Sequence::new(steps))
}
