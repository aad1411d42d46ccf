//! [`RequestJournal`]: what was accepted and what the client has seen of it, as a core without I/O (DESIGN §5).
//!
//! When an engine dies, the journal says what to submit to the next one: the request with the tokens emitted so far,
//! for the answers that have not ended. It takes time as an argument (time since the gateway began).
//!
//! Invariant: the events it lets through are, per answer, tokens at positions 0, 1, 2, … and then one end; a token
//! that was sent is never sent again and never changes, however many engines die.

use std::collections::BTreeMap;
use std::time::Duration;

use forge_shared::generate::{Choice, EngineEvent, GenerateRequest, Usage};
use forge_shared::ids::RequestId;

/// Deaths of one replica in a row, without a token between, at which the request itself is held to be the cause. It must
/// stay below `worker::agent::RestartLimits::deaths_max` (3 within 60 s): past that the agent gives the replica up, and
/// the request would have taken the server with it.
pub const MAX_FRUITLESS_DEATHS: u32 = 2;
/// The same over all replicas: two workers may die one after the other for reasons of their own, before a first token.
pub const MAX_FRUITLESS_DEATHS_IN_ALL: u32 = 3;

/// Engines in a row that went away, without a token between, at which a request is given up although none is known to have
/// died of it. A cluster in trouble takes several away, one after the other; a request that takes whole processes with it,
/// which looks the same from here, must not take all there are.
pub const MAX_FRUITLESS_LOSSES: u32 = 6;

/// How a request lost its engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss<'a> {
    /// The engine of this replica died, or broke the contract.
    Died(&'a str),
    /// It was stopped, or the way to it broke: nothing says that the request has to do with it.
    Away,
}

/// How far an answer is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Answer {
    emitted: Vec<u32>,
    finished: bool,
}

/// What to do with an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recorded {
    /// New: send it on.
    Forward,
    /// The client has it already.
    Repeated,
}

/// An engine that does not keep the contract; it is treated as dead.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// An answer that was not asked for.
    #[error("the engine answered choice {0}, which was not asked for")]
    UnknownChoice(u32),
    /// A token after the end, or a hole before it.
    #[error("the engine sent token {got} of choice {choice} where token {expected} is next")]
    OutOfOrder {
        /// Which answer.
        choice: u32,
        /// Position that is next.
        expected: usize,
        /// Position that came.
        got: usize,
    },
    /// Another token at a position that was sent.
    #[error("the engine changed token {position} of choice {choice}")]
    Changed {
        /// Which answer.
        choice: u32,
        /// Where.
        position: usize,
    },
    /// `Done` before all answers ended.
    #[error("the engine ended the request before all its answers ended")]
    EarlyEnd,
}

/// What follows an engine's death.
#[derive(Debug, Clone, PartialEq)]
pub enum Next {
    /// Submit this, after the wait.
    Resubmit {
        /// The request, continued.
        request: Box<GenerateRequest>,
        /// How long to wait first.
        wait: Duration,
    },
    /// Nothing: every answer had ended.
    Complete(Usage),
    /// Nothing: the deadline is over.
    DeadlineOver,
    /// Nothing: it fails wherever it goes.
    GiveUp,
}

/// The record of one accepted request.
#[derive(Debug, Clone)]
pub struct RequestJournal {
    request: GenerateRequest,
    answers: BTreeMap<u32, Answer>,
    prompt_logprobs_sent: bool,
    deadline: Duration,
    submissions: u32,
    /// Replicas that died in a row without a token between.
    fruitless: Vec<String>,
    /// Engines that went away in a row without a token between, those that died included.
    losses: u32,
    /// Tokens of answers that ended under an engine that died, which the next engine does not count.
    carried_tokens: u32,
}

impl RequestJournal {
    /// Admits a request; `deadline` is a point in time, not a span.
    pub fn admit(request: GenerateRequest, deadline: Duration) -> Self {
        let answer = |choice: &Choice| (choice.index, Answer { emitted: choice.emitted_tokens.clone(), finished: false });
        RequestJournal {
            answers: request.choices.iter().map(answer).collect(),
            request,
            prompt_logprobs_sent: false,
            deadline,
            submissions: 1,
            fruitless: Vec::new(),
            losses: 0,
            carried_tokens: 0,
        }
    }

    /// Times the request was submitted.
    pub fn submissions(&self) -> u32 {
        self.submissions
    }

    /// Notes an event before it is sent on. A forwarded `Done` carries the usage of the whole request.
    ///
    /// # Errors
    /// [`Violation`]; the event must not be sent, and the engine is to be given up.
    pub fn record(&mut self, event: &mut EngineEvent) -> Result<Recorded, Violation> {
        match event {
            EngineEvent::PromptLogprobs(_) => {
                let repeated = std::mem::replace(&mut self.prompt_logprobs_sent, true);
                Ok(if repeated { Recorded::Repeated } else { Recorded::Forward })
            }
            EngineEvent::Token(token) => self.emitted(token.choice, token.position as usize, token.token),
            EngineEvent::Finished { choice, .. } => {
                let answer = self.answer(*choice)?;
                let repeated = std::mem::replace(&mut answer.finished, true);
                Ok(if repeated { Recorded::Repeated } else { Recorded::Forward })
            }
            EngineEvent::Done(usage) => {
                if self.answers.values().any(|answer| !answer.finished) {
                    return Err(Violation::EarlyEnd);
                }
                usage.completion_tokens += self.carried_tokens;
                Ok(Recorded::Forward)
            }
            EngineEvent::Failed { .. } => Ok(Recorded::Forward),
        }
    }

    fn answer(&mut self, choice: u32) -> Result<&mut Answer, Violation> {
        self.answers.get_mut(&choice).ok_or(Violation::UnknownChoice(choice))
    }

    fn emitted(&mut self, choice: u32, position: usize, token: u32) -> Result<Recorded, Violation> {
        let answer = self.answer(choice)?;
        let expected = answer.emitted.len();
        match answer.emitted.get(position) {
            Some(&sent) if sent == token => Ok(Recorded::Repeated),
            Some(_) => Err(Violation::Changed { choice, position }),
            None if position > expected || answer.finished => Err(Violation::OutOfOrder { choice, expected, got: position }),
            None => {
                answer.emitted.push(token);
                self.fruitless.clear();
                self.losses = 0;
                Ok(Recorded::Forward)
            }
        }
    }

    /// What follows the loss of an engine at `now`.
    pub fn engine_lost(&mut self, loss: Loss<'_>, now: Duration) -> Next {
        if self.answers.values().all(|answer| answer.finished) {
            return Next::Complete(Usage {
                prompt_tokens: self.request.prompt_tokens.len() as u32,
                // Only `Done` tells it, and that died with the engine.
                cached_prompt_tokens: 0,
                completion_tokens: self.answers.values().map(|answer| answer.emitted.len() as u32).sum(),
            });
        }
        if now >= self.deadline {
            return Next::DeadlineOver;
        }
        self.losses += 1;
        if let Loss::Died(replica) = loss {
            self.fruitless.push(replica.to_owned());
            let of_this = self.fruitless.iter().filter(|other| *other == replica).count();
            let in_all = self.fruitless.len();
            if of_this >= MAX_FRUITLESS_DEATHS as usize || in_all >= MAX_FRUITLESS_DEATHS_IN_ALL as usize {
                return Next::GiveUp;
            }
        }
        if self.losses >= MAX_FRUITLESS_LOSSES {
            return Next::GiveUp;
        }
        let wait = Duration::from_millis(10 << (2 * (self.losses - 1)).min(6));
        Next::Resubmit { request: Box::new(self.resubmit()), wait }
    }

    /// The request for the next engine: answers that have not ended, with what was sent of them.
    fn resubmit(&mut self) -> GenerateRequest {
        let ended = self.answers.values().filter(|answer| answer.finished);
        self.carried_tokens = ended.map(|answer| answer.emitted.len() as u32).sum();
        let choices = self
            .answers
            .iter()
            .filter(|(_, answer)| !answer.finished)
            .map(|(index, answer)| Choice { index: *index, emitted_tokens: answer.emitted.clone() })
            .collect();
        self.submissions += 1;
        let id = RequestId(format!("{}.r{}", self.request.id, self.submissions - 1));
        GenerateRequest { id, choices, ..self.request.clone() }
    }
}

#[cfg(test)]
#[path = "journal_tests.rs"]
mod tests;
