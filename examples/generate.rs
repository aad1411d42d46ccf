//! Embedding Forge: load a model, turn text into tokens, compute logits with state, generate, stream, decode.
//!
//!     cargo run --release -p forge-tests --example generate -- MODEL ["prompt"]
//!
//! MODEL is a GGUF file or a Hugging Face folder.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use forge_engine::{Engine, EngineOptions, open_text};
use forge_kernels::{CpuBackend, CpuOptions, KvDType};
use forge_model::{DecoderOptions, LoadMode, Model, Session};
use forge_shared::generate::SamplingParams;

const MAX_MODEL_LEN: usize = 2048;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().context("usage: generate MODEL [PROMPT]")?;
    let prompt = arguments.next().unwrap_or_else(|| "The capital of France is".to_owned());

    // Load. Opening reads metadata only; building the decoder maps the weights and allocates keys and values.
    let model = Model::open(&path, LoadMode::Mmap)?;
    let text = open_text(&model, Path::new(&path))?;
    let backend = Arc::new(CpuBackend::new(CpuOptions::default())?);
    let max_model_len = MAX_MODEL_LEN.min(model.summary().context_length);
    let options = DecoderOptions { kv_dtype: KvDType::F16, max_logits_rows: 8, ..DecoderOptions::single_sequence(max_model_len) };

    // Encode.
    let tokens = text.tokenizer().encode(&prompt, true)?;
    println!("{} tokens: {tokens:?}", tokens.len());

    // Forward with state: each call goes on where the last one stopped.
    let mut decoder = model.decoder(backend.clone(), &options)?;
    let mut session = Session::new(&mut decoder);
    let logits = session.forward(&tokens)?;
    let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).context("a model has tokens")?;
    println!("most likely next token: {:?}", text.tokenizer().decode(&[best as u32], false)?);

    // Generate. The engine takes the decoder onto its own thread and batches whatever is asked at the same time.
    let decoder = model.decoder(backend, &options)?;
    let engine = Engine::new(Box::new(decoder), text.tokenizer().clone(), EngineOptions { max_batch_size: 8, ..EngineOptions::default() })?;
    let greedy = SamplingParams { temperature: 0.0, max_tokens: 24, ..SamplingParams::default() };
    let completion = engine.generate(&tokens, greedy)?;
    println!("greedy: {:?} ({:?})", completion.text, completion.finish_reason);
    println!("decoded again: {:?}", text.tokenizer().decode(&completion.tokens, true)?);

    // Stream. Text comes as soon as it is certain: no half characters, no part of a stop string.
    let sampled = SamplingParams { temperature: 0.8, top_p: 0.95, max_tokens: 24, stop: vec!["\n".into()], ..SamplingParams::default() };
    print!("sampled: ");
    for piece in engine.stream(&tokens, sampled)? {
        print!("{}", piece?.text);
        std::io::stdout().flush()?;
    }
    println!();
    Ok(())
}
