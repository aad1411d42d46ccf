//! The real SmolLM2 vocabulary against llama.cpp and the `tokenizers` library.
//!
//! Reads the GGUF file that FORGE_TEST_SMOLLM2 names; without it these tests say so and pass, but never where `CI` is set. The expected ids are in
//! `tests/fixtures/text/smollm2.json`.

mod common;

use std::path::Path;

use common::{corpus, fixture, gguf_file::tokenizer_metadata, ids};
use forge_text::{ChatRender, ModelText};
use serde_json::json;

/// The model, or `None` with a reason printed.
fn smollm2(test: &str) -> Option<ModelText> {
    let Some(path) = std::env::var_os("FORGE_TEST_SMOLLM2") else {
        assert!(std::env::var_os("CI").is_none(), "CI must set FORGE_TEST_SMOLLM2 to the default model's GGUF file");
        eprintln!("{test} skipped: FORGE_TEST_SMOLLM2 does not name the SmolLM2 GGUF file");
        return None;
    };
    let metadata = tokenizer_metadata(Path::new(&path));
    Some(ModelText::from_gguf(&metadata).expect("a supported tokenizer"))
}

#[test]
fn ids_and_texts_are_those_of_llama_cpp_and_the_library() {
    let Some(model) = smollm2("ids_and_texts_are_those_of_llama_cpp_and_the_library") else {
        return;
    };
    let tokenizer = model.tokenizer();
    let golden = fixture("smollm2.json");
    assert_eq!(golden["vocab_size"], tokenizer.vocab_size());
    for (text, expected) in corpus().iter().zip(golden["encode"].as_array().unwrap()) {
        assert_eq!(expected["llama_cpp_agrees"], true, "{text:?}");
        assert_eq!(tokenizer.encode(text, true).unwrap(), ids(&expected["ids"]), "{text:?}");
    }
    for expected in golden["decode"].as_array().unwrap() {
        let sequence = ids(&expected["ids"]);
        assert_eq!(expected["text"], tokenizer.decode(&sequence, false).unwrap());
        assert_eq!(expected["without_special"], tokenizer.decode(&sequence, true).unwrap());
    }
}

#[test]
fn special_ids_and_the_chat_template_are_the_model_s() {
    let Some(model) = smollm2("special_ids_and_the_chat_template_are_the_model_s") else {
        return;
    };
    let tokenizer = model.tokenizer();
    assert_eq!(tokenizer.bos_id(), Some(1));
    assert_eq!(tokenizer.eos_ids(), [2, 0]);
    let messages = [json!({"role": "user", "content": "Hi"})];
    let prompt = model
        .chat_template()
        .unwrap()
        .render(&ChatRender { messages: &messages, add_generation_prompt: true, ..ChatRender::default() })
        .unwrap();
    assert_eq!(
        prompt,
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face\
         <|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    );
    let encoded = tokenizer.encode(&prompt, false).unwrap();
    assert_eq!(encoded.iter().filter(|id| **id == 1).count(), 3);
    assert_eq!(encoded.iter().filter(|id| **id == 2).count(), 2);
}
