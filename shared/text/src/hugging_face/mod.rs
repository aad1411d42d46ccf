//! Tokenizers from Hugging Face files: `tokenizer.json`, else `tokenizer.model`, else
//! `vocab.json` with `merges.txt`; and the small files around them.

mod byte_level;
mod files;
mod sentencepiece;
mod side_files;
mod tokenizer_json;

pub use files::HuggingFaceFiles;
pub(crate) use side_files::{SideFiles, parse_object};

use crate::tokenizer::Tokenizer;
use crate::{Result, TextError};

impl Tokenizer {
    /// Builds the tokenizer of a Hugging Face model.
    ///
    /// # Errors
    /// [`TextError::Invalid`] or [`TextError::Unsupported`], naming file and field.
    pub fn from_hugging_face(files: &HuggingFaceFiles) -> Result<Self> {
        let side = SideFiles::parse(files)?;
        let parts = match files {
            HuggingFaceFiles { tokenizer_json: Some(bytes), .. } => tokenizer_json::parts(bytes, &side),
            HuggingFaceFiles { tokenizer_model: Some(bytes), .. } => sentencepiece::parts(bytes, files.added_tokens_json.as_deref(), &side),
            HuggingFaceFiles { vocab_json: Some(vocabulary), merges_txt: Some(merges), .. } => {
                let json = byte_level::tokenizer_json(vocabulary, merges, files.added_tokens_json.as_deref(), &side)?;
                tokenizer_json::parts(&json, &side)
            }
            _ => Err(TextError::invalid("tokenizer.json", "it is missing, and so are tokenizer.model and vocab.json with merges.txt")),
        };
        Ok(Self::new(parts?))
    }
}
