//! `Engine`: the blocking way in, for programs that embed Forge and for tests.
//!
//! It is an [`EngineThread`] and nothing more: requests from several threads are batched together.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use forge_model::StepModel;
use forge_shared::generate::{Choice, EngineEvent, FinishReason, GenerateRequest, Logprobs, SamplingParams, TenantSalt, TokenEvent, Usage};
use forge_shared::ids::RequestId;
use forge_shared::link::{DefaultSampling, EventStream, ModelCard};
use forge_shared::telemetry::Metrics;
use forge_text::Tokenizer;

use crate::{EngineError, EngineHandle, EngineOptions, EngineSetup, EngineThread};

/// An engine on a thread of its own. See the crate's documentation for an example.
#[derive(Debug)]
pub struct Engine {
    handle: EngineHandle,
    tokenizer: Tokenizer,
    requests: AtomicU64,
}

/// One complete answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// `Choice::index`.
    pub choice: u32,
    /// Sampled tokens, an end token included; tokens replayed from `emitted_tokens` are not.
    pub tokens: Vec<u32>,
    /// Their text, without a stop string.
    pub text: String,
    /// One per token, if asked for.
    pub logprobs: Vec<Logprobs>,
    /// Why it ended.
    pub finish_reason: FinishReason,
}

/// What a request came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// Answers in the order of the request's choices.
    pub completions: Vec<Completion>,
    /// Of prompt tokens 1.., if asked for.
    pub prompt_logprobs: Option<Vec<Logprobs>>,
    /// Token counts.
    pub usage: Usage,
}

impl Engine {
    /// Starts an engine.
    ///
    /// # Errors
    /// As [`EngineThread::spawn`].
    pub fn new(model: Box<dyn StepModel>, tokenizer: Tokenizer, options: EngineOptions) -> Result<Self, EngineError> {
        let info = model.info();
        let card = Arc::new(ModelCard {
            name: "model".into(),
            names: vec!["model".into()],
            unlisted_names: Vec::new(),
            max_model_len: info.max_model_len,
            vocab_size: info.vocab_size,
            numerics_id: info.numerics_id.clone(),
            created_s: 0,
            default_sampling: DefaultSampling::default(),
        });
        let setup = EngineSetup { model, tokenizer: tokenizer.clone(), card, replica: "model/0".into(), options, metrics: Metrics::new() };
        let (handle, _exit) = EngineThread::spawn(setup)?;
        Ok(Engine { handle, tokenizer, requests: AtomicU64::new(0) })
    }

    /// The tokenizer, to encode prompts and decode tokens.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The handle, for asynchronous use and for counts.
    pub fn handle(&self) -> &EngineHandle {
        &self.handle
    }

    /// A request for one answer to a prompt, to change and pass to [`Self::run`]. Its seed is 0.
    pub fn request(&self, prompt_tokens: &[u32], params: SamplingParams) -> GenerateRequest {
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        GenerateRequest {
            id: RequestId(format!("local-{number}")),
            tenant: TenantSalt::anonymous(),
            prompt_tokens: prompt_tokens.into(),
            choices: vec![Choice { index: 0, emitted_tokens: Vec::new() }],
            seed: 0,
            params,
            priority: 0,
        }
    }

    /// Generates one answer with seed 0. Blocks; not for asynchronous code.
    ///
    /// # Errors
    /// [`EngineError::Admit`], [`EngineError::Failed`] or [`EngineError::Died`].
    pub fn generate(&self, prompt_tokens: &[u32], params: SamplingParams) -> Result<Completion, EngineError> {
        let mut generation = self.run(self.request(prompt_tokens, params))?;
        Ok(generation.completions.swap_remove(0))
    }

    /// Continues a text, with the special tokens around it that the model wants. Blocks; not for asynchronous
    /// code.
    ///
    /// # Errors
    /// As [`Self::generate`], and [`EngineError::Text`].
    pub fn generate_text(&self, prompt: &str, params: SamplingParams) -> Result<Completion, EngineError> {
        self.generate(&self.tokenizer.encode(prompt, true)?, params)
    }

    /// Generates all answers of a request. Blocks; not for asynchronous code.
    ///
    /// # Errors
    /// As [`Self::generate`].
    pub fn run(&self, request: GenerateRequest) -> Result<Generation, EngineError> {
        let indices: Vec<u32> = request.choices.iter().map(|choice| choice.index).collect();
        let mut gathered = Gathered::new(&indices);
        for event in self.events(request)? {
            gathered.take(event?)?;
        }
        gathered.finish()
    }

    /// Generates one answer with seed 0, piece by piece.
    ///
    /// # Errors
    /// [`EngineError::Admit`]; later ones come from the iterator.
    pub fn stream(&self, prompt_tokens: &[u32], params: SamplingParams) -> Result<TokenStream, EngineError> {
        Ok(TokenStream { events: self.events(self.request(prompt_tokens, params))? })
    }

    /// Submits a request and iterates over its events; the last is `Done` or `Failed`. Dropping the iterator
    /// cancels the request.
    ///
    /// # Errors
    /// [`EngineError::Admit`]; [`EngineError::Died`] comes from the iterator.
    pub fn events(&self, request: GenerateRequest) -> Result<Events, EngineError> {
        let pending = self.handle.send(request)?;
        pending.admitted.blocking_recv().map_err(|_| self.handle.gone())??;
        Ok(Events { stream: Some(pending.stream), handle: self.handle.clone() })
    }
}

/// Blocking iterator over a request's events.
#[derive(Debug)]
pub struct Events {
    stream: Option<EventStream>,
    handle: EngineHandle,
}

impl Iterator for Events {
    type Item = Result<EngineEvent, EngineError>;

    fn next(&mut self) -> Option<Self::Item> {
        let Some(event) = self.stream.as_mut()?.blocking_recv() else {
            self.stream = None;
            return Some(Err(EngineError::Died { reason: self.handle.end_reason() }));
        };
        if matches!(event, EngineEvent::Done(_) | EngineEvent::Failed { .. }) {
            self.stream = None;
        }
        Some(Ok(event))
    }
}

/// A piece of a streamed answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Piece {
    /// The token; none in the last piece, which only ends the answer.
    pub token: Option<u32>,
    /// Text that became certain, perhaps none.
    pub text: String,
    /// Of the token, if asked for.
    pub logprobs: Option<Logprobs>,
    /// In the last piece.
    pub finish_reason: Option<FinishReason>,
}

/// Blocking iterator over one answer, a piece per token and a last one. Dropping it cancels the request.
#[derive(Debug)]
pub struct TokenStream {
    events: Events,
}

impl Iterator for TokenStream {
    type Item = Result<Piece, EngineError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.events.next()? {
                Err(error) => return Some(Err(error)),
                Ok(EngineEvent::Failed { reason, retryable }) => return Some(Err(EngineError::Failed { reason, retryable })),
                Ok(EngineEvent::Token(TokenEvent { token, text, logprobs, .. })) => {
                    return Some(Ok(Piece { token: Some(token), text, logprobs, finish_reason: None }));
                }
                Ok(EngineEvent::Finished { text, reason, .. }) => {
                    return Some(Ok(Piece { token: None, text, logprobs: None, finish_reason: Some(reason) }));
                }
                Ok(EngineEvent::PromptLogprobs(_) | EngineEvent::Done(_)) => {}
            }
        }
    }
}

/// Puts a request's events together.
struct Gathered {
    completions: Vec<(Completion, bool)>,
    prompt_logprobs: Option<Vec<Logprobs>>,
    usage: Option<Usage>,
}

impl Gathered {
    fn new(indices: &[u32]) -> Self {
        let empty = |&choice: &u32| Completion {
            choice,
            tokens: Vec::new(),
            text: String::new(),
            logprobs: Vec::new(),
            finish_reason: FinishReason::Length,
        };
        Gathered { completions: indices.iter().map(|index| (empty(index), false)).collect(), prompt_logprobs: None, usage: None }
    }

    fn answer(&mut self, choice: u32) -> Option<&mut (Completion, bool)> {
        self.completions.iter_mut().find(|(completion, _)| completion.choice == choice)
    }

    fn take(&mut self, event: EngineEvent) -> Result<(), EngineError> {
        match event {
            EngineEvent::PromptLogprobs(logprobs) => self.prompt_logprobs = Some(logprobs),
            EngineEvent::Token(token) => {
                if let Some((completion, _)) = self.answer(token.choice) {
                    completion.tokens.push(token.token);
                    completion.text.push_str(&token.text);
                    completion.logprobs.extend(token.logprobs);
                }
            }
            EngineEvent::Finished { choice, reason, text } => {
                if let Some((completion, finished)) = self.answer(choice) {
                    completion.text.push_str(&text);
                    completion.finish_reason = reason;
                    *finished = true;
                }
            }
            EngineEvent::Done(usage) => self.usage = Some(usage),
            EngineEvent::Failed { reason, retryable } => return Err(EngineError::Failed { reason, retryable }),
        }
        Ok(())
    }

    fn finish(self) -> Result<Generation, EngineError> {
        let incomplete = || EngineError::Died { reason: "the events of the request are incomplete".into() };
        let usage = self.usage.ok_or_else(incomplete)?;
        if self.completions.iter().any(|(_, finished)| !finished) {
            return Err(incomplete());
        }
        let completions = self.completions.into_iter().map(|(completion, _)| completion).collect();
        Ok(Generation { completions, prompt_logprobs: self.prompt_logprobs, usage })
    }
}
