//! The portable form: the same tokens, texts and renderings as the original, for every kind of tokenizer and template.

mod common;

use common::{corpus, fixture, fixture_path, gguf_metadata};
use forge_text::{ChatRender, GgufTokenizer, HuggingFaceFiles, ModelText, TextError};
use proptest::prelude::*;
use serde_json::{Value, json};

fn spm_gguf(kind: &str) -> GgufTokenizer {
    let model = fixture(&format!("spm_{kind}/gguf.json"));
    GgufTokenizer {
        name: Some("tiny".to_owned()),
        model: if kind == "bpe" { "llama" } else { "t5" }.to_owned(),
        tokens: serde_json::from_value(model["tokens"].clone()).unwrap(),
        token_types: serde_json::from_value(model["types"].clone()).unwrap(),
        scores: Some(serde_json::from_value(model["scores"].clone()).unwrap()),
        unknown_id: Some(0),
        bos_id: Some(1),
        eos_id: Some(2),
        add_space_prefix: Some(true),
        remove_extra_whitespaces: model["remove_extra_whitespaces"].as_bool(),
        precompiled_charsmap: Some(serde_json::from_value(model["charsmap"].clone()).unwrap()),
        chat_template: Some("{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}".to_owned()),
        ..GgufTokenizer::default()
    }
}

/// Every kind of text there is among the fixtures, each with every template on it.
fn originals() -> Vec<(String, ModelText)> {
    let mut texts = Vec::new();
    let folders = ["byte_level", "metaspace", "sentencepiece", "unsplit", "wordpiece", "spm_bpe", "spm_unigram"];
    for folder in folders {
        let config = json!({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true, "chat_template": [
            {"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}"},
            {"name": "tool_use", "template": "T{{ messages[0].content }}"},
        ]});
        let files = HuggingFaceFiles {
            tokenizer_config: Some(config.to_string().into_bytes()),
            generation_config: Some(b"{\"eos_token_id\": [2, 0]}".to_vec()),
            ..HuggingFaceFiles::read(&fixture_path(folder)).unwrap()
        };
        texts.push((folder.to_owned(), ModelText::from_hugging_face(&files).unwrap()));
    }
    texts.push(("gguf gpt2".to_owned(), ModelText::from_gguf(&gguf_metadata("byte_level", "smollm")).unwrap()));
    for kind in ["bpe", "unigram"] {
        texts.push((format!("gguf {kind}"), ModelText::from_gguf(&spm_gguf(kind)).unwrap()));
    }
    for entry in std::fs::read_dir(fixture_path("templates")).unwrap() {
        let path = entry.unwrap().path();
        let source = std::fs::read_to_string(&path).unwrap();
        let text = texts[0].1.clone().with_chat_template(&source).unwrap();
        texts.push((path.display().to_string(), text));
    }
    texts
}

fn renderings(text: &ModelText) -> Vec<Result<String, TextError>> {
    let golden = fixture("templates.json");
    let cases = golden["cases"].as_array().unwrap().iter();
    let render = |template: Result<&forge_text::ChatTemplate, TextError>, case: &Value| {
        template?.render(&ChatRender {
            messages: case["messages"].as_array().unwrap(),
            tools: case["tools"].as_array().map(Vec::as_slice),
            ..ChatRender::default()
        })
    };
    cases.flat_map(|case| [render(text.chat_template(), case), render(text.tool_template(), case)]).collect()
}

#[test]
fn tokens_texts_and_renderings_are_those_of_the_original() {
    for (name, original) in originals() {
        let bytes = original.to_portable().unwrap();
        let copy = ModelText::from_portable(&bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(copy.to_portable().unwrap() == bytes, "{name}: its own portable form is another");
        let (ours, theirs) = (copy.tokenizer(), original.tokenizer());
        assert_eq!(ours.vocabulary_digest(), theirs.vocabulary_digest(), "{name}");
        let special = |tokenizer: &forge_text::Tokenizer| {
            (tokenizer.bos_id(), tokenizer.eos_ids().to_vec(), tokenizer.padding_id(), tokenizer.unknown_id())
        };
        assert_eq!(special(ours), special(theirs), "{name}");
        for text in corpus() {
            for add_special in [true, false] {
                let ids = ours.encode(&text, add_special).unwrap();
                assert_eq!(ids, theirs.encode(&text, add_special).unwrap(), "{name}: {text:?}");
                assert_eq!(ours.decode(&ids, add_special), theirs.decode(&ids, add_special), "{name}: {text:?}");
            }
        }
        assert_eq!(renderings(&copy), renderings(&original), "{name}");
    }
}

#[test]
fn what_is_no_portable_form_is_refused_by_name() {
    let bytes = originals()[0].1.to_portable().unwrap();
    let refused = |bytes: &[u8]| ModelText::from_portable(bytes).unwrap_err().to_string();
    assert!(refused(b"").contains("does not begin as one"));
    assert!(refused(&bytes[..9]).contains("ends within its header"));
    let mut other = bytes.clone();
    other[8] = 9;
    assert!(refused(&other).contains("version 9"), "{}", refused(&other));
    assert!(refused(&bytes[..12]).contains("either files or GGUF metadata"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_text_has_the_same_ids(text in any::<String>(), ids in proptest::collection::vec(0u32..400, 0..20)) {
        static COPIES: std::sync::LazyLock<Vec<(ModelText, ModelText)>> = std::sync::LazyLock::new(|| {
            originals().into_iter().map(|(_, text)| (ModelText::from_portable(&text.to_portable().unwrap()).unwrap(), text)).collect()
        });
        for (copy, original) in COPIES.iter() {
            prop_assert_eq!(copy.tokenizer().encode(&text, true), original.tokenizer().encode(&text, true));
            prop_assert_eq!(copy.tokenizer().decode(&ids, true), original.tokenizer().decode(&ids, true));
        }
    }

    /// Cut anywhere, it is refused or taken, and never panics.
    #[test]
    fn any_prefix_is_answered(at in any::<prop::sample::Index>()) {
        let bytes = originals()[8].1.to_portable().unwrap();
        let _ = ModelText::from_portable(&bytes[..at.index(bytes.len())]);
    }
}
