//! Where Python differs from the engine: printing, string methods and tests that templates use.

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind, Output, State, escape_formatter};

use super::filters::checked_width;
use super::json::python_float;
use super::{growth, meter};

/// Writes a value as Python prints it.
pub(super) fn format(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    super::output::check_deadline(state)?;
    meter::charge(state, meter::printed(state, value)?)?;
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
    if value.as_str().is_some() {
        growth::before_method(state, value, method, args)?;
    }
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
        "index" => place(text, text.find(argument(0)?))?,
        "rindex" => place(text, text.rfind(argument(0)?))?,
        "swapcase" => swap_case(text).into(),
        "center" => {
            let missing = missing_width(text, args)?;
            // Python puts the odd one to the left where the width is odd.
            let width = missing + text.chars().count();
            let left = missing / 2 + (missing & width & 1);
            pad(text, args, left, missing - left)?
        }
        "ljust" => pad(text, args, 0, missing_width(text, args)?)?,
        "rjust" => pad(text, args, missing_width(text, args)?, 0)?,
        "zfill" => {
            let zeros = "0".repeat(missing_width(text, args)?);
            match text.strip_prefix(['+', '-']) {
                Some(digits) => format!("{}{zeros}{digits}", &text[..1]).into(),
                None => format!("{zeros}{text}").into(),
            }
        }
        _ => return Ok(None),
    }))
}

/// A place in bytes as one in characters; an error where there is none.
fn place(text: &str, byte: Option<usize>) -> Result<Value, Error> {
    let byte = byte.ok_or_else(|| Error::new(ErrorKind::InvalidOperation, "substring not found"))?;
    Ok(text[..byte].chars().count().into())
}

fn swap_case(text: &str) -> String {
    let mut result = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_uppercase() {
            result.extend(character.to_lowercase());
        } else {
            result.extend(character.to_uppercase());
        }
    }
    result
}

/// Characters that are missing to the width in the first argument.
fn missing_width(text: &str, args: &[Value]) -> Result<usize, Error> {
    let width = args.first().cloned().ok_or_else(|| Error::new(ErrorKind::MissingArgument, "a width is missing"))?;
    let width = checked_width(usize::try_from(width)?)?;
    Ok(width.saturating_sub(text.chars().count()))
}

/// The text between characters of the second argument, else spaces.
fn pad(text: &str, args: &[Value], left: usize, right: usize) -> Result<Value, Error> {
    let fill = args.get(1).and_then(Value::as_str).unwrap_or(" ");
    if fill.chars().count() != 1 {
        return Err(Error::new(ErrorKind::InvalidOperation, "the fill character must be exactly one character long"));
    }
    Ok([&fill.repeat(left), text, &fill.repeat(right)].concat().into())
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
