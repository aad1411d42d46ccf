//! What a run tells a person.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::callers::Served;
use crate::simulation::{Outcome, Plan};

/// A failed run: seed, invariant, faults, timeline and the command that replays it. `left_out` are the faults that did not
/// matter.
pub fn failure(plan: &Plan, outcome: &Outcome, left_out: usize) -> String {
    let mut text = String::new();
    let Some(violation) = &outcome.violation else { return text };
    // Writing to a string does not fail.
    let _ = writeln!(text, "seed {} breaks: {}\n  {}\n", plan.seed, violation.invariant, violation.seen);
    let _ = writeln!(text, "faults that matter ({left_out} others left out):");
    for fault in &plan.faults {
        let _ = writeln!(text, "  {:>9.3} s  for {} ms: {:?}", fault.at_ms as f64 / 1_000.0, fault.for_ms, fault.kind);
    }
    let _ = writeln!(text, "\nlast events:\n{}", outcome.timeline);
    let _ = writeln!(text, "replay: cargo run --profile sim -p forge-simulator -- --seed {} --trace", plan.seed);
    text
}

/// Counts of many runs.
#[derive(Debug, Default)]
pub struct Totals {
    /// Runs.
    pub runs: u64,
    /// Simulated milliseconds.
    pub simulated_ms: u64,
    /// Events.
    pub events: u64,
    /// Applied entries.
    pub entries: u64,
    /// Acknowledged changes, answered reads, given up questions.
    pub answers: [u64; 3],
    /// What became of the callers' orders.
    pub served: Served,
    /// Faults by kind.
    pub faults: BTreeMap<&'static str, u64>,
}

impl Totals {
    /// Adds a run.
    pub fn add(&mut self, outcome: &Outcome) {
        self.runs += 1;
        self.simulated_ms += outcome.simulated_ms;
        self.events += outcome.events;
        self.entries += outcome.entries;
        self.answers.iter_mut().zip(outcome.answers).for_each(|(sum, more)| *sum += more);
        self.served = self.served.plus(&outcome.served);
        for (kind, count) in &outcome.faults {
            *self.faults.entry(kind).or_default() += count;
        }
    }

    /// As text; `wall_s` is what they took.
    pub fn text(&self, wall_s: f64) -> String {
        let simulated_s = self.simulated_ms as f64 / 1_000.0;
        let [done, reads, given_up] = self.answers;
        let mut text = format!(
            "{} seeds: {simulated_s:.0} simulated seconds in {wall_s:.1} s ({:.0} a second), {} events, {} entries, {done} changes, {reads} reads, {given_up} given up\n",
            self.runs,
            simulated_s / wall_s.max(0.001),
            self.events,
            self.entries,
        );
        let Served { answers, tokens, begun_again, refused, hung_up, given_up } = self.served;
        let _ = writeln!(
            text,
            "{answers} answers with {tokens} tokens, {begun_again} begun again at another gateway, {refused} refusals, {hung_up} hung up, {given_up} given up"
        );
        for (kind, count) in &self.faults {
            let _ = writeln!(text, "  {count:>9}  {kind}");
        }
        text
    }
}
