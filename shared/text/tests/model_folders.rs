//! What the small files of a Hugging Face folder decide: special ids, what is put around a text,
//! templates.

mod common;

use common::{fixture_path, gguf_metadata};
use forge_text::{ChatRender, ChatTemplate, HuggingFaceFiles, IncrementalDecoder, ModelText, StopMatcher, TextError, Tokenizer};
use serde_json::{Value, json};

/// A folder with the tiny byte-level tokenizer and these side files.
fn files(config: Value, generation: Value) -> HuggingFaceFiles {
    HuggingFaceFiles {
        tokenizer_config: Some(config.to_string().into_bytes()),
        generation_config: Some(generation.to_string().into_bytes()),
        ..HuggingFaceFiles::read(&fixture_path("byte_level")).unwrap()
    }
}

fn prompt(template: &ChatTemplate) -> String {
    let messages = [json!({"role": "user", "content": "Hi"})];
    template.render(&ChatRender { messages: &messages, ..ChatRender::default() }).unwrap()
}

#[test]
fn special_ids_come_from_all_files() {
    let config = json!({
        "bos_token": "<|im_start|>",
        "eos_token": {"content": "<|im_end|>", "lstrip": false},
        "pad_token": "<|endoftext|>",
        "unk_token": "not in the vocabulary",
    });
    let model = ModelText::from_hugging_face(&files(config, json!({"eos_token_id": [0, 2]}))).unwrap();
    let tokenizer = model.tokenizer();
    assert_eq!(tokenizer.bos_id(), Some(1));
    assert_eq!(tokenizer.eos_ids(), [2, 0]);
    assert_eq!(tokenizer.padding_id(), Some(0));
    assert_eq!(tokenizer.unknown_id(), None);

    let mut only_model = files(json!({}), json!({}));
    only_model.config = Some(b"{\"bos_token_id\": 0, \"eos_token_id\": 2}".to_vec());
    let tokenizer = Tokenizer::from_hugging_face(&only_model).unwrap();
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_ids()), (Some(0), [2].as_slice()));
}

#[test]
fn flags_decide_what_is_put_around_a_text() {
    let encode = |bos: Value, eos: Value| {
        let config = json!({
            "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
            "add_bos_token": bos, "add_eos_token": eos,
        });
        let tokenizer = Tokenizer::from_hugging_face(&files(config, json!({}))).unwrap();
        (tokenizer.encode("", true).unwrap(), tokenizer.encode("", false).unwrap())
    };
    assert_eq!(encode(json!(true), json!(true)), (vec![1, 2], vec![]));
    assert_eq!(encode(json!(true), json!(null)), (vec![1], vec![]));
    assert_eq!(encode(json!(false), json!(true)), (vec![2], vec![]));
    assert_eq!(encode(json!(null), json!(null)), (vec![], vec![]));

    let mut metadata = gguf_metadata("byte_level", "smollm");
    metadata.add_bos_token = Some(true);
    metadata.add_eos_token = Some(true);
    assert_eq!(Tokenizer::from_gguf(&metadata).unwrap().encode("", true).unwrap(), [1, 2]);
}

#[test]
fn tokens_that_only_the_configuration_declares_are_added() {
    let size = Tokenizer::from_hugging_face(&files(json!({}), json!({}))).unwrap().vocab_size();
    let declared = json!({size.to_string(): {"content": "<new>", "special": true}});
    let config = json!({"added_tokens_decoder": declared});
    let tokenizer = Tokenizer::from_hugging_face(&files(config, json!({}))).unwrap();
    assert_eq!(tokenizer.encode("<new>", false).unwrap(), [size as u32]);
    assert!(tokenizer.is_special(size as u32));
}

#[test]
fn templates_are_found_wherever_they_are() {
    let template = |files: &HuggingFaceFiles| ModelText::from_hugging_face(files).unwrap();
    let one = json!({"chat_template": "config {{ bos_token }}", "bos_token": "<|im_start|>"});
    let mut folder = files(one, json!({}));
    assert_eq!(prompt(template(&folder).chat_template().unwrap()), "config <|im_start|>");
    folder.chat_template_json = Some(br#"{"chat_template": "json"}"#.to_vec());
    assert_eq!(prompt(template(&folder).chat_template().unwrap()), "json");
    folder.chat_template_jinja = Some(b"jinja".to_vec());
    assert_eq!(prompt(template(&folder).chat_template().unwrap()), "jinja");
    assert_eq!(prompt(template(&folder).tool_template().unwrap()), "jinja");

    let named = json!({"chat_template": [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools"},
        {"name": "rag", "template": "documents"},
    ]});
    let model = template(&files(named, json!({})));
    assert_eq!(prompt(model.chat_template().unwrap()), "plain");
    assert_eq!(prompt(model.tool_template().unwrap()), "tools");
    let model = model.with_chat_template("mine").unwrap();
    assert_eq!(prompt(model.tool_template().unwrap()), "mine");
}

/// A model whose template is missing or broken still serves completions.
#[test]
fn a_missing_or_broken_template_is_an_error_where_it_is_asked_for() {
    let model = ModelText::from_hugging_face(&files(json!({}), json!({}))).unwrap();
    assert_eq!(model.chat_template().unwrap_err(), TextError::NoChatTemplate);
    let broken = ModelText::from_hugging_face(&files(json!({"chat_template": "{% if %}"}), json!({}))).unwrap();
    let error = broken.chat_template().unwrap_err();
    assert!(matches!(error, TextError::TemplateInvalid(_)), "{error}");
    assert!(!broken.tokenizer().encode("Hi", false).unwrap().is_empty());
}

#[test]
fn everything_is_shared_between_threads() {
    fn shared<T: Send + Sync + Clone + 'static>() {}
    shared::<Tokenizer>();
    shared::<ModelText>();
    shared::<ChatTemplate>();
    shared::<IncrementalDecoder>();
    shared::<StopMatcher>();
    let tokenizer = Tokenizer::from_gguf(&gguf_metadata("byte_level", "smollm")).unwrap();
    let expected = tokenizer.encode("Hello, threads! ".repeat(50).as_str(), false).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let encoded = tokenizer.encode("Hello, threads! ".repeat(50).as_str(), false).unwrap();
                assert_eq!(encoded, expected);
            });
        }
    });
}
