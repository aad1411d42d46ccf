//! The real SmolLM2 against llama.cpp's recorded answers (tests/fixtures/parity).
//!
//! `FORGE_TEST_SMOLLM2` is the path of the GGUF file of the default model; `tests/all.sh` sets it. On a machine
//! without it these tests say so and pass, but never where `CI` is set.

use std::path::PathBuf;

use forge_eval::distribution::log_softmax;
use forge_eval::teacher_forced_logits;
use forge_kernels::KvDType;
use forge_tests::{CpuDecoder, ExactGolden, GreedyCase, LlamaGolden, f32_copy, open_decoder, top_two};

/// Below this distance of llama.cpp's two largest logits either token is a right answer.
const UNDECIDED_GAP: f32 = 0.02;
/// No rounding of activations moves two logits this far apart.
const DECIDED_GAP: f32 = 1.0;
/// Mean divergence of llama.cpp from itself on this model, whole prompt at once against token by token. Both engines
/// round activations to 8 bits, which lets the last bit of a sum grow to this size whatever its cause; nothing that
/// computes on its own can be nearer. An f32 copy of the weights shows no such noise: docs/testing.md has the figures.
const OWN_DIVERGENCE: f64 = 3.5e-3;
const MAX_DIVERGENCE: f64 = 1.3 * OWN_DIVERGENCE;
/// Where activations are not rounded.
const EXACT_DIVERGENCE: f64 = 1e-3;
/// Of keys and values in int8, beyond f16's.
const MAX_BYTES_DIVERGENCE: f64 = 2e-3;
/// Of two perplexities, as a share.
const MAX_PERPLEXITY_CHANGE: f64 = 5e-3;
/// Prompts that may differ for each on which llama.cpp differs from itself. The golden file's second run changes only
/// how the prompt is computed, where ours changes the answer's steps as well.
const OWN_DIFFERENCES_FACTOR: usize = 2;
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
fn answer_rows(model: &mut CpuDecoder, prompt: &[u32], answer: &[u32]) -> Vec<f32> {
    let tokens = [prompt, &answer[..answer.len() - 1]].concat();
    teacher_forced_logits(model, &tokens, prompt.len() - 1, CHUNK).expect("the case fits the model")
}

/// Kullback-Leibler divergence from llama.cpp's leading alternatives to other log-probabilities of the same tokens,
/// everything else being one more outcome: a lower bound of the divergence of the whole distributions.
fn divergence(pairs: impl Iterator<Item = (f64, f64)>) -> f64 {
    let mut rest = (1.0, 1.0);
    let mut sum = 0.0;
    for (theirs, other) in pairs {
        sum += theirs.exp() * (theirs - other);
        rest = (rest.0 - theirs.exp(), rest.1 - other.exp());
    }
    // Rounding of the file leaves a remainder near nothing, or less.
    if rest.0 > 1e-3 && rest.1 > 0.0 { sum + rest.0 * (rest.0 / rest.1).ln() } else { sum }
}

/// Tokens of an answer up to where llama.cpp itself is undecided.
fn decided(gaps: &[f32]) -> usize {
    gaps.iter().position(|gap| *gap < UNDECIDED_GAP).unwrap_or(gaps.len())
}

/// The first position where another choice was made, up to where llama.cpp itself is undecided.
fn first_difference(case: &GreedyCase, others: impl Iterator<Item = u32>) -> Option<usize> {
    others.take(decided(&case.gaps)).zip(&case.tokens).position(|(other, token)| other != *token)
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

#[test]
fn greedy_answers_are_those_of_llama_cpp() {
    let Some((mut model, golden)) = open() else { return };
    let vocabulary = golden_vocabulary(&model);
    let (mut differences, mut own_differences, mut compared) = (Vec::new(), 0, 0);
    let mut divergences = (Vec::new(), Vec::new());
    for case in &golden.cases {
        let rows = answer_rows(&mut model, &case.prompt, &case.tokens);
        for (position, row) in rows.chunks_exact(vocabulary).enumerate() {
            if let Some(leading) = case.leading.get(&position) {
                let ours = log_softmax(row);
                divergences.0.push(divergence(leading.iter().map(|entry| (entry.1, ours[entry.0 as usize]))));
                divergences.1.push(divergence(leading.iter().map(|entry| (entry.1, entry.2))));
            }
        }
        let best: Vec<(u32, f32)> = rows.chunks_exact(vocabulary).map(top_two).collect();
        let difference = first_difference(case, best.iter().map(|(token, _)| *token));
        compared += difference.unwrap_or(case.tokens.len());
        own_differences += usize::from(first_difference(case, case.again.iter().copied()).is_some());
        if let Some(position) = difference {
            let ((token, gap), theirs) = (best[position], case.gaps[position]);
            differences.push(format!(
                "{} at {position}: {token} (gap {gap:.4}) instead of {} (gap {theirs:.4})",
                case.name, case.tokens[position]
            ));
            assert!(theirs < DECIDED_GAP, "{}", differences[differences.len() - 1]);
        }
    }
    let (ours, own) = (mean(&divergences.0), mean(&divergences.1));
    let count = divergences.0.len();
    println!(
        "{} prompts, {compared} tokens, {} prompts differ (llama.cpp from itself {own_differences}), mean divergence {ours:.2e} (its own {own:.2e})",
        golden.cases.len(),
        differences.len()
    );
    assert!(golden.cases.len() >= 40 && compared > 1000 && count > 100, "only {compared} tokens at {count} positions were compared");
    assert!(ours <= MAX_DIVERGENCE, "mean divergence {ours:e}");
    let allowed = OWN_DIFFERENCES_FACTOR * own_differences;
    assert!(
        differences.len() <= allowed,
        "{} prompts differ from llama.cpp, {allowed} may:\n{}",
        differences.len(),
        differences.join("\n")
    );
}

/// Perplexity of a document, given the log-probabilities that llama.cpp gives its tokens.
fn check_perplexity(model: &mut CpuDecoder, tokens: &[u32], theirs: &[f64], bound: f64) {
    let vocabulary = golden_vocabulary(model);
    let rows = teacher_forced_logits(model, &tokens[..tokens.len() - 1], 0, CHUNK).expect("the document fits the model");
    let scored = rows.chunks_exact(vocabulary).zip(&tokens[1..]);
    let ours: Vec<f64> = scored.map(|(row, token)| log_softmax(row)[*token as usize]).collect();
    assert_eq!(ours.len(), theirs.len());
    let (ours, theirs) = ((-mean(&ours)).exp(), (-mean(theirs)).exp());
    println!("perplexity {ours:.4}, llama.cpp {theirs:.4}");
    assert!((ours / theirs - 1.0).abs() < bound, "perplexity {ours} instead of {theirs}");
}

#[test]
fn the_perplexity_is_that_of_llama_cpp() {
    let Some((mut model, golden)) = open() else { return };
    check_perplexity(&mut model, &golden.document.tokens, &golden.document.logprobs, MAX_PERPLEXITY_CHANGE);
}

/// The bounds as they are meant: on an f32 copy of the default model's weights nothing is rounded, and llama.cpp differs
/// from itself by nothing.
#[test]
fn on_an_f32_copy_the_answers_are_those_of_llama_cpp() {
    let Some(path) = model_path() else { return };
    let prompts = LlamaGolden::read().expect("the golden file is committed");
    let golden = ExactGolden::read(&prompts).expect("the golden file is committed");
    let copy = f32_copy(&path).expect("there is room for an f32 copy");
    let mut model = open_decoder(copy.path(), 2048, KvDType::F32).expect("the copy loads");
    let vocabulary = golden_vocabulary(&model);
    let (mut compared, mut divergences) = (0, Vec::new());
    for (case, GreedyCase { prompt, .. }) in golden.cases.iter().zip(&prompts.cases) {
        let rows = answer_rows(&mut model, prompt, &case.tokens);
        let rows: Vec<&[f32]> = rows.chunks_exact(vocabulary).collect();
        let decided = decided(&case.gaps);
        for (position, (row, token)) in rows.iter().zip(&case.tokens).take(decided).enumerate() {
            assert_eq!(top_two(row).0, *token, "{} at {position}: llama.cpp's gap is {}", case.name, case.gaps[position]);
        }
        compared += decided;
        for (position, leading) in &case.leading {
            let ours = log_softmax(rows[*position]);
            divergences.push(divergence(leading.iter().map(|(token, theirs)| (*theirs, ours[*token as usize]))));
        }
    }
    println!("{} prompts, {compared} equal tokens, mean divergence {:.1e}", golden.cases.len(), mean(&divergences));
    assert!(golden.cases.len() >= 40 && compared > 1500 && divergences.len() >= 160, "only {compared} tokens were compared");
    assert!(mean(&divergences) <= EXACT_DIVERGENCE, "mean divergence {:e}", mean(&divergences));
    check_perplexity(&mut model, &prompts.document.tokens, &golden.document, MAX_PERPLEXITY_CHANGE);
}

/// What storing keys and values as bytes costs, where nothing else is rounded: divergence from those in f32, beyond that
/// of f16 (the threshold of the specification).
#[test]
fn keys_and_values_as_bytes_cost_little() {
    let Some(path) = model_path() else { return };
    let copy = f32_copy(&path).expect("there is room for an f32 copy");
    let document = LlamaGolden::read().expect("the golden file is committed").document.tokens;
    let mut vocabulary = 0;
    let mut distributions = |dtype| -> Vec<f32> {
        let mut model = open_decoder(copy.path(), 2048, dtype).expect("the copy loads");
        vocabulary = golden_vocabulary(&model);
        teacher_forced_logits(&mut model, &document, 0, CHUNK).expect("the document fits the model")
    };
    let [exact, half, bytes] = [KvDType::F32, KvDType::F16, KvDType::Int8].map(&mut distributions);
    let divergence = |other: &[f32]| {
        let rows = exact.chunks_exact(vocabulary).zip(other.chunks_exact(vocabulary));
        let rows = rows.map(|(exact, other)| {
            let (exact, other) = (log_softmax(exact), log_softmax(other));
            exact.iter().zip(other).map(|(exact, other)| exact.exp() * (exact - other)).sum()
        });
        mean(&rows.collect::<Vec<f64>>())
    };
    let (half, bytes) = (divergence(&half), divergence(&bytes));
    println!("{} tokens, mean divergence of f16 {half:.1e}, of int8 {bytes:.1e}", document.len());
    assert!(document.len() > 200 && bytes > half, "bytes are coarser");
    assert!(bytes - half <= MAX_BYTES_DIVERGENCE, "{bytes:e} instead of {half:e}");
}

fn golden_vocabulary(model: &CpuDecoder) -> usize {
    use forge_model::StepModel;
    model.info().vocab_size
}

#[test]
fn the_divergence_of_equal_distributions_is_zero() {
    let ours = log_softmax(&[1.0, 3.0, 2.0, 0.5, -1.0]);
    let other = log_softmax(&[1.0, 2.5, 2.0, 0.5, -1.0]);
    let leading = |other: &[f64]| divergence([1, 2, 0].into_iter().map(|token| (ours[token], other[token])));
    assert!(leading(&ours).abs() < 1e-12);
    assert!(leading(&other) > 1e-3);
}
