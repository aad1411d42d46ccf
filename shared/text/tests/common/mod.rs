//! Fixtures of `tests/fixtures/text`, for the integration tests.
#![allow(dead_code)] // each test binary uses a part of it

pub mod gguf_file;

use std::path::PathBuf;

use forge_text::{GgufTokenizer, HuggingFaceFiles, Tokenizer};
use serde_json::Value;

pub fn fixture_path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/text").join(name)
}

pub fn fixture(name: &str) -> Value {
    let path = fixture_path(name);
    let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&bytes).expect("a fixture is JSON")
}

pub fn corpus() -> Vec<String> {
    serde_json::from_value(fixture("corpus.json")).expect("a list of strings")
}

pub fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).expect("a list of ids")
}

/// A fixture tokenizer as a Hugging Face model.
pub fn hugging_face(name: &str) -> Tokenizer {
    let files = HuggingFaceFiles::read(&fixture_path(name)).expect("readable");
    Tokenizer::from_hugging_face(&files).expect("a valid tokenizer")
}

/// A fixture tokenizer as GGUF metadata, as `make_tokenizers.py` writes it.
pub fn gguf_metadata(name: &str, pre: &str) -> GgufTokenizer {
    let json = fixture(&format!("{name}/tokenizer.json"));
    let mut tokens: Vec<(u64, String, i32)> = Vec::new();
    for (token, id) in json["model"]["vocab"].as_object().expect("a map") {
        tokens.push((id.as_u64().expect("an id"), token.clone(), 1));
    }
    for token in json["added_tokens"].as_array().expect("a list") {
        let id = token["id"].as_u64().expect("an id");
        let kind = if token["special"] == true { 3 } else { 4 };
        let text = token["content"].as_str().expect("a string").to_string();
        tokens.retain(|(other, _, _)| *other != id);
        tokens.push((id, text, kind));
    }
    tokens.sort();
    let merges = json["model"]["merges"].as_array().expect("a list");
    let part = |merge: &Value, side: usize| merge[side].as_str().expect("a token").to_string();
    GgufTokenizer {
        model: "gpt2".to_string(),
        pre: pre.to_string(),
        token_types: tokens.iter().map(|(_, _, kind)| *kind).collect(),
        tokens: tokens.into_iter().map(|(_, token, _)| token).collect(),
        merges: merges.iter().map(|merge| format!("{} {}", part(merge, 0), part(merge, 1))).collect(),
        bos_id: Some(1),
        eos_id: Some(2),
        ..GgufTokenizer::default()
    }
}
