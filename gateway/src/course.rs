//! [`Course`]: what one request does next, from its first submission to its last event, as a core without I/O.
//!
//! It says which replica to submit to, how long to wait, what the client is to see and when it is over; a shell submits,
//! waits and listens, and tells it what came of that. Time is an argument (time since the gateway began). What the client
//! has seen is the [`RequestJournal`]'s to know, what a replica can do its link's.
//!
//! Invariants: a request that was not admitted ends with an error and has sent nothing; one that was admitted goes on only
//! at replicas of the numerics that admitted it, and ends with `Done` or an error; each attempt at a replica is told to that
//! replica's breaker once, also where the course is dropped in the middle of it; second tries before the admission are paid
//! from the gateway's budget.

use std::sync::Arc;
use std::time::Duration;

use forge_shared::generate::{AdmitError, EngineEvent, GenerateRequest};
use forge_shared::ids::RequestId;
use parking_lot::Mutex;

use crate::error::ApiError;
use crate::journal::{Loss, Next, Recorded, RequestJournal};
use crate::models::{Attempt, Model, Replica, ReplicaGuard, Wanted};
use crate::retry_budget::RetryBudget;

/// How often readiness is looked at while no replica can answer.
pub const READY_POLL: Duration = Duration::from_millis(50);

/// For how long only replicas of too little context may be left before a request that needs more is given up: a place with
/// more may be in the making.
const CONTEXT_PATIENCE: Duration = Duration::from_secs(5);

/// Why a repeated idempotency key finds no replica although some are ready.
const OTHER_NUMERICS: &str = "the replicas that are ready compute with other numerics than the one that first accepted this Idempotency-Key, \
     and would answer with other tokens; send it again later, or without the key";

/// Why none of the replicas that are ready is tried.
const HELD_BACK: &str = "its replicas could not be reached of late and are tried again in a moment";

/// What a course begins with.
pub struct Terms {
    /// Where it can go.
    pub model: Arc<Model>,
    /// What is wanted.
    pub request: GenerateRequest,
    /// Requests of equal affinity prefer the same replica.
    pub affinity: u64,
    /// When the client is told that it took too long; a point in time.
    pub deadline: Duration,
    /// The bound that it comes from, as the client is told of it.
    pub deadline_s: u64,
    /// Only replicas of these numerics may admit it, if given.
    pub numerics_id: Option<Arc<str>>,
    /// The client set no bound on its answer, which is then what the context leaves, also of a replica that takes over.
    pub may_be_shortened: bool,
    /// The gateway's, which pays for second tries.
    pub retries: Arc<Mutex<RetryBudget>>,
}

/// What is to be done next.
pub enum Step {
    /// Submit this there, and tell [`Course::submitted`].
    Submit {
        /// Where.
        replica: Arc<Replica>,
        /// What.
        request: Box<GenerateRequest>,
    },
    /// The engine that had it is lost, why: let its stream go, wait as long as `wait` says, then [`Course::waited`].
    Replay {
        /// Why the engine counts as lost.
        reason: String,
        /// How long to wait first.
        wait: Duration,
    },
    /// Wait so long, then [`Course::waited`].
    Wait(Duration),
    /// Take the next event of the stream of the last submission, and tell [`Course::heard`]. The first such step means that
    /// the request is admitted.
    Listen,
    /// The client is to see this. After `Done` it is over; else it goes on as after [`Step::Listen`].
    Forward(EngineEvent),
    /// It is over with this.
    Fail(ApiError),
}

/// What ends a request from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Its deadline.
    Deadline,
    /// The gateway ends.
    BrokenOff,
}

enum State {
    /// No engine has it, and none has admitted it yet.
    Admitting,
    /// It was submitted and no answer came yet.
    Submitted {
        replica: Arc<Replica>,
        guard: ReplicaGuard,
        attempt: Attempt,
    },
    /// An engine answers it.
    Answering {
        replica: Arc<Replica>,
        _guard: ReplicaGuard,
    },
    /// It was admitted once, and no engine has it.
    Replaying,
    Over,
}

/// See the module.
pub struct Course {
    terms: Terms,
    journal: RequestJournal,
    /// Of the engine that admitted it.
    numerics_id: Option<String>,
    /// Before its admission: who was tried, and what the last of them said.
    tried: Vec<Arc<Replica>>,
    refusal: AdmitError,
    /// After an engine's loss: what to submit, and since when only replicas of too little context are left.
    rest: Option<Box<GenerateRequest>>,
    short_since: Option<Duration>,
    state: State,
}

impl Course {
    /// Begins at `now`; the step is to be carried out.
    pub fn begin(terms: Terms, now: Duration) -> (Course, Step) {
        terms.retries.lock().earn();
        let journal = RequestJournal::admit(terms.request.clone(), terms.deadline);
        let refusal = AdmitError::Unavailable { reason: "no replica is ready".into() };
        let (tried, numerics_id) = (Vec::new(), None);
        let mut course = Course { terms, journal, numerics_id, tried, refusal, rest: None, short_since: None, state: State::Admitting };
        let step = course.admit(now);
        (course, step)
    }

    /// Numerics of the engine that admitted it; empty until then.
    pub fn numerics_id(&self) -> &str {
        self.numerics_id.as_deref().unwrap_or_default()
    }

    /// Whether an engine has admitted it.
    pub fn is_admitted(&self) -> bool {
        self.numerics_id.is_some()
    }

    /// Of the request as it is submitted now.
    pub fn id(&self) -> &RequestId {
        self.rest.as_deref().map_or(&self.terms.request.id, |rest| &rest.id)
    }

    /// Whether nothing follows any more.
    pub fn is_over(&self) -> bool {
        matches!(self.state, State::Over)
    }

    /// Whether a replica was asked and has not said yet whether it admits it.
    pub fn is_submitted(&self) -> bool {
        matches!(self.state, State::Submitted { .. })
    }

    /// The replica that has it, or is asked to.
    pub fn replica(&self) -> Option<&Arc<Replica>> {
        match &self.state {
            State::Submitted { replica, .. } | State::Answering { replica, .. } => Some(replica),
            State::Admitting | State::Replaying | State::Over => None,
        }
    }

    /// What became of the submission.
    pub fn submitted(&mut self, answer: Result<(), AdmitError>, now: Duration) -> Step {
        let State::Submitted { replica, guard, attempt } = std::mem::replace(&mut self.state, State::Admitting) else {
            return self.fail(ApiError::Internal("an answer to no submission".into()));
        };
        match &answer {
            Err(AdmitError::Unavailable { .. }) => attempt.failed(now),
            // Any other refusal is an answer.
            Ok(()) | Err(_) => attempt.succeeded(),
        }
        match (answer, self.is_admitted()) {
            (Ok(()), is_admitted) => {
                if !is_admitted {
                    self.numerics_id = Some(replica.link().card().numerics_id.clone());
                }
                self.state = State::Answering { replica, _guard: guard };
                Step::Listen
            }
            (Err(error @ (AdmitError::Overloaded { .. } | AdmitError::Unavailable { .. })), false) => {
                self.refusal = error;
                self.tried.push(replica);
                self.admit(now)
            }
            (Err(error), false) => self.fail(error.into()),
            (Err(AdmitError::Overloaded { .. } | AdmitError::Unavailable { .. }), true) => self.await_successor(now),
            (Err(error), true) => self.fail(ApiError::EngineFailed { reason: error.to_string() }),
        }
    }

    /// The wait is over.
    pub fn waited(&mut self, now: Duration) -> Step {
        match self.state {
            State::Admitting => self.admit(now),
            State::Replaying => self.replay(now),
            _ => self.fail(ApiError::Internal("a wait that nobody asked for".into())),
        }
    }

    /// The next event of the engine's stream; `None` where that ended, which it does not before `Done`.
    pub fn heard(&mut self, event: Option<EngineEvent>, now: Duration) -> Step {
        let (reason, has_died) = match event {
            Some(EngineEvent::Failed { reason, retryable: true }) => (reason, false),
            Some(EngineEvent::Failed { reason, .. }) => return self.fail(ApiError::EngineFailed { reason }),
            None => ("its stream ended".to_owned(), true),
            Some(mut event) => match self.journal.record(&mut event) {
                Ok(Recorded::Forward) => return self.forward(event),
                Ok(Recorded::Repeated) => return Step::Listen,
                Err(violation) => (violation.to_string(), true),
            },
        };
        self.lose(reason, has_died, now)
    }

    /// It is ended from outside, with what the client is told.
    pub fn stop(&mut self, stop: Stop) -> ApiError {
        self.state = State::Over;
        match stop {
            Stop::Deadline => self.too_late(),
            Stop::BrokenOff => {
                ApiError::Unavailable { message: "the server is shutting down; send the request again".into(), retry_after_s: 5 }
            }
        }
    }

    fn too_late(&self) -> ApiError {
        ApiError::Deadline { seconds: self.terms.deadline_s }
    }

    fn forward(&mut self, event: EngineEvent) -> Step {
        if matches!(event, EngineEvent::Done(_)) {
            self.state = State::Over;
        }
        Step::Forward(event)
    }

    fn fail(&mut self, error: ApiError) -> Step {
        self.state = State::Over;
        Step::Fail(error)
    }

    /// Submits to the replica that is preferred among those that were not tried.
    fn admit(&mut self, now: Duration) -> Step {
        self.state = State::Admitting;
        let wanted = self.wanted(&self.terms.request, &self.tried, self.terms.numerics_id.as_deref(), now);
        let Some(replica) = self.terms.model.pick(&wanted) else {
            // Another prompt of this list, perhaps, tries the only replica that is left; it is about to tell.
            if self.terms.model.is_probing(&wanted) {
                return Step::Wait(READY_POLL);
            }
            let error = self.refused(now);
            return self.fail(error);
        };
        if !self.tried.is_empty() && !self.terms.retries.lock().spend(now) {
            tracing::debug!(request = %self.terms.request.id, "no retry left in the gateway's budget");
            let error = self.refused(now);
            return self.fail(error);
        }
        let request = Box::new(self.terms.request.clone());
        self.submit(replica, request)
    }

    /// Why nobody admits it.
    fn refused(&mut self, now: Duration) -> ApiError {
        let refusal = std::mem::replace(&mut self.refusal, AdmitError::Unavailable { reason: String::new() });
        if !self.tried.is_empty() {
            return refusal.into();
        }
        let wanted = self.wanted(&self.terms.request, &self.tried, self.terms.numerics_id.as_deref(), now);
        let is_held_back = self.terms.model.is_held_back(&wanted);
        let other_numerics = || self.terms.numerics_id.as_ref().map(|_| OTHER_NUMERICS.to_owned());
        let reason = self.terms.model.unready_reason().or_else(|| is_held_back.then(|| HELD_BACK.to_owned())).or_else(other_numerics);
        reason.map_or(refusal, |reason| AdmitError::Unavailable { reason }).into()
    }

    fn submit(&mut self, replica: Arc<Replica>, request: Box<GenerateRequest>) -> Step {
        // Counted from now on, so that prompts submitted at the same time spread over the replicas.
        let (guard, attempt) = (replica.occupy(), replica.attempt());
        self.state = State::Submitted { replica: replica.clone(), guard, attempt };
        Step::Submit { replica, request }
    }

    /// An engine died or went away.
    fn lose(&mut self, reason: String, has_died: bool, now: Duration) -> Step {
        let mut replica = String::new();
        if let State::Answering { replica: lost, .. } = std::mem::replace(&mut self.state, State::Replaying) {
            lost.breaker().failed(now);
            replica = lost.key().to_owned();
        }
        let loss = if has_died { Loss::Died(&replica) } else { Loss::Away };
        match self.journal.engine_lost(loss, now) {
            Next::Resubmit { request, wait } => {
                (self.rest, self.short_since) = (Some(request), None);
                Step::Replay { reason, wait }
            }
            Next::Complete(usage) => self.forward(EngineEvent::Done(usage)),
            Next::DeadlineOver => self.fail(self.too_late()),
            Next::GiveUp => {
                let reason = format!("it gave this request up {} times, the last time because: {reason}", self.journal.submissions());
                self.fail(ApiError::EngineFailed { reason })
            }
        }
    }

    /// Submits what is left to a replica that can go on with it. Only an engine of the same numerics goes on with the same
    /// tokens; until one is ready, the client waits.
    fn replay(&mut self, now: Duration) -> Step {
        match self.rest.as_deref().and_then(|rest| self.successor(rest, now)) {
            Some((replica, request)) => self.submit(replica, request),
            None => self.await_successor(now),
        }
    }

    /// Nobody goes on with it at the moment.
    fn await_successor(&mut self, now: Duration) -> Step {
        self.state = State::Replaying;
        self.short_since = match self.rest.as_deref().and_then(|rest| self.too_short(rest)) {
            None => None,
            Some(error) if self.short_since.is_some_and(|since| now.saturating_sub(since) >= CONTEXT_PATIENCE) => return self.fail(error),
            Some(_) => self.short_since.or(Some(now)),
        };
        Step::Wait(READY_POLL)
    }

    fn wanted<'a>(
        &self,
        request: &'a GenerateRequest,
        tried: &'a [Arc<Replica>],
        numerics_id: Option<&'a str>,
        now: Duration,
    ) -> Wanted<'a> {
        let context_tokens = request.prompt_tokens.len().saturating_add(request.params.max_tokens as usize);
        Wanted { request, context_tokens, affinity: self.terms.affinity, tried, numerics_id, now }
    }

    /// A replica that can go on with a request whose engine died, and the request for it. Where all that are left have
    /// less context than the one that admitted it, an answer without a bound of its own ends where theirs does.
    fn successor(&self, request: &GenerateRequest, now: Duration) -> Option<(Arc<Replica>, Box<GenerateRequest>)> {
        let wanted = self.wanted(request, &[], Some(self.numerics_id()), now);
        if let Some(replica) = self.terms.model.pick_successor(&wanted) {
            return Some((replica, Box::new(request.clone())));
        }
        let context_tokens = self.least_context(request);
        if context_tokens >= wanted.context_tokens {
            return None;
        }
        let replica = self.terms.model.pick_successor(&Wanted { context_tokens, ..wanted })?;
        let mut request = request.clone();
        let room = replica.link().card().max_model_len.saturating_sub(request.prompt_tokens.len());
        request.params.max_tokens = request.params.max_tokens.min(u32::try_from(room).unwrap_or(u32::MAX));
        Some((replica, Box::new(request)))
    }

    /// The least context in tokens with which a request can go on: less than it wants where the client set no bound.
    fn least_context(&self, request: &GenerateRequest) -> usize {
        let wanted = request.params.max_tokens as usize;
        let emitted = request.choices.iter().map(|choice| choice.emitted_tokens.len()).max().unwrap_or(0);
        let answer = match self.terms.may_be_shortened {
            true => emitted.saturating_add(1).max(request.params.min_tokens as usize).min(wanted),
            false => wanted,
        };
        request.prompt_tokens.len().saturating_add(answer)
    }

    /// Why a request cannot go on, if all that is left of its numerics has too little context for it.
    fn too_short(&self, request: &GenerateRequest) -> Option<ApiError> {
        let (needed, longest) = (self.least_context(request), self.terms.model.longest_successor(self.numerics_id())?);
        let message = format!(
            "the replica that answered is gone, and those that are left have a context of {longest} tokens, of which this request needs \
             {needed}: send it again with a shorter prompt or a smaller max_tokens"
        );
        let (param, code) = (Some("max_tokens".to_owned()), Some("context_length_exceeded"));
        (longest < needed).then_some(ApiError::Invalid { param, message, code })
    }
}
