//! A course at scripted replicas, without a clock.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use forge_gateway::breaker::{FAILURES_TO_OPEN, FIRST_PAUSE};
use forge_gateway::core::{Course, Models, READY_POLL, RetryBudget, Step, Stop, Terms};
use forge_gateway::{ApiError, ServedModel, ServedReplica};
use forge_shared::generate::{
    AdmitError, Choice, EngineEvent, FinishReason, GenerateRequest, SamplingParams, TenantSalt, TokenEvent, Usage,
};
use forge_shared::ids::Epoch;
use forge_shared::link::{EngineLink, EngineStatus, EventStream, ModelCard};
use forge_text::{GgufTokenizer, Tokenizer};
use futures::FutureExt;
use futures::future::BoxFuture;
use parking_lot::Mutex;

struct Link {
    card: ModelCard,
    ready: Mutex<bool>,
}

impl EngineLink for Link {
    fn submit(&self, _: GenerateRequest) -> BoxFuture<'_, Result<EventStream, AdmitError>> {
        async { Err(AdmitError::Unavailable { reason: "the core submits nothing".into() }) }.boxed()
    }

    fn card(&self) -> Arc<ModelCard> {
        Arc::new(self.card.clone())
    }

    fn status(&self) -> EngineStatus {
        EngineStatus { ready: *self.ready.lock(), reason: "scripted".into(), ..EngineStatus::default() }
    }
}

/// A model in some replicas: name, numerics, context.
struct Fleet {
    models: Models,
    links: BTreeMap<String, Arc<Link>>,
    retries: Arc<Mutex<RetryBudget>>,
}

fn tokenizer() -> Tokenizer {
    let tokens = ["a", "b", "ab"].map(String::from).to_vec();
    let gguf = GgufTokenizer { model: "gpt2".into(), tokens, merges: vec!["a b".into()], ..GgufTokenizer::default() };
    Tokenizer::from_gguf(&gguf).unwrap()
}

impl Fleet {
    fn of(replicas: &[(&str, &str, usize)]) -> Fleet {
        let link = |&(key, numerics_id, max_model_len): &(&str, &str, usize)| {
            let card = ModelCard {
                name: "m".into(),
                names: vec!["m".into()],
                unlisted_names: Vec::new(),
                max_model_len,
                vocab_size: 2,
                numerics_id: numerics_id.into(),
                created_s: 0,
                default_sampling: Default::default(),
            };
            (key.to_owned(), Arc::new(Link { card, ready: Mutex::new(true) }))
        };
        let fleet = Fleet { models: Models::default(), links: replicas.iter().map(link).collect(), retries: Arc::default() };
        fleet.publish();
        fleet
    }

    fn publish(&self) {
        let served: Vec<ServedReplica> = self
            .links
            .iter()
            .map(|(key, link)| ServedReplica {
                model: ServedModel { link: link.clone(), tokenizer: tokenizer(), chat_template: None },
                service: "s".into(),
                key: key.clone(),
                version: "v".into(),
                epoch: Epoch(1),
                prefixes: None,
            })
            .collect();
        self.models.publish(&served, &["s".to_owned()]);
    }

    fn terms(&self) -> Terms {
        let request = GenerateRequest {
            id: "r".into(),
            tenant: TenantSalt::anonymous(),
            prompt_tokens: vec![0, 1].into(),
            choices: vec![Choice { index: 0, emitted_tokens: Vec::new() }],
            seed: 1,
            params: SamplingParams { max_tokens: 8, ..SamplingParams::default() },
            priority: 0,
        };
        Terms {
            model: self.models.find(None).unwrap(),
            request,
            affinity: 0,
            deadline: at(60_000),
            deadline_s: 60,
            numerics_id: None,
            may_be_shortened: false,
            retries: self.retries.clone(),
        }
    }
}

fn at(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn token(position: u32, token: u32) -> EngineEvent {
    EngineEvent::Token(TokenEvent { choice: 0, position, token, text: String::new(), logprobs: None })
}

fn away() -> AdmitError {
    AdmitError::Unavailable { reason: "away".into() }
}

fn submitted_to(step: Step) -> (String, Box<GenerateRequest>) {
    match step {
        Step::Submit { replica, request } => (replica.key().to_owned(), request),
        _ => panic!("no submission"),
    }
}

fn error(step: Step) -> ApiError {
    match step {
        Step::Fail(error) => error,
        _ => panic!("no error"),
    }
}

#[test]
fn every_replica_is_tried_once_and_the_last_refusal_is_the_answer() {
    let fleet = Fleet::of(&[("a", "n", 64), ("b", "n", 64)]);
    let (mut course, step) = Course::begin(fleet.terms(), at(0));
    let (first, _) = submitted_to(step);
    let (second, _) = submitted_to(course.submitted(Err(away()), at(1)));
    assert_ne!(first, second);
    let refused = error(course.submitted(Err(AdmitError::Overloaded { waiting: 3, retry_after_s: 7 }), at(2)));
    assert!(matches!(refused, ApiError::Overloaded { retry_after_s: 7, .. }), "{refused}");
    assert!(course.is_over() && !course.is_admitted());
}

#[test]
fn second_tries_are_paid_and_the_first_is_not() {
    let fleet = Fleet::of(&[("a", "n", 64), ("b", "n", 64)]);
    while fleet.retries.lock().spend(at(0)) {}
    let (mut course, step) = Course::begin(fleet.terms(), at(0));
    submitted_to(step);
    assert!(matches!(error(course.submitted(Err(away()), at(0))), ApiError::Unavailable { .. }));
}

#[test]
fn what_a_replica_refuses_for_the_request_is_refused_at_once() {
    let fleet = Fleet::of(&[("a", "n", 64), ("b", "n", 64)]);
    let (mut course, _) = Course::begin(fleet.terms(), at(0));
    let refused = error(course.submitted(Err(AdmitError::UnknownToken { token: 9, vocab_size: 2 }), at(0)));
    assert!(matches!(refused, ApiError::Invalid { .. }));
}

#[test]
fn a_lost_engine_is_replaced_by_one_of_its_numerics_with_what_was_sent() {
    let fleet = Fleet::of(&[("a", "n", 64), ("b", "n", 64), ("c", "other", 64)]);
    let mut terms = fleet.terms();
    terms.numerics_id = Some("n".into());
    let (mut course, step) = Course::begin(terms, at(0));
    let (first, _) = submitted_to(step);
    assert!(matches!(course.submitted(Ok(()), at(0)), Step::Listen));
    assert_eq!(course.numerics_id(), "n");
    assert!(matches!(course.heard(Some(token(0, 1)), at(5)), Step::Forward(_)));
    *fleet.links[&first].ready.lock() = false;
    assert!(matches!(course.heard(None, at(10)), Step::Replay { wait, .. } if wait > Duration::ZERO));
    let (second, request) = submitted_to(course.waited(at(20)));
    assert!(second != first && second != "c", "{second}");
    assert_eq!(request.choices[0].emitted_tokens, [1]);
    assert_eq!(course.id(), &request.id);
    *fleet.links[&second].ready.lock() = false;
    assert!(matches!(course.submitted(Err(away()), at(30)), Step::Wait(READY_POLL)), "it is owed an answer: it waits");
    assert!(matches!(course.waited(at(80)), Step::Wait(READY_POLL)), "never at other numerics");
    *fleet.links[&second].ready.lock() = true;
    submitted_to(course.waited(at(130)));
    assert!(matches!(course.submitted(Ok(()), at(130)), Step::Listen));
    assert!(matches!(course.heard(Some(token(0, 1)), at(131)), Step::Listen), "the client has it");
    assert!(matches!(course.heard(Some(token(1, 0)), at(132)), Step::Forward(_)));
    let end = EngineEvent::Finished { choice: 0, reason: FinishReason::Length, text: String::new() };
    assert!(matches!(course.heard(Some(end), at(133)), Step::Forward(_)));
    let done = EngineEvent::Done(Usage { prompt_tokens: 2, cached_prompt_tokens: 0, completion_tokens: 2 });
    assert!(matches!(course.heard(Some(done), at(134)), Step::Forward(EngineEvent::Done(_))));
    assert!(course.is_over() && course.replica().is_none());
}

#[test]
fn where_every_answer_had_ended_the_loss_is_the_end() {
    let fleet = Fleet::of(&[("a", "n", 64)]);
    let (mut course, _) = Course::begin(fleet.terms(), at(0));
    course.submitted(Ok(()), at(0));
    course.heard(Some(token(0, 1)), at(1));
    course.heard(Some(EngineEvent::Finished { choice: 0, reason: FinishReason::EndOfText, text: String::new() }), at(1));
    assert!(matches!(course.heard(None, at(2)), Step::Forward(EngineEvent::Done(usage)) if usage.completion_tokens == 1));
    assert!(course.is_over());
}

#[test]
fn a_request_whose_successors_are_too_short_is_given_up_after_a_while() {
    let fleet = Fleet::of(&[("a", "n", 64), ("b", "n", 4)]);
    let (mut course, step) = Course::begin(fleet.terms(), at(0));
    assert_eq!(submitted_to(step).0, "a");
    course.submitted(Ok(()), at(0));
    *fleet.links["a"].ready.lock() = false;
    course.heard(None, at(0));
    assert!(matches!(course.waited(at(10)), Step::Wait(_)));
    assert!(matches!(course.waited(at(5_009)), Step::Wait(_)));
    let refused = error(course.waited(at(5_010)));
    assert!(matches!(refused, ApiError::Invalid { code: Some("context_length_exceeded"), .. }), "{refused}");
}

#[test]
fn an_answer_without_a_bound_of_its_own_ends_where_the_successors_context_does() {
    let fleet = Fleet::of(&[("a", "n", 64), ("b", "n", 6)]);
    let (mut course, _) = Course::begin(Terms { may_be_shortened: true, ..fleet.terms() }, at(0));
    course.submitted(Ok(()), at(0));
    *fleet.links["a"].ready.lock() = false;
    course.heard(None, at(0));
    let (replica, request) = submitted_to(course.waited(at(10)));
    assert_eq!((replica.as_str(), request.params.max_tokens), ("b", 4));
}

#[test]
fn a_course_that_is_dropped_while_it_tries_a_replica_leaves_the_way_open_for_the_next() {
    let fleet = Fleet::of(&[("a", "n", 64)]);
    for _ in 0..FAILURES_TO_OPEN {
        let (mut course, step) = Course::begin(fleet.terms(), at(0));
        submitted_to(step);
        assert!(matches!(error(course.submitted(Err(away()), at(0))), ApiError::Unavailable { .. }));
    }
    let (_, step) = Course::begin(fleet.terms(), at(1));
    let refused = error(step);
    assert!(refused.to_string().contains("tried again in a moment"), "{refused}");
    let later = FIRST_PAUSE + at(1);
    let (probe, step) = Course::begin(fleet.terms(), later);
    submitted_to(step);
    let (mut waiting, step) = Course::begin(fleet.terms(), later);
    assert!(matches!(step, Step::Wait(READY_POLL)), "one try at a time");
    drop(probe);
    submitted_to(waiting.waited(later + READY_POLL));
    assert!(matches!(waiting.submitted(Ok(()), later + READY_POLL), Step::Listen));
}

#[test]
fn what_stops_it_from_outside_is_told_as_what_it_is() {
    let fleet = Fleet::of(&[("a", "n", 64)]);
    let (mut course, _) = Course::begin(fleet.terms(), at(0));
    assert_eq!(course.stop(Stop::Deadline), ApiError::Deadline { seconds: 60 });
    assert!(course.is_over());
    let (mut course, _) = Course::begin(fleet.terms(), at(0));
    assert!(matches!(course.stop(Stop::BrokenOff), ApiError::Unavailable { .. }));
}
