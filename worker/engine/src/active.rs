//! One admitted request: its answers, what was sent, and what its next logits lead to.

use std::time::Duration;

use forge_model::StepModelInfo;
use forge_shared::generate::{EngineEvent, FinishReason, GenerateRequest, Logprobs, TokenEvent, Usage};
use forge_text::{TextError, Tokenizer};

use crate::answer::{Answer, StopRules, Taken};
use crate::outlet::Outlet;
use crate::sampler::{DrawKey, SampleInput, Sampled, Sampler};
use crate::scheduler::SequenceId;

/// A request being answered.
#[derive(Debug)]
pub(crate) struct Active {
    pub(crate) outlet: Outlet,
    pub(crate) submitted_at: Duration,
    /// Prompt tokens whose KV was cached when it first ran.
    pub(crate) cached_tokens: usize,
    request: GenerateRequest,
    rules: StopRules,
    answers: Vec<Answer>,
    /// Sequences of the unfinished answers at admission, and which answer each is.
    sequences: Vec<SequenceId>,
    answer_of: Vec<usize>,
    scores: Vec<Logprobs>,
}

/// What became of a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// A prompt token was scored; more rows follow.
    Scored,
    /// The answer goes on with this token.
    Continue(u32),
    /// The answer ended, others go on.
    AnswerEnded,
    /// It was the last: `Done` was sent.
    RequestEnded,
}

impl Active {
    /// Takes an admitted request and replays the tokens its answers have already.
    pub(crate) fn new(
        request: GenerateRequest,
        outlet: Outlet,
        tokenizer: &Tokenizer,
        info: &StepModelInfo,
        submitted_at: Duration,
    ) -> Result<Self, TextError> {
        let rules = StopRules::new(&request.params, tokenizer.eos_ids(), request.prompt_tokens.len(), info.max_model_len);
        let mut active = Active {
            outlet,
            submitted_at,
            cached_tokens: 0,
            rules,
            answers: Vec::new(),
            sequences: Vec::new(),
            answer_of: Vec::new(),
            scores: Vec::new(),
            request,
        };
        active.send_empty_scores();
        for place in 0..active.request.choices.len() {
            active.replay(place, tokenizer)?;
        }
        Ok(active)
    }

    /// Rebuilds one answer's state. Text of replayed tokens was sent before and is not sent again; an answer
    /// whose tokens end it is finished at once.
    fn replay(&mut self, place: usize, tokenizer: &Tokenizer) -> Result<(), TextError> {
        let choice = &self.request.choices[place];
        let mut answer = Answer::new(&self.request, choice, tokenizer)?;
        let mut end = None;
        for &token in &choice.emitted_tokens {
            end = answer.take(token, &self.rules)?.end;
            if end.is_some() {
                break;
            }
        }
        if end.is_none() && self.rules.max_tokens() == 0 && !self.scores_prompt() {
            answer.finished = true;
            end = Some((FinishReason::Length, String::new()));
        }
        if let Some((reason, text)) = end {
            self.outlet.send(EngineEvent::Finished { choice: answer.index, reason, text });
        }
        self.answers.push(answer);
        Ok(())
    }

    pub(crate) fn request(&self) -> &GenerateRequest {
        &self.request
    }

    pub(crate) fn sequences(&self) -> &[SequenceId] {
        &self.sequences
    }

    /// Whether the prompt's tokens are to be scored: asked for, and not sent by an earlier engine, which would
    /// have done so before any token; a prompt of one token has none to score.
    pub(crate) fn scores_prompt(&self) -> bool {
        self.request.params.prompt_logprobs.is_some()
            && self.request.prompt_tokens.len() > 1
            && self.request.choices.iter().all(|choice| choice.emitted_tokens.is_empty())
    }

    /// Tokens of the answers to compute; `None` if every answer has ended already.
    pub(crate) fn unfinished(&mut self) -> Option<Vec<Vec<u32>>> {
        let mut places: Vec<usize> = (0..self.answers.len()).filter(|&place| !self.answers[place].finished).collect();
        if self.rules.max_tokens() == 0 {
            // The prompt is only scored: once, for all answers.
            places.truncate(1);
        }
        let tokens = places.iter().map(|&place| self.request.choices[place].emitted_tokens.clone()).collect();
        self.answer_of = places;
        (!self.answer_of.is_empty()).then_some(tokens)
    }

    /// A prompt of one token has no token to score, which is said at once.
    fn send_empty_scores(&mut self) {
        let fresh = self.request.choices.iter().all(|choice| choice.emitted_tokens.is_empty());
        if self.request.params.prompt_logprobs.is_some() && fresh && !self.scores_prompt() {
            self.outlet.send(EngineEvent::PromptLogprobs(Vec::new()));
        }
    }

    pub(crate) fn set_sequences(&mut self, sequences: Vec<SequenceId>) {
        self.sequences = sequences;
    }

    /// Sends `Done` for a request whose answers have all ended.
    pub(crate) fn finish(mut self) -> Outlet {
        self.send_done();
        self.outlet
    }

    /// Scores the prompt's token at `position` with the logits of the row before it.
    pub(crate) fn score(&mut self, sampler: &mut Sampler, row: &[f32], position: usize) -> Result<Next, String> {
        let top = self.request.params.prompt_logprobs.unwrap_or(0);
        let token = self.request.prompt_tokens[position];
        self.scores.push(sampler.score(row, token, top).map_err(|error| error.to_string())?);
        if position + 1 < self.request.prompt_tokens.len() {
            return Ok(Next::Scored);
        }
        self.outlet.send(EngineEvent::PromptLogprobs(std::mem::take(&mut self.scores)));
        if self.rules.max_tokens() > 0 {
            return Ok(Next::Scored);
        }
        for answer in &mut self.answers {
            answer.finished = true;
            let event = EngineEvent::Finished { choice: answer.index, reason: FinishReason::Length, text: String::new() };
            self.outlet.send(event);
        }
        self.send_done();
        Ok(Next::RequestEnded)
    }

    /// Draws a sequence's next token. Nothing changes: see [`Self::accept`].
    pub(crate) fn draw(&self, sampler: &mut Sampler, row: &mut [f32], id: SequenceId) -> Result<Sampled, String> {
        let answer = &self.answers[self.answer_of[id.choice as usize]];
        let position = (self.request.prompt_tokens.len() + answer.tokens) as u32;
        let key = DrawKey { seed: self.request.seed, choice: answer.index, position };
        let forbidden = answer.forbidden(&self.rules);
        let input = SampleInput { params: &self.request.params, history: &answer.history, forbidden, key };
        sampler.sample(row, input).map_err(|error| error.to_string())
    }

    /// Takes a sequence's drawn token and sends what follows from it.
    pub(crate) fn accept(&mut self, sampled: Sampled, id: SequenceId) -> Result<Next, String> {
        let answer = &mut self.answers[self.answer_of[id.choice as usize]];
        let position = answer.tokens;
        let Taken { text, end } = answer.take(sampled.token, &self.rules).map_err(|error| error.to_string())?;
        let choice = answer.index;
        self.outlet.send(EngineEvent::Token(TokenEvent {
            choice,
            position: position as u32,
            token: sampled.token,
            text,
            logprobs: sampled.logprobs,
        }));
        let Some((reason, text)) = end else { return Ok(Next::Continue(sampled.token)) };
        self.outlet.send(EngineEvent::Finished { choice, reason, text });
        if self.answers.iter().any(|answer| !answer.finished) {
            return Ok(Next::AnswerEnded);
        }
        self.send_done();
        Ok(Next::RequestEnded)
    }

    fn send_done(&mut self) {
        self.outlet.send(EngineEvent::Done(Usage {
            prompt_tokens: self.request.prompt_tokens.len() as u32,
            cached_prompt_tokens: self.cached_tokens as u32,
            completion_tokens: self.answers.iter().map(|answer| answer.tokens).sum::<usize>() as u32,
        }));
    }
}
