//! Logs and traces of a process: lines on standard error, spans to an OTLP receiver where one is configured, and W3C
//! `traceparent` from process to process.
//!
//! What it is not: metrics (`forge_shared::telemetry`), nor a collector.
//!
//! Invariants: a receiver that is away or slow costs dropped spans, never a request; without a receiver a request's trace
//! id still travels with it, so that logs of several hosts can be put together.

use std::collections::HashMap;
use std::time::Duration;

use ::tracing::Span;
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{Status, TraceContextExt, TraceId, TracerProvider};
use opentelemetry::{Array, Context, KeyValue, StringValue, Value};
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use tonic::codegen::http::HeaderMap;
use tonic::metadata::{MetadataMap, MetadataValue};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::filter::{EnvFilter, LevelFilter, Targets};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::{LookupSpan, Registry};
use tracing_subscriber::util::SubscriberInitExt;

/// W3C's name of the header and metadata key.
pub const TRACEPARENT: &str = "traceparent";
/// `00-` + 32 + `-` + 16 + `-` + 2 characters; longer ones of later versions are cut by W3C's rules.
const MAX_TRACEPARENT_CHARS: usize = 128;
/// Longest single export.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(3);
/// Longest wait for the last spans at the end of a process.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// Form of a log line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// What to log and trace.
#[derive(Debug, Clone, Default)]
pub struct TelemetryOptions {
    /// `service.name` of its spans: `forge-coordinator`, `forge-worker`, …
    pub service: String,
    /// `service.instance.id`: the process's name in the cluster.
    pub instance: String,
    /// Where spans go: `http://host:4317` (OTLP over gRPC). None: nowhere.
    pub otlp_endpoint: Option<String>,
    /// A level or a list such as `info,forge_gateway=debug`.
    pub log_filter: String,
    /// Form of log lines.
    pub log_format: LogFormat,
}

/// What cannot be started.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TelemetryError {
    /// Of the log's filter.
    #[error("log filter {filter:?}: {reason}; write error, warn, info, debug or trace, or a list such as info,forge_gateway=debug")]
    Filter {
        /// What was given.
        filter: String,
        /// What is wrong.
        reason: String,
    },
    /// Of the receiver's address.
    #[error("otlpEndpoint {endpoint:?}: {reason}")]
    Endpoint {
        /// What was given.
        endpoint: String,
        /// What is wrong and what to write.
        reason: String,
    },
    /// Another part of this process began already.
    #[error("logging was started before")]
    Started,
}

/// Running telemetry. Dropping it sends the last spans, for a bounded time.
#[derive(Debug)]
pub struct Telemetry {
    provider: SdkTracerProvider,
    is_exporting: bool,
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        if self.is_exporting {
            let _ = self.provider.shutdown_with_timeout(FLUSH_TIMEOUT);
        }
    }
}

impl Telemetry {
    /// Prepares spans. Call it within a tokio runtime where there is a receiver.
    ///
    /// # Errors
    /// [`TelemetryError::Endpoint`].
    pub fn new(options: &TelemetryOptions) -> Result<Self, TelemetryError> {
        let attributes = [KeyValue::new("service.instance.id", options.instance.clone())];
        let resource = Resource::builder().with_service_name(options.service.clone()).with_attributes(attributes).build();
        // Also without a receiver: another process of the trace may have one, and takes no part in what its caller left out.
        let sampler = Sampler::ParentBased(Box::new(Sampler::AlwaysOn));
        let builder = SdkTracerProvider::builder().with_resource(resource).with_sampler(sampler);
        let provider = match &options.otlp_endpoint {
            None => builder.build(),
            Some(endpoint) => {
                let wrong = |reason: String| TelemetryError::Endpoint { endpoint: endpoint.clone(), reason };
                if !endpoint.starts_with("http://") {
                    return Err(wrong("write http://host:port of an OTLP receiver that speaks gRPC (usually port 4317)".into()));
                }
                let exporter = SpanExporter::builder().with_tonic().with_endpoint(endpoint).with_timeout(EXPORT_TIMEOUT).build();
                let exporter = exporter.map_err(|error| wrong(error.to_string()))?;
                builder.with_batch_exporter(exporter).build()
            }
        };
        Ok(Telemetry { provider, is_exporting: options.otlp_endpoint.is_some() })
    }

    /// The layer that makes OpenTelemetry spans of Forge's own spans.
    pub fn layer<S>(&self) -> impl Layer<S> + Send + Sync + use<S>
    where
        S: ::tracing::Subscriber + for<'span> LookupSpan<'span> + Send + Sync,
    {
        let ours = Targets::new().with_target("forge", LevelFilter::INFO);
        tracing_opentelemetry::layer().with_tracer(self.provider.tracer("forge")).with_filter(ours)
    }
}

/// Starts logs and traces of this process. Keep what it gives until the process ends.
///
/// # Errors
/// [`TelemetryError`].
pub fn start(options: &TelemetryOptions) -> Result<Telemetry, TelemetryError> {
    start_with(options, Box::new(tracing_subscriber::layer::Identity::new()))
}

/// As [`start`], with a layer of the process's own, which sees the events that are logged.
///
/// # Errors
/// As [`start`].
pub fn start_with(options: &TelemetryOptions, own: Box<dyn Layer<Registry> + Send + Sync>) -> Result<Telemetry, TelemetryError> {
    let telemetry = Telemetry::new(options)?;
    subscriber(options, own, &telemetry)?.try_init().map_err(|_| TelemetryError::Started)?;
    Ok(telemetry)
}

/// Where events and spans of this process go. Only spans of Forge's own pass by the log's filter: a layer without one would
/// make every library build its most detailed events.
fn subscriber(
    options: &TelemetryOptions,
    own: Box<dyn Layer<Registry> + Send + Sync>,
    telemetry: &Telemetry,
) -> Result<impl ::tracing::Subscriber + Send + Sync + use<>, TelemetryError> {
    let filter = || {
        EnvFilter::try_new(&options.log_filter)
            .map_err(|error| TelemetryError::Filter { filter: options.log_filter.clone(), reason: error.to_string() })
    };
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = match options.log_format {
        LogFormat::Text => lines.with_target(false).with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).boxed(),
        LogFormat::Json => lines.json().boxed(),
    };
    Ok(tracing_subscriber::registry().with(own.with_filter(filter()?)).with(telemetry.layer()).with(lines.with_filter(filter()?)))
}

/// `traceparent` of the current span, or empty outside of a trace.
pub fn current_traceparent() -> String {
    traceparent_of(&Span::current().context())
}

/// Makes a remote span the parent of this one. Empty or unreadable text changes nothing.
pub fn set_parent(span: &Span, traceparent: &str) {
    let context = context_of(traceparent);
    if context.span().span_context().is_valid() {
        // Without the layer (a program that uses this crate as a library) there is no trace to be part of.
        let _ = span.set_parent(context);
    }
}

/// Adds to a span what is known only now, under a name of OpenTelemetry's conventions. Log lines do not show it.
pub fn set_attribute(span: &Span, key: &'static str, value: impl Into<Value>) {
    span.set_attribute(key, value.into());
}

/// As [`set_attribute`], for a list of texts.
pub fn set_texts(span: &Span, key: &'static str, texts: Vec<String>) {
    let texts: Vec<StringValue> = texts.into_iter().map(StringValue::from).collect();
    span.set_attribute(key, Value::Array(Array::String(texts)));
}

/// Marks a span as failed.
pub fn set_error(span: &Span, reason: &str) {
    span.set_status(Status::error(reason.to_owned()));
}

/// Hex of the trace that a span belongs to, or empty: by it the log lines of several hosts are found.
pub fn trace_id(span: &Span) -> String {
    let context = span.context();
    let trace_id = context.span().span_context().trace_id();
    if trace_id == TraceId::INVALID { String::new() } else { trace_id.to_string() }
}

/// Writes the current span into a call's metadata.
pub fn inject(metadata: &mut MetadataMap) {
    if let Ok(value) = MetadataValue::try_from(current_traceparent())
        && !value.is_empty()
    {
        metadata.insert(TRACEPARENT, value);
    }
}

/// `traceparent` of a call, or empty.
pub fn from_metadata(metadata: &MetadataMap) -> String {
    readable(metadata.get(TRACEPARENT).and_then(|value| value.to_str().ok()))
}

/// `traceparent` of an HTTP request, or empty.
pub fn from_headers(headers: &HeaderMap) -> String {
    readable(headers.get(TRACEPARENT).and_then(|value| value.to_str().ok()))
}

/// The text, if it names a trace.
fn readable(text: Option<&str>) -> String {
    let text = text.unwrap_or_default();
    if context_of(text).span().span_context().is_valid() { text.to_owned() } else { String::new() }
}

fn context_of(traceparent: &str) -> Context {
    if traceparent.is_empty() || traceparent.len() > MAX_TRACEPARENT_CHARS {
        return Context::new();
    }
    let carrier = HashMap::from([(TRACEPARENT.to_owned(), traceparent.to_owned())]);
    TraceContextPropagator::new().extract_with_context(&Context::new(), &carrier)
}

fn traceparent_of(context: &Context) -> String {
    let mut carrier = HashMap::new();
    TraceContextPropagator::new().inject_context(context, &mut carrier);
    carrier.remove(TRACEPARENT).unwrap_or_default()
}

#[cfg(test)]
#[path = "tracing_tests.rs"]
mod tests;
