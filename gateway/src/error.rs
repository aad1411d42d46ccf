//! What can go wrong: [`ApiError`] for one request, [`GatewayError`] for the gateway as a whole.
//!
//! This is the only place where an error gets its HTTP status and its OpenAI type and code.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use forge_shared::generate::AdmitError;
use forge_text::TextError;
use serde_json::{Value, json};

/// Why a gateway cannot start, or its key file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// A setting is out of range.
    #[error("gateway.{field}: {reason}")]
    Config {
        /// Key of the setting.
        field: String,
        /// What is wrong and what is expected.
        reason: String,
    },
    /// Would serve everybody.
    #[error(
        "refusing to listen on {host} without API keys: anybody who reaches this machine could use it. \
         Create a key with `forgectl keys create NAME`, or listen on 127.0.0.1, or pass --insecure if the network is yours"
    )]
    OpenToTheWorld {
        /// The address asked for.
        host: IpAddr,
    },
    /// Another program has the port.
    #[error(
        "port {port} on {host} is in use: stop the program that has it, or choose another with {flag} {next}",
        host = address.ip(),
        port = address.port(),
        next = address.port().checked_add(1).unwrap_or(1024)
    )]
    PortInUse {
        /// The address asked for.
        address: SocketAddr,
        /// The flag that sets it.
        flag: &'static str,
    },
    /// The system refused the address for another reason.
    #[error("cannot listen on {address} ({flag}): {source}")]
    Bind {
        /// The address asked for.
        address: SocketAddr,
        /// The flag that sets it.
        flag: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
    /// It cannot be part of the cluster.
    #[error("{reason}")]
    Cluster {
        /// What keeps it out, and what to do.
        reason: String,
    },
    /// A listener broke while serving.
    #[error("the listener failed: {0}")]
    Listener(std::io::Error),
    /// The key file cannot be read or written.
    #[error("key file {path}: {source}")]
    KeyFile {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The key file is not one.
    #[error("key file {path} is not valid: {reason}; restore it from a backup, or delete it and create the keys anew")]
    KeyFileInvalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// No key of that name or id.
    #[error("there is no key {name:?}; `forgectl keys list` shows them")]
    UnknownKey {
        /// What was asked for.
        name: String,
    },
    /// The name is taken.
    #[error("there is a key named {name:?} already; choose another name or revoke that one first")]
    KeyExists {
        /// The name.
        name: String,
    },
    /// A name or limit of a key is not allowed.
    #[error("key {field}: {reason}")]
    KeyInvalid {
        /// `name`, `rpm` or `tpm`.
        field: &'static str,
        /// What is wrong and what is expected.
        reason: String,
    },
    /// The system gave no random bytes.
    #[error("the system gave no random bytes: {0}")]
    Random(String),
}

impl GatewayError {
    pub(crate) fn config(field: &str, reason: impl Into<String>) -> Self {
        GatewayError::Config { field: field.to_owned(), reason: reason.into() }
    }
}

/// Why a request is refused or broken off, as the client sees it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ApiError {
    /// A field is wrong, unknown or not supported.
    #[error("{message}")]
    Invalid {
        /// The field as a path, such as `messages[2].role`.
        param: Option<String>,
        /// What is wrong and what is expected.
        message: String,
        /// OpenAI's code, if it has one for this.
        code: Option<&'static str>,
    },
    /// No key, or a wrong one.
    #[error("{0}")]
    Unauthorized(&'static str),
    /// A name that may be an attacker's, at a server that lets everybody in.
    #[error(
        "this server has no API keys and answers only as localhost or a loopback address, not as {host:?}, which a web page \
         could have pointed here: call it by http://127.0.0.1, create a key with `forgectl keys create NAME`, or start it with \
         --insecure if the network is yours"
    )]
    ForeignHost {
        /// The `Host` header.
        host: String,
    },
    /// No such model.
    #[error("the model {model:?} is not served here; served: {}", served.join(", "))]
    UnknownModel {
        /// What was asked for.
        model: String,
        /// What there is.
        served: Vec<String>,
    },
    /// No such route.
    #[error("there is no {method} {path}; the API is described in docs/api.md")]
    UnknownRoute {
        /// Method of the request.
        method: String,
        /// Path of the request.
        path: String,
    },
    /// The route has other methods.
    #[error("{method} is not allowed for {path}; see the Allow header")]
    MethodNotAllowed {
        /// Method of the request.
        method: String,
        /// Path of the request.
        path: String,
    },
    /// The body did not arrive in time.
    #[error("the request body did not arrive within {seconds} s")]
    BodyTimeout {
        /// The bound.
        seconds: u64,
    },
    /// The body is too large.
    #[error("the request body is larger than the limit of {limit_bytes} bytes (gateway.maxBody)")]
    BodyTooLarge {
        /// The bound.
        limit_bytes: usize,
    },
    /// Not JSON by its header.
    #[error("send the body as JSON with the header Content-Type: application/json (got {0})")]
    NotJson(String),
    /// An idempotency key came again with another body.
    #[error("this Idempotency-Key was used with another body; use a new key for a new request")]
    IdempotencyMismatch,
    /// The key's rate limit is used up.
    #[error("rate limit reached: {limit} {unit} per minute; retry in {retry_after_s} s")]
    RateLimited {
        /// Per minute.
        limit: u64,
        /// `requests` or `tokens`.
        unit: &'static str,
        /// When it will work.
        retry_after_s: u32,
    },
    /// More than there is capacity for.
    #[error("{message}")]
    Overloaded {
        /// What is full.
        message: String,
        /// When to come back.
        retry_after_s: u32,
    },
    /// Loading, restarting or draining.
    #[error("{message}")]
    Unavailable {
        /// Why.
        message: String,
        /// When to come back.
        retry_after_s: u32,
    },
    /// The request's time is over.
    #[error("the request was not finished within its deadline of {seconds} s")]
    Deadline {
        /// The bound.
        seconds: u64,
    },
    /// The engine gave up for good.
    #[error("the engine failed: {reason}")]
    EngineFailed {
        /// Its reason.
        reason: String,
    },
    /// A defect of ours.
    #[error("internal error: {0}")]
    Internal(String),
}

impl ApiError {
    /// A wrong value of a field.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        ApiError::Invalid { param: Some(param.into()), message: message.into(), code: None }
    }

    /// A body that is no request at all.
    pub fn malformed(message: impl Into<String>) -> Self {
        ApiError::Invalid { param: None, message: message.into(), code: None }
    }

    /// The status it is answered with.
    pub fn status(&self) -> StatusCode {
        match self {
            ApiError::Invalid { .. } => StatusCode::BAD_REQUEST,
            ApiError::Unauthorized(_) => StatusCode::UNAUTHORIZED,
            ApiError::ForeignHost { .. } => StatusCode::FORBIDDEN,
            ApiError::UnknownModel { .. } | ApiError::UnknownRoute { .. } => StatusCode::NOT_FOUND,
            ApiError::MethodNotAllowed { .. } => StatusCode::METHOD_NOT_ALLOWED,
            ApiError::BodyTimeout { .. } => StatusCode::REQUEST_TIMEOUT,
            ApiError::BodyTooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            ApiError::NotJson(_) => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            ApiError::IdempotencyMismatch => StatusCode::UNPROCESSABLE_ENTITY,
            ApiError::RateLimited { .. } | ApiError::Overloaded { .. } => StatusCode::TOO_MANY_REQUESTS,
            ApiError::Unavailable { .. } => StatusCode::SERVICE_UNAVAILABLE,
            ApiError::Deadline { .. } => StatusCode::GATEWAY_TIMEOUT,
            ApiError::EngineFailed { .. } | ApiError::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// OpenAI's `type`.
    pub fn kind(&self) -> &'static str {
        match self {
            ApiError::RateLimited { unit: "tokens", .. } => "tokens",
            ApiError::RateLimited { .. } => "requests",
            ApiError::Overloaded { .. } => "rate_limit_error",
            ApiError::Unavailable { .. } => "service_unavailable_error",
            ApiError::Deadline { .. } => "timeout_error",
            ApiError::EngineFailed { .. } | ApiError::Internal(_) => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// OpenAI's `code`.
    pub fn code(&self) -> Option<&'static str> {
        match self {
            ApiError::Invalid { code, .. } => *code,
            ApiError::Unauthorized(_) => Some("invalid_api_key"),
            ApiError::ForeignHost { .. } => Some("host_not_allowed"),
            ApiError::UnknownModel { .. } => Some("model_not_found"),
            ApiError::UnknownRoute { .. } => Some("unknown_url"),
            ApiError::MethodNotAllowed { .. } => Some("method_not_allowed"),
            ApiError::BodyTimeout { .. } => Some("body_timeout"),
            ApiError::BodyTooLarge { .. } => Some("body_too_large"),
            ApiError::NotJson(_) => Some("unsupported_content_type"),
            ApiError::IdempotencyMismatch => Some("idempotency_key_reused"),
            ApiError::RateLimited { .. } => Some("rate_limit_exceeded"),
            ApiError::Overloaded { .. } => Some("overloaded"),
            ApiError::Unavailable { .. } => Some("model_unavailable"),
            ApiError::Deadline { .. } => Some("deadline_exceeded"),
            ApiError::EngineFailed { .. } => Some("engine_failed"),
            ApiError::Internal(_) => Some("internal_error"),
        }
    }

    /// OpenAI's `param`.
    pub fn param(&self) -> Option<&str> {
        match self {
            ApiError::Invalid { param, .. } => param.as_deref(),
            ApiError::UnknownModel { .. } => Some("model"),
            _ => None,
        }
    }

    /// Seconds for the Retry-After header.
    pub fn retry_after_s(&self) -> Option<u32> {
        match self {
            ApiError::RateLimited { retry_after_s, .. }
            | ApiError::Overloaded { retry_after_s, .. }
            | ApiError::Unavailable { retry_after_s, .. } => Some(*retry_after_s),
            _ => None,
        }
    }

    /// The body: `{"error": {"message", "type", "param", "code"}}`.
    pub fn body(&self) -> Value {
        json!({"error": {
            "message": self.to_string(),
            "type": self.kind(),
            "param": self.param(),
            "code": self.code(),
        }})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status(), axum::Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after_s() {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if matches!(self, ApiError::EngineFailed { .. } | ApiError::Deadline { .. }) {
            // OpenAI's clients would send a request that was tried several times already twice more.
            response.headers_mut().insert("x-should-retry", HeaderValue::from_static("false"));
        }
        if matches!(self, ApiError::Unauthorized(_)) {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<TextError> for ApiError {
    fn from(error: TextError) -> Self {
        match &error {
            TextError::InvalidRequest { field, .. } => ApiError::invalid(field.clone(), error.to_string()),
            TextError::Stop(_) => ApiError::invalid("stop", error.to_string()),
            TextError::NoChatTemplate | TextError::TemplateRaised(_) | TextError::TemplateFailed(_) | TextError::TemplateLimit(_) => {
                ApiError::invalid("messages", error.to_string())
            }
            _ if error.is_request_error() => ApiError::malformed(error.to_string()),
            _ => ApiError::Internal(error.to_string()),
        }
    }
}

impl From<AdmitError> for ApiError {
    fn from(error: AdmitError) -> Self {
        let message = error.to_string();
        match error {
            AdmitError::PromptTooLong { .. } => ApiError::Invalid { param: None, message, code: Some("context_length_exceeded") },
            AdmitError::NeverFits { .. } => {
                ApiError::Invalid { param: Some("max_tokens".into()), message, code: Some("context_length_exceeded") }
            }
            AdmitError::UnknownToken { .. } => ApiError::Invalid { param: Some("prompt".into()), message, code: None },
            AdmitError::Invalid(invalid) => ApiError::invalid(invalid.field, message),
            AdmitError::Overloaded { retry_after_s, .. } => ApiError::Overloaded { message, retry_after_s },
            AdmitError::Unavailable { .. } => ApiError::Unavailable { message, retry_after_s: 2 },
        }
    }
}
