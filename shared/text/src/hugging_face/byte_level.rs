//! `vocab.json` and `merges.txt` without a `tokenizer.json`: byte-level BPE of GPT-2 and those
//! that took it over. They are brought into the form of a `tokenizer.json`, as the model's own
//! library does, so that there is one way to build such a tokenizer.

use serde_json::{Map, Value, json};

use super::side_files::{SideFiles, parse_object, token_text};
use crate::gguf::PreTokenizer;
use crate::{Result, TextError};

/// Values of `tokenizer_class` that cut text as GPT-2 does.
const GPT2_CLASSES: &[&str] = &["GPT2Tokenizer", "GPT2TokenizerFast", "CodeGenTokenizer", "CodeGenTokenizerFast", "GPTNeoXTokenizer"];
/// Those that cut text as Qwen 2 does.
const QWEN2_CLASSES: &[&str] = &["Qwen2Tokenizer", "Qwen2TokenizerFast"];

/// The `tokenizer.json` that these files stand for.
pub(super) fn tokenizer_json(vocabulary: &[u8], merges: &[u8], added_tokens: Option<&[u8]>, side: &SideFiles) -> Result<Vec<u8>> {
    let (normalizer, pre_tokenizer) = steps(side)?;
    let vocabulary = parse_object("vocab.json", vocabulary)?;
    let added = added(&vocabulary, added_tokens, side)?;
    let json = json!({
        "version": "1.0",
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merge_list(merges)?},
    });
    Ok(json.to_string().into_bytes())
}

/// Normalizer and pre-tokenizer of the class.
fn steps(side: &SideFiles) -> Result<(Value, Value)> {
    let prefix = side.tokenizer_config.get("add_prefix_space").and_then(Value::as_bool).unwrap_or(false);
    let byte_level = |words: bool| json!({"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": words});
    let class = side.tokenizer_config.get("tokenizer_class").and_then(Value::as_str).unwrap_or("GPT2Tokenizer");
    if GPT2_CLASSES.contains(&class) {
        return Ok((Value::Null, byte_level(true)));
    }
    if QWEN2_CLASSES.contains(&class) {
        let words = PreTokenizer::named("qwen2")?.patterns[0];
        let split = json!({"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": false});
        return Ok((json!({"type": "NFC"}), json!({"type": "Sequence", "pretokenizers": [split, byte_level(false)]})));
    }
    Err(TextError::Unsupported {
        field: "tokenizer_config.json: tokenizer_class",
        value: class.to_owned(),
        supported: format!("with vocab.json and merges.txt: {}, {}", GPT2_CLASSES.join(", "), QWEN2_CLASSES.join(", ")),
    })
}

/// The lines of `merges.txt`, but for its version line and empty ones.
fn merge_list(merges: &[u8]) -> Result<Vec<&str>> {
    let text = std::str::from_utf8(merges).map_err(|error| TextError::invalid("merges.txt", error))?;
    Ok(text.lines().filter(|line| !line.is_empty() && !line.starts_with("#version")).collect())
}

/// `added_tokens` of the tokens that only `added_tokens.json` declares. (What
/// `tokenizer_config.json` declares is added as for every `tokenizer.json`.)
fn added(vocabulary: &Map<String, Value>, added_tokens: Option<&[u8]>, side: &SideFiles) -> Result<Vec<Value>> {
    let Some(bytes) = added_tokens else {
        return Ok(Vec::new());
    };
    let declared = side.tokenizer_config.get("added_tokens_decoder").and_then(Value::as_object);
    let is_declared = |text: &str| declared.is_some_and(|tokens| tokens.values().any(|token| token_text(token) == Some(text)));
    let mut tokens: Vec<(String, Value)> = parse_object("added_tokens.json", bytes)?
        .into_iter()
        .filter(|(text, _)| !is_declared(text) && !vocabulary.contains_key(text))
        .collect();
    tokens.sort_by_key(|(_, id)| id.as_u64());
    Ok(tokens
        .into_iter()
        .map(|(text, id)| {
            json!({"id": id, "content": text, "special": false, "normalized": false,
                   "single_word": false, "lstrip": false, "rstrip": false})
        })
        .collect())
}
