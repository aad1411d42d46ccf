//! How far a measurement is: a bar on a terminal, a line now and then in a pipe; always on standard error.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Between two lines in a pipe.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// See the module documentation.
pub struct Meter {
    what: &'static str,
    total: usize,
    bar: Option<ProgressBar>,
    told: Instant,
}

impl Meter {
    /// Of `total` steps of something, such as `windows`.
    pub fn new(what: &'static str, total: usize) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{prefix} {wide_bar:.cyan/dim} {pos}/{len}  {msg}  {eta} left");
            let bar = ProgressBar::new(total as u64).with_prefix(what);
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        Meter { what, total, bar, told: Instant::now() }
    }

    /// `done` steps are done; `note` says what is known so far.
    pub fn at(&mut self, done: usize, note: &str) {
        match &self.bar {
            Some(bar) => {
                bar.set_message(note.to_owned());
                bar.set_position(done as u64);
            }
            None if self.told.elapsed() >= LINE_EVERY => {
                self.told = Instant::now();
                let separator = if note.is_empty() { "" } else { ": " };
                eprintln!("{} {done} of {}{separator}{note}", self.what, self.total);
            }
            None => {}
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
