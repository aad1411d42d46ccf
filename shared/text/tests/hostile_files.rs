//! Malformed tokenizer files and metadata: typed errors that name the field, never a panic.

mod common;

use std::sync::LazyLock;

use common::{fixture, fixture_path, gguf_metadata};
use forge_text::{GgufTokenizer, HuggingFaceFiles, ModelText, TextError, Tokenizer};
use proptest::prelude::*;
use serde_json::{Value, json};

fn load(json: &Value) -> Result<Tokenizer, TextError> {
    load_bytes(json.to_string().into_bytes())
}

fn load_bytes(tokenizer_json: Vec<u8>) -> Result<Tokenizer, TextError> {
    Tokenizer::from_hugging_face(&HuggingFaceFiles { tokenizer_json: Some(tokenizer_json), ..HuggingFaceFiles::default() })
}

fn valid_json() -> Value {
    fixture("byte_level/tokenizer.json")
}

/// The error of a file with one value replaced.
fn error_with(pointer: &str, value: Value) -> String {
    let mut json = valid_json();
    *json.pointer_mut(pointer).unwrap_or_else(|| panic!("{pointer}")) = value;
    let error = load(&json).expect_err(pointer);
    assert!(!error.is_request_error());
    error.to_string()
}

#[test]
fn a_wrong_value_is_named() {
    for (pointer, value, expected) in [
        ("/model", json!(null), "model"),
        ("/model/vocab", json!(null), "model.vocab"),
        ("/model/vocab", json!({}), "merge"),
        ("/model/vocab/!", json!(-1), "model.vocab"),
        ("/model/vocab/!", json!(4_294_967_295u32), "4294967295"),
        ("/model/vocab/!", json!(1e30), "model.vocab"),
        ("/model/vocab/!", json!("x"), "model.vocab"),
        ("/model/vocab/!", json!(40), "id 40"),
        ("/model/merges/0", json!(["x", "nope"]), "merge 0"),
        ("/model/merges/0", json!("nospace"), "merge 0"),
        ("/model/merges/0", json!(7), "merge 0"),
        ("/model/merges", json!(7), "model.merges"),
        ("/model/type", json!("Quantum"), "tokenizer.json"),
        ("/added_tokens/0/id", json!(77), "added_tokens"),
        ("/added_tokens/0/id", json!(1u64 << 40), "highest id"),
        ("/added_tokens/0/content", json!(null), "tokenizer.json"),
        ("/decoder/type", json!("CTC"), "CTC"),
        ("/decoder/type", json!("Nonsense"), "Nonsense"),
        ("/pre_tokenizer/type", json!("Nonsense"), "tokenizer.json"),
        ("/version", json!("9.9"), "9.9"),
    ] {
        let error = error_with(pointer, value.clone());
        assert!(error.contains(expected), "{pointer} = {value}: {error}");
    }
}

#[test]
fn a_wrong_expression_is_an_error() {
    let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    for pattern in ["(", "[", "(?<name", "\\p{Nope}", "a{999999999}"] {
        let error = error_with("/pre_tokenizer", split(pattern));
        assert!(error.contains("tokenizer.json"), "{error}");
    }
}

#[test]
fn post_processors_may_add_only_tokens_that_exist() {
    let processor = |id: u32, defined: &str| {
        json!({
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {defined: {"id": defined, "ids": [id], "tokens": [defined]}},
        })
    };
    let mut json = valid_json();
    json["post_processor"] = processor(5, "<x>");
    assert!(load(&json).unwrap().encode("", true).unwrap() == [5]);
    assert!(error_with("/post_processor", processor(100_000, "<x>")).contains("100000"));
    assert!(error_with("/post_processor", processor(5, "<y>")).contains("not consistent"));
}

#[test]
fn decoders_that_cannot_be_streamed_are_refused() {
    let decoder = json!({"type": "Sequence", "decoders": [
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 0, "stop": 3},
        {"type": "ByteFallback"},
    ]});
    assert!(error_with("/decoder", decoder).contains("ByteFallback"));
}

/// A unigram model's pieces become a tree with a level for each byte, freed by recursion.
#[test]
fn unigram_pieces_have_a_bound() {
    let unigram = |pieces: Value| json!({"version": "1.0", "added_tokens": [], "model": {"type": "Unigram", "unk_id": 0, "vocab": pieces}});
    let error = load(&unigram(json!([["<unk>", 0.0], ["a".repeat(300_000), -1.0]]))).expect_err("a long piece").to_string();
    assert!(error.contains("piece 1 has 300000 bytes"), "{error}");
    let many: Vec<Value> = (0..20_000).map(|id| json!([format!("{id:0>500}"), -1.0])).collect();
    let error = load(&unigram(json!(many))).expect_err("many long pieces").to_string();
    assert!(error.contains("more than 8388608 bytes"), "{error}");
    let longest = load(&unigram(json!([["<unk>", 0.0], ["a".repeat(512), -1.0]]))).expect("the longest piece");
    assert_eq!(longest.encode(&"a".repeat(1024), false).expect("two pieces"), [1, 1]);
    let error = gguf_error(|gguf| {
        gguf.model = "t5".into();
        gguf.scores = Some(vec![0.0; gguf.tokens.len()]);
        gguf.unknown_id = Some(0);
        gguf.tokens[40] = "a".repeat(200_000);
    });
    assert!(error.to_string().contains("200000 bytes"), "{error}");
}

/// Replacement rules that point outside of their bytes: refused, or an error of the text that meets them.
#[test]
fn damaged_replacement_rules_are_errors() {
    use base64::Engine as _;
    let with_rules = |bytes: &[u8]| {
        let mut json = valid_json();
        let text = base64::prelude::BASE64_STANDARD.encode(bytes);
        json["normalizer"] = json!({"type": "Sequence", "normalizers": [{"type": "Precompiled", "precompiled_charsmap": text}]});
        load(&json)
    };
    for bytes in [vec![1], vec![255; 8], [&[4, 0, 0, 0, 0, 0, 0, 0][..], &[b'x'; 65], &[0]].concat()] {
        let error = with_rules(&bytes).expect_err("damaged rules").to_string();
        assert!(error.contains("precompiled_charsmap"), "{error}");
    }
    // 'Z' alone leads outside, with a rule's end said to be there.
    let mut units = vec![0_u32; 256];
    units[usize::from(b'Z')] = 0x7fff_f900 | u32::from(b'Z');
    let bytes: Vec<u8> = 1024_u32.to_le_bytes().into_iter().chain(units.into_iter().flat_map(u32::to_le_bytes)).collect();
    let tokenizer = with_rules(&bytes).expect("nothing is wrong with it yet");
    tokenizer.encode("Hello", false).expect("a text that meets no rule");
    let error = tokenizer.encode("Za", false).expect_err("a rule outside").to_string();
    assert!(error.contains("damaged"), "{error}");
}

#[test]
fn side_files_are_checked_too() {
    let tokenizer_json = valid_json().to_string().into_bytes();
    let with = |set: fn(&mut HuggingFaceFiles, Vec<u8>), bytes: &str| {
        let mut files = HuggingFaceFiles { tokenizer_json: Some(tokenizer_json.clone()), ..HuggingFaceFiles::default() };
        set(&mut files, bytes.as_bytes().to_vec());
        ModelText::from_hugging_face(&files).expect_err(bytes).to_string()
    };
    let error = with(|files, bytes| files.tokenizer_config = Some(bytes), "[]");
    assert!(error.contains("tokenizer_config.json"), "{error}");
    let error = with(|files, bytes| files.tokenizer_config = Some(bytes), "{\"chat_template\": 3}");
    assert!(error.contains("chat_template"), "{error}");
    let error = with(|files, bytes| files.chat_template_json = Some(bytes), "{");
    assert!(error.contains("chat_template.json"), "{error}");
    let error = with(|files, bytes| files.generation_config = Some(bytes), "{\"eos_token_id\": [1, -2]}");
    assert!(error.contains("generation_config.json: eos_token_id"), "{error}");
    let moved = "{\"added_tokens_decoder\": {\"9000\": {\"content\": \"<new>\"}}}";
    let error = with(|files, bytes| files.tokenizer_config = Some(bytes), moved);
    assert!(error.contains("<new>") && error.contains("9000"), "{error}");
}

#[test]
fn a_folder_without_tokenizer_says_so() {
    let error = HuggingFaceFiles::read(&fixture_path("templates")).unwrap_err();
    assert!(error.to_string().contains("tokenizer.json"), "{error}");
    let error = HuggingFaceFiles::read(&fixture_path("no such folder")).unwrap_err();
    assert!(error.to_string().contains("missing"), "{error}");
}

/// The error of GGUF metadata with one change.
fn gguf_error(change: impl FnOnce(&mut GgufTokenizer)) -> TextError {
    let mut metadata = gguf_metadata("byte_level", "smollm");
    change(&mut metadata);
    Tokenizer::from_gguf(&metadata).expect_err("refused")
}

#[test]
fn unknown_gguf_kinds_are_refused_by_name_with_what_is_supported() {
    let error = gguf_error(|metadata| metadata.model = "rwkv".to_string()).to_string();
    assert!(error.contains("tokenizer.ggml.model") && error.contains("\"rwkv\"") && error.contains("gpt2"), "{error}");
    let error = gguf_error(|metadata| metadata.pre = "viking-2".to_string()).to_string();
    assert!(error.contains("tokenizer.ggml.pre") && error.contains("\"viking-2\"") && error.contains("smollm"), "{error}");
}

#[test]
fn gguf_metadata_that_does_not_fit_together_is_refused_by_field() {
    type Change = Box<dyn FnOnce(&mut GgufTokenizer)>;
    let cases: Vec<(&str, Change)> = vec![
        ("tokenizer.ggml.tokens", Box::new(|m| m.tokens.clear())),
        ("tokenizer.ggml.tokens", Box::new(|m| m.tokens[9] = m.tokens[8].clone())),
        ("tokenizer.ggml.token_type", Box::new(|m| m.token_types.truncate(3))),
        ("tokenizer.ggml.token_type", Box::new(|m| m.token_types[3] = 99)),
        ("tokenizer.ggml.merges", Box::new(|m| m.merges.clear())),
        ("tokenizer.ggml.merges", Box::new(|m| m.merges[0] = "no".to_string())),
        ("tokenizer.ggml.merges", Box::new(|m| m.merges[0] = "Ġ ".to_string())),
        ("tokenizer.ggml.merges", Box::new(|m| m.merges[0] = "! ~".to_string())),
        ("tokenizer.ggml.merges", Box::new(|m| m.merges[0] = "x".repeat(99) + " y")),
        ("tokenizer.ggml.bos_token_id", Box::new(|m| m.bos_id = Some(u32::MAX))),
        ("tokenizer.ggml.eos_token_id", Box::new(|m| m.eos_id = Some(9999))),
        ("tokenizer.ggml.add_space_prefix", Box::new(|m| m.add_space_prefix = Some(true))),
    ];
    for (field, change) in cases {
        let error = gguf_error(change).to_string();
        assert!(error.contains(field), "{field}: {error}");
    }
}

static VALID: LazyLock<Vec<u8>> = LazyLock::new(|| valid_json().to_string().into_bytes());

/// Every place of the file that a mutation can hit, as JSON pointers.
fn pointers(value: &Value, at: &str, found: &mut Vec<String>) {
    found.push(at.to_string());
    let escape = |key: &str| key.replace('~', "~0").replace('/', "~1");
    match value {
        Value::Object(fields) => {
            // A few of the vocabulary's hundreds of alike entries are enough.
            for (key, inner) in fields.iter().take(20) {
                pointers(inner, &format!("{at}/{}", escape(key)), found);
            }
        }
        Value::Array(items) => {
            for (index, inner) in items.iter().enumerate().take(5) {
                pointers(inner, &format!("{at}/{index}"), found);
            }
        }
        _ => {}
    }
}

fn any_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(json!(null)),
        Just(json!([])),
        Just(json!({})),
        Just(json!(true)),
        Just(json!("")),
        Just(json!(["a", "b"])),
        any::<i64>().prop_map(|number| json!(number)),
        (0u32..600).prop_map(|number| json!(number)),
        any::<f64>().prop_map(|number| json!(number)),
        "[a-zĠ<>|]{0,4}".prop_map(|text| json!(text)),
    ]
}

/// What loads must also work.
fn use_it(tokenizer: &Tokenizer) {
    let text = "Hello <|im_start|> wörld 123  \n";
    if let Ok(ids) = tokenizer.encode(text, true) {
        let _ = tokenizer.decode(&ids, true);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn a_file_cut_anywhere_is_an_error(at in any::<prop::sample::Index>()) {
        let bytes = &VALID[..at.index(VALID.len())];
        let error = load_bytes(bytes.to_vec()).unwrap_err();
        prop_assert!(error.to_string().contains("tokenizer.json"), "{}", error);
    }

    #[test]
    fn a_file_with_bytes_changed_never_panics(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut bytes = VALID.clone();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(tokenizer) = load_bytes(bytes) {
            use_it(&tokenizer);
        }
    }

    #[test]
    fn a_file_with_values_changed_never_panics(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any_value()), 1..4),
        which in 0usize..4,
    ) {
        let name = ["byte_level", "sentencepiece", "metaspace", "wordpiece"][which];
        let mut json = fixture(&format!("{name}/tokenizer.json"));
        for (at, value) in changes {
            let mut places = Vec::new();
            pointers(&json, "", &mut places);
            if let Some(place) = json.pointer_mut(&places[at.index(places.len())]) {
                *place = value;
            }
        }
        if let Ok(tokenizer) = load(&json) {
            use_it(&tokenizer);
        }
    }
}
