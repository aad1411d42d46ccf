//! What an operator says against a model's files: the family, rope scaling, sliding window.

use std::path::Path;

use forge_model::arch::PositionSpec;
use forge_model::{LoadMode, Model, ModelError, Overrides};

fn rows(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/model/rows").join(name)
}

fn architecture(name: &str) -> Overrides {
    Overrides { architecture: Some(name.to_owned()), ..Overrides::default() }
}

/// The checkpoint `name` with another `model_type`.
fn renamed(name: &str, model_type: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let config = std::fs::read_to_string(rows(name).join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    config["model_type"] = model_type.into();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    std::fs::copy(rows(name).join("model.safetensors"), folder.path().join("model.safetensors")).unwrap();
    folder
}

#[test]
fn an_unknown_family_is_refused_with_the_nearest_rows_and_read_as_the_one_named() {
    let folder = renamed("qwen2_moe", "qwen9_moe");
    let error = Model::open(folder.path(), LoadMode::Mmap).unwrap_err();
    assert!(matches!(&error, ModelError::UnknownFamily { found, .. } if found == "qwen9_moe"));
    let text = error.to_string();
    assert!(text.contains("Nearest: qwen2_moe (") && text.contains("--arch NAME"), "{text}");
    let model = Model::open_with(folder.path(), LoadMode::Mmap, &architecture("qwen2_moe")).unwrap();
    assert_eq!(model.architecture().family, "qwen2_moe");
    assert_eq!(model.architecture(), Model::open(rows("qwen2_moe"), LoadMode::Mmap).unwrap().architecture());
}

#[test]
fn a_family_that_does_not_fit_is_refused_by_its_tensors() {
    let refused = |name: &str, family: &str| Model::open_with(rows(name), LoadMode::Mmap, &architecture(family)).unwrap_err().to_string();
    let missing = refused("yi", "qwen3");
    assert!(missing.contains("--arch qwen3 does not fit this model: it lacks model.layers.0.self_attn.q_norm.weight"), "{missing}");
    assert!(missing.contains("it is like: llama"), "{missing}");
    let left = refused("qwen3", "llama");
    assert!(left.contains("does not use") && left.contains("self_attn.k_norm.weight"), "{left}");
    let unknown = refused("yi", "abacus");
    assert!(unknown.contains("`abacus` is not supported"), "{unknown}");
    assert_eq!(Model::open_with(rows("yi"), LoadMode::Mmap, &architecture("mistral")).unwrap().architecture().family, "mistral");
}

#[test]
fn scaling_and_window_change_the_architecture() {
    let overrides =
        Overrides { rope_scaling: Some("type=yarn,factor=4".parse().unwrap()), sliding_window: Some(5), ..Overrides::default() };
    let model = Model::open_with(rows("mistral"), LoadMode::Mmap, &overrides).unwrap();
    assert_eq!(model.architecture().context_length, 256);
    assert!(model.architecture().attention.windows.iter().all(|window| *window == Some(5)));
    let PositionSpec::Rope(rope) = &model.architecture().position else { panic!("it rotates") };
    assert_eq!(rope.tables[0].scaling.name(), "yarn");
    let gemma = Model::open_with(rows("gemma3"), LoadMode::Mmap, &overrides).unwrap();
    let PositionSpec::Rope(rope) = &gemma.architecture().position else { panic!("it rotates") };
    assert_eq!((rope.tables[0].scaling.name(), rope.tables[1].scaling.name()), ("yarn", "default"));
    for (name, reason) in [("bloom", "no rotary positions"), ("deepseek_v2", "factor on scores")] {
        let refused = Model::open_with(rows(name), LoadMode::Mmap, &overrides).unwrap_err().to_string();
        assert!(refused.contains("type=yarn,factor=4") && refused.contains(reason), "{refused}");
    }
}
