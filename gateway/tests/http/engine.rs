//! A small engine that answers by a rule, and dies, stalls or refuses when told to.
//!
//! Its tokens depend on seed, choice, position and prompt alone, as a real engine's do, so a replay can be compared.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use forge_shared::generate::{AdmitError, Choice, EngineEvent, FinishReason, GenerateRequest, Logprobs, TokenEvent, TokenLogprob, Usage};
use forge_shared::link::{DefaultSampling, EngineLink, EngineStatus, EventStream, ModelCard};
use futures::FutureExt;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::mpsc;

/// How a submission goes wrong, after so many events.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Fate {
    /// The stream ends.
    Dies(usize),
    /// The stream ends, and the engine is not ready for so long.
    DiesAndRestarts(usize, Duration),
    /// It gives the request up, to be tried again.
    FailsRetryably(usize),
    /// It gives the request up for good.
    Fails(usize),
    /// It says nothing more and lives.
    Hangs(usize),
    /// It sends another token than the request determines.
    Changes(usize),
}

#[derive(Debug, Clone)]
pub(crate) struct Script {
    pub(crate) ready: bool,
    /// For the next submissions, in order; after those all goes well.
    pub(crate) fates: VecDeque<Fate>,
    pub(crate) refusal: Option<AdmitError>,
    pub(crate) pace: Duration,
    /// How long admission takes, as a step of a real engine does.
    pub(crate) admits_after: Duration,
    /// Events it may be ahead of its reader.
    pub(crate) ahead: usize,
    pub(crate) end: FinishReason,
}

pub(crate) struct ScriptedEngine {
    card: Arc<ModelCard>,
    letters: Vec<u32>,
    pub(crate) script: Arc<Mutex<Script>>,
    /// Every request that was admitted.
    pub(crate) seen: Mutex<Vec<GenerateRequest>>,
    /// Requests being answered.
    pub(crate) active: Arc<AtomicUsize>,
}

pub(crate) const CONTEXT: usize = 512;
const VOCABULARY: usize = 502;

impl ScriptedEngine {
    pub(crate) fn new(name: &str, numerics_id: &str) -> Arc<Self> {
        Self::with_context(name, numerics_id, CONTEXT)
    }

    pub(crate) fn with_context(name: &str, numerics_id: &str, max_model_len: usize) -> Arc<Self> {
        let tokenizer = super::tokenizer();
        let letters = ('a'..='z').filter_map(|letter| tokenizer.token_id(&letter.to_string())).collect::<Vec<_>>();
        assert_eq!(letters.len(), 26);
        Arc::new(ScriptedEngine {
            card: Arc::new(ModelCard {
                name: name.into(),
                names: vec![name.into(), format!("{name}-alias")],
                unlisted_names: vec![format!("/models/{name}.gguf")],
                max_model_len,
                vocab_size: VOCABULARY,
                numerics_id: numerics_id.into(),
                created_s: 1_700_000_000,
                default_sampling: DefaultSampling { top_p: Some(0.75), ..DefaultSampling::default() },
            }),
            letters,
            script: Arc::new(Mutex::new(Script {
                ready: true,
                fates: VecDeque::new(),
                refusal: None,
                pace: Duration::ZERO,
                admits_after: Duration::ZERO,
                ahead: 8,
                end: FinishReason::Length,
            })),
            seen: Mutex::default(),
            active: Arc::default(),
        })
    }

    pub(crate) fn fates(&self, fates: impl IntoIterator<Item = Fate>) {
        self.script.lock().fates = fates.into_iter().collect();
    }

    pub(crate) fn last(&self) -> GenerateRequest {
        self.seen.lock().last().cloned().expect("a request was admitted")
    }

    /// What this engine says at a position, as text.
    pub(crate) fn letter(&self, request: &GenerateRequest, choice: u32, position: u32) -> u32 {
        let mixed = request.seed.wrapping_mul(31).wrapping_add(u64::from(choice) * 7 + u64::from(position) * 3);
        self.letters[(mixed.wrapping_add(request.prompt_tokens.len() as u64) % 26) as usize]
    }

    fn logprobs(&self, token: u32, alternatives: Option<u32>) -> Option<Logprobs> {
        let entry = |(rank, token): (usize, u32)| TokenLogprob { token, logprob: -0.5 - rank as f32 };
        let others = self.letters.iter().copied().filter(|other| *other != token);
        let tokens = std::iter::once(token).chain(others).enumerate().map(entry);
        alternatives.map(|count| Logprobs { chosen: TokenLogprob { token, logprob: -0.5 }, top: tokens.take(count as usize).collect() })
    }

    /// Everything it has to say to a request.
    fn events(&self, request: &GenerateRequest, end: &FinishReason) -> Vec<EngineEvent> {
        let mut events = Vec::new();
        if let Some(count) = request.params.prompt_logprobs {
            let rows = request.prompt_tokens[1..].iter().filter_map(|token| self.logprobs(*token, Some(count))).collect();
            events.push(EngineEvent::PromptLogprobs(rows));
        }
        for position in 0..request.params.max_tokens {
            for Choice { index, emitted_tokens } in &request.choices {
                if position < emitted_tokens.len() as u32 {
                    assert_eq!(emitted_tokens[position as usize], self.letter(request, *index, position), "replay is handed the truth");
                    continue;
                }
                let token = self.letter(request, *index, position);
                let text = super::tokenizer().token_text(token);
                let logprobs = self.logprobs(token, request.params.logprobs);
                events.push(EngineEvent::Token(TokenEvent { choice: *index, position, token, text, logprobs }));
            }
        }
        for Choice { index, .. } in &request.choices {
            events.push(EngineEvent::Finished { choice: *index, reason: end.clone(), text: "!".into() });
        }
        let completion_tokens = request.params.max_tokens * request.choices.len() as u32;
        events.push(EngineEvent::Done(Usage {
            prompt_tokens: request.prompt_tokens.len() as u32,
            cached_prompt_tokens: 1,
            completion_tokens,
        }));
        events
    }
}

struct Active(Arc<AtomicUsize>);

impl Drop for Active {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// What a submission sends, and how it ends.
struct Plan {
    events: Vec<EngineEvent>,
    pace: Duration,
    hangs: bool,
}

impl Plan {
    fn new(mut events: Vec<EngineEvent>, pace: Duration, fate: Option<&Fate>) -> Plan {
        let whole = events.clone();
        let mut cut = |count: usize, last: Option<EngineEvent>| {
            events.truncate(count);
            events.extend(last);
        };
        let failed = |retryable| EngineEvent::Failed { reason: "scripted".into(), retryable };
        match fate {
            None => {}
            Some(Fate::Dies(count) | Fate::DiesAndRestarts(count, _) | Fate::Hangs(count)) => cut(*count, None),
            Some(Fate::FailsRetryably(count)) => cut(*count, Some(failed(true))),
            Some(Fate::Fails(count)) => cut(*count, Some(failed(false))),
            Some(Fate::Changes(count)) => {
                let mut wrong = whole.get(*count - 1).cloned();
                if let Some(EngineEvent::Token(token)) = &mut wrong {
                    token.token = if token.token == 300 { 301 } else { 300 };
                }
                cut(*count, wrong);
            }
        }
        Plan { events, pace, hangs: matches!(fate, Some(Fate::Hangs(_))) }
    }

    async fn run(self, sender: &mpsc::Sender<EngineEvent>, _active: Active) {
        for event in self.events {
            if !self.pace.is_zero() {
                tokio::select! {
                    () = tokio::time::sleep(self.pace) => {}
                    () = sender.closed() => return,
                }
            }
            if sender.send(event).await.is_err() {
                return;
            }
        }
        if self.hangs {
            sender.closed().await;
        }
    }
}

impl EngineLink for ScriptedEngine {
    fn submit(&self, request: GenerateRequest) -> BoxFuture<'_, Result<EventStream, AdmitError>> {
        async move {
            let admits_after = self.script.lock().admits_after;
            if !admits_after.is_zero() {
                tokio::time::sleep(admits_after).await;
            }
            let (fate, pace, ahead, end) = {
                let mut script = self.script.lock();
                if let Some(refusal) = &script.refusal {
                    return Err(refusal.clone());
                }
                if !script.ready {
                    return Err(AdmitError::Unavailable { reason: "restarting".into() });
                }
                (script.fates.pop_front(), script.pace, script.ahead, script.end.clone())
            };
            let plan = Plan::new(self.events(&request, &end), pace, fate.as_ref());
            self.seen.lock().push(request);
            self.active.fetch_add(1, Ordering::SeqCst);
            let (sender, receiver) = mpsc::channel(ahead);
            let script = self.script.clone();
            let active = Active(self.active.clone());
            tokio::spawn(async move {
                plan.run(&sender, active).await;
                if let Some(Fate::DiesAndRestarts(_, away)) = fate {
                    script.lock().ready = false;
                    drop(sender);
                    tokio::time::sleep(away).await;
                    script.lock().ready = true;
                }
            });
            Ok(receiver)
        }
        .boxed()
    }

    fn card(&self) -> Arc<ModelCard> {
        self.card.clone()
    }

    fn status(&self) -> EngineStatus {
        let ready = self.script.lock().ready;
        let reason = if ready { String::new() } else { "restarting".into() };
        EngineStatus { ready, reason, running: self.active.load(Ordering::SeqCst), ..EngineStatus::default() }
    }
}
