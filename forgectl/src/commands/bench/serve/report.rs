//! The report as a table: what was asked, the figures, what failed.

use super::load::Load;
use super::summary::{Summary, Times};
use super::{Asked, Point, Report};
use crate::failure::Result;
use crate::output::{Column, OutputFormat, column, print_facts, print_list, print_text};

const TIMES: [Column; 7] = [column("MS"), column("MEAN"), column("P50"), column("P90"), column("P95"), column("P99"), column("MAX")];
const SWEEP: [Column; 10] = [
    column("LOAD"),
    column("REQ/S"),
    column("OUT TOK/S"),
    column("TTFT P50"),
    column("TTFT P99"),
    column("ITL P50"),
    column("ITL P99"),
    column("E2E P99"),
    column("GOODPUT"),
    column("FAILED"),
];

/// Prints a report: data as it is, tables for people.
///
/// # Errors
/// If standard output cannot be written.
pub fn print(format: OutputFormat, report: &Report) -> Result<()> {
    let facts = facts(report);
    if matches!(format, OutputFormat::Json | OutputFormat::Yaml) {
        return print_facts(format, report, &facts);
    }
    print_facts(format, report, &facts)?;
    for point in &report.points {
        if report.points.len() == 1 || format == OutputFormat::Wide {
            print_text("\n")?;
            print_point(format, point)?;
        }
    }
    if report.points.len() > 1 {
        print_text("\n")?;
        print_list(format, &report.points, &SWEEP, sweep_row)?;
    }
    Ok(())
}

fn facts(report: &Report) -> Vec<(&'static str, String)> {
    let extras = report.extras;
    let counted = match (extras.usage, report.counting) {
        (true, counting) => format!("by the server: {:.2} per word, {:.0} around a prompt", counting.per_word, counting.around),
        (false, _) => "the server tells no usage: a word of the prompt, and a chunk of the answer, count as one token".to_owned(),
    };
    let mut facts = vec![
        ("endpoint", format!("{}, {}, model {}", report.url, report.interface.path(), report.model)),
        ("tokens", counted),
        ("seed", format!("{}, {} requests of warm-up", report.seed, report.warmup_requests)),
    ];
    if report.stopped {
        let (loads, last) = (report.points.len(), report.points.last().map_or(0, |point| point.requests.len()));
        let Asked { loads: all_loads, requests } = report.asked;
        facts.push(("stopped", format!("at load {loads} of {all_loads}, when {last} of its {requests} requests had ended")));
    }
    if !extras.ignore_eos {
        facts.push(("answers", "may end early: the server was not told, or refuses, to ignore the end token".to_owned()));
    }
    facts
}

fn print_point(format: OutputFormat, point: &Point) -> Result<()> {
    let summary = &point.summary;
    let mut facts = vec![
        ("load", format!("{}, at most {} under way", point.load, summary.peak_concurrency)),
        ("requests", format!("{} completed in {:.2} s, {} failed", summary.completed, summary.duration_s, summary.failures())),
        (
            "throughput",
            format!(
                "{:.2} requests/s, {:.1} answer tokens/s, {:.1} tokens/s in all",
                summary.requests_per_s, summary.output_tokens_per_s, summary.total_tokens_per_s
            ),
        ),
        ("lengths", lengths(point)),
    ];
    if let Load::RequestRate(asked) = point.load {
        facts.insert(1, ("rate", rate(asked, summary.sent_per_s, point.requests.len())));
    }
    if let Some(goodput) = &summary.goodput {
        let text = format!(
            "{:.2} requests/s, {:.1} answer tokens/s, {:.1} % of requests",
            goodput.requests_per_s,
            goodput.output_tokens_per_s,
            100.0 * goodput.share
        );
        facts.push(("goodput", text));
    }
    for (kind, failures) in &summary.failed {
        facts.push(("failed", format!("{} {kind:?}: {}", failures.count, failures.example)));
    }
    print_facts(format, summary, &facts)?;
    print_text("\n")?;
    print_list(format, &time_rows(summary), &TIMES, |(name, times)| time_row(name, times))
}

/// Requests of which a Poisson process's own rate is within a tenth of the one asked for, usually.
const ENOUGH: usize = 100;

/// The rate that was asked for beside the one that came of it: arrivals are random.
fn rate(asked: f64, sent: Option<f64>, requests: usize) -> String {
    let sent = sent.map_or("-".to_owned(), |sent| format!("{sent:.2}"));
    let spread = 100.0 / (requests.saturating_sub(1).max(1) as f64).sqrt();
    let few = match requests < ENOUGH {
        true => format!(": few requests, whose rate is off by {spread:.0} % or so; give --requests {ENOUGH} or more"),
        false => String::new(),
    };
    format!("asked for {asked} requests/s, sent {sent}/s{few}")
}

/// Mean lengths, beside those asked for where they differ.
fn lengths(point: &Point) -> String {
    let count = point.requests.len().max(1) as f64;
    let mean = |length: fn(&super::Record) -> usize| point.requests.iter().map(length).sum::<usize>() as f64 / count;
    let beside = |found: f64, wanted: f64| if (found - wanted).abs() < 0.5 { String::new() } else { format!(" (asked for {wanted:.1})") };
    let (input, output) = (mean(|record| record.wanted_input_tokens), mean(|record| record.wanted_output_tokens));
    let summary = &point.summary;
    format!(
        "{:.1} prompt tokens{}, {:.1} answer tokens{} on average",
        summary.mean_input_tokens,
        beside(summary.mean_input_tokens, input),
        summary.mean_output_tokens,
        beside(summary.mean_output_tokens, output)
    )
}

fn time_rows(summary: &Summary) -> Vec<(&'static str, Option<Times>)> {
    vec![
        ("time to first token", summary.ttft_ms.clone()),
        ("between tokens (ITL)", summary.itl_ms.clone()),
        ("per token (TPOT)", summary.tpot_ms.clone()),
        ("whole request", summary.e2e_ms.clone()),
    ]
}

fn time_row(name: &str, times: &Option<Times>) -> Vec<String> {
    let figures = times.as_ref().map(|times| [times.mean, times.p50, times.p90, times.p95, times.p99, times.max]);
    let figures = figures.map_or(vec!["-".to_owned(); 6], |figures| figures.map(milliseconds).to_vec());
    [vec![name.to_owned()], figures].concat()
}

fn milliseconds(value: f64) -> String {
    format!("{value:.2}")
}

fn sweep_row(point: &Point) -> Vec<String> {
    let summary = &point.summary;
    let of = |times: &Option<Times>, value: fn(&Times) -> f64| times.as_ref().map_or("-".to_owned(), |times| milliseconds(value(times)));
    let goodput = summary.goodput.as_ref().map_or("-".to_owned(), |goodput| format!("{:.2}/s", goodput.requests_per_s));
    let load = match point.load {
        Load::Concurrency(count) => format!("{count} at once"),
        Load::RequestRate(rate) => match summary.sent_per_s {
            Some(sent) => format!("{rate}/s (sent {sent:.2}/s)"),
            None => format!("{rate}/s"),
        },
    };
    vec![
        load,
        format!("{:.2}", summary.requests_per_s),
        format!("{:.1}", summary.output_tokens_per_s),
        of(&summary.ttft_ms, |times| times.p50),
        of(&summary.ttft_ms, |times| times.p99),
        of(&summary.itl_ms, |times| times.p50),
        of(&summary.itl_ms, |times| times.p99),
        of(&summary.e2e_ms, |times| times.p99),
        goodput,
        summary.failures().to_string(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_told_beside_the_one_asked_for_and_few_requests_are_called_few() {
        let few = rate(40.0, Some(56.123), 10);
        assert!(few.starts_with("asked for 40 requests/s, sent 56.12/s: few requests, whose rate is off by 33 % or so"), "{few}");
        assert_eq!(rate(0.5, Some(0.48), 100), "asked for 0.5 requests/s, sent 0.48/s");
        assert!(rate(2.0, None, 1).starts_with("asked for 2 requests/s, sent -/s: few"));
    }
}
