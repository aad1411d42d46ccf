//! The answer to a submission as a stream of messages: events that are ready together go together.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use forge_cluster::engine::reply::{EngineReply, MAX_EVENTS, reply_to_wire};
use forge_cluster::tracing::{set_attribute, set_error};
use forge_proto::engine as wire;
use forge_shared::generate::EngineEvent;
use forge_shared::link::EventStream;
use futures::Stream;
use tracing::Span;

/// See the module documentation. Dropping it cancels the request.
pub(super) struct Replies {
    first: Option<EngineReply>,
    events: Option<EventStream>,
    deadline: Pin<Box<tokio::time::Sleep>>,
    ready: Vec<EngineEvent>,
    /// Ends with it.
    span: Span,
}

impl Replies {
    /// Of an admitted request, which fails after `timeout`.
    pub(super) fn admitted(numerics_id: String, events: EventStream, timeout: Duration, span: Span) -> Self {
        Replies { span, ..Replies::new(EngineReply::Admitted { numerics_id }, Some(events), timeout) }
    }

    /// Of a refused one.
    pub(super) fn refused(error: forge_shared::generate::AdmitError) -> Self {
        Replies::new(EngineReply::Refused(error), None, Duration::ZERO)
    }

    fn new(first: EngineReply, events: Option<EventStream>, timeout: Duration) -> Self {
        Replies { first: Some(first), events, deadline: Box::pin(tokio::time::sleep(timeout)), ready: Vec::new(), span: Span::none() }
    }
}

fn message(replies: impl IntoIterator<Item = EngineReply>) -> wire::EngineReply {
    wire::EngineReply { events: replies.into_iter().map(|reply| reply_to_wire(&reply)).collect() }
}

/// What an event says about the request's span.
fn trace(span: &Span, event: &EngineEvent) {
    match event {
        EngineEvent::Done(usage) => {
            set_attribute(span, "gen_ai.usage.input_tokens", i64::from(usage.prompt_tokens));
            set_attribute(span, "gen_ai.usage.cache_read.input_tokens", i64::from(usage.cached_prompt_tokens));
            set_attribute(span, "gen_ai.usage.output_tokens", i64::from(usage.completion_tokens));
        }
        EngineEvent::Failed { reason, .. } => set_error(span, reason),
        EngineEvent::PromptLogprobs(_) | EngineEvent::Token(_) | EngineEvent::Finished { .. } => {}
    }
}

impl Stream for Replies {
    type Item = Result<wire::EngineReply, tonic::Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        // Alone and at once: headers are sent to the client on it.
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(message([first]))));
        }
        let this = &mut *self;
        let Some(events) = &mut this.events else { return Poll::Ready(None) };
        match events.poll_recv_many(context, &mut this.ready, MAX_EVENTS) {
            Poll::Ready(0) => Poll::Ready(None),
            Poll::Ready(_) => {
                for event in &this.ready {
                    trace(&this.span, event);
                }
                Poll::Ready(Some(Ok(message(this.ready.drain(..).map(EngineReply::Event)))))
            }
            Poll::Pending => match this.deadline.as_mut().poll(context) {
                Poll::Pending => Poll::Pending,
                Poll::Ready(()) => {
                    this.events = None;
                    let reason = "the request's time is over".to_owned();
                    Poll::Ready(Some(Ok(message([EngineReply::Event(EngineEvent::Failed { reason, retryable: false })]))))
                }
            },
        }
    }
}
