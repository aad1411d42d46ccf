//! Server-sent events, as the openai SDK reads them.

use std::sync::atomic::Ordering;
use std::time::Duration;

use forge_gateway::KeyRing;
use http_body_util::BodyExt;
use serde_json::{Value, json};

use super::engine::ScriptedEngine;
use super::{CHAT, COMPLETIONS, Server, eventually, loopback, post};

fn chat() -> Value {
    json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "seed": 2})
}

fn streamed(mut body: Value) -> Value {
    body["stream"] = json!(true);
    body
}

#[tokio::test]
async fn a_chat_stream_says_what_the_whole_answer_says() {
    let server = Server::start().await;
    let whole = server.post_json(CHAT, &chat()).await.json();
    let mut body = streamed(chat());
    body["stream_options"] = json!({"include_usage": true});
    let stream = server.post_json(CHAT, &body).await;
    assert_eq!(stream.header("content-type"), Some("text/event-stream"));
    assert_eq!(stream.header("cache-control"), Some("no-cache"));
    assert!(stream.is_done());
    let events = stream.events();
    assert!(events.iter().all(|event| event["object"] == "chat.completion.chunk" && event["id"] == events[0]["id"]));
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(stream.streamed_text(0), whole["choices"][0]["message"]["content"].as_str().unwrap());
    let (usage, rest) = events.split_last().unwrap();
    assert_eq!((&usage["choices"], &usage["usage"]), (&json!([]), &whole["usage"]));
    assert!(rest.iter().all(|event| event.get("usage") == Some(&Value::Null)));
    let end = &rest.last().unwrap()["choices"][0];
    assert_eq!((&end["delta"], &end["finish_reason"]), (&json!({}), &json!("length")));
    assert!(rest[..rest.len() - 1].iter().all(|event| event["choices"][0]["finish_reason"].is_null()));

    let bare = server.post_json(CHAT, &streamed(chat())).await;
    assert!(bare.events().iter().all(|event| event.get("usage").is_none() && event["choices"][0].get("token_ids").is_none()));
}

#[tokio::test]
async fn answers_interleave_by_index_with_logprobs() {
    let server = Server::start().await;
    let mut body = streamed(chat());
    body["n"] = json!(3);
    body["logprobs"] = json!(true);
    body["return_token_ids"] = json!(true);
    let stream = server.post_json(CHAT, &body).await;
    body["stream"] = json!(false);
    let whole = server.post_json(CHAT, &body).await.json();
    for index in 0..3u64 {
        let expected = &whole["choices"][index as usize];
        assert_eq!(stream.streamed_text(index), expected["message"]["content"].as_str().unwrap());
        let of_index = |event: &Value| (event["choices"][0]["index"] == index).then(|| event["choices"][0].clone());
        let choices: Vec<Value> = stream.events().iter().filter_map(of_index).collect();
        let rows: Vec<&Value> = choices.iter().filter_map(|choice| choice["logprobs"]["content"].get(0)).collect();
        assert_eq!(json!(rows), expected["logprobs"]["content"]);
        let ids: Vec<&Value> = choices.iter().filter_map(|choice| choice["token_ids"].get(0)).collect();
        assert_eq!(json!(ids), expected["token_ids"]);
    }
    assert!(stream.events()[0].get("prompt_token_ids").is_some());
    assert!(stream.events()[1].get("prompt_token_ids").is_none());
}

#[tokio::test]
async fn a_completion_stream_adds_up_to_the_whole_answer() {
    let server = Server::start().await;
    for echo in [false, true] {
        let body = json!({"prompt": ["Once upon", "Hi"], "max_tokens": 3, "n": 2, "seed": 2, "echo": echo, "logprobs": 1});
        let whole = server.post_json(COMPLETIONS, &body).await.json();
        let stream = server.post_json(COMPLETIONS, &streamed(body)).await;
        assert!(stream.is_done());
        for index in 0..4u64 {
            let expected = &whole["choices"][index as usize];
            assert_eq!(stream.streamed_text(index), expected["text"].as_str().unwrap(), "echo {echo}");
            for column in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
                let events = stream.events();
                let rows = events.iter().filter(|event| event["choices"][0]["index"] == index);
                let rows = rows.filter_map(|event| event["choices"][0]["logprobs"][column].as_array().cloned()).flatten();
                assert_eq!(json!(rows.collect::<Vec<_>>()), expected["logprobs"][column], "{column}, echo {echo}");
            }
        }
    }
}

#[tokio::test]
async fn headers_come_with_admission_and_silence_is_commented() {
    let mut config = loopback();
    config.timeouts.keep_alive_s = 1;
    let server = Server::with(config, KeyRing::none(), vec![ScriptedEngine::new("model", "n")]).await;
    let began = std::time::Instant::now();
    let mut body = chat();
    body["max_tokens"] = json!(1);
    server.engine().script.lock().pace = Duration::from_millis(2600);
    let mut response = server.send(post(CHAT, streamed(body).to_string())).await;
    assert!(began.elapsed() < Duration::from_millis(2600), "headers do not wait for a token");
    let mut text = String::new();
    while let Some(frame) = response.body_mut().frame().await {
        if let Ok(data) = frame.unwrap().into_data() {
            text.push_str(std::str::from_utf8(&data).unwrap());
        }
    }
    assert!(text.contains(": waiting\n\n"), "{text}");
    assert!(text.ends_with("data: [DONE]\n\n"));
}

#[tokio::test]
async fn a_client_that_leaves_cancels_at_once() {
    let server = Server::start().await;
    server.engine().script.lock().pace = Duration::from_millis(20);
    for body in [streamed(chat()), chat()] {
        let mut body = body;
        body["max_tokens"] = json!(400);
        let stream = body["stream"] == true;
        let sending = server.send(post(CHAT, body.to_string()));
        if stream {
            let mut response = sending.await;
            response.body_mut().frame().await.unwrap().unwrap();
            eventually("the request runs", || server.engine().active.load(Ordering::SeqCst) == 1).await;
            drop(response);
        } else {
            let left = tokio::time::timeout(Duration::from_millis(300), sending).await;
            assert!(left.is_err(), "still generating");
        }
        eventually("the request is cancelled", || server.engine().active.load(Ordering::SeqCst) == 0).await;
        eventually("its seat is free", || server.gateway.in_flight() == 0).await;
    }
    assert_eq!(server.metric("forge_requests_finished_total{model_name=\"model\",finished_reason=\"abort\"}"), Some(2.0));
}
