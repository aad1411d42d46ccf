//! A compiled template with the engine's growing instructions metered.
//!
//! The engine has no hook on its operators, so its instructions are copied with calls of
//! [`meter`] around each that can make memory. Not a second compiler: what an instruction means
//! stays the engine's. Invariant: every instruction that can make a value larger than a constant
//! is followed by a settling one, those that multiply have a check in front, those that keep a
//! value have its depth looked at; and whatever takes time in proportion to values looks at the clock.

use std::collections::BTreeMap;

use minijinja::machinery::{Instruction, Instructions};
use minijinja::value::Value;
use minijinja::{Environment, Error, ErrorKind, State};

use super::{meter, nesting, output};

const SETTLE: &str = "forge-settle";
const BEFORE_CONCAT: &str = "forge-before-concat";
const BEFORE_MULTIPLY: &str = "forge-before-multiply";
const BEFORE_IN: &str = "forge-before-in";
const BEFORE_COMPARE: &str = "forge-before-compare";
const BEFORE_STORE: &str = "forge-before-store";
const BEFORE_ATTRIBUTE: &str = "forge-before-attribute";

/// Adds the checks, under names that a template cannot write.
pub(super) fn register(environment: &mut Environment<'static>) {
    environment.add_filter(SETTLE, meter::settle);
    environment.add_filter(BEFORE_CONCAT, before_concat);
    environment.add_filter(BEFORE_MULTIPLY, before_multiply);
    environment.add_filter(BEFORE_IN, before_in);
    environment.add_filter(BEFORE_COMPARE, before_compare);
    environment.add_filter(BEFORE_STORE, nesting::before_store);
    environment.add_filter(BEFORE_ATTRIBUTE, nesting::before_attribute);
}

fn before_concat(state: &mut State, left: Value, right: Value) -> Result<Value, Error> {
    let bytes = meter::printed(state, &left)?.saturating_add(meter::printed(state, &right)?);
    meter::check(state, bytes)?;
    Ok(Value::from(vec![right, left]))
}

fn before_multiply(state: &mut State, left: Value, right: Value) -> Result<Value, Error> {
    let size = |value: &Value| value.as_str().map(str::len).or_else(|| Some(value.len()?.saturating_mul(64)));
    for (value, times) in [(&left, &right), (&right, &left)] {
        if let (Some(size), Some(times)) = (size(value), times.as_usize()) {
            meter::check(state, size.saturating_mul(times))?;
        }
    }
    Ok(Value::from(vec![right, left]))
}

/// Comparing goes through all that two values hold, however often the same lies in them.
fn before_compare(state: &mut State, left: Value, right: Value) -> Result<Value, Error> {
    output::check_deadline(state)?;
    for value in [&left, &right] {
        if value.as_object().is_some() {
            meter::check(state, meter::printed(state, value)?)?;
        }
    }
    Ok(Value::from(vec![right, left]))
}

fn before_in(state: &mut State, item: Value, container: Value) -> Result<Value, Error> {
    if container.as_str().is_some() {
        meter::check(state, meter::printed(state, &item)?)?;
    }
    before_compare(state, item, container)
}

/// The template's blocks, metered.
pub(super) fn blocks<'a>(blocks: &BTreeMap<&'a str, Instructions<'a>>) -> Result<BTreeMap<&'a str, Instructions<'a>>, Error> {
    blocks.iter().map(|(name, block)| Ok((*name, instructions(block)?))).collect()
}

/// A metered copy.
///
/// # Errors
/// For a template that takes in others: their instructions could not be metered.
pub(super) fn instructions<'a>(plain: &Instructions<'a>) -> Result<Instructions<'a>, Error> {
    let mut copies = Vec::new();
    let mut places = Vec::new();
    let mut length: u32 = 0;
    while let Some(instruction) = plain.get(places.len() as u32) {
        let copy = metered(instruction)?;
        places.push(length);
        length += copy.len() as u32;
        copies.push(copy);
    }
    places.push(length);
    let moved = |target: u32| places.get(target as usize).copied().unwrap_or(length);
    let mut result = Instructions::new(plain.name(), plain.source());
    for (index, copy) in copies.into_iter().enumerate() {
        for mut instruction in copy {
            match &mut instruction {
                Instruction::Iterate(target)
                | Instruction::Jump(target)
                | Instruction::JumpIfFalse(target)
                | Instruction::JumpIfFalseOrPop(target)
                | Instruction::JumpIfTrueOrPop(target)
                | Instruction::BuildMacro(_, target, _) => *target = moved(*target),
                _ => {}
            }
            match plain.get_span(index as u32) {
                Some(span) => result.add_with_span(instruction, span),
                None => result.add_with_line(instruction, plain.get_line(index as u32).unwrap_or(0) as u16),
            };
        }
    }
    Ok(result)
}

/// What stands for one instruction. No wildcard: a new one of the engine's has to be looked at.
fn metered<'a>(instruction: &Instruction<'a>) -> Result<Vec<Instruction<'a>>, Error> {
    // The last number is "not cached", as names of the template itself take the numbers below.
    let call = |name: &'static str, arguments: u16| Instruction::ApplyFilter(name, Some(arguments), !0);
    let same = instruction.clone();
    Ok(match instruction {
        // Output may go into a variable; the formatter counts it.
        Instruction::EmitRaw(text) => vec![Instruction::LoadConst(Value::from(*text)), Instruction::Emit],
        Instruction::StringConcat => vec![call(BEFORE_CONCAT, 2), Instruction::UnpackList(2), same, call(SETTLE, 1)],
        Instruction::Mul => vec![call(BEFORE_MULTIPLY, 2), Instruction::UnpackList(2), same, call(SETTLE, 1)],
        Instruction::In => vec![call(BEFORE_IN, 2), Instruction::UnpackList(2), same],
        Instruction::Eq
        | Instruction::Ne
        | Instruction::Gt
        | Instruction::Gte
        | Instruction::Lt
        | Instruction::Lte
        | Instruction::CompareAndPreserve(_) => vec![call(BEFORE_COMPARE, 2), Instruction::UnpackList(2), same],
        Instruction::Add
        | Instruction::Slice
        | Instruction::BuildMap(_)
        | Instruction::BuildList(_)
        | Instruction::BuildTuple(_)
        | Instruction::ApplyFilter(..)
        | Instruction::CallFunction(..)
        | Instruction::CallMethod(..)
        | Instruction::CallObject(_)
        | Instruction::BuildMacro(..)
        | Instruction::EndCapture => vec![same, call(SETTLE, 1)],
        Instruction::Include(_) | Instruction::LoadBlocks | Instruction::ExportLocals => {
            return Err(Error::new(ErrorKind::InvalidOperation, "a chat template stands alone: write what it includes into it"));
        }
        Instruction::StoreLocal(_) => vec![call(BEFORE_STORE, 1), same],
        Instruction::SetAttr(_) => vec![call(BEFORE_ATTRIBUTE, 2), Instruction::UnpackList(2), same],
        Instruction::Lookup(_)
        | Instruction::GetAttr(_)
        | Instruction::GetItem
        | Instruction::LoadConst(_)
        | Instruction::BuildKwargs(_)
        | Instruction::MergeKwargs(_)
        | Instruction::UnpackList(_)
        | Instruction::UnpackLists(_)
        | Instruction::Sub
        | Instruction::Div
        | Instruction::IntDiv
        | Instruction::Rem
        | Instruction::Pow
        | Instruction::Neg
        | Instruction::Not
        | Instruction::PerformTest(..)
        | Instruction::Emit
        | Instruction::PushLoop(_)
        | Instruction::PushWith
        | Instruction::Iterate(_)
        | Instruction::PushDidNotIterate
        | Instruction::PopFrame
        | Instruction::PopLoopFrame
        | Instruction::Jump(_)
        | Instruction::JumpIfFalse(_)
        | Instruction::JumpIfFalseOrPop(_)
        | Instruction::JumpIfTrueOrPop(_)
        | Instruction::PushAutoEscape
        | Instruction::PopAutoEscape
        | Instruction::BeginCapture(_)
        | Instruction::DupTop
        | Instruction::DiscardTop
        | Instruction::FastSuper
        | Instruction::FastRecurse
        | Instruction::Swap
        | Instruction::CallBlock(_)
        | Instruction::Return
        | Instruction::IsUndefined
        | Instruction::Enclose(_)
        | Instruction::GetClosure => vec![same],
    })
}
