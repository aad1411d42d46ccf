use std::sync::Mutex;

use forge_shared::link::{EngineStatus, ModelCard};
use futures::future::BoxFuture;
use tokio::sync::mpsc;

use super::*;

/// A link whose engines play scripts, one per submission, and that keeps what was submitted.
struct Scripted {
    scripts: Mutex<Vec<Result<Vec<EngineEvent>, AdmitError>>>,
    requests: Mutex<Vec<GenerateRequest>>,
}

impl Scripted {
    fn new(mut scripts: Vec<Result<Vec<EngineEvent>, AdmitError>>) -> Self {
        scripts.reverse();
        Scripted { scripts: Mutex::new(scripts), requests: Mutex::default() }
    }
}

impl EngineLink for Scripted {
    fn submit(&self, request: GenerateRequest) -> BoxFuture<'_, Result<EventStream, AdmitError>> {
        self.requests.lock().expect("one thread").push(request);
        let script = self.scripts.lock().expect("one thread").pop().expect("a script per submission");
        Box::pin(async move {
            let events = script?;
            let (sender, receiver) = mpsc::channel(events.len().max(1));
            for event in events {
                sender.try_send(event).expect("room for all");
            }
            Ok(receiver)
        })
    }

    fn card(&self) -> Arc<ModelCard> {
        unreachable!("an answer needs no card")
    }

    fn status(&self) -> EngineStatus {
        EngineStatus::default()
    }
}

fn token(position: u32, token: u32, text: &str) -> EngineEvent {
    EngineEvent::Token(TokenEvent { choice: 0, position, token, text: text.into(), logprobs: None })
}

fn finished(reason: FinishReason, text: &str) -> EngineEvent {
    EngineEvent::Finished { choice: 0, reason, text: text.into() }
}

async fn ask_scripted(link: &Scripted) -> (Result<Answer>, String) {
    let mut shown = String::new();
    let question = Question { prompt_tokens: vec![1, 2], params: SamplingParams::default(), seed: Some(7) };
    let answer = ask(link, question, &mut |text| {
        shown.push_str(text);
        Ok(())
    })
    .await;
    (answer, shown)
}

#[tokio::test]
async fn an_answer_is_shown_as_it_comes() {
    let usage = Usage { prompt_tokens: 2, cached_prompt_tokens: 1, completion_tokens: 2 };
    let script = vec![token(0, 5, "He"), token(1, 6, ""), finished(FinishReason::EndOfText, "llo"), EngineEvent::Done(usage)];
    let (answer, shown) = ask_scripted(&Scripted::new(vec![Ok(script)])).await;
    let answer = answer.expect("answered");
    assert_eq!((answer.text.as_str(), shown.as_str()), ("Hello", "Hello"));
    assert_eq!((answer.ending, answer.usage), (Ending::Complete, usage));
}

#[tokio::test]
async fn a_dead_engine_is_followed_by_the_next_with_the_same_seed() {
    let unavailable = AdmitError::Unavailable { reason: "restarting".into() };
    let rest = vec![token(1, 6, "llo"), finished(FinishReason::Length, ""), EngineEvent::Done(Usage::default())];
    let link = Scripted::new(vec![Ok(vec![token(0, 5, "He")]), Err(unavailable), Ok(rest)]);
    let (answer, shown) = ask_scripted(&link).await;
    assert_eq!(shown, "Hello");
    assert_eq!(answer.expect("answered").ending, Ending::CutOff);
    let requests = link.requests.lock().expect("one thread");
    let emitted: Vec<&[u32]> = requests.iter().map(|request| request.choices[0].emitted_tokens.as_slice()).collect();
    assert_eq!(emitted, [&[][..], &[5], &[5]]);
    assert!(requests.iter().all(|request| request.seed == 7));
}

#[tokio::test]
async fn what_cannot_be_helped_is_an_error() {
    let refused = AdmitError::PromptTooLong { prompt_tokens: 9, max_model_len: 8 };
    let (answer, _) = ask_scripted(&Scripted::new(vec![Err(refused)])).await;
    assert!(answer.expect_err("refused").to_string().contains("--max-model-len"));
    let failed = EngineEvent::Failed { reason: "NaN".into(), retryable: false };
    let (answer, shown) = ask_scripted(&Scripted::new(vec![Ok(vec![token(0, 5, "He"), failed])])).await;
    assert!(answer.expect_err("failed").to_string().contains("cause: NaN"));
    assert_eq!(shown, "He");
}

fn died() -> EngineEvent {
    EngineEvent::Failed { reason: "panicked".into(), retryable: true }
}

#[tokio::test]
async fn an_engine_that_dies_without_progress_is_not_followed_for_ever() {
    let link = Scripted::new(vec![Ok(vec![token(0, 5, "He"), died()]), Ok(vec![died()])]);
    let (answer, shown) = ask_scripted(&link).await;
    let failure = answer.expect_err("two deaths after one token").to_string();
    assert_eq!(shown, "He");
    assert!(failure.contains("2 times") && failure.contains("cause: panicked"), "{failure}");
    // A token between deaths begins the count anew.
    let done = vec![finished(FinishReason::EndOfText, ""), EngineEvent::Done(Usage::default())];
    let scripts = vec![Ok(vec![died()]), Ok(vec![token(0, 5, "He"), died()]), Ok([vec![token(1, 6, "y")], done].concat())];
    let (answer, shown) = ask_scripted(&Scripted::new(scripts)).await;
    assert_eq!((answer.expect("answered").ending, shown.as_str()), (Ending::Complete, "Hey"));
}

#[tokio::test]
async fn an_end_is_shown_once_even_if_the_engine_dies_on_it() {
    let link = Scripted::new(vec![Ok(vec![token(0, 5, "He"), finished(FinishReason::Length, "llo"), died()])]);
    let (answer, shown) = ask_scripted(&link).await;
    let answer = answer.expect("it had ended");
    assert_eq!((shown.as_str(), answer.ending, answer.usage.completion_tokens), ("Hello", Ending::CutOff, 1));
}
