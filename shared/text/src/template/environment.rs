//! The template engine as `transformers` sets up jinja2.

use jiff::Timestamp;
use jiff::tz::TimeZone;
use minijinja::machinery::parse;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, UndefinedBehavior};

use super::output::{Raised, message};
use super::{TemplateLimits, constants, filters, growth, metered, python, shape};
use crate::{Result, TextError};

/// The one template of an environment.
pub(super) const TEMPLATE_NAME: &str = "chat_template";
/// Largest template; the largest published ones have some 30 kB.
const MAX_SOURCE_BYTES: usize = 1 << 20;

/// Compiles a template into an environment of its own.
pub(super) fn compile(source: &str, limits: &TemplateLimits) -> Result<Environment<'static>> {
    let compiled = shape::compiling(|| compile_here(source, limits));
    compiled.unwrap_or_else(|| Err(TextError::TemplateInvalid("no thread could be made to compile it".to_string())))
}

fn compile_here(source: &str, limits: &TemplateLimits) -> Result<Environment<'static>> {
    if source.len() > MAX_SOURCE_BYTES {
        return Err(TextError::TemplateInvalid(format!("it has {} bytes, at most {MAX_SOURCE_BYTES} are allowed", source.len())));
    }
    let invalid = |error: Error| TextError::TemplateInvalid(message(&error));
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(invalid)?;
    environment.set_syntax(syntax.clone());
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_formatter(python::format);
    environment.set_unknown_method_callback(python::call_method);
    environment.add_function("raise_exception", raise_exception);
    growth::register(&mut environment);
    metered::register(&mut environment);
    filters::register(&mut environment);
    set_limits(&mut environment, limits);
    // As jinja2 reads it: every kind of line end is one newline.
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let source = without_generation_tags(&source);
    if let Some(reason) = shape::too_long(&source, &syntax).map_err(invalid)? {
        return Err(TextError::TemplateInvalid(reason));
    }
    let parsed = parse(&source, TEMPLATE_NAME, syntax).map_err(invalid)?;
    if let Some(limit) = constants::too_large(&parsed) {
        return Err(TextError::TemplateInvalid(format!("its constants have more than {limit} bytes; repeat texts fewer times")));
    }
    drop(parsed);
    environment.add_template_owned(TEMPLATE_NAME, source).map_err(invalid)?;
    Ok(environment)
}

/// Sets the bounds that the engine keeps itself.
pub(super) fn set_limits(environment: &mut Environment<'static>, limits: &TemplateLimits) {
    environment.set_fuel(Some(limits.fuel));
    environment.set_recursion_limit(limits.recursion);
}

/// How a template refuses messages.
fn raise_exception(message: String) -> std::result::Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}

/// `strftime_now(format)` at a fixed moment, UTC.
pub(super) fn strftime_now(unix_seconds: i64) -> Value {
    Value::from_function(move |format: &str| -> std::result::Result<String, Error> {
        let failed = |error: jiff::Error| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}"));
        let now = Timestamp::from_second(unix_seconds).map_err(failed)?.to_zoned(TimeZone::UTC);
        jiff::fmt::strtime::format(format, &now).map_err(failed)
    })
}

/// `{% generation %}` marks what a model is trained on. It changes no text, and the engine knows
/// no such block, so it becomes a plain scope.
fn without_generation_tags(source: &str) -> String {
    let mut result = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else {
            break;
        };
        let (tag, after) = rest[start..].split_at(length + 2);
        result.push_str(&rest[..start]);
        rest = after;
        let inner = &tag[2..tag.len() - 2];
        let word = inner.trim_matches(['-', '+']).trim();
        match word {
            "generation" => result.push_str(&tag.replacen(word, "with", 1)),
            "endgeneration" => result.push_str(&tag.replacen(word, "endwith", 1)),
            _ => result.push_str(tag),
        }
    }
    result.push_str(rest);
    result
}
