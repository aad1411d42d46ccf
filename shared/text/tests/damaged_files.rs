//! Damaged SentencePiece models, GGUF vocabularies of SentencePiece, and vocab.json with merges.txt: typed errors that
//! name file and field, never a panic, never memory in proportion to a lie.

mod common;

use std::sync::LazyLock;

use common::{corpus, fixture, fixture_path, ids};
use forge_text::{GgufTokenizer, HuggingFaceFiles, TextError, Tokenizer};
use proptest::prelude::*;
use serde_json::{Value, json};

static MODELS: LazyLock<[Vec<u8>; 2]> =
    LazyLock::new(|| ["spm_bpe", "spm_unigram"].map(|name| std::fs::read(fixture_path(&format!("{name}/tokenizer.model"))).unwrap()));

fn load_model(bytes: &[u8]) -> Result<Tokenizer, TextError> {
    Tokenizer::from_hugging_face(&HuggingFaceFiles { tokenizer_model: Some(bytes.to_vec()), ..HuggingFaceFiles::default() })
}

fn model_error(bytes: &[u8]) -> String {
    let error = load_model(bytes).unwrap_err();
    assert!(!error.is_request_error());
    error.to_string()
}

/// A protobuf field that holds bytes.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![number << 3 | 2];
    let mut length = bytes.len();
    while length > 127 {
        out.push(length as u8 & 127 | 128);
        length >>= 7;
    }
    out.push(length as u8);
    [&out, bytes].concat()
}

/// A piece: its text, score and type.
fn piece(text: &[u8], score: f32, kind: u8) -> Vec<u8> {
    field(1, &[field(1, text), vec![2 << 3 | 5], score.to_le_bytes().to_vec(), vec![3 << 3, kind]].concat())
}

/// A BPE model of these pieces behind the usual three.
fn model(pieces: &[Vec<u8>]) -> Vec<u8> {
    let usual = [piece(b"<unk>", 0.0, 2), piece(b"<s>", 0.0, 3), piece(b"</s>", 0.0, 3)];
    [usual.concat(), pieces.concat(), field(2, &[3 << 3, 2])].concat()
}

#[test]
fn what_is_wrong_with_a_model_file_is_named() {
    assert!(load_model(&model(&[piece(b"a", -1.0, 1)])).is_ok());
    for (bytes, expected) in [
        (Vec::new(), "tokenizer.model: pieces: there are none"),
        (b"{\"model\": 1}".to_vec(), "it is no SentencePiece model"),
        (model(&[piece(b"a", f32::NAN, 1)]), "scores: token 3 \"a\" has the score NaN"),
        (model(&[piece(b"a", f32::INFINITY, 1)]), "has the score inf"),
        (model(&[piece(b"a", 0.0, 1), piece(b"a", 0.0, 1)]), "\"a\" is both token 3 and token 4"),
        (model(&[piece(b"\xff\xfe", 0.0, 1)]), "UTF-8"),
        (model(&[piece(b"a", 0.0, 9)]), "piece 3 has type 9"),
        (model(&[piece(b"0x41", 0.0, 6)]), "token 3 is a byte but is called \"0x41\""),
        ([model(&[]), field(2, &[3 << 3, 4])].concat(), "model_type \"4\" is not supported"),
        ([model(&[]), field(2, &[40 << 3 & 127 | 128, 2, 99])].concat(), "unk_id: 99 is outside the vocabulary of 3"),
        ([model(&[]), field(3, &field(2, &[9; 7]))].concat(), "precompiled_charsmap"),
        ([model(&[]), field(3, &[5 << 3, 0])].concat(), "escape_whitespaces"),
        // A piece that is said to be longer than the file.
        (vec![1 << 3 | 2, 255, 255, 255, 255, 7, 1], "it is no SentencePiece model"),
    ] {
        let error = model_error(&bytes);
        assert!(error.contains("tokenizer.model") && error.contains(expected), "{expected}: {error}");
    }
}

#[test]
fn unused_pieces_are_for_merging_only() {
    let merged = model(&[piece(b"a", -1.0, 1), piece(b"b", -1.0, 1), piece(b"ab", -0.5, 5)]);
    let tokenizer = load_model(&[merged.clone(), field(3, &[3 << 3, 0])].concat()).unwrap();
    assert_eq!(tokenizer.encode("ab", false).unwrap(), [3, 4]);
    let error = model_error(&[merged, field(2, &[3 << 3, 1])].concat());
    assert!(error.contains("unused pieces are not supported with unigram"), "{error}");
}

fn gguf() -> GgufTokenizer {
    let model = fixture("spm_unigram/gguf.json");
    let read = |name: &str| model[name].clone();
    GgufTokenizer {
        model: "llama".to_owned(),
        tokens: serde_json::from_value(read("tokens")).unwrap(),
        token_types: serde_json::from_value(read("types")).unwrap(),
        scores: serde_json::from_value(read("scores")).unwrap(),
        precompiled_charsmap: serde_json::from_value(read("charsmap")).unwrap(),
        ..GgufTokenizer::default()
    }
}

#[test]
fn what_is_wrong_with_gguf_metadata_is_named() {
    type Change = fn(&mut GgufTokenizer);
    let cases: [(Change, &str); 8] = [
        (|m| m.scores = None, "tokenizer.ggml.scores: 0 scores for 460 tokens"),
        (|m| m.scores.as_mut().unwrap().truncate(4), "tokenizer.ggml.scores: 4 scores"),
        (|m| m.scores.as_mut().unwrap()[7] = f32::NAN, "tokenizer.ggml: scores: token 7"),
        (|m| m.tokens[9] = m.tokens[8].clone(), "is both token 8 and token 9"),
        (|m| m.token_types.truncate(4), "tokenizer.ggml.token_type: 4 types"),
        (|m| m.token_types[9] = 6, "is a byte but is called"),
        (|m| m.eos_id = Some(460), "tokenizer.ggml.eos_token_id: 460 is outside"),
        (|m| m.precompiled_charsmap = Some(vec![255; 64]), "precompiled_charsmap"),
    ];
    for kind in ["llama", "t5"] {
        let valid = GgufTokenizer { model: kind.to_owned(), ..gguf() };
        assert!(Tokenizer::from_gguf(&valid).is_ok());
        for (change, expected) in cases {
            let mut damaged = valid.clone();
            change(&mut damaged);
            let error = Tokenizer::from_gguf(&damaged).unwrap_err().to_string();
            assert!(error.contains(expected), "{kind}: {expected}: {error}");
        }
    }
}

/// The tiny vocabulary as vocab.json and merges.txt.
fn vocab_and_merges(config: &Value) -> HuggingFaceFiles {
    let json = fixture("unsplit/tokenizer.json");
    let part = |merge: &Value, side: usize| merge[side].as_str().unwrap().to_owned();
    let merges: Vec<String> =
        json["model"]["merges"].as_array().unwrap().iter().map(|merge| format!("{} {}", part(merge, 0), part(merge, 1))).collect();
    HuggingFaceFiles {
        vocab_json: Some(json["model"]["vocab"].to_string().into_bytes()),
        merges_txt: Some(format!("#version: 0.2\n{}\n", merges.join("\n")).into_bytes()),
        tokenizer_config: Some(config.to_string().into_bytes()),
        ..HuggingFaceFiles::default()
    }
}

#[test]
fn vocab_json_with_merges_txt_encodes_as_transformers() {
    for (class, expected) in fixture("vocab_merges.json").as_object().unwrap() {
        let tokenizer = Tokenizer::from_hugging_face(&vocab_and_merges(&expected["config"])).unwrap();
        for (text, expected) in corpus().iter().zip(expected["ids"].as_array().unwrap()) {
            assert_eq!(tokenizer.encode(text, true).unwrap(), ids(expected), "{class}: {text:?}");
        }
    }
}

#[test]
fn what_is_wrong_with_vocab_json_or_merges_txt_is_named() {
    let error = |change: fn(&mut HuggingFaceFiles)| {
        let mut files = vocab_and_merges(&json!({}));
        change(&mut files);
        Tokenizer::from_hugging_face(&files).unwrap_err().to_string()
    };
    assert!(error(|files| files.vocab_json = Some(b"[1]".to_vec())).contains("vocab.json"));
    assert!(error(|files| files.vocab_json = Some(b"{\"a\": 4000000000}".to_vec())).contains("highest id"));
    assert!(error(|files| files.merges_txt = Some(vec![0xff])).contains("merges.txt"));
    assert!(error(|files| files.merges_txt = Some(b"no such".to_vec())).contains("merge 0"));
    assert!(error(|files| files.merges_txt = None).contains("merges.txt"));
    let added = error(|files| files.added_tokens_json = Some(b"{\"<far>\": 90000}".to_vec()));
    assert!(added.contains("<far>") && added.contains("90000"), "{added}");
    let class = error(|files| files.tokenizer_config = Some(b"{\"tokenizer_class\": \"XLMTokenizer\"}".to_vec()));
    assert!(class.contains("XLMTokenizer") && class.contains("GPT2Tokenizer"), "{class}");
}

/// What loads must also work, and give only ids that it knows.
fn use_it(tokenizer: &Tokenizer) {
    for text in ["Hello wörld ﬁ…\u{a0}123  \n<s><tool>", "\u{0}\u{10ffff}▁▁"] {
        let ids = tokenizer.encode(text, true).unwrap();
        assert!(ids.iter().all(|&id| tokenizer.is_known(id)));
        tokenizer.decode(&ids, false).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn a_model_file_cut_anywhere_never_panics(which in 0usize..2, at in any::<prop::sample::Index>()) {
        let bytes = &MODELS[which];
        // Cut between two fields it is a smaller model; with the trainer's part lost, it is a unigram one.
        if let Ok(tokenizer) = load_model(&bytes[..at.index(bytes.len())]) {
            use_it(&tokenizer);
        }
    }

    #[test]
    fn a_model_file_with_bytes_changed_never_panics(
        which in 0usize..2,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut bytes = MODELS[which].clone();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(tokenizer) = load_model(&bytes) {
            use_it(&tokenizer);
        }
    }

    #[test]
    fn replacement_rules_with_bytes_changed_never_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut metadata = gguf();
        let bytes = metadata.precompiled_charsmap.as_mut().unwrap();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(tokenizer) = Tokenizer::from_gguf(&metadata) {
            use_it(&tokenizer);
        }
    }
}
