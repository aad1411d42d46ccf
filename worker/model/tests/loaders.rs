//! Files other than one GGUF or one safetensors folder: what torch.save writes, 8-bit floats with scales, single files,
//! split GGUF. Logits against transformers (fixtures by tests/fixtures/torch/make.py), types value by value.

mod common;

use std::path::{Path, PathBuf};

use common::build::{self, Entry, Gguf};
use common::{alone, backend, options, relative_difference, run};
use forge_kernels::{DType, dequantize};
use forge_model::{LoadMode, Model, ModelError, torch};

/// The prompt of make.py.
const TOKENS: [u32; 8] = [3, 17, 5, 29, 11, 2, 23, 8];
const TOLERANCE: f32 = 1e-4;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/torch").join(name)
}

fn logits(model: &Model) -> Vec<f32> {
    let tokens = [TOKENS.to_vec()];
    let mut decoder = model.decoder(backend(), &forge_model::DecoderOptions { max_model_len: 16, ..options() }).unwrap();
    run(&mut decoder, &tokens, &alone(&tokens)).remove(0)
}

fn golden(folder: &str) -> Vec<f32> {
    let bytes = std::fs::read(fixture(&format!("{folder}.golden.safetensors"))).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    file.tensor("logits").unwrap().data().chunks_exact(4).map(|word| f32::from_le_bytes(word.try_into().unwrap())).collect()
}

fn check(path: &Path, reference: &str) {
    for mode in [LoadMode::Mmap, LoadMode::Eager] {
        let model = Model::open(path, mode).unwrap();
        let difference = relative_difference(&logits(&model), &golden(reference));
        assert!(difference <= TOLERANCE, "{}: {difference:e}", path.display());
    }
}

#[test]
fn pytorch_files_whole_and_sharded_give_transformers_logits() {
    check(&fixture("gpt2"), "gpt2");
    check(&fixture("gpt2-sharded"), "gpt2");
    check(&fixture("gpt2/pytorch_model.bin"), "gpt2");
}

#[test]
fn names_that_share_a_storage_are_counted_once() {
    let model = Model::open(fixture("gpt2"), LoadMode::Mmap).unwrap();
    let checkpoint = model.checkpoint();
    let embedding = &checkpoint.tensors()["transformer.wte.weight"];
    assert_eq!(embedding, &checkpoint.tensors()["lm_head.weight"]);
    let counted: usize = checkpoint.tensors().values().map(|entry| entry.elements()).sum();
    assert_eq!(model.summary().parameters, counted - embedding.elements());
    assert_eq!(model.summary().weights_bytes, 4 * model.summary().parameters);
}

fn values(bytes: &[u8], tensor: &torch::TorchTensor) -> Vec<f32> {
    let mut values = vec![0.0; tensor.shape.iter().product()];
    dequantize(tensor.dtype, &bytes[tensor.bytes.clone()], &mut values);
    values
}

#[test]
fn pytorch_types_views_and_shared_storages_are_read_as_they_lie() {
    let count: Vec<f32> = (0..12u8).map(f32::from).collect();
    for protocol in [2, 3, 4] {
        let bytes = std::fs::read(fixture(&format!("files/types-{protocol}.bin"))).unwrap();
        let tensors = torch::parse(&bytes, |_| true).unwrap();
        let types = [("f32", DType::F32), ("f16", DType::F16), ("bf16", DType::BF16), ("f8", DType::F8E4M3)];
        for (name, dtype) in types.into_iter().filter(|(name, _)| protocol > 2 || *name != "f8") {
            let tensor = &tensors[name];
            assert_eq!((tensor.dtype, &tensor.shape[..]), (dtype, &[3, 4][..]), "{name}");
            assert_eq!(values(&bytes, tensor), count, "{name}");
        }
    }
    let bytes = std::fs::read(fixture("files/shared.bin")).unwrap();
    let tensors = torch::parse(&bytes, |_| true).unwrap();
    assert_eq!(tensors["a"], tensors["b"]);
    assert_eq!(values(&bytes, &tensors["a"]), count);
    assert_eq!(values(&bytes, &tensors["row"]), count[4..8]);
    assert_eq!((values(&bytes, &tensors["rows"]), &tensors["rows"].shape), (count[4..].to_vec(), &vec![2, 4]));
    let bytes = std::fs::read(fixture("files/others.bin")).unwrap();
    let tensors = torch::parse(&bytes, |name| name == "w").unwrap();
    assert_eq!((tensors.len(), values(&bytes, &tensors["w"])), (1, count));
    let error = torch::parse(&bytes, |_| true).unwrap_err();
    assert!(matches!(&error, ModelError::UnsupportedType { tensor, found, .. } if tensor == "mask" && found == "bool"), "{error}");
}

#[test]
fn eight_bit_floats_with_every_kind_of_scales_give_the_logits_of_their_values() {
    for name in ["fp8-block", "fp8-row", "fp8-matrix", "fp8-plain"] {
        check(&fixture(name), name);
        let model = Model::open(fixture(name), LoadMode::Mmap).unwrap();
        assert_eq!(model.summary().quantization.main_type(), "F8_E4M3");
        let scaled = "model.layers.1.mlp.down_proj.weight";
        assert_eq!(model.checkpoint().scales(scaled).is_some(), name != "fp8-plain");
        assert!(model.checkpoint().tensors().keys().all(|name| !name.contains("scale")), "{name}");
    }
}

#[test]
fn one_file_is_a_model_where_its_configuration_is_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    let source = common::fixture("llama");
    let file = folder.path().join("weights of mine.safetensors");
    std::fs::copy(source.join("model.safetensors"), &file).unwrap();
    let alone = Model::open(&file, LoadMode::Mmap).unwrap_err();
    let ModelError::NotAModel { reason, .. } = &alone else { panic!("{alone}") };
    assert!(reason.contains("put the model's config.json beside it") && reason.contains("it is like: llama"), "{reason}");
    std::fs::copy(source.join("config.json"), folder.path().join("config.json")).unwrap();
    // What else lies there does not matter.
    std::fs::write(folder.path().join("model.safetensors.index.json"), "not json").unwrap();
    std::fs::write(folder.path().join("model-00001-of-00002.safetensors"), "cut off").unwrap();
    let model = Model::open(&file, LoadMode::Mmap).unwrap();
    assert_eq!(model.checkpoint().folder(), Some(folder.path()));
}

/// A GGUF model in `count` files of about equally many tensors; the first may have none.
fn split(whole: &Gguf, count: usize, tensors_in_first: bool) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let parts = if tensors_in_first { count } else { count - 1 };
    for number in 0..count {
        let mut part = Gguf { entries: if number == 0 { whole.entries.clone() } else { Vec::new() }, tensors: Vec::new() };
        for (key, value) in [("split.no", number), ("split.count", count), ("split.tensors.count", whole.tensors.len())] {
            part.entries.push((key.to_owned(), Entry::U32(value as u32)));
        }
        let place = if tensors_in_first { Some(number) } else { number.checked_sub(1) };
        if let Some(place) = place {
            part.tensors = whole.tensors[place * whole.tensors.len() / parts..(place + 1) * whole.tensors.len() / parts].to_vec();
        }
        part.write(&folder.path().join(format!("m-{:05}-of-{count:05}.gguf", number + 1)));
    }
    folder
}

#[test]
fn split_gguf_files_are_one_model() {
    let shape = build::Shape { family: "llama", hidden: 32, layers: 2, heads: 2, kv_heads: 1, head_dim: 16, inner: 64, vocabulary: 40 };
    let whole = build::gguf(&shape, build::Q8_0, 7);
    let folder = tempfile::tempdir().unwrap();
    whole.write(&folder.path().join("whole.gguf"));
    let expected = logits(&Model::open(folder.path(), LoadMode::Mmap).unwrap());
    for (count, tensors_in_first) in [(2, true), (3, false)] {
        let folder = split(&whole, count, tensors_in_first);
        for part in 1..=count {
            let part = folder.path().join(format!("m-{part:05}-of-{count:05}.gguf"));
            assert_eq!(logits(&Model::open(&part, LoadMode::Mmap).unwrap()), expected);
        }
        assert_eq!(logits(&Model::open(folder.path(), LoadMode::Eager).unwrap()), expected);
    }
}

#[test]
fn split_gguf_files_that_do_not_belong_together_are_refused() {
    let shape = build::Shape { family: "llama", hidden: 32, layers: 1, heads: 2, kv_heads: 1, head_dim: 16, inner: 32, vocabulary: 40 };
    let whole = build::gguf(&shape, build::F32, 7);
    let name = |part: usize| format!("m-{part:05}-of-00003.gguf");
    let refused = |change: &dyn Fn(&Path)| {
        let folder = split(&whole, 3, true);
        change(folder.path());
        Model::open(folder.path().join(name(1)), LoadMode::Mmap).unwrap_err().to_string()
    };
    let missing = refused(&|folder| std::fs::remove_file(folder.join(name(2))).unwrap());
    assert!(missing.contains("m-00002-of-00003.gguf is missing"), "{missing}");
    let twice = refused(&|folder| assert!(std::fs::copy(folder.join(name(2)), folder.join(name(3))).unwrap() > 0));
    assert!(twice.contains("more than one of its files") || twice.contains("says that it is part"), "{twice}");
    let swapped = refused(&|folder| {
        std::fs::rename(folder.join(name(2)), folder.join("x")).unwrap();
        std::fs::rename(folder.join(name(3)), folder.join(name(2))).unwrap();
        std::fs::rename(folder.join("x"), folder.join(name(3))).unwrap();
    });
    assert!(swapped.contains("says that it is part Some(2) of Some(3)"), "{swapped}");
    let folder = split(&whole, 3, true);
    std::fs::rename(folder.path().join(name(1)), folder.path().join("other.gguf")).unwrap();
    let renamed = Model::open(folder.path().join("other.gguf"), LoadMode::Mmap).unwrap_err().to_string();
    assert!(renamed.contains("one of 3 parts") && renamed.contains("NAME-00001-of-00003.gguf"), "{renamed}");
}
