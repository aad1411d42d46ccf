//! Every field is honoured or refused by name, and bad bodies are answered in OpenAI's shape.

use forge_gateway::request::fields::{ENDPOINTS, Endpoint, Rule};
use serde_json::{Map, Value, json};

use super::{Answer, CHAT, COMPLETIONS, Server, post};

fn path(endpoint: &Endpoint) -> &'static str {
    endpoint.route.strip_prefix("POST ").expect("bodies are posted")
}

/// A body that is fine without the field.
fn plain(endpoint: &Endpoint) -> Map<String, Value> {
    let body = match path(endpoint) {
        CHAT => json!({"messages": [{"role": "user", "content": "Hi"}], "max_completion_tokens": 16}),
        COMPLETIONS => json!({"prompt": "Hi", "max_tokens": 16}),
        "/tokenize" => json!({"prompt": "Hi"}),
        _ => json!({"tokens": [5]}),
    };
    body.as_object().expect("an object").clone()
}

/// What a field needs beside it.
fn with_needs(endpoint: &Endpoint, name: &str) -> Map<String, Value> {
    let mut body = plain(endpoint);
    let mut set = |key: &str, value: Value| drop(body.insert(key.into(), value));
    match (path(endpoint), name) {
        (_, "model") => {}
        (_, "stream_options") => set("stream", json!(true)),
        (CHAT, "top_logprobs") => set("logprobs", json!(true)),
        (_, "continue_final_message") => {
            set("add_generation_prompt", json!(false));
            set("messages", json!([{"role": "assistant", "content": "Hel"}]));
        }
        ("/tokenize", "add_generation_prompt" | "chat_template_kwargs") => set("messages", json!([{"role": "user", "content": "Hi"}])),
        _ => {}
    }
    if path(endpoint) == "/tokenize" && (body.contains_key("messages") || name == "messages") {
        body.remove("prompt");
    }
    body
}

#[tokio::test]
async fn every_field_of_every_table_does_what_its_rule_says() {
    let server = Server::start().await;
    for endpoint in ENDPOINTS {
        for field in endpoint.fields() {
            let example: Value = serde_json::from_str(field.example).expect("examples are JSON");
            let mut body = with_needs(endpoint, field.name);
            body.insert(field.name.into(), if field.name == "model" { json!("model") } else { example });
            let what = format!("{} {}", endpoint.route, field.name);
            let answer = server.post_json(path(endpoint), &Value::Object(body.clone())).await;
            match field.rule {
                Rule::Honoured(_) | Rule::Only { .. } => assert_eq!(answer.status, 200, "{what}: {}", answer.text),
                Rule::Refused(_) => {
                    let error = answer.error(400);
                    assert_eq!((&error["param"], &error["code"]), (&json!(field.name), &json!("unsupported_parameter")), "{what}");
                    assert!(error["message"].as_str().unwrap().contains(field.name), "{what}");
                }
            }
            // A value of a type no field has is refused by name, whatever the rule; null is a field left out.
            if !matches!(field.rule, Rule::Refused(_)) {
                body.insert(field.name.into(), json!([{"x": 1.5}]));
                let error = server.post_json(path(endpoint), &Value::Object(body.clone())).await.error(400);
                let named = error["param"].as_str().unwrap_or_default().starts_with(field.name);
                assert!(named, "{what}: {error}");
            }
            if !matches!(field.name, "messages" | "prompt" | "tokens") {
                body.insert(field.name.into(), Value::Null);
                assert_eq!(server.post_json(path(endpoint), &Value::Object(body)).await.status, 200, "{what}: null");
            }
        }
        let mut body = plain(endpoint);
        body.insert("no_such_field".into(), json!(1));
        let error = server.post_json(path(endpoint), &Value::Object(body)).await.error(400);
        assert_eq!((&error["param"], &error["code"]), (&json!("no_such_field"), &json!("unknown_parameter")));
    }
}

#[tokio::test]
async fn openais_fields_are_all_in_the_tables() {
    let chat = "audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens max_tokens messages metadata \
        modalities model moderation n parallel_tool_calls prediction presence_penalty prompt_cache_key prompt_cache_options \
        prompt_cache_retention reasoning_effort response_format safety_identifier seed service_tier stop store stream stream_options \
        temperature tool_choice tools top_logprobs top_p user verbosity web_search_options";
    let completion = "best_of echo frequency_penalty logit_bias logprobs max_tokens model n presence_penalty prompt seed stop stream \
        stream_options suffix temperature top_p user";
    for (endpoint, names, count) in [(ENDPOINTS[0], chat, 37), (ENDPOINTS[1], completion, 18)] {
        let fields = endpoint.fields();
        let names: Vec<&str> = names.split_whitespace().collect();
        assert_eq!(names.len(), count);
        for name in names {
            assert!(fields.iter().any(|field| field.name == name), "{name}");
        }
    }
}

#[tokio::test]
async fn values_out_of_range_are_refused_by_name() {
    let server = Server::start().await;
    let cases = [
        ("n", "0"),
        ("n", "129"),
        ("n", "1000000000000"),
        ("n", "-1"),
        ("n", "1.0"),
        ("n", "true"),
        ("n", "\"1\""),
        ("n", "99999999999999999999999"),
        ("max_tokens", "0"),
        ("max_tokens", "4294967296"),
        ("max_tokens", "-1"),
        ("max_completion_tokens", "1e3"),
        ("temperature", "-0.1"),
        ("temperature", "2.1"),
        ("temperature", "1e300"),
        ("temperature", "1e400"),
        ("temperature", "NaN"),
        ("temperature", "\"hot\""),
        ("temperature", "true"),
        ("top_p", "0"),
        ("top_p", "1.1"),
        ("min_p", "-1"),
        ("top_k", "-2"),
        ("top_k", "1.5"),
        ("repetition_penalty", "0"),
        ("presence_penalty", "-2.1"),
        ("frequency_penalty", "2.1"),
        ("seed", "1.5"),
        ("seed", "9223372036854775808"),
        ("stop", "\"\""),
        ("stop", "[1]"),
        ("stop", "[\"a\", \"\"]"),
        ("stop", "[\"1\",\"2\",\"3\",\"4\",\"5\",\"6\",\"7\",\"8\",\"9\",\"0\",\"a\",\"b\",\"c\",\"d\",\"e\",\"f\",\"g\"]"),
        ("stop_token_ids", "[502]"),
        ("stop_token_ids", "[-1]"),
        ("logit_bias", "{\"502\": 1}"),
        ("logit_bias", "{\"5\": 101}"),
        ("logit_bias", "{\"05\": 1}"),
        ("logit_bias", "{\"x\": 1}"),
        ("logit_bias", "[]"),
        ("top_logprobs", "21"),
        ("top_logprobs", "1"),
        ("min_tokens", "100"),
        ("priority", "1001"),
        ("stream", "1"),
        ("stream_options", "{\"include_usage\": true}"),
        ("cache_salt", "\"\""),
        ("metadata", "{\"a\": 1}"),
        ("chat_template_kwargs", "{\"a\": [1]}"),
        ("continue_final_message", "true"),
        ("tools", "[{}]"),
        ("tool_choice", "\"required\""),
        ("response_format", "{\"type\": \"json_object\"}"),
        ("store", "true"),
        ("service_tier", "\"flex\""),
        ("modalities", "[\"text\", \"audio\"]"),
        ("messages", "[]"),
        ("messages", "{}"),
        ("messages", "[1]"),
        ("messages", "null"),
    ];
    for (field, value) in cases {
        let mut body = json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5});
        body.as_object_mut().unwrap().shift_remove(field);
        let text = format!("{}, \"{field}\": {value}}}", body.to_string().strip_suffix('}').unwrap());
        let error = server.post(CHAT, text).await.error(400);
        assert!(error["param"].as_str().unwrap_or_default().starts_with(field), "{field} {value}: {error}");
        assert_eq!(error["type"], "invalid_request_error");
    }
    assert!(server.engine().seen.lock().is_empty(), "nothing reached the engine");
}

#[tokio::test]
async fn messages_are_checked_to_the_last_key() {
    let server = Server::start().await;
    let cases = [
        (json!([{"content": "Hi"}]), "messages[0].role"),
        (json!([{"role": "robot", "content": "Hi"}]), "messages[0].role"),
        (json!([{"role": "function", "content": "Hi", "name": "f"}]), "messages[0].role"),
        (json!([{"role": "user"}]), "messages[0].content"),
        (json!([{"role": "user", "content": null}]), "messages[0].content"),
        (json!([{"role": "user", "content": 5}]), "messages[0].content"),
        (json!([{"role": "user", "content": []}]), "messages[0].content"),
        (json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a", "tool_calls": []}]), "messages[1].tool_calls"),
        (json!([{"role": "user", "content": "Hi", "color": 1}]), "messages[0].color"),
        (json!([{"role": "tool", "content": "5"}]), "messages[0].tool_call_id"),
        (json!([{"role": "user", "content": "5", "tool_call_id": "x"}]), "messages[0].tool_call_id"),
        (json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]), "messages[0].content[0].type"),
        (json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_audio"}]}]), "messages[0].content[1].type"),
        (json!([{"role": "user", "content": [{"type": "text", "text": "a", "cache": 1}]}]), "messages[0].content[0].cache"),
        (json!([{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0].text"),
    ];
    for (messages, param) in cases {
        let error = server.post_json(CHAT, &json!({"messages": messages})).await.error(400);
        assert_eq!(error["param"], param, "{error}");
    }
    let raised = json!({"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]});
    let error = server.post_json(CHAT, &raised).await.error(400);
    assert!(error["message"].as_str().unwrap().contains("the system message must come first"), "{error}");
}

#[tokio::test]
async fn prompts_are_checked_against_the_model() {
    let server = Server::start().await;
    let cases = [
        (json!({"prompt": []}), "prompt", None),
        (json!({"prompt": [[]]}), "prompt", None),
        (json!({"prompt": [1, "a"]}), "prompt[1]", None),
        (json!({"prompt": ["a", [1]]}), "prompt[1]", None),
        (json!({"prompt": {"a": 1}}), "prompt", None),
        (json!({"prompt": [502]}), "prompt", None),
        (json!({"prompt": vec!["a"; 129]}), "prompt", None),
        (json!({"prompt": vec!["a"; 65], "n": 2}), "n", None),
        (json!({"prompt": "a", "best_of": 2}), "best_of", None),
        (json!({"prompt": "a", "max_tokens": 0}), "max_tokens", None),
        (json!({"prompt": "a", "suffix": "b"}), "suffix", Some("unsupported_value")),
        (json!({"prompt": vec![5; 500], "max_tokens": 13}), "prompt", Some("context_length_exceeded")),
        (json!({"prompt": "word ".repeat(2000)}), "prompt", Some("context_length_exceeded")),
    ];
    for (body, param, code) in cases {
        let error = server.post_json(COMPLETIONS, &body).await.error(400);
        assert_eq!((error["param"].as_str(), error["code"].as_str()), (Some(param), code), "{error}");
    }
    let error = server.post_json(COMPLETIONS, &json!({"prompt": vec![5; 600], "max_tokens": 7})).await.error(400);
    let message = error["message"].as_str().unwrap();
    assert!(["512", "600", "7", "607"].iter().all(|number| message.contains(number)), "{message}");
    let whole = json!({"prompt": vec![5; 500], "max_tokens": 12});
    assert_eq!(server.post_json(COMPLETIONS, &whole).await.status, 200, "the context can be filled to its end");
    server.post_json("/detokenize", &json!({"tokens": [502]})).await.error(400);
    server.post_json("/tokenize", &json!({"prompt": "a", "messages": []})).await.error(400);
    server.post_json("/tokenize", &json!({"prompt": "a", "add_generation_prompt": true})).await.error(400);
}

#[tokio::test]
async fn bodies_that_are_no_request_are_refused() {
    let server = Server::start().await;
    let deep = format!("{{\"messages\": {}}}", "[".repeat(5_000_000));
    let cases: Vec<Vec<u8>> = vec![
        b"".to_vec(),
        b"nonsense".to_vec(),
        b"[]".to_vec(),
        b"{\"messages\": [{\"role\": \"user\", \"content\": \"\xff\xfe\"}]}".to_vec(),
        br#"{"messages": [{"role": "user", "content": "\ud800"}]}"#.to_vec(),
        br#"{"messages": [], "messages": []}"#.to_vec(),
        br#"{"messages": [{"role": "user", "role": "system", "content": "a"}]}"#.to_vec(),
        br#"{"temperature": NaN}"#.to_vec(),
        br#"{"temperature": 1e400}"#.to_vec(),
        deep.into_bytes(),
        format!("{{\"prompt\": [{}0]}}", "0,".repeat(2_000_000)).into_bytes(),
    ];
    for body in cases {
        let start = String::from_utf8_lossy(&body[..body.len().min(40)]).into_owned();
        let error = server.post(CHAT, body).await.error(400);
        assert_eq!((&error["type"], &error["code"]), (&json!("invalid_request_error"), &json!(null)), "{start}");
    }
    let error = server.post(CHAT, vec![b' '; (8 << 20) + 1]).await.error(413);
    assert_eq!(error["code"], "body_too_large");
    for kind in [None, Some("text/plain"), Some("application/x-www-form-urlencoded")] {
        let mut request = post(CHAT, "{}");
        request.headers_mut().remove("content-type");
        if let Some(kind) = kind {
            request.headers_mut().insert("content-type", kind.parse().unwrap());
        }
        Answer::read(server.send(request).await).await.error(415);
    }
    assert_eq!(server.get("/health").await.status, 200);
    assert_eq!(server.gateway.in_flight(), 0);
}

#[tokio::test]
async fn unknown_routes_methods_and_models_are_told_apart() {
    let server = Server::start().await;
    assert_eq!(server.post_json("/v1/embeddings", &json!({})).await.error(404)["code"], "unknown_url");
    let wrong = server.get(CHAT).await;
    assert_eq!((wrong.error(405)["code"].as_str(), wrong.header("allow")), (Some("method_not_allowed"), Some("POST")));
    let error = server.post_json(CHAT, &json!({"model": "gpt-9", "messages": [{"role": "user", "content": "Hi"}]})).await.error(404);
    assert_eq!((&error["code"], &error["param"]), (&json!("model_not_found"), &json!("model")));
}
