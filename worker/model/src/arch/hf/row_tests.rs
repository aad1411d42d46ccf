//! Configurations as transformers 4 wrote them for published models: keys that this library's version 5 spells otherwise
//! or leaves out. (tests/fixtures/model/rows are written by version 5.)

use forge_kernels::{ActivationKind, NormKind, RopeStyle};
use serde_json::{Value, json};

use super::from_config_json;
use crate::arch::{Architecture, BlockOrder, PositionSpec, QkNormOver, RopeScaling, RopeSpec, RouterScore};

/// A configuration with what most have, and its differences.
fn read(differences: Value) -> Architecture {
    let mut config = json!({
        "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
        "intermediate_size": 96, "vocab_size": 100
    });
    for (key, value) in differences.as_object().unwrap() {
        config[key] = value.clone();
    }
    from_config_json(&config).unwrap_or_else(|error| panic!("{config}: {error}"))
}

fn rope(architecture: &Architecture) -> &RopeSpec {
    let PositionSpec::Rope(rope) = &architecture.position else { panic!("{} rotates", architecture.family) };
    &rope.tables[0]
}

#[test]
fn a_window_of_null_is_none_and_an_absent_one_is_the_familys() {
    let windows = |model: Value| read(model).attention.windows;
    assert_eq!(windows(json!({ "model_type": "mistral", "sliding_window": null })), [None; 4]);
    assert_eq!(windows(json!({ "model_type": "mistral" })), [Some(4096); 4]);
    assert_eq!(windows(json!({ "model_type": "mixtral" })), [None; 4]);
    assert_eq!(windows(json!({ "model_type": "phi3", "sliding_window": 2047 })), [Some(2047); 4]);
    assert_eq!(windows(json!({ "model_type": "gemma2" })), [Some(4096), None, Some(4096), None]);
    let gemma3 = json!({ "model_type": "gemma3_text", "sliding_window": 512, "sliding_window_pattern": 2 });
    assert_eq!(windows(gemma3), [Some(512), None, Some(512), None]);
    let neo = json!({ "model_type": "gpt_neo", "num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]] });
    assert_eq!(windows(neo), [None, Some(256), None, Some(256)]);
    let gpt_oss = json!({ "model_type": "gpt_oss", "head_dim": 16 });
    assert_eq!(windows(gpt_oss), [Some(128), None, Some(128), None]);
}

/// The whole text part of google/gemma-3-4b-it, and that of 27b with fewer layers: what is as in the class is left out.
#[test]
fn text_parts_leave_out_what_is_as_in_the_class() {
    let text = |changes: Value| {
        let mut text = json!({
            "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
            "rope_scaling": { "factor": 8.0, "rope_type": "linear" }, "sliding_window": 1024
        });
        text.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        from_config_json(&json!({ "model_type": "gemma3", "text_config": text, "vision_config": {} })).unwrap()
    };
    let four = text(json!({}));
    let heads = |model: &Architecture| (model.attention.heads, model.attention.kv_heads, model.attention.head_dim);
    assert_eq!((four.vocab_size, four.layers, four.hidden_size, four.context_length), (262_208, 34, 2560, 131_072));
    assert_eq!((heads(&four), four.mlp.intermediate_size), ((8, 4, 256), 10240));
    let large = text(json!({ "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 168 }));
    assert_eq!((heads(&large), large.vocab_size, large.attention.scale), ((32, 16, 128), 262_208, 168f32.powf(-0.5)));
    let mistral = json!({ "model_type": "mistral3", "text_config": { "model_type": "mistral", "hidden_size": 5120, "head_dim": 128 } });
    let mistral = from_config_json(&mistral).unwrap();
    assert_eq!((heads(&mistral), mistral.layers, mistral.vocab_size), ((32, 8, 128), 32, 32_000));
}

#[test]
fn factors_of_0_are_refused_by_their_key() {
    for (family, key) in [
        ("granite", "logits_scaling"),
        ("granite", "embedding_multiplier"),
        ("granite", "residual_multiplier"),
        ("granite", "attention_multiplier"),
        ("cohere", "logit_scale"),
    ] {
        let mut config = json!({
            "model_type": family, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
            "intermediate_size": 96, "vocab_size": 100
        });
        for value in [0.0, 1e-60, 1e60] {
            config[key] = json!(value);
            let refused = from_config_json(&config).unwrap_err().to_string();
            assert!(refused.contains(key) || (value != 0.0 && refused.contains("scale")), "{family} {key} = {value}: {refused}");
        }
    }
}

#[test]
fn the_files_original_context_says_nothing_of_a_layer_types_own() {
    let yarn = json!({ "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 2048 });
    let local = json!({ "rope_type": "default", "rope_theta": 1e4 });
    let original = |parameters: Value| {
        let gemma = read(json!({
            "model_type": "gemma3_text", "num_hidden_layers": 6, "original_max_position_embeddings": 512, "rope_parameters": parameters
        }));
        match rope(&gemma).scaling {
            RopeScaling::Yarn { original_context, .. } => original_context,
            ref other => panic!("{other:?}"),
        }
    };
    assert_eq!(original(json!({ "full_attention": yarn, "sliding_attention": local })), 2048.0);
    let llama = read(json!({ "model_type": "llama", "original_max_position_embeddings": 512, "rope_scaling": yarn }));
    assert!(matches!(rope(&llama).scaling, RopeScaling::Yarn { original_context: 512.0, .. }));
}

#[test]
fn dense_layers_are_no_more_than_layers() {
    let config = |dense: Vec<u64>| {
        json!({
            "model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
            "intermediate_size": 96, "vocab_size": 100, "mlp_only_layers": dense
        })
    };
    assert_eq!(from_config_json(&config(vec![0, 2])).unwrap().experts.unwrap().layers, [false, true, false, true]);
    assert!(from_config_json(&config(vec![0; 5])).unwrap_err().to_string().contains("mlp_only_layers"));
}

#[test]
fn gemma_3_of_transformers_4_has_two_tables_and_nests_its_text() {
    let text = json!({
        "model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 96,
        "vocab_size": 100, "rope_scaling": { "factor": 8.0, "rope_type": "linear" }, "sliding_window": 1024
    });
    let gemma = read(json!({ "model_type": "gemma3", "text_config": text, "vision_config": {} }));
    let PositionSpec::Rope(tables) = &gemma.position else { panic!("it rotates") };
    assert_eq!((tables.tables[0].theta, &tables.tables[0].scaling), (1e6, &RopeScaling::Linear { factor: 8.0 }));
    assert_eq!((tables.tables[1].theta, &tables.tables[1].scaling), (1e4, &RopeScaling::Default));
    assert_eq!(tables.of_layer, [Some(1), Some(1), Some(1), Some(1), Some(1), Some(0)]);
    assert_eq!((gemma.attention.scale, gemma.embedding.scale, gemma.attention.head_dim), (1.0 / 16.0, 8.0, 256));
    assert!(gemma.head.tied && gemma.attention.softcap.is_none());
    let flat = json!({ "model_type": "gemma3_text", "rope_parameters": { "rope_theta": 1e6 } });
    let mut config =
        json!({ "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 9 });
    config.as_object_mut().unwrap().extend(flat.as_object().unwrap().clone());
    assert!(from_config_json(&config).unwrap_err().to_string().contains("rope_parameters for all layers alike"));
}

#[test]
fn the_oldest_gemma_says_gelu_and_means_its_approximation() {
    assert_eq!(read(json!({ "model_type": "gemma", "hidden_act": "gelu" })).mlp.activation, ActivationKind::GeluTanh);
    assert_eq!(read(json!({ "model_type": "phi3", "hidden_act": "gelu" })).mlp.activation, ActivationKind::GeluErf);
}

#[test]
fn phi_3_calls_longrope_su_and_its_original_context_is_its_own_key() {
    let factors = vec![1.5; 8];
    let phi3 = read(json!({
        "model_type": "phi3", "max_position_embeddings": 131_072, "original_max_position_embeddings": 4096,
        "rope_scaling": { "type": "su", "long_factor": factors, "short_factor": factors }
    }));
    let RopeScaling::LongRope { original_context, long, .. } = &rope(&phi3).scaling else { panic!("{:?}", rope(&phi3)) };
    assert_eq!(*original_context, 4096.0);
    assert!((long.attention_factor - (1.0 + 32f64.ln() / 4096f64.ln()).sqrt()).abs() < 1e-12);
    let partial = read(json!({ "model_type": "phi3", "partial_rotary_factor": 0.75 }));
    assert_eq!(rope(&partial).rotary_dim, 12);
}

#[test]
fn older_families_name_their_sizes_and_rotations_themselves() {
    let neox = read(json!({ "model_type": "gpt_neox", "rotary_pct": 0.5, "rotary_emb_base": 5000, "use_parallel_residual": false }));
    assert_eq!((rope(&neox).rotary_dim, rope(&neox).theta, neox.block.order), (8, 5000.0, BlockOrder::Sequential));
    assert_eq!(rope(&read(json!({ "model_type": "gpt_neox" }))).rotary_dim, 4);
    let gptj = json!({ "model_type": "gptj", "n_embd": 64, "n_layer": 2, "n_head": 1, "vocab_size": 9, "rotary_dim": null });
    let gptj = from_config_json(&gptj).unwrap();
    assert_eq!((rope(&gptj).rotary_dim, rope(&gptj).style, gptj.head.bias), (64, RopeStyle::Gptj, true));
    let phi = read(json!({ "model_type": "phi", "partial_rotary_factor": 0.4 }));
    assert_eq!((rope(&phi).rotary_dim, phi.block.order, phi.block.mlp_pre_norm), (6, BlockOrder::Parallel, false));
    let bloom = from_config_json(&json!({ "model_type": "bloom", "n_embed": 64, "n_layer": 2, "num_attention_heads": 4, "vocab_size": 9 }));
    let bloom = bloom.unwrap();
    let PositionSpec::Alibi(alibi) = &bloom.position else { panic!("it does not rotate") };
    assert_eq!((alibi.slopes.as_slice(), bloom.embedding.norm), (&[0.25, 0.0625, 0.015_625, 0.003_906_25][..], true));
    let opt = read(json!({ "model_type": "opt", "ffn_dim": 96, "do_layer_norm_before": false, "word_embed_proj_dim": 32 }));
    assert_eq!((opt.block.order, opt.block.final_norm, opt.embedding.width), (BlockOrder::NormOfSum, false, 32));
    assert_eq!(opt.position, PositionSpec::Learned { offset: 2 });
}

#[test]
fn falcons_differ_by_three_switches() {
    let falcon = |changes: Value| {
        let mut config = json!({ "model_type": "falcon" });
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        read(config)
    };
    let seven = falcon(json!({ "multi_query": true, "parallel_attn": true, "num_kv_heads": 4 }));
    assert_eq!((seven.attention.kv_heads, seven.block.mlp_pre_norm), (1, false));
    let forty = falcon(json!({ "new_decoder_architecture": true, "num_kv_heads": 2 }));
    assert_eq!((forty.attention.kv_heads, forty.block.mlp_pre_norm, forty.block.order), (2, true, BlockOrder::Parallel));
    let rw = falcon(json!({ "multi_query": false, "parallel_attn": false, "alibi": true, "bias": true }));
    assert_eq!((rw.attention.kv_heads, rw.block.order, rw.mlp.bias), (4, BlockOrder::Sequential, true));
    assert!(matches!(&rw.position, PositionSpec::Alibi(alibi) if alibi.rounded && alibi.factor == 0.25));
    let config = json!({ "model_type": "falcon", "new_decoder_architecture": true, "parallel_attn": false, "hidden_size": 64,
                         "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 9 });
    let refused = from_config_json(&config).unwrap_err().to_string();
    assert!(refused.contains("parallel_attn = false") && refused.contains("new_decoder_architecture = true"), "{refused}");
}

#[test]
fn norms_of_queries_and_keys_and_factors_follow_their_keys() {
    let over = |model: Value| read(model).attention.qk_norm.map(|norm| (norm.over, norm.norm.kind, norm.norm.bias));
    assert_eq!(over(json!({ "model_type": "qwen3" })), Some((QkNormOver::Head, NormKind::Rms, false)));
    assert_eq!(over(json!({ "model_type": "olmo2" })), Some((QkNormOver::Full, NormKind::Rms, false)));
    assert_eq!(over(json!({ "model_type": "cohere" })), None);
    assert_eq!(over(json!({ "model_type": "cohere", "use_qk_norm": true })), Some((QkNormOver::EachHead, NormKind::Layer, false)));
    assert_eq!(over(json!({ "model_type": "phi", "qk_layernorm": true })), Some((QkNormOver::Head, NormKind::Layer, true)));
    let granite = read(json!({ "model_type": "granite", "logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 3 }));
    assert_eq!((granite.head.scale, granite.block.residual_scale, granite.embedding.scale), (0.25, 0.5, 3.0));
    assert_eq!(granite.attention.scale, 1.0);
    let olmo = read(json!({ "model_type": "olmo", "clip_qkv": 8.0 }));
    assert_eq!((olmo.attention.clip, olmo.norm.weight, olmo.norm.kind), (Some(8.0), false, NormKind::Layer));
    let mpt = json!({ "model_type": "mpt", "d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 9,
                      "attn_config": { "clip_qkv": 6, "alibi": true, "softmax_scale": null } });
    assert_eq!(from_config_json(&mpt).unwrap().attention.clip, Some(6.0));
}

#[test]
fn experts_and_their_router_follow_their_keys() {
    let lite = read(json!({
        "model_type": "deepseek_v2", "q_lora_rank": null, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
        "v_head_dim": 12, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 2, "moe_intermediate_size": 10,
        "first_k_dense_replace": 1, "topk_method": "greedy", "moe_layer_freq": 1, "scoring_func": "softmax",
        "rope_scaling": { "type": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
                          "original_max_position_embeddings": 4096 }
    }));
    let latent = lite.attention.latent.unwrap();
    assert_eq!((latent.query_rank, lite.attention.head_dim, lite.attention.value_dim), (None, 24, 12));
    let magnitude = 0.1 * 0.707 * 40f64.ln() + 1.0;
    assert!((f64::from(lite.attention.scale) - magnitude * magnitude / 24f64.sqrt()).abs() < 1e-6);
    assert_eq!(rope(&lite).attention_factor(1), 1.0);
    let experts = lite.experts.unwrap();
    assert_eq!((experts.layers.as_slice(), experts.shared.unwrap().mlp.intermediate_size), (&[false, true, true, true][..], 20));
    assert_eq!(experts.router.groups, None);

    let sparse = read(json!({ "model_type": "qwen3_moe", "decoder_sparse_step": 2, "mlp_only_layers": [3], "num_experts": 8 }));
    assert_eq!(sparse.experts.unwrap().layers, [false, true, false, false]);
    let phimoe = read(json!({ "model_type": "phimoe", "num_key_value_heads": 2 })).experts.unwrap();
    assert_eq!(phimoe.router.score, RouterScore::SparseMixer { jitter: 0.01 });
    let oss = read(json!({ "model_type": "gpt_oss", "head_dim": 16 }));
    assert!(matches!(rope(&oss).scaling, RopeScaling::Yarn { factor: 32.0, truncate: false, .. }));
    assert_eq!(oss.experts.unwrap().expert.activation, ActivationKind::ClampedSwiglu { limit: 7.0, alpha: 1.702 });
}

#[test]
fn values_that_cannot_be_are_refused_by_key() {
    let base = json!({ "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
                       "intermediate_size": 96, "vocab_size": 9 });
    for (model, key, value, named) in [
        ("mistral", "sliding_window", json!(0), "sliding_window"),
        ("mistral", "sliding_window", json!(-1), "sliding_window"),
        ("mistral", "sliding_window", json!("4096"), "sliding_window"),
        ("gemma2", "query_pre_attn_scalar", json!(0), "query_pre_attn_scalar"),
        ("gemma2", "query_pre_attn_scalar", json!(null), "query_pre_attn_scalar"),
        ("gemma2", "attn_logit_softcapping", json!(-1.0), "attn_logit_softcapping"),
        ("gemma2", "layer_types", json!(["full_attention"]), "layer_types"),
        ("gemma2", "layer_types", json!(7), "layer_types"),
        ("gemma3_text", "sliding_window_pattern", json!(0), "sliding_window_pattern"),
        ("gemma", "use_bidirectional_attention", json!(true), "use_bidirectional_attention = true"),
        ("phi3", "rope_scaling", json!({ "type": "longrope", "long_factor": [1.0], "short_factor": [1.0] }), "short_factor"),
        ("phi3", "rope_scaling", json!({ "type": "longrope", "long_factor": "x", "short_factor": [1.0] }), "long_factor"),
        ("llama", "rope_scaling", json!({ "type": "dynamic", "factor": "NaN" }), "factor"),
        ("llama", "rope_scaling", json!({ "type": "yarn", "factor": 0 }), "factor"),
        ("llama", "rope_scaling", json!({ "type": "llama3", "factor": 8 }), "low_freq_factor"),
        ("qwen3_moe", "decoder_sparse_step", json!(0), "decoder_sparse_step"),
        ("qwen3_moe", "mlp_only_layers", json!([-1]), "mlp_only_layers"),
        ("mixtral", "num_experts_per_tok", json!(9), "experts per token"),
        ("mixtral", "num_local_experts", json!(1e9), "num_local_experts"),
        ("olmo", "clip_qkv", json!(-8), "clip_qkv"),
        ("granite", "residual_multiplier", json!("half"), "residual_multiplier"),
        ("deepseek_v3", "rope_interleave", json!(false), "rope_interleave"),
        ("deepseek_v3", "qk_rope_head_dim", json!(u64::MAX), "qk_rope_head_dim"),
        ("bloom", "apply_residual_connection_post_layernorm", json!(true), "apply_residual_connection_post_layernorm"),
        ("gpt_neo", "attention_types", json!([[["local"], 5_000_000_000u64]]), "attention_types"),
        ("gpt_neo", "attention_types", json!([[["chunked"], 4]]), "attention_types"),
        ("falcon", "num_attention_heads", json!(u64::MAX), "num_attention_heads"),
    ] {
        let mut config = base.clone();
        for (alias, size) in [("n_layer", 4), ("n_head", 4), ("num_layers", 4), ("num_heads", 4)] {
            config[alias] = json!(size);
        }
        config["model_type"] = json!(model);
        config[key] = value.clone();
        let Err(error) = from_config_json(&config) else { panic!("{model}: {key} = {value} was read") };
        let text = error.to_string();
        assert!(text.contains("config.json") && text.contains(named), "{model}: {key} = {value}: {text}");
    }
}
