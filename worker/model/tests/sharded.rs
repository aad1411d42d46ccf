//! A replica of several ranks as one model: every product of tensor, pipeline and expert ranks has the bits of one process,
//! with steps one after another and side by side; ranks that fail, panic or are late end it with a typed error.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::ranks::one_thread;
use common::{assert_same_bits, chunked, fixture, options, plans, run, sequences, together};
use forge_kernels::{CpuBackend, KvDType};
use forge_model::sharded::{LoadedRank, MakeBackend, RankLayout, RankSetup, ShardedOptions};
use forge_model::{
    DecoderOptions, LoadMode, Model, ModelError, ShardedModel, StageInput, StageModel, StageOutput, StepModel, StepModelInfo, StepPlan,
};
use forge_net::{Collective, GroupOptions, local};
use forge_shared::ids::Epoch;

const PATIENCE: Duration = Duration::from_secs(60);

/// `stages` stages of as equal numbers of layers as can be, the first with fewer; no more than there are layers.
fn layout(model: &Model, tensor: usize, stages: usize, expert: usize) -> RankLayout {
    let layers = model.architecture().layers;
    let stages = stages.min(layers);
    RankLayout { stages: (0..stages).map(|stage| stage * layers / stages..(stage + 1) * layers / stages).collect(), expert, tensor }
}

fn start(model: &Model, layout: &RankLayout, options: &DecoderOptions) -> Result<ShardedModel, ModelError> {
    let backends = (0..layout.ranks()).map(|_| -> MakeBackend<CpuBackend> { Box::new(|| Ok(one_thread())) });
    ShardedModel::local(model, layout, options, PATIENCE, backends.collect())
}

fn open(name: &str) -> Model {
    Model::open(fixture(name), LoadMode::Mmap).unwrap()
}

fn check(name: &str, options: &DecoderOptions, degrees: &[(usize, usize, usize)]) {
    let model = open(name);
    let vocabulary = model.architecture().vocab_size;
    let tokens = sequences(41, 5, 30, vocabulary);
    let schedule = chunked(&tokens, 7);
    let expected = run(&mut model.decoder(one_thread(), options).unwrap(), &tokens, &schedule);
    for &(tensor, stages, expert) in degrees {
        let layout = layout(&model, tensor, stages, expert);
        let mut sharded = start(&model, &layout, options).unwrap();
        assert_eq!(sharded.info().numerics_id, model.decoder(one_thread(), options).unwrap().info().numerics_id);
        let what = format!("{name} on {tensor} × {stages} × {expert}");
        assert_same_bits(&run(&mut sharded, &tokens, &schedule), &expected, &what);
        if sharded.pipeline().is_some() {
            assert_same_bits(&side_by_side(&mut sharded, &tokens), &expected, &format!("{what}, side by side"));
        }
    }
}

/// As [`run`] of every sequence by itself in chunks, with as many steps under way as may be.
fn side_by_side(model: &mut ShardedModel, tokens: &[Vec<u32>]) -> Vec<Vec<f32>> {
    let info = model.info().clone();
    // One sequence after another takes its steps: those of neighbours are under way together.
    let schedule: Vec<Vec<(usize, usize)>> = chunked(tokens, 7).into_iter().flatten().map(|part| vec![part]).collect();
    let mut all = vec![Vec::new(); tokens.len()];
    let mut logits = Vec::new();
    let mut under_way = std::collections::VecDeque::new();
    let pipeline = model.pipeline().unwrap();
    let depth = pipeline.depth();
    for (plan, parts) in plans(&info, tokens, &schedule).iter().zip(&schedule) {
        if under_way.len() == depth {
            pipeline.complete(&mut logits).unwrap();
            let sequence: usize = under_way.pop_front().unwrap();
            all[sequence].extend_from_slice(&logits);
        }
        pipeline.submit(plan).unwrap();
        under_way.push_back(parts[0].0);
    }
    assert!(matches!(pipeline.submit(&StepPlan::default()), Err(ModelError::Plan { field: "step", .. })), "no more than the depth");
    for sequence in under_way {
        pipeline.complete(&mut logits).unwrap();
        all[sequence].extend_from_slice(&logits);
    }
    assert!(matches!(pipeline.complete(&mut logits), Err(ModelError::Plan { field: "step", .. })), "nothing is under way");
    all
}

const DENSE: [(usize, usize, usize); 6] = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 3, 1), (2, 2, 1), (4, 3, 1)];
const MIXTURE: [(usize, usize, usize); 8] = [(2, 1, 1), (1, 1, 2), (1, 1, 4), (2, 1, 2), (1, 2, 2), (1, 3, 4), (2, 2, 2), (4, 2, 2)];

#[test]
fn dense_models_have_the_same_bits_on_every_layout() {
    for name in ["llama", "gpt2", "rows/olmo2-grouped", "quantized/llama-q4_k.gguf"] {
        check(name, &options(), &DENSE);
    }
}

#[test]
fn mixtures_have_the_same_bits_on_every_product_of_tensor_pipeline_and_expert_ranks() {
    // With biases, with a shared expert behind dense layers, with a gated shared expert, plain; dense and quantized.
    for name in ["rows/gpt_oss", "rows/deepseek_v2", "rows/qwen2_moe", "rows/mixtral", "quantized/qwen3moe-q4_0.gguf"] {
        check(name, &options(), &MIXTURE);
    }
}

#[test]
fn bytes_as_keys_and_values_have_the_same_bits_too() {
    let options = DecoderOptions { kv_dtype: KvDType::Int8, ..options() };
    check("llama", &options, &[(2, 3, 1)]);
    check("rows/mixtral", &options, &[(2, 1, 2)]);
}

#[test]
fn experts_that_cannot_be_divided_so_are_refused_with_the_nearest() {
    let refused = |name: &str, expert| {
        let model = open(name);
        match start(&model, &layout(&model, 1, 1, expert), &options()).err() {
            Some(ModelError::Rank { source, .. }) => match *source {
                ModelError::Layout { nearest, .. } => nearest,
                other => panic!("{other}"),
            },
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(refused("llama", 2), "1", "it has no experts");
    let experts = open("rows/mixtral").architecture().experts.as_ref().unwrap().count;
    assert_eq!(refused("rows/mixtral", experts.next_power_of_two() * 2), (1_usize << experts.ilog2()).to_string());
}

/// A rank that does what it is told at its n-th step.
struct Scripted {
    info: StepModelInfo,
    group: Option<Arc<dyn Collective<CpuBackend>>>,
    steps: usize,
    fault: Fault,
}

#[derive(Clone, Copy, PartialEq)]
enum Fault {
    None,
    Error,
    Panic,
    Late,
}

impl StageModel for Scripted {
    fn stage_info(&self) -> &StepModelInfo {
        &self.info
    }

    fn run_stage(&mut self, plan: &StepPlan, _input: StageInput<'_>, output: StageOutput<'_>) -> Result<(), ModelError> {
        self.steps += 1;
        if self.steps == 2 {
            match self.fault {
                Fault::None => {}
                Fault::Error => return Err(ModelError::Plan { field: "tokens", reason: "scripted".into() }),
                Fault::Panic => panic!("scripted panic"),
                Fault::Late => std::thread::sleep(Duration::from_millis(600)),
            }
        }
        if let Some(group) = &self.group {
            group.barrier()?;
        }
        match output {
            StageOutput::Hidden(values) => values.resize(plan.tokens.len(), 0.0),
            StageOutput::Logits(values) => {
                values.clear();
                values.extend(plan.tokens.iter().map(|token| *token as f32));
            }
            StageOutput::Nothing => {}
        }
        Ok(())
    }
}

/// Two stages of two tensor ranks, of which one has a fault.
fn scripted(faulty: usize, fault: Fault, deadline: Duration) -> Result<ShardedModel, ModelError> {
    let info = StepModelInfo {
        vocab_size: 1,
        max_model_len: 8,
        block_size: 8,
        kv_blocks: 1,
        max_step_rows: 8,
        max_logits_rows: 8,
        ..StepModelInfo::default()
    };
    let layout = RankLayout { stages: vec![0..1, 1..2], expert: 1, tensor: 2 };
    let groups = (0..2).flat_map(|_| local::group(GroupOptions { deadline: PATIENCE, ..GroupOptions::new(2, Epoch::default()) }).unwrap());
    let setup = |(rank, group): (usize, local::LocalRank)| {
        let group: Arc<dyn Collective<CpuBackend>> = Arc::new(group);
        let (info, of_rank) = (info.clone(), Some(group.clone()));
        let fault = if rank == faulty { fault } else { Fault::None };
        RankSetup {
            load: Box::new(move || Ok(LoadedRank::alone(Box::new(Scripted { info, group: of_rank, steps: 0, fault })))),
            abort: Box::new(move |reason| group.abort(reason)),
        }
    };
    ShardedModel::start(
        &layout,
        groups.enumerate().map(setup).collect(),
        ShardedOptions { deadline, ..ShardedOptions::new(Epoch::default()) },
    )
}

#[test]
fn a_rank_that_fails_panics_or_is_late_ends_the_replica_with_its_reason() {
    for faulty in 0..4 {
        for (fault, expected) in [(Fault::Error, "scripted"), (Fault::Panic, "scripted panic"), (Fault::Late, "did not come within")] {
            let deadline = if fault == Fault::Late { Duration::from_millis(150) } else { PATIENCE };
            let mut model = scripted(faulty, fault, deadline).unwrap();
            let info = model.info().clone();
            let tokens = vec![vec![0; 3]];
            let plans = plans(&info, &tokens, &chunked(&tokens, 1));
            let mut logits = Vec::new();
            let start = Instant::now();
            model.step(&plans[0], &mut logits).unwrap();
            let error = model.step(&plans[1], &mut logits).unwrap_err().to_string();
            assert!(error.contains(expected), "rank {faulty}: {error}");
            if fault != Fault::Late {
                assert!(error.starts_with(&format!("rank {faulty}: ")), "{error}");
            }
            let again = model.step(&plans[2], &mut logits).unwrap_err();
            assert!(matches!(&again, ModelError::Ended { reason } if reason.contains(expected)), "{again}");
            drop(model);
            assert!(start.elapsed() < Duration::from_secs(10), "rank {faulty}: nobody waits for it");
        }
    }
}

#[test]
fn bad_plans_are_refused_before_a_rank_sees_them() {
    let mut model = scripted(0, Fault::None, PATIENCE).unwrap();
    let tokens = vec![vec![0; 2]];
    let good = plans(&model.info().clone(), &tokens, &together(&tokens)).remove(0);
    let bad = StepPlan { slots: vec![99; 2], ..good.clone() };
    let mut logits = Vec::new();
    assert!(matches!(model.step(&bad, &mut logits), Err(ModelError::Plan { .. })));
    model.step(&StepPlan { epoch: Epoch(3), ..good.clone() }, &mut logits).unwrap();
    assert!(matches!(model.step(&good, &mut logits), Err(ModelError::StaleEpoch { .. })));
}

#[test]
fn ranks_that_are_not_alike_or_too_few_are_refused() {
    let layout = RankLayout { stages: vec![0..1, 1..2], expert: 1, tensor: 1 };
    let setup = |numerics_id: &str| {
        let info = StepModelInfo { numerics_id: numerics_id.into(), ..StepModelInfo::default() };
        RankSetup {
            load: Box::new(move || Ok(LoadedRank::alone(Box::new(Scripted { info, group: None, steps: 0, fault: Fault::None })))),
            abort: Box::new(|_| {}),
        }
    };
    let start = |setups| ShardedModel::start(&layout, setups, ShardedOptions::new(Epoch::default())).err();
    let refused = start(vec![setup("one"), setup("other")]);
    assert!(matches!(refused, Some(ModelError::RanksDiffer { rank: 1, field: "numerics id", .. })), "{refused:?}");
    assert!(matches!(start(vec![setup("one")]), Some(ModelError::Option { option: "layout", .. })));
}
