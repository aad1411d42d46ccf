//! Traces cross processes, and reach a receiver.

use std::time::Duration;

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};
use tracing_subscriber::layer::SubscriberExt;

use super::*;

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

struct Receiver(mpsc::UnboundedSender<ExportTraceServiceRequest>);

#[tonic::async_trait]
impl TraceService for Receiver {
    async fn export(&self, request: Request<ExportTraceServiceRequest>) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let _ = self.0.send(request.into_inner());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn spans_of_one_trace_reach_the_receiver() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let (sender, mut received) = mpsc::unbounded_channel();
    let server = tonic::transport::Server::builder().add_service(TraceServiceServer::new(Receiver(sender)));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));

    let options = TelemetryOptions {
        service: "forge-test".into(),
        instance: "t1".into(),
        otlp_endpoint: Some(endpoint),
        ..TelemetryOptions::default()
    };
    let telemetry = Telemetry::new(&options).unwrap();
    let subscriber = tracing_subscriber::registry().with(telemetry.layer());
    ::tracing::subscriber::with_default(subscriber, || {
        let span = ::tracing::info_span!(target: "forge_test", "answer");
        set_parent(&span, &format!("00-{TRACE}-00f067aa0ba902b7-01"));
        let _entered = span.enter();
        let mut metadata = MetadataMap::new();
        inject(&mut metadata);
        assert!(from_metadata(&metadata).starts_with(&format!("00-{TRACE}-")), "{metadata:?}");
        set_texts(&span, "gen_ai.response.finish_reasons", vec!["stop".into()]);
        let inner = ::tracing::info_span!(target: "forge_test", "decode");
        inner.in_scope(|| assert!(current_traceparent().contains(TRACE)));
    });
    tokio::task::spawn_blocking(move || drop(telemetry)).await.unwrap();

    let mut names = Vec::new();
    while names.len() < 2 {
        let request = tokio::time::timeout(Duration::from_secs(10), received.recv()).await.unwrap().unwrap();
        for resource in request.resource_spans {
            for span in resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                assert_eq!(hex::encode(&span.trace_id), TRACE);
                names.push(span.name);
            }
        }
    }
    names.sort();
    assert_eq!(names, ["answer", "decode"]);
}

#[test]
fn a_trace_travels_without_a_receiver() {
    let telemetry = Telemetry::new(&TelemetryOptions::default()).unwrap();
    ::tracing::subscriber::with_default(tracing_subscriber::registry().with(telemetry.layer()), || {
        let span = ::tracing::info_span!(target: "forge_test", "answer");
        set_parent(&span, &format!("00-{TRACE}-00f067aa0ba902b7-01"));
        span.in_scope(|| assert!(current_traceparent().contains(TRACE), "{}", current_traceparent()));
        assert_eq!(trace_id(&span), TRACE);
        // What begins here is part of a trace that another process may send.
        let own = ::tracing::info_span!(target: "forge_test", "begin");
        assert!(own.in_scope(current_traceparent).ends_with("-01"));
    });
}

struct Heard(std::sync::Arc<std::sync::Mutex<Vec<String>>>);

impl<S: ::tracing::Subscriber> Layer<S> for Heard {
    fn on_event(&self, event: &::tracing::Event<'_>, _context: tracing_subscriber::layer::Context<'_, S>) {
        let metadata = event.metadata();
        self.0.lock().unwrap().push(format!("{} {}", metadata.level(), metadata.target()));
    }
}

#[test]
fn a_process_s_own_layer_hears_what_is_logged_and_libraries_make_nothing_more() {
    let heard = std::sync::Arc::default();
    let options = TelemetryOptions { log_filter: "info,forge_test=debug".into(), ..TelemetryOptions::default() };
    let telemetry = Telemetry::new(&options).unwrap();
    let subscriber = subscriber(&options, Box::new(Heard(std::sync::Arc::clone(&heard))), &telemetry).unwrap();
    ::tracing::subscriber::with_default(subscriber, || {
        ::tracing::info!(target: "h2", "a connection");
        ::tracing::debug!(target: "forge_test", "ours");
        ::tracing::trace!(target: "h2", "a frame");
        assert!(!::tracing::enabled!(target: "h2", ::tracing::Level::DEBUG), "it would be built for nobody");
    });
    assert_eq!(*heard.lock().unwrap(), ["INFO h2", "DEBUG forge_test"]);

    let wrong = TelemetryOptions { log_filter: "forge_test=loud".into(), ..options };
    let error = start(&wrong).map(drop).unwrap_err().to_string();
    assert!(error.contains("log filter \"forge_test=loud\""), "{error}");
}

#[test]
fn text_that_names_no_trace_is_dropped() {
    for text in ["", "x", "00-00000000000000000000000000000000-00f067aa0ba902b7-01", &"0".repeat(500)] {
        let mut headers = HeaderMap::new();
        headers.insert(TRACEPARENT, text.parse().unwrap());
        assert_eq!(from_headers(&headers), "", "{text}");
    }
    assert_eq!(current_traceparent(), "");
}

#[tokio::test]
async fn a_receiver_that_cannot_be_one_is_refused() {
    let options = TelemetryOptions { otlp_endpoint: Some("host:4317".into()), ..TelemetryOptions::default() };
    assert!(Telemetry::new(&options).unwrap_err().to_string().contains("http://host:port"));
}
