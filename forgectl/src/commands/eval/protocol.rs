//! From flags to a protocol, and how a report states it.

use forge_eval::{Protocol, Window, windows};
use forge_text::Tokenizer;
use serde::Serialize;

use crate::cli::measure::{ProtocolName, WindowFlags};
use crate::failure::{Failure, Result};

/// Chunks of llama.cpp, unless told otherwise.
const CHUNK: usize = 512;
/// Windows of the others: longer ones need memory and time that nobody asked for.
const WINDOW_MAX: usize = 2048;

/// A protocol as a report states it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Statement {
    /// `chunked`, `sliding` or `rolling`.
    pub name: &'static str,
    /// Whose figures it can be compared with.
    pub like: &'static str,
    /// Tokens of a window.
    pub context: usize,
    /// Tokens between windows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stride: Option<usize>,
    /// Token before each chunk, or before the text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefix_token: Option<u32>,
}

impl Statement {
    /// Of a protocol.
    pub fn of(protocol: &Protocol) -> Self {
        match *protocol {
            Protocol::Chunked { context, beginning } => {
                Statement { name: "chunked", like: "llama.cpp", context, stride: None, prefix_token: beginning }
            }
            Protocol::Sliding { context, stride } => {
                Statement { name: "sliding", like: "the transformers guide", context, stride: Some(stride), prefix_token: None }
            }
            Protocol::Rolling { context, prefix } => {
                Statement { name: "rolling", like: "lm-eval", context, stride: None, prefix_token: Some(prefix) }
            }
        }
    }

    /// In a sentence.
    pub fn sentence(&self) -> String {
        let Statement { name, like, context, .. } = self;
        let how = match (self.stride, self.prefix_token, *name) {
            (Some(stride), _, _) => format!("windows of {context} tokens every {stride}, each token scored once"),
            (None, Some(prefix), "rolling") => format!("windows of {context} tokens, all tokens scored, token {prefix} first"),
            (None, Some(prefix), _) => {
                format!("chunks of {context} tokens from an empty context, token {prefix} first, second half scored")
            }
            (None, None, _) => format!("chunks of {context} tokens from an empty context, second half scored"),
        };
        format!("{name} (as {like}): {how}")
    }
}

/// The protocol that flags ask for, on a model with this tokenizer and context.
///
/// # Errors
/// A context beyond the model's, `--stride` where there is none, a tokenizer without a token to begin with.
pub fn choose(
    name: ProtocolName,
    flags: &WindowFlags,
    stride: Option<usize>,
    (tokenizer, context_length): (&Tokenizer, usize),
) -> Result<Protocol> {
    let default = if name == ProtocolName::Chunked { CHUNK } else { WINDOW_MAX };
    let context = flags.context.unwrap_or(default.min(context_length));
    if context > context_length {
        return Err(Failure::usage(format!("--context is {context}, and the model's context is {context_length} tokens"))
            .help("give less, or extend the model's own with --rope-scaling, such as type=yarn,factor=2"));
    }
    if stride.is_some() && name != ProtocolName::Sliding {
        return Err(Failure::usage("--stride belongs to --protocol sliding"));
    }
    Ok(match name {
        ProtocolName::Chunked => Protocol::Chunked { context, beginning: beginning(tokenizer)? },
        ProtocolName::Sliding => Protocol::Sliding { context, stride: stride.unwrap_or((context / 4).max(1)) },
        ProtocolName::Rolling => {
            let prefix = tokenizer.bos_id().or(tokenizer.eos_ids().first().copied());
            let prefix = prefix.ok_or_else(|| {
                Failure::usage("the tokenizer has no token that begins or ends a text, and the rolling protocol begins with one")
                    .help("use --protocol chunked or sliding")
            })?;
            Protocol::Rolling { context, prefix }
        }
    })
}

/// The tokens of a text that are used, and the windows of them that are computed.
///
/// # Errors
/// A text that is too short, no window at all.
pub fn cut<'a>(protocol: &Protocol, flags: &WindowFlags, encoded: &'a [u32]) -> Result<(&'a [u32], Vec<Window>)> {
    let tokens = &encoded[..flags.max_tokens.unwrap_or(encoded.len()).min(encoded.len())];
    let mut windows = windows(protocol, tokens.len())?;
    windows.truncate(flags.chunks.unwrap_or(windows.len()));
    if windows.is_empty() {
        return Err(Failure::usage("--chunks is 0: there is nothing to compute"));
    }
    Ok((tokens, windows))
}

/// The token the tokenizer puts before a text by itself, if it does.
fn beginning(tokenizer: &Tokenizer) -> Result<Option<u32>> {
    let around = tokenizer.encode("", true).map_err(|error| Failure::of(&error))?;
    Ok(tokenizer.bos_id().filter(|bos| around.first() == Some(bos)))
}
