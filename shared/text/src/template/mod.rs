//! Chat templates: messages to a prompt.
//!
//! Templates come with the model, not with the request, but their output depends on what users
//! send: they run without file or network access, with bounded instructions, nesting, output,
//! memory and time. Invariant: the result is a function of the arguments; the clock is one of them.
//!
//! They render as `transformers` renders them (jinja2 with `trim_blocks`, `lstrip_blocks`, loop
//! controls and its own `tojson`): `tests/fixtures/text/templates.json` holds its results.

mod constants;
mod content;
mod environment;
mod filters;
mod growth;
mod json;
mod meter;
mod metered;
mod nesting;
mod output;
mod python;
mod shape;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use minijinja::Environment;
use serde_json::{Map, Value};

use crate::{Result, TextError};
pub use content::ContentFormat;

/// Bounds of one rendering.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TemplateLimits {
    /// Template instructions.
    pub fuel: u64,
    /// Nesting of macros and loops.
    pub recursion: usize,
    /// Bytes of the result.
    pub output_bytes: usize,
    /// Bytes of all values that the template makes while rendering, freed ones included.
    pub memory_bytes: usize,
    /// Time for the whole rendering, looked at where the template writes, calls, compares or sets something.
    pub time: Duration,
}

impl Default for TemplateLimits {
    fn default() -> Self {
        Self { fuel: 10_000_000, recursion: 100, output_bytes: 16 << 20, memory_bytes: 256 << 20, time: Duration::from_secs(5) }
    }
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
    source: Arc<str>,
    environment: Arc<Environment<'static>>,
    special_tokens: Arc<BTreeMap<String, String>>,
    limits: TemplateLimits,
    content_format: ContentFormat,
}

/// Stands behind the last message's content while rendering, to find where it ends. The space
/// at its end tells whether the template trims content.
const CONTINUE_MARK: &str = "FORGE_CONTINUES_HERE ";

/// Variables that a request's `variables` must not replace.
const RESERVED: &[&str] = &[
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "strftime_now",
    "raise_exception",
    "chat_template",
    "bos_token",
    "eos_token",
];

impl ChatTemplate {
    /// Compiles a template. `special_tokens` are the variables `bos_token`, `eos_token`, … .
    ///
    /// # Errors
    /// [`TextError::TemplateInvalid`].
    pub fn new(source: &str, special_tokens: BTreeMap<String, String>) -> Result<Self> {
        let limits = TemplateLimits { fuel: content::PROBE_FUEL, memory_bytes: content::PROBE_BYTES, ..TemplateLimits::default() };
        let mut template = Self {
            source: source.into(),
            environment: Arc::new(environment::compile(source, &limits)?),
            special_tokens: Arc::new(special_tokens),
            limits,
            content_format: ContentFormat::Both,
        };
        template.content_format = content::detect(&template);
        Ok(template.with_limits(TemplateLimits::default()))
    }

    /// The same template with other bounds.
    #[must_use]
    pub fn with_limits(mut self, limits: TemplateLimits) -> Self {
        let mut environment = (*self.environment).clone();
        environment::set_limits(&mut environment, &limits);
        self.environment = Arc::new(environment);
        self.limits = limits;
        self
    }

    /// Renders a prompt.
    ///
    /// # Errors
    /// [`TextError::TemplateRaised`] where the template refuses the messages,
    /// [`TextError::TemplateFailed`], [`TextError::TemplateLimit`], and
    /// [`TextError::InvalidRequest`] for messages of the wrong shape.
    pub fn render(&self, request: &ChatRender<'_>) -> Result<String> {
        let mut messages = content::normalize(request.messages, self.content_format)?;
        if !request.continue_final_message {
            return self.render_messages(&messages, request);
        }
        if request.add_generation_prompt {
            return Err(TextError::InvalidRequest {
                field: "continue_final_message".to_string(),
                reason: "it cannot be combined with add_generation_prompt".to_string(),
            });
        }
        if !self.source.contains("content") {
            return Err(not_continuable());
        }
        let ending = content::mark_final_message(&mut messages, CONTINUE_MARK)?;
        let rendered = self.render_messages(&messages, request)?;
        cut_at_mark(rendered, &ending)
    }

    fn render_messages(&self, messages: &[Value], request: &ChatRender<'_>) -> Result<String> {
        let context = self.context(messages, request)?;
        output::render(&self.environment, context, &self.limits)
    }

    /// The template's variables.
    fn context(&self, messages: &[Value], request: &ChatRender<'_>) -> Result<minijinja::Value> {
        let list = |values: &[Value]| values.iter().map(json::to_template).collect();
        let optional = |values: Option<&[Value]>| -> minijinja::Value { values.map_or_else(|| ().into(), list) };
        let mut pairs: Vec<(String, minijinja::Value)> = Vec::new();
        for (name, text) in self.special_tokens.iter() {
            pairs.push((name.clone(), text.as_str().into()));
        }
        for (name, value) in request.variables.into_iter().flatten() {
            if RESERVED.contains(&name.as_str()) {
                return Err(TextError::InvalidRequest {
                    field: format!("chat_template_kwargs.{name}"),
                    reason: "this name is reserved".to_string(),
                });
            }
            pairs.push((name.clone(), json::to_template(value)));
        }
        let now = environment::strftime_now(request.now_unix_seconds);
        let fixed = [
            ("messages", list(messages)),
            ("tools", optional(request.tools)),
            ("documents", optional(request.documents)),
            ("add_generation_prompt", request.add_generation_prompt.into()),
            ("strftime_now", now),
            output::deadline(self.limits.time),
            meter::variable(self.limits.memory_bytes),
        ];
        pairs.extend(fixed.map(|(name, value)| (name.to_string(), value)));
        Ok(minijinja::Value::from_pairs(pairs))
    }

    /// What the template expects as content.
    pub fn content_format(&self) -> ContentFormat {
        self.content_format
    }

    /// The template's text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The variables with special tokens.
    pub fn special_tokens(&self) -> &BTreeMap<String, String> {
        &self.special_tokens
    }
}

fn not_continuable() -> TextError {
    TextError::InvalidRequest {
        field: "continue_final_message".to_string(),
        reason: "the chat template does not keep the last message's text".to_string(),
    }
}

/// Ends a prompt inside its last message. Where the template trims content, so does this.
fn cut_at_mark(mut rendered: String, ending: &str) -> Result<String> {
    let mark = CONTINUE_MARK.trim_end();
    let Some(place) = rendered.rfind(mark).filter(|_| rendered.contains(ending.trim())) else {
        return Err(not_continuable());
    };
    let kept = rendered[place..].starts_with(CONTINUE_MARK);
    rendered.truncate(place);
    if !kept {
        rendered.truncate(rendered.trim_end().len());
    }
    Ok(rendered)
}
