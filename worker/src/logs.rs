//! The worker's last log lines in memory, for `forgectl logs`, and whoever follows them.
//!
//! Invariant: memory is bounded: lines, their length, and what a slow follower may be behind.

use std::collections::VecDeque;
use std::fmt::Write;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{broadcast, mpsc};
use tracing::field::{Field, Visit};
use tracing_subscriber::layer::{Context, Layer};

use crate::time::now_ms;

/// Lines that are kept.
const LINES_MAX: usize = 4096;
/// Longest line in bytes; the rest is cut.
const LINE_BYTES_MAX: usize = 4096;
/// Lines a follower may be behind before it misses some.
const FOLLOW_DEPTH: usize = 1024;

/// One line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLine {
    /// Milliseconds since 1970.
    pub at_ms: u64,
    /// `ERROR` to `TRACE`.
    pub level: &'static str,
    /// `service/index` it is about, or empty.
    pub replica: String,
    /// What it says, its fields behind it.
    pub text: String,
}

/// See the module documentation.
pub struct LogRing {
    lines: Mutex<VecDeque<LogLine>>,
    newest: broadcast::Sender<LogLine>,
}

impl Default for LogRing {
    fn default() -> Self {
        LogRing { lines: Mutex::default(), newest: broadcast::channel(FOLLOW_DEPTH).0 }
    }
}

impl LogRing {
    /// The layer that fills it.
    pub fn layer(self: &Arc<Self>) -> LogLayer {
        LogLayer(self.clone())
    }

    /// Adds a line.
    pub fn push(&self, line: LogLine) {
        let mut lines = self.lines.lock();
        if lines.len() == LINES_MAX {
            lines.pop_front();
        }
        lines.push_back(line.clone());
        // Under the lock, so that a follower sees each line once. Nobody may follow.
        let _ = self.newest.send(line);
    }

    /// The last `count` lines about a replica, or of all where it is empty, the oldest first.
    pub fn tail(&self, replica: &str, count: usize) -> Vec<LogLine> {
        last(&self.lines.lock(), replica, count)
    }

    /// The last `count` lines, then every new one. A reader that falls far behind is told how many it missed.
    pub fn follow(&self, replica: String, count: usize) -> mpsc::Receiver<LogLine> {
        let (sender, receiver) = mpsc::channel(64);
        let (tail, mut newest) = {
            let lines = self.lines.lock();
            (last(&lines, &replica, count), self.newest.subscribe())
        };
        tokio::spawn(async move {
            for line in tail {
                if sender.send(line).await.is_err() {
                    return;
                }
            }
            loop {
                let line = tokio::select! {
                    line = newest.recv() => line,
                    () = sender.closed() => return,
                };
                let line = match line {
                    Ok(line) if replica.is_empty() || line.replica == replica => line,
                    Ok(_) => continue,
                    Err(broadcast::error::RecvError::Lagged(missed)) => {
                        LogLine { at_ms: now_ms(), level: "WARN", replica: replica.clone(), text: format!("{missed} lines were missed") }
                    }
                    Err(broadcast::error::RecvError::Closed) => return,
                };
                if sender.send(line).await.is_err() {
                    return;
                }
            }
        });
        receiver
    }
}

fn last(lines: &VecDeque<LogLine>, replica: &str, count: usize) -> Vec<LogLine> {
    let mut last: Vec<LogLine> =
        lines.iter().rev().filter(|line| replica.is_empty() || line.replica == replica).take(count).cloned().collect();
    last.reverse();
    last
}

/// Writes every event into a [`LogRing`].
pub struct LogLayer(Arc<LogRing>);

impl<S: tracing::Subscriber> Layer<S> for LogLayer {
    fn on_event(&self, event: &tracing::Event<'_>, _context: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let mut text = fields.message;
        text.push_str(&fields.others);
        if text.len() > LINE_BYTES_MAX {
            text.truncate(text.floor_char_boundary(LINE_BYTES_MAX));
            text.push('…');
        }
        self.0.push(LogLine { at_ms: now_ms(), level: event.metadata().level().as_str(), replica: fields.replica, text });
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    replica: String,
    others: String,
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => value.clone_into(&mut self.message),
            "replica" => value.clone_into(&mut self.replica),
            name => self.other(name, &value),
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        match field.name() {
            "message" => self.message = format!("{value:?}"),
            "replica" => self.replica = format!("{value:?}"),
            name => self.other(name, value),
        }
    }
}

impl Fields {
    fn other(&mut self, name: &str, value: &dyn std::fmt::Debug) {
        // Writing to a String cannot fail.
        let _ = write!(self.others, " {name}={value:?}");
    }
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[tokio::test]
    async fn lines_are_kept_by_replica_and_followed() {
        let ring = Arc::new(LogRing::default());
        let subscriber = tracing_subscriber::registry().with(ring.layer());
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(replica = "a/0", load_s = 0.5, "model loaded");
            tracing::warn!(replica = %"b/0", "slow");
            tracing::info!("of nobody: {}", "é".repeat(LINE_BYTES_MAX));
        });
        let lines = ring.tail("a/0", 10);
        assert_eq!((lines.len(), lines[0].text.as_str(), lines[0].level), (1, "model loaded load_s=0.5", "INFO"));
        assert_eq!(ring.tail("", 2).iter().map(|line| line.replica.as_str()).collect::<Vec<_>>(), ["b/0", ""]);
        assert!(ring.tail("", 1)[0].text.len() <= LINE_BYTES_MAX + 3);

        let mut followed = ring.follow("b/0".into(), 5);
        ring.push(LogLine { at_ms: 1, level: "INFO", replica: "a/0".into(), text: "not this".into() });
        ring.push(LogLine { at_ms: 2, level: "INFO", replica: "b/0".into(), text: "new".into() });
        let texts = [followed.recv().await, followed.recv().await].map(|line| line.map(|line| line.text));
        assert_eq!(texts, [Some("slow".to_owned()), Some("new".to_owned())]);
        for _ in 0..2 * LINES_MAX {
            ring.push(LogLine { at_ms: 3, level: "INFO", replica: String::new(), text: "many".into() });
        }
        assert_eq!(ring.tail("", usize::MAX).len(), LINES_MAX);
    }
}
