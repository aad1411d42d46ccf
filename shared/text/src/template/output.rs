//! Rendering within bounds, and what its errors mean.

use std::error::Error as _;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use minijinja::value::{Object, Value};
use minijinja::{Environment, Error, ErrorKind, State};

use super::TemplateLimits;
use super::environment::TEMPLATE_NAME;
use crate::{Result, TextError};

/// Variable that holds the deadline; not a name a template can write.
const DEADLINE_NAME: &str = "forge deadline";

/// The moment rendering has to be over.
#[derive(Debug)]
struct Deadline(Instant);

impl Object for Deadline {}

/// What `raise_exception` puts into the error.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Raised(pub(super) String);

/// Why rendering was ended.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
struct LimitReached(String);

/// The deadline as a variable.
pub(super) fn deadline(time: Duration) -> (&'static str, Value) {
    let now = Instant::now();
    let end = now.checked_add(time).unwrap_or(now);
    (DEADLINE_NAME, Value::from_object(Deadline(end)))
}

fn time_is_up() -> LimitReached {
    LimitReached("time".to_string())
}

/// Ends the rendering when its time is up.
pub(super) fn check_deadline(state: &State) -> std::result::Result<(), Error> {
    let deadline = state.lookup(DEADLINE_NAME);
    let end = deadline.as_ref().and_then(|value| value.downcast_object_ref::<Deadline>());
    if end.is_some_and(|end| Instant::now() > end.0) {
        return Err(Error::new(ErrorKind::InvalidOperation, "time is up").with_source(time_is_up()));
    }
    Ok(())
}

/// Collects output up to a number of bytes.
struct BoundedOutput {
    bytes: Vec<u8>,
    limit_bytes: usize,
    end: Instant,
    reached: Option<LimitReached>,
}

impl Write for BoundedOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > self.limit_bytes {
            self.reached = Some(LimitReached(format!("{} bytes of output", self.limit_bytes)));
        } else if Instant::now() > self.end {
            self.reached = Some(time_is_up());
        }
        if self.reached.is_some() {
            return Err(io::ErrorKind::Other.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Renders the template.
pub(super) fn render(environment: &Arc<Environment<'static>>, context: Value, limits: &TemplateLimits) -> Result<String> {
    let now = Instant::now();
    let mut output = BoundedOutput {
        bytes: Vec::new(),
        limit_bytes: limits.output_bytes,
        end: now.checked_add(limits.time).unwrap_or(now),
        reached: None,
    };
    let rendered = environment.get_template(TEMPLATE_NAME).and_then(|template| template.render_captured_to(context, &mut output).map(drop));
    if let Some(limit) = output.reached {
        return Err(TextError::TemplateLimit(limit.0));
    }
    rendered.map_err(|error| classify(&error, limits))?;
    String::from_utf8(output.bytes).map_err(|error| TextError::TemplateFailed(error.to_string()))
}

/// Tells a template's refusal from its failure and from a bound.
fn classify(error: &Error, limits: &TemplateLimits) -> TextError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = cause {
        if let Some(raised) = current.downcast_ref::<Raised>() {
            return TextError::TemplateRaised(raised.0.clone());
        }
        if let Some(limit) = current.downcast_ref::<LimitReached>() {
            return TextError::TemplateLimit(limit.0.clone());
        }
        if let Some(inner) = current.downcast_ref::<Error>() {
            if inner.kind() == ErrorKind::OutOfFuel {
                return TextError::TemplateLimit(format!("{} instructions", limits.fuel));
            }
            if inner.detail() == Some("recursion limit exceeded") {
                return TextError::TemplateLimit(format!("{} nested calls", limits.recursion));
            }
        }
        cause = current.source();
    }
    TextError::TemplateFailed(message(error))
}

/// The message without the engine's multi-line debug output.
pub(super) fn message(error: &Error) -> String {
    let mut text = error.kind().to_string();
    if let Some(detail) = error.detail() {
        text = format!("{text}: {detail}");
    }
    if let Some(line) = error.line() {
        text = format!("{text} (template line {line})");
    }
    if let Some(source) = error.source() {
        text = format!("{text}: {source}");
    }
    text
}
