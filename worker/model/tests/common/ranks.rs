//! A model over several ranks of this process, tensor-parallel or as pipeline stages.

use std::sync::Arc;

use forge_kernels::{CpuBackend, CpuOptions};
use forge_model::{Decoder, DecoderOptions, Groups, Model, Shard, StageInput, StageModel, StageOutput, StepModel};
use forge_net::{Collective, GroupOptions, local};
use forge_shared::ids::Epoch;

use super::{Schedule, plans, run};

pub fn one_thread() -> Arc<CpuBackend> {
    Arc::new(CpuBackend::new(CpuOptions { threads: 1, ..CpuOptions::default() }).unwrap())
}

/// Runs the same plans on all ranks of a group, each in its thread; returns every rank's logits.
pub fn run_group(model: &Model, options: &DecoderOptions, size: usize, tokens: &[Vec<u32>], schedule: &Schedule) -> Vec<Vec<Vec<f32>>> {
    let ranks = local::group(GroupOptions::new(size, Epoch::default())).unwrap();
    std::thread::scope(|scope| {
        let threads: Vec<_> = ranks
            .into_iter()
            .enumerate()
            .map(|(tp_rank, rank)| {
                scope.spawn(move || {
                    let shard = Shard { tp_rank, tp_size: size, ..Shard::default() };
                    let collective: Arc<dyn Collective<CpuBackend>> = Arc::new(rank);
                    let options = DecoderOptions { shard, ..options.clone() };
                    let mut decoder = Decoder::new(model, one_thread(), &options, Groups::of_tensor(collective)).unwrap();
                    run(&mut decoder, tokens, schedule)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Logits of a model cut into two stages before layer `cut`.
pub fn run_stages(model: &Model, options: &DecoderOptions, cut: usize, tokens: &[Vec<u32>], schedule: &Schedule) -> Vec<Vec<f32>> {
    let stage = |layers| {
        let shard = Shard { layers: Some(layers), ..Shard::default() };
        model.decoder(one_thread(), &DecoderOptions { shard, ..options.clone() }).unwrap()
    };
    let (mut first, mut second) = (stage(0..cut), stage(cut..model.architecture().layers));
    let info = first.info().clone();
    let mut all = vec![Vec::new(); tokens.len()];
    let (mut hidden, mut logits) = (Vec::new(), Vec::new());
    for (plan, parts) in plans(&info, tokens, schedule).iter().zip(schedule) {
        first.run_stage(plan, StageInput::Tokens, StageOutput::Hidden(&mut hidden)).unwrap();
        second.run_stage(plan, StageInput::Hidden(&hidden), StageOutput::Logits(&mut logits)).unwrap();
        let mut rest = &logits[..];
        for &(sequence, count) in parts {
            let (own, others) = rest.split_at(count * info.vocab_size);
            all[sequence].extend_from_slice(own);
            rest = others;
        }
    }
    all
}
