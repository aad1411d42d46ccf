//! Options and sessions out of range, and what the files recommend.

use forge_model::{GenerationDefaults, LoadMode, Model, ModelError};

use super::common::{backend, fixture, options};

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
