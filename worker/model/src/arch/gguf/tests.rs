use forge_kernels::DType;

use super::*;
use crate::arch::{PositionSpec, RopeScaling, RopeSpec, RouterGroups, RouterScore};
use crate::gguf::metadata::{Array, Value};

struct File {
    values: Vec<(String, Value)>,
    tensors: BTreeMap<String, TensorEntry>,
}

fn number(number: u64) -> Value {
    Value::Unsigned(number)
}

/// A file of an architecture with what all have.
fn file(name: &str) -> File {
    let mut file = File { values: vec![("general.architecture".to_owned(), Value::String(name.to_owned()))], tensors: BTreeMap::new() };
    for (key, value) in [
        ("embedding_length", number(64)),
        ("block_count", number(6)),
        ("context_length", number(512)),
        ("feed_forward_length", number(96)),
        ("attention.head_count", number(4)),
        ("attention.layer_norm_rms_epsilon", Value::Float(1e-5)),
        ("attention.layer_norm_epsilon", Value::Float(1e-4)),
    ] {
        file = file.with(key, value);
    }
    file.tensor("token_embd.weight", &[100, 64])
}

impl File {
    fn with(mut self, key: &str, value: Value) -> Self {
        let Value::String(name) = &self.values[0].1 else { panic!("the first is the architecture") };
        let key = format!("{name}.{key}");
        self.values.push((key, value));
        self
    }

    fn tensor(mut self, name: &str, shape: &[usize]) -> Self {
        self.tensors.insert(name.to_owned(), TensorEntry { dtype: DType::F32, shape: shape.to_vec(), source: 0, bytes: 0..0 });
        self
    }

    fn read(&self) -> Result<Architecture> {
        from_gguf(&Metadata::of(self.values.clone()), &self.tensors)
    }

    fn rope(&self) -> RopeSpec {
        let PositionSpec::Rope(mut rope) = self.read().unwrap().position else { panic!("it rotates") };
        rope.tables.remove(0)
    }

    fn refused(&self) -> String {
        self.read().unwrap_err().to_string()
    }
}

#[test]
fn experts_make_a_llama_file_mixtral() {
    assert_eq!(file("llama").read().unwrap().family, "llama");
    let mixtral = file("llama").with("expert_count", number(4)).with("expert_used_count", number(2)).read().unwrap();
    let experts = mixtral.experts.unwrap();
    assert_eq!((mixtral.family, experts.count, experts.router.per_token, experts.router.normalize), ("mixtral", 4, 2, true));
    assert!(experts.layers.iter().all(|has| *has));
    assert!(file("gemma").with("expert_count", number(4)).refused().contains("gemma.expert_count = 4"));
}

#[test]
fn the_router_of_deepseek_files_follows_its_keys_and_tensors() {
    let deepseek = |gating: u64| {
        file("deepseek2")
            .with("expert_count", number(8))
            .with("expert_used_count", number(3))
            .with("expert_feed_forward_length", number(16))
            .with("expert_gating_func", number(gating))
            .with("expert_group_count", number(4))
            .with("expert_group_used_count", number(2))
            .with("expert_weights_scale", Value::Float(2.5))
            .with("expert_weights_norm", Value::Bool(true))
            .with("attention.kv_lora_rank", number(16))
            .with("attention.key_length", number(24))
            .with("attention.value_length", number(12))
            .with("rope.dimension_count", number(8))
            .tensor("blk.1.ffn_gate_inp.weight", &[8, 64])
            .tensor("blk.2.ffn_gate_inp.weight", &[8, 64])
            .tensor("blk.1.ffn_up_shexp.weight", &[32, 64])
            .tensor("blk.1.exp_probs_b.bias", &[8])
    };
    let three = deepseek(2).read().unwrap();
    let experts = three.experts.clone().unwrap();
    assert_eq!(three.family, "deepseek_v3");
    assert_eq!(experts.layers, [false, true, true, false, false, false]);
    assert_eq!((experts.router.score, experts.router.normalize, experts.router.scale), (RouterScore::Sigmoid, true, 2.5));
    assert_eq!(experts.router.groups, Some(RouterGroups { count: 4, kept: 2, best_two: true }));
    assert!(experts.router.correction_bias);
    assert_eq!(experts.shared.unwrap().mlp.intermediate_size, 32);
    let latent = three.attention.latent.unwrap();
    assert_eq!((latent.query_rank, latent.kv_rank, latent.plain_dim, latent.rope_dim), (None, 16, 16, 8));
    assert_eq!((three.attention.kv_heads, three.attention.value_dim), (4, 12));
    assert_eq!(deepseek(1).read().unwrap().family, "deepseek_v2");
    assert!(deepseek(9).refused().contains("expert_gating_func = 9"));
    assert!(deepseek(2).with("nextn_predict_layers", number(1)).refused().contains("nextn_predict_layers = 1"));
}

#[test]
fn windows_follow_the_architecture_or_the_files_own_pattern() {
    let windows = |file: File| file.read().unwrap().attention.windows;
    let five_of_six = [Some(9), Some(9), Some(9), Some(9), Some(9), None];
    let gemma3 = || file("gemma3").with("attention.sliding_window", number(9));
    assert_eq!(windows(gemma3()), five_of_six);
    assert_eq!(windows(gemma3().with("attention.sliding_window_pattern", number(3)))[..3], [Some(9), Some(9), None]);
    let pattern = Value::Array(Array::Bool(vec![false, true, false, false, false, false]));
    assert_eq!(windows(gemma3().with("attention.sliding_window_pattern", pattern))[..2], [None, Some(9)]);
    assert_eq!(windows(file("gemma2"))[..2], [Some(4096), None]);
    assert_eq!(windows(file("phi3").with("attention.sliding_window", number(9))), [Some(9); 6]);
    assert_eq!(windows(file("phi3").with("attention.sliding_window", number(0))), [None; 6]);
    assert_eq!(windows(file("llama")), [None; 6]);
    let olmo3 = file("olmo2").with("attention.sliding_window", number(9)).read().unwrap();
    assert_eq!((olmo3.family, &olmo3.attention.windows[2..4]), ("olmo3", &[Some(9), None][..]));
    assert_eq!(file("olmo2").read().unwrap().family, "olmo2");
    assert!(file("qwen2").with("attention.sliding_window", number(9)).refused().contains("qwen2.attention.sliding_window = 9"));
    let short = Value::Array(Array::Bool(vec![true]));
    assert!(gemma3().with("attention.sliding_window_pattern", short).refused().contains("6 booleans"));
}

#[test]
fn ollama_has_names_of_its_own_for_both_bases() {
    let gemma3 = || file("gemma3").with("attention.sliding_window", number(9));
    let bases = |file: File| match file.read().unwrap().position {
        PositionSpec::Rope(rope) => rope.tables.iter().map(|table| table.theta).collect::<Vec<_>>(),
        other => panic!("{other:?}"),
    };
    let of = |global: &str, local: &str| bases(gemma3().with(global, Value::Float(2e6)).with(local, Value::Float(300.0)));
    assert_eq!(of("rope.global.freq_base", "rope.local.freq_base"), [2e6, 300.0]);
    assert_eq!(of("rope.freq_base", "rope.local.freq_base"), of("rope.freq_base", "rope.freq_base_swa"));
    let both = gemma3().with("rope.freq_base_swa", Value::Float(1e4)).with("rope.local.freq_base", Value::Float(300.0)).refused();
    assert!(both.contains("gemma3.rope.local.freq_base: is 300, and gemma3.rope.freq_base_swa is 10000"), "{both}");
}

#[test]
fn gemmas_have_what_their_files_do_not_say() {
    let gemma2 = file("gemma2").read().unwrap();
    assert_eq!((gemma2.embedding.scale, gemma2.norm.weight_offset), (8.0, 0.0));
    assert_eq!((gemma2.attention.softcap, gemma2.head.softcap), (Some(50.0), Some(30.0)));
    assert!(gemma2.block.attention_post_norm && gemma2.block.mlp_post_norm && gemma2.head.tied);
    assert_eq!(gemma2.attention.scale, 0.25);
    let gemma3 = file("gemma3").with("attention.sliding_window", number(9)).with("rope.freq_base", Value::Float(1e6));
    let gemma3 = gemma3.with("rope.scaling.type", Value::String("linear".to_owned())).with("rope.scaling.factor", Value::Float(8.0));
    let PositionSpec::Rope(rope) = gemma3.read().unwrap().position else { panic!("it rotates") };
    assert_eq!((rope.tables[0].theta, &rope.tables[0].scaling), (1e6, &RopeScaling::Linear { factor: 8.0 }));
    assert_eq!((rope.tables[1].theta, &rope.tables[1].scaling), (1e4, &RopeScaling::Default));
    assert_eq!(rope.of_layer[4..], [Some(1), Some(0)]);
}

#[test]
fn scalings_are_read_from_keys_and_tensors() {
    let text = |text: &str| Value::String(text.to_owned());
    assert_eq!(file("llama").rope().scaling, RopeScaling::Default);
    assert_eq!(file("llama").tensor("rope_freqs.weight", &[8]).rope().scaling, RopeScaling::Tensor);
    assert_eq!(file("llama").with("rope.scale_linear", Value::Float(2.0)).rope().scaling, RopeScaling::Linear { factor: 2.0 });
    let yarn = file("qwen2").with("rope.scaling.type", text("yarn")).with("rope.scaling.factor", Value::Float(4.0));
    let yarn = yarn.with("rope.scaling.original_context_length", number(128));
    assert!(matches!(
        yarn.rope().scaling,
        RopeScaling::Yarn { factor: 4.0, original_context: 128.0, beta_fast: 32.0, beta_slow: 1.0, truncate: true, attention_factor }
            if (attention_factor - (0.1 * 4f64.ln() + 1.0)).abs() < 1e-12
    ));
    let longrope = file("phi3").tensor("rope_factors_long.weight", &[8]).tensor("rope_factors_short.weight", &[8]);
    let longrope = longrope.with("rope.scaling.attn_factor", Value::Float(1.19)).with("rope.scaling.original_context_length", number(128));
    assert_eq!((longrope.rope().scaling.stored_choice(128), longrope.rope().attention_factor(1)), (Some(0), 1.19));
    assert!(file("llama").with("rope.scaling.type", text("su")).refused().contains("rope.scaling.type = \"su\""));
    assert!(file("llama").with("rope.scaling.type", text("linear")).refused().contains("rope.scaling.factor"));
    let both = file("llama").tensor("rope_freqs.weight", &[8]).with("rope.scaling.factor", Value::Float(2.0));
    assert!(both.refused().contains("beside the tensor rope_freqs.weight"));
}

#[test]
fn norms_of_layer_0_and_a_key_tell_how_a_layer_is_put_together() {
    let norm = |name: &str| format!("blk.0.{name}.weight");
    let neox = |parallel| {
        file("gptneox").tensor(&norm("attn_norm"), &[64]).tensor(&norm("ffn_norm"), &[64]).with("use_parallel_residual", parallel)
    };
    assert_eq!(neox(Value::Bool(true)).read().unwrap().block.order, BlockOrder::Parallel);
    assert_eq!(neox(Value::Bool(false)).read().unwrap().block.order, BlockOrder::Sequential);
    let stablelm = file("stablelm").tensor(&norm("attn_norm"), &[64]);
    assert_eq!(stablelm.read().unwrap().block.order, BlockOrder::Parallel);
    assert_eq!(stablelm.tensor(&norm("ffn_norm"), &[64]).read().unwrap().block.order, BlockOrder::Sequential);
    let falcon = file("falcon").tensor(&norm("attn_norm"), &[64]).read().unwrap().block;
    assert!(falcon.order == BlockOrder::Parallel && !falcon.mlp_pre_norm);
    let two = file("falcon").tensor(&norm("attn_norm"), &[64]).tensor(&norm("attn_norm_2"), &[64]).read().unwrap().block;
    assert!(two.order == BlockOrder::Parallel && two.mlp_pre_norm);
}

#[test]
fn keys_that_ask_for_another_computation_are_refused_by_name() {
    let sections = |numbers: Vec<i32>| Value::Array(Array::I32(numbers));
    for (key, refused, off) in [
        ("attention.causal", Value::Bool(false), Value::Bool(true)),
        ("attention.output_scale", Value::Float(2.0), Value::Float(0.0)),
        ("attention.key_length_swa", number(32), number(0)),
        ("attention.relative_buckets_count", number(32), number(0)),
        ("rope.dimension_sections", sections(vec![16, 24, 24, 0]), sections(vec![0; 4])),
        ("rope.local.freq_base", Value::Float(1e4), Value::Float(0.0)),
        ("rope.scaling.yarn_ext_factor", Value::Float(0.5), Value::Float(1.0)),
        ("expert_group_scale", Value::Float(2.0), Value::Float(0.0)),
        ("experts_per_group", number(2), number(0)),
        ("activation_sparsity_scale", Value::Array(Array::F32(vec![1.0])), Value::Array(Array::F32(Vec::new()))),
        ("router_logit_softcapping", Value::Float(30.0), Value::Float(0.0)),
        ("nextn_predict_layers", number(1), number(0)),
    ] {
        let message = file("llama").with(key, refused).refused();
        assert!(message.contains(&format!("llama.{key} = ")), "{key}: {message}");
        assert!(file("llama").with(key, off).read().is_ok(), "{key}");
    }
    assert!(file("llama").with("rope.scaling.finetuned", Value::Bool(true)).with("tensor_data_layout", number(1)).read().is_ok());
}

#[test]
fn factors_and_limits_name_their_key() {
    for (name, key) in [
        ("granite", "attention.scale"),
        ("granite", "embedding_scale"),
        ("granite", "residual_scale"),
        ("granite", "logit_scale"),
        ("gemma2", "attn_logit_softcapping"),
        ("gemma2", "final_logit_softcapping"),
        ("olmo", "attention.clamp_kqv"),
        ("mpt", "attention.max_alibi_bias"),
    ] {
        for value in [f64::NAN, f64::INFINITY, 1e-60] {
            let message = file(name).with("logit_scale", Value::Float(2.0)).with(key, Value::Float(value)).read();
            if (key, value) == ("attention.max_alibi_bias", 1e-60) {
                // Slopes of nearly 1 each.
                assert!(message.is_ok());
                continue;
            }
            let message = message.unwrap_err().to_string();
            assert!(message.contains(key), "{name} {key} = {value}: {message}");
        }
    }
    let negative = file("gemma2").with("attn_logit_softcapping", Value::Float(-50.0)).refused();
    assert!(negative.contains("attn_logit_softcapping: is -50"), "{negative}");
}

#[test]
fn senseless_values_name_their_key() {
    for (key, value) in [
        ("block_count", number(1 << 40)),
        ("block_count", number(1 << 20)),
        ("attention.head_count", number(1 << 20)),
        ("attention.head_count", Value::Array(Array::U32(vec![4; 6]))),
        ("attention.head_count_kv", number(3)),
        ("embedding_length", Value::Float(64.0)),
        ("rope.freq_base", Value::Float(f64::NAN)),
        ("rope.dimension_count", number(99)),
        ("attention.sliding_window", Value::Bool(true)),
        ("attention.layer_norm_rms_epsilon", Value::Float(-1.0)),
    ] {
        let mut file = file("llama");
        file.values.retain(|(existing, _)| existing != &format!("llama.{key}"));
        let message = file.with(key, value.clone()).refused();
        assert!(message.contains("GGUF metadata"), "{key} = {value:?}: {message}");
    }
}
