//! A chat in a few lines: the model's own template, an engine, streaming.
//!
//!     cargo run --release -p forge-tests --example chat -- MODEL
//!
//! Every line of standard input is a message; an empty line or the end of input ends the chat.

use std::io::{BufRead, Write};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use forge_engine::{Engine, EngineOptions, open_text};
use forge_kernels::{CpuBackend, CpuOptions, KvDType};
use forge_model::{DecoderOptions, LoadMode, Model};
use forge_shared::generate::SamplingParams;
use forge_text::ChatRender;
use serde_json::json;

const MAX_MODEL_LEN: usize = 4096;

fn main() -> Result<()> {
    let path = std::env::args().nth(1).context("usage: chat MODEL")?;
    let model = Model::open(&path, LoadMode::Mmap)?;
    let text = open_text(&model, Path::new(&path))?;
    let template = text.chat_template().context("this model has no chat template: use the example `generate`")?;
    let backend = Arc::new(CpuBackend::new(CpuOptions::default())?);
    let max_model_len = MAX_MODEL_LEN.min(model.summary().context_length);
    let options = DecoderOptions { kv_dtype: KvDType::F16, ..DecoderOptions::single_sequence(max_model_len) };
    let decoder = model.decoder(backend, &options)?;
    let engine = Engine::new(Box::new(decoder), text.tokenizer().clone(), EngineOptions { max_batch_size: 1, ..EngineOptions::default() })?;

    let mut messages = Vec::new();
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        if line.is_empty() {
            break;
        }
        messages.push(json!({"role": "user", "content": line}));
        // The whole conversation goes in each time; the prefix cache makes its beginning free.
        let prompt = template.render(&ChatRender { messages: &messages, add_generation_prompt: true, ..ChatRender::default() })?;
        let tokens = text.tokenizer().encode(&prompt, false)?;
        let mut answer = String::new();
        for piece in engine.stream(&tokens, SamplingParams { temperature: 0.0, max_tokens: 256, ..SamplingParams::default() })? {
            let piece = piece?.text;
            print!("{piece}");
            std::io::stdout().flush()?;
            answer.push_str(&piece);
        }
        println!();
        messages.push(json!({"role": "assistant", "content": answer}));
    }
    Ok(())
}
