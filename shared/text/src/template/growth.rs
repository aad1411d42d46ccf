//! Filters and methods whose result can be many times their arguments: measured before they run.
//!
//! Not their meaning: the engine's own functions do the work. Invariant: none of those listed
//! here starts on arguments whose result would pass the rendering's memory.

use minijinja::value::{Rest, Value, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, State, filters};

use super::meter;

/// How much a result can be.
#[derive(Clone, Copy)]
enum Growth {
    /// The arguments as text, so many times.
    Text(usize),
    /// Items between which an argument stands.
    Join,
    /// A text in which each place of another grows.
    Replace,
    /// Conversions, with widths in the format or in the arguments.
    Format,
    /// As many lists or items as an argument says.
    Lists,
}

/// Memory of one item of a list that is a character or a short text.
const ITEM_BYTES: usize = 32;

/// Puts the checks around the engine's filters.
pub(super) fn register(environment: &mut Environment<'static>) {
    let text = Growth::Text(1);
    // These make a list out of a text's characters or lines.
    let items = Growth::Text(ITEM_BYTES);
    let guarded = [
        ("safe", text, Value::from_function(filters::safe)),
        ("escape", Growth::Text(6), Value::from_function(filters::escape)),
        ("e", Growth::Text(6), Value::from_function(filters::escape)),
        ("lower", Growth::Text(3), Value::from_function(filters::lower)),
        ("upper", Growth::Text(3), Value::from_function(filters::upper)),
        ("title", Growth::Text(3), Value::from_function(filters::title)),
        ("capitalize", Growth::Text(3), Value::from_function(filters::capitalize)),
        ("trim", text, Value::from_function(filters::trim)),
        ("string", text, Value::from_function(filters::string)),
        ("sum", text, Value::from_function(filters::sum)),
        ("pprint", items, Value::from_function(filters::pprint)),
        ("join", Growth::Join, Value::from_function(filters::join)),
        ("replace", Growth::Replace, Value::from_function(filters::replace)),
        ("format", Growth::Format, Value::from_function(filters::format)),
        ("batch", Growth::Lists, Value::from_function(filters::batch)),
        ("slice", Growth::Lists, Value::from_function(filters::slice)),
        ("split", items, Value::from_function(filters::split)),
        ("lines", items, Value::from_function(filters::lines)),
    ];
    for (name, growth, filter) in guarded {
        guard(environment, name, filter, move |_| Some(growth));
    }
    let is_text = |arguments: &[Value]| arguments.first().is_some_and(|value| value.as_str().is_some());
    // Lists are made anew item by item, which their own bytes cover; a text's characters are not.
    let listing = [
        ("list", Value::from_function(filters::list)),
        ("select", Value::from_function(filters::select)),
        ("reject", Value::from_function(filters::reject)),
    ];
    for (name, filter) in listing {
        guard(environment, name, filter, move |arguments| is_text(arguments).then_some(items));
    }
    // These compare what is in a list, as text or not, however often the same lies in it.
    let comparing = [
        ("sort", Value::from_function(filters::sort)),
        ("unique", Value::from_function(filters::unique)),
        ("min", Value::from_function(filters::min)),
        ("max", Value::from_function(filters::max)),
        ("dictsort", Value::from_function(filters::dictsort)),
        ("groupby", Value::from_function(filters::groupby)),
    ];
    for (name, filter) in comparing {
        guard(environment, name, filter, move |arguments| Some(if is_text(arguments) { items } else { text }));
    }
    // With an attribute it takes what exists; with a filter, each result may grow.
    let is_filter = |arguments: &[Value]| arguments.get(1).is_some_and(|name| name.as_str().is_some());
    guard(environment, "map", Value::from_function(filters::map), move |arguments| is_filter(arguments).then_some(items));
}

/// Puts a filter behind the check of what it can make of its arguments.
fn guard(
    environment: &mut Environment<'static>,
    name: &'static str,
    filter: Value,
    growth: impl Fn(&[Value]) -> Option<Growth> + Send + Sync + 'static,
) {
    environment.add_filter(name, move |state: &mut State, arguments: Rest<ValueOrKwargs>| {
        let arguments = arguments.into_values();
        if let Some(growth) = growth(&arguments) {
            before(state, growth, &arguments)?;
        }
        filter.call(state, &arguments)
    });
}

/// Checks a method of a text.
pub(super) fn before_method(state: &State, text: &Value, method: &str, arguments: &[Value]) -> Result<(), Error> {
    let all = |first: &Value| [std::slice::from_ref(first), arguments].concat();
    match (method, arguments) {
        ("join", [values, ..]) => before(state, Growth::Join, &[values.clone(), text.clone()]),
        ("replace", _) => before(state, Growth::Replace, &all(text)),
        ("format", _) => before(state, Growth::Format, &all(text)),
        ("split" | "rsplit" | "splitlines", _) => before(state, Growth::Text(ITEM_BYTES), std::slice::from_ref(text)),
        ("upper" | "lower" | "title" | "swapcase" | "capitalize", _) => before(state, Growth::Text(3), std::slice::from_ref(text)),
        _ => Ok(()),
    }
}

/// Takes what the result can be, and fails where it is not left.
fn before(state: &State, growth: Growth, arguments: &[Value]) -> Result<(), Error> {
    let printed = |values: &[Value]| -> Result<usize, Error> {
        values.iter().try_fold(0, |sum: usize, value| Ok(sum.saturating_add(meter::printed(state, value)?)))
    };
    let (first, others) = arguments.split_first().map_or((None, arguments), |(first, others)| (Some(first), others));
    let text = first.and_then(Value::as_str).unwrap_or_default();
    let bytes = match growth {
        Growth::Text(times) => printed(arguments)?.saturating_mul(times),
        Growth::Join => {
            let items = first.and_then(|value| value.len().or_else(|| value.as_str().map(str::len))).unwrap_or_default();
            let all = first.map_or(Ok(0), |value| printed(std::slice::from_ref(value)))?;
            items.saturating_mul(printed(others)?).saturating_add(all)
        }
        Growth::Replace => {
            let places = match others.first().and_then(Value::as_str) {
                Some(from) => text.matches(from).count(),
                None => first.map_or(Ok(0), |value| printed(std::slice::from_ref(value)))?.saturating_add(1),
            };
            let added = others.get(1).map_or(Ok(0), |to| printed(std::slice::from_ref(to)))?;
            places.saturating_mul(added).saturating_add(printed(arguments)?)
        }
        Growth::Format => format_bytes(text, printed(others)?, others),
        Growth::Lists => numbers(others).saturating_mul(4 * ITEM_BYTES).saturating_add(text.len().saturating_mul(ITEM_BYTES)),
    };
    meter::charge(state, bytes)
}

/// The numbers among the arguments, named ones included, added up.
fn numbers(arguments: &[Value]) -> usize {
    arguments.iter().fold(0, |sum: usize, value| {
        let own = match value.kind() {
            ValueKind::Map => value
                .try_iter()
                .map_or(0, |keys| keys.filter_map(|key| value.get_item(&key).ok()?.as_usize()).fold(0, usize::saturating_add)),
            _ => value.as_usize().unwrap_or_default(),
        };
        sum.saturating_add(own)
    })
}

/// Upper bound of a formatted text: every conversion may print all arguments, and every number
/// in the format may be a width, as may every argument where the format takes widths from them.
fn format_bytes(format: &str, arguments_bytes: usize, arguments: &[Value]) -> usize {
    let conversions = format.matches(['%', '{']).count();
    let digits = format.split(|character: char| !character.is_ascii_digit()).filter(|digits| !digits.is_empty());
    let widths = digits.fold(0, |sum: usize, digits| sum.saturating_add(digits.parse().unwrap_or(usize::MAX)));
    let taken = if format.contains('*') || format.contains(":{") { numbers(arguments) } else { 0 };
    let each = arguments_bytes.saturating_add(400).saturating_add(taken);
    conversions.saturating_mul(each).saturating_add(widths).saturating_add(format.len())
}
