//! The tokenizer and chat template of an opened model, whichever format it has.
//!
//! The model crate knows no text and the text crate no model file: this crate knows both, and hands the one's
//! metadata to the other.

use std::path::Path;

use forge_model::Model;
use forge_text::{GgufTokenizer, ModelText};

use crate::EngineError;

/// Reads the text side of a model opened at `path`: from a GGUF file's own metadata, or from the files of a Hugging
/// Face folder.
///
/// # Errors
/// A tokenizer that is missing, malformed or of a kind that is not supported.
pub fn open_text(model: &Model, path: &Path) -> Result<ModelText, EngineError> {
    let Some(data) = model.gguf_tokenizer()? else {
        return Ok(ModelText::from_hugging_face_folder(path)?);
    };
    Ok(ModelText::from_gguf(&GgufTokenizer {
        model: data.model,
        pre: data.pre,
        tokens: data.tokens,
        token_types: data.token_types,
        scores: data.scores,
        merges: data.merges,
        bos_id: data.bos_id,
        eos_id: data.eos_id,
        eot_id: data.eot_id,
        unknown_id: data.unknown_id,
        padding_id: data.padding_id,
        add_bos_token: data.add_bos_token,
        add_eos_token: data.add_eos_token,
        add_space_prefix: data.add_space_prefix,
        chat_template: data.chat_template,
    })?)
}
