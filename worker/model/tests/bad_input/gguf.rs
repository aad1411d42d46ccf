//! GGUF files: cut, contradictory, of other types, of other models.

use forge_model::{LoadMode, Model, ModelError};

use super::common::build::{self, Entry, Gguf, Shape};
use super::common::{backend, options};

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
        ("llama.attention.head_count", number(0), "attention.head_count: is 0"),
        ("llama.embedding_length", text("32"), "llama.embedding_length: is a string, an integer is needed"),
        ("llama.rope.freq_base", Entry::F32(f32::NAN), "rope_theta: is NaN"),
        ("llama.rope.dimension_count", number(17), "rotary_dim: is 17"),
        ("split.count", number(3), "one of 3 parts"),
        ("split.count", number(u32::MAX), "split.count is 4294967295"),
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
        assert!(matches!(&error, Some(ModelError::NonFinite { tensor, index: 0, .. }) if tensor == "blk.0.ffn_down.weight"), "{error:?}");
    }
    let error = load(&|file| file.tensor_mut("output_norm.weight").bytes[8..12].copy_from_slice(&f32::NAN.to_le_bytes()), build::Q8_0);
    assert!(matches!(&error, Some(ModelError::NonFinite { tensor, index: 2, .. }) if tensor == "output_norm.weight"), "{error:?}");
    let text = error.unwrap().to_string();
    assert!(text.contains(".gguf: tensor output_norm.weight") && text.contains("download it again"), "{text}");
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
