//! [`ModelText`]: everything of a model that concerns text, from one source.

use std::path::Path;

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
        let tokenizer = Tokenizer::from_hugging_face(files)?;
        todo!("{tokenizer:?}")
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
        let texts = match &self.chat_template {
            Ok(template) => template.special_tokens().clone(),
            Err(_) => Default::default(),
        };
        self.chat_template = Ok(ChatTemplate::new(source, texts)?);
        self.tool_template = None;
        Ok(self)
    }
}
