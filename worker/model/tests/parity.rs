//! Logits against transformers (float32, eager) on the tiny checkpoints of tests/fixtures/model.
//!
//! Dense checkpoints: 1e-4 of the largest reference value (both sides sum in f32, in different orders). Quantized
//! ones: see [`Row::check_rounded_logits`].

mod common;

use common::rows::Row;
use common::{Golden, alone, chunked, decoder, fixture, options, relative_difference, run, together};
use forge_model::{LoadMode, Model};

const DENSE: f32 = 1e-4;
/// These files have three layers, and longer sequences than those of quantized/: a value on the edge between two roundings moves
/// all that follows it. Measured: 37 of 71 rows of llama-q4_1.
const MOST_ROWS_PERCENT: usize = 50;

/// Prefill, decode, ragged batch and chunks of one model against its golden logits.
fn check(path: std::path::PathBuf, golden: &str, tolerance: f32) {
    let golden = Golden::read(golden);
    let mut decoder = decoder(path.clone(), &options());
    let schedules = [
        ("prefill", alone(&golden.tokens)),
        ("token by token", chunked(&golden.tokens, 1)),
        ("ragged batch", together(&golden.tokens)),
        ("chunks of 7", chunked(&golden.tokens, 7)),
    ];
    for (what, schedule) in schedules {
        let logits = run(&mut decoder, &golden.tokens, &schedule);
        for (sequence, (actual, reference)) in logits.iter().zip(&golden.logits).enumerate() {
            let difference = relative_difference(actual, reference);
            println!("{}: {what}: sequence {sequence}: {difference:.2e}", path.display());
            assert!(difference <= tolerance, "{}: {what}: sequence {sequence}: {difference:e}", path.display());
        }
    }
}

#[test]
fn llama() {
    check(fixture("llama"), "llama/golden.safetensors", DENSE);
}

#[test]
fn llama_with_all_biases_tied_in_bf16() {
    check(fixture("llama-biased"), "llama-biased/golden.safetensors", DENSE);
}

#[test]
fn llama_of_odd_sizes() {
    check(fixture("llama-odd"), "llama-odd/golden.safetensors", DENSE);
}

#[test]
fn qwen2_with_sliding_windows_in_bf16() {
    check(fixture("qwen2"), "qwen2/golden.safetensors", DENSE);
}

#[test]
fn the_text_part_of_a_gemma3_that_takes_images() {
    check(fixture("gemma3-images"), "gemma3-images/golden.safetensors", DENSE);
}

#[test]
fn gpt2_in_f16() {
    check(fixture("gpt2"), "gpt2/golden.safetensors", DENSE);
}

/// The llama weights under another config.json.
fn llama_with_config(config: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(fixture("llama/model.safetensors"), folder.path().join("model.safetensors")).unwrap();
    std::fs::write(folder.path().join("config.json"), config).unwrap();
    folder
}

#[test]
fn rope_scalings() {
    for name in ["linear", "llama3", "yarn"] {
        let config = std::fs::read_to_string(fixture(&format!("llama/{name}.config.json"))).unwrap();
        let folder = llama_with_config(&config);
        check(folder.path().to_owned(), &format!("llama/{name}.golden.safetensors"), DENSE);
    }
}

#[test]
fn rope_scaling_in_the_spelling_of_transformers_4() {
    let config = std::fs::read_to_string(fixture("llama/llama3.config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    let object = config.as_object_mut().unwrap();
    let mut rope = object.remove("rope_parameters").unwrap();
    let theta = rope.as_object_mut().unwrap().remove("rope_theta").unwrap();
    object.insert("rope_theta".to_owned(), theta);
    object.insert("rope_scaling".to_owned(), rope);
    object.insert("torch_dtype".to_owned(), "float32".into());
    object.remove("dtype");
    let folder = llama_with_config(&config.to_string());
    check(folder.path().to_owned(), "llama/llama3.golden.safetensors", DENSE);
}

#[test]
fn gguf_dense() {
    for name in ["llama-f32", "llama-f16", "llama-bf16-ropefreqs"] {
        check(fixture(&format!("gguf/{name}.gguf")), &format!("gguf/{name}.golden.safetensors"), DENSE);
    }
}

#[test]
fn gguf_quantized() {
    for name in ["llama-q8_0", "llama-q4_0", "llama-q4_1", "qwen2-q8_0", "gpt2-q4_1"] {
        let (model, golden) = (format!("gguf/{name}.gguf"), format!("gguf/{name}.golden.safetensors"));
        Row { model, golden }.check_rounded_rows(MOST_ROWS_PERCENT);
    }
}

#[test]
fn gguf_and_folder_of_the_same_weights_agree() {
    let golden = Golden::read("llama/golden.safetensors");
    let schedule = together(&golden.tokens);
    let folder = run(&mut decoder(fixture("llama"), &options()), &golden.tokens, &schedule);
    let gguf = run(&mut decoder(fixture("gguf/llama-f32.gguf"), &options()), &golden.tokens, &schedule);
    for (gguf, folder) in gguf.iter().zip(&folder) {
        // Pairs of a head's values are permuted in the file, so scores are summed in another order.
        assert!(relative_difference(gguf, folder) <= 1e-5);
    }
}

#[test]
fn eager_and_sharded_and_unprefixed_files_give_the_same_bits() {
    let golden = Golden::read("llama/golden.safetensors");
    let schedule = together(&golden.tokens);
    let expected = run(&mut decoder(fixture("llama"), &options()), &golden.tokens, &schedule);

    let eager = Model::open(fixture("llama"), LoadMode::Eager).unwrap();
    let mut eager = eager.decoder(common::backend(), &options()).unwrap();
    common::assert_same_bits(&run(&mut eager, &golden.tokens, &schedule), &expected, "eager");

    let bytes = std::fs::read(fixture("llama/model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    for prefixed in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        std::fs::copy(fixture("llama/config.json"), folder.path().join("config.json")).unwrap();
        let mut map = serde_json::Map::new();
        for shard in 0..2 {
            let name = |tensor: &str| if prefixed { tensor.to_owned() } else { tensor.trim_start_matches("model.").to_owned() };
            let part: Vec<_> =
                file.tensors().into_iter().enumerate().filter(|(i, _)| i % 2 == shard).map(|(_, (n, view))| (name(&n), view)).collect();
            let file_name = format!("model-{:05}-of-00002.safetensors", shard + 1);
            part.iter().for_each(|(tensor, _)| {
                map.insert(tensor.clone(), file_name.clone().into());
            });
            safetensors::serialize_to_file(part, None, &folder.path().join(file_name)).unwrap();
        }
        let index = serde_json::json!({ "metadata": {}, "weight_map": map });
        std::fs::write(folder.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
        let logits = run(&mut decoder(folder.path(), &options()), &golden.tokens, &schedule);
        common::assert_same_bits(&logits, &expected, "two files");
    }
}
