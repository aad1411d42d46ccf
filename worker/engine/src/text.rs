//! The tokenizer and chat template of an opened model, whichever format it has.
//!
//! The model crate knows no text and the text crate no model file: this crate knows both, and hands the one's
//! metadata to the other.

use std::path::Path;

use forge_model::{GgufTokenizerData, Model};
use forge_text::{GgufTokenizer, ModelText, TextError, Tokenizer};

use crate::EngineError;

/// Reads the text side of a model opened at `path`: from a GGUF file's own metadata, or from the files of a Hugging
/// Face folder.
///
/// # Errors
/// A tokenizer that is missing, malformed or of a kind that is not supported.
pub fn open_text(model: &Model, path: &Path) -> Result<ModelText, EngineError> {
    let text = match model.gguf_tokenizer()? {
        Some(data) => ModelText::from_gguf(&gguf_tokenizer(data))?,
        None => ModelText::from_hugging_face_folder(model.checkpoint().folder().unwrap_or(path))?,
    };
    check_ids(text.tokenizer(), model.architecture().vocab_size)?;
    Ok(text)
}

/// The text crate's form of a GGUF file's tokenizer.
pub fn gguf_tokenizer(data: GgufTokenizerData) -> GgufTokenizer {
    GgufTokenizer {
        name: data.name,
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
        remove_extra_whitespaces: data.remove_extra_whitespaces,
        precompiled_charsmap: data.precompiled_charsmap,
        chat_template: data.chat_template,
    }
}

/// Most tokens without a row, beside a sixteenth of the rows.
const MAX_BEHIND: usize = 1024;

/// Ids that begin or end a text must have a row in the model. A few others may lie behind its last row (image tokens of
/// a model without its image part do): a request that brings one is refused. More than these are another model's.
fn check_ids(tokenizer: &Tokenizer, vocab_size: usize) -> Result<(), TextError> {
    let behind = tokenizer.vocab_size().saturating_sub(vocab_size);
    if behind > MAX_BEHIND + vocab_size / 16 {
        return Err(TextError::Invalid {
            field: "vocabulary".to_owned(),
            reason: format!(
                "it has {} tokens and the model {vocab_size} rows for them; take tokenizer and weights from one source",
                tokenizer.vocab_size()
            ),
        });
    }
    for (field, ids) in [("eos_token_id", tokenizer.eos_ids()), ("bos_token_id", tokenizer.bos_id().as_slice())] {
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab_size) {
            return Err(TextError::Invalid {
                field: field.to_owned(),
                reason: format!("{id} is outside the model's vocabulary of {vocab_size}; take tokenizer and weights from one source"),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_end_or_begin_a_text_need_a_row_in_the_model() {
        let tokenizer = Tokenizer::from_gguf(&GgufTokenizer {
            model: "gpt2".to_owned(),
            pre: "gpt-2".to_owned(),
            tokens: ["a", "b", "ab", "<end>"].map(str::to_owned).to_vec(),
            merges: vec!["a b".to_owned()],
            bos_id: Some(1),
            eos_id: Some(3),
            ..GgufTokenizer::default()
        })
        .unwrap();
        assert_eq!(check_ids(&tokenizer, 4), Ok(()));
        let message = check_ids(&tokenizer, 3).unwrap_err().to_string();
        assert!(message.contains("eos_token_id: 3 is outside the model's vocabulary of 3"), "{message}");
        let tokens = (0..1200).map(|id| format!("t{id}")).collect();
        let another = GgufTokenizer { model: "llama".to_owned(), tokens, scores: Some(vec![0.0; 1200]), ..GgufTokenizer::default() };
        let another = Tokenizer::from_gguf(&another).unwrap();
        assert_eq!(check_ids(&another, 200), Ok(()));
        let message = check_ids(&another, 100).unwrap_err().to_string();
        assert!(message.contains("1200 tokens and the model 100 rows"), "{message}");
    }
}
