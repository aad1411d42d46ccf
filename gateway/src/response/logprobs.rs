//! Log-probabilities in the two shapes of OpenAI's API.

use forge_shared::generate::{Logprobs, TokenLogprob};
use forge_text::Tokenizer;
use serde::Serialize;
use serde_json::{Map, Value};

/// JSON has no infinity; OpenAI writes this for a token that cannot be.
const IMPOSSIBLE: f32 = -9999.0;

/// A token of a chat's `logprobs.content`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ChatLogprob {
    #[serde(flatten)]
    chosen: ChatAlternative,
    top_logprobs: Vec<ChatAlternative>,
}

/// One alternative.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct ChatAlternative {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

/// `logprobs` of a chat.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ChatLogprobs {
    /// A row per token.
    pub content: Vec<ChatLogprob>,
    /// Always null: refusals are content here.
    pub refusal: Option<()>,
}

impl ChatLogprobs {
    pub(crate) fn new<'a>(tokenizer: &Tokenizer, rows: impl IntoIterator<Item = &'a Logprobs>) -> Self {
        let alternative = |entry: &TokenLogprob| ChatAlternative {
            token: tokenizer.token_text(entry.token),
            logprob: finite(entry.logprob),
            bytes: tokenizer.token_bytes(entry.token).to_vec(),
        };
        let row =
            |row: &Logprobs| ChatLogprob { chosen: alternative(&row.chosen), top_logprobs: row.top.iter().map(alternative).collect() };
        ChatLogprobs { content: rows.into_iter().map(row).collect(), refusal: None }
    }
}

/// `logprobs` of a completion: columns over tokens.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct CompletionLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<Map<String, Value>>>,
    text_offset: Vec<usize>,
}

/// Builds the columns over a prompt and its answer, chunk after chunk.
#[derive(Debug, Clone)]
pub(crate) struct CompletionLogprobsWriter {
    skip_special_tokens: bool,
    /// Characters of the text so far.
    offset: usize,
}

impl CompletionLogprobsWriter {
    /// `offset` is the characters of text before the first token, such as an echoed prompt's.
    pub(crate) fn new(skip_special_tokens: bool, offset: usize) -> Self {
        CompletionLogprobsWriter { skip_special_tokens, offset }
    }

    /// Adds a token; the first of a prompt has no log-probabilities.
    pub(crate) fn push(&mut self, tokenizer: &Tokenizer, columns: &mut CompletionLogprobs, token: u32, row: Option<&Logprobs>) {
        columns.tokens.push(token_name(tokenizer, token));
        columns.token_logprobs.push(row.map(|row| finite(row.chosen.logprob)));
        columns.top_logprobs.push(row.map(|row| {
            // The chosen token is in the map even where it is not among the most likely.
            let entries = row.top.iter().chain(std::iter::once(&row.chosen));
            let mut map = Map::new();
            for entry in entries {
                map.entry(token_name(tokenizer, entry.token)).or_insert_with(|| Value::from(finite(entry.logprob)));
            }
            map
        }));
        columns.text_offset.push(self.offset);
        if !(self.skip_special_tokens && tokenizer.is_special(token)) {
            self.offset += characters(tokenizer.token_bytes(token));
        }
    }
}

/// Characters that begin in `bytes`: so a character cut over two tokens counts once.
fn characters(bytes: &[u8]) -> usize {
    bytes.iter().filter(|byte| !matches!(byte, 0x80..=0xbf)).count()
}

/// A token's text; `bytes:\xe2\x80` for a part of a character, as OpenAI writes it, so that names stay distinct.
fn token_name(tokenizer: &Tokenizer, token: u32) -> String {
    let bytes = tokenizer.token_bytes(token);
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().fold("bytes:".to_owned(), |name, byte| format!("{name}\\x{byte:02x}")),
    }
}

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob.max(IMPOSSIBLE) } else { IMPOSSIBLE }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_tokens_stay_json_numbers_and_cut_characters_count_once() {
        assert_eq!(finite(f32::NEG_INFINITY), IMPOSSIBLE);
        assert_eq!(finite(f32::NAN), IMPOSSIBLE);
        assert_eq!(finite(-1.5), -1.5);
        let text = "aé€😀";
        let pieces: usize = text.as_bytes().chunks(2).map(characters).sum();
        assert_eq!(pieces, text.chars().count());
    }
}
