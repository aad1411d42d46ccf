//! How far a model's weights are loaded, told while it is waited for: a bar on a terminal, a line every few seconds in a
//! pipe; always on standard error.
//!
//! It is not what makes it load: it looks at the loader's numbers now and then.

use std::io::IsTerminal;
use std::pin::pin;
use std::time::Duration;

use indicatif::ProgressBar;

use crate::progress::{self, Lines};

/// Between two looks. What is loaded before the first one is not spoken of.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Waits for `loading` and shows meanwhile what `bytes` says: those done, and those in all.
pub async fn watched<T>(name: &str, bytes: impl Fn() -> (u64, u64), loading: impl Future<Output = T>) -> T {
    let mut loading = pin!(loading);
    let mut shown = Shown::new(format!("loading {name}"));
    loop {
        tokio::select! {
            biased;
            done = loading.as_mut() => return done,
            () = tokio::time::sleep(LOOK_EVERY) => shown.at(bytes()),
        }
    }
}

/// What was told so far.
struct Shown {
    what: String,
    bar: Option<ProgressBar>,
    lines: Lines,
}

impl Shown {
    fn new(what: String) -> Self {
        let lines = Lines::default();
        lines.start(&what, 0);
        Shown { what, bar: None, lines }
    }

    fn at(&mut self, (done, total): (u64, u64)) {
        if total == 0 {
            return;
        }
        if std::io::stderr().is_terminal() {
            let bar = self.bar.get_or_insert_with(|| progress::bar(&self.what, Some(total)));
            bar.set_position(done);
        } else if let Some(line) = self.lines.bytes(&self.what, done, Some(total)) {
            eprintln!("{line}");
        }
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[tokio::test]
    async fn the_numbers_are_looked_at_until_it_is_loaded() {
        let looks = AtomicU64::new(0);
        let bytes = || (looks.fetch_add(1, Ordering::Relaxed), 100);
        watched("m", bytes, tokio::time::sleep(LOOK_EVERY * 5 / 2)).await;
        assert!((1..=2).contains(&looks.load(Ordering::Relaxed)));
        assert_eq!(watched("m", || unreachable!("it was there at once"), std::future::ready(7)).await, 7);
    }
}
