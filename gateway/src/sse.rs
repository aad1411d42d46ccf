//! Server-sent events as OpenAI's clients expect them: one JSON chunk per event, `[DONE]` at the end, a comment while
//! nothing happens, and an error event if the request fails after its stream began.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::http::{HeaderName, HeaderValue};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream::unfold;

use crate::generation::{Generation, Output};

/// Turns events into chunks.
pub(crate) trait Chunks: Send + 'static {
    /// Chunks before the first event.
    fn begin(&mut self) -> Vec<String>;
    /// Chunks of an event.
    fn event(&mut self, output: Output) -> Vec<String>;
}

struct State<C> {
    generation: Generation,
    chunks: C,
    ready: VecDeque<String>,
    ended: bool,
}

/// The streaming response of an accepted request. Dropping its body cancels the request.
pub(crate) fn stream<C: Chunks>(generation: Generation, mut chunks: C, keep_alive: Duration) -> Response {
    let ready = chunks.begin().into();
    let state = State { generation, chunks, ready, ended: false };
    let events = unfold(state, |mut state| async move {
        let data = state.next().await?;
        Some((Ok::<Event, Infallible>(Event::default().data(data)), state))
    });
    let body = Sse::new(events).keep_alive(KeepAlive::new().interval(keep_alive).text("waiting"));
    // Proxies that buffer would hold tokens back.
    let unbuffered = [(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"))];
    (unbuffered, body).into_response()
}

impl<C: Chunks> State<C> {
    async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(chunk) = self.ready.pop_front() {
                return Some(chunk);
            }
            if self.ended {
                return None;
            }
            match self.generation.next().await {
                Some(Ok(output)) => self.ready.extend(self.chunks.event(output)),
                Some(Err(error)) => {
                    self.ended = true;
                    self.ready.push_back(error.body().to_string());
                }
                None => {
                    self.ended = true;
                    self.ready.push_back("[DONE]".to_owned());
                }
            }
        }
    }
}
