//! The portable form of a [`ModelText`]: the bytes by which another process builds the same tokenizer and templates.
//!
//! ```text
//! "FORGETXT"  version (u32, little endian)  protobuf message [`PortableProto`]
//! ```
//!
//! It carries the sources as they were read, never what was built from them: whoever receives it runs the same checks
//! as whoever reads files.
//!
//! Invariant: what [`ModelText::from_portable`] builds gives the same ids, texts and renderings as the original, and
//! has the same portable form.

use std::sync::Arc;

use prost::Message;

use crate::{GgufTokenizer, HuggingFaceFiles, ModelText, Result, TextError};

/// Most bytes of a portable form: the largest published tokenizers have some 40 MB.
pub const MAX_PORTABLE_BYTES: usize = 320 << 20;

const MAGIC: &[u8; 8] = b"FORGETXT";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = MAGIC.len() + 4;

/// Where a model's text comes from.
#[derive(Clone, Debug)]
pub(crate) enum TextSource {
    HuggingFace(Arc<HuggingFaceFiles>),
    Gguf(Arc<GgufTokenizer>),
}

#[derive(Clone, PartialEq, Message)]
struct PortableProto {
    #[prost(message, optional, tag = "1")]
    hugging_face: Option<FilesProto>,
    #[prost(message, optional, tag = "2")]
    gguf: Option<GgufProto>,
    /// Replaces the model's own templates.
    #[prost(string, optional, tag = "3")]
    chat_template: Option<String>,
}

#[derive(Clone, PartialEq, Message)]
struct FilesProto {
    #[prost(bytes = "vec", optional, tag = "1")]
    tokenizer_json: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "2")]
    tokenizer_model: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "3")]
    vocab_json: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "4")]
    merges_txt: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "5")]
    added_tokens_json: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "6")]
    tokenizer_config: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "7")]
    special_tokens_map: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "8")]
    generation_config: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "9")]
    config: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "10")]
    chat_template_jinja: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "11")]
    chat_template_json: Option<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
struct GgufProto {
    #[prost(string, optional, tag = "1")]
    name: Option<String>,
    #[prost(string, tag = "2")]
    model: String,
    #[prost(string, tag = "3")]
    pre: String,
    #[prost(string, repeated, tag = "4")]
    tokens: Vec<String>,
    #[prost(int32, repeated, tag = "5")]
    token_types: Vec<i32>,
    /// No scores and a list of none are two things.
    #[prost(message, optional, tag = "6")]
    scores: Option<ScoresProto>,
    #[prost(string, repeated, tag = "7")]
    merges: Vec<String>,
    #[prost(uint32, optional, tag = "8")]
    bos_id: Option<u32>,
    #[prost(uint32, optional, tag = "9")]
    eos_id: Option<u32>,
    #[prost(uint32, optional, tag = "10")]
    eot_id: Option<u32>,
    #[prost(uint32, optional, tag = "11")]
    unknown_id: Option<u32>,
    #[prost(uint32, optional, tag = "12")]
    padding_id: Option<u32>,
    #[prost(bool, optional, tag = "13")]
    add_bos_token: Option<bool>,
    #[prost(bool, optional, tag = "14")]
    add_eos_token: Option<bool>,
    #[prost(bool, optional, tag = "15")]
    add_space_prefix: Option<bool>,
    #[prost(bool, optional, tag = "16")]
    remove_extra_whitespaces: Option<bool>,
    #[prost(bytes = "vec", optional, tag = "17")]
    precompiled_charsmap: Option<Vec<u8>>,
    #[prost(string, optional, tag = "18")]
    chat_template: Option<String>,
}

#[derive(Clone, PartialEq, Message)]
struct ScoresProto {
    #[prost(float, repeated, tag = "1")]
    scores: Vec<f32>,
}

/// Turns a struct into its message or back, field by field under the same names.
macro_rules! by_fields {
    ($from:expr => $to:ident { $($field:ident),* }) => {{
        let from = $from;
        $to { $($field: from.$field),* }
    }};
}

impl From<HuggingFaceFiles> for FilesProto {
    fn from(files: HuggingFaceFiles) -> Self {
        by_fields!(files => FilesProto {
            tokenizer_json, tokenizer_model, vocab_json, merges_txt, added_tokens_json, tokenizer_config, special_tokens_map,
            generation_config, config, chat_template_jinja, chat_template_json
        })
    }
}

impl From<FilesProto> for HuggingFaceFiles {
    fn from(files: FilesProto) -> Self {
        by_fields!(files => HuggingFaceFiles {
            tokenizer_json, tokenizer_model, vocab_json, merges_txt, added_tokens_json, tokenizer_config, special_tokens_map,
            generation_config, config, chat_template_jinja, chat_template_json
        })
    }
}

impl From<GgufTokenizer> for GgufProto {
    fn from(data: GgufTokenizer) -> Self {
        GgufProto {
            name: data.name,
            model: data.model,
            pre: data.pre,
            tokens: data.tokens,
            token_types: data.token_types,
            scores: data.scores.map(|scores| ScoresProto { scores }),
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
}

impl From<GgufProto> for GgufTokenizer {
    fn from(data: GgufProto) -> Self {
        GgufTokenizer {
            name: data.name,
            model: data.model,
            pre: data.pre,
            tokens: data.tokens,
            token_types: data.token_types,
            scores: data.scores.map(|scores| scores.scores),
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
}

impl ModelText {
    /// The bytes by which another process builds the same. Equal models have equal bytes.
    ///
    /// # Errors
    /// [`TextError::Invalid`] where they would be more than [`MAX_PORTABLE_BYTES`].
    pub fn to_portable(&self) -> Result<Vec<u8>> {
        let (hugging_face, gguf) = match &self.source {
            TextSource::HuggingFace(files) => (Some(FilesProto::from((**files).clone())), None),
            TextSource::Gguf(data) => (None, Some(GgufProto::from((**data).clone()))),
        };
        let message = PortableProto { hugging_face, gguf, chat_template: self.replaced_template.clone() };
        let total_bytes = HEADER_BYTES + message.encoded_len();
        if total_bytes > MAX_PORTABLE_BYTES {
            return Err(invalid(format!("it has {total_bytes} bytes, more than the limit of {MAX_PORTABLE_BYTES}")));
        }
        let mut bytes = Vec::with_capacity(total_bytes);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&message.encode_to_vec());
        Ok(bytes)
    }

    /// Builds what [`Self::to_portable`] was called on.
    ///
    /// # Errors
    /// [`TextError::Invalid`] for bytes that are no portable form, of another version, or too many; else as for reading
    /// the model's files.
    pub fn from_portable(bytes: &[u8]) -> Result<Self> {
        if bytes.len() > MAX_PORTABLE_BYTES {
            return Err(invalid(format!("it has {} bytes, more than the limit of {MAX_PORTABLE_BYTES}", bytes.len())));
        }
        let Some(rest) = bytes.strip_prefix(MAGIC) else {
            return Err(invalid("it does not begin as one".to_owned()));
        };
        let Some((version, rest)) = rest.split_first_chunk::<4>() else {
            return Err(invalid("it ends within its header".to_owned()));
        };
        let version = u32::from_le_bytes(*version);
        if version != VERSION {
            return Err(invalid(format!(
                "it has version {version}, and this program knows {VERSION}: run the same release on gateways and workers"
            )));
        }
        let message = PortableProto::decode(rest).map_err(|error| invalid(error.to_string()))?;
        let text = match (message.hugging_face, message.gguf) {
            (Some(files), None) => Self::from_hugging_face(&files.into())?,
            (None, Some(data)) => Self::from_gguf(&data.into())?,
            _ => return Err(invalid("it must hold either files or GGUF metadata".to_owned())),
        };
        match &message.chat_template {
            Some(template) => text.with_chat_template(template),
            None => Ok(text),
        }
    }
}

fn invalid(reason: String) -> TextError {
    TextError::invalid("portable form of a tokenizer", reason)
}
