//! Continues token ids greedily: `cargo run --release -p forge-model --example greedy -- MODEL 1,2,3 [COUNT]`.
//! Prints the ids and how long it took. A tokenizer is forge-text's; this crate knows ids only.

use std::sync::Arc;
use std::time::Instant;

use forge_kernels::{CpuBackend, CpuOptions};
use forge_model::{DecoderOptions, LoadMode, Model, Session};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("give a model's path")?;
    let prompt = arguments.next().ok_or("give token ids, as 1,2,3")?;
    let count: usize = arguments.next().unwrap_or("32".to_owned()).parse()?;
    let mut tokens = prompt.split(',').map(str::parse).collect::<Result<Vec<u32>, _>>()?;

    let start = Instant::now();
    let model = Model::open(&path, LoadMode::Mmap)?;
    let length = tokens.len() + count;
    let mut decoder = model.decoder(Arc::new(CpuBackend::new(CpuOptions::default())?), &DecoderOptions::single_sequence(length))?;
    eprintln!("loaded {} ({}) in {:?}", path, model.summary().quantization.main_type(), start.elapsed());

    let start = Instant::now();
    let mut session = Session::new(&mut decoder);
    let mut logits = session.forward(&tokens)?;
    eprintln!("prefill of {} tokens: {:?}", tokens.len(), start.elapsed());
    let start = Instant::now();
    for _ in 0..count {
        let next = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(id, _)| id as u32);
        tokens.push(next);
        if session.len() < session.max_len() {
            logits = session.forward(&[next])?;
        }
    }
    eprintln!("{count} tokens: {:?}", start.elapsed());
    println!("{}", tokens.iter().map(u32::to_string).collect::<Vec<_>>().join(","));
    Ok(())
}
