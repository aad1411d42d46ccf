//! `forgectl eval perplexity`.

use std::time::Instant;

use forge_eval::perplexity::ScoredText;
use forge_eval::{Perplexity, TextSizes, measure_perplexity};
use forge_model::StepModel;
use forge_shared::spec::KvCacheDtype;
use forge_text::Tokenizer;
use serde::Serialize;

use super::protocol::{Statement, choose, cut};
use super::{number, with_error};
use crate::cli::measure::{PerplexityArgs, ProtocolName, WindowFlags};
use crate::context::Context;
use crate::failure::{Failure, Result};
use crate::measure::{Subject, backend, check_memory, read_text, stoppable};
use crate::meter::Meter;
use crate::output::print_facts;
use crate::runtime;

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    model: String,
    text: String,
    text_tokens: usize,
    protocol: Statement,
    kv_cache_dtype: KvCacheDtype,
    numerics_id: String,
    #[serde(flatten)]
    result: Perplexity,
    elapsed_s: f64,
}

/// Measures and prints.
///
/// # Errors
/// A model or text that cannot be used, a protocol that does not fit them.
pub fn perplexity(args: &PerplexityArgs) -> Result<()> {
    let text = read_text(&args.file)?;
    let context = Context::open()?;
    let report = runtime::start()?.block_on(async {
        let subject = Subject::find(&context, Some(&args.model), &args.keys.settings).await?;
        let job = Job { text, file: args.file.display().to_string(), protocol: args.protocol, stride: args.stride, windows: args.windows };
        stoppable(move || job.run(subject)).await
    })?;
    print_facts(args.list.output, &report, &facts(&report))
}

/// What to measure, owned by the thread that does.
struct Job {
    text: String,
    file: String,
    protocol: ProtocolName,
    stride: Option<usize>,
    windows: WindowFlags,
}

impl Job {
    fn run(self, subject: Subject) -> Result<Report> {
        let opened = subject.open()?;
        let tokenizer = opened.prepared.text.tokenizer().clone().with_max_text_bytes(self.text.len());
        let protocol = choose(self.protocol, &self.windows, self.stride, (&tokenizer, opened.context_length()))?;
        // lm-eval scores the bare text; the others begin as the model wants.
        let encoded = tokenizer.encode(&self.text, self.protocol != ProtocolName::Rolling).map_err(|error| Failure::of(&error))?;
        let text_tokens = encoded.len();
        let (tokens, windows) = cut(&protocol, &self.windows, &encoded)?;
        let options = opened.sequence_options(protocol.context());
        check_memory(opened.needed_bytes(&options)?)?;
        let mut decoder = opened.decoder(backend(&opened.spec)?, &options)?;
        let start = Instant::now();
        let mut meter = Meter::new("windows", windows.len());
        let scored = ScoredText {
            tokens,
            token_bytes: &token_bytes(&tokenizer, tokens),
            sizes: (tokens.len() == text_tokens).then(|| TextSizes::of(&self.text)),
        };
        let result = measure_perplexity(&mut decoder, scored, &protocol, &windows, |done, so_far| {
            meter.at(done, &format!("perplexity {}", number(so_far)));
        })?;
        Ok(Report {
            model: opened.name,
            text: self.file,
            text_tokens,
            protocol: Statement::of(&protocol),
            kv_cache_dtype: opened.spec.kv_cache_dtype,
            numerics_id: decoder.info().numerics_id.clone(),
            result,
            elapsed_s: start.elapsed().as_secs_f64(),
        })
    }
}

/// How many bytes of text each token stands for.
fn token_bytes(tokenizer: &Tokenizer, tokens: &[u32]) -> Vec<usize> {
    tokens.iter().map(|id| tokenizer.token_bytes(*id).len()).collect()
}

fn facts(report: &Report) -> Vec<(&'static str, String)> {
    let result = &report.result;
    let mut facts = vec![
        ("model", report.model.clone()),
        ("text", format!("{}, {} tokens", report.text, report.text_tokens)),
        ("protocol", report.protocol.sentence()),
        ("perplexity", with_error(result.perplexity)),
        ("loss", format!("{} nats per token", number(result.nll_per_token))),
        ("scored", format!("{} tokens in {} windows, {} bytes", result.tokens, result.windows, result.bytes)),
        ("bits per byte", number(result.bits_per_byte)),
    ];
    facts.extend(result.byte_perplexity.map(|value| ("byte perplexity", number(value))));
    if let (Some(value), Some(words)) = (result.word_perplexity, result.words) {
        facts.push(("word perplexity", format!("{} over {words} words", number(value))));
    }
    facts.push(("numerics", report.numerics_id.clone()));
    facts.push(("time", format!("{:.1} s", report.elapsed_s)));
    facts
}
