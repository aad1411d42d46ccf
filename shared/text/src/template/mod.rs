//! Chat templates: messages to a prompt.
//!
//! Templates come with the model, not with the request, but their output depends on what users
//! send: they run without file or network access, with bounded instructions, nesting, output
//! and time. Invariant: the result is a function of the arguments; the clock is one of them.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Map, Value};

use crate::Result;

/// Bounds of one rendering.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TemplateLimits {
    /// Template instructions.
    pub fuel: u64,
    /// Nesting of macros and loops.
    pub recursion: usize,
    /// Bytes of the result.
    pub output_bytes: usize,
    /// Time for the whole rendering.
    pub time: Duration,
}

impl Default for TemplateLimits {
    fn default() -> Self {
        Self {
            fuel: 20_000_000,
            recursion: 100,
            output_bytes: 16 << 20,
            time: Duration::from_secs(5),
        }
    }
}

/// What a template expects as a message's `content`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContentFormat {
    /// A string. Lists of text parts are joined with newlines for it.
    String,
    /// A list of parts (`[{"type": "text", "text": …}]`). Strings are wrapped for it.
    Parts,
    /// Either.
    Both,
}

/// What is rendered. `Default` gives no messages, no tools and the clock at 1970.
#[derive(Clone, Copy, Debug, Default)]
pub struct ChatRender<'a> {
    /// OpenAI messages: objects with `role`, `content` (string, list of text parts, or null) and
    /// whatever else the template reads (`tool_calls`, `name`, …).
    pub messages: &'a [Value],
    /// OpenAI tools; `None` is the template's `none`.
    pub tools: Option<&'a [Value]>,
    /// Documents for retrieval templates; `None` is the template's `none`.
    pub documents: Option<&'a [Value]>,
    /// Ends the prompt with the start of an assistant message.
    pub add_generation_prompt: bool,
    /// Ends the prompt inside the last message, to be continued.
    pub continue_final_message: bool,
    /// The template's clock, seconds since 1970 UTC, for `strftime_now`.
    pub now_unix_seconds: i64,
    /// Further variables (`enable_thinking`, …); reserved names are refused.
    pub variables: Option<&'a Map<String, Value>>,
}

/// A compiled chat template. Cheap to clone, usable from all threads.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    special_tokens: BTreeMap<String, String>,
    limits: TemplateLimits,
}

impl ChatTemplate {
    /// Compiles a template. `special_tokens` are the variables `bos_token`, `eos_token`, … .
    ///
    /// # Errors
    /// [`crate::TextError::TemplateInvalid`].
    pub fn new(source: &str, special_tokens: BTreeMap<String, String>) -> Result<Self> {
        todo!("{source:?} {special_tokens:?}")
    }

    /// The same template with other bounds.
    #[must_use]
    pub fn with_limits(mut self, limits: TemplateLimits) -> Self {
        self.limits = limits;
        self
    }

    /// Renders a prompt.
    ///
    /// # Errors
    /// [`crate::TextError::TemplateRaised`] where the template refuses the messages,
    /// [`crate::TextError::TemplateFailed`], [`crate::TextError::TemplateLimit`], and
    /// [`crate::TextError::InvalidRequest`] for messages of the wrong shape.
    pub fn render(&self, request: &ChatRender<'_>) -> Result<String> {
        todo!("{request:?}")
    }

    /// What the template expects as content.
    pub fn content_format(&self) -> ContentFormat {
        todo!()
    }

    /// The template's text.
    pub fn source(&self) -> &str {
        todo!()
    }

    /// The variables with special tokens.
    pub fn special_tokens(&self) -> &BTreeMap<String, String> {
        &self.special_tokens
    }
}
