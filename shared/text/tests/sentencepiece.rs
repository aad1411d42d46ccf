//! SentencePiece vocabularies against sentencepiece, llama.cpp and transformers
//! (`tests/fixtures/text/sentencepiece.json`).

mod common;

use common::{corpus, fixture, fixture_path, ids};
use forge_text::{GgufTokenizer, HuggingFaceFiles, IncrementalDecoder, Tokenizer};
use serde_json::{Value, json};

const KINDS: [&str; 2] = ["bpe", "unigram"];

/// The model file as a folder's only tokenizer.
fn folder(kind: &str, config: &Value) -> Tokenizer {
    let files = HuggingFaceFiles {
        tokenizer_config: Some(config.to_string().into_bytes()),
        ..HuggingFaceFiles::read(&fixture_path(&format!("spm_{kind}"))).unwrap()
    };
    Tokenizer::from_hugging_face(&files).unwrap()
}

/// The same pieces as GGUF metadata, as `make_sentencepiece.py` hands them to llama.cpp.
fn gguf(kind: &str) -> Tokenizer {
    let model = fixture(&format!("spm_{kind}/gguf.json"));
    let list = |name: &str| serde_json::from_value(model[name].clone()).unwrap();
    Tokenizer::from_gguf(&GgufTokenizer {
        model: if kind == "bpe" { "llama" } else { "t5" }.to_owned(),
        pre: "default".to_owned(),
        tokens: serde_json::from_value(model["tokens"].clone()).unwrap(),
        token_types: serde_json::from_value(model["types"].clone()).unwrap(),
        scores: Some(serde_json::from_value(model["scores"].clone()).unwrap()),
        unknown_id: Some(0),
        bos_id: Some(1),
        eos_id: Some(2),
        add_space_prefix: Some(true),
        remove_extra_whitespaces: model["remove_extra_whitespaces"].as_bool(),
        precompiled_charsmap: Some(list("charsmap")),
        ..GgufTokenizer::default()
    })
    .unwrap()
}

/// A text and the ids that a reference gives for it.
fn pairs(expected: &Value) -> Vec<(String, Vec<u32>)> {
    corpus().into_iter().zip(expected.as_array().unwrap().iter().map(ids)).collect()
}

#[test]
fn model_files_encode_as_sentencepiece() {
    let golden = fixture("sentencepiece.json");
    let (mut compared, mut differing) = (0, 0);
    for kind in KINDS {
        let tokenizer = folder(kind, &json!({}));
        for (text, expected) in pairs(&golden[kind]["encode"]) {
            compared += 1;
            let encoded = tokenizer.encode_with_special_parsing(&text, false).unwrap();
            if encoded != expected {
                // sentencepiece adds scores up in f32, the library here in f64: where two ways to cut have the same
                // score, that decides. Both are best ways, so they have as many pieces as each other here.
                assert_eq!((kind, encoded.len()), ("unigram", expected.len()), "{text:?}");
                differing += 1;
            }
        }
    }
    assert!(compared > 150 && differing <= 3, "{differing} of {compared} differ");
}

#[test]
fn gguf_vocabularies_encode_as_llama_cpp() {
    let golden = fixture("sentencepiece.json");
    for kind in KINDS {
        let tokenizer = gguf(kind);
        for (text, expected) in corpus().iter().zip(golden[kind]["llama_cpp"].as_array().unwrap()) {
            assert_eq!(tokenizer.encode(text, false).unwrap(), ids(&expected["ids"]), "{kind}: {text:?}");
            assert_eq!(tokenizer.encode(text, true).unwrap(), ids(&expected["with_special"]), "{kind}: {text:?}");
            let plain = tokenizer.encode_with_special_parsing(text, false).unwrap();
            assert_eq!(plain, ids(&expected["without_parsing"]), "{kind}: {text:?}");
        }
    }
}

/// transformers brings a model file into its own form, in which a text that begins with a space gets no second one
/// and tokens made of spaces are never found. sentencepiece, which the model was trained with, does both, and so it
/// is done here.
#[test]
fn model_files_encode_as_transformers_but_for_spaces_at_the_start_and_tokens_of_spaces() {
    let golden = fixture("sentencepiece.json");
    let mut compared = 0;
    for (legacy, key) in [(true, "transformers_legacy"), (false, "transformers")] {
        let config = json!({
            "tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": true, "add_eos_token": false,
            "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        });
        let tokenizer = folder("bpe", &config);
        for (text, expected) in pairs(&golden["bpe"][key]) {
            if text.starts_with([' ', '▁']) || text.contains("    ") || text.contains("▁▁") {
                continue;
            }
            compared += 1;
            assert_eq!(tokenizer.encode(&text, true).unwrap(), expected, "{key}: {text:?}");
        }
    }
    assert!(compared > 140, "{compared} compared");
}

#[test]
fn ids_decode_as_in_sentencepiece_and_in_streams_too() {
    let golden = fixture("sentencepiece.json");
    for kind in KINDS {
        let tokenizer = folder(kind, &json!({}));
        let mut compared = 0;
        for expected in golden[kind]["decode"].as_array().unwrap() {
            let (sequence, text) = (ids(&expected["ids"]), expected["text"].as_str().unwrap());
            let decoded = tokenizer.decode(&sequence, true).unwrap();
            let mut decoder = IncrementalDecoder::new(tokenizer.clone(), true);
            let mut streamed: String = sequence.iter().map(|&id| decoder.push(id).unwrap()).collect();
            streamed += &decoder.flush();
            assert_eq!(streamed, decoded, "{kind}: {sequence:?}");
            // Bytes that are no text: sentencepiece replaces each of them, here each wrong sequence.
            if !text.contains('\u{fffd}') {
                compared += 1;
                assert_eq!(decoded, text, "{kind}: {sequence:?}");
            }
        }
        assert!(compared > 25, "{kind}: {compared} compared");
    }
}

#[test]
fn texts_survive_a_round_trip() {
    for (tokenizer, is_gguf) in [(folder("bpe", &json!({})), false), (gguf("bpe"), true)] {
        // llama.cpp puts a space behind every token that is found before cutting, and none before one.
        let changes = |text: &str| is_gguf && (text.contains("    ") || text.contains("<tool>"));
        for text in corpus().into_iter().filter(|text| !changes(text)) {
            // `▁` stands for a space in pieces, so it comes back as one.
            let encoded = tokenizer.encode_with_special_parsing(&text, false).unwrap();
            assert_eq!(tokenizer.decode(&encoded, false).unwrap(), text.replace('▁', " "));
        }
    }
}

#[test]
fn tokens_behind_the_model_come_from_the_small_files() {
    let config = json!({"added_tokens_decoder": {
        "600": {"content": "<|user|>", "special": true, "rstrip": true},
        "601": {"content": "<extra>", "special": false},
    }, "eos_token": "<|user|>"});
    let tokenizer = folder("bpe", &config);
    assert_eq!(tokenizer.vocab_size(), 602);
    assert_eq!(tokenizer.eos_ids(), [600]);
    assert!(tokenizer.is_special(600) && !tokenizer.is_special(601));
    let hello = tokenizer.encode("Hello", false).unwrap();
    assert_eq!(tokenizer.encode("Hello<|user|> \n<extra>", false).unwrap(), [hello.as_slice(), &[600, 601]].concat());
    assert_eq!(tokenizer.decode(&[600, 601], true).unwrap(), "<extra>");

    let error = |config: Value| {
        let files = HuggingFaceFiles {
            tokenizer_config: Some(config.to_string().into_bytes()),
            ..HuggingFaceFiles::read(&fixture_path("spm_bpe")).unwrap()
        };
        Tokenizer::from_hugging_face(&files).unwrap_err().to_string()
    };
    let hole = error(json!({"added_tokens_decoder": {"601": {"content": "<extra>"}}}));
    assert!(hole.contains("added_tokens_decoder") && hole.contains("601") && hole.contains("600"), "{hole}");
    let other = error(json!({"added_tokens_decoder": {"7": {"content": "<extra>"}}}));
    assert!(other.contains("id 7, which stands for"), "{other}");
    let huge = error(json!({"added_tokens_decoder": {"99999999999": {"content": "<extra>"}}}));
    assert!(huge.contains("highest id"), "{huge}");
}

/// The way of old conversions: ids in one file, what is special in another.
#[test]
fn added_tokens_json_and_the_map_of_special_tokens_work_together() {
    let files = HuggingFaceFiles {
        added_tokens_json: Some(br#"{"<|end|>": 601, "<plain>": 600}"#.to_vec()),
        special_tokens_map: Some(br#"{"additional_special_tokens": ["<|end|>"], "eos_token": {"content": "</s>"}}"#.to_vec()),
        ..HuggingFaceFiles::read(&fixture_path("spm_bpe")).unwrap()
    };
    let tokenizer = Tokenizer::from_hugging_face(&files).unwrap();
    assert_eq!(tokenizer.encode("<|end|><plain>", false).unwrap(), [601, 600]);
    assert_eq!(tokenizer.encode_with_special_parsing("<plain>", false).unwrap(), [600]);
    assert!(tokenizer.is_special(601) && !tokenizer.is_special(600));
    assert_eq!(tokenizer.eos_ids(), [2]);
}

/// Special tokens of Phi-3 take the spaces behind them; GGUF does not say so, its name does.
#[test]
fn special_tokens_of_phi_3_take_the_spaces_behind_them() {
    let model = fixture("spm_bpe/gguf.json");
    let metadata = GgufTokenizer {
        name: Some("Phi-3 Mini".to_owned()),
        model: "llama".to_owned(),
        tokens: serde_json::from_value(model["tokens"].clone()).unwrap(),
        token_types: serde_json::from_value(model["types"].clone()).unwrap(),
        scores: Some(serde_json::from_value(model["scores"].clone()).unwrap()),
        ..GgufTokenizer::default()
    };
    let phi = Tokenizer::from_gguf(&metadata).unwrap();
    let other = Tokenizer::from_gguf(&GgufTokenizer { name: Some("Llama".to_owned()), ..metadata }).unwrap();
    assert_eq!(phi.encode("</s> \na", false).unwrap(), phi.encode("</s>a", false).unwrap());
    assert_ne!(other.encode("</s> \na", false).unwrap(), other.encode("</s>a", false).unwrap());
    assert_ne!(phi.encode("<s> \na", false).unwrap(), phi.encode("<s>a", false).unwrap());
}

/// A megabyte without a cut. That merging does not grow faster than the text is counted beside it.
#[test]
fn a_very_long_word_is_encoded() {
    for tokenizer in [gguf("bpe"), gguf("unigram")] {
        for unit in ["a", "ab", "é", " x", "<s", "的"] {
            let text = unit.repeat((1 << 20) / unit.len());
            assert!(!tokenizer.encode(&text, false).unwrap().is_empty());
        }
    }
}
