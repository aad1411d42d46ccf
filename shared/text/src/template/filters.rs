//! Filters and tests where jinja2 and the engine differ, and those the engine lacks.

use minijinja::value::{Kwargs, Rest, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State};

use super::{json, meter, python};

/// Most spaces that one indentation or alignment may ask for.
pub(super) const MAX_WIDTH: usize = 10_000;

/// Adds them.
pub(super) fn register(environment: &mut Environment<'static>) {
    environment.add_filter("tojson", json::tojson);
    environment.add_filter("indent", indent);
    environment.add_filter("length", length);
    environment.add_filter("count", length);
    environment.add_filter("wordcount", |text: &str| python_words(text));
    environment.add_filter("filesizeformat", minijinja_contrib::filters::filesizeformat);
    environment.add_filter("striptags", minijinja_contrib::filters::striptags);
    environment.add_filter("truncate", minijinja_contrib::filters::truncate);
    environment.add_filter("int", int);
    environment.add_filter("float", float);
    environment.add_function("cycler", |items: Rest<Value>| minijinja_contrib::globals::cycler(items.0));
    environment.add_function("joiner", minijinja_contrib::globals::joiner);
    environment.add_test("sequence", python::is_sequence);
    environment.add_test("iterable", python::is_iterable);
    environment.add_test("callable", is_callable);
}

/// `length`, 0 for what is not defined.
fn length(value: Value) -> Result<usize, Error> {
    match value.len() {
        Some(length) => Ok(length),
        None if value.is_undefined() => Ok(0),
        None => Err(Error::new(ErrorKind::InvalidOperation, format!("a value of type {} has no length", value.kind()))),
    }
}

/// `int(default=0)`: of a text, the number in it, without what is behind a point; else the default.
fn int(value: Value, default: Option<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let default = default.or(kwargs.get("default")?).unwrap_or_else(|| 0.into());
    kwargs.assert_all_used()?;
    if value.is_integer() {
        return Ok(value);
    }
    let whole = value.as_str().and_then(|text| text.trim().parse::<i128>().ok());
    let cut = || number(&value).map(f64::trunc).filter(|number| number.abs() < 1e30).map(|number| number as i128);
    Ok(whole.or_else(cut).map_or(default, Value::from))
}

/// `float(default=0.0)`: of a text, the number in it; else the default.
fn float(value: Value, default: Option<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let default = default.or(kwargs.get("default")?).unwrap_or_else(|| 0.0.into());
    kwargs.assert_all_used()?;
    Ok(number(&value).map_or(default, Value::from))
}

/// The number that a number, a truth value or a text is.
fn number(value: &Value) -> Option<f64> {
    match value.as_str() {
        Some(text) => text.trim().parse().ok(),
        None if value.kind() == ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
        None => f64::try_from(value.clone()).ok(),
    }
}

/// Words as jinja2 counts them: runs of letters, digits and underscores.
fn python_words(text: &str) -> usize {
    text.split(|character: char| !(character.is_alphanumeric() || character == '_')).filter(|word| !word.is_empty()).count()
}

fn is_callable(value: &Value) -> bool {
    value.kind() == ValueKind::Plain && value.as_object().is_some()
}

/// `indent(width=4, first=False, blank=False)`; the width is a number of spaces or a text.
fn indent(state: &State, text: &str, args: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    let argument = |place: usize, name: &str| -> Result<Option<Value>, Error> { Ok(args.get(place).cloned().or(kwargs.get(name)?)) };
    let width = argument(0, "width")?;
    let first = argument(1, "first")?.is_some_and(|value| value.is_true());
    let blank = argument(2, "blank")?.is_some_and(|value| value.is_true());
    kwargs.assert_all_used()?;
    let indentation = match &width {
        None => "    ".to_owned(),
        Some(width) => match width.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(checked_width(usize::try_from(width.clone())?)?),
        },
    };
    let places = lines(text).count() + 1;
    meter::check(state, places.saturating_mul(indentation.len()).saturating_add(text.len()))?;
    let mut result = String::with_capacity(text.len());
    if first {
        result.push_str(&indentation);
    }
    // A line end at the end of the text stays, as an empty line behind it.
    for (index, line) in lines(&format!("{text}\n")).enumerate() {
        if index > 0 {
            result.push('\n');
            if blank || !line.is_empty() {
                result.push_str(&indentation);
            }
        }
        result.push_str(line);
    }
    Ok(result)
}

/// The width of an indentation or alignment, within bounds.
pub(super) fn checked_width(width: usize) -> Result<usize, Error> {
    if width > MAX_WIDTH {
        return Err(Error::new(ErrorKind::InvalidOperation, format!("a width of {width} is more than {MAX_WIDTH}")));
    }
    Ok(width)
}

/// The lines of a text as Python's `splitlines` cuts them.
fn lines(text: &str) -> impl Iterator<Item = &str> {
    const ENDS: &[char] = &['\n', '\r', '\u{b}', '\u{c}', '\u{1c}', '\u{1d}', '\u{1e}', '\u{85}', '\u{2028}', '\u{2029}'];
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let end = rest.find(ENDS).unwrap_or(rest.len());
        let (line, tail) = rest.split_at(end);
        rest = tail.strip_prefix("\r\n").unwrap_or_else(|| {
            let mut characters = tail.chars();
            characters.next();
            characters.as_str()
        });
        Some(line)
    })
}
