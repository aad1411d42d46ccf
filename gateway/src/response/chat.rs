//! Chat completions, whole and in chunks.

use std::sync::Arc;

use forge_shared::generate::FinishReason;
use serde::Serialize;
use serde_json::Value;

use super::logprobs::ChatLogprobs;
use super::{ChunkUsage, Head, UsageBody, finish_reason, stop_reason, to_json};
use crate::generation::{Collected, Output};
use crate::models::Model;
use crate::sse::Chunks;

#[derive(Serialize)]
struct ChatCompletion<'a> {
    #[serde(flatten)]
    head: &'a Head,
    choices: Vec<ChatChoice>,
    usage: UsageBody,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
}

#[derive(Serialize)]
struct ChatChoice {
    index: usize,
    message: AssistantMessage,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

#[derive(Serialize)]
struct AssistantMessage {
    role: &'static str,
    content: String,
    refusal: Option<()>,
}

#[derive(Serialize)]
struct ChatChunk<'a> {
    #[serde(flatten)]
    head: &'a Head,
    choices: &'a [ChunkChoice],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<ChunkUsage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
}

#[derive(Serialize, Default)]
struct ChunkChoice {
    index: usize,
    delta: Delta,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

#[derive(Serialize, Default)]
struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
}

/// Writes one chat's answer.
pub(crate) struct ChatWriter {
    pub(crate) head: Head,
    pub(crate) model: Arc<Model>,
    pub(crate) answers: usize,
    pub(crate) logprobs: bool,
    pub(crate) include_usage: bool,
    /// The prompt's tokens, if token ids are wanted.
    pub(crate) token_ids: Option<Arc<[u32]>>,
}

impl ChatWriter {
    /// The whole answer as JSON.
    pub(crate) fn whole(&self, collected: Collected) -> String {
        let choice = |(index, answer): (usize, crate::generation::CollectedAnswer)| ChatChoice {
            index,
            logprobs: self.logprobs.then(|| ChatLogprobs::new(&self.model.tokenizer, &answer.logprobs)),
            finish_reason: answer.reason.as_ref().map(finish_reason),
            stop_reason: answer.reason.as_ref().and_then(stop_reason),
            token_ids: self.token_ids.is_some().then_some(answer.tokens),
            message: AssistantMessage { role: "assistant", content: answer.text, refusal: None },
        };
        to_json(&ChatCompletion {
            head: &self.head,
            choices: collected.answers.into_iter().enumerate().map(choice).collect(),
            usage: collected.usage.into(),
            prompt_token_ids: self.token_ids.as_deref(),
        })
    }

    fn chunk(&self, choices: &[ChunkChoice], usage: ChunkUsage) -> String {
        let prompt_token_ids = None;
        to_json(&ChatChunk { head: &self.head, choices, usage: self.include_usage.then_some(usage), prompt_token_ids })
    }

    fn text(&self, index: usize, text: String) -> ChunkChoice {
        ChunkChoice { index, delta: Delta { content: Some(text), role: None }, ..ChunkChoice::default() }
    }

    fn finish(&self, index: usize, reason: &FinishReason) -> ChunkChoice {
        let (finish_reason, stop_reason) = (Some(finish_reason(reason)), stop_reason(reason));
        ChunkChoice { index, finish_reason, stop_reason, ..ChunkChoice::default() }
    }
}

impl Chunks for ChatWriter {
    fn begin(&mut self) -> Vec<String> {
        let role = |index| {
            let delta = Delta { role: Some("assistant"), content: Some(String::new()) };
            let choices = [ChunkChoice { index, delta, ..ChunkChoice::default() }];
            let usage = self.include_usage.then_some(ChunkUsage::Null);
            // The prompt's tokens are the same for all answers: with the first chunk only.
            let prompt_token_ids = self.token_ids.as_deref().filter(|_| index == 0);
            to_json(&ChatChunk { head: &self.head, choices: &choices, usage, prompt_token_ids })
        };
        (0..self.answers).map(role).collect()
    }

    fn event(&mut self, output: Output) -> Vec<String> {
        match output {
            Output::PromptLogprobs { .. } => Vec::new(),
            Output::Token { index, token } => {
                // Text held back comes with a later token; nothing to say until then.
                if token.text.is_empty() && !self.logprobs && self.token_ids.is_none() {
                    return Vec::new();
                }
                let mut choice = self.text(index, token.text);
                choice.logprobs = self.logprobs.then(|| ChatLogprobs::new(&self.model.tokenizer, &token.logprobs));
                choice.token_ids = self.token_ids.is_some().then(|| vec![token.token]);
                vec![self.chunk(&[choice], ChunkUsage::Null)]
            }
            Output::Finished { index, reason, text } => {
                let held_back = (!text.is_empty()).then(|| self.chunk(&[self.text(index, text)], ChunkUsage::Null));
                let end = self.chunk(&[self.finish(index, &reason)], ChunkUsage::Null);
                held_back.into_iter().chain([end]).collect()
            }
            Output::Done(usage) if self.include_usage => vec![self.chunk(&[], ChunkUsage::Whole(usage.into()))],
            Output::Done(_) => Vec::new(),
        }
    }
}
