//! Promise P2 across ranks where shares are uneven in ways that the fixtures' sizes do not have: norms over all heads
//! where ranks hold the same KV heads or none, experts with fewer inner units than there are ranks.

mod common;

use std::sync::Arc;

use common::build::Random;
use common::{assert_same_bits, options, run, sequences, together};
use forge_kernels::{CpuBackend, CpuOptions};
use forge_model::{Decoder, DecoderOptions, Groups, LoadMode, Model, Shard};
use forge_net::{Collective, GroupOptions, local};
use forge_shared::ids::Epoch;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

const HIDDEN: usize = 96;
const VOCABULARY: usize = 50;

/// Names and shapes of tensors.
type Shapes = Vec<(String, Vec<usize>)>;

/// A folder of random weights, opened.
fn open(config: &Value, shapes: &Shapes) -> (tempfile::TempDir, Model) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let mut random = Random::new(7);
    let mut values = |shape: &[usize]| -> Vec<u8> {
        let (scale, offset) = if shape.len() == 1 { (0.3, 1.0) } else { (0.4, 0.0) };
        (0..shape.iter().product()).flat_map(|_| (random.signed() * scale + offset).to_le_bytes()).collect()
    };
    let bytes: Vec<Vec<u8>> = shapes.iter().map(|(_, shape)| values(shape)).collect();
    let views = shapes.iter().zip(&bytes).map(|((name, shape), bytes)| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
    let model = Model::open(folder.path(), LoadMode::Mmap).unwrap();
    (folder, model)
}

/// What all these models have, and what each layer has under its prefix.
fn shapes(layers: usize, of_layer: &[(&str, Vec<usize>)]) -> Shapes {
    let mut all = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCABULARY, HIDDEN]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
        ("lm_head.weight".to_owned(), vec![VOCABULARY, HIDDEN]),
    ];
    for layer in 0..layers {
        all.extend(of_layer.iter().map(|(name, shape)| (format!("model.layers.{layer}.{name}"), shape.clone())));
    }
    all
}

/// Logits of every rank of a group.
fn run_group(model: &Model, size: usize, tokens: &[Vec<u32>]) -> Vec<Vec<Vec<f32>>> {
    let ranks = local::group(GroupOptions::new(size, Epoch::default())).unwrap();
    std::thread::scope(|scope| {
        let start = |(tp_rank, rank)| {
            scope.spawn(move || {
                let shard = Shard { tp_rank, tp_size: size, ..Shard::default() };
                let collective: Arc<dyn Collective<CpuBackend>> = Arc::new(rank);
                let backend = Arc::new(CpuBackend::new(CpuOptions { threads: 1, ..CpuOptions::default() }).unwrap());
                let mut decoder =
                    Decoder::new(model, backend, &DecoderOptions { shard, ..options() }, Groups::of_tensor(collective)).unwrap();
                run(&mut decoder, tokens, &together(tokens))
            })
        };
        let threads: Vec<_> = ranks.into_iter().enumerate().map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn check(what: &str, config: &Value, shapes: &Shapes) {
    let (_folder, model) = open(config, shapes);
    let tokens = sequences(31, 4, 20, VOCABULARY);
    let expected = &run_group(&model, 1, &tokens)[0];
    assert!(expected[0].iter().any(|value| *value != expected[0][0]), "{what}: all logits are equal: nothing is tested");
    for size in [2, 4, 8] {
        for (rank, logits) in run_group(&model, size, &tokens).iter().enumerate() {
            assert_same_bits(logits, expected, &format!("{what}: rank {rank} of {size}"));
        }
    }
}

fn config(model_type: &str, heads: usize, kv_heads: usize, more: &Value) -> Value {
    let mut config = json!({
        "model_type": model_type, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "intermediate_size": 40, "tie_word_embeddings": false, "rope_theta": 1000.0,
    });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

#[test]
fn norms_over_all_heads_count_every_key_head_once() {
    // Six heads in three groups: two ranks of three heads cut a group. Eight in two: ranks of one head share KV heads.
    // Sixteen in one: seven of eight ranks have none.
    for (heads, kv_heads) in [(6, 3), (8, 2), (16, 1), (12, 4), (3, 3)] {
        let head_dim = HIDDEN / heads;
        let kv = kv_heads * head_dim;
        let of_layer = [
            ("self_attn.q_proj.weight", vec![HIDDEN, HIDDEN]),
            ("self_attn.k_proj.weight", vec![kv, HIDDEN]),
            ("self_attn.v_proj.weight", vec![kv, HIDDEN]),
            ("self_attn.o_proj.weight", vec![HIDDEN, HIDDEN]),
            ("self_attn.q_norm.weight", vec![HIDDEN]),
            ("self_attn.k_norm.weight", vec![kv]),
            ("post_attention_layernorm.weight", vec![HIDDEN]),
            ("post_feedforward_layernorm.weight", vec![HIDDEN]),
            ("mlp.gate_proj.weight", vec![40, HIDDEN]),
            ("mlp.up_proj.weight", vec![40, HIDDEN]),
            ("mlp.down_proj.weight", vec![HIDDEN, 40]),
        ];
        check(&format!("{heads} heads, {kv_heads} KV heads"), &config("olmo2", heads, kv_heads, &json!({})), &shapes(2, &of_layer));
    }
}

#[test]
fn experts_are_split_by_their_own_width() {
    // Inner widths of 3 and 5: ranks without any; the shared expert is wider.
    for inner in [3, 5, 20] {
        let mut of_layer = vec![
            ("self_attn.q_proj.weight".to_owned(), vec![HIDDEN, HIDDEN]),
            ("self_attn.k_proj.weight".to_owned(), vec![HIDDEN / 2, HIDDEN]),
            ("self_attn.v_proj.weight".to_owned(), vec![HIDDEN / 2, HIDDEN]),
            ("self_attn.q_proj.bias".to_owned(), vec![HIDDEN]),
            ("self_attn.k_proj.bias".to_owned(), vec![HIDDEN / 2]),
            ("self_attn.v_proj.bias".to_owned(), vec![HIDDEN / 2]),
            ("self_attn.o_proj.weight".to_owned(), vec![HIDDEN, HIDDEN]),
            ("input_layernorm.weight".to_owned(), vec![HIDDEN]),
            ("post_attention_layernorm.weight".to_owned(), vec![HIDDEN]),
            ("mlp.gate.weight".to_owned(), vec![7, HIDDEN]),
            ("mlp.shared_expert_gate.weight".to_owned(), vec![1, HIDDEN]),
        ];
        let experts = (0..7).map(|expert| (format!("mlp.experts.{expert}"), inner)).chain([("mlp.shared_expert".to_owned(), 21)]);
        for (name, inner) in experts {
            of_layer.push((format!("{name}.gate_proj.weight"), vec![inner, HIDDEN]));
            of_layer.push((format!("{name}.up_proj.weight"), vec![inner, HIDDEN]));
            of_layer.push((format!("{name}.down_proj.weight"), vec![HIDDEN, inner]));
        }
        let of_layer: Vec<(&str, Vec<usize>)> = of_layer.iter().map(|(name, shape)| (name.as_str(), shape.clone())).collect();
        let more = json!({
            "num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": inner, "norm_topk_prob": true,
            "shared_expert_intermediate_size": 21, "decoder_sparse_step": 1, "mlp_only_layers": [],
        });
        check(&format!("experts of {inner}"), &config("qwen2_moe", 4, 2, &more), &shapes(2, &of_layer));
    }
}
