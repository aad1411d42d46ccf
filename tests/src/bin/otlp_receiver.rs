//! An OTLP receiver (gRPC) for tests: every span that arrives becomes a line of JSON on standard output.
//!
//!     otlp_receiver HOST:PORT
//!
//! What it is not: a collector; it keeps nothing. Ids are hexadecimal; attributes are texts, numbers, booleans or lists.

use std::io::Write;

use anyhow::{Context, Result};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1::Span;
use serde_json::{Map, Value, json};
use tonic::{Request, Response, Status};

struct Receiver;

#[tonic::async_trait]
impl TraceService for Receiver {
    async fn export(&self, request: Request<ExportTraceServiceRequest>) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut out = std::io::stdout().lock();
        for resource in request.into_inner().resource_spans {
            let of = attributes(resource.resource.as_ref().map_or(&[], |resource| &resource.attributes));
            for span in resource.scope_spans.iter().flat_map(|scope| &scope.spans) {
                let line = line(span, &of);
                writeln!(out, "{line}").and_then(|()| out.flush()).map_err(|error| Status::internal(error.to_string()))?;
            }
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn line(span: &Span, resource: &Value) -> Value {
    json!({
        "service": resource["service.name"],
        "instance": resource["service.instance.id"],
        "name": span.name,
        "kind": span.kind,
        "trace": hex(&span.trace_id),
        "span": hex(&span.span_id),
        "parent": hex(&span.parent_span_id),
        "nanoseconds": span.end_time_unix_nano.saturating_sub(span.start_time_unix_nano),
        "attributes": attributes(&span.attributes),
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn attributes(attributes: &[KeyValue]) -> Value {
    Value::Object(attributes.iter().map(|pair| (pair.key.clone(), value(pair.value.as_ref()))).collect::<Map<_, _>>())
}

fn value(value: Option<&AnyValue>) -> Value {
    match value.and_then(|value| value.value.as_ref()) {
        Some(Any::StringValue(text)) => json!(text),
        Some(Any::BoolValue(is_so)) => json!(is_so),
        Some(Any::IntValue(count)) => json!(count),
        Some(Any::DoubleValue(number)) => json!(number),
        Some(Any::ArrayValue(list)) => list.values.iter().map(|inner| self::value(Some(inner))).collect(),
        _ => Value::Null,
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let address = std::env::args().nth(1).context("usage: otlp_receiver HOST:PORT")?;
    let address = address.parse().with_context(|| format!("{address:?} is no address with a port"))?;
    let server = tonic::transport::Server::builder().add_service(TraceServiceServer::new(Receiver));
    server.serve(address).await.with_context(|| format!("cannot serve on {address}"))
}
