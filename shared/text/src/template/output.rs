//! Rendering within bounds, and what its errors mean.

use std::error::Error as _;
use std::time::{Duration, Instant};

use minijinja::machinery::{eval, get_compiled_template, make_string_output};
use minijinja::value::{Object, Value};
use minijinja::{Environment, Error, ErrorKind, State};

use super::environment::TEMPLATE_NAME;
use super::{TemplateLimits, metered};
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
pub(super) struct LimitReached(pub(super) String);

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

/// Renders the template. Whatever it writes is counted by the meter first, so the text is bounded
/// while it grows.
pub(super) fn render(environment: &Environment<'static>, context: Value, limits: &TemplateLimits) -> Result<String> {
    let mut text = String::new();
    run(environment, context, &mut text).map_err(|error| classify(&error, limits))?;
    if text.len() > limits.output_bytes {
        return Err(TextError::TemplateLimit(format!("{} bytes of output", limits.output_bytes)));
    }
    Ok(text)
}

fn run<'a>(environment: &'a Environment<'a>, context: Value, text: &mut String) -> std::result::Result<(), Error> {
    let template = environment.get_template(TEMPLATE_NAME)?;
    let plain = get_compiled_template(&template);
    let instructions = metered::instructions(&plain.instructions)?;
    let blocks = metered::blocks(&plain.blocks)?;
    let mut output = make_string_output(text);
    eval(environment, &instructions, context, &blocks, &mut output, plain.initial_auto_escape.clone()).map(drop)
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
