//! Folders and configurations: what is missing, what is something else, what is another model's.

use std::path::Path;

use forge_model::{LoadMode, Model, ModelError};

use super::common::fixture;

/// A Hugging Face folder with the given config and the llama fixture's tensors, changed.
pub fn folder_with(config: &str, weights: &[u8]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config).unwrap();
    std::fs::write(folder.path().join("model.safetensors"), weights).unwrap();
    folder
}

pub fn llama_config() -> String {
    std::fs::read_to_string(fixture("llama/config.json")).unwrap()
}

pub fn llama_weights() -> Vec<u8> {
    std::fs::read(fixture("llama/model.safetensors")).unwrap()
}

pub fn open_folder(config: &str, weights: &[u8]) -> Result<Model, ModelError> {
    Model::open(folder_with(config, weights).path(), LoadMode::Eager)
}

#[test]
fn folders_that_are_no_models_say_what_is_missing() {
    let reason = |path: &Path| Model::open(path, LoadMode::Mmap).unwrap_err().to_string();
    assert!(reason(Path::new("/no/such/model")).contains("cannot read /no/such/model"));
    assert!(reason(&fixture("llama/config.json")).contains("JSON document"));
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    assert!(reason(folder.path()).contains("neither config.json nor a GGUF file"));
    std::fs::write(at("empty.gguf"), b"").unwrap();
    assert!(reason(&at("empty.gguf")).contains("empty"));
    std::fs::write(at("pickle.bin"), b"PK\x03\x04xxxxxxx").unwrap();
    assert!(reason(&at("pickle.bin")).contains("zip archive has no end"));
    assert!(reason(folder.path()).contains("pickle.bin has weights, but config.json is missing"));
    std::fs::write(at("config.json"), llama_config()).unwrap();
    assert!(reason(folder.path()).contains("pickle.bin may hold its weights"));
    std::fs::remove_file(at("pickle.bin")).unwrap();
    std::fs::remove_file(at("empty.gguf")).unwrap();
    assert!(reason(folder.path()).contains("config.json but no weights"));
    for (name, start, expected) in [
        ("tf_model.h5", &b"\x89HDF\r\n\x1a\n"[..], "from_tf=True"),
        ("flax_model.msgpack", b"\x81\xa6params\x82", "from_flax=True"),
        ("model.onnx", b"\x08\x08\x12\x07pytorch", "ONNX"),
        ("ggml-model.bin", b"tjgg\x03\0\0\0", "convert_hf_to_gguf.py"),
        ("pytorch_model.bin", b"version https://git-lfs", "git lfs pull"),
        ("weights.gguf", b"GGUF\x03\0\0\0", "give that file"),
    ] {
        std::fs::write(at(name), start).unwrap();
        let text = reason(folder.path());
        assert!(text.contains(name) && text.contains(expected), "{name}: {text}");
        std::fs::remove_file(at(name)).unwrap();
    }
    std::fs::write(at("a.safetensors"), llama_weights()).unwrap();
    let config = std::fs::read(at("config.json")).unwrap();
    std::fs::remove_file(at("config.json")).unwrap();
    let text = reason(folder.path());
    assert!(text.contains("a.safetensors") && text.contains("config.json") && text.contains("llama ("), "{text}");
    std::fs::write(at("config.json"), "{}").unwrap();
    let text = Model::open(folder.path(), LoadMode::Mmap).unwrap_err().to_string();
    assert!(text.contains("model_type") && text.contains("llama (") && text.contains("--arch"), "{text}");
    std::fs::write(at("config.json"), config).unwrap();
    assert!(Model::open(folder.path(), LoadMode::Mmap).is_ok());
    std::fs::write(at("b.safetensors"), llama_weights()).unwrap();
    assert!(reason(folder.path()).contains("2 safetensors files"));
    for (index, expected) in [
        ("{}", "weight_map is missing"),
        (r#"{"weight_map": {}}"#, "weight_map is empty"),
        (r#"{"weight_map": {"a": 3}}"#, "no string"),
        (r#"{"weight_map": {"a": "../a.safetensors"}}"#, "no plain file name"),
        (r#"{"weight_map": {"a": "/etc/passwd"}}"#, "no plain file name"),
        (r#"{"weight_map": {"a": ".."}}"#, "no plain file name"),
        (r#"{"weight_map": {"a": ""}}"#, "no plain file name"),
        (r#"{"weight_map": {"a": "C:\\a.safetensors"}}"#, "no plain file name"),
        (r#"{"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}"#, "more than one of its files"),
        (r#"{"weight_map": {"a": "c.safetensors"}}"#, "c.safetensors, which model.safetensors.index.json names, is missing"),
        (r#"{"weight_map": {"a": "a.safetensors"}}"#, "tensor \"a\" should be in a.safetensors and is not"),
        (r#"{"weight_map": {"a": "config.json"}}"#, "config.json is not a model"),
        ("not json", "invalid model.safetensors.index.json"),
    ] {
        std::fs::write(at("model.safetensors.index.json"), index).unwrap();
        let text = reason(folder.path());
        assert!(text.contains(expected), "{index}: {text}");
    }
}

#[test]
fn a_config_of_another_model_is_refused_by_shape_or_name() {
    let config = |key: &str, value: serde_json::Value| {
        let mut config: serde_json::Value = serde_json::from_str(&llama_config()).unwrap();
        config[key] = value;
        open_folder(&config.to_string(), &llama_weights()).unwrap_err().to_string()
    };
    assert!(config("vocab_size", 97.into()).contains("model.embed_tokens.weight has shape [96, 32], the configuration needs [97, 32]"));
    assert!(config("num_hidden_layers", 2.into()).contains("does not use: model.layers.2."));
    assert!(config("num_key_value_heads", 4.into()).contains("k_proj.weight has shape"));
    assert!(config("attention_bias", true.into()).contains("lacks model.layers.0.self_attn.q_proj.bias"));
    // A tied head's own copy is not needed and not an error.
    let mut tied: serde_json::Value = serde_json::from_str(&llama_config()).unwrap();
    tied["tie_word_embeddings"] = true.into();
    assert!(open_folder(&tied.to_string(), &llama_weights()).is_ok());
}

#[test]
fn more_experts_than_any_model_has_are_refused_before_they_take_memory() {
    for (row, key) in [("mixtral", "num_local_experts"), ("gpt_oss", "num_local_experts"), ("qwen3_moe", "num_local_experts")] {
        let read = |file: &str| std::fs::read(fixture(&format!("rows/{row}/{file}"))).unwrap();
        let mut config: serde_json::Value = serde_json::from_slice(&read("config.json")).unwrap();
        assert!(config[key].is_u64(), "{row}");
        config[key] = (1 << 24).into();
        let refused = open_folder(&config.to_string(), &read("model.safetensors"));
        assert!(
            matches!(&refused, Err(ModelError::Config { key, reason, .. }) if key.ends_with("_experts") && reason.contains("between 1 and 4096")),
            "{row}: {:?}",
            refused.err()
        );
    }
}

#[test]
fn quantized_checkpoints_are_recognized_with_the_conversion_to_use() {
    let with = |quantization: serde_json::Value| {
        let mut config: serde_json::Value = serde_json::from_str(&llama_config()).unwrap();
        config["quantization_config"] = quantization;
        open_folder(&config.to_string(), &llama_weights()).unwrap_err().to_string()
    };
    for (quantization, expected) in [
        (serde_json::json!({ "quant_method": "gptq", "bits": 4 }), "quantized by `gptq`"),
        (serde_json::json!({ "quant_method": "awq" }), "quantized by `awq`"),
        (serde_json::json!({ "quant_method": "bitsandbytes" }), "model.dequantize()"),
        (serde_json::json!({ "load_in_4bit": true }), "quantized by `bitsandbytes`"),
        (serde_json::json!({ "quant_method": "hqq" }), "quantized by `hqq`"),
        (serde_json::json!({}), "quantized by `unknown`"),
        (
            serde_json::json!({ "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": { "g": { "weights": { "num_bits": 4, "type": "int" } } } }),
            "`pack-quantized`",
        ),
        (serde_json::json!({ "quant_method": "fp8", "fmt": "e5m2" }), "format `e5m2`"),
        (serde_json::json!({ "quant_method": "fp8", "weight_block_size": [0, 128] }), "weight_block_size: is [0,128]"),
    ] {
        let text = with(quantization);
        assert!(text.contains(expected), "{expected}: {text}");
    }
}

#[test]
fn scales_of_eight_bit_floats_that_do_not_fit_are_named() {
    use safetensors::tensor::{Dtype, SafeTensors, TensorView};
    let source = fixture("../torch/fp8-block");
    let config = std::fs::read_to_string(source.join("config.json")).unwrap();
    let bytes = std::fs::read(source.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let scale = "model.layers.0.mlp.up_proj.weight_scale_inv";
    let with = |change: Option<(Dtype, Vec<usize>, &[u8])>, config: &str| {
        let mut tensors: Vec<(String, TensorView<'_>)> = file.tensors().into_iter().filter(|(name, _)| name != scale).collect();
        if let Some((dtype, shape, data)) = change {
            tensors.push((scale.to_owned(), TensorView::new(dtype, shape, data).unwrap()));
        }
        open_folder(config, &safetensors::serialize(tensors, None).unwrap()).map(drop).map_err(|error| error.to_string())
    };
    let ones = 1f32.to_le_bytes().repeat(12);
    assert_eq!(with(Some((Dtype::F32, vec![4, 3], &ones)), &config), Ok(()));
    assert!(with(None, &config).unwrap_err().contains(scale));
    assert!(with(Some((Dtype::F32, vec![3, 4], &ones)), &config).unwrap_err().contains("has shape [3, 4], the configuration needs [4, 3]"));
    let nan = [&ones[..44], &f32::NAN.to_le_bytes()].concat();
    let text = with(Some((Dtype::F32, vec![4, 3], &nan)), &config).unwrap_err();
    assert!(text.contains(scale) && text.contains("block 11"), "{text}");
    let text = with(Some((Dtype::F8_E4M3, vec![4, 3], &[0; 12])), &config).unwrap_err();
    assert!(text.contains("scales of 8-bit floats must be"), "{text}");
    let mut without_size: serde_json::Value = serde_json::from_str(&config).unwrap();
    without_size["quantization_config"]["weight_block_size"] = serde_json::Value::Null;
    let text = with(Some((Dtype::F32, vec![4, 3], &ones)), &without_size.to_string()).unwrap_err();
    assert!(text.contains("weight_block_size: is missing"), "{text}");
}

#[test]
fn eight_bit_floats_of_all_experts_in_one_tensor_are_refused_with_what_to_take() {
    use safetensors::tensor::{Dtype, SafeTensors, TensorView};
    let source = fixture("rows/gpt_oss");
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(source.join("config.json")).unwrap()).unwrap();
    config["quantization_config"] = serde_json::json!({ "quant_method": "fp8" });
    let bytes = std::fs::read(source.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let name = "model.layers.0.mlp.experts.down_proj";
    let shape = file.tensor(name).unwrap().shape().to_vec();
    let stored = vec![0; shape.iter().product()];
    let scales = 1f32.to_le_bytes().repeat(shape[0]);
    let with = |scales: Option<&[u8]>| {
        let mut tensors: Vec<(String, TensorView<'_>)> = file.tensors().into_iter().filter(|(other, _)| other != name).collect();
        tensors.push((name.to_owned(), TensorView::new(Dtype::F8_E4M3, shape.clone(), &stored).unwrap()));
        if let Some(scales) = scales {
            tensors.push((format!("{name}_scale"), TensorView::new(Dtype::F32, vec![shape[0], 1, 1], scales).unwrap()));
        }
        open_folder(&config.to_string(), &safetensors::serialize(tensors, None).unwrap()).unwrap_err().to_string()
    };
    let refused = with(Some(&scales));
    assert!(refused.contains(&format!("{name}_scale")) && refused.contains("where each expert has matrices of its own"), "{refused}");
    assert!(with(None).contains(&format!("lacks {name}_scale_inv")));
}

#[test]
fn mxfp4_stacks_that_are_incomplete_or_do_not_fit_are_named() {
    use safetensors::tensor::{Dtype, SafeTensors, TensorView};
    let source = fixture("quantized/gpt_oss-mxfp4");
    let config = std::fs::read_to_string(source.join("config.json")).unwrap();
    let bytes = std::fs::read(source.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let base = "model.layers.1.mlp.experts.down_proj";
    let (blocks, scales) = (format!("{base}_blocks"), format!("{base}_scales"));
    let change = |name: &str, replaced_by: Option<(&str, Dtype, Vec<usize>, &[u8])>| {
        let mut tensors: Vec<(String, TensorView<'_>)> = file.tensors().into_iter().filter(|(other, _)| other != name).collect();
        if let Some((name, dtype, shape, data)) = replaced_by {
            tensors.push((name.to_owned(), TensorView::new(dtype, shape, data).unwrap()));
        }
        open_folder(&config, &safetensors::serialize(tensors, None).unwrap())
    };
    let text = |name: &str, replaced_by| change(name, replaced_by).unwrap_err().to_string();
    let (values, exponents) = (file.tensor(&blocks).unwrap().data(), file.tensor(&scales).unwrap().data());
    assert!(change("", None).is_ok());
    assert!(text(&blocks, None).contains(&format!("lacks {blocks}")));
    assert!(text(&scales, None).contains(&format!("lacks {scales}")));
    let cut = text(&scales, Some((&scales, Dtype::U8, vec![3, 64, 2], &exponents[..384])));
    assert!(cut.contains(&scales) && cut.contains("needs [3, 64, 3]"), "{cut}");
    let flat = text(&blocks, Some((&blocks, Dtype::U8, vec![3, 64, 48], values)));
    assert!(flat.contains(&blocks) && flat.contains("[3, 64, 48]") && flat.contains("take a GGUF file"), "{flat}");
    // As the configuration of another model would have it.
    let swapped = text(&blocks, Some((&blocks, Dtype::U8, vec![3, 32, 6, 16], values)));
    assert!(swapped.contains(&scales) && swapped.contains("needs [3, 32, 6]"), "{swapped}");
    let twice = text("", Some((base, Dtype::BF16, vec![1], &[0; 2])));
    assert!(twice.contains(base) && twice.contains(&blocks), "{twice}");
    let other = text(&blocks, Some(("model.layers.1.mask", Dtype::U8, vec![4], &[0; 4])));
    assert!(other.contains("model.layers.1.mask has type U8"), "{other}");
    // An exponent beyond f32 is found when the weights are looked through.
    let mut damaged = exponents.to_vec();
    damaged[200] = 255;
    let model = change(&scales, Some((&scales, Dtype::U8, vec![3, 64, 3], &damaged))).unwrap();
    let error = model.decoder(super::common::backend(), &super::common::options()).map(drop).unwrap_err();
    assert!(matches!(&error, ModelError::NonFinite { tensor, .. } if tensor == base), "{error}");
}

#[test]
fn packed_tensors_are_recognized_without_a_configuration_that_says_so() {
    use safetensors::tensor::{Dtype, SafeTensors, TensorView};
    let bytes = llama_weights();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    for (name, expected) in [
        ("model.layers.0.mlp.up_proj.qweight", "GPTQ or AWQ"),
        ("model.layers.0.mlp.up_proj.g_idx", "GPTQ or AWQ"),
        ("model.layers.0.mlp.up_proj.weight.absmax", "bitsandbytes"),
        ("model.layers.0.mlp.up_proj.weight_packed", "compressed-tensors"),
    ] {
        let mut tensors: Vec<(String, TensorView<'_>)> = file.tensors().into_iter().collect();
        tensors.push((name.to_owned(), TensorView::new(Dtype::I32, vec![2], &[0; 8]).unwrap()));
        let text = open_folder(&llama_config(), &safetensors::serialize(tensors, None).unwrap()).unwrap_err().to_string();
        assert!(text.contains(name) && text.contains(expected), "{name}: {text}");
    }
}

#[test]
fn a_configuration_that_lies_about_its_size_is_refused_at_once() {
    let lie = |key: &str, value: u64| {
        let mut config: serde_json::Value = serde_json::from_str(&llama_config()).unwrap();
        config[key] = value.into();
        open_folder(&config.to_string(), &llama_weights()).unwrap_err()
    };
    match lie("num_hidden_layers", 4_000) {
        ModelError::MissingTensors { names } => assert!(names.len() < 2000 && names[0].contains("layers.3."), "{}", names.len()),
        other => panic!("{other}"),
    }
    assert!(matches!(lie("num_attention_heads", 1 << 22), ModelError::Config { .. } | ModelError::TensorShape { .. }));
}
