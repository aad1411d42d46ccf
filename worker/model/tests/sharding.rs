//! Promise P2 across ranks: 1, 2, 4 and 8 tensor-parallel ranks and pipeline stages give equal bits, dense and
//! quantized, for every family and for shares that are uneven or empty.

mod common;

use std::sync::Arc;

use common::build::{self, Shape};
use common::ranks::{one_thread, run_group, run_stages};
use common::{assert_same_bits, options, plans, run, sequences, together};
use forge_kernels::CpuBackend;
use forge_model::{Decoder, DecoderOptions, Groups, LoadMode, Model, ModelError, Shard, StepModel};
use forge_net::{Collective, GroupOptions, local};
use forge_shared::ids::Epoch;

/// Heads arranged in every way the leaves distinguish.
const SHAPES: [Shape; 7] = [
    // Nine heads, three groups: leaves are groups, 2 + 1, and 1 + 1 + 1 + 0.
    Shape { family: "llama", hidden: 96, layers: 2, heads: 9, kv_heads: 3, head_dim: 32, inner: 320, vocabulary: 201 },
    // Eight heads in two groups: leaves are heads, ranks of 4 and 8 share KV heads.
    Shape { family: "llama", hidden: 64, layers: 2, heads: 8, kv_heads: 2, head_dim: 32, inner: 256, vocabulary: 128 },
    // Six heads in three groups: shares of three heads cut a group, so KV heads are repeated.
    Shape { family: "llama", hidden: 64, layers: 2, heads: 6, kv_heads: 3, head_dim: 32, inner: 96, vocabulary: 100 },
    // Ten groups: eight runs of whole groups.
    Shape { family: "qwen2", hidden: 64, layers: 2, heads: 20, kv_heads: 10, head_dim: 32, inner: 416, vocabulary: 77 },
    // Heads narrower than a block: quantized, leaves are merged in pairs.
    Shape { family: "qwen2", hidden: 64, layers: 2, heads: 4, kv_heads: 2, head_dim: 16, inner: 160, vocabulary: 150 },
    Shape { family: "gpt2", hidden: 64, layers: 2, heads: 4, kv_heads: 4, head_dim: 16, inner: 256, vocabulary: 130 },
    // One head, one block of inner units, fewer tokens than ranks: most ranks have nothing.
    Shape { family: "gpt2", hidden: 32, layers: 1, heads: 1, kv_heads: 1, head_dim: 32, inner: 32, vocabulary: 5 },
];

fn open(shape: &Shape, kind: u32) -> (tempfile::TempDir, Model) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    build::gguf(shape, kind, 12).write(&path);
    (folder, Model::open(path, LoadMode::Mmap).unwrap())
}

#[test]
fn every_number_of_ranks_gives_the_same_bits() {
    for (index, shape) in SHAPES.iter().enumerate() {
        for kind in [build::F32, build::BF16, build::Q4_0, build::Q4_1, build::Q8_0] {
            let (_folder, model) = open(shape, kind);
            let tokens = sequences(21, 5, 30, shape.vocabulary);
            let expected = run(&mut model.decoder(one_thread(), &options()).unwrap(), &tokens, &together(&tokens));
            for size in [1, 2, 4, 8] {
                for (rank, logits) in run_group(&model, &options(), size, &tokens, &together(&tokens)).iter().enumerate() {
                    assert_same_bits(logits, &expected, &format!("shape {index}, kind {kind}, rank {rank} of {size}"));
                }
            }
        }
    }
}

#[test]
fn transposed_matrices_are_sharded_like_the_others() {
    let model = Model::open(common::fixture("gpt2"), LoadMode::Mmap).unwrap();
    let tokens = sequences(22, 5, 30, 96);
    let expected = run(&mut model.decoder(one_thread(), &options()).unwrap(), &tokens, &together(&tokens));
    for size in [2, 4] {
        for logits in run_group(&model, &options(), size, &tokens, &together(&tokens)) {
            assert_same_bits(&logits, &expected, &format!("{size} ranks"));
        }
    }
}

#[test]
fn pipeline_stages_give_the_same_bits() {
    for shape in [&SHAPES[0], &SHAPES[5]] {
        let (_folder, model) = open(shape, build::Q4_1);
        let tokens = sequences(23, 6, 30, shape.vocabulary);
        let expected = run(&mut model.decoder(one_thread(), &options()).unwrap(), &tokens, &together(&tokens));
        let schedule = together(&tokens);
        let actual = run_stages(&model, &options(), 1, &tokens, &schedule);
        assert_same_bits(&actual, &expected, shape.family);
        let shard = Shard { layers: Some(1..2), ..Shard::default() };
        let mut second = model.decoder(one_thread(), &DecoderOptions { shard, ..options() }).unwrap();
        let plan = plans(&second.info().clone(), &tokens, &schedule).remove(0);
        let refused = second.step(&plan, &mut Vec::new());
        assert!(matches!(refused, Err(ModelError::Plan { field: "stage", .. })), "{refused:?}");
    }
}

#[test]
fn impossible_layouts_are_refused_with_the_nearest() {
    let (_folder, model) = open(&SHAPES[0], build::Q8_0);
    let with = |shard| model.memory(&DecoderOptions { shard, ..options() });
    for (size, expected) in [(3, "2"), (5, "4"), (16, "8")] {
        match with(Shard { tp_size: size, ..Shard::default() }) {
            Err(ModelError::Layout { nearest, .. }) => assert_eq!(nearest, expected),
            other => panic!("{other:?}"),
        }
    }
    for layers in [0..3, 1..1, 2..3] {
        assert!(matches!(with(Shard { layers: Some(layers), ..Shard::default() }), Err(ModelError::Layout { .. })));
    }
    let alone: Arc<dyn Collective<CpuBackend>> = Arc::new(forge_net::Solo::default());
    let shard = Shard { tp_size: 2, ..Shard::default() };
    let refused = Decoder::new(&model, one_thread(), &DecoderOptions { shard, ..options() }, Groups::of_tensor(alone));
    assert!(matches!(refused.err(), Some(ModelError::Option { option: "shard.tp_size", .. })));
}

#[test]
fn a_rank_that_fails_wakes_its_peers() {
    let (_folder, model) = open(&SHAPES[1], build::F32);
    let tokens = sequences(24, 2, 9, SHAPES[1].vocabulary);
    let mut ranks = local::group(GroupOptions::new(2, Epoch::default())).unwrap();
    let gone = ranks.pop();
    let collective: Arc<dyn Collective<CpuBackend>> = Arc::new(ranks.remove(0));
    let shard = Shard { tp_size: 2, ..Shard::default() };
    let mut decoder = Decoder::new(&model, one_thread(), &DecoderOptions { shard, ..options() }, Groups::of_tensor(collective)).unwrap();
    let plan = plans(decoder.info(), &tokens, &together(&tokens)).remove(0);
    let start = std::time::Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| drop(gone));
        let error = decoder.step(&plan, &mut Vec::new()).unwrap_err();
        assert!(error.to_string().contains("rank 1 has left"), "{error}");
    });
    assert!(start.elapsed() < std::time::Duration::from_secs(10));
}

#[test]
fn memory_of_the_ranks_adds_up() {
    for (shape, kind) in [(&SHAPES[0], build::Q4_1), (&SHAPES[5], build::F16)] {
        let (_folder, model) = open(shape, kind);
        let of = |tp_rank, tp_size| {
            let shard = Shard { tp_rank, tp_size, ..Shard::default() };
            model.memory(&DecoderOptions { shard, ..options() }).unwrap()
        };
        let whole = of(0, 1);
        let head = if model.architecture().head.tied { 0 } else { 1 };
        // Every matrix of the file is counted once (norms and biases are copied).
        let matrices: usize = model.checkpoint().tensors().values().filter(|t| t.shape.len() == 2).map(|t| t.bytes.len()).sum();
        assert_eq!(whole.weights_bytes, matrices, "head {head}");
        assert_eq!(whole.kv_block_bytes, whole.largest_kv_block_bytes);
        for size in [2, 4] {
            let parts: Vec<_> = (0..size).map(|rank| of(rank, size)).collect();
            let replicated = if shape.family == "gpt2" { (size - 1) * 64 * shape.hidden * 2 } else { 0 };
            assert_eq!(parts.iter().map(|part| part.weights_bytes).sum::<usize>(), whole.weights_bytes + replicated);
            assert_eq!(parts.iter().map(|part| part.kv_block_bytes).sum::<usize>(), whole.kv_block_bytes);
            assert_eq!(parts[0].largest_kv_block_bytes, parts.iter().map(|part| part.kv_block_bytes).max().unwrap());
        }
    }
}
