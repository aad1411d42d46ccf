//! `forgectl eval kld`.

use std::time::Instant;

use forge_eval::{BUILT_IN_TEXT, Divergence, EvalError, measure_divergence};
use forge_model::StepModel;
use forge_text::Tokenizer;
use serde::Serialize;

use super::protocol::{Statement, choose, cut};
use super::{number, with_error};
use crate::cli::measure::{KldArgs, ProtocolName, WindowFlags};
use crate::context::Context;
use crate::failure::{Failure, Result};
use crate::measure::{Subject, backend, check_memory, read_text, stoppable};
use crate::meter::Meter;
use crate::output::print_facts;
use crate::runtime;

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    base: String,
    model: String,
    text: String,
    text_tokens: usize,
    protocol: Statement,
    base_numerics_id: String,
    numerics_id: String,
    #[serde(flatten)]
    result: Divergence,
    elapsed_s: f64,
}

/// Measures and prints.
///
/// # Errors
/// Models that cannot be used or compared, a text that is too short.
pub fn kld(args: &KldArgs) -> Result<()> {
    let (text, file) = match &args.file {
        Some(path) => (read_text(path)?, path.display().to_string()),
        None => (BUILT_IN_TEXT.to_owned(), "built in".to_owned()),
    };
    let context = Context::open()?;
    let report = runtime::start()?.block_on(async {
        let settings = &args.keys.settings;
        let mut base = Subject::find(&context, Some(&args.base), settings).await?;
        if let Some(dtype) = args.base_kv_cache_dtype {
            base.spec.kv_cache_dtype = dtype;
        }
        let model = Subject::find(&context, Some(&args.model), settings).await?;
        let windows = args.windows;
        stoppable(move || run(base, model, &windows, (&text, file))).await
    })?;
    print_facts(args.list.output, &report, &facts(&report))
}

fn run(base: Subject, model: Subject, flags: &WindowFlags, (text, file): (&str, String)) -> Result<Report> {
    let (base, model) = (base.open()?, model.open()?);
    let tokenizers = [&base, &model].map(|opened| opened.prepared.text.tokenizer().clone().with_max_text_bytes(text.len()));
    let encoded = shared_tokens(&tokenizers[0], &tokenizers[1], text)?;
    let shorter = base.context_length().min(model.context_length());
    let protocol = choose(ProtocolName::Chunked, flags, None, (&tokenizers[0], shorter))?;
    let (tokens, windows) = cut(&protocol, flags, &encoded)?;
    let options = [&base, &model].map(|opened| opened.sequence_options(protocol.context()));
    check_memory(base.needed_bytes(&options[0])? + model.needed_bytes(&options[1])?)?;
    let backend = backend(&base.spec)?;
    let mut base_decoder = base.decoder(backend.clone(), &options[0])?;
    let mut decoder = model.decoder(backend, &options[1])?;
    let start = Instant::now();
    let mut meter = Meter::new("windows", windows.len());
    let result = measure_divergence(&mut base_decoder, &mut decoder, (tokens, &protocol, &windows), |done, so_far| {
        meter.at(done, &format!("mean divergence {}", number(so_far)));
    })?;
    Ok(Report {
        base: base.name,
        model: model.name,
        text: file,
        text_tokens: encoded.len(),
        protocol: Statement::of(&protocol),
        base_numerics_id: base_decoder.info().numerics_id.clone(),
        numerics_id: decoder.info().numerics_id.clone(),
        result,
        elapsed_s: start.elapsed().as_secs_f64(),
    })
}

/// The text's tokens, where both tokenizers mean the same by every id and cut this text alike.
fn shared_tokens(base: &Tokenizer, other: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    let differ = |reason: String| {
        let error = EvalError::Incomparable { reason };
        Failure::from(error).help("a divergence is over the same tokens: compare models of one tokenizer, such as two types of one model")
    };
    if base.vocab_size() != other.vocab_size() {
        return Err(differ(format!("A's tokenizer has {} ids and B's {}", base.vocab_size(), other.vocab_size())));
    }
    if let Some(id) = (0..base.vocab_size() as u32).find(|id| base.token_bytes(*id) != other.token_bytes(*id)) {
        return Err(differ(format!("token {id} is {:?} in A and {:?} in B", base.token_text(id), other.token_text(id))));
    }
    let encode = |tokenizer: &Tokenizer| tokenizer.encode(text, true).map_err(|error| Failure::of(&error));
    let (left, right) = (encode(base)?, encode(other)?);
    if left != right {
        let place = left.iter().zip(&right).position(|(left, right)| left != right).unwrap_or(left.len().min(right.len()));
        return Err(differ(format!("their tokenizers have the same tokens and cut the text differently, from token {place} on")));
    }
    Ok(left)
}

fn facts(report: &Report) -> Vec<(&'static str, String)> {
    let result = &report.result;
    vec![
        ("base (A)", report.base.clone()),
        ("model (B)", report.model.clone()),
        ("text", format!("{}, {} tokens", report.text, report.text_tokens)),
        ("protocol", report.protocol.sentence()),
        ("scored", format!("{} tokens in {} windows", result.tokens, result.windows)),
        ("mean KLD", with_error(result.mean_kld)),
        ("median KLD", number(result.median_kld)),
        ("99 % KLD", number(result.p99_kld)),
        ("max KLD", number(result.max_kld)),
        ("mean Δp", with_error(result.mean_delta_p)),
        ("RMS Δp", with_error(result.rms_delta_p)),
        ("same top-1", format!("{:.3} % ± {:.3} %", 100.0 * result.same_top.value, 100.0 * result.same_top.standard_error)),
        ("perplexity A", with_error(result.base_perplexity)),
        ("perplexity B", with_error(result.perplexity)),
        ("Δ perplexity", with_error(result.delta_perplexity)),
        ("numerics A", report.base_numerics_id.clone()),
        ("numerics B", report.numerics_id.clone()),
        ("time", format!("{:.1} s", report.elapsed_s)),
    ]
}
