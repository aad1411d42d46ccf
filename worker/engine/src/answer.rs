//! One answer's state beside its KV: text, stop conditions, penalties.
//!
//! Invariant: the state is a function of the tokens taken, so an answer that is replayed from its tokens goes
//! on as the original would have. No part of a stop string ever leaves as text.

use forge_shared::generate::{Choice, FinishReason, GenerateRequest, SamplingParams};
use forge_text::{IncrementalDecoder, StopMatcher, StopOutcome, TextError, Tokenizer};

use crate::sampler::TokenHistory;

/// When an answer ends, the same for all answers of a request.
#[derive(Debug, Clone)]
pub(crate) struct StopRules {
    /// The model's end tokens, unless the request ignores them.
    end_tokens: Vec<u32>,
    stop_tokens: Vec<u32>,
    min_tokens: usize,
    /// Tokens an answer may have: `max_tokens`, or what the context leaves.
    max_tokens: usize,
    /// Tokens that may not be sampled before `min_tokens`.
    ending: Vec<u32>,
}

impl StopRules {
    pub(crate) fn new(params: &SamplingParams, end_tokens: &[u32], prompt_len: usize, max_model_len: usize) -> Self {
        let end_tokens = if params.ignore_eos { Vec::new() } else { end_tokens.to_vec() };
        StopRules {
            ending: [&end_tokens[..], &params.stop_token_ids].concat(),
            end_tokens,
            stop_tokens: params.stop_token_ids.clone(),
            min_tokens: params.min_tokens as usize,
            max_tokens: (params.max_tokens as usize).min(max_model_len.saturating_sub(prompt_len)),
        }
    }

    pub(crate) fn max_tokens(&self) -> usize {
        self.max_tokens
    }
}

/// An answer being given.
#[derive(Debug)]
pub(crate) struct Answer {
    /// `Choice::index`.
    pub(crate) index: u32,
    /// Tokens taken.
    pub(crate) tokens: usize,
    /// For the penalties.
    pub(crate) history: TokenHistory,
    pub(crate) finished: bool,
    decoder: IncrementalDecoder,
    stops: StopMatcher,
}

/// What a token led to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Taken {
    /// Text that became certain.
    pub(crate) text: String,
    /// Why the answer ended with this token, if it did, and the text that was held back.
    pub(crate) end: Option<(FinishReason, String)>,
}

impl Answer {
    pub(crate) fn new(request: &GenerateRequest, choice: &Choice, tokenizer: &Tokenizer) -> Result<Self, TextError> {
        Ok(Answer {
            index: choice.index,
            tokens: 0,
            history: TokenHistory::new(&request.params, &request.prompt_tokens),
            finished: false,
            decoder: IncrementalDecoder::new(tokenizer.clone(), request.params.skip_special_tokens),
            stops: StopMatcher::new(&request.params.stop)?,
        })
    }

    /// Tokens that may not be sampled next.
    pub(crate) fn forbidden<'a>(&self, rules: &'a StopRules) -> &'a [u32] {
        if self.tokens < rules.min_tokens { &rules.ending } else { &[] }
    }

    /// Takes the next token, sampled or replayed.
    pub(crate) fn take(&mut self, token: u32, rules: &StopRules) -> Result<Taken, TextError> {
        let may_stop = self.tokens >= rules.min_tokens;
        self.tokens += 1;
        self.history.push(token);
        if may_stop && rules.end_tokens.contains(&token) {
            return Ok(self.end(String::new(), FinishReason::EndOfText));
        }
        if may_stop && rules.stop_tokens.contains(&token) {
            return Ok(self.end(String::new(), FinishReason::StopToken(token)));
        }
        let mut text = self.decoder.push(token)?;
        if may_stop {
            match self.stops.push(&text) {
                StopOutcome::Emit(certain) => text = certain,
                StopOutcome::Stopped { text_before, matched } => {
                    self.finished = true;
                    let end = Some((FinishReason::StopString(matched), String::new()));
                    return Ok(Taken { text: text_before, end });
                }
            }
        }
        if self.tokens >= rules.max_tokens {
            return Ok(self.end(text, FinishReason::Length));
        }
        Ok(Taken { text, end: None })
    }

    /// Ends the answer: what the decoder and the stop strings held back becomes certain.
    fn end(&mut self, text: String, reason: FinishReason) -> Taken {
        self.finished = true;
        let last = self.decoder.flush();
        let end = match self.stops.push(&last) {
            StopOutcome::Emit(held) => (reason, held + &self.stops.flush()),
            StopOutcome::Stopped { text_before, matched } => (FinishReason::StopString(matched), text_before),
        };
        Taken { text, end: Some(end) }
    }
}
