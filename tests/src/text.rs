//! The tokenizer and chat template of an opened model, whichever format it has.

use std::path::Path;

use anyhow::Result;
use forge_model::Model;
use forge_text::{GgufTokenizer, ModelText};

/// Reads the text side of a model: from the GGUF metadata, or from the files of the Hugging Face folder at `path`.
///
/// # Errors
/// A tokenizer that is missing, malformed or of a kind that is not supported.
pub fn open_text(model: &Model, path: &Path) -> Result<ModelText> {
    let Some(data) = model.gguf_tokenizer()? else {
        return Ok(ModelText::from_hugging_face_folder(path)?);
    };
    // The model crate knows no text and the text crate no files, so the fields are handed over here.
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
