//! `eval` and `bench model` with tiny models, from outside; figures against transformers' and lm-eval's, recorded in
//! tests/fixtures/eval.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/eval").join(name)
}

fn forgectl(home: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_forgectl"));
    command.env_clear().env("FORGE_HOME", home).env("HOME", home).env("FORGE_OFFLINE", "1").env("FORGE_THREADS", "1");
    command.args(arguments).stdin(Stdio::null()).output().expect("the program starts")
}

fn json(arguments: &[&str]) -> Value {
    let home = tempfile::tempdir().expect("a temporary folder");
    let output = forgectl(home.path(), &[arguments, &["-o", "json"]].concat());
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn fails(code: i32, arguments: &[&str], expected: &[&str]) {
    let home = tempfile::tempdir().expect("a temporary folder");
    let output = forgectl(home.path(), arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
    for part in expected {
        assert!(stderr.contains(part), "{part:?} is not in: {stderr}");
    }
}

fn golden() -> Value {
    let text = std::fs::read_to_string(fixture("golden.json")).expect("the golden file is committed");
    serde_json::from_str(&text).expect("JSON")
}

fn close(found: &Value, expected: &Value, relative: f64, what: &str) {
    let (found, expected) = (found.as_f64().expect(what), expected.as_f64().expect(what));
    assert!((found - expected).abs() <= relative * expected.abs().max(1e-9), "{what}: {found} instead of {expected}");
}

#[test]
fn perplexity_is_that_of_transformers_under_every_protocol() {
    let golden = golden();
    let (model, text) = (fixture("model"), fixture("text.txt"));
    let (model, text) = (model.to_str().expect("UTF-8"), text.to_str().expect("UTF-8"));
    for protocol in ["chunked", "sliding", "rolling"] {
        let mut arguments = vec!["eval", "perplexity", model, text, "--protocol", protocol, "--context", "48"];
        if protocol == "sliding" {
            arguments.extend(["--stride", "20"]);
        }
        let expected = &golden[protocol];
        let exact = json(&[&arguments[..], &["--kv-cache-dtype", "f32"]].concat());
        assert_eq!(exact["tokens"], expected["tokens"], "{protocol}");
        assert_eq!(exact["protocol"]["name"], protocol);
        close(&exact["nllPerToken"], &expected["nllPerToken"], 1e-5, protocol);
        close(&exact["perplexity"]["value"], &expected["perplexity"], 1e-4, protocol);
        if let Some(error) = expected.get("standardError") {
            close(&exact["perplexity"]["standardError"], error, 1e-3, protocol);
        }
        // With the types that are served by default it is within a thousandth.
        close(&json(&arguments)["perplexity"]["value"], &expected["perplexity"], 1e-3, protocol);
        if protocol == "rolling" {
            assert_eq!(exact["words"], expected["words"]);
            for key in ["bitsPerByte", "bytePerplexity"] {
                close(&exact[key], &expected[key], 1e-4, key);
            }
            close(&exact["wordPerplexity"], &expected["wordPerplexity"], 1e-3, "per word");
        }
    }
}

#[test]
fn divergence_is_that_of_its_definition() {
    let expected = &golden()["divergence"];
    let [base, model, text] = ["model", "rounded", "text.txt"].map(|name| fixture(name).display().to_string());
    let arguments = ["eval", "kld", &base, &model, &text, "--context", "48", "--kv-cache-dtype", "f32"];
    let found = json(&arguments);
    assert_eq!((&found["tokens"], found["protocol"]["prefixToken"].as_u64()), (&expected["tokens"], Some(1)));
    for (key, golden) in
        [("meanKld", "meanKld"), ("rmsDeltaP", "rmsDeltaP"), ("sameTop", "sameTop"), ("deltaPerplexity", "deltaPerplexity")]
    {
        close(&found[key]["value"], &expected[golden], 2e-3, key);
    }
    for key in ["medianKld", "p99Kld", "maxKld"] {
        close(&found[key], &expected[key], 5e-3, key);
    }
    close(&found["meanKld"]["standardError"], &expected["meanKldError"], 5e-3, "error of the mean");
    close(&found["deltaPerplexity"]["standardError"], &expected["deltaPerplexityError"], 5e-3, "error of the difference");
    // A model against itself, and against itself with smaller keys and values.
    let same = json(&["eval", "kld", &base, &base, &text, "--context", "48"]);
    assert_eq!(same["maxKld"].as_f64(), Some(0.0));
    let smaller =
        json(&["eval", "kld", &base, &base, &text, "--context", "48", "--kv-cache-dtype", "bf16", "--base-kv-cache-dtype", "f32"]);
    assert!(smaller["meanKld"]["value"].as_f64().is_some_and(|kld| kld > 0.0), "{smaller}");
}

#[test]
fn a_table_states_the_protocol_and_a_pipe_gets_no_bar() {
    let home = tempfile::tempdir().expect("a temporary folder");
    let [model, text] = ["model", "text.txt"].map(|name| fixture(name).display().to_string());
    let output = forgectl(home.path(), &["eval", "perplexity", &model, &text, "--context", "32", "--chunks", "3", "--max-tokens", "200"]);
    let stdout = String::from_utf8_lossy(&output.stdout);
    for part in
        ["chunked (as llama.cpp)", "chunks of 32 tokens", "token 1 first", "perplexity", " ± ", "45 tokens in 3 windows", "bits per byte"]
    {
        assert!(stdout.contains(part), "{part:?} is not in: {stdout}");
    }
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    // Without a text of one's own there is one built in.
    let built_in = json(&["eval", "kld", &model, &model, "--context", "64", "--chunks", "2"]);
    assert_eq!((built_in["text"].as_str(), built_in["windows"].as_u64()), (Some("built in"), Some(2)));
}

#[test]
fn what_cannot_be_measured_is_refused_with_the_reason() {
    let [model, text] = ["model", "text.txt"].map(|name| fixture(name).display().to_string());
    let perplexity =
        |rest: &[&'static str]| [&["eval", "perplexity", &model, &text], rest].concat().into_iter().map(str::to_owned).collect::<Vec<_>>();
    let refused = |arguments: Vec<String>, expected: &[&str]| fails(2, &arguments.iter().map(String::as_str).collect::<Vec<_>>(), expected);
    refused(perplexity(&["--context", "65"]), &["--context is 65", "64 tokens"]);
    refused(perplexity(&["--stride", "5"]), &["--stride", "sliding"]);
    refused(perplexity(&["--protocol", "sliding", "--context", "20", "--stride", "21"]), &["stride is 21", "context of 20"]);
    refused(perplexity(&["--max-tokens", "30"]), &["has 30 tokens, and 64 are needed", "longer text", "help: --context 30"]);
    refused(perplexity(&["--max-tokens", "3"]), &["has 3 tokens", "longer text"]);
    refused(perplexity(&["--chunks", "0"]), &["nothing to compute"]);
    refused(perplexity(&["--protocol", "perfect"]), &["chunked", "sliding", "rolling"]);
    fails(2, &["eval", "perplexity", &model, "absent.txt"], &["cannot read absent.txt", "help:"]);
    fails(2, &["eval", "perplexity", &model, &format!("{model}/model.safetensors")], &["UTF-8"]);
    fails(2, &["bench", "model", &model, "--prefill", "60", "--decode", "10"], &["context of 64"]);
}

#[test]
fn models_of_other_tokenizers_are_not_compared() {
    let home = tempfile::tempdir().expect("a temporary folder");
    let other = home.path().join("other");
    std::fs::create_dir(&other).expect("writable");
    for file in ["config.json", "model.safetensors", "tokenizer_config.json"] {
        std::fs::copy(fixture("model").join(file), other.join(file)).expect("the fixture is there");
    }
    let tokenizer = std::fs::read_to_string(fixture("model/tokenizer.json")).expect("the fixture is there");
    std::fs::write(other.join("tokenizer.json"), tokenizer.replace("\"a\": ", "\"\u{e9}\": ")).expect("writable");
    let [base, text] = ["model", "text.txt"].map(|name| fixture(name).display().to_string());
    fails(2, &["eval", "kld", &base, other.to_str().expect("UTF-8"), &text], &["cannot be compared", "is \"a\" in A", "help:"]);
}

#[test]
fn a_model_is_measured_beside_the_machine() {
    let model = fixture("model").display().to_string();
    let found = json(&["bench", "model", &model, "--prefill", "32", "--decode", "8", "--batch", "4", "--rounds", "3"]);
    for (group, key) in
        [("load", "totalS"), ("prefillTokensPerS", "median"), ("decodeTokensPerS", "median"), ("batchDecodeTokensPerS", "best")]
    {
        assert!(found[group][key].as_f64().is_some_and(|value| value > 0.0), "{group}.{key}: {found}");
    }
    assert_eq!((found["threads"].as_u64(), found["decodeTokensPerS"]["rounds"].as_array().map(Vec::len)), (Some(1), Some(3)));
    assert!(found["machine"]["readBytesPerS"].as_f64() > Some(1e8) && found["machine"]["f32Flops"].as_f64() > Some(1e8));
    assert!(found["memory"]["weightsBytes"].as_u64() >= Some(90_000) && found["memory"]["residentBytes"].as_u64() > Some(0));
    assert!(found["shares"]["decodeOfBandwidth"].as_f64() > Some(0.0));
}

#[test]
fn a_divided_model_is_measured_with_the_same_numerics() {
    let model = fixture("model").display().to_string();
    let sizes = ["--prefill", "16", "--decode", "4", "--batch", "5", "--rounds", "1"];
    let whole = json(&[&["bench", "model", &model][..], &sizes].concat());
    let layout = ["--layout-tensor", "2", "--layout-pipeline", "2"];
    let divided = json(&[&["bench", "model", &model][..], &sizes, &layout].concat());
    assert_eq!(divided["numericsId"], whole["numericsId"]);
    assert_eq!(divided["layout"], serde_json::json!({"tensor": 2, "pipeline": 2, "expert": 1}));
    assert_eq!(divided["threads"].as_u64(), Some(4), "each rank has the one that was asked for");
    assert!(divided["batchDecodeTokensPerS"]["best"].as_f64() > Some(0.0));
    fails(2, &[&["bench", "model", &model, "--layout-expert", "2"][..], &sizes].concat(), &["no experts"]);
}
