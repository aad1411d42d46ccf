//! The measurements on a tiny checkpoint: against the definition, in one step or many.

use std::path::Path;
use std::sync::Arc;

use forge_eval::distribution::log_softmax;
use forge_eval::perplexity::ScoredText;
use forge_eval::speed::{SpeedSizes, measure_speed};
use forge_eval::{EvalError, Protocol, TextSizes, measure_divergence, measure_perplexity, teacher_forced_logits, windows};
use forge_kernels::{CpuBackend, CpuOptions, KvDType};
use forge_model::{Decoder, DecoderOptions, LoadMode, Model, StepModel};

fn decoder(name: &str, kv_dtype: KvDType, step_rows: usize) -> Decoder<CpuBackend> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/model").join(name);
    let model = Model::open(folder, LoadMode::Mmap).expect("the fixture is there");
    let options = DecoderOptions { kv_dtype, max_step_rows: step_rows, ..DecoderOptions::single_sequence(64) };
    let backend = CpuBackend::new(CpuOptions { threads: 1, ..CpuOptions::default() }).expect("starts");
    model.decoder(Arc::new(backend), &options).expect("loads")
}

fn text() -> Vec<u32> {
    (0..150_u32).map(|index| (index * index * 7 + index * 3) % 96).collect()
}

#[test]
fn perplexity_is_that_of_the_definition_for_every_protocol_and_chunking() {
    let tokens = text();
    let token_bytes = vec![2; tokens.len()];
    let sizes = Some(TextSizes { bytes: 300, words: 20 });
    let scored = ScoredText { tokens: &tokens, token_bytes: &token_bytes, sizes };
    for protocol in [
        Protocol::Chunked { context: 32, beginning: Some(1) },
        Protocol::Chunked { context: 32, beginning: None },
        Protocol::Sliding { context: 40, stride: 16 },
        Protocol::Rolling { context: 33, prefix: 1 },
    ] {
        let windows = windows(&protocol, tokens.len()).expect("long enough");
        let mut whole = decoder("llama", KvDType::F32, 64);
        let mut losses = Vec::new();
        for window in &windows {
            let rows = teacher_forced_logits(&mut whole, &window.input(&tokens), window.first_row(), 64).expect("fits");
            let rows = rows.chunks_exact(whole.info().vocab_size);
            losses.extend(rows.zip(window.scored.clone()).map(|(row, index)| -log_softmax(row)[tokens[index] as usize]));
        }
        let expected = losses.iter().sum::<f64>() / losses.len() as f64;
        let mut seen = Vec::new();
        let found = measure_perplexity(&mut decoder("llama", KvDType::F32, 7), scored, &protocol, &windows, |done, _| seen.push(done));
        let found = found.expect("measured");
        assert!((found.nll_per_token - expected).abs() < 1e-12, "{protocol:?}: {} instead of {expected}", found.nll_per_token);
        assert_eq!((found.tokens, found.windows, seen.len()), (losses.len(), windows.len(), windows.len()));
        assert!((found.perplexity.value - expected.exp()).abs() < 1e-9 && found.perplexity.standard_error > 0.0);
        let rolling = matches!(protocol, Protocol::Rolling { .. });
        assert_eq!(found.words, rolling.then_some(20), "words only where the whole text is scored");
        let bytes = if rolling { 300 } else { losses.len() * 2 };
        let bits = expected * losses.len() as f64 / std::f64::consts::LN_2 / bytes as f64;
        assert!((found.bits_per_byte - bits).abs() < 1e-9);
    }
}

#[test]
fn a_model_does_not_diverge_from_itself_and_does_from_its_smaller_types() {
    let tokens = text();
    let protocol = Protocol::Chunked { context: 32, beginning: Some(1) };
    let windows = windows(&protocol, tokens.len()).expect("long enough");
    let measure = |kv_dtype, rows| {
        let (mut base, mut other) = (decoder("llama", KvDType::F32, rows), decoder("llama", kv_dtype, rows));
        measure_divergence(&mut base, &mut other, (&tokens, &protocol, &windows), |_, _| {}).expect("comparable")
    };
    let same = measure(KvDType::F32, 64);
    assert_eq!((same.mean_kld.value, same.max_kld, same.same_top.value), (0.0, 0.0, 1.0));
    assert_eq!((same.delta_perplexity.value, same.rms_delta_p.value, same.tokens), (0.0, 0.0, 4 * 15));
    let (half, chunked) = (measure(KvDType::BF16, 64), measure(KvDType::BF16, 5));
    assert!(half.mean_kld.value > 0.0 && half.mean_kld.value < 1e-2, "{half:?}");
    assert_eq!(half, chunked, "chunks change nothing");
}

#[test]
fn models_that_cannot_be_compared_are_refused() {
    let protocol = Protocol::Chunked { context: 32, beginning: None };
    let tokens = text();
    let windows = windows(&protocol, tokens.len()).expect("long enough");
    let (mut base, mut other) = (decoder("llama", KvDType::F32, 8), decoder("llama", KvDType::F32, 9));
    let error = measure_divergence(&mut base, &mut other, (&tokens, &protocol, &windows), |_, _| {}).expect_err("refused");
    assert!(matches!(error, EvalError::Incomparable { .. }), "{error}");
    let long = Protocol::Chunked { context: 65, beginning: None };
    let scored = ScoredText { tokens: &tokens, token_bytes: &tokens.iter().map(|_| 1).collect::<Vec<_>>(), sizes: None };
    let error = measure_perplexity(&mut base, scored, &long, &windows, |_, _| {}).expect_err("refused");
    assert!(error.to_string().contains("at most 64"), "{error}");
}

#[test]
fn speed_is_measured_in_every_round() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/model/llama");
    let model = Model::open(folder, LoadMode::Mmap).expect("the fixture is there");
    let sizes = SpeedSizes { prefill: 20, decode: 6, batch: 5, rounds: 3 };
    sizes.check(model.summary().context_length).expect("fits");
    let options = sizes.decoder_options(DecoderOptions::single_sequence(64), 8);
    let backend = Arc::new(CpuBackend::new(CpuOptions { threads: 1, ..CpuOptions::default() }).expect("starts"));
    let mut decoder = model.decoder(backend, &options).expect("loads");
    let mut done = Vec::new();
    let speed = measure_speed(&mut decoder, &sizes, |rounds| done.push(rounds)).expect("measured");
    for rate in [&speed.prefill_tokens_per_s, &speed.decode_tokens_per_s, &speed.batch_decode_tokens_per_s] {
        assert!(rate.rounds.len() == 3 && rate.median > 0.0 && rate.best >= rate.median, "{rate:?}");
    }
    assert_eq!(done, [0, 1, 2, 3]);
}
