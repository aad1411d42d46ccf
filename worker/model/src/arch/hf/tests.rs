use serde_json::json;

use super::*;
use crate::arch::{PositionSpec, RopeScaling, RopeSpec};

fn llama() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
        "intermediate_size": 96, "vocab_size": 100, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5
    })
}

fn with(mut config: Value, changes: Value) -> Value {
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn refused(changes: Value) -> String {
    from_config_json(&with(llama(), changes)).unwrap_err().to_string()
}

fn rope(changes: Value) -> RopeSpec {
    match from_config_json(&with(llama(), changes)).unwrap().position {
        PositionSpec::Rope(mut rope) => rope.tables.remove(0),
        other => panic!("llama rotates: {other:?}"),
    }
}

#[test]
fn absent_keys_take_the_familys_defaults() {
    let architecture = from_config_json(&llama()).unwrap();
    assert_eq!((architecture.attention.head_dim, architecture.group_size()), (8, 4));
    assert_eq!(architecture.mlp.activation, ActivationKind::Silu);
    assert!(!architecture.head.tied && !architecture.attention.qkv_bias && !architecture.mlp.bias);
    assert_eq!(rope(json!({})).theta, 10_000.0);

    let gpt2 = json!({ "model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 50 });
    let gpt2 = from_config_json(&gpt2).unwrap();
    assert_eq!((gpt2.mlp.intermediate_size, gpt2.context_length, gpt2.attention.kv_heads), (256, 1024, 4));
    assert_eq!((gpt2.mlp.activation, gpt2.norm.eps), (ActivationKind::GeluTanh, 1e-5));
    assert!(gpt2.head.tied && gpt2.position == PositionSpec::Learned { offset: 0 });
}

#[test]
fn both_spellings_of_rope_are_read_alike() {
    let scaling = json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 8192 });
    let five = rope(json!({ "rope_parameters": with(scaling.clone(), json!({ "rope_theta": 5e5 })) }));
    let four = rope(json!({ "rope_theta": 5e5, "rope_scaling": scaling }));
    assert_eq!(five, four);
    let oldest = rope(json!({ "rope_scaling": { "type": "linear", "factor": 2.0 } }));
    assert_eq!(oldest.scaling, RopeScaling::Linear { factor: 2.0 });
    assert_eq!(rope(json!({ "rope_scaling": null })).scaling, RopeScaling::Default);
    assert_eq!(rope(json!({ "partial_rotary_factor": 0.5 })).rotary_dim, 4);
}

#[test]
fn windows_follow_layer_types_or_the_first_windowed_layer() {
    let qwen2 = |changes| from_config_json(&with(with(llama(), json!({ "model_type": "qwen2" })), changes)).map(|a| a.attention.windows);
    assert_eq!(qwen2(json!({ "sliding_window": 9, "max_window_layers": 2 })).unwrap(), [None; 4]);
    let on = json!({ "use_sliding_window": true, "sliding_window": 9, "max_window_layers": 2 });
    assert_eq!(qwen2(on.clone()).unwrap(), [None, None, Some(9), Some(9)]);
    let types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"];
    assert_eq!(qwen2(with(on.clone(), json!({ "layer_types": types }))).unwrap(), [Some(9), None, None, Some(9)]);
    assert!(qwen2(with(on.clone(), json!({ "layer_types": ["full_attention"] }))).is_err());
    assert!(qwen2(with(on, json!({ "layer_types": vec!["chunked_attention"; 4] }))).unwrap_err().to_string().contains("chunked_attention"));
}

#[test]
fn what_is_not_implemented_is_refused_by_name() {
    assert!(
        refused(json!({ "model_type": "mamba" })).contains("`mamba` is not supported; supported families: llama, mistral, mixtral, qwen2")
    );
    assert!(refused(json!({ "hidden_act": "xielu" })).contains("xielu"));
    assert!(refused(json!({ "quantization_config": { "quant_method": "gptq" } })).contains("`gptq`"));
    assert!(refused(json!({ "rope_scaling": { "rope_type": "mrope", "factor": 2.0 } })).contains("mrope"));
    assert!(refused(json!({ "rope_parameters": { "chunked_attention": { "rope_theta": 1e4 } } })).contains("chunked_attention"));
    let gpt2 = json!({ "model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 50 });
    let scaled = from_config_json(&with(gpt2, json!({ "scale_attn_by_inverse_layer_idx": true }))).unwrap_err();
    assert!(scaled.to_string().contains("scale_attn_by_inverse_layer_idx = true"));
}

#[test]
fn senseless_values_name_their_key() {
    for (key, value) in [
        ("hidden_size", json!(0)),
        ("hidden_size", json!(-64)),
        ("hidden_size", json!("64")),
        ("hidden_size", json!(1e30)),
        ("hidden_size", json!(u64::MAX)),
        ("num_hidden_layers", json!(u64::MAX)),
        ("num_hidden_layers", json!(null)),
        ("num_attention_heads", json!(7)),
        ("vocab_size", json!([1])),
        ("rope_theta", json!(-1.0)),
        ("rope_theta", json!(0)),
        ("tie_word_embeddings", json!("yes")),
        ("hidden_act", json!(3)),
        ("rope_scaling", json!("linear")),
    ] {
        let text = refused(json!({ (key): value }));
        assert!(text.starts_with("config.json: ") && text.contains(key), "{key} = {value}: {text}");
    }
    assert!(refused(json!({ "num_key_value_heads": 3 })).contains("multiple of 3 KV heads"));
    assert!(refused(json!({ "num_key_value_heads": 0 })).contains("num_key_value_heads: is 0"));
    assert!(refused(json!({ "num_attention_heads": 0 })).contains("num_attention_heads"));
    assert!(refused(json!({ "head_dim": 0 })).contains("head_dim"));
    assert!(refused(json!({ "head_dim": 7 })).contains("rotary_dim"));
    assert!(refused(json!({ "rms_norm_eps": 0.0 })).contains("eps"));
    assert!(refused(json!({ "rope_scaling": { "rope_type": "linear" } })).contains("factor: is missing"));
    assert!(refused(json!({ "rope_scaling": { "rope_type": "linear", "factor": 0.0 } })).contains("factor"));
    for config in [json!(null), json!([]), json!({}), json!({ "model_type": 5 })] {
        assert!(from_config_json(&config).unwrap_err().to_string().contains("model_type"));
    }
}

#[test]
fn every_reference_checkpoint_has_a_row() {
    let rows = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/model/rows");
    let mut read = 0;
    for entry in std::fs::read_dir(rows).unwrap() {
        let path = entry.unwrap().path().join("config.json");
        let Ok(text) = std::fs::read(&path) else { continue };
        if let Err(error) = from_config_json(&serde_json::from_slice(&text).unwrap()) {
            panic!("{}: {error}", path.display());
        }
        read += 1;
    }
    assert!(read >= 60, "only {read} checkpoints");
}
