//! [`Tokenizer`]: text to token ids and back.
//!
//! A thin shell over [`Engine`] that adds what serving needs: a cap on the input, raw bytes by
//! id, the ids that end an answer, a digest. Cloning shares everything.
//! Invariant: encoding and decoding are pure functions of the text or the ids.

use std::sync::Arc;

use crate::decoding::{ByteText, Decoding};
use crate::engine::Engine;
use crate::vocabulary::Vocabulary;
use crate::{Result, TextError};

/// Bytes of text that [`Tokenizer::encode`] takes unless told otherwise.
pub const DEFAULT_MAX_TEXT_BYTES: usize = 8 << 20;

/// Longest run of whitespace. `\s+(?!\S)`, part of most pre-tokenizers, makes the expression
/// engine go back through a run; after a million steps it gives up and the library takes what is
/// left for one word.
const MAX_WHITESPACE_RUN: usize = 500_000;

/// Text to token ids and back. Cheap to clone, usable from all threads.
#[derive(Clone)]
pub struct Tokenizer {
    parts: Arc<TokenizerParts>,
    max_text_bytes: usize,
}

/// Ids with a meaning of their own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SpecialIds {
    pub(crate) bos: Option<u32>,
    /// Every id that ends an answer, the tokenizer's own first.
    pub(crate) eos: Vec<u32>,
    pub(crate) padding: Option<u32>,
    pub(crate) unknown: Option<u32>,
}

/// What the loaders hand over.
pub(crate) struct TokenizerParts {
    pub(crate) engine: Engine,
    pub(crate) vocabulary: Vocabulary,
    pub(crate) decoding: Decoding,
    pub(crate) special: SpecialIds,
    /// Ids put before and behind a text on request, where the engine does not do it.
    pub(crate) prefix: Vec<u32>,
    pub(crate) suffix: Vec<u32>,
}

impl Tokenizer {
    pub(crate) fn new(parts: TokenizerParts) -> Self {
        Self { parts: Arc::new(parts), max_text_bytes: DEFAULT_MAX_TEXT_BYTES }
    }

    /// The same tokenizer with another cap on the bytes of a text.
    #[must_use]
    pub fn with_max_text_bytes(mut self, max_text_bytes: usize) -> Self {
        self.max_text_bytes = max_text_bytes;
        self
    }

    /// Ids of a text. The text of a special token (such as `<|im_end|>`) becomes that token.
    /// `add_special` adds what the model wants around a text (BOS, EOS).
    ///
    /// # Errors
    /// [`TextError::TextTooLong`], [`TextError::WhitespaceRun`], or the library's error.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoded = self.encode_by(text, add_special, true)?;
        if !add_special {
            return Ok(encoded);
        }
        let parts = &self.parts;
        Ok([parts.prefix.as_slice(), &encoded, &parts.suffix].concat())
    }

    /// Ids of a text, without anything around it. `allow_special` says whether the text of a
    /// special token becomes that token (as prompts and rendered templates need) or is cut like
    /// any other text (for text that must not be able to forge a turn).
    ///
    /// # Errors
    /// [`TextError::TextTooLong`], [`TextError::WhitespaceRun`], or the library's error.
    pub fn encode_with_special_parsing(&self, text: &str, allow_special: bool) -> Result<Vec<u32>> {
        self.encode_by(text, false, allow_special)
    }

    fn encode_by(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<u32>> {
        if text.len() > self.max_text_bytes {
            return Err(TextError::TextTooLong { bytes: text.len(), limit_bytes: self.max_text_bytes });
        }
        check_whitespace(text)?;
        self.parts.engine.encode(text, add_special, parse_special)
    }

    /// Text of ids; invalid UTF-8 becomes U+FFFD. Ids that stand for nothing give no text.
    /// `skip_special` leaves out special tokens.
    ///
    /// # Errors
    /// The library's error.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        let parts = &self.parts;
        let Decoding::Bytes(start) = parts.decoding else {
            return parts.engine.decode(ids, skip_special);
        };
        let mut text = String::with_capacity(ids.len() * 4);
        let mut bytes = ByteText::new(start);
        for &id in ids {
            if self.is_known(id) && !(skip_special && self.is_special(id)) {
                bytes.push(self.token_bytes(id), &mut text);
            }
        }
        bytes.finish(&mut text);
        Ok(text)
    }

    /// The raw bytes a token stands for, perhaps a part of a character; none for an id that
    /// stands for nothing. For `logprobs`' `bytes`.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.parts.vocabulary.bytes(id)
    }

    /// [`Self::token_bytes`] as text, with U+FFFD for what is no character.
    pub fn token_text(&self, id: u32) -> String {
        String::from_utf8_lossy(self.token_bytes(id)).into_owned()
    }

    /// The token as the vocabulary writes it, such as `Ġthe`.
    pub fn token_name(&self, id: u32) -> Option<String> {
        self.parts.engine.id_to_token(id)
    }

    /// The id of a token as the vocabulary writes it, such as `<|im_end|>` or `Ġthe`.
    pub fn token_id(&self, name: &str) -> Option<u32> {
        self.parts.engine.token_to_id(name)
    }

    /// Highest id plus one; a model's logits may have more rows, which stand for nothing.
    pub fn vocab_size(&self) -> usize {
        self.parts.vocabulary.size()
    }

    /// Whether an id stands for a token.
    pub fn is_known(&self, id: u32) -> bool {
        self.parts.vocabulary.is_known(id)
    }

    /// Whether a token is a special one, left out of text meant for people.
    pub fn is_special(&self, id: u32) -> bool {
        self.parts.vocabulary.is_special(id)
    }

    /// Every id that ends an answer.
    pub fn eos_ids(&self) -> &[u32] {
        &self.parts.special.eos
    }

    /// The id that starts a text.
    pub fn bos_id(&self) -> Option<u32> {
        self.parts.special.bos
    }

    /// The id for padding.
    pub fn padding_id(&self) -> Option<u32> {
        self.parts.special.padding
    }

    /// The id for what the vocabulary cannot express.
    pub fn unknown_id(&self) -> Option<u32> {
        self.parts.special.unknown
    }

    /// Hex digest of ids, tokens and special flags: equal digests, equal vocabularies.
    pub fn vocabulary_digest(&self) -> &str {
        self.parts.vocabulary.digest()
    }

    pub(crate) fn decoding(&self) -> Decoding {
        self.parts.decoding
    }
}

/// Refuses what [`MAX_WHITESPACE_RUN`] is about.
fn check_whitespace(text: &str) -> Result<()> {
    if text.len() <= MAX_WHITESPACE_RUN {
        return Ok(());
    }
    let longest = text.split(|character: char| !character.is_whitespace()).map(|run| run.chars().count()).max().unwrap_or(0);
    if longest > MAX_WHITESPACE_RUN {
        return Err(TextError::WhitespaceRun { characters: longest, limit: MAX_WHITESPACE_RUN });
    }
    Ok(())
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("decoding", &self.decoding())
            .field("special", &self.parts.special)
            .finish_non_exhaustive()
    }
}
