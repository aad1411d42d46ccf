//! What the integration tests share: fixtures with their reference logits, and a driver that runs any schedule of
//! ragged steps over any [`StepModel`].

#![allow(dead_code)] // each test binary uses a part

pub mod build;
pub mod ranks;
pub mod rows;

use std::path::PathBuf;
use std::sync::Arc;

use forge_kernels::{CpuBackend, CpuOptions, KvDType, SequenceSlice};
use forge_model::{Decoder, DecoderOptions, LoadMode, Model, StepModel, StepPlan};
use safetensors::SafeTensors;

/// A file or folder of tests/fixtures/model.
pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/model").join(name)
}

/// Sequences and the logits transformers gave for them.
pub struct Golden {
    pub tokens: Vec<Vec<u32>>,
    pub logits: Vec<Vec<f32>>,
    /// For quantized files: without rounding the inputs of products.
    pub exact: Vec<Vec<f32>>,
    /// The longest sequence the reference was fixed for, where the file says it.
    pub max_model_len: Option<usize>,
}

impl Golden {
    pub fn read(name: &str) -> Golden {
        let bytes = std::fs::read(fixture(name)).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let words = |name: String| -> Option<Vec<[u8; 4]>> {
            let data = file.tensor(&name).ok()?.data().to_vec();
            Some(data.chunks_exact(4).map(|word| [word[0], word[1], word[2], word[3]]).collect())
        };
        let mut golden = Golden { tokens: Vec::new(), logits: Vec::new(), exact: Vec::new(), max_model_len: None };
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let longest = header.metadata().as_ref().and_then(|entries| entries.get("max_model_len"));
        golden.max_model_len = longest.map(|length| length.parse().unwrap());
        while let Some(tokens) = words(format!("tokens_{}", golden.tokens.len())) {
            let floats = |words: Vec<[u8; 4]>| words.into_iter().map(f32::from_le_bytes).collect();
            golden.logits.push(floats(words(format!("logits_{}", golden.tokens.len())).unwrap()));
            golden.exact.extend(words(format!("exact_{}", golden.tokens.len())).map(floats));
            golden.tokens.push(tokens.into_iter().map(u32::from_le_bytes).collect());
        }
        assert_eq!(golden.tokens.len(), 4, "{name}");
        golden
    }
}

/// Largest difference over largest reference value.
pub fn relative_difference(actual: &[f32], reference: &[f32]) -> f32 {
    assert_eq!(actual.len(), reference.len());
    assert!(actual.iter().all(|value| value.is_finite()));
    let difference = actual.iter().zip(reference).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    difference / reference.iter().map(|value| value.abs()).fold(0.0, f32::max)
}

/// Options big enough for every test: 64 positions, 40 sequences.
pub fn options() -> DecoderOptions {
    DecoderOptions {
        max_model_len: 64,
        block_size: 16,
        kv_blocks: 256,
        kv_dtype: KvDType::F32,
        max_step_rows: 2048,
        max_logits_rows: 8,
        ..DecoderOptions::single_sequence(64)
    }
}

pub fn backend() -> Arc<CpuBackend> {
    Arc::new(CpuBackend::new(CpuOptions { threads: 2, ..CpuOptions::default() }).unwrap())
}

pub fn decoder(path: impl Into<PathBuf>, options: &DecoderOptions) -> Decoder<CpuBackend> {
    Model::open(path.into(), LoadMode::Mmap).unwrap().decoder(backend(), options).unwrap()
}

/// How many tokens of which sequence each step computes, in row order.
pub type Schedule = Vec<Vec<(usize, usize)>>;

/// Every sequence whole, each in a step of its own.
pub fn alone(sequences: &[Vec<u32>]) -> Schedule {
    sequences.iter().enumerate().map(|(index, tokens)| vec![(index, tokens.len())]).collect()
}

/// All sequences whole in one step.
pub fn together(sequences: &[Vec<u32>]) -> Schedule {
    vec![sequences.iter().enumerate().map(|(index, tokens)| (index, tokens.len())).collect()]
}

/// All sequences side by side, `chunk` tokens of each per step: 1 is token-by-token decode.
pub fn chunked(sequences: &[Vec<u32>], chunk: usize) -> Schedule {
    let longest = sequences.iter().map(Vec::len).max().unwrap_or(0);
    let part = |tokens: &Vec<u32>, step: usize| tokens.len().saturating_sub(step * chunk).min(chunk);
    (0..longest.div_ceil(chunk))
        .map(|step| {
            sequences.iter().enumerate().map(|(index, tokens)| (index, part(tokens, step))).filter(|&(_, count)| count > 0).collect()
        })
        .collect()
}

/// The step plans of a schedule, logits wanted for every row. Blocks are given out in a scattered order.
pub fn plans(info: &forge_model::StepModelInfo, sequences: &[Vec<u32>], schedule: &Schedule) -> Vec<StepPlan> {
    // 97 is prime, so this visits every block once.
    let mut free = (0..info.kv_blocks).map(|index| ((index * 97 + 5) % info.kv_blocks) as u32);
    let mut tables: Vec<Vec<u32>> = vec![Vec::new(); sequences.len()];
    let mut computed = vec![0; sequences.len()];
    let mut plans = Vec::new();
    for (step, parts) in schedule.iter().enumerate() {
        let mut plan = StepPlan { step: step as u64, ..StepPlan::default() };
        for &(sequence, count) in parts {
            let (first, table) = (computed[sequence], &mut tables[sequence]);
            while table.len() * info.block_size < first + count {
                table.push(free.next().expect("enough blocks"));
            }
            plan.sequences.push(SequenceSlice {
                row_start: plan.tokens.len() as u32,
                row_count: count as u32,
                first_position: first as u32,
                table_start: plan.block_tables.len() as u32,
                table_len: table.len() as u32,
            });
            plan.block_tables.extend_from_slice(table);
            for position in first..first + count {
                plan.logits_rows.push(plan.tokens.len() as u32);
                plan.tokens.push(sequences[sequence][position]);
                plan.positions.push(position as u32);
                plan.slots.push(table[position / info.block_size] * info.block_size as u32 + (position % info.block_size) as u32);
            }
            computed[sequence] += count;
        }
        plans.push(plan);
    }
    plans
}

/// Logits of every position of every sequence.
pub fn run(model: &mut dyn StepModel, sequences: &[Vec<u32>], schedule: &Schedule) -> Vec<Vec<f32>> {
    let info = model.info().clone();
    let mut all = vec![Vec::new(); sequences.len()];
    let mut logits = Vec::new();
    for (plan, parts) in plans(&info, sequences, schedule).iter().zip(schedule) {
        model.step(plan, &mut logits).unwrap();
        let mut start = 0;
        for &(sequence, count) in parts {
            let end = start + count * info.vocab_size;
            all[sequence].extend_from_slice(&logits[start..end]);
            start = end;
        }
    }
    all
}

/// Equal bit for bit (also the sign of zero).
pub fn assert_same_bits(actual: &[Vec<f32>], expected: &[Vec<f32>], what: &str) {
    assert_eq!(actual.len(), expected.len());
    for (sequence, (actual, expected)) in actual.iter().zip(expected).enumerate() {
        assert_eq!(actual.len(), expected.len(), "{what}: sequence {sequence}");
        let differs = actual.iter().zip(expected).position(|(a, b)| a.to_bits() != b.to_bits());
        if let Some(at) = differs {
            panic!("{what}: sequence {sequence}: value {at} is {} instead of {}", actual[at], expected[at]);
        }
    }
}

/// `count` sequences of different lengths up to `longest`, ids below `vocabulary`, fixed by `seed`.
pub fn sequences(seed: u64, count: usize, longest: usize, vocabulary: usize) -> Vec<Vec<u32>> {
    let mut random = build::Random::new(seed);
    (0..count)
        .map(|_| {
            let length = 1 + random.below(longest);
            (0..length).map(|_| random.below(vocabulary) as u32).collect()
        })
        .collect()
}
