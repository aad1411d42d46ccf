//! Tokenizers from Hugging Face files: `tokenizer.json` and the small files around it.

use std::path::Path;

use crate::{Result, Tokenizer};

/// The files of a model's folder that concern text, as read.
#[derive(Clone, Debug, Default)]
pub struct HuggingFaceFiles {
    /// `tokenizer.json`.
    pub tokenizer_json: Vec<u8>,
    /// `tokenizer_config.json`.
    pub tokenizer_config: Option<Vec<u8>>,
    /// `special_tokens_map.json`.
    pub special_tokens_map: Option<Vec<u8>>,
    /// `generation_config.json`.
    pub generation_config: Option<Vec<u8>>,
    /// `config.json`.
    pub config: Option<Vec<u8>>,
    /// `chat_template.jinja`.
    pub chat_template_jinja: Option<Vec<u8>>,
    /// `chat_template.json`.
    pub chat_template_json: Option<Vec<u8>>,
}

impl HuggingFaceFiles {
    /// Reads those files of a folder that are there; `tokenizer.json` must be.
    ///
    /// # Errors
    /// [`crate::TextError::Read`] for a file that is missing, unreadable or far too large.
    pub fn read(folder: &Path) -> Result<Self> {
        todo!("{folder:?}")
    }
}

impl Tokenizer {
    /// Builds the tokenizer of a Hugging Face model.
    ///
    /// # Errors
    /// [`crate::TextError::Invalid`] or [`crate::TextError::Unsupported`], naming file and field.
    pub fn from_hugging_face(files: &HuggingFaceFiles) -> Result<Self> {
        todo!("{files:?}")
    }
}
