//! Engines that die, and clients that do not notice.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use forge_gateway::{GatewayConfig, KeyRing};
use forge_shared::generate::AdmitError;
use serde_json::{Value, json};

use super::engine::{Fate, ScriptedEngine};
use super::{Answer, CHAT, COMPLETIONS, Server, eventually, loopback, post};

fn body(stream: bool) -> Value {
    json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 12, "n": 2, "seed": 5, "stream": stream, "logprobs": true})
}

/// Everything of a stream but its id.
fn without_id(events: Vec<Value>) -> Vec<Value> {
    let strip = |mut event: Value| {
        event.as_object_mut().expect("an object").remove("id");
        event
    };
    events.into_iter().map(strip).collect()
}

#[tokio::test]
async fn a_stream_over_dying_engines_is_the_same_to_the_byte() {
    let server = Server::start().await;
    let undisturbed = without_id(server.post_json(CHAT, &body(true)).await.events());
    let before = server.engine().seen.lock().len();
    for fates in [
        vec![Fate::Dies(0)],
        vec![Fate::Dies(7)],
        vec![Fate::Dies(1), Fate::Dies(2), Fate::FailsRetryably(3), Fate::Dies(4)],
        vec![Fate::Dies(24)],
        vec![Fate::Dies(25)],
        vec![Fate::Dies(26)],
        vec![Fate::Changes(5), Fate::Changes(3)],
        vec![Fate::DiesAndRestarts(9, Duration::from_millis(300))],
    ] {
        server.engine().fates(fates.clone());
        let answer = server.post_json(CHAT, &body(true)).await;
        assert!(answer.is_done(), "{fates:?}: {}", answer.text);
        assert_eq!(without_id(answer.events()), undisturbed, "{fates:?}");
    }
    assert!(server.engine().seen.lock().len() > before + 10, "requests were submitted again");
    assert!(server.metric("forge_requests_replayed_total{model_name=\"model\"}").unwrap() >= 9.0);
    assert_eq!(server.metric("forge_requests_finished_total{model_name=\"model\",finished_reason=\"length\"}"), Some(18.0));
}

#[tokio::test]
async fn a_whole_answer_and_its_usage_survive_a_death() {
    let server = Server::start().await;
    let undisturbed = server.post_json(CHAT, &body(false)).await.json();
    for fate in [Fate::Dies(3), Fate::Dies(25), Fate::Dies(26), Fate::FailsRetryably(10)] {
        server.engine().fates([fate.clone()]);
        let answer = server.post_json(CHAT, &body(false)).await.json();
        assert_eq!(answer["choices"], undisturbed["choices"], "{fate:?}");
        for count in ["prompt_tokens", "completion_tokens", "total_tokens"] {
            assert_eq!(answer["usage"][count], undisturbed["usage"][count], "{fate:?}");
        }
    }
}

#[tokio::test]
async fn only_the_prompt_whose_engine_died_is_replayed() {
    let server = Server::start().await;
    let body = json!({"prompt": ["One", "Two three"], "max_tokens": 4, "seed": 5, "echo": true, "logprobs": 0});
    let undisturbed = server.post_json(COMPLETIONS, &body).await.json();
    server.engine().fates([Fate::Dies(3)]);
    let answer = server.post_json(COMPLETIONS, &body).await.json();
    assert_eq!(answer["choices"], undisturbed["choices"]);
    assert_eq!(server.engine().seen.lock().len(), 5);
}

#[tokio::test]
async fn a_request_that_kills_engines_is_given_up_and_the_server_goes_on() {
    let server = Server::start().await;
    server.engine().fates(vec![Fate::Dies(0); 20]);
    let error = server.post_json(CHAT, &body(false)).await.error(500);
    assert_eq!(error["code"], "engine_failed");
    assert_eq!(server.engine().seen.lock().len(), 2, "two engines die of it at most");
    server.engine().fates([]);
    assert_eq!(server.post_json(CHAT, &body(false)).await.status, 200);
}

#[tokio::test]
async fn failing_for_good_is_an_error_event_once_the_stream_began() {
    let server = Server::start().await;
    server.engine().fates([Fate::Fails(4)]);
    let answer = server.post_json(CHAT, &body(true)).await;
    assert_eq!(answer.status, 200);
    assert!(!answer.is_done());
    let last = answer.events().pop().unwrap();
    assert_eq!((&last["error"]["type"], &last["error"]["code"]), (&json!("server_error"), &json!("engine_failed")));
    assert_eq!(server.metric("forge_requests_finished_total{model_name=\"model\",finished_reason=\"error\"}"), Some(2.0));

    server.engine().fates([Fate::Fails(4)]);
    server.post_json(CHAT, &body(false)).await.error(500);
}

#[tokio::test]
async fn the_deadline_ends_a_request_that_hangs_or_waits_for_an_engine() {
    let mut config: GatewayConfig = loopback();
    config.timeouts.request_s = 1;
    let server = Server::with(config, KeyRing::none(), vec![ScriptedEngine::new("model", "n")]).await;
    for fate in [Fate::Hangs(5), Fate::DiesAndRestarts(5, Duration::from_secs(1000))] {
        server.engine().script.lock().ready = true;
        server.engine().fates([fate]);
        let began = Instant::now();
        let error = server.post_json(CHAT, &body(false)).await.error(504);
        assert_eq!((&error["type"], &error["code"]), (&json!("timeout_error"), &json!("deadline_exceeded")));
        let took = began.elapsed();
        assert!(took > Duration::from_millis(900) && took < Duration::from_secs(15), "{took:?}");
    }
    assert_eq!(server.gateway.in_flight(), 0);
}

#[tokio::test]
async fn the_deadline_ends_a_request_whose_reader_is_slow() {
    let mut config: GatewayConfig = loopback();
    config.timeouts.request_s = 1;
    let server = Server::with(config, KeyRing::none(), vec![ScriptedEngine::new("model", "n")]).await;
    // More than the sockets' buffers hold, and the engine is so far ahead of the reader that it always has a value ready.
    server.engine().script.lock().ahead = 1 << 16;
    let long = json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 400, "n": 64, "stream": true,
        "logprobs": true, "top_logprobs": 20});
    let response = server.send(post(CHAT, long.to_string())).await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let answer = Answer::read(response).await;
    assert!(!answer.is_done());
    assert_eq!(answer.events().pop().unwrap()["error"]["code"], "deadline_exceeded");
}

#[tokio::test]
async fn prompts_of_a_list_are_admitted_together_and_refused_together() {
    let server = Server::start().await;
    server.engine().script.lock().admits_after = Duration::from_millis(200);
    let body = json!({"prompt": vec!["One"; 40], "max_tokens": 2, "seed": 5});
    let began = Instant::now();
    let answer = server.post_json(COMPLETIONS, &body).await;
    let took = began.elapsed();
    assert_eq!(answer.json()["choices"].as_array().unwrap().len(), 40);
    assert!(took < Duration::from_secs(4), "one after the other takes 8 s: {took:?}");

    let ids: Vec<String> = server.engine().seen.lock().iter().map(|request| request.id.to_string()).collect();
    let ordered = ids.iter().enumerate().all(|(index, id)| id.ends_with(&format!(".p{index}")));
    assert!(ordered, "{ids:?}");
    server.engine().script.lock().refusal = Some(AdmitError::Overloaded { waiting: 7, retry_after_s: 3 });
    server.post_json(COMPLETIONS, &body).await.error(429);
    eventually("all are cancelled", || server.engine().active.load(Ordering::SeqCst) == 0).await;
    assert_eq!(server.gateway.in_flight(), 0);
}

#[tokio::test]
async fn another_replica_takes_over_if_its_numerics_are_the_same() {
    let (a, b) = (ScriptedEngine::new("model", "same"), ScriptedEngine::new("model", "same"));
    let server = Server::with(loopback(), KeyRing::none(), vec![a.clone(), b.clone()]).await;
    let undisturbed = server.post_json(CHAT, &body(false)).await.json();
    let (first, second) = if a.seen.lock().is_empty() { (b, a) } else { (a, b) };
    // The first one dies and stays away; affinity would lead there again.
    first.fates([Fate::DiesAndRestarts(6, Duration::from_secs(1000))]);
    let answer = server.post_json(CHAT, &body(false)).await.json();
    assert_eq!(answer["choices"], undisturbed["choices"]);
    let replay = second.last();
    assert!(replay.id.to_string().ends_with(".r1"));
    assert_eq!(replay.choices[0].emitted_tokens.len(), 3);
}

#[tokio::test]
async fn a_replica_of_other_numerics_never_continues_an_answer() {
    let mut config = loopback();
    config.timeouts.request_s = 1;
    let (a, b) = (ScriptedEngine::new("model", "one"), ScriptedEngine::new("model", "two"));
    let server = Server::with(config, KeyRing::none(), vec![a.clone(), b.clone()]).await;
    server.post_json(CHAT, &body(false)).await.json();
    let (first, second) = if a.seen.lock().is_empty() { (b, a) } else { (a, b) };
    first.fates([Fate::DiesAndRestarts(6, Duration::from_secs(1000))]);
    server.post_json(CHAT, &body(false)).await.error(504);
    assert!(second.seen.lock().is_empty());
    // A new request goes there, of course.
    assert_eq!(server.post_json(CHAT, &body(false)).await.status, 200);
    assert_eq!(second.seen.lock().len(), 1);
}

#[tokio::test]
async fn a_full_replica_passes_new_requests_on_and_full_ones_refuse() {
    let (a, b) = (ScriptedEngine::new("model", "same"), ScriptedEngine::new("model", "same"));
    let server = Server::with(loopback(), KeyRing::none(), vec![a.clone(), b.clone()]).await;
    let full = AdmitError::Overloaded { waiting: 7, retry_after_s: 3 };
    a.script.lock().refusal = Some(full.clone());
    assert_eq!(server.post_json(CHAT, &body(false)).await.status, 200);
    b.script.lock().refusal = Some(full);
    let answer = server.post_json(CHAT, &body(false)).await;
    let error = answer.error(429);
    assert_eq!((&error["code"], answer.header("retry-after")), (&json!("overloaded"), Some("3")));
    assert_eq!(server.metric("forge_requests_rejected_total{model_name=\"model\"}"), Some(1.0));
}

#[tokio::test]
async fn engines_that_are_away_are_503_before_anything_is_accepted() {
    let server = Server::start().await;
    server.engine().script.lock().ready = false;
    let answer = server.post_json(CHAT, &body(true)).await;
    let error = answer.error(503);
    assert!(error["message"].as_str().unwrap().contains("restarting"), "{error}");
    assert!(answer.header("retry-after").is_some());
}

#[tokio::test]
async fn a_replica_that_was_away_is_tried_again_whatever_becomes_of_the_first_try() {
    let server = Server::start().await;
    let trip = async || {
        server.engine().script.lock().refusal = Some(AdmitError::Unavailable { reason: "scripted".into() });
        for _ in 0..3 {
            server.post_json(CHAT, &body(false)).await.error(503);
        }
        server.engine().script.lock().refusal = None;
        tokio::time::sleep(Duration::from_millis(600)).await;
    };
    trip().await;
    // Only one prompt may try it; the others wait for what that one finds.
    let list = json!({"prompt": ["One", "Two", "Three"], "max_tokens": 2, "seed": 5});
    assert_eq!(server.post_json(COMPLETIONS, &list).await.status, 200);

    trip().await;
    // The client whose request tries it hangs up meanwhile.
    server.engine().script.lock().admits_after = Duration::from_secs(5);
    let request = post(CHAT, body(false).to_string());
    let hung_up = tokio::time::timeout(Duration::from_millis(300), server.send(request)).await;
    assert!(hung_up.is_err(), "it was not admitted yet");
    server.engine().script.lock().admits_after = Duration::ZERO;
    eventually("the request is gone", || server.gateway.in_flight() == 0).await;
    assert_eq!(server.post_json(CHAT, &body(false)).await.status, 200);
}

#[tokio::test]
async fn a_replica_that_is_held_back_is_not_one_of_other_numerics() {
    let server = Server::start().await;
    let send = async |key: &str| {
        let mut request = post(CHAT, body(false).to_string());
        request.headers_mut().insert("idempotency-key", key.parse().unwrap());
        Answer::read(server.send(request).await).await
    };
    assert_eq!(send("order").await.status, 200);
    server.engine().script.lock().refusal = Some(AdmitError::Unavailable { reason: "scripted".into() });
    for _ in 0..3 {
        send("order").await.error(503);
    }
    let error = send("order").await.error(503);
    assert!(error["message"].as_str().unwrap().contains("tried again in a moment"), "{error}");
}

#[tokio::test]
async fn engines_that_were_stopped_or_cut_off_do_not_end_a_request() {
    let server = Server::start().await;
    let undisturbed = server.post_json(CHAT, &body(false)).await.json();
    server.engine().fates(vec![Fate::FailsRetryably(0); 5]);
    let answer = server.post_json(CHAT, &body(false)).await.json();
    assert_eq!(answer["choices"], undisturbed["choices"]);
    server.engine().fates(vec![Fate::FailsRetryably(0); 20]);
    let error = server.post_json(CHAT, &body(false)).await.error(500);
    assert_eq!(error["code"], "engine_failed");
}
