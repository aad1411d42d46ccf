//! The engine on its thread: concurrent clients, death, draining, the blocking interface.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::*;
use forge_engine::{Engine, EngineError, EngineExit, EngineHandle, EngineOptions, EngineSetup, EngineThread};
use forge_shared::generate::*;
use forge_shared::link::{DefaultSampling, EngineLink, ModelCard};
use forge_shared::telemetry::Metrics;
use tokio::sync::oneshot;

fn spawn(change: impl FnOnce(&mut FakeModel)) -> (EngineHandle, oneshot::Receiver<EngineExit>) {
    let (info, options) = roomy();
    let mut model = FakeModel::new(info.clone());
    change(&mut model);
    let card = Arc::new(ModelCard {
        name: "fake".into(),
        names: vec!["fake".into()],
        unlisted_names: Vec::new(),
        max_model_len: info.max_model_len,
        vocab_size: info.vocab_size,
        numerics_id: info.numerics_id,
        created_s: 0,
        default_sampling: DefaultSampling::default(),
    });
    let setup =
        EngineSetup { model: Box::new(model), tokenizer: tokenizer(), card, replica: "fake/0".into(), options, metrics: Metrics::new() };
    EngineThread::spawn(setup).unwrap()
}

async fn gather(stream: &mut tokio::sync::mpsc::Receiver<EngineEvent>) -> Record {
    let mut record = Record::default();
    while let Some(event) = stream.recv().await {
        record.take(event);
    }
    record
}

fn some_request(i: u32) -> GenerateRequest {
    request(&[i % 60, 3, i % 7], SamplingParams { max_tokens: 1 + i % 20, ignore_eos: true, ..SamplingParams::default() })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_clients_at_once_get_their_own_answers() {
    let (handle, exit) = spawn(|_| {});
    let clients: Vec<_> = (0..100)
        .map(|i| {
            let handle = handle.clone();
            tokio::spawn(async move {
                let request = some_request(i);
                let record = gather(&mut handle.submit(request.clone()).await.unwrap()).await;
                assert_eq!(record, alone(&request));
            })
        })
        .collect();
    for client in clients {
        client.await.unwrap();
    }
    let status = handle.status();
    assert!(status.ready && status.running == 0 && status.kv_blocks_used == 0);
    let times = handle.times();
    assert!(times.model_ns > 0 && times.other_ns > 0);
    drop(handle);
    assert_eq!(exit.await.unwrap(), EngineExit::Stopped);
}

/// The gateway's case: streams end without `Done`, the engine is not ready any more, the supervisor is told, and
/// another engine goes on from the tokens that arrived.
#[tokio::test]
async fn death_ends_streams_and_a_replay_completes_them() {
    let deaths: [fn(&mut FakeModel); 2] = [|model| model.panic_at_step = Some(8), |model| model.fail_at_step = Some(8)];
    for (change, expected) in deaths.into_iter().zip(["told to panic", "told to fail"]) {
        let (handle, exit) = spawn(change);
        let mut request = request(&[1, 2, 3], SamplingParams { max_tokens: 30, ignore_eos: true, ..SamplingParams::default() });
        let mut stream = handle.submit(request.clone()).await.unwrap();
        let mut record = gather(&mut stream).await;
        assert!(record.done.is_none() && record.failed.is_none());
        let EngineExit::Died { reason } = exit.await.unwrap() else { panic!("it died") };
        assert!(reason.contains(expected), "{reason}");
        let status = handle.status();
        assert!(!status.ready && status.reason.contains(expected));
        assert_eq!((status.running, status.kv_blocks_used), (0, 0));
        assert!(matches!(handle.submit(request.clone()).await, Err(AdmitError::Unavailable { .. })));

        let whole = alone(&request);
        request.choices[0].emitted_tokens = record.tokens(0);
        assert_eq!(record.tokens(0).len(), 7);
        let (second, _exit) = spawn(|_| {});
        let rest = gather(&mut second.submit(request).await.unwrap()).await;
        record.answers.get_mut(&0).unwrap().extend(rest.answers[&0].clone());
        record.done = rest.done;
        assert_eq!(record, whole);
    }
}

#[tokio::test]
async fn draining_finishes_what_was_admitted() {
    let (handle, exit) = spawn(|model| model.delay = Duration::from_millis(2));
    let request = request(&[1, 2, 3], greedy(30));
    let mut stream = handle.submit(request.clone()).await.unwrap();
    handle.drain(Duration::from_secs(60));
    assert!(matches!(handle.submit(request.clone()).await, Err(AdmitError::Unavailable { .. })));
    assert!(!handle.status().ready);
    assert_eq!(gather(&mut stream).await, alone(&request));
    assert_eq!(exit.await.unwrap(), EngineExit::Stopped);
}

#[tokio::test]
async fn the_deadline_of_draining_fails_the_rest_for_a_retry() {
    let (handle, exit) = spawn(|model| model.delay = Duration::from_millis(20));
    let mut stream = handle.submit(request(&[1, 2, 3], greedy(90))).await.unwrap();
    handle.drain(Duration::from_millis(100));
    let record = gather(&mut stream).await;
    assert_eq!(record.failed, Some(("the engine is shutting down".into(), true)));
    assert_eq!(exit.await.unwrap(), EngineExit::Stopped);
}

#[tokio::test]
async fn a_dropped_stream_frees_its_blocks() {
    let (handle, _exit) = spawn(|model| model.delay = Duration::from_millis(1));
    let stream = handle.submit(request(&[1; 50], greedy(40))).await.unwrap();
    while handle.status().kv_blocks_used == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    drop(stream);
    // A step takes a millisecond; the bound is for a busy machine.
    for _ in 0..5000 {
        if handle.status().kv_blocks_used == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("blocks are still held");
}

/// Without work the loop does not go round; with a client that is behind it goes round now and then.
#[test]
fn an_idle_engine_sleeps() {
    let (handle, _exit) = spawn(|_| {});
    std::thread::sleep(Duration::from_millis(50));
    let before = handle.times().rounds;
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(handle.times().rounds, before);

    let engine = Engine::new(Box::new(FakeModel::new(roomy().0)), tokenizer(), EngineOptions { event_capacity: 1, ..roomy().1 }).unwrap();
    let stalled = engine.events(request(&[1, 2], greedy(20))).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let before = engine.handle().times().rounds;
    std::thread::sleep(Duration::from_millis(200));
    let rounds = engine.handle().times().rounds - before;
    assert!(rounds <= 41, "{rounds} rounds in 200 ms");
    assert_eq!(stalled.count(), 22, "20 tokens, the end and `Done`");
}

#[test]
fn the_blocking_interface_generates_streams_and_reports_errors() {
    let (info, options) = roomy();
    let engine = Engine::new(Box::new(FakeModel::new(info)), tokenizer(), options).unwrap();
    let completion = engine.generate(&[1, 2, 3], greedy(10)).unwrap();
    let expected = alone(&request(&[1, 2, 3], greedy(10)));
    assert_eq!((completion.tokens.clone(), completion.text.clone()), (expected.tokens(0), expected.text(0)));
    assert_eq!(completion.finish_reason, FinishReason::Length);

    assert_eq!(engine.generate_text("bcd", greedy(10)).unwrap(), completion);
    assert_eq!(engine.tokenizer().decode(&completion.tokens, true).unwrap(), completion.text);

    let pieces: Vec<_> = engine.stream(&[1, 2, 3], greedy(10)).unwrap().collect::<Result<_, _>>().unwrap();
    assert_eq!(pieces.len(), 11);
    assert_eq!(pieces.iter().map(|piece| piece.text.as_str()).collect::<String>(), completion.text);
    assert_eq!(pieces[10].finish_reason, Some(FinishReason::Length));

    let mut several = engine.request(&[1, 2, 3], SamplingParams { prompt_logprobs: Some(0), ..SamplingParams::default() });
    several.choices.push(Choice { index: 1, emitted_tokens: Vec::new() });
    let generation = engine.run(several).unwrap();
    assert_eq!((generation.completions.len(), generation.prompt_logprobs.unwrap().len()), (2, 2));
    assert!(matches!(engine.generate(&[], greedy(1)), Err(EngineError::Admit(AdmitError::Invalid(_)))));

    let bad = EngineOptions { max_batch_size: 1000, ..roomy().1 };
    let error = Engine::new(Box::new(FakeModel::new(roomy().0)), tokenizer(), bad).unwrap_err();
    assert_eq!(error.to_string(), "max_batch_size must be between 1 and the model's rows per step (256), got 1000");
}
