//! Where Python differs from the engine: printing, string methods and tests that templates use.

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind, Output, State, escape_formatter};

use super::json::python_float;

/// Writes a value as Python prints it.
pub(super) fn format(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    super::output::check_deadline(state)?;
    if value.kind() == ValueKind::Number
        && !value.is_integer()
        && let Ok(number) = f64::try_from(value.clone())
        && number.is_finite()
    {
        out.write_str(&python_float(number))?;
        return Ok(());
    }
    escape_formatter(out, state, value)
}

/// Methods of values: those of Python strings that are missing in the engine's own set, then
/// that set.
pub(super) fn call_method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    super::output::check_deadline(state)?;
    if let Some(text) = value.as_str()
        && let Some(result) = string_method(text, method, args)?
    {
        return Ok(result);
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
}

fn string_method(text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let argument = |place: usize| {
        args.get(place)
            .and_then(Value::as_str)
            .ok_or_else(|| Error::new(ErrorKind::MissingArgument, format!("{method} needs a string as argument {}", place + 1)))
    };
    Ok(Some(match method {
        "title" => title(text).into(),
        "removeprefix" => {
            let prefix = argument(0)?;
            text.strip_prefix(prefix).unwrap_or(text).into()
        }
        "removesuffix" => {
            let suffix = argument(0)?;
            text.strip_suffix(suffix).unwrap_or(text).into()
        }
        "partition" => parts(match text.split_once(non_empty(argument(0)?)?) {
            Some((before, after)) => [before, argument(0)?, after],
            None => [text, "", ""],
        }),
        "rpartition" => parts(match text.rsplit_once(non_empty(argument(0)?)?) {
            Some((before, after)) => [before, argument(0)?, after],
            None => ["", "", text],
        }),
        "rsplit" if args.len() == 2 => {
            let separator = non_empty(argument(0)?)?;
            let splits = usize::try_from(args[1].clone())?;
            let mut pieces: Vec<&str> = text.rsplitn(splits.saturating_add(1), separator).collect();
            pieces.reverse();
            pieces.into_iter().collect()
        }
        _ => return Ok(None),
    }))
}

/// Letters behind anything but a letter are capital, all others small.
fn title(text: &str) -> String {
    let mut result = String::with_capacity(text.len());
    let mut in_word = false;
    for character in text.chars() {
        if in_word {
            result.extend(character.to_lowercase());
        } else {
            result.extend(character.to_uppercase());
        }
        in_word = character.is_alphabetic();
    }
    result
}

fn parts([before, separator, after]: [&str; 3]) -> Value {
    (before, separator, after).into()
}

fn non_empty(separator: &str) -> Result<&str, Error> {
    if separator.is_empty() {
        return Err(Error::new(ErrorKind::InvalidOperation, "empty separator"));
    }
    Ok(separator)
}

/// `is sequence`: in Python whatever has a length and items, strings and mappings included.
pub(super) fn is_sequence(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::String | ValueKind::Undefined)
}

/// `is iterable`: strings are.
pub(super) fn is_iterable(value: &Value) -> bool {
    is_sequence(value) || value.kind() == ValueKind::Iterable
}
