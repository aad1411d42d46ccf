//! Everything between text and token ids: tokenizers, chat templates, incremental
//! detokenization, stop strings and prefix block hashes.
//!
//! It reads bytes and folders handed to it and nothing else: no network, no weights, no clock
//! (a template's clock is an argument). Every type is deterministic, so a replay of the same
//! request on another machine sees the same ids and the same text.
//!
//! | you want | use |
//! |---|---|
//! | all text parts of a model | [`ModelText`] |
//! | the same in another process | [`ModelText::to_portable`] |
//! | text to ids and back | [`Tokenizer`] |
//! | text of a token stream, never broken UTF-8 | [`IncrementalDecoder`] |
//! | stop strings over that text | [`StopMatcher`] |
//! | messages to a prompt | [`ChatTemplate`] |
//! | keys of the prefix cache | [`PrefixHasher`] |

mod decoding;
mod engine;
mod error;
mod gguf;
mod hugging_face;
mod incremental;
mod model_text;
mod portable;
mod prefix_hash;
mod sentencepiece;
mod stop;
mod template;
mod tokenizer;
mod vocabulary;

pub use error::TextError;
pub use gguf::{GgufTokenizer, supported_gguf_pre_tokenizers};
pub use hugging_face::HuggingFaceFiles;
pub use incremental::IncrementalDecoder;
pub use model_text::ModelText;
pub use portable::MAX_PORTABLE_BYTES;
pub use prefix_hash::{PrefixHash, PrefixHasher};
pub use stop::{StopMatcher, StopOutcome};
pub use template::{ChatRender, ChatTemplate, ContentFormat, TemplateLimits};
pub use tokenizer::{DEFAULT_MAX_TEXT_BYTES, Tokenizer};

/// The result of everything fallible here.
pub type Result<T> = std::result::Result<T, TextError>;
