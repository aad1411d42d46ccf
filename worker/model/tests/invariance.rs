//! Promise P2 on the decoder: a sequence's logits do not depend on the batch, the chunks, the blocks' size or place,
//! the number of threads, nor on a copied block, bit for bit; and with keys and values stored in 16 bits too.

mod common;

use std::sync::Arc;

use common::build::{self, Gguf, Shape};
use common::{alone, assert_same_bits, chunked, fixture, options, run, sequences, together};
use forge_kernels::{CpuBackend, CpuOptions, KvDType};
use forge_model::{Decoder, DecoderOptions, LoadMode, Model, StepModel, StepPlan};

const SHAPES: [Shape; 3] = [
    // SmolLM2's arrangement: nine heads in three groups.
    Shape { family: "llama", hidden: 96, layers: 2, heads: 9, kv_heads: 3, head_dim: 32, inner: 320, vocabulary: 200 },
    Shape { family: "qwen2", hidden: 64, layers: 2, heads: 4, kv_heads: 2, head_dim: 16, inner: 160, vocabulary: 150 },
    Shape { family: "gpt2", hidden: 64, layers: 2, heads: 4, kv_heads: 4, head_dim: 16, inner: 256, vocabulary: 130 },
];

fn open(file: &Gguf) -> (tempfile::TempDir, Model) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    file.write(&path);
    (folder, Model::open(path, LoadMode::Mmap).unwrap())
}

fn decoder_of(model: &Model, threads: usize, options: &DecoderOptions) -> Decoder<CpuBackend> {
    let backend = CpuBackend::new(CpuOptions { threads, ..CpuOptions::default() }).unwrap();
    model.decoder(Arc::new(backend), options).unwrap()
}

#[test]
fn alone_or_among_33_and_in_any_chunks() {
    for shape in &SHAPES {
        for kind in [build::F32, build::F16, build::BF16, build::Q4_0, build::Q4_1, build::Q8_0] {
            let (_folder, model) = open(&build::gguf(shape, kind, 3));
            let tokens = sequences(5, 33, 64, shape.vocabulary);
            let mut decoder = decoder_of(&model, 2, &options());
            let what = |name: &str| format!("{} kind {kind}: {name}", shape.family);
            let expected = run(&mut decoder, &tokens, &alone(&tokens));
            assert!(expected[0].iter().any(|value| *value != expected[0][0]), "logits must differ for the test to mean anything");
            assert_same_bits(&run(&mut decoder, &tokens, &together(&tokens)), &expected, &what("33 together"));
            for chunk in [1, 7, 64] {
                assert_same_bits(&run(&mut decoder, &tokens, &chunked(&tokens, chunk)), &expected, &what(&format!("chunks of {chunk}")));
            }
            let mut single = decoder_of(&model, 1, &options());
            assert_same_bits(&run(&mut single, &tokens, &together(&tokens)), &expected, &what("one thread"));
        }
    }
}

#[test]
fn any_block_size_and_kv_type() {
    let (_folder, model) = open(&build::gguf(&SHAPES[0], build::Q4_1, 8));
    let tokens = sequences(6, 9, 64, SHAPES[0].vocabulary);
    for kv_dtype in [KvDType::F32, KvDType::F16, KvDType::BF16, KvDType::Int8] {
        let sized = |block_size| DecoderOptions { block_size, kv_blocks: 1024, kv_dtype, ..options() };
        let expected = run(&mut decoder_of(&model, 2, &sized(16)), &tokens, &alone(&tokens));
        for block_size in [1, 5, 8, 32, 64] {
            let logits = run(&mut decoder_of(&model, 2, &sized(block_size)), &tokens, &chunked(&tokens, 7));
            assert_same_bits(&logits, &expected, &format!("{kv_dtype}, blocks of {block_size}"));
        }
    }
}

#[test]
fn sliding_windows_do_not_depend_on_chunks_or_blocks() {
    let model = Model::open(fixture("qwen2"), LoadMode::Mmap).unwrap();
    let tokens = sequences(9, 9, 64, 96);
    let expected = run(&mut decoder_of(&model, 2, &options()), &tokens, &alone(&tokens));
    for (block_size, chunk) in [(1, 3), (4, 1), (64, 7)] {
        let sized = DecoderOptions { block_size, kv_blocks: 640, ..options() };
        let logits = run(&mut decoder_of(&model, 2, &sized), &tokens, &chunked(&tokens, chunk));
        assert_same_bits(&logits, &expected, &format!("blocks of {block_size}, chunks of {chunk}"));
    }
}

#[test]
fn a_copied_block_continues_as_the_original() {
    let (_folder, model) = open(&build::gguf(&SHAPES[1], build::Q8_0, 4));
    let mut decoder = decoder_of(&model, 2, &DecoderOptions { block_size: 8, ..options() });
    let tokens: Vec<u32> = (1..=10).collect();
    let plan = |first: usize, table: &[u32], copies: Vec<(u32, u32)>| {
        let positions: Vec<u32> = (first as u32..tokens.len() as u32).collect();
        StepPlan {
            tokens: tokens[first..].to_vec(),
            slots: positions.iter().map(|&position| table[position as usize / 8] * 8 + position % 8).collect(),
            sequences: vec![forge_kernels::SequenceSlice {
                row_start: 0,
                row_count: positions.len() as u32,
                first_position: first as u32,
                table_start: 0,
                table_len: 2,
            }],
            block_tables: table.to_vec(),
            logits_rows: vec![positions.len() as u32 - 1],
            positions,
            block_copies: copies,
            ..StepPlan::default()
        }
    };
    let (mut expected, mut forked) = (Vec::new(), Vec::new());
    decoder.step(&plan(0, &[3, 4], vec![]), &mut expected).unwrap();
    // The second sequence shares block 3 and goes on in a copy of block 4: its last token is computed again there.
    decoder.step(&plan(9, &[3, 7], vec![(4, 7)]), &mut forked).unwrap();
    assert_same_bits(&[forked], &[expected], "copy on write");
}

#[test]
fn refused_plans_leave_the_state_untouched() {
    let model = Model::open(fixture("llama"), LoadMode::Mmap).unwrap();
    let tokens = sequences(2, 1, 64, 96);
    let mut decoder = decoder_of(&model, 2, &options());
    let expected = run(&mut decoder, &tokens, &alone(&tokens));
    let info = decoder.info().clone();
    let mut logits = Vec::new();
    let steps = common::plans(&info, &tokens, &chunked(&tokens, 5));
    let mut actual = Vec::new();
    for plan in &steps {
        let bad = StepPlan { tokens: vec![96; plan.tokens.len()], ..plan.clone() };
        assert!(matches!(decoder.step(&bad, &mut logits), Err(forge_model::ModelError::Plan { field: "tokens", .. })));
        decoder.step(plan, &mut logits).unwrap();
        actual.extend_from_slice(&logits);
    }
    assert_same_bits(&[actual], &expected, "after refusals");
}

#[test]
fn an_older_epoch_is_refused_and_a_newer_one_raises_the_fence() {
    use forge_shared::ids::Epoch;
    let model = Model::open(fixture("gpt2"), LoadMode::Mmap).unwrap();
    let mut decoder = decoder_of(&model, 1, &DecoderOptions { epoch: Epoch(3), ..options() });
    let mut step = |epoch| decoder.step(&StepPlan { epoch: Epoch(epoch), ..StepPlan::default() }, &mut Vec::new());
    assert!(matches!(step(2), Err(forge_model::ModelError::StaleEpoch { .. })));
    step(3).unwrap();
    step(5).unwrap();
    assert!(matches!(step(4), Err(forge_model::ModelError::StaleEpoch { .. })));
}

#[test]
fn what_changes_bits_changes_the_numerics_id() {
    use forge_model::Overrides;
    let id = |overrides: &Overrides, options: &DecoderOptions| {
        let model = Model::open_with(fixture("llama"), LoadMode::Mmap, overrides).unwrap();
        decoder_of(&model, 1, options).info().numerics_id.clone()
    };
    let scaled = |text: &str| Overrides { rope_scaling: Some(text.parse().unwrap()), ..Overrides::default() };
    let short = DecoderOptions { max_model_len: 32, ..options() };
    let dynamic = scaled("type=dynamic,factor=2,original=16");
    let ids = [
        id(&Overrides::default(), &options()),
        id(&Overrides::default(), &DecoderOptions { kv_dtype: KvDType::Int8, ..options() }),
        id(&Overrides { sliding_window: Some(5), ..Overrides::default() }, &options()),
        id(&scaled("type=linear,factor=2"), &options()),
        id(&scaled("type=linear,factor=3"), &options()),
        id(&dynamic, &short),
        id(&dynamic, &DecoderOptions { max_model_len: 24, ..options() }),
    ];
    for (index, id) in ids.iter().enumerate() {
        assert!(!ids[..index].contains(id), "{id} is there twice");
    }
    // Without such a scaling, the length that a decoder is built for changes nothing.
    assert_eq!(ids[0], id(&Overrides::default(), &short));
}
