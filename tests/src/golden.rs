//! `smollm2_greedy.json` and `smollm2_f32.json` of `tests/fixtures/parity`, written by `tests/parity/make_golden.py`.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde::de::DeserializeOwned;

/// llama.cpp's answers on one model file.
#[derive(Debug, Deserialize)]
pub struct LlamaGolden {
    /// Digest of the model file, hexadecimal.
    pub model_sha256: String,
    /// Engine, version and settings.
    pub made_by: String,
    /// Greedy answers.
    pub cases: Vec<GreedyCase>,
    /// A text scored token by token.
    pub document: Document,
}

/// One prompt and its greedy answer.
#[derive(Debug, Deserialize)]
pub struct GreedyCase {
    /// Name, for messages.
    pub name: String,
    /// Prompt token ids.
    pub prompt: Vec<u32>,
    /// Answer token ids; end tokens did not stop it.
    pub tokens: Vec<u32>,
    /// Distance of the two largest logits at each token of the answer.
    pub gaps: Vec<f32>,
    /// Most likely id at each position of the same answer, after a prompt computed token by token.
    pub again: Vec<u32>,
    /// At some positions of the answer, the most likely ids.
    pub leading: BTreeMap<usize, Vec<Leading>>,
}

/// A likely token and its log-probability: after a prompt computed at once, and after one computed token by token. llama.cpp rounds
/// activations to 8 bits, which lets the least difference in a sum's order grow: the two show how far.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct Leading(pub u32, pub f64, pub f64);

/// A text and the log-probability of each of its tokens but the first.
#[derive(Debug, Deserialize)]
pub struct Document {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Natural logarithms, one less than tokens.
    pub logprobs: Vec<f64>,
}

/// llama.cpp's answers on an f32 copy of the same weights, to the same prompts and document.
#[derive(Debug, Deserialize)]
pub struct ExactGolden {
    /// Digest of the model file that was copied, hexadecimal.
    pub model_sha256: String,
    /// Greedy answers.
    pub cases: Vec<ExactCase>,
    /// Log-probability of each token of the document but the first.
    pub document: Vec<f64>,
}

/// A greedy answer to the prompt of the same name.
#[derive(Debug, Deserialize)]
pub struct ExactCase {
    /// [`GreedyCase::name`].
    pub name: String,
    /// Answer token ids.
    pub tokens: Vec<u32>,
    /// Distance of the two largest logits at each token of the answer.
    pub gaps: Vec<f32>,
    /// At some positions of the answer, the most likely ids and their log-probabilities.
    pub leading: BTreeMap<usize, Vec<(u32, f64)>>,
}

fn read<T: DeserializeOwned>(name: &str) -> Result<T> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/parity").join(name);
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    serde_json::from_str(&text).with_context(|| path.display().to_string())
}

impl ExactGolden {
    /// Reads the committed file and checks that it fits the other.
    ///
    /// # Errors
    /// The file is missing or malformed, or belongs to other prompts.
    pub fn read(prompts: &LlamaGolden) -> Result<Self> {
        let golden: ExactGolden = read("smollm2_f32.json")?;
        ensure!(golden.model_sha256 == prompts.model_sha256, "the two golden files are of different models");
        ensure!(golden.document.len() == prompts.document.logprobs.len(), "the two golden files have different documents");
        ensure!(golden.cases.len() == prompts.cases.len(), "the two golden files have different prompts");
        for (case, prompt) in golden.cases.iter().zip(&prompts.cases) {
            ensure!(case.name == prompt.name && case.tokens.len() == case.gaps.len(), "case {} does not fit itself", case.name);
        }
        Ok(golden)
    }
}

impl LlamaGolden {
    /// Reads the committed file and checks that its lists fit each other.
    ///
    /// # Errors
    /// The file is missing or malformed.
    pub fn read() -> Result<Self> {
        let golden: LlamaGolden = read("smollm2_greedy.json")?;
        for case in &golden.cases {
            ensure!(
                !case.prompt.is_empty() && case.tokens.len() == case.gaps.len() && case.tokens.len() == case.again.len(),
                "case {} does not fit itself",
                case.name
            );
        }
        ensure!(golden.document.tokens.len() == golden.document.logprobs.len() + 1, "the document does not fit itself");
        Ok(golden)
    }
}
