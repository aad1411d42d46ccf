//! What Forge makes of tokenizers and chat templates, for comparison with other programs.
//!
//! Reads one JSON object from standard input and writes one to standard output. For whom and in what form:
//! `tests/parity/tokenizers.py` and `tests/parity/templates.py`.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use forge_text::{ChatRender, ChatTemplate, GgufTokenizer, IncrementalDecoder, ModelText, TextError, Tokenizer};
use serde_json::{Map, Value, json};

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let mut input = String::new();
    std::io::stdin().read_to_string(&mut input)?;
    let request: Value = serde_json::from_str(&input)?;
    let result = match request.get("template") {
        Some(_) => render(&request)?,
        None => tokenize(&request)?,
    };
    println!("{result}");
    Ok(())
}

fn field<T: serde::de::DeserializeOwned>(from: &Value, name: &str) -> Result<T, Failure> {
    serde_json::from_value(from[name].clone()).map_err(|error| format!("{name}: {error}").into())
}

/// `folder` or `gguf` (metadata keys without `tokenizer.ggml.`), and `texts`.
fn tokenize(request: &Value) -> Result<Value, Failure> {
    let built = match request["folder"].as_str() {
        Some(folder) => ModelText::from_hugging_face_folder(Path::new(folder)).map(|text| text.tokenizer().clone()),
        None => Tokenizer::from_gguf(&gguf(&request["gguf"])?),
    };
    let tokenizer = match built {
        Ok(tokenizer) => tokenizer,
        Err(error) => return Ok(json!({"error": error.to_string()})),
    };
    let texts: Vec<String> = field(request, "texts")?;
    let results = texts.iter().map(|text| one_text(&tokenizer, text)).collect::<Result<Vec<_>, TextError>>()?;
    Ok(json!({"results": results, "eos": tokenizer.eos_ids()}))
}

fn one_text(tokenizer: &Tokenizer, text: &str) -> Result<Value, TextError> {
    let ids = tokenizer.encode(text, false)?;
    let mut decoder = IncrementalDecoder::new(tokenizer.clone(), false);
    let mut streamed = String::new();
    for &id in &ids {
        streamed += &decoder.push(id)?;
    }
    streamed += &decoder.flush();
    Ok(json!({
        "with_special": tokenizer.encode(text, true)?,
        "without_parsing": tokenizer.encode_with_special_parsing(text, false)?,
        "decoded": tokenizer.decode(&ids, false)?,
        "streamed": streamed,
        "ids": ids,
    }))
}

fn gguf(fields: &Value) -> Result<GgufTokenizer, Failure> {
    let id = |name: &str| fields[name].as_u64().map(|id| id as u32);
    let flag = |name: &str| fields[name].as_bool();
    Ok(GgufTokenizer {
        name: field(fields, "name")?,
        model: field(fields, "model")?,
        pre: fields["pre"].as_str().unwrap_or_default().to_owned(),
        tokens: field(fields, "tokens")?,
        token_types: field(fields, "token_type")?,
        scores: field(fields, "scores")?,
        merges: field::<Option<_>>(fields, "merges")?.unwrap_or_default(),
        bos_id: id("bos_token_id"),
        eos_id: id("eos_token_id"),
        eot_id: id("eot_token_id"),
        unknown_id: id("unknown_token_id"),
        padding_id: id("padding_token_id"),
        add_bos_token: flag("add_bos_token"),
        add_eos_token: flag("add_eos_token"),
        add_space_prefix: flag("add_space_prefix"),
        remove_extra_whitespaces: flag("remove_extra_whitespaces"),
        precompiled_charsmap: field(fields, "precompiled_charsmap")?,
        chat_template: None,
    })
}

/// `template` (its text), `special_tokens`, `now`, and `cases` of `messages` with what goes with them.
fn render(request: &Value) -> Result<Value, Failure> {
    let special: BTreeMap<String, String> = field(request, "special_tokens")?;
    let template = match ChatTemplate::new(&field::<String>(request, "template")?, special) {
        Ok(template) => template,
        Err(error) => return Ok(json!({"error": error.to_string()})),
    };
    let now_unix_seconds = field(request, "now")?;
    let cases: Vec<Value> = field(request, "cases")?;
    let results: Vec<Value> = cases
        .iter()
        .map(|case| {
            let list = |name: &str| case[name].as_array().map(Vec::as_slice);
            let flag = |name: &str| case[name].as_bool().unwrap_or(false);
            let variables: Option<&Map<String, Value>> = case["variables"].as_object();
            let rendered = template.render(&ChatRender {
                messages: list("messages").unwrap_or_default(),
                tools: list("tools"),
                documents: list("documents"),
                add_generation_prompt: flag("add_generation_prompt"),
                continue_final_message: flag("continue_final_message"),
                now_unix_seconds,
                variables,
            });
            match rendered {
                Ok(text) => json!({"text": text}),
                Err(TextError::TemplateRaised(message)) => json!({"error": "TemplateError", "message": message}),
                Err(error) => json!({"error": "other", "message": error.to_string()}),
            }
        })
        .collect();
    Ok(json!({"results": results, "content_format": format!("{:?}", template.content_format())}))
}
