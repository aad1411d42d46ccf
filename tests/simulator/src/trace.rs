//! What happened: a digest of everything, and the last events in words.
//!
//! Invariant: the digest takes in every event in order, so that two runs with one digest did the same.

use std::collections::VecDeque;
use std::fmt::Write;

use crate::host::Host;

/// Events that are kept for a report.
const KEPT: usize = 400;

/// One line of the timeline.
#[derive(Debug, Clone)]
pub struct Line {
    /// When, simulated milliseconds.
    pub at_ms: u64,
    /// Where.
    pub host: Host,
    /// What.
    pub what: String,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Trace {
    digest: u64,
    events: u64,
    lines: VecDeque<Line>,
    prints: bool,
}

impl Trace {
    /// A trace that also prints every line, if `prints`.
    pub fn new(prints: bool) -> Self {
        Trace { digest: 0xcbf2_9ce4_8422_2325, prints, ..Trace::default() }
    }

    /// Takes an event into the digest.
    pub fn event(&mut self, at_ms: u64, host: Host, kind: u64, detail: u64) {
        self.events += 1;
        for number in [at_ms, host.number(), kind, detail] {
            self.digest = (self.digest ^ number).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23);
        }
    }

    /// Adds a line to the timeline.
    pub fn line(&mut self, at_ms: u64, host: Host, what: String) {
        if self.prints {
            println!("{:>9.3} s  {host:<4}  {what}", at_ms as f64 / 1_000.0);
        }
        if self.lines.len() == KEPT {
            self.lines.pop_front();
        }
        self.lines.push_back(Line { at_ms, host, what });
    }

    /// Of all events so far.
    pub fn digest(&self) -> u64 {
        self.digest
    }

    /// How many there were.
    pub fn events(&self) -> u64 {
        self.events
    }

    /// The last `count` lines as text.
    pub fn timeline(&self, count: usize) -> String {
        let mut text = String::new();
        for line in self.lines.iter().skip(self.lines.len().saturating_sub(count)) {
            // Writing to a string does not fail.
            let _ = writeln!(text, "{:>9.3} s  {:<4}  {}", line.at_ms as f64 / 1_000.0, line.host, line.what);
        }
        text
    }
}
