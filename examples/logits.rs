//! Logits of given token ids, for comparisons with other engines (tests/parity/llama_cpp.py).
//!
//!     cargo run --release -p forge-tests --example logits -- MODEL [OUT] < lists.jsonl
//!
//! Every line of standard input is a JSON list of token ids, one sequence from position 0, or an object
//! `{"tokens": [..], "first": 5}` that leaves out the rows before `first`. The rows of logits are written to OUT
//! (standard output without it) as little-endian f32: rows × vocabulary, one sequence after another.

use std::io::{BufRead, BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use forge_eval::teacher_forced_logits;
use forge_kernels::KvDType;
use forge_model::StepModel;
use forge_tests::open_decoder;
use serde::Deserialize;

const MAX_MODEL_LEN: usize = 2048;

#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    Tokens(Vec<u32>),
    From { tokens: Vec<u32>, first: usize },
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let model = arguments.next().context("usage: logits MODEL [OUT] < lists.jsonl")?;
    let mut out: Box<dyn Write> = match arguments.next() {
        Some(path) => Box::new(BufWriter::new(std::fs::File::create(&path).context(path)?)),
        None => Box::new(BufWriter::new(std::io::stdout().lock())),
    };
    let mut decoder = open_decoder(Path::new(&model), MAX_MODEL_LEN, KvDType::F32)?;
    let chunk = decoder.info().max_step_rows;
    for (number, line) in std::io::stdin().lock().lines().enumerate() {
        let line = serde_json::from_str(&line?).with_context(|| format!("line {}", number + 1))?;
        let (tokens, first) = match line {
            Line::Tokens(tokens) => (tokens, 0),
            Line::From { tokens, first } => (tokens, first),
        };
        let logits = teacher_forced_logits(&mut decoder, &tokens, first, chunk).with_context(|| format!("line {}", number + 1))?;
        for value in logits {
            out.write_all(&value.to_le_bytes())?;
        }
    }
    out.flush().context("writing the logits")
}
