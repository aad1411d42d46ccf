//! The memory that one rendering may make: a sum of bytes that only grows.
//!
//! Not a heap profiler: what a template frees is not given back, so the sum bounds what can be
//! alive at once. Invariant: a value that is larger than the operands it is made of is measured
//! before the engine makes it; what can grow only by a constant factor is added afterwards.

use std::fmt::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use minijinja::value::{Object, Value, ValueKind};
use minijinja::{Error, ErrorKind, State};

use super::output::{LimitReached, check_deadline};

/// Variable that holds the meter; not a name a template can write.
const METER_NAME: &str = "forge meter";
/// Taken for a list or map, and for each of its items.
const CONTAINER_BYTES: usize = 256;
const ITEM_BYTES: usize = 64;

#[derive(Debug)]
struct Meter {
    left_bytes: AtomicUsize,
    limit_bytes: usize,
}

impl Object for Meter {}

/// A fresh meter as a variable.
pub(super) fn variable(limit_bytes: usize) -> (&'static str, Value) {
    (METER_NAME, Value::from_object(Meter { left_bytes: AtomicUsize::new(limit_bytes), limit_bytes }))
}

fn meter(state: &State) -> Result<Arc<Meter>, Error> {
    let meter = state.lookup(METER_NAME).and_then(|value| value.downcast_object::<Meter>());
    meter.ok_or_else(|| Error::new(ErrorKind::InvalidOperation, "a template runs without a meter"))
}

impl Meter {
    fn left(&self) -> usize {
        self.left_bytes.load(Ordering::Relaxed)
    }

    fn reached(&self) -> Error {
        let limit = LimitReached(format!("{} bytes of memory", self.limit_bytes));
        Error::new(ErrorKind::InvalidOperation, "too much memory").with_source(limit)
    }
}

/// Fails where so many bytes are not left.
pub(super) fn check(state: &State, bytes: usize) -> Result<(), Error> {
    let meter = meter(state)?;
    if bytes > meter.left() { Err(meter.reached()) } else { Ok(()) }
}

/// Takes so many bytes.
pub(super) fn charge(state: &State, bytes: usize) -> Result<(), Error> {
    let meter = meter(state)?;
    let left = meter.left().checked_sub(bytes).ok_or_else(|| meter.reached())?;
    meter.left_bytes.store(left, Ordering::Relaxed);
    Ok(())
}

/// Bytes that can still be taken.
pub(super) fn left(state: &State) -> Result<usize, Error> {
    Ok(meter(state)?.left())
}

/// Counts what is written, and stops behind a number of bytes.
struct Counter {
    bytes: usize,
    limit_bytes: usize,
}

impl Write for Counter {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.bytes = self.bytes.saturating_add(text.len());
        if self.bytes > self.limit_bytes { Err(fmt::Error) } else { Ok(()) }
    }
}

/// Bytes of a value as text, without making it; an error where they are more than are left.
pub(super) fn printed(state: &State, value: &Value) -> Result<usize, Error> {
    if let Some(text) = value.as_str() {
        return Ok(text.len());
    }
    let meter = meter(state)?;
    let mut counter = Counter { bytes: 0, limit_bytes: meter.left() };
    write!(counter, "{value}").map_err(|_| meter.reached())?;
    Ok(counter.bytes)
}

/// Takes the bytes of a value that was just made. A view that makes its items when they are
/// asked for becomes one that holds them: chained views would grow with no memory of their own,
/// and a list appended to a thousand times would be a thousand views deep.
pub(super) fn settle(state: &mut State, value: Value) -> Result<Value, Error> {
    check_deadline(state)?;
    match value.kind() {
        ValueKind::String | ValueKind::Bytes => {
            let bytes = value.as_str().map(str::len).or(value.as_bytes().map(<[u8]>::len));
            charge(state, bytes.unwrap_or_default())?;
        }
        ValueKind::Iterable => {
            charge(state, CONTAINER_BYTES)?;
            // One more than there is memory for, so that charging for them fails.
            let most = left(state)? / ITEM_BYTES + 1;
            let items: Vec<Value> = value.try_iter()?.take(most).collect();
            charge(state, items.len() * ITEM_BYTES)?;
            return Ok(Value::make_object_iterable(items, |items| Box::new(items.iter().cloned())));
        }
        ValueKind::Seq | ValueKind::Map => {
            let items = value.len().unwrap_or_default();
            charge(state, items.saturating_mul(2 * ITEM_BYTES).saturating_add(CONTAINER_BYTES))?;
            if is_joined_lists(&value) {
                return Ok(Value::from(value.try_iter()?.collect::<Vec<_>>()));
            }
        }
        ValueKind::Plain => charge(state, CONTAINER_BYTES)?,
        _ => {}
    }
    Ok(value)
}

/// The engine's own type for `list + list`, which it does not name to others.
fn is_joined_lists(value: &Value) -> bool {
    value.as_object().is_some_and(|object| object.type_name().ends_with("::MergeSeq"))
}
