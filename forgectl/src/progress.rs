//! What a pull tells while it runs: bars on a terminal, plain lines in a pipe; always on standard error.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::sync::{LazyLock, Mutex};
use std::time::{Duration, Instant};

use forge_store::{PullEvent, PullProgress};
use indicatif::{HumanBytes, MultiProgress, ProgressBar, ProgressStyle};

/// Between two lines about one file in a pipe.
const LINE_EVERY: Duration = Duration::from_secs(5);
/// A bar of a file whose size is known.
const SIZED: &str = "{msg} {wide_bar:.cyan/dim} {bytes}/{total_bytes}  {bytes_per_sec}  {eta} left";
/// And of one whose size is not.
const UNSIZED: &str = "{msg} {spinner} {bytes}  {bytes_per_sec}";

/// All bars of this process, so that whatever else is written to the terminal can make them step aside.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Writes something to standard error beside the bars.
pub fn beside_bars<T>(write: impl FnOnce() -> T) -> T {
    BARS.suspend(write)
}

/// A bar of bytes, last of those shown.
pub fn bar(what: &str, total_bytes: Option<u64>) -> ProgressBar {
    let bar = match total_bytes {
        Some(total) => ProgressBar::new(total).with_style(style(SIZED)),
        None => ProgressBar::no_length().with_style(style(UNSIZED)),
    };
    BARS.add(bar.with_message(what.to_owned()))
}

/// Progress fit for where standard error goes.
pub fn pull_progress() -> Box<dyn PullProgress + Send> {
    if std::io::stderr().is_terminal() { Box::new(Bars::default()) } else { Box::new(Lines::default()) }
}

/// A line for what is not about bytes; nothing for the rest.
fn sentence(event: &PullEvent) -> Option<String> {
    match event {
        PullEvent::TryingSource { source, position, of } if *of > 1 => Some(format!("source {position} of {of}: {source}")),
        PullEvent::TryingSource { source, .. } => Some(format!("source: {source}")),
        PullEvent::SourceFailed { source, reason } => Some(format!("{source} did not deliver: {reason}")),
        PullEvent::Note { text } => Some(text.clone()),
        PullEvent::Retrying { name, reason, attempt, pause } => {
            Some(format!("{name}: {reason}; try {attempt} follows in {:.1} s", pause.as_secs_f64()))
        }
        PullEvent::Waiting { what } => Some(format!("waiting for another process: {what}")),
        _ => None,
    }
}

/// Bars, one per file.
#[derive(Default)]
struct Bars {
    files: Mutex<HashMap<String, ProgressBar>>,
}

impl Bars {
    /// The bar of a file in a phase, made where it is missing.
    fn bar(&self, name: &str, phase: &'static str, total_bytes: Option<u64>) -> ProgressBar {
        let mut files = self.files.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let bar = files.entry(format!("{phase} {name}")).or_insert_with(|| {
            let short = name.rsplit('/').next().unwrap_or(name);
            bar(&format!("{phase} {short}"), total_bytes)
        });
        bar.clone()
    }

    fn finish(&self, name: &str) {
        let mut files = self.files.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        for phase in ["fetching", "checking"] {
            if let Some(bar) = files.remove(&format!("{phase} {name}")) {
                bar.finish_and_clear();
            }
        }
    }

    fn say(&self, text: String) {
        // A terminal that cannot be written to has nobody to tell.
        let _ = BARS.println(text);
    }
}

/// Only this file's own templates come here; a wrong one shows as the library's default bar.
fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

impl PullProgress for Bars {
    fn event(&self, event: PullEvent) {
        match event {
            PullEvent::FileStarted { name, total_bytes, resumed_at_bytes } => {
                let bar = self.bar(&name, "fetching", total_bytes);
                // Without this, bytes that were here before would count as this transfer's speed.
                bar.set_position(resumed_at_bytes);
                bar.reset_eta();
                if resumed_at_bytes > 0 {
                    self.say(format!("{name}: resumed at {}", HumanBytes(resumed_at_bytes)));
                }
            }
            PullEvent::FileBytes { name, bytes, total_bytes } => {
                let bar = self.bar(&name, "fetching", total_bytes);
                // Some hosts tell the size only with the first bytes.
                if let Some(total) = total_bytes.filter(|_| bar.length().is_none()) {
                    bar.set_length(total);
                    bar.set_style(style(SIZED));
                }
                bar.set_position(bytes);
            }
            PullEvent::Verifying { name, bytes, total_bytes } => {
                self.bar(&name, "checking", Some(total_bytes)).set_position(bytes);
                if bytes >= total_bytes {
                    self.finish(&name);
                }
            }
            PullEvent::FileDone { name, bytes, already_present } => {
                self.finish(&name);
                self.say(done_line(&name, bytes, already_present));
            }
            other => {
                if let Some(text) = sentence(&other) {
                    self.say(text);
                }
            }
        }
    }
}

fn done_line(name: &str, bytes: u64, already_present: bool) -> String {
    let how = if already_present { "already here" } else { "fetched, checksum agrees" };
    format!("{name}: {} {how}", HumanBytes(bytes))
}

/// Lines, a few per file.
#[derive(Default)]
pub struct Lines {
    files: Mutex<HashMap<String, Transfer>>,
}

/// How far a file was when it was last spoken of.
struct Transfer {
    started: Instant,
    started_bytes: u64,
    told: Instant,
}

impl Lines {
    /// A line about something that was started, where one is due.
    pub fn bytes(&self, name: &str, bytes: u64, total_bytes: Option<u64>) -> Option<String> {
        let mut files = self.files.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let transfer = files.get_mut(name)?;
        if transfer.told.elapsed() < LINE_EVERY {
            return None;
        }
        transfer.told = Instant::now();
        let speed = bytes.saturating_sub(transfer.started_bytes) as f64 / transfer.started.elapsed().as_secs_f64();
        let share = match total_bytes {
            Some(total) if total > 0 => format!(" of {} ({}%)", HumanBytes(total), bytes.saturating_mul(100) / total),
            _ => String::new(),
        };
        Some(format!("{name}: {}{share}, {}/s", HumanBytes(bytes), HumanBytes(speed as u64)))
    }

    /// Something begins, of which so many bytes are there.
    pub fn start(&self, name: &str, bytes: u64) {
        let now = Instant::now();
        let mut files = self.files.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        files.insert(name.to_owned(), Transfer { started: now, started_bytes: bytes, told: now });
    }
}

impl PullProgress for Lines {
    fn event(&self, event: PullEvent) {
        let line = match event {
            PullEvent::FileStarted { name, total_bytes, resumed_at_bytes } => {
                self.start(&name, resumed_at_bytes);
                let size = total_bytes.map(|total| format!(" {}", HumanBytes(total))).unwrap_or_default();
                let resumed = match resumed_at_bytes {
                    0 => String::new(),
                    bytes => format!(", resumed at {}", HumanBytes(bytes)),
                };
                Some(format!("fetching {name}{size}{resumed}"))
            }
            PullEvent::FileBytes { name, bytes, total_bytes } => self.bytes(&name, bytes, total_bytes),
            PullEvent::FileDone { name, bytes, already_present } => Some(done_line(&name, bytes, already_present)),
            other => sentence(&other),
        };
        if let Some(line) = line {
            eprintln!("{line}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_few_and_tell_share_and_speed() {
        let lines = Lines::default();
        lines.start("a", 50);
        assert_eq!(lines.bytes("a", 60, Some(100)), None, "too soon");
        assert_eq!(lines.bytes("b", 60, Some(100)), None, "never started");
        let past = Instant::now().checked_sub(LINE_EVERY * 2).expect("the machine runs for longer");
        let transfer = Transfer { started: past, started_bytes: 0, told: past };
        lines.files.lock().expect("one thread").insert("a".into(), transfer);
        let line = lines.bytes("a", 20 << 20, Some(40 << 20)).expect("due");
        assert!(line.starts_with("a: 20.00 MiB of 40.00 MiB (50%), 2.0"), "{line}");
    }

    #[test]
    fn what_is_decided_is_told() {
        let event = PullEvent::TryingSource { source: "hf:a/b".into(), position: 1, of: 3 };
        assert_eq!(sentence(&event).as_deref(), Some("source 1 of 3: hf:a/b"));
        let event = PullEvent::FileBytes { name: "a".into(), bytes: 1, total_bytes: None };
        assert_eq!(sentence(&event), None);
    }
}
