//! `forgectl bench serve`: any OpenAI endpoint under load.
//!
//! What it is: a client that draws requests, sends them as a load says, times their streams and adds up. What it is
//! not: it knows no server; what an endpoint understands is found by asking it once.

mod client;
mod lengths;
mod load;
mod plot;
mod prompts;
mod record;
mod report;
mod slo;
mod sse;
mod summary;

use std::path::Path;
use std::pin::{Pin, pin};
use std::sync::Arc;

use rand::SeedableRng;
use rand::rngs::StdRng;
use serde::Serialize;

pub use client::Interface;
use client::{Endpoint, Extras, Request};
pub use lengths::Range;
use lengths::Workload;
use load::{Load, Outcome, Sender};
use prompts::Counting;
use record::{ErrorKind, Record};
pub use slo::{Objectives, parse_duration, parse_objectives};
use summary::Summary;

use crate::cli::measure::BenchServeArgs;
use crate::failure::{Exit, Failure, Result};
use crate::{measure, runtime};

/// Words of the two requests by which a server's counting is found.
const PROBES: [usize; 2] = [4, 12];

/// One load and how it went.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Point {
    load: Load,
    summary: Summary,
    requests: Vec<Record>,
}

/// Everything there is to tell.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    url: String,
    model: String,
    interface: Interface,
    /// What the endpoint understands.
    extras: Extras,
    /// How prompts were made to have their length.
    counting: Counting,
    seed: u64,
    warmup_requests: usize,
    timeout_s: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    objectives: Option<Objectives>,
    /// Loads and requests of each that were asked for.
    asked: Asked,
    /// Whether a signal ended it before all of that was measured.
    stopped: bool,
    points: Vec<Point>,
}

/// How much was to be measured.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "camelCase")]
struct Asked {
    loads: usize,
    requests: usize,
}

/// Measures and prints; a signal ends it with the figures of what was measured until then.
///
/// # Errors
/// An endpoint that does not answer, or answers no request; a file that cannot be read or written.
pub fn serve(args: &BenchServeArgs) -> Result<()> {
    let loads = loads(args)?;
    let workload = workload(args)?;
    args.plot.as_deref().map_or(Ok(()), check_plot)?;
    let report = runtime::start()?.block_on(async {
        let mut stop = pin!(runtime::stop_signal());
        let prepared = tokio::select! {
            prepared = prepare(args, &loads, &workload) => prepared?,
            () = stop.as_mut() => return Err(Failure::new("stopped before anything was measured")),
        };
        measure_loads(args, &loads, prepared, stop).await
    })?;
    // First what was measured: a plot that cannot be written must not cost the figures.
    report::print(args.output.output, &report)?;
    if let Some(path) = &args.plot {
        let title = format!("{} at {}", report.model, report.url);
        plot::write(path, &title, &report.points)
            .map_err(|error| Failure::new(error.to_string()).while_doing(&format!("cannot write {}", path.display())))?;
    }
    match report.points.iter().all(|point| point.summary.completed == 0) {
        true => Err(nothing_succeeded(&report)),
        false if report.stopped => Err(Failure::new("stopped: the figures are those of the requests that had ended")),
        false => Ok(()),
    }
}

/// Refuses a plot that could not be written before anything is measured for it.
fn check_plot(path: &Path) -> Result<()> {
    if path.extension().is_none_or(|extension| !extension.eq_ignore_ascii_case("svg")) {
        return Err(Failure::usage(format!("--plot {}: plots are SVG; give a name that ends in .svg", path.display())));
    }
    let opened = std::fs::OpenOptions::new().create(true).append(true).open(path);
    opened.map(|_| ()).map_err(|error| Failure::usage(format!("--plot {}: cannot be written ({error})", path.display())))
}

/// The loads of a sweep; one of them where there is no list.
fn loads(args: &BenchServeArgs) -> Result<Vec<Load>> {
    let rates = args.request_rate.iter().map(|rate| {
        let right = rate.is_finite() && *rate > 0.0;
        if right { Ok(Load::RequestRate(*rate)) } else { Err(Failure::usage(format!("--request-rate: {rate} must be more than 0"))) }
    });
    let concurrencies = args.concurrency.iter().map(|count| match count {
        0 => Err(Failure::usage("--concurrency: must be at least 1")),
        count => Ok(Load::Concurrency(*count)),
    });
    let given: Vec<Load> = rates.chain(concurrencies).collect::<Result<_>>()?;
    Ok(if given.is_empty() { vec![Load::Concurrency(8)] } else { given })
}

fn workload(args: &BenchServeArgs) -> Result<Workload> {
    if let Some(path) = &args.dataset {
        let turns = lengths::read_dataset(&measure::read_text(path)?);
        return turns.map(Workload::Dataset).map_err(|reason| Failure::usage(format!("--dataset {}: {reason}", path.display())));
    }
    Ok(if args.conversations { Workload::Conversations } else { Workload::Ranges { input: args.input_tokens, output: args.output_tokens } })
}

/// An endpoint that is known and warm, and what comes next of the seed.
struct Prepared<'a> {
    endpoint: Arc<Endpoint>,
    counting: Counting,
    workload: &'a Workload,
    warmup_requests: usize,
    random: StdRng,
}

async fn prepare<'a>(args: &BenchServeArgs, loads: &[Load], workload: &'a Workload) -> Result<Prepared<'a>> {
    let key = args.api_key.clone().filter(|key| !key.is_empty());
    let mut endpoint = Endpoint::connect(&args.url, key, args.model.clone(), args.endpoint).await?;
    if args.no_ignore_eos {
        endpoint.extras.ignore_eos = false;
    }
    let mut random = StdRng::seed_from_u64(args.seed);
    let counting = probe(&mut endpoint, args, &mut random).await?;
    let endpoint = Arc::new(endpoint);
    let warmup_requests = args.warmup.unwrap_or(match loads.first() {
        Some(Load::Concurrency(count)) => (*count).min(args.requests),
        Some(Load::RequestRate(_)) | None => 4,
    });
    if warmup_requests > 0 {
        let requests = requests(workload, &counting, warmup_requests, &mut random);
        let sender = Sender { endpoint: endpoint.clone(), load: Load::Concurrency(warmup_requests), timeout: args.timeout, seed: 0 };
        sender.send(requests, pin!(std::future::pending())).await;
    }
    Ok(Prepared { endpoint, counting, workload, warmup_requests, random })
}

async fn measure_loads(
    args: &BenchServeArgs,
    loads: &[Load],
    prepared: Prepared<'_>,
    mut stop: Pin<&mut impl Future<Output = ()>>,
) -> Result<Report> {
    let Prepared { endpoint, counting, workload, warmup_requests, mut random } = prepared;
    let (mut points, mut stopped) = (Vec::new(), false);
    for load in loads {
        let mut random = StdRng::seed_from_u64(prompts::branch(&mut random));
        let requests = requests(workload, &counting, args.requests, &mut random);
        let seed = prompts::branch(&mut random);
        let sender = Sender { endpoint: endpoint.clone(), load: *load, timeout: args.timeout, seed };
        let Outcome { records, stopped: now } = sender.send(requests, stop.as_mut()).await;
        stopped = now;
        if !records.is_empty() {
            points.push(Point { load: *load, summary: Summary::of(&records, args.slo.as_ref()), requests: records });
        }
        if stopped {
            break;
        }
    }
    if points.is_empty() {
        return Err(Failure::new("stopped before any request had ended"));
    }
    Ok(Report {
        url: args.url.clone(),
        model: endpoint.model.clone(),
        interface: args.endpoint,
        extras: endpoint.extras,
        counting,
        seed: args.seed,
        warmup_requests,
        timeout_s: args.timeout.as_secs_f64(),
        objectives: args.slo.clone(),
        asked: Asked { loads: loads.len(), requests: args.requests },
        stopped,
        points,
    })
}

fn requests(workload: &Workload, counting: &Counting, count: usize, random: &mut StdRng) -> Vec<Request> {
    (0..count).map(|_| request(workload, counting, random)).collect()
}

fn request(workload: &Workload, counting: &Counting, random: &mut StdRng) -> Request {
    let draft = workload.draw(random);
    let prompt = draft.prompt.unwrap_or_else(|| prompts::words(counting.words(draft.input), random));
    Request { prompt, input: draft.input, output: draft.output }
}

/// Finds what the endpoint understands and how it counts, by two small requests.
async fn probe(endpoint: &mut Endpoint, args: &BenchServeArgs, random: &mut StdRng) -> Result<Counting> {
    let mut counts = Vec::new();
    for count in PROBES {
        let record = loop {
            let request = Request { prompt: prompts::words(count, random), input: count, output: 4 };
            let record = endpoint.run(&request, args.timeout).await;
            let Some(error) = &record.error else { break record };
            let extras = &mut endpoint.extras;
            // A server that refuses what it does not know gets the plainer request, one field after the other.
            match error.kind {
                ErrorKind::Refused if extras.ignore_eos => extras.ignore_eos = false,
                ErrorKind::Refused if extras.usage => extras.usage = false,
                // A base model may say nothing that is text to a random prompt.
                ErrorKind::Empty => break record,
                _ => return Err(probe_failed(&args.url, error)),
            }
        };
        counts.push(record.input_tokens.map(|tokens| (count, tokens)));
    }
    let known = match counts.as_slice() {
        [Some(few), Some(many)] => Counting::from_two(*few, *many),
        _ => None,
    };
    if known.is_none() {
        endpoint.extras.usage = false;
    }
    Ok(known.unwrap_or(Counting::UNKNOWN))
}

fn probe_failed(url: &str, error: &record::RequestError) -> Failure {
    let failure = Failure::new("the endpoint answers no request").cause(error.message.clone()).help(client::remedy(url, error.kind));
    if error.kind.is_lost_contact() { failure.exit(Exit::LostContact) } else { failure }
}

fn nothing_succeeded(report: &Report) -> Failure {
    let failures = || report.points.iter().flat_map(|point| &point.summary.failed);
    let failure = failures().fold(Failure::new("no request succeeded"), |failure, (_, failures)| {
        failure.cause(format!("{} times: {}", failures.count, failures.example))
    });
    let lost = failures().any(|(kind, _)| kind.is_lost_contact());
    let most = failures().max_by_key(|(_, failures)| failures.count);
    let failure = most.map_or(failure.clone(), |(kind, _)| failure.help(client::remedy(&report.url, *kind)));
    if lost { failure.exit(Exit::LostContact) } else { failure }
}
