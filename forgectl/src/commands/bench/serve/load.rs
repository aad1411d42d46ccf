//! How requests arrive: a fixed number at once, or by themselves at a rate.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::rngs::StdRng;
use rand_distr::{Distribution, Exp};
use serde::Serialize;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::client::{Endpoint, Request};
use super::record::Record;
use crate::meter::Meter;

/// How requests arrive at a point.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Load {
    /// So many under way at any time; a new one when one ends.
    Concurrency(usize),
    /// So many per second, as a Poisson process: whether or not earlier ones have ended.
    RequestRate(f64),
}

impl std::fmt::Display for Load {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Load::Concurrency(count) => write!(f, "{count} at once"),
            Load::RequestRate(rate) => write!(f, "{rate} per s"),
        }
    }
}

impl Load {
    /// The number that a sweep varies.
    pub fn value(&self) -> f64 {
        match self {
            Load::Concurrency(count) => *count as f64,
            Load::RequestRate(rate) => *rate,
        }
    }
}

/// When requests of a rate are sent, in seconds after the beginning.
pub fn arrivals(rate: f64, count: usize, seed: u64) -> Vec<f64> {
    let mut random = StdRng::seed_from_u64(seed);
    // The rate was checked to be positive, so the distribution exists.
    let gaps = Exp::new(rate);
    let mut at = 0.0;
    let times = (0..count).map(|_| {
        let now = at;
        at += gaps.as_ref().map_or(1.0 / rate, |gaps| gaps.sample(&mut random));
        now
    });
    times.collect()
}

/// What a load's requests are sent with.
pub struct Sender {
    /// Where to.
    pub endpoint: Arc<Endpoint>,
    /// How they arrive.
    pub load: Load,
    /// Time each has.
    pub timeout: Duration,
    /// Of the arrivals.
    pub seed: u64,
}

/// How requests went.
pub struct Outcome {
    /// In the order they ended.
    pub records: Vec<Record>,
    /// Whether it was stopped before all had ended; those under way are dropped then and not among the records.
    pub stopped: bool,
}

impl Sender {
    /// Sends the requests until all have ended or `stop` resolves.
    pub async fn send(&self, requests: Vec<Request>, mut stop: Pin<&mut impl Future<Output = ()>>) -> Outcome {
        let total = requests.len();
        let (sender, mut ended) = mpsc::unbounded_channel();
        // Dropped at the end, which ends what is still under way.
        let mut tasks = JoinSet::new();
        let begin = Instant::now();
        let timeout = self.timeout;
        match self.load {
            Load::Concurrency(count) => {
                let queue = Arc::new(Mutex::new(VecDeque::from(requests)));
                for _ in 0..count.min(total) {
                    let (endpoint, queue, sender) = (self.endpoint.clone(), queue.clone(), sender.clone());
                    tasks.spawn(async move {
                        let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                        while let Some(request) = next() {
                            let start_s = begin.elapsed().as_secs_f64();
                            // A receiver that is gone was stopped by the user.
                            let _ = sender.send(Record { start_s, ..endpoint.run(&request, timeout).await });
                        }
                    });
                }
            }
            Load::RequestRate(rate) => {
                for (request, start_s) in requests.into_iter().zip(arrivals(rate, total, self.seed)) {
                    let (endpoint, sender) = (self.endpoint.clone(), sender.clone());
                    tasks.spawn(async move {
                        tokio::time::sleep_until((begin + Duration::from_secs_f64(start_s)).into()).await;
                        let start_s = begin.elapsed().as_secs_f64();
                        let _ = sender.send(Record { start_s, ..endpoint.run(&request, timeout).await });
                    });
                }
            }
        }
        drop(sender);
        let mut meter = Meter::new("requests", total);
        let mut outcome = Outcome { records: Vec::with_capacity(total), stopped: false };
        loop {
            let record = tokio::select! {
                biased;
                () = stop.as_mut() => {
                    outcome.stopped = true;
                    return outcome;
                }
                record = ended.recv() => record,
            };
            let Some(record) = record else { return outcome };
            outcome.records.push(record);
            meter.at(outcome.records.len(), &self.load.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_have_their_rate_and_are_exponential() {
        let times = arrivals(50.0, 20_000, 5);
        assert_eq!(times, arrivals(50.0, 20_000, 5));
        let gaps: Vec<f64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        assert!((mean * 50.0 - 1.0).abs() < 0.03, "{mean}");
        // Of an exponential distribution 1 − 1/e lie below the mean.
        let below = gaps.iter().filter(|gap| **gap < mean).count() as f64 / gaps.len() as f64;
        assert!((below - 0.632).abs() < 0.02, "{below}");
        assert_eq!(times[0], 0.0);
    }
}
