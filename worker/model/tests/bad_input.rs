//! Damaged, hostile and mistaken models: each gets a typed error that names what is wrong, and never a panic.

mod common;

use std::path::Path;

use common::build::{self, Entry, Gguf, Shape};
use common::{backend, fixture, options};
use forge_model::{GenerationDefaults, LoadMode, Model, ModelError};

const SHAPE: Shape = Shape { family: "llama", hidden: 32, layers: 1, heads: 2, kv_heads: 1, head_dim: 16, inner: 32, vocabulary: 40 };

fn open_bytes(bytes: &[u8]) -> Result<Model, ModelError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    Model::open(path, LoadMode::Eager)
}

fn open_changed(change: impl Fn(&mut Gguf)) -> Result<Model, ModelError> {
    let mut file = build::gguf(&SHAPE, build::Q8_0, 1);
    change(&mut file);
    open_bytes(&file.bytes())
}

fn refused(change: impl Fn(&mut Gguf)) -> String {
    open_changed(change).unwrap_err().to_string()
}

/// A Hugging Face folder with the given config and the llama fixture's tensors, changed.
fn folder_with(config: &str, weights: &[u8]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config).unwrap();
    std::fs::write(folder.path().join("model.safetensors"), weights).unwrap();
    folder
}

fn llama_config() -> String {
    std::fs::read_to_string(fixture("llama/config.json")).unwrap()
}

fn llama_weights() -> Vec<u8> {
    std::fs::read(fixture("llama/model.safetensors")).unwrap()
}

fn open_folder(config: &str, weights: &[u8]) -> Result<Model, ModelError> {
    Model::open(folder_with(config, weights).path(), LoadMode::Eager)
}

#[test]
fn every_prefix_of_a_gguf_file_is_refused() {
    let bytes = build::gguf(&SHAPE, build::Q4_1, 1).bytes();
    assert!(open_bytes(&bytes).is_ok());
    // The last bytes are padding after the last tensor.
    let needed = forge_model::gguf::parse(&bytes).unwrap().tensors.values().map(|tensor| tensor.bytes.end).max().unwrap();
    for length in 0..needed {
        match forge_model::gguf::parse(&bytes[..length]) {
            Err(ModelError::Malformed { .. }) => {}
            other => panic!("{length}: {other:?}"),
        }
    }
    for length in [0, 3, 24, 500, needed - 1] {
        assert!(open_bytes(&bytes[..length]).is_err());
    }
}

#[test]
fn every_prefix_of_a_safetensors_header_and_some_of_the_data_is_refused() {
    let weights = llama_weights();
    let header = 8 + u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
    let lengths = (0..header + 64).chain((header..weights.len()).step_by(997)).chain([weights.len() - 1]);
    for length in lengths {
        let result = forge_model::safetensors::parse_header(&weights[..length], |_| true);
        assert!(matches!(result, Err(ModelError::Malformed { .. })), "{length}: {result:?}");
    }
    let mut longer = weights.clone();
    longer.push(0);
    assert!(forge_model::safetensors::parse_header(&longer, |_| true).is_err());
}

#[test]
fn any_changed_header_byte_of_safetensors_gives_a_directory_or_an_error() {
    let weights = llama_weights();
    let header = 8 + u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
    for at in 0..header {
        for value in [0, b'"', b'9', b'}', 0xff] {
            let mut changed = weights[..].to_vec();
            changed[at] = value;
            if let Ok(tensors) = forge_model::safetensors::parse_header(&changed, |_| true) {
                assert!(tensors.values().all(|tensor| tensor.bytes.end <= changed.len()));
            }
        }
    }
}

#[test]
fn missing_renamed_reshaped_and_extra_tensors_are_named() {
    assert!(open_changed(|_| {}).is_ok());
    let missing = refused(|file| file.tensors.retain(|tensor| tensor.name != "blk.0.ffn_up.weight"));
    assert!(missing.contains("lacks blk.0.ffn_up.weight"), "{missing}");
    let renamed = refused(|file| file.tensor_mut("blk.0.attn_q.weight").name = "blk.0.attn_queue.weight".to_owned());
    assert!(renamed.contains("lacks blk.0.attn_q.weight"), "{renamed}");
    let reshaped = refused(|file| file.tensor_mut("blk.0.attn_q.weight").shape = vec![16, 64]);
    assert!(reshaped.contains("attn_q.weight has shape [16, 64], the configuration needs [32, 32]"), "{reshaped}");
    let extra = refused(|file| {
        let copy = file.tensors[1].clone();
        file.tensors.push(build::Tensor { name: "blk.0.attn_sinks.weight".to_owned(), ..copy });
    });
    assert!(extra.contains("does not use: blk.0.attn_sinks.weight"), "{extra}");
    let embedding = refused(|file| file.tensors.retain(|tensor| tensor.name != "token_embd.weight"));
    assert!(embedding.contains("token_embd.weight"), "{embedding}");
    let layers = refused(|file| {
        file.entries.iter_mut().for_each(|(key, value)| {
            if key == "llama.block_count" {
                *value = Entry::U32(2)
            }
        })
    });
    assert!(layers.contains("blk.1.") && layers.contains("and 1 more"), "{layers}");
    let quantized = refused(|file| {
        let vector = file.tensor_mut("output_norm.weight");
        (vector.kind, vector.bytes) = (build::Q8_0, vec![0; 34]);
    });
    assert!(quantized.contains("output_norm.weight has type Q8_0"), "{quantized}");
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

#[test]
fn unsupported_types_are_refused_by_name_with_the_tensor() {
    for (kind, name) in [(9, "Q8_1"), (16, "IQ2_XXS"), (34, "TQ1_0"), (40, "NVFP4"), (26, "I32")] {
        let text = refused(|file| file.tensor_mut("blk.0.ffn_down.weight").kind = kind);
        assert!(text.contains(&format!("tensor blk.0.ffn_down.weight has type {name}")) && text.contains("Q8_0"), "{text}");
    }
}

#[test]
fn unknown_families_and_missing_keys_are_named() {
    let set = |key: &str, value: Option<Entry>| {
        refused(|file| {
            file.entries.retain(|(existing, _)| existing != key);
            file.entries.extend(value.clone().map(|value| (key.to_owned(), value)));
        })
    };
    let unknown = set("general.architecture", Some(Entry::Text("rwkv7".to_owned())));
    assert!(unknown.contains("`rwkv7`") && unknown.contains("llama, mistral"), "{unknown}");
    for key in [
        "general.architecture",
        "llama.embedding_length",
        "llama.block_count",
        "llama.context_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.layer_norm_rms_epsilon",
    ] {
        let text = set(key, None);
        assert!(text.contains(key) && text.contains("missing"), "{key}: {text}");
    }
    let number = Entry::U32;
    let text = |text: &str| Entry::Text(text.to_owned());
    for (key, value, expected) in [
        ("llama.block_count", number(u32::MAX), "llama.block_count: is 4294967295"),
        ("llama.attention.head_count", number(0), "heads: is 0"),
        ("llama.embedding_length", text("32"), "llama.embedding_length: is a string, an integer is needed"),
        ("llama.rope.freq_base", Entry::F32(f32::NAN), "rope_theta: is NaN"),
        ("llama.rope.dimension_count", number(17), "rotary_dim: is 17"),
        ("split.count", number(3), "split into 3 files"),
        ("llama.rope.scaling.type", text("longrope"), "llama.rope.scaling.type = \"longrope\""),
        ("llama.attention.value_length", number(8), "keys of 16 and values of 8"),
    ] {
        let found = set(key, Some(value));
        assert!(found.contains(expected), "{key}: {found}");
    }
}

#[test]
fn nan_and_infinite_weights_are_named() {
    let load = |change: &dyn Fn(&mut Gguf), kind| {
        let mut file = build::gguf(&SHAPE, kind, 1);
        change(&mut file);
        open_bytes(&file.bytes()).unwrap().decoder(backend(), &options()).err()
    };
    for kind in [build::F32, build::F16, build::BF16, build::Q4_0, build::Q4_1, build::Q8_0] {
        assert!(load(&|_| {}, kind).is_none());
        let error = load(
            &|file| {
                let bytes = &mut file.tensor_mut("blk.0.ffn_down.weight").bytes;
                let value: &[u8] = match kind {
                    build::F32 => &f32::INFINITY.to_le_bytes(),
                    build::BF16 => &[0xc0, 0x7f],
                    _ => &[0x01, 0x7c],
                };
                bytes[..value.len()].copy_from_slice(value);
            },
            kind,
        );
        assert!(matches!(&error, Some(ModelError::NonFinite { tensor, index: 0 }) if tensor == "blk.0.ffn_down.weight"), "{error:?}");
    }
    let error = load(&|file| file.tensor_mut("output_norm.weight").bytes[8..12].copy_from_slice(&f32::NAN.to_le_bytes()), build::Q8_0);
    assert!(matches!(&error, Some(ModelError::NonFinite { tensor, index: 2 }) if tensor == "output_norm.weight"), "{error:?}");
}

#[test]
fn folders_that_are_no_models_say_what_is_missing() {
    let reason = |path: &Path| Model::open(path, LoadMode::Mmap).unwrap_err().to_string();
    assert!(reason(Path::new("/no/such/model")).contains("cannot read /no/such/model"));
    assert!(reason(&fixture("llama/model.safetensors")).contains("give the folder that holds config.json"));
    assert!(reason(&fixture("llama/config.json")).contains("begins with"));
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    assert!(reason(folder.path()).contains("neither config.json nor a GGUF file"));
    std::fs::write(at("empty.gguf"), b"").unwrap();
    assert!(reason(&at("empty.gguf")).contains("empty"));
    std::fs::write(at("pickle.bin"), b"PK\x03\x04xxxxxxx").unwrap();
    assert!(reason(&at("pickle.bin")).contains("pickle"));
    std::fs::write(at("config.json"), llama_config()).unwrap();
    assert!(reason(folder.path()).contains("PyTorch pickles"));
    std::fs::remove_file(at("pickle.bin")).unwrap();
    assert!(reason(folder.path()).contains("no safetensors file"));
    std::fs::write(at("a.safetensors"), llama_weights()).unwrap();
    assert!(Model::open(folder.path(), LoadMode::Mmap).is_ok());
    std::fs::write(at("b.safetensors"), llama_weights()).unwrap();
    assert!(reason(folder.path()).contains("2 safetensors files"));
    for (index, expected) in [
        ("{}", "weight_map is missing"),
        (r#"{"weight_map": {}}"#, "weight_map is empty"),
        (r#"{"weight_map": {"a": 3}}"#, "no string"),
        (r#"{"weight_map": {"a": "../a.safetensors"}}"#, "no plain file name"),
        (r#"{"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}"#, "more than one of its files"),
        (r#"{"weight_map": {"a": "c.safetensors"}}"#, "c.safetensors"),
        ("not json", "invalid model.safetensors.index.json"),
    ] {
        std::fs::write(at("model.safetensors.index.json"), index).unwrap();
        let text = reason(folder.path());
        assert!(text.contains(expected), "{index}: {text}");
    }
}

#[test]
fn a_folder_of_one_gguf_file_is_that_model_whatever_its_name() {
    let folder = tempfile::tempdir().unwrap();
    build::gguf(&SHAPE, build::F16, 1).write(&folder.path().join("weights.dat"));
    std::fs::write(folder.path().join("LICENSE"), "text").unwrap();
    assert!(Model::open(folder.path(), LoadMode::Mmap).is_ok());
    build::gguf(&SHAPE, build::F16, 2).write(&folder.path().join("other.gguf"));
    assert!(Model::open(folder.path(), LoadMode::Mmap).unwrap_err().to_string().contains("2 GGUF files"));
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
fn safetensors_of_other_types_are_named_unless_ignored() {
    use safetensors::tensor::{Dtype, TensorView};
    let bytes = llama_weights();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let with = |name: &str, dtype: Dtype, data: &[u8], shape: Vec<usize>| {
        let mut tensors: Vec<(String, TensorView<'_>)> = file.tensors().into_iter().filter(|(existing, _)| existing != name).collect();
        tensors.push((name.to_owned(), TensorView::new(dtype, shape, data).unwrap()));
        open_folder(&llama_config(), &safetensors::serialize(tensors, None).unwrap())
    };
    let text = with("model.norm.weight", Dtype::I64, &[0; 256], vec![32]).unwrap_err().to_string();
    assert!(text.contains("tensor model.norm.weight has type I64"), "{text}");
    let text = with("model.norm.weight", Dtype::F8_E4M3, &[0; 32], vec![32]).unwrap_err().to_string();
    assert!(text.contains("F8_E4M3"), "{text}");
    assert!(with("model.layers.0.self_attn.rotary_emb.inv_freq", Dtype::I64, &[0; 64], vec![8]).is_ok());
    let text = with("model.layers.0.self_attn.rotary_emb.other", Dtype::F32, &[0; 32], vec![8]).unwrap_err().to_string();
    assert!(text.contains("does not use: model.layers.0.self_attn.rotary_emb.other"), "{text}");
}

#[test]
fn options_out_of_range_are_named() {
    let model = Model::open(fixture("llama"), LoadMode::Mmap).unwrap();
    type Change = fn(&mut forge_model::DecoderOptions);
    let cases: [(&str, Change); 6] = [
        ("max_model_len", |options| options.max_model_len = 65),
        ("max_model_len", |options| options.max_model_len = 0),
        ("block_size", |options| options.block_size = 0),
        ("kv_blocks", |options| options.kv_blocks = u32::MAX as usize),
        ("max_step_rows", |options| options.max_step_rows = 0),
        ("max_logits_rows", |options| options.max_logits_rows = 0),
    ];
    for (name, change) in cases {
        let mut options = options();
        change(&mut options);
        match model.decoder(backend(), &options).err() {
            Some(ModelError::Option { option, .. }) => assert_eq!(option, name),
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[test]
fn sessions_refuse_what_does_not_fit() {
    let model = Model::open(fixture("gpt2"), LoadMode::Mmap).unwrap();
    let mut decoder = model.decoder(backend(), &forge_model::DecoderOptions::single_sequence(8)).unwrap();
    let mut session = forge_model::Session::new(&mut decoder);
    assert!(session.forward(&[]).is_err());
    assert!(session.forward(&[96]).is_err());
    assert!(session.is_empty());
    session.forward(&[1; 6]).unwrap();
    assert!(session.forward(&[1; 3]).unwrap_err().to_string().contains("more than the 8"));
    session.forward(&[1; 2]).unwrap();
    assert_eq!(session.len(), 8);
}

#[test]
fn generation_defaults_and_summary_come_from_the_files() {
    let model = Model::open(fixture("llama"), LoadMode::Mmap).unwrap();
    let generation = model.generation();
    assert_eq!((generation.temperature, generation.top_p, generation.top_k), (Some(0.7), Some(0.9), None));
    let gguf = Model::open(fixture("gguf/llama-q4_1.gguf"), LoadMode::Mmap).unwrap();
    let summary = gguf.summary();
    assert_eq!((summary.family, summary.license.as_deref()), ("llama", Some("apache-2.0")));
    assert_eq!(summary.quantization.main_type(), "Q4_1");
    assert_eq!(summary.parameters, model.summary().parameters);
    assert_eq!(*gguf.generation(), GenerationDefaults::default());
}
