//! Safetensors: cut and changed headers, types that are not read.

use forge_model::ModelError;

use super::folders::{llama_config, llama_weights, open_folder};

#[test]
fn every_prefix_of_a_safetensors_header_and_some_of_the_data_is_refused() {
    let weights = llama_weights();
    let header = 8 + u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
    let lengths = (0..header + 64).chain((header..weights.len()).step_by(997)).chain([weights.len() - 1]);
    for length in lengths {
        let result = forge_model::safetensors::parse_header(&weights[..length], |_| true);
        assert!(matches!(result, Err(ModelError::Malformed { .. })), "{length}: {result:?}");
    }
    let mut longer = weights.clone();
    longer.push(0);
    assert!(forge_model::safetensors::parse_header(&longer, |_| true).is_err());
}

#[test]
fn any_changed_header_byte_of_safetensors_gives_a_directory_or_an_error() {
    let weights = llama_weights();
    let header = 8 + u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
    for at in 0..header {
        for value in [0, b'"', b'9', b'}', 0xff] {
            let mut changed = weights[..].to_vec();
            changed[at] = value;
            if let Ok(tensors) = forge_model::safetensors::parse_header(&changed, |_| true) {
                assert!(tensors.values().all(|tensor| tensor.bytes.end <= changed.len()));
            }
        }
    }
}

#[test]
fn safetensors_of_other_types_are_named_unless_ignored() {
    use safetensors::tensor::{Dtype, TensorView};
    let bytes = llama_weights();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let with = |name: &str, dtype: Dtype, data: &[u8], shape: Vec<usize>| {
        let mut tensors: Vec<(String, TensorView<'_>)> = file.tensors().into_iter().filter(|(existing, _)| existing != name).collect();
        tensors.push((name.to_owned(), TensorView::new(dtype, shape, data).unwrap()));
        open_folder(&llama_config(), &safetensors::serialize(tensors, None).unwrap())
    };
    let text = with("model.norm.weight", Dtype::I64, &[0; 256], vec![32]).unwrap_err().to_string();
    assert!(text.contains("tensor model.norm.weight has type I64"), "{text}");
    let text = with("model.norm.weight", Dtype::F8_E5M2, &[0; 32], vec![32]).unwrap_err().to_string();
    assert!(text.contains("F8_E5M2"), "{text}");
    assert!(with("model.layers.0.self_attn.rotary_emb.inv_freq", Dtype::I64, &[0; 64], vec![8]).is_ok());
    let text = with("model.layers.0.self_attn.rotary_emb.other", Dtype::F32, &[0; 32], vec![8]).unwrap_err().to_string();
    assert!(text.contains("does not use: model.layers.0.self_attn.rotary_emb.other"), "{text}");
}

/// Of two entries of one name the library keeps the last; the bytes of the first are then nobody's.
#[test]
fn a_tensor_that_is_there_twice_is_refused() {
    let file = |header: &str, data: usize| [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat();
    let entry = |name: &str, start: usize| format!(r#""{name}":{{"dtype":"F32","shape":[2],"data_offsets":[{start},{}]}}"#, start + 8);
    let sound = file(&format!("{{{},{}}}", entry("a", 0), entry("b", 8)), 16);
    assert_eq!(forge_model::safetensors::parse_header(&sound, |_| true).unwrap().len(), 2);
    for (first, second) in [(0, 8), (8, 0)] {
        let twice = file(&format!("{{{},{}}}", entry("a", first), entry("a", second)), 16);
        let refused = forge_model::safetensors::parse_header(&twice, |_| true);
        assert!(matches!(&refused, Err(ModelError::Malformed { .. })), "{refused:?}");
    }
}
