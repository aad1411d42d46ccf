//! The real SmolLM2 against llama.cpp's recorded answers (tests/fixtures/parity).
//!
//! `FORGE_TEST_SMOLLM2` is the path of the GGUF file of the default model; `tests/all.sh` sets it. On a machine
//! without it these tests say so and pass, but never where `CI` is set.

use std::path::PathBuf;

use forge_kernels::KvDType;
use forge_tests::{CpuDecoder, GreedyCase, LlamaGolden, log_softmax, open_decoder, teacher_forced_logits, top_two};

/// Below this distance of llama.cpp's two largest logits either token is a right answer.
const UNDECIDED_GAP: f32 = 0.02;
const CHUNK: usize = 512;

/// The model file, or `None` where the machine has none and may do without.
fn model_path() -> Option<PathBuf> {
    match std::env::var_os("FORGE_TEST_SMOLLM2") {
        Some(path) => Some(PathBuf::from(path)),
        None if std::env::var_os("CI").is_none() => {
            eprintln!("not run: set FORGE_TEST_SMOLLM2 to the path of SmolLM2-135M-Instruct.Q4_1.gguf");
            None
        }
        None => panic!("CI must set FORGE_TEST_SMOLLM2 to the default model's GGUF file"),
    }
}

fn open() -> Option<(CpuDecoder, LlamaGolden)> {
    let path = model_path()?;
    let golden = LlamaGolden::read().expect("the golden file is committed");
    Some((open_decoder(&path, 2048, KvDType::F32).expect("the default model loads"), golden))
}

/// Logit rows at the positions that choose the answer's tokens: [answer, vocabulary].
fn answer_rows(model: &mut CpuDecoder, case: &GreedyCase) -> Vec<f32> {
    let mut tokens = case.prompt.clone();
    tokens.extend_from_slice(&case.tokens[..case.tokens.len() - 1]);
    teacher_forced_logits(model, &tokens, case.prompt.len() - 1, CHUNK).expect("the case fits the model")
}

/// Kullback-Leibler divergence from llama.cpp's leading alternatives to ours, everything else being one more
/// outcome: a lower bound of the divergence of the whole distributions.
fn divergence(leading: &[(u32, f64)], ours: &[f64]) -> f64 {
    let mut rest = (1.0, 1.0);
    let mut sum = 0.0;
    for (token, theirs) in leading {
        let own = ours[*token as usize];
        sum += theirs.exp() * (theirs - own);
        rest = (rest.0 - theirs.exp(), rest.1 - own.exp());
    }
    // Rounding of the file leaves a remainder near nothing, or less.
    if rest.0 > 1e-4 && rest.1 > 0.0 { sum + rest.0 * (rest.0 / rest.1).ln() } else { sum }
}

#[test]
fn greedy_answers_are_those_of_llama_cpp() {
    let Some((mut model, golden)) = open() else { return };
    let vocabulary = golden_vocabulary(&model);
    let mut wrong = Vec::new();
    let mut compared = 0;
    let mut divergences = Vec::new();
    for case in &golden.cases {
        let rows = answer_rows(&mut model, case);
        for (position, row) in rows.chunks_exact(vocabulary).enumerate() {
            if let Some(leading) = case.leading.get(&position) {
                divergences.push(divergence(leading, &log_softmax(row)));
            }
        }
        for (position, row) in rows.chunks_exact(vocabulary).enumerate() {
            if case.gaps[position] < UNDECIDED_GAP {
                break;
            }
            compared += 1;
            let (token, gap) = top_two(row);
            if token != case.tokens[position] {
                wrong.push(format!(
                    "{} at {position}: {token} (gap {gap:.4}) instead of {} (gap {:.4})",
                    case.name, case.tokens[position], case.gaps[position]
                ));
                break;
            }
        }
    }
    let mean = divergences.iter().sum::<f64>() / divergences.len() as f64;
    println!("{} prompts, {compared} tokens compared, mean divergence {mean:.2e} at {} positions", golden.cases.len(), divergences.len());
    assert!(golden.cases.len() >= 40 && compared > 1500, "only {compared} tokens were compared");
    assert!(wrong.is_empty(), "{} prompts differ from llama.cpp:\n{}", wrong.len(), wrong.join("\n"));
    assert!(mean <= 1e-3, "mean divergence {mean:e}");
}

#[test]
fn the_perplexity_is_that_of_llama_cpp() {
    let Some((mut model, golden)) = open() else { return };
    let vocabulary = golden_vocabulary(&model);
    let tokens = &golden.document.tokens;
    let rows = teacher_forced_logits(&mut model, tokens, 0, CHUNK).expect("the document fits the model");
    let scored = rows.chunks_exact(vocabulary).zip(&tokens[1..]);
    let ours: f64 = scored.map(|(row, token)| log_softmax(row)[*token as usize]).sum();
    let theirs: f64 = golden.document.logprobs.iter().sum();
    let count = golden.document.logprobs.len() as f64;
    let (ours, theirs) = ((-ours / count).exp(), (-theirs / count).exp());
    println!("perplexity {ours:.4}, llama.cpp {theirs:.4}");
    assert!((ours / theirs - 1.0).abs() < 5e-3, "perplexity {ours} instead of {theirs}");
}

fn golden_vocabulary(model: &CpuDecoder) -> usize {
    use forge_model::StepModel;
    model.info().vocab_size
}

#[test]
fn the_divergence_of_equal_distributions_is_zero() {
    let ours = log_softmax(&[1.0, 3.0, 2.0, 0.5, -1.0]);
    let leading: Vec<(u32, f64)> = [1, 2, 0].map(|token: u32| (token, ours[token as usize])).to_vec();
    assert!(divergence(&leading, &ours).abs() < 1e-12);
    let other = log_softmax(&[1.0, 2.5, 2.0, 0.5, -1.0]);
    assert!(divergence(&leading, &other) > 1e-3);
}
