//! [`ModelText`]: everything of a model that concerns text, from one source.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use crate::hugging_face::{SideFiles, parse_object};
use crate::portable::TextSource;
use crate::{ChatTemplate, GgufTokenizer, HuggingFaceFiles, Result, TextError, Tokenizer};

/// A model's tokenizer and chat templates.
///
/// A template that does not compile is no reason not to serve completions, so its error is kept
/// and given to those who ask for the template.
#[derive(Clone, Debug)]
pub struct ModelText {
    tokenizer: Tokenizer,
    chat_template: Result<ChatTemplate>,
    tool_template: Option<Result<ChatTemplate>>,
    special_tokens: BTreeMap<String, String>,
    /// What it was built from.
    pub(crate) source: TextSource,
    /// The template that took the model's own place.
    pub(crate) replaced_template: Option<String>,
}

/// Template texts of a Hugging Face folder.
#[derive(Default)]
struct TemplateSources {
    chat: Option<String>,
    tools: Option<String>,
}

impl TemplateSources {
    /// `chat_template.jinja` counts before `chat_template.json`, this before the field
    /// `chat_template` of `tokenizer_config.json`.
    fn find(files: &HuggingFaceFiles, side: &SideFiles) -> Result<Self> {
        if let Some(bytes) = &files.chat_template_jinja {
            let source = String::from_utf8(bytes.clone()).map_err(|error| TextError::invalid("chat_template.jinja", error))?;
            return Ok(Self { chat: Some(source), tools: None });
        }
        if let Some(bytes) = &files.chat_template_json {
            let file = parse_object("chat_template.json", bytes)?;
            return Self::of("chat_template.json", file.get("chat_template"));
        }
        Self::of("tokenizer_config.json", side.tokenizer_config.get("chat_template"))
    }

    /// One template as a string, or a list of `{name, template}`.
    fn of(file: &str, value: Option<&Value>) -> Result<Self> {
        let wrong = || TextError::invalid(format!("{file}: chat_template"), "expected a string or a list of {name, template}");
        match value {
            None | Some(Value::Null) => Ok(Self::default()),
            Some(Value::String(source)) => Ok(Self { chat: Some(source.clone()), tools: None }),
            Some(Value::Array(named)) => {
                let mut sources = Self::default();
                for entry in named {
                    let source = entry["template"].as_str().ok_or_else(wrong)?.to_string();
                    match entry["name"].as_str().ok_or_else(wrong)? {
                        "default" => sources.chat = Some(source),
                        "tool_use" => sources.tools = Some(source),
                        // Others (`rag`, …) are for uses that the API does not have.
                        _ => {}
                    }
                }
                Ok(sources)
            }
            Some(_) => Err(wrong()),
        }
    }
}

impl ModelText {
    /// From a Hugging Face folder.
    ///
    /// # Errors
    /// As for [`HuggingFaceFiles::read`] and [`Tokenizer::from_hugging_face`].
    pub fn from_hugging_face_folder(folder: &Path) -> Result<Self> {
        Self::from_hugging_face(&HuggingFaceFiles::read(folder)?)
    }

    /// From the files of a Hugging Face folder.
    ///
    /// # Errors
    /// As for [`Tokenizer::from_hugging_face`].
    pub fn from_hugging_face(files: &HuggingFaceFiles) -> Result<Self> {
        let side = SideFiles::parse(files)?;
        let sources = TemplateSources::find(files, &side)?;
        let texts = side.special_token_texts();
        Ok(Self {
            tokenizer: Tokenizer::from_hugging_face(files)?,
            chat_template: match &sources.chat {
                Some(source) => ChatTemplate::new(source, texts.clone()),
                None => Err(TextError::NoChatTemplate),
            },
            tool_template: sources.tools.map(|source| ChatTemplate::new(&source, texts)),
            special_tokens: side.special_token_texts(),
            source: TextSource::HuggingFace(Arc::new(files.clone())),
            replaced_template: None,
        })
    }

    /// From GGUF metadata.
    ///
    /// # Errors
    /// As for [`Tokenizer::from_gguf`].
    pub fn from_gguf(metadata: &GgufTokenizer) -> Result<Self> {
        Ok(Self {
            tokenizer: Tokenizer::from_gguf(metadata)?,
            chat_template: match &metadata.chat_template {
                Some(source) => ChatTemplate::new(source, metadata.special_token_texts()),
                None => Err(TextError::NoChatTemplate),
            },
            tool_template: None,
            special_tokens: metadata.special_token_texts(),
            source: TextSource::Gguf(Arc::new(metadata.clone())),
            replaced_template: None,
        })
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The template for messages.
    ///
    /// # Errors
    /// [`TextError::NoChatTemplate`] or [`TextError::TemplateInvalid`].
    pub fn chat_template(&self) -> Result<&ChatTemplate> {
        self.chat_template.as_ref().map_err(Clone::clone)
    }

    /// The template for messages with tools: the one named `tool_use` where the model has it,
    /// else the same as without tools.
    ///
    /// # Errors
    /// As for [`Self::chat_template`].
    pub fn tool_template(&self) -> Result<&ChatTemplate> {
        match &self.tool_template {
            Some(template) => template.as_ref().map_err(Clone::clone),
            None => self.chat_template(),
        }
    }

    /// The same with another chat template (`--chat-template`), for messages with and without
    /// tools.
    ///
    /// # Errors
    /// [`TextError::TemplateInvalid`].
    pub fn with_chat_template(mut self, source: &str) -> Result<Self> {
        self.chat_template = Ok(ChatTemplate::new(source, self.special_tokens.clone())?);
        self.tool_template = None;
        self.replaced_template = Some(source.to_owned());
        Ok(self)
    }
}
