//! From the requests of a point to its figures. Pure: records in, numbers out.

use std::collections::BTreeMap;

use forge_eval::statistics::quantile;
use serde::Serialize;

use super::record::{ErrorKind, Record};
use super::slo::Objectives;

/// Mean and percentiles of a time, in milliseconds.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Times {
    /// Mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 90 % are at most this.
    pub p90: f64,
    /// 95 %.
    pub p95: f64,
    /// 99 %.
    pub p99: f64,
    /// Largest.
    pub max: f64,
    /// How many.
    pub count: usize,
}

impl Times {
    /// Of times in seconds; `None` without any.
    pub fn of(seconds: impl Iterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = seconds.map(|value| value * 1e3).collect();
        sorted.sort_by(f64::total_cmp);
        let at = |share| quantile(&sorted, share);
        Some(Times {
            mean: sorted.iter().sum::<f64>() / sorted.len() as f64,
            p50: at(0.5)?,
            p90: at(0.9)?,
            p95: at(0.95)?,
            p99: at(0.99)?,
            max: at(1.0)?,
            count: sorted.len(),
        })
    }
}

/// Failures of one kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Failures {
    /// How many.
    pub count: usize,
    /// What the first of them said.
    pub example: String,
}

/// Requests that kept their objectives.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Goodput {
    /// Such requests per second.
    pub requests_per_s: f64,
    /// Their answer tokens per second.
    pub output_tokens_per_s: f64,
    /// Their share of all requests, failed ones included.
    pub share: f64,
}

/// Figures of one point.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Summary {
    /// Seconds from the first request's start to the last one's end.
    pub duration_s: f64,
    /// Requests that succeeded.
    pub completed: usize,
    /// Requests that failed, by kind.
    pub failed: BTreeMap<ErrorKind, Failures>,
    /// Most requests under way at once.
    pub peak_concurrency: usize,
    /// Requests sent per second, from the first to the last; `None` where that is no time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sent_per_s: Option<f64>,
    /// Requests completed per second.
    pub requests_per_s: f64,
    /// Answer tokens of completed requests per second.
    pub output_tokens_per_s: f64,
    /// Prompt and answer tokens of completed requests per second.
    pub total_tokens_per_s: f64,
    /// Mean prompt, as the server counts; as asked for where it does not.
    pub mean_input_tokens: f64,
    /// Mean answer.
    pub mean_output_tokens: f64,
    /// Time to first token.
    pub ttft_ms: Option<Times>,
    /// Inter-token latency: every gap between chunks with text.
    pub itl_ms: Option<Times>,
    /// Time per output token after the first, one value per request.
    pub tpot_ms: Option<Times>,
    /// Whole time of a request.
    pub e2e_ms: Option<Times>,
    /// Where objectives are set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub goodput: Option<Goodput>,
}

impl Summary {
    /// Of the requests of a point.
    pub fn of(records: &[Record], objectives: Option<&Objectives>) -> Self {
        let good: Vec<&Record> = records.iter().filter(|record| record.error.is_none()).collect();
        let start = records.iter().map(|record| record.start_s).fold(f64::INFINITY, f64::min);
        let end = records.iter().map(|record| record.start_s + record.e2e_s).fold(0.0, f64::max);
        let duration_s = (end - start).max(f64::MIN_POSITIVE);
        let per_s = |count: usize| count as f64 / duration_s;
        let input = |record: &Record| record.input_tokens.unwrap_or(record.wanted_input_tokens);
        let inputs: usize = good.iter().map(|record| input(record)).sum();
        let outputs: usize = good.iter().map(|record| record.output_tokens).sum();
        let mean = |sum: usize| sum as f64 / good.len().max(1) as f64;
        let goodput = objectives.map(|objectives| {
            let kept: Vec<_> = good.iter().filter(|record| objectives.kept_by(record)).collect();
            Goodput {
                requests_per_s: per_s(kept.len()),
                output_tokens_per_s: per_s(kept.iter().map(|record| record.output_tokens).sum()),
                share: kept.len() as f64 / records.len().max(1) as f64,
            }
        });
        let last_start = records.iter().map(|record| record.start_s).fold(start, f64::max);
        let sent_per_s = (last_start > start).then(|| (records.len() - 1) as f64 / (last_start - start));
        Summary {
            duration_s,
            sent_per_s,
            completed: good.len(),
            failed: failures(records),
            peak_concurrency: peak_concurrency(records),
            requests_per_s: per_s(good.len()),
            output_tokens_per_s: per_s(outputs),
            total_tokens_per_s: per_s(inputs + outputs),
            mean_input_tokens: mean(inputs),
            mean_output_tokens: mean(outputs),
            ttft_ms: Times::of(good.iter().filter_map(|record| record.ttft_s)),
            itl_ms: Times::of(good.iter().flat_map(|record| record.gaps_s.iter().copied())),
            tpot_ms: Times::of(good.iter().filter_map(|record| record.tpot_s())),
            e2e_ms: Times::of(good.iter().map(|record| record.e2e_s)),
            goodput,
        }
    }

    /// Requests that failed.
    pub fn failures(&self) -> usize {
        self.failed.values().map(|failures| failures.count).sum()
    }
}

fn failures(records: &[Record]) -> BTreeMap<ErrorKind, Failures> {
    let mut failed: BTreeMap<ErrorKind, Failures> = BTreeMap::new();
    for error in records.iter().filter_map(|record| record.error.as_ref()) {
        failed.entry(error.kind).or_insert_with(|| Failures { count: 0, example: error.message.clone() }).count += 1;
    }
    failed
}

fn peak_concurrency(records: &[Record]) -> usize {
    let starts = records.iter().map(|record| (record.start_s, 1_isize));
    let ends = records.iter().map(|record| (record.start_s + record.e2e_s, -1));
    let mut changes: Vec<(f64, isize)> = starts.chain(ends).collect();
    // An end before a start of the same moment.
    changes.sort_by(|left, right| left.0.total_cmp(&right.0).then(left.1.cmp(&right.1)));
    let (mut now, mut peak) = (0, 0);
    for (_, change) in changes {
        now += change;
        peak = peak.max(now);
    }
    peak.unsigned_abs()
}

#[cfg(test)]
mod tests {
    use super::super::record::RequestError;
    use super::*;

    fn record(start_s: f64, ttft_s: f64, gaps_s: &[f64]) -> Record {
        let e2e_s = ttft_s + gaps_s.iter().sum::<f64>();
        Record {
            start_s,
            wanted_input_tokens: 10,
            input_tokens: Some(12),
            output_tokens: gaps_s.len() + 1,
            ttft_s: Some(ttft_s),
            gaps_s: gaps_s.to_vec(),
            e2e_s,
            ..Record::default()
        }
    }

    #[test]
    fn figures_are_those_of_their_definitions() {
        let mut records = vec![record(0.0, 0.1, &[0.1, 0.1, 0.2]), record(0.25, 0.3, &[0.05]), record(0.5, 0.2, &[0.1, 0.2])];
        records.push(Record { start_s: 0.6, e2e_s: 0.4, error: Some(RequestError::new(ErrorKind::Deadline, "late")), ..Record::default() });
        let objectives = Objectives { ttft_s: Some(0.25), ..Objectives::default() };
        let summary = Summary::of(&records, Some(&objectives));
        assert!((summary.duration_s - 1.0).abs() < 1e-12);
        assert_eq!((summary.completed, summary.failures(), summary.peak_concurrency), (3, 1, 2));
        assert_eq!(summary.failed[&ErrorKind::Deadline].example, "late");
        assert!(summary.sent_per_s.is_some_and(|rate| (rate - 5.0).abs() < 1e-9), "three gaps in 0.6 s");
        assert!((summary.requests_per_s - 3.0).abs() < 1e-9 && (summary.output_tokens_per_s - 9.0).abs() < 1e-9);
        assert!((summary.total_tokens_per_s - 45.0).abs() < 1e-9 && (summary.mean_input_tokens - 12.0).abs() < 1e-9);
        let ttft = summary.ttft_ms.expect("three values");
        assert!((ttft.mean - 200.0).abs() < 1e-9 && (ttft.p50 - 200.0).abs() < 1e-9 && (ttft.p90 - 280.0).abs() < 1e-9, "{ttft:?}");
        assert_eq!(summary.itl_ms.map(|times| times.count), Some(6));
        let goodput = summary.goodput.expect("objectives were set");
        assert!((goodput.requests_per_s - 2.0).abs() < 1e-9 && (goodput.share - 0.5).abs() < 1e-9);
        assert!((goodput.output_tokens_per_s - 7.0).abs() < 1e-9);
    }

    #[test]
    fn nothing_that_succeeded_has_no_times() {
        let failed = Record { error: Some(RequestError::new(ErrorKind::Connect, "no route")), ..Record::default() };
        let summary = Summary::of(&[failed], None);
        assert!(summary.ttft_ms.is_none() && summary.e2e_ms.is_none() && summary.completed == 0);
    }
}
