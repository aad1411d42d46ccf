//! The default model, SmolLM2-135M as Q4_1: the shape the tiny ones imitate, at its real size. Answers are compared
//! with llama.cpp's in tests/parity_real.rs; here its bits are compared with themselves.
//!
//! `FORGE_TEST_SMOLLM2` is the path of the GGUF file; without it these tests say so and pass, but never where `CI` is
//! set.

mod common;

use std::path::PathBuf;
use std::sync::Arc;

use common::{alone, assert_same_bits, chunked, options, run, sequences, together};
use forge_kernels::{CpuBackend, CpuOptions};
use forge_model::{Decoder, DecoderOptions, Groups, LoadMode, Model, Shard};
use forge_net::{Collective, GroupOptions, local};
use forge_shared::ids::Epoch;

fn open() -> Option<Model> {
    match std::env::var_os("FORGE_TEST_SMOLLM2") {
        Some(path) => Some(Model::open(PathBuf::from(path), LoadMode::Mmap).unwrap()),
        None if std::env::var_os("CI").is_none() => {
            eprintln!("not run: set FORGE_TEST_SMOLLM2 to the path of SmolLM2-135M-Instruct.Q4_1.gguf");
            None
        }
        None => panic!("CI must set FORGE_TEST_SMOLLM2 to the default model's GGUF file"),
    }
}

fn rank(model: &Model, tp_rank: usize, tp_size: usize, collective: Arc<dyn Collective<CpuBackend>>) -> Decoder<CpuBackend> {
    let backend = Arc::new(CpuBackend::new(CpuOptions { threads: 1, ..CpuOptions::default() }).unwrap());
    let shard = Shard { tp_rank, tp_size, ..Shard::default() };
    Decoder::new(model, backend, &DecoderOptions { shard, scan_values: false, ..options() }, Groups::of_tensor(collective)).unwrap()
}

#[test]
fn batches_chunks_and_ranks_give_the_same_bits() {
    let Some(model) = open() else { return };
    let tokens = sequences(31, 33, 12, 49152);
    let mut single = rank(&model, 0, 1, Arc::new(forge_net::Solo::default()));
    let expected = run(&mut single, &tokens, &alone(&tokens));
    assert_same_bits(&run(&mut single, &tokens, &together(&tokens)), &expected, "33 together");
    assert_same_bits(&run(&mut single, &tokens, &chunked(&tokens, 7)), &expected, "chunks of 7");
    let (tokens, expected) = (&tokens[..3], &expected[..3]);
    for size in [2, 4, 8] {
        let ranks = local::group(GroupOptions::new(size, Epoch::default())).unwrap();
        std::thread::scope(|scope| {
            for (index, handle) in ranks.into_iter().enumerate() {
                let model = &model;
                scope.spawn(move || {
                    let mut decoder = rank(model, index, size, Arc::new(handle));
                    let logits = run(&mut decoder, tokens, &together(tokens));
                    assert_same_bits(&logits, expected, &format!("rank {index} of {size}"));
                });
            }
        });
    }
}

#[test]
fn its_metadata_gives_its_size_and_memory() {
    let Some(model) = open() else { return };
    let summary = model.summary();
    assert_eq!((summary.family, summary.parameters, summary.quantization.main_type()), ("llama", 134_515_008, "Q4_1"));
    let memory = model.memory(&options()).unwrap();
    let file = std::fs::metadata(model.checkpoint().path()).unwrap().len() as usize;
    assert!(memory.weights_bytes < file && memory.weights_bytes > file * 9 / 10, "{memory:?} of {file}");
    // Keys and values of 3 heads of 64 in 30 layers, f32, 16 slots.
    assert_eq!(memory.kv_block_bytes, 2 * 30 * 3 * 64 * 16 * 4);
}
