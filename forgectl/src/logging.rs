//! Where log lines go: standard error, as text or JSON, filtered by `--log-level` or `FORGE_LOG`.

use std::io::Write;

use clap::ValueEnum;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;

use crate::failure::{Failure, Result};
use crate::progress::beside_bars;

/// Form of a log line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Standard error, where a line must not end up behind a bar.
struct BesideBars;

impl Write for BesideBars {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        beside_bars(|| std::io::stderr().write(bytes))
    }

    fn flush(&mut self) -> std::io::Result<()> {
        std::io::stderr().flush()
    }
}

/// Starts logging. `filter` is a level or a list such as `info,forge_engine=debug`.
///
/// # Errors
/// If the filter cannot be read.
pub fn start(filter: &str, format: LogFormat) -> Result<()> {
    let parsed = EnvFilter::try_new(filter).map_err(|error| {
        Failure::usage(format!("--log-level (FORGE_LOG): {filter:?} is no filter"))
            .cause(error.to_string())
            .help("write error, warn, info, debug or trace, or a list such as info,forge_engine=debug")
    })?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(parsed)
        .with_writer(|| BesideBars)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_span_events(FmtSpan::NONE);
    let started = match format {
        LogFormat::Text => builder.with_target(false).try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
    started.map_err(|error| Failure::new(format!("could not start logging: {error}")))
}
