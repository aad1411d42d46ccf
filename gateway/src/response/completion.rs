//! Text completions, whole and in chunks.

use std::collections::HashMap;
use std::sync::Arc;

use forge_shared::generate::{FinishReason, Logprobs};
use serde::Serialize;
use serde_json::Value;

use super::logprobs::{CompletionLogprobs, CompletionLogprobsWriter};
use super::{ChunkUsage, Head, UsageBody, finish_reason, stop_reason, to_json};
use crate::generation::{Collected, Output};
use crate::models::Model;
use crate::sse::Chunks;

#[derive(Serialize)]
struct Completion<'a> {
    #[serde(flatten)]
    head: &'a Head,
    choices: Vec<CompletionChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<ChunkUsage>,
}

#[derive(Serialize, Default)]
struct CompletionChoice {
    index: usize,
    text: String,
    logprobs: Option<CompletionLogprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

/// One prompt, as the writer needs it.
pub(crate) struct WrittenPrompt {
    pub(crate) tokens: Arc<[u32]>,
    /// What an answer begins with; empty without echo.
    pub(crate) echo: String,
}

/// Writes the answers of one completion request.
pub(crate) struct CompletionWriter {
    pub(crate) head: Head,
    pub(crate) model: Arc<Model>,
    pub(crate) prompts: Vec<WrittenPrompt>,
    pub(crate) answers_per_prompt: usize,
    pub(crate) echo: bool,
    pub(crate) logprobs: bool,
    pub(crate) skip_special_tokens: bool,
    pub(crate) include_usage: bool,
    pub(crate) token_ids: bool,
    /// By answer, while streaming.
    pub(crate) columns: HashMap<usize, CompletionLogprobsWriter>,
}

impl CompletionWriter {
    fn prompt_of(&self, index: usize) -> &WrittenPrompt {
        &self.prompts[index / self.answers_per_prompt]
    }

    /// The columns over an echoed prompt, and the writer that goes on behind it.
    fn prompt_columns(&self, index: usize, rows: Option<&Vec<Logprobs>>) -> (CompletionLogprobs, CompletionLogprobsWriter) {
        let mut columns = CompletionLogprobs::default();
        let mut writer = CompletionLogprobsWriter::new(self.skip_special_tokens, 0);
        if self.echo {
            let rows = rows.map(Vec::as_slice).unwrap_or_default();
            for (position, token) in self.prompt_of(index).tokens.iter().enumerate() {
                let row = position.checked_sub(1).and_then(|before| rows.get(before));
                writer.push(&self.model.tokenizer, &mut columns, *token, row);
            }
        }
        // The prompt's text may differ from its tokens' (a leading space, special tokens): the answer begins behind the text.
        let begins = self.prompt_of(index).echo.chars().count();
        (columns, CompletionLogprobsWriter::new(self.skip_special_tokens, begins))
    }

    /// All answers as JSON.
    pub(crate) fn whole(&self, collected: Collected) -> String {
        let choice = |(index, answer): (usize, crate::generation::CollectedAnswer)| {
            let logprobs = self.logprobs.then(|| {
                let rows = collected.prompt_logprobs.get(&(index / self.answers_per_prompt));
                let (mut columns, mut writer) = self.prompt_columns(index, rows);
                for (token, row) in answer.tokens.iter().zip(&answer.logprobs) {
                    writer.push(&self.model.tokenizer, &mut columns, *token, Some(row));
                }
                columns
            });
            CompletionChoice {
                index,
                text: format!("{}{}", self.prompt_of(index).echo, answer.text),
                logprobs,
                finish_reason: answer.reason.as_ref().map(finish_reason),
                stop_reason: answer.reason.as_ref().and_then(stop_reason),
                prompt_token_ids: self.token_ids.then(|| self.prompt_of(index).tokens.to_vec()),
                token_ids: self.token_ids.then_some(answer.tokens),
            }
        };
        let choices = collected.answers.into_iter().enumerate().map(choice).collect();
        to_json(&Completion { head: &self.head, choices, usage: Some(ChunkUsage::Whole(UsageBody::from(collected.usage))) })
    }

    fn chunk(&self, choices: Vec<CompletionChoice>, usage: ChunkUsage) -> String {
        to_json(&Completion { head: &self.head, choices, usage: self.include_usage.then_some(usage) })
    }

    /// The first chunk of an answer, where there is something to say before its first token.
    fn opening(&mut self, index: usize, rows: Option<&Vec<Logprobs>>) -> Option<String> {
        let (columns, writer) = self.prompt_columns(index, rows);
        self.columns.insert(index, writer);
        if !self.echo && !self.token_ids {
            return None;
        }
        let choice = CompletionChoice {
            index,
            text: self.prompt_of(index).echo.clone(),
            logprobs: (self.logprobs && self.echo).then_some(columns),
            prompt_token_ids: self.token_ids.then(|| self.prompt_of(index).tokens.to_vec()),
            ..CompletionChoice::default()
        };
        Some(self.chunk(vec![choice], ChunkUsage::Null))
    }

    fn finish(&self, index: usize, reason: &FinishReason, text: String) -> String {
        let (finish_reason, stop_reason) = (Some(finish_reason(reason)), stop_reason(reason));
        let choice = CompletionChoice { index, text, finish_reason, stop_reason, ..CompletionChoice::default() };
        self.chunk(vec![choice], ChunkUsage::Null)
    }
}

impl Chunks for CompletionWriter {
    fn begin(&mut self) -> Vec<String> {
        // With echo and log-probabilities the first chunk needs the prompt's, which are the first event.
        if self.echo && self.logprobs {
            return Vec::new();
        }
        let answers = self.prompts.len() * self.answers_per_prompt;
        (0..answers).filter_map(|index| self.opening(index, None)).collect()
    }

    fn event(&mut self, output: Output) -> Vec<String> {
        match output {
            Output::PromptLogprobs { prompt, logprobs } => {
                if !(self.echo && self.logprobs) {
                    return Vec::new();
                }
                let first = prompt * self.answers_per_prompt;
                let answers = first..first + self.answers_per_prompt;
                answers.filter_map(|index| self.opening(index, Some(&logprobs))).collect()
            }
            Output::Token { index, token } => {
                if token.text.is_empty() && !self.logprobs && !self.token_ids {
                    return Vec::new();
                }
                let logprobs = self.logprobs.then(|| {
                    let mut columns = CompletionLogprobs::default();
                    if let Some(writer) = self.columns.get_mut(&index) {
                        writer.push(&self.model.tokenizer, &mut columns, token.token, token.logprobs.as_ref());
                    }
                    columns
                });
                let token_ids = self.token_ids.then(|| vec![token.token]);
                let choice = CompletionChoice { index, text: token.text, logprobs, token_ids, ..CompletionChoice::default() };
                vec![self.chunk(vec![choice], ChunkUsage::Null)]
            }
            Output::Finished { index, reason, text } => vec![self.finish(index, &reason, text)],
            Output::Done(usage) if self.include_usage => vec![self.chunk(Vec::new(), ChunkUsage::Whole(usage.into()))],
            Output::Done(_) => Vec::new(),
        }
    }
}
