//! The one error type of this crate. Each variant says which field or file is wrong and what
//! would be right; [`TextError::is_request_error`] tells the gateway whose fault it is.

/// What can go wrong between text and token ids.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    /// A file of the model's folder could not be read.
    #[error("{path}: {reason}")]
    Read {
        /// The file.
        path: String,
        /// The system's reason.
        reason: String,
    },
    /// A file or metadata field holds something that is not a valid tokenizer.
    #[error("tokenizer: {field}: {reason}")]
    Invalid {
        /// The file or field.
        field: String,
        /// What is wrong with it and what is expected.
        reason: String,
    },
    /// The tokenizer is of a kind Forge does not have.
    #[error("tokenizer: {field} {value:?} is not supported; supported: {supported}")]
    Unsupported {
        /// The field that names the kind, such as `tokenizer.ggml.pre`.
        field: &'static str,
        /// Its value.
        value: String,
        /// The values that are supported.
        supported: String,
    },
    /// The text to encode is longer than the tokenizer's cap.
    #[error("text has {bytes} bytes, more than the limit of {limit_bytes}; send less text")]
    TextTooLong {
        /// Bytes of the text.
        bytes: usize,
        /// The cap.
        limit_bytes: usize,
    },
    /// The text holds more whitespace in a row than the tokenizer's expressions can cut rightly.
    #[error(
        "text has a run of {characters} whitespace characters, more than the limit of {limit}; \
         shorten it"
    )]
    WhitespaceRun {
        /// Characters of the longest run.
        characters: usize,
        /// The cap.
        limit: usize,
    },
    /// The tokenizer library refused to encode or decode.
    #[error("tokenizer failed to {action}: {reason}")]
    Tokenize {
        /// `encode` or `decode`.
        action: &'static str,
        /// The library's reason.
        reason: String,
    },
    /// A list of stop strings breaks a limit.
    #[error("stop: {0}")]
    Stop(String),
    /// The model has no chat template, so messages cannot become a prompt.
    #[error("this model has no chat template; use /v1/completions with a plain prompt")]
    NoChatTemplate,
    /// The template is not one the engine can compile: the model's fault.
    #[error("chat template does not compile: {0}")]
    TemplateInvalid(String),
    /// The template itself refused the messages with `raise_exception`: the request's fault.
    #[error("chat template refused the messages: {0}")]
    TemplateRaised(String),
    /// The template failed on these messages (an undefined value, a wrong type).
    #[error("chat template failed on these messages: {0}")]
    TemplateFailed(String),
    /// Rendering passed one of [`crate::TemplateLimits`].
    #[error("chat template exceeded its limit of {0}; `--chat-template FILE` (spec.chatTemplate) gives the model another one")]
    TemplateLimit(String),
    /// The messages or template arguments are not of the shape a template can take.
    #[error("{field}: {reason}")]
    InvalidRequest {
        /// The field, such as `messages[2].content`.
        field: String,
        /// What is wrong and what is expected.
        reason: String,
    },
}

impl TextError {
    /// Whether the request is at fault (an HTTP 400), rather than the model's files.
    pub fn is_request_error(&self) -> bool {
        match self {
            Self::TextTooLong { .. }
            | Self::WhitespaceRun { .. }
            | Self::Stop(_)
            | Self::NoChatTemplate
            | Self::TemplateRaised(_)
            | Self::TemplateFailed(_)
            | Self::TemplateLimit(_)
            | Self::InvalidRequest { .. } => true,
            Self::Read { .. } | Self::Invalid { .. } | Self::Unsupported { .. } | Self::Tokenize { .. } | Self::TemplateInvalid(_) => false,
        }
    }

    /// An [`TextError::Invalid`] from anything printable.
    pub(crate) fn invalid(field: impl Into<String>, reason: impl ToString) -> Self {
        Self::Invalid { field: field.into(), reason: reason.to_string() }
    }
}
