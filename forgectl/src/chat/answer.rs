//! One answer: submitted to the engine, streamed as it comes, stopped by Ctrl-C, carried on if the engine dies.

use std::sync::Arc;
use std::time::{Duration, Instant};

use forge_shared::generate::{
    AdmitError, Choice, EngineEvent, FinishReason, GenerateRequest, SamplingParams, TenantSalt, TokenEvent, Usage,
};
use forge_shared::ids::RequestId;
use forge_shared::link::{EngineLink, EventStream};

use crate::failure::{Exit, Failure, Result};
use crate::runtime;

/// How long an answer waits for an engine that is being restarted.
const RESTART_WAIT: Duration = Duration::from_secs(60);
/// Engine deaths in a row, without a token between, after which the question itself is held to be the cause.
const MAX_FRUITLESS_DEATHS: u32 = 2;
/// Between two tries to submit.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// How an answer ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// The model was done.
    Complete,
    /// No room for more tokens.
    CutOff,
    /// Ctrl-C.
    Stopped,
}

/// An answer and its measures.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Its text.
    pub text: String,
    /// How it ended.
    pub ending: Ending,
    /// Token counts; of a stopped answer those known.
    pub usage: Usage,
    /// Until the first token.
    pub first_token: Duration,
    /// Until the end.
    pub total: Duration,
}

impl Answer {
    /// Counts and speed, for `--verbose`.
    pub fn measures(&self) -> String {
        let decoding = self.total.saturating_sub(self.first_token).as_secs_f64();
        let later = self.usage.completion_tokens.saturating_sub(1);
        let speed = if decoding > 0.0 { f64::from(later) / decoding } else { 0.0 };
        format!(
            "{} prompt tokens ({} cached), first token after {:.2} s; {} tokens in {:.2} s, {speed:.1} tokens/s",
            self.usage.prompt_tokens,
            self.usage.cached_prompt_tokens,
            self.first_token.as_secs_f64(),
            self.usage.completion_tokens,
            self.total.as_secs_f64()
        )
    }
}

/// What is asked.
#[derive(Debug, Clone)]
pub struct Question {
    /// Prompt, special tokens included.
    pub prompt_tokens: Vec<u32>,
    /// How to sample.
    pub params: SamplingParams,
    /// Seed; random where absent.
    pub seed: Option<u64>,
}

/// Asks the engine, handing over text as it comes. Ctrl-C ends the answer, not the program.
///
/// # Errors
/// The engine does not admit the prompt, fails, or does not come back after it died.
pub async fn ask(link: &dyn EngineLink, question: Question, show: &mut dyn FnMut(&str) -> Result<()>) -> Result<Answer> {
    let mut asking = Asking::new(link, question);
    let stop = runtime::interrupt();
    tokio::pin!(stop);
    loop {
        let mut stream = tokio::select! {
            biased;
            () = &mut stop => return Ok(asking.finish(Ending::Stopped)),
            stream = asking.submit() => stream?,
        };
        let death = loop {
            let event = tokio::select! {
                biased;
                () = &mut stop => return Ok(asking.finish(Ending::Stopped)),
                event = stream.recv() => event,
            };
            match event {
                Some(EngineEvent::Token(token)) => asking.take(&token, show)?,
                Some(EngineEvent::Finished { reason, text, .. }) => {
                    asking.show(&text, show)?;
                    asking.ending = Some(if reason == FinishReason::Length { Ending::CutOff } else { Ending::Complete });
                }
                Some(EngineEvent::Done(usage)) => {
                    asking.usage = Some(usage);
                    let ending = asking.ending.take().unwrap_or(Ending::Complete);
                    return Ok(asking.finish(ending));
                }
                Some(EngineEvent::PromptLogprobs(_)) => {}
                Some(EngineEvent::Failed { reason, retryable: false }) => {
                    return Err(Failure::new("the engine gave the answer up").cause(reason));
                }
                Some(EngineEvent::Failed { reason, .. }) => break reason,
                None => break "it ended without a word".to_owned(),
            }
        };
        // Only the count was missing: another engine would repeat the end.
        if let Some(ending) = asking.ending.take() {
            return Ok(asking.finish(ending));
        }
        asking.fruitless_deaths += 1;
        if asking.fruitless_deaths >= MAX_FRUITLESS_DEATHS {
            let message = format!("the engine died {MAX_FRUITLESS_DEATHS} times in a row on this answer");
            return Err(Failure::new(message).cause(death));
        }
        // The next engine goes on after the last token, by the same seed.
    }
}

/// A question under way.
struct Asking<'a> {
    link: &'a dyn EngineLink,
    question: Question,
    seed: u64,
    started: Instant,
    first_token: Option<Duration>,
    emitted_tokens: Vec<u32>,
    text: String,
    /// Once the model ended it.
    ending: Option<Ending>,
    usage: Option<Usage>,
    fruitless_deaths: u32,
}

impl<'a> Asking<'a> {
    fn new(link: &'a dyn EngineLink, question: Question) -> Self {
        let (high, low) = uuid::Uuid::new_v4().as_u64_pair();
        Asking {
            link,
            seed: question.seed.unwrap_or(high ^ low),
            question,
            started: Instant::now(),
            first_token: None,
            emitted_tokens: Vec::new(),
            text: String::new(),
            ending: None,
            usage: None,
            fruitless_deaths: 0,
        }
    }

    /// Submits what is left to answer, waiting for an engine that is being restarted.
    async fn submit(&self) -> Result<EventStream> {
        let deadline = Instant::now() + RESTART_WAIT;
        loop {
            let request = GenerateRequest {
                id: RequestId(format!("run-{}", uuid::Uuid::new_v4().simple())),
                tenant: TenantSalt::anonymous(),
                prompt_tokens: Arc::from(self.question.prompt_tokens.as_slice()),
                choices: vec![Choice { index: 0, emitted_tokens: self.emitted_tokens.clone() }],
                seed: self.seed,
                params: self.question.params.clone(),
                priority: 0,
            };
            match self.link.submit(request).await {
                Ok(stream) => return Ok(stream),
                Err(AdmitError::Unavailable { .. } | AdmitError::Overloaded { .. }) if Instant::now() < deadline => {
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
                Err(error @ AdmitError::Unavailable { .. }) => return Err(Failure::of(&error).exit(Exit::LostContact)),
                Err(error) => return Err(Failure::of(&error)),
            }
        }
    }

    /// Takes a token in, unless an engine before sent it already.
    fn take(&mut self, token: &TokenEvent, show: &mut dyn FnMut(&str) -> Result<()>) -> Result<()> {
        if (token.position as usize) < self.emitted_tokens.len() {
            return Ok(());
        }
        self.fruitless_deaths = 0;
        self.emitted_tokens.push(token.token);
        self.show(&token.text, show)
    }

    fn show(&mut self, text: &str, show: &mut dyn FnMut(&str) -> Result<()>) -> Result<()> {
        self.first_token.get_or_insert(self.started.elapsed());
        self.text.push_str(text);
        if text.is_empty() { Ok(()) } else { show(text) }
    }

    fn finish(self, ending: Ending) -> Answer {
        let total = self.started.elapsed();
        let counted = Usage {
            prompt_tokens: self.question.prompt_tokens.len() as u32,
            cached_prompt_tokens: 0,
            completion_tokens: self.emitted_tokens.len() as u32,
        };
        Answer { text: self.text, ending, usage: self.usage.unwrap_or(counted), first_token: self.first_token.unwrap_or(total), total }
    }
}

#[cfg(test)]
#[path = "answer_tests.rs"]
mod tests;
