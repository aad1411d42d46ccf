//! How deep values lie in each other.
//!
//! Values are freed, compared and printed by recursion, so a list in a list in a list … would overflow the stack. A value
//! can be carried from one instruction's result into a deeper one only by a variable or an attribute of a namespace:
//! both are looked at before they are set. Invariant: nothing stored is deeper than [`MAX_DEPTH`], and no namespace holds
//! itself.

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind, State};

use super::meter;
use super::output::{LimitReached, check_deadline};

/// Deepest value kept in a variable. JSON that comes with a request is at most 128 deep.
const MAX_DEPTH: usize = 200;
/// Taken of the rendering's memory for each item looked at: what bounds the looking.
const LOOK_BYTES: usize = 8;

/// Looks at what a variable is set to, and gives it back.
///
/// # Errors
/// It is too deep.
pub(super) fn before_store(state: &mut State, value: Value) -> Result<Value, Error> {
    check_deadline(state)?;
    look(state, &value, false)?;
    Ok(value)
}

/// Looks at what an attribute of a namespace is set to. A namespace in a namespace could be made a circle.
///
/// # Errors
/// It is too deep, or holds a namespace.
pub(super) fn before_attribute(state: &mut State, value: Value, namespace: Value) -> Result<Value, Error> {
    check_deadline(state)?;
    look(state, &value, true)?;
    Ok(Value::from(vec![namespace, value]))
}

fn look(state: &State, value: &Value, refuses_namespaces: bool) -> Result<(), Error> {
    if !is_container(value) {
        return Ok(());
    }
    let items_left = meter::left(state)? / LOOK_BYTES;
    let mut walk = Walk { items_left, refuses_namespaces };
    walk.value(value, MAX_DEPTH)?;
    meter::charge(state, (items_left - walk.items_left) * LOOK_BYTES + LOOK_BYTES)
}

struct Walk {
    items_left: usize,
    refuses_namespaces: bool,
}

impl Walk {
    fn value(&mut self, value: &Value, levels_left: usize) -> Result<(), Error> {
        if !is_container(value) {
            return Ok(());
        }
        if self.refuses_namespaces && is_namespace(value) {
            return Err(Error::new(ErrorKind::InvalidOperation, "a namespace cannot be put into a namespace"));
        }
        let Some(levels_left) = levels_left.checked_sub(1) else {
            let limit = LimitReached(format!("{MAX_DEPTH} lists or maps in each other"));
            return Err(Error::new(ErrorKind::InvalidOperation, "a value nested too deep").with_source(limit));
        };
        let is_map = value.kind() == ValueKind::Map;
        for item in value.try_iter()? {
            // With nothing left, charging for what was looked at fails.
            let Some(items_left) = self.items_left.checked_sub(1) else { return Ok(()) };
            self.items_left = items_left;
            let item = if is_map { value.get_item(&item)? } else { item };
            self.value(&item, levels_left)?;
        }
        Ok(())
    }
}

fn is_container(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::Iterable)
}

/// The engine's own type, which it does not name to others.
fn is_namespace(value: &Value) -> bool {
    value.as_object().is_some_and(|object| object.type_name().ends_with("::Namespace"))
}
