//! Shapes of whole answers, models, tokenizing, headers.

use forge_shared::generate::FinishReason;
use serde_json::json;

use super::{CHAT, COMPLETIONS, NOW_S, Server, post, tokenizer};
use crate::Answer;

fn chat() -> serde_json::Value {
    json!({"model": "model", "messages": [{"role": "user", "content": "Hi there"}], "max_tokens": 4, "seed": 1})
}

#[tokio::test]
async fn chat_is_whole_and_carries_what_the_request_asked() {
    let server = Server::start().await;
    let mut body = chat();
    body["temperature"] = json!(0.5);
    body["stop"] = json!("END");
    body["logit_bias"] = json!({"7": -5});
    body["priority"] = json!(-3);
    body["user"] = json!("u-1");
    let answer = server.post_json(CHAT, &body).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    let json = answer.json();
    let request = server.engine().last();
    assert_eq!(json["object"], "chat.completion");
    assert!(json["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!((&json["created"], &json["model"]), (&json!(NOW_S), &json!("model")));
    assert!(json["system_fingerprint"].as_str().unwrap().starts_with("fp_"));
    let choice = &json["choices"][0];
    let letters: String = (0..4).map(|at| tokenizer().token_text(server.engine().letter(&request, 0, at))).collect();
    assert_eq!(choice["message"], json!({"role": "assistant", "content": format!("{letters}!"), "refusal": null}));
    assert_eq!((&choice["finish_reason"], &choice["logprobs"], &choice["index"]), (&json!("length"), &json!(null), &json!(0)));
    let prompt = request.prompt_tokens.len() as u64;
    assert_eq!(
        json["usage"],
        json!({"prompt_tokens": prompt, "completion_tokens": 4, "total_tokens": prompt + 4, "prompt_tokens_details": {"cached_tokens": 1}})
    );

    assert_eq!(request.params.temperature, 0.5);
    assert_eq!(request.params.top_p, 0.75, "the model's default");
    assert_eq!((request.params.stop, request.params.logit_bias), (vec!["END".to_owned()], vec![(7, -5.0)]));
    assert_eq!((request.seed, request.priority), (1, 3));
    let text = tokenizer().decode(&request.prompt_tokens, false).unwrap();
    assert_eq!(text, "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n");
}

#[tokio::test]
async fn answers_without_a_bound_fill_the_context_and_n_answers_differ() {
    let server = Server::start().await;
    let body = json!({"messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        "n": 3, "seed": -1, "top_k": -1});
    let answer = server.post_json(CHAT, &body).await.json();
    let request = server.engine().last();
    assert_eq!(request.prompt_tokens.len() + request.params.max_tokens as usize, super::engine::CONTEXT);
    assert_eq!((request.seed, request.params.top_k), (u64::MAX, 0));
    let text = tokenizer().decode(&request.prompt_tokens, false).unwrap();
    assert!(text.starts_with("<|im_start|>system\nBe brief.<|im_end|>"), "{text}");
    let choices = answer["choices"].as_array().unwrap();
    assert_eq!(choices.iter().map(|choice| choice["index"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1, 2]);
    assert_ne!(choices[0]["message"], choices[1]["message"]);
}

#[tokio::test]
async fn continuing_the_last_message_reaches_the_template() {
    let server = Server::start().await;
    let body = json!({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, w"}],
        "add_generation_prompt": false, "continue_final_message": true, "max_tokens": 1});
    assert_eq!(server.post_json(CHAT, &body).await.status, 200);
    let text = tokenizer().decode(&server.engine().last().prompt_tokens, false).unwrap();
    assert!(text.ends_with("Hello, w"), "{text}");
}

#[tokio::test]
async fn chat_logprobs_have_bytes_and_alternatives() {
    let server = Server::start().await;
    let mut body = chat();
    body["logprobs"] = json!(true);
    body["top_logprobs"] = json!(2);
    body["return_token_ids"] = json!(true);
    let json = server.post_json(CHAT, &body).await.json();
    let content = json["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), 4);
    let first = &content[0];
    let letter = first["token"].as_str().unwrap();
    assert_eq!(first["bytes"], json!(letter.as_bytes()));
    assert_eq!((&first["logprob"], first["top_logprobs"].as_array().unwrap().len()), (&json!(-0.5), 2));
    assert_eq!(json["prompt_token_ids"], json!(&*server.engine().last().prompt_tokens));
    assert_eq!(json["choices"][0]["token_ids"].as_array().unwrap().len(), 4);
}

#[tokio::test]
async fn stop_reasons_name_what_matched() {
    let server = Server::start().await;
    for (reason, stop_reason) in [
        (FinishReason::StopString("END".into()), json!("END")),
        (FinishReason::StopToken(9), json!(9)),
        (FinishReason::EndOfText, json!(null)),
    ] {
        server.engine().script.lock().end = reason;
        let json = server.post_json(CHAT, &chat()).await.json();
        let choice = &json["choices"][0];
        assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("stop"), &stop_reason));
    }
}

#[tokio::test]
async fn completions_take_prompts_in_all_four_forms() {
    let server = Server::start().await;
    let ids = tokenizer().encode("Once upon", false).unwrap();
    for (prompt, count) in [(json!("Once upon"), 1), (json!(["Once upon", "Hi"]), 2), (json!(ids), 1), (json!([ids, [5, 6]]), 2)] {
        let body = json!({"prompt": prompt, "max_tokens": 2, "n": 2, "best_of": 2, "seed": 4});
        let json = server.post_json(COMPLETIONS, &body).await.json();
        assert_eq!(json["object"], "text_completion");
        let indices: Vec<u64> = json["choices"].as_array().unwrap().iter().map(|choice| choice["index"].as_u64().unwrap()).collect();
        assert_eq!(indices, (0..2 * count).collect::<Vec<u64>>());
        assert_eq!(json["usage"]["completion_tokens"], 4 * count);
        assert!(server.engine().seen.lock().iter().any(|request| *request.prompt_tokens == *ids));
    }
}

#[tokio::test]
async fn prompts_in_a_list_answer_as_they_do_alone_with_a_seed() {
    let server = Server::start().await;
    let body = |prompt| json!({"prompt": prompt, "max_tokens": 6, "seed": 11});
    let together = server.post_json(COMPLETIONS, &body(json!(["One", "Two three"]))).await.json();
    for (index, prompt) in ["One", "Two three"].iter().enumerate() {
        let alone = server.post_json(COMPLETIONS, &body(json!(prompt))).await.json();
        assert_eq!(together["choices"][index]["text"], alone["choices"][0]["text"]);
    }
    server.post_json(COMPLETIONS, &json!({"prompt": ["One", "One"], "max_tokens": 1})).await;
    let seen = server.engine().seen.lock().clone();
    let seeds: Vec<u64> = seen.iter().rev().take(2).map(|request| request.seed).collect();
    assert_ne!(seeds[0], seeds[1], "drawn seeds differ");
}

#[tokio::test]
async fn echo_scores_the_prompt_with_offsets_in_characters() {
    let server = Server::start().await;
    let prompt = "Né 5 日本";
    let body = json!({"prompt": prompt, "max_tokens": 2, "echo": true, "logprobs": 1, "seed": 3});
    let json = server.post_json(COMPLETIONS, &body).await.json();
    let choice = &json["choices"][0];
    assert!(choice["text"].as_str().unwrap().starts_with(prompt));
    let logprobs = &choice["logprobs"];
    let ids = tokenizer().encode(prompt, true).unwrap();
    for column in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[column].as_array().unwrap().len(), ids.len() + 2, "{column}");
    }
    assert_eq!((&logprobs["token_logprobs"][0], &logprobs["top_logprobs"][0]), (&json!(null), &json!(null)));
    assert_eq!(logprobs["token_logprobs"][1], -0.5);
    let offsets: Vec<u64> = logprobs["text_offset"].as_array().unwrap().iter().map(|offset| offset.as_u64().unwrap()).collect();
    assert_eq!(offsets[0], 0);
    assert!(offsets.is_sorted(), "{offsets:?}");
    assert_eq!(offsets[ids.len()], prompt.chars().count() as u64);
    assert_eq!(offsets[ids.len() + 1], prompt.chars().count() as u64 + 1);

    let body = json!({"prompt": prompt, "max_tokens": 0, "echo": true});
    let json = server.post_json(COMPLETIONS, &body).await.json();
    assert_eq!(json["choices"][0]["text"], format!("{prompt}!"));
    assert_eq!((&json["choices"][0]["logprobs"], &json["usage"]["completion_tokens"]), (&json!(null), &json!(0)));
}

#[tokio::test]
async fn models_are_listed_by_every_name() {
    let server = Server::start().await;
    let list = server.get("/v1/models").await.json();
    let ids: Vec<&str> = list["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["model", "model-alias"]);
    let one = server.get("/v1/models/model-alias").await.json();
    assert_eq!((&one["id"], &one["root"], &one["object"]), (&json!("model-alias"), &json!("model"), &json!("model")));
    let error = server.get("/v1/models/org/other").await.error(404);
    assert_eq!((&error["code"], &error["param"]), (&json!("model_not_found"), &json!("model")));
    assert!(error["message"].as_str().unwrap().contains("model-alias"), "{error}");
    let mut body = chat();
    body["model"] = json!("model-alias");
    assert_eq!(server.post_json(CHAT, &body).await.json()["model"], "model");
    // A path of the server's machine is a name, and told to nobody.
    body["model"] = json!("/models/model.gguf");
    assert_eq!(server.post_json(CHAT, &body).await.json()["model"], "model");
    assert!(!error["message"].as_str().unwrap().contains("/models/model.gguf"), "{error}");
}

#[tokio::test]
async fn tokenize_and_detokenize_are_inverse() {
    let server = Server::start().await;
    let text = "Hello, 世界 <|im_end|>";
    let json = server.post_json("/tokenize", &json!({"prompt": text, "return_token_strs": true})).await.json();
    assert_eq!(json["count"].as_u64().unwrap() as usize, json["tokens"].as_array().unwrap().len());
    assert_eq!(json["max_model_len"], super::engine::CONTEXT);
    assert_eq!(json["token_strs"].as_array().unwrap().last().unwrap(), "<|im_end|>");
    let back = server.post_json("/detokenize", &json!({"tokens": json["tokens"]})).await.json();
    assert_eq!(back, json!({"prompt": text}));
    let chat = server.post_json("/tokenize", &json!({"messages": [{"role": "user", "content": "Hi"}]})).await.json();
    let back = server.post_json("/detokenize", &json!({"tokens": chat["tokens"]})).await.json();
    assert_eq!(back["prompt"], "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
    assert_eq!(chat["token_strs"], json!(null));
}

#[tokio::test]
async fn every_response_has_a_request_id_and_a_time() {
    let server = Server::start().await;
    let mut request = post(CHAT, chat().to_string());
    request.headers_mut().insert("x-request-id", "trace-5".parse().unwrap());
    let answer = Answer::read(server.send(request).await).await;
    assert_eq!(answer.header("x-request-id"), Some("trace-5"));
    assert!(answer.header("openai-processing-ms").unwrap().parse::<u64>().is_ok());
    let unknown = server.get("/nothing").await;
    unknown.error(404);
    assert!(unknown.header("x-request-id").unwrap().starts_with("req_"));
    assert_eq!(server.metric("forge_http_responses_total{route=\"/v1/chat/completions\",status=\"200\"}"), Some(1.0));
    assert_eq!(server.metric("forge_http_responses_total{route=\"unknown\",status=\"404\"}"), Some(1.0));
    assert_eq!(server.metric("forge_generation_tokens_total{model_name=\"model\"}"), Some(4.0));
    assert_eq!(server.metric("forge_requests_finished_total{model_name=\"model\",finished_reason=\"length\"}"), Some(1.0));
    assert_eq!(server.metric("forge_requests_in_progress{model_name=\"model\"}"), Some(0.0));
}
