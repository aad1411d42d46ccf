//! What turns text into ids: the `tokenizers` library, or our own SentencePiece.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;

use crate::sentencepiece::SentencePiece;
use crate::{Result, TextError};

/// One of the two.
pub(crate) enum Engine {
    Library(Box<Library>),
    SentencePiece(Box<SentencePiece>),
}

/// The library's tokenizer.
pub(crate) struct Library {
    tokenizer: tokenizers::Tokenizer,
    /// The same that takes special tokens' text for plain text; built on first use.
    without_special: OnceLock<tokenizers::Tokenizer>,
}

impl From<tokenizers::Tokenizer> for Engine {
    fn from(tokenizer: tokenizers::Tokenizer) -> Self {
        Self::Library(Box::new(Library { tokenizer, without_special: OnceLock::new() }))
    }
}

impl From<SentencePiece> for Engine {
    fn from(model: SentencePiece) -> Self {
        Self::SentencePiece(Box::new(model))
    }
}

impl Engine {
    /// Ids of a text; with `parse_special` the text of special tokens becomes those tokens.
    /// `add_special` applies the library's own post-processor; SentencePiece has none.
    pub(crate) fn encode(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<u32>> {
        let library = match self {
            Self::SentencePiece(model) => return model.encode(text, parse_special),
            Self::Library(library) if parse_special => &library.tokenizer,
            Self::Library(library) => library.without_special(),
        };
        // Some damaged files make the library panic on some texts only; it keeps nothing that a panic leaves half-changed.
        let encoded = catch_unwind(AssertUnwindSafe(|| library.encode_fast(text, add_special)));
        let encoded = encoded.map_err(|_| TextError::Tokenize { action: "encode", reason: "the tokenizer's files are damaged".into() })?;
        Ok(encoded.map_err(|error| failed("encode", &error))?.get_ids().to_vec())
    }

    /// Text of ids by the library's decoder, for vocabularies whose text is not their bytes.
    pub(crate) fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        match self {
            Self::Library(library) => library.tokenizer.decode(ids, skip_special).map_err(|error| failed("decode", &error)),
            Self::SentencePiece(_) => Ok(String::new()),
        }
    }

    pub(crate) fn token_to_id(&self, name: &str) -> Option<u32> {
        match self {
            Self::Library(library) => library.tokenizer.token_to_id(name),
            Self::SentencePiece(model) => model.id(name),
        }
    }

    pub(crate) fn id_to_token(&self, id: u32) -> Option<String> {
        match self {
            Self::Library(library) => library.tokenizer.id_to_token(id),
            Self::SentencePiece(model) => model.name(id).map(str::to_owned),
        }
    }
}

impl Library {
    fn without_special(&self) -> &tokenizers::Tokenizer {
        self.without_special.get_or_init(|| {
            let mut tokenizer = self.tokenizer.clone();
            tokenizer.set_encode_special_tokens(true);
            tokenizer
        })
    }
}

fn failed(action: &'static str, error: &tokenizers::Error) -> TextError {
    TextError::Tokenize { action, reason: error.to_string() }
}
