//! From bytes to a checked request, and nothing ignored on the way.
//!
//! Each route has a table of fields ([`fields`]): a field in the body is honoured, accepted with the values whose
//! meaning holds anyway, or refused by name. It is pure and bounded: the entry points take any bytes.

mod chat;
mod common;
mod completion;
pub mod fields;
mod json;
mod messages;
mod sampling;
mod tokenize;

pub use chat::{Chat, ChatRequest, parse_chat_request, parse_chat_request_with};
pub use common::Common;
pub use completion::{CompletionRequest, Prompt, parse_completion_request};
pub use sampling::SamplingFields;
pub use tokenize::{DetokenizeRequest, TokenizeInput, TokenizeRequest, parse_detokenize_request, parse_tokenize_request};
