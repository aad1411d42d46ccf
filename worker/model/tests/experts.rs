//! Only the chosen experts are computed: weights of one that nobody can choose may be anything.

mod common;

use common::{alone, assert_same_bits, backend, chunked, fixture, options, run, sequences, together};
use forge_model::{DecoderOptions, LoadMode, Model};
use safetensors::SafeTensors;

/// The expert whose bias in the router keeps every token away.
const AVOIDED: usize = 4;

/// The GPT-OSS fixture with that expert, its weights as they are or NaN.
fn model(damaged: bool) -> (tempfile::TempDir, Model) {
    let source = fixture("rows/gpt_oss");
    let mut bytes = std::fs::read(source.join("model.safetensors")).unwrap();
    let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let data = header + 8;
    let mut found = 0;
    for (name, tensor) in metadata.tensors() {
        let (start, end) = tensor.data_offsets;
        let plane = (end - start) / tensor.shape[0];
        let of_avoided = data + start + AVOIDED * plane..data + start + (AVOIDED + 1) * plane;
        // bfloat16: −2.0e9, and NaN.
        if name.ends_with("router.bias") {
            bytes[of_avoided].copy_from_slice(&[0xee, 0xce]);
            found += 1;
        } else if damaged && (name.ends_with("experts.gate_up_proj") || name.ends_with("experts.down_proj")) {
            bytes[of_avoided].chunks_exact_mut(2).for_each(|value| value.copy_from_slice(&[0xc0, 0x7f]));
            found += 1;
        }
    }
    assert_eq!(found, if damaged { 9 } else { 3 }, "in each of three layers");
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(source.join("config.json"), folder.path().join("config.json")).unwrap();
    std::fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    let model = Model::open(folder.path(), LoadMode::Mmap).unwrap();
    (folder, model)
}

#[test]
fn an_expert_that_nobody_chooses_takes_no_part() {
    let options = DecoderOptions { scan_values: false, ..options() };
    let (_sound_folder, sound) = model(false);
    let (_damaged_folder, damaged) = model(true);
    let tokens = sequences(51, 6, 30, sound.architecture().vocab_size);
    let expected = run(&mut sound.decoder(backend(), &options).unwrap(), &tokens, &alone(&tokens));
    assert!(expected.iter().flatten().all(|logit| logit.is_finite()));
    let mut decoder = damaged.decoder(backend(), &options).unwrap();
    for (what, schedule) in [("together", together(&tokens)), ("one by one", chunked(&tokens, 1))] {
        assert_same_bits(&run(&mut decoder, &tokens, &schedule), &expected, what);
    }
}

#[test]
fn damaged_experts_are_refused_where_values_are_checked() {
    let (_folder, damaged) = model(true);
    let refused = damaged.decoder(backend(), &options()).err().map(|error| error.to_string());
    assert!(refused.as_ref().is_some_and(|why| why.contains("experts.") && why.contains("NaN")), "{refused:?}");
}
