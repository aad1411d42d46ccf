//! The files of a model's folder that concern text, as bytes.

use std::io::Read;
use std::path::Path;

use crate::{Result, TextError};

/// Largest `tokenizer.json`, and of the files that stand for it; the largest published ones have some 35 MB.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;
/// Largest `tokenizer.model`. The largest published ones have 5 MB.
const MAX_MODEL_BYTES: u64 = 16 << 20;
/// Largest of the other files.
const MAX_SIDE_FILE_BYTES: u64 = 16 << 20;

/// The files of a model's folder that concern text, as read.
#[derive(Clone, Debug, Default)]
pub struct HuggingFaceFiles {
    /// `tokenizer.json`; where it is there, the vocabulary is read from it alone.
    pub tokenizer_json: Option<Vec<u8>>,
    /// `tokenizer.model`: a SentencePiece model.
    pub tokenizer_model: Option<Vec<u8>>,
    /// `vocab.json`, which goes with `merges.txt`: byte-level BPE.
    pub vocab_json: Option<Vec<u8>>,
    /// `merges.txt`.
    pub merges_txt: Option<Vec<u8>>,
    /// `added_tokens.json`: tokens behind the vocabulary of the two kinds above.
    pub added_tokens_json: Option<Vec<u8>>,
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
    /// Reads those files of a folder that are there; one kind of tokenizer must be.
    ///
    /// # Errors
    /// [`TextError::Read`] for a file that is missing, unreadable or far too large.
    pub fn read(folder: &Path) -> Result<Self> {
        let side = |name: &str| read_file(&folder.join(name), MAX_SIDE_FILE_BYTES);
        let tokenizer = |name: &str| read_file(&folder.join(name), MAX_TOKENIZER_BYTES);
        let files = Self {
            tokenizer_json: tokenizer("tokenizer.json")?,
            tokenizer_model: read_file(&folder.join("tokenizer.model"), MAX_MODEL_BYTES)?,
            vocab_json: tokenizer("vocab.json")?,
            merges_txt: tokenizer("merges.txt")?,
            added_tokens_json: side("added_tokens.json")?,
            tokenizer_config: side("tokenizer_config.json")?,
            special_tokens_map: side("special_tokens_map.json")?,
            generation_config: side("generation_config.json")?,
            config: side("config.json")?,
            chat_template_jinja: side("chat_template.jinja")?,
            chat_template_json: side("chat_template.json")?,
        };
        if files.has_tokenizer() {
            return Ok(files);
        }
        Err(TextError::Read {
            path: folder.join("tokenizer.json").display().to_string(),
            reason: "it is missing; a Hugging Face folder needs a tokenizer.json, a tokenizer.model, or vocab.json with merges.txt"
                .to_string(),
        })
    }

    fn has_tokenizer(&self) -> bool {
        self.tokenizer_json.is_some() || self.tokenizer_model.is_some() || (self.vocab_json.is_some() && self.merges_txt.is_some())
    }
}

/// The bytes of a file, `None` where there is none.
fn read_file(path: &Path, limit_bytes: u64) -> Result<Option<Vec<u8>>> {
    let failed = |reason: String| TextError::Read { path: path.display().to_string(), reason };
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error.to_string())),
    };
    let mut bytes = Vec::new();
    file.take(limit_bytes + 1).read_to_end(&mut bytes).map_err(|error| failed(error.to_string()))?;
    if bytes.len() as u64 > limit_bytes {
        return Err(failed(format!("it has more than {limit_bytes} bytes")));
    }
    Ok(Some(bytes))
}
