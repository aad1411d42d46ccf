//! Where log lines go: standard error, as text or JSON, filtered by `--log-level` or `FORGE_LOG`; and where spans go.
//!
//! A command is one span, so that what a cluster does for it can be found: below the one that `TRACEPARENT` names, where a
//! script is part of a trace.

use std::io::Write;
use std::sync::{Arc, OnceLock};

use clap::ValueEnum;
use forge_cluster::tracing::{Telemetry, TelemetryOptions};
use forge_worker::logs::LogRing;
use tokio::runtime::Runtime;
use tracing::Span;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use crate::failure::{Failure, Result};
use crate::progress::beside_bars;

/// The last lines of this process, for `forgectl logs` at a cluster that runs in it.
pub fn lines() -> Arc<LogRing> {
    static LINES: OnceLock<Arc<LogRing>> = OnceLock::new();
    LINES.get_or_init(Arc::default).clone()
}

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

/// What to log and trace.
pub struct LogOptions<'a> {
    /// A level or a list such as `info,forge_engine=debug`.
    pub filter: &'a str,
    /// Form of a line.
    pub format: LogFormat,
    /// `http://host:4317` of an OTLP receiver for spans.
    pub otlp_endpoint: Option<&'a str>,
}

/// Running logs and traces. Dropping it sends the last spans, for a bounded time.
pub struct Logging {
    _telemetry: Telemetry,
    /// The exporter's. After the telemetry, which needs it to the end.
    _runtime: Option<Runtime>,
}

/// Starts logging. Keep what it gives until the process ends.
///
/// # Errors
/// If the filter or the receiver's address cannot be read.
pub fn start(options: &LogOptions<'_>) -> Result<Logging> {
    let filter = options.filter;
    let parsed = EnvFilter::try_new(filter).map_err(|error| {
        Failure::usage(format!("--log-level (FORGE_LOG): {filter:?} is no filter"))
            .cause(error.to_string())
            .help("write error, warn, info, debug or trace, or a list such as info,forge_engine=debug")
    })?;
    let runtime = match options.otlp_endpoint {
        None => None,
        Some(_) => {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().thread_name("forge-otlp").build();
            Some(runtime.map_err(|error| Failure::of(&error).while_doing("could not start"))?)
        }
    };
    let telemetry = {
        let _entered = runtime.as_ref().map(Runtime::enter);
        Telemetry::new(&TelemetryOptions {
            service: "forgectl".into(),
            instance: format!("forgectl-{}", std::process::id()),
            otlp_endpoint: options.otlp_endpoint.map(str::to_owned),
            ..TelemetryOptions::default()
        })
    };
    let telemetry = telemetry.map_err(|error| Failure::usage(format!("--otlp-endpoint (FORGE_OTLP_ENDPOINT): {error}")))?;
    // What is not logged is not kept either.
    let kept = lines().layer().with_filter(parsed.clone());
    let lines = tracing_subscriber::fmt::layer().with_writer(|| BesideBars);
    let lines = lines.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()));
    let lines = match options.format {
        LogFormat::Text => lines.with_target(false).boxed(),
        LogFormat::Json => lines.json().boxed(),
    };
    let started = tracing_subscriber::registry().with(telemetry.layer()).with(kept).with(lines.with_filter(parsed)).try_init();
    started.map_err(|error| Failure::new(format!("could not start logging: {error}")))?;
    Ok(Logging { _telemetry: telemetry, _runtime: runtime })
}

/// The span of one command, as it was typed: `cluster status`.
pub fn command_span(command: &str) -> Span {
    let span = tracing::info_span!("command", otel.name = format!("forgectl {command}"), otel.kind = "client");
    // No variable, or one that names no trace: the command begins one.
    forge_cluster::tracing::set_parent(&span, &std::env::var("TRACEPARENT").unwrap_or_default());
    span
}
