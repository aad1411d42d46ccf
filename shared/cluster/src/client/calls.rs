//! One call with its retries: whom to ask, how long, and what an end without an answer means.

use std::future::Future;
use std::time::Duration;

use forge_proto::cluster::cluster_client::ClusterClient;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::time::Instant;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use super::channels::{Channels, EXPECTED};
use super::route::{Next, Route};
use crate::api::ClusterError;
use crate::status::{Failure, from_status};
use crate::tracing::inject;

/// Longest wait for one coordinator's answer. A frozen one is noticed by then; the next is asked with the same request id.
const TRY_TIMEOUT: Duration = Duration::from_secs(3);
/// Pause after the first round of questions to all.
const FIRST_PAUSE: Duration = Duration::from_millis(50);

/// How long a call goes on, and what its tries are like.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// Of all tries together.
    timeout: Duration,
    /// Of one of them.
    longest_try: Duration,
    /// An answer that was lost matters: the error is then `Unknown`.
    changes: bool,
}

impl Patience {
    /// A question that a coordinator answers at once.
    pub(super) fn reading(timeout: Duration) -> Self {
        Patience { timeout, longest_try: TRY_TIMEOUT, changes: false }
    }

    /// A command.
    pub(super) fn changing(timeout: Duration) -> Self {
        Patience { changes: true, ..Patience::reading(timeout) }
    }

    /// A question whose answer takes work, of a worker for example: one coordinator may have all of the time for it. One
    /// that froze is noticed by its connection.
    pub(super) fn working(timeout: Duration) -> Self {
        Patience { longest_try: timeout, ..Patience::reading(timeout) }
    }

    /// The next try's time, of what is left. Whoever is asked leaves time for the others.
    fn next_try(self, left: Duration, has_more: bool) -> Duration {
        let all = self.longest_try >= self.timeout;
        if has_more && !all { left / 2 } else { left }.min(self.longest_try)
    }
}

impl Channels {
    /// Asks coordinators until one answers, the error is final, or the time is over.
    pub(super) async fn call<Q, R, F>(
        &self,
        patience: Patience,
        send: impl Fn(ClusterClient<Channel>, Request<Q>) -> F,
        request: Q,
    ) -> Result<R, ClusterError>
    where
        Q: Clone,
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let send = &send;
        self.attempts(patience, |address, wait| self.ask(address, wait, send, request.clone())).await
    }

    /// Asks every coordinator at once, round after round, so that one that cannot be reached takes no time from the others.
    /// The first answer that `is_best`, or any of a round without one.
    pub(super) async fn call_all<Q, R, F>(
        &self,
        timeout: Duration,
        is_best: impl Fn(&R) -> bool,
        send: impl Fn(ClusterClient<Channel>, Request<Q>) -> F,
        request: Q,
    ) -> Result<R, ClusterError>
    where
        Q: Clone,
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let (begun, send) = (Instant::now(), &send);
        let mut tally = Tally::default();
        let mut pause = FIRST_PAUSE;
        loop {
            let left = timeout.saturating_sub(begun.elapsed());
            let wait = left.min(TRY_TIMEOUT);
            let ask = |address: String| {
                let asked = tokio::time::timeout(wait, self.ask(address.clone(), wait, send, request.clone()));
                async move { (address, asked.await.unwrap_or_else(|_| Err(no_answer(wait)))) }
            };
            let mut asked: FuturesUnordered<_> = self.addresses().all().iter().cloned().map(ask).collect();
            let mut any = None;
            let mut refused = None;
            while let Some((address, answer)) = asked.next().await {
                match answer {
                    Ok(reply) if is_best(&reply) => return Ok(reply),
                    Ok(reply) => any = Some(reply),
                    Err(status) => {
                        let failure = from_status(&status, EXPECTED);
                        match failure.is_retryable {
                            true => tally.add(&address, failure),
                            false => refused = Some(failure.error),
                        }
                    }
                }
            }
            if let Some(reply) = any {
                return Ok(reply);
            }
            if let Some(error) = refused.or_else(|| tally.everyone_refuses()) {
                return Err(error);
            }
            if pause >= timeout.saturating_sub(begun.elapsed()) {
                return Err(tally.end(false, begun.elapsed()));
            }
            tokio::time::sleep(jittered(pause)).await;
            pause = (pause * 2).min(TRY_TIMEOUT);
            tally.begin_round();
        }
    }

    /// One question to one coordinator.
    async fn ask<Q, R, F>(
        &self,
        address: String,
        wait: Duration,
        send: &impl Fn(ClusterClient<Channel>, Request<Q>) -> F,
        request: Q,
    ) -> Result<R, Status>
    where
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let client = self.cluster(&address)?;
        let mut request = Request::new(request);
        request.set_timeout(wait);
        inject(request.metadata_mut());
        Ok(send(client, request).await?.into_inner())
    }

    /// The loop of [`Channels::call`] and of the beginnings of streams. `attempt` is given an address and its time.
    pub(super) async fn attempts<R, F>(&self, patience: Patience, attempt: impl Fn(String, Duration) -> F) -> Result<R, ClusterError>
    where
        F: Future<Output = Result<R, Status>>,
    {
        let (begun, Patience { timeout, changes, .. }) = (Instant::now(), patience);
        let mut route = Route::new(&self.addresses());
        let mut tally = Tally::default();
        loop {
            let left = timeout.saturating_sub(begun.elapsed());
            let address = match route.next_step() {
                Next::Ask(address) if !left.is_zero() => address,
                Next::Pause(pause) if pause < left => {
                    if let Some(refusal) = tally.everyone_refuses() {
                        return Err(refusal);
                    }
                    tokio::time::sleep(jittered(pause)).await;
                    route.begin_round(&self.addresses());
                    tally.begin_round();
                    continue;
                }
                Next::Ask(_) | Next::Pause(_) => return Err(tally.end(changes, begun.elapsed())),
            };
            let wait = patience.next_try(left, route.has_more());
            let status = match tokio::time::timeout(wait, attempt(address.clone(), wait)).await {
                Ok(Ok(reply)) => {
                    self.prefer(&address);
                    return Ok(reply);
                }
                Ok(Err(status)) => status,
                Err(_) => no_answer(wait),
            };
            let failure = from_status(&status, EXPECTED);
            if !failure.is_retryable {
                return Err(failure.error);
            }
            match &failure.leader {
                Some(leader) => {
                    self.learn(leader);
                    route.follow(&address, leader);
                }
                // It did answer.
                None if matches!(failure.error, ClusterError::Unfinished { .. }) => {}
                None => self.demote(&address),
            }
            tally.add(&address, failure);
        }
    }
}

fn no_answer(wait: Duration) -> Status {
    Status::deadline_exceeded(format!("no answer within {} ms", wait.as_millis()))
}

/// What the tries so far came to.
#[derive(Debug, Default)]
struct Tally {
    may_have_happened: bool,
    /// What a coordinator said it was waiting for: it says more than a try that was cut short afterwards.
    unfinished: Option<String>,
    last: String,
    refusals: Vec<ClusterError>,
    others: usize,
}

impl Tally {
    fn add(&mut self, address: &str, failure: Failure) {
        self.may_have_happened |= failure.may_have_happened;
        match failure.error {
            refusal @ ClusterError::Forbidden { .. } => {
                self.last = format!("{address}: {refusal}");
                self.refusals.push(refusal);
            }
            ClusterError::Unfinished { reason, .. } => {
                self.others += 1;
                self.unfinished = Some(reason);
            }
            ClusterError::Unavailable { reason, .. } | ClusterError::Unknown { reason } => {
                self.others += 1;
                self.last = format!("{address}: {reason}");
            }
            other => {
                self.others += 1;
                self.last = format!("{address}: {other}");
            }
        }
    }

    fn begin_round(&mut self) {
        self.refusals.clear();
        self.others = 0;
    }

    /// A certificate that nobody takes will not be taken later either.
    fn everyone_refuses(&mut self) -> Option<ClusterError> {
        if self.others == 0 && !self.may_have_happened { self.refusals.pop() } else { None }
    }

    fn end(&mut self, changes: bool, waited: Duration) -> ClusterError {
        if let Some(refusal) = self.everyone_refuses() {
            return refusal;
        }
        let waited_ms = waited.as_millis() as u64;
        if let Some(reason) = self.unfinished.take() {
            return ClusterError::Unfinished { waited_ms, reason };
        }
        let reason =
            if self.last.is_empty() { "the time was over before anyone was asked".to_owned() } else { std::mem::take(&mut self.last) };
        if changes && self.may_have_happened {
            return ClusterError::Unknown { reason };
        }
        ClusterError::Unavailable { waited_ms, reason }
    }
}

/// Half to all of it, so that clients of a fallen coordinator do not come back in one beat.
pub(super) fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(rand::random_range(0.5..=1.0))
}
