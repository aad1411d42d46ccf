//! The tokenizer's part of a GGUF file, as plain data: building a tokenizer of it is forge-text's.

use super::metadata::{Metadata, config_error};
use crate::error::Result;

/// The tokenizer's part of the metadata (`tokenizer.ggml.*`), field by field, unchecked but for types.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GgufTokenizerData {
    /// `general.name`.
    pub name: Option<String>,
    /// `tokenizer.ggml.model`; `gpt2` is byte-level BPE, `llama` SentencePiece.
    pub model: String,
    /// `tokenizer.ggml.pre`: how text is cut into words; empty where absent.
    pub pre: String,
    /// `tokenizer.ggml.tokens`, by id.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.token_type`, by id; empty where absent.
    pub token_types: Vec<i32>,
    /// `tokenizer.ggml.scores`.
    pub scores: Option<Vec<f32>>,
    /// `tokenizer.ggml.merges`, best first; empty where absent.
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
    /// `tokenizer.ggml.add_bos_token`.
    pub add_bos_token: Option<bool>,
    /// `tokenizer.ggml.add_eos_token`.
    pub add_eos_token: Option<bool>,
    /// `tokenizer.ggml.add_space_prefix`.
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.ggml.remove_extra_whitespaces`.
    pub remove_extra_whitespaces: Option<bool>,
    /// `tokenizer.ggml.precompiled_charsmap`.
    pub precompiled_charsmap: Option<Vec<u8>>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
}

impl GgufTokenizerData {
    /// Takes the tokenizer's keys from a file's metadata.
    ///
    /// # Errors
    /// A key of another type; `tokenizer.ggml.model` or `.tokens` missing.
    pub fn from_metadata(metadata: &Metadata) -> Result<Self> {
        let required = |key: &str| config_error(key, "is missing: the file has no tokenizer; take a complete conversion");
        let model = metadata.optional_string("tokenizer.ggml.model")?.ok_or_else(|| required("tokenizer.ggml.model"))?;
        let tokens = metadata.optional_strings("tokenizer.ggml.tokens")?.ok_or_else(|| required("tokenizer.ggml.tokens"))?;
        Ok(GgufTokenizerData {
            name: metadata.optional_string("general.name")?.map(str::to_owned),
            model: model.to_owned(),
            pre: metadata.optional_string("tokenizer.ggml.pre")?.unwrap_or_default().to_owned(),
            tokens: tokens.to_vec(),
            token_types: metadata.optional_i32s("tokenizer.ggml.token_type")?.unwrap_or_default(),
            scores: metadata.optional_f32s("tokenizer.ggml.scores")?.map(<[f32]>::to_vec),
            merges: metadata.optional_strings("tokenizer.ggml.merges")?.unwrap_or_default().to_vec(),
            bos_id: metadata.optional_u32("tokenizer.ggml.bos_token_id")?,
            eos_id: metadata.optional_u32("tokenizer.ggml.eos_token_id")?,
            eot_id: metadata.optional_u32("tokenizer.ggml.eot_token_id")?,
            unknown_id: metadata.optional_u32("tokenizer.ggml.unknown_token_id")?,
            padding_id: metadata.optional_u32("tokenizer.ggml.padding_token_id")?,
            add_bos_token: metadata.optional_bool("tokenizer.ggml.add_bos_token")?,
            add_eos_token: metadata.optional_bool("tokenizer.ggml.add_eos_token")?,
            add_space_prefix: metadata.optional_bool("tokenizer.ggml.add_space_prefix")?,
            remove_extra_whitespaces: metadata.optional_bool("tokenizer.ggml.remove_extra_whitespaces")?,
            precompiled_charsmap: metadata.optional_bytes("tokenizer.ggml.precompiled_charsmap")?,
            chat_template: metadata.optional_string("tokenizer.chat_template")?.map(str::to_owned),
        })
    }
}
