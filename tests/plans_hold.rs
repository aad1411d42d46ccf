//! What placement gives a rank is enough for what the rank loads: every family's tiny checkpoint, on every layout that can
//! be had. A worker refuses a plan that gives less, so a formula that forgets a tensor would never serve that model.

use std::path::{Path, PathBuf};

use forge_coordinator::placement::plan_alone;
use forge_model::sharded::RankLayout;
use forge_model::{DecoderOptions, LoadMode, Model};
use forge_shared::ids::{NodeId, ServiceName};
use forge_shared::plan::{DeviceView, Plan};
use forge_shared::spec::{ByteSize, Layout, ModelServiceSpec};
use forge_worker::prepare::{kv_dtype, model_facts};

const BLOCK_SIZE: usize = 16;

fn checkpoints() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model");
    let inside =
        |folder: &str| -> Vec<PathBuf> { std::fs::read_dir(root.join(folder)).unwrap().map(|entry| entry.unwrap().path()).collect() };
    let mut all = inside("rows");
    all.extend(inside("quantized").into_iter().filter(|path| path.extension().is_none_or(|ext| ext == "gguf")));
    all.extend(["llama", "gpt2"].map(|name| root.join(name)));
    all.sort();
    assert!(all.len() > 60, "{}", all.len());
    all
}

fn layouts() -> Vec<Layout> {
    let mut all = Vec::new();
    for tensor in [1, 2, 4, 8] {
        for pipeline in [1, 2, 3] {
            all.extend([1, 2, 4].map(|expert| Layout { tensor, pipeline, expert }));
        }
    }
    all
}

/// Bytes that each rank of a plan needs beyond what it was given; empty where all is well.
fn short(model: &Model, plan: &Plan) -> Vec<String> {
    let members = plan.ranks[0].tensor_size * plan.ranks[0].expert_size;
    let stages = plan.ranks.chunks(members).map(|stage| stage[0].layers.clone()).collect();
    let layout = RankLayout { stages, expert: plan.ranks[0].expert_size, tensor: plan.ranks[0].tensor_size };
    let mut short = Vec::new();
    for (number, rank) in plan.ranks.iter().enumerate() {
        let options = DecoderOptions {
            max_model_len: plan.max_model_len,
            block_size: plan.block_size,
            kv_blocks: plan.kv_blocks,
            kv_dtype: kv_dtype(plan.kv_cache_dtype),
            max_step_rows: plan.max_step_tokens,
            max_logits_rows: plan.max_batch_size,
            shard: layout.shard(number),
            ..DecoderOptions::single_sequence(plan.max_model_len)
        };
        let memory = model.memory(&options).unwrap();
        let needed = [
            ("weights", (memory.weights_bytes + memory.copied_bytes) as u64, rank.memory.weights_bytes),
            ("keys and values", (memory.kv_block_bytes * plan.kv_blocks) as u64, rank.memory.kv_bytes),
            ("workspace", (memory.workspace_bytes + memory.rope_bytes) as u64, rank.memory.workspace_bytes),
        ];
        for (what, needed_bytes, given_bytes) in needed.into_iter().filter(|(_, needed, given)| needed > given) {
            short.push(format!("rank {number}: {what}: {needed_bytes} needed, {given_bytes} given"));
        }
    }
    short
}

#[test]
fn a_plan_gives_every_rank_what_it_loads() {
    let device = DeviceView { node: NodeId::from("n"), device: 0, free_bytes: ByteSize(1 << 40), threads: 2 };
    let (mut placed, mut short_of) = (0, Vec::new());
    for path in checkpoints() {
        let model = Model::open(&path, LoadMode::Mmap).unwrap();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        for layout in layouts() {
            let spec = ModelServiceSpec {
                layout,
                block_size: BLOCK_SIZE,
                kv_memory: Some(ByteSize(8 << 20)),
                max_batch_size: 8,
                max_step_tokens: 64,
                ..ModelServiceSpec::default()
            };
            let facts = model_facts(&model, &spec).unwrap();
            let Ok(plan) = plan_alone(std::slice::from_ref(&device), &ServiceName::from("m"), &spec, &facts) else { continue };
            placed += 1;
            short_of.extend(short(&model, &plan).into_iter().map(|why| format!("{name} on {layout}: {why}")));
        }
    }
    assert!(placed > 500, "{placed} layouts were looked at");
    assert!(short_of.is_empty(), "{} of {placed}:\n{}", short_of.len(), short_of.join("\n"));
}
