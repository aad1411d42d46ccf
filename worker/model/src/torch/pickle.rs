//! The machine that interprets a pickle of tensors and executes nothing.
//!
//! A pickle is a program for a stack machine that may name any function of any module and call it. This one knows only the
//! names that a file of weights has need of (`Global`) and makes descriptions of them: a name that is not among them
//! ends it at once, with the name. Numbers, texts and containers are made as the format says.
//!
//! Invariant: memory and time are bounded by the pickle's own length. Texts borrow from it, lengths are checked against
//! what is left of it, and containers are rows of tables that refer to each other by number, so that neither nesting nor
//! sharing nor cycles cost more than their opcodes.

use std::collections::HashMap;
use std::ops::Range;

use super::calls::Global;
use super::element::Element;
use super::malformed;
use crate::error::{ModelError, Result};

/// Values that may be pushed: a tensor takes some thirty.
const MAX_VALUES: usize = 4 << 20;
/// Protocols of Python 3; 5 differs from 4 by opcodes that weights do not use.
const PROTOCOLS: std::ops::RangeInclusive<u8> = 2..=5;

/// A value of the machine. Containers are numbers of rows in the machine's tables.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Value<'a> {
    None,
    Bool(bool),
    Int(i64),
    /// A number or text that no tensor needs: floats, bytes, integers beyond 64 bits.
    Other,
    Text(&'a str),
    Global(Global),
    Tuple(u32),
    List(u32),
    Dict(u32),
    Storage(u32),
    Tensor(u32),
}

/// A storage: an entry of the archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Storage<'a> {
    pub(super) element: Element,
    pub(super) key: &'a str,
    /// Elements.
    pub(super) count: usize,
}

/// A tensor: a view of a storage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tensor<'a> {
    pub(super) storage: Storage<'a>,
    /// The storage's, unless the pickle says another.
    pub(super) element: Element,
    /// In elements, as are the strides.
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    pub(super) strides: Vec<usize>,
}

/// What a pickle came to: a dictionary, and the tensors it refers to.
#[derive(Debug)]
pub(super) struct Unpickled<'a> {
    pub(super) entries: Vec<(Value<'a>, Value<'a>)>,
    pub(super) tensors: Vec<Tensor<'a>>,
}

/// Interprets a whole pickle.
///
/// # Errors
/// [`ModelError::ForeignCode`] for a name that is not allowed; [`ModelError::Malformed`] for everything else that is no
/// pickle of a dictionary, with the byte at which it is not.
pub(super) fn run(pickle: &[u8]) -> Result<Unpickled<'_>> {
    let mut machine = Machine { pickle, ..Machine::default() };
    loop {
        machine.opcode_at = machine.position;
        let opcode = machine.byte()?;
        if opcode == b'.' {
            return machine.finish();
        }
        machine.step(opcode)?;
        if machine.pushed > MAX_VALUES {
            return Err(machine.wrong(format!("it makes more than {MAX_VALUES} values")));
        }
    }
}

#[derive(Default)]
pub(super) struct Machine<'a> {
    pickle: &'a [u8],
    position: usize,
    pub(super) opcode_at: usize,
    /// Values pushed or remembered so far.
    pub(super) pushed: usize,
    stack: Vec<Value<'a>>,
    marks: Vec<usize>,
    memo: HashMap<u32, Value<'a>>,
    /// Values of all tuples, one tuple after another.
    pub(super) items: Vec<Value<'a>>,
    pub(super) tuples: Vec<Range<usize>>,
    lists: Vec<Vec<Value<'a>>>,
    dicts: Vec<Vec<(Value<'a>, Value<'a>)>>,
    pub(super) storages: Vec<Storage<'a>>,
    pub(super) tensors: Vec<Tensor<'a>>,
}

impl<'a> Machine<'a> {
    pub(super) fn wrong(&self, reason: impl std::fmt::Display) -> ModelError {
        malformed(format!("its pickle, byte {}: {reason}", self.opcode_at))
    }

    fn take(&mut self, count: u64) -> Result<&'a [u8]> {
        let left = self.pickle.len() - self.position;
        match usize::try_from(count) {
            Ok(count) if count <= left => {
                let taken = &self.pickle[self.position..self.position + count];
                self.position += count;
                Ok(taken)
            }
            _ => Err(self.wrong(format!("{count} bytes are needed, {left} are left: it is cut off or lies about a length"))),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64)?);
        Ok(array)
    }

    fn byte(&mut self) -> Result<u8> {
        Ok(self.array::<1>()?[0])
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn text(&mut self, length: u64) -> Result<Value<'a>> {
        let bytes = self.take(length)?;
        std::str::from_utf8(bytes).map(Value::Text).map_err(|_| self.wrong("a text is not UTF-8"))
    }

    pub(super) fn line(&mut self) -> Result<&'a str> {
        let rest = &self.pickle[self.position..];
        let length = rest.iter().position(|&byte| byte == b'\n').ok_or_else(|| self.wrong("a name has no end"))?;
        let line = self.take(length as u64 + 1)?;
        std::str::from_utf8(&line[..length]).map_err(|_| self.wrong("a name is not UTF-8"))
    }

    pub(super) fn push(&mut self, value: Value<'a>) {
        self.pushed += 1;
        self.stack.push(value);
    }

    pub(super) fn pop(&mut self) -> Result<Value<'a>> {
        let bottom = self.marks.last().copied().unwrap_or(0);
        match self.stack.len() > bottom {
            true => self.stack.pop().ok_or_else(|| self.wrong("the stack is empty")),
            false => Err(self.wrong("the stack is empty")),
        }
    }

    fn top(&self) -> Result<Value<'a>> {
        self.stack.last().copied().ok_or_else(|| self.wrong("the stack is empty"))
    }

    /// Everything above the last mark.
    fn pop_mark(&mut self) -> Result<Vec<Value<'a>>> {
        let mark = self.marks.pop().ok_or_else(|| self.wrong("there is no mark"))?;
        if mark > self.stack.len() {
            return Err(self.wrong("the stack is empty"));
        }
        Ok(self.stack.split_off(mark))
    }

    fn push_tuple(&mut self, values: &[Value<'a>]) {
        let start = self.items.len();
        self.items.extend_from_slice(values);
        self.pushed += values.len();
        self.tuples.push(start..self.items.len());
        self.push(Value::Tuple(self.tuples.len() as u32 - 1));
    }

    fn pop_tuple(&mut self, count: usize) -> Result<()> {
        let mut values = [Value::None; 3];
        for value in values[..count].iter_mut().rev() {
            *value = self.pop()?;
        }
        self.push_tuple(&values[..count]);
        Ok(())
    }

    pub(super) fn tuple(&self, value: Value<'a>) -> Option<&[Value<'a>]> {
        match value {
            Value::Tuple(index) => Some(&self.items[self.tuples[index as usize].clone()]),
            Value::List(index) => Some(&self.lists[index as usize]),
            _ => None,
        }
    }

    fn push_list(&mut self) {
        self.lists.push(Vec::new());
        self.push(Value::List(self.lists.len() as u32 - 1));
    }

    pub(super) fn push_dict(&mut self) {
        self.dicts.push(Vec::new());
        self.push(Value::Dict(self.dicts.len() as u32 - 1));
    }

    fn remember(&mut self, index: u32) -> Result<()> {
        self.pushed += 1;
        let value = self.top()?;
        self.memo.insert(index, value);
        Ok(())
    }

    fn recall(&mut self, index: u32) -> Result<()> {
        let value = self.memo.get(&index).copied().ok_or_else(|| self.wrong(format!("nothing was remembered as {index}")))?;
        self.push(value);
        Ok(())
    }

    fn step(&mut self, opcode: u8) -> Result<()> {
        match opcode {
            0x80 => {
                let protocol = self.byte()?;
                if !PROTOCOLS.contains(&protocol) {
                    return Err(self.wrong(format!("it has protocol {protocol}; torch writes 2 to 4")));
                }
            }
            // A frame says how much may be read at once, which means nothing here.
            0x95 => drop(self.take(8)?),
            b'N' => self.push(Value::None),
            0x88 => self.push(Value::Bool(true)),
            0x89 => self.push(Value::Bool(false)),
            b'J' => {
                let number = i32::from_le_bytes(self.array()?);
                self.push(Value::Int(number.into()));
            }
            b'K' => {
                let number = self.byte()?;
                self.push(Value::Int(number.into()));
            }
            b'M' => {
                let number = u16::from_le_bytes(self.array()?);
                self.push(Value::Int(number.into()));
            }
            0x8a | 0x8b => self.long(opcode)?,
            b'G' => {
                self.take(8)?;
                self.push(Value::Other);
            }
            b'X' | 0x8c | 0x8d | b'T' | b'U' | b'B' | b'C' | 0x8e => self.text_or_bytes(opcode)?,
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_mark()?),
            b'2' => self.push(self.top()?),
            b')' | b't' | 0x85..=0x87 | b']' | b'a' | b'e' | b'}' | b's' | b'u' => self.container(opcode)?,
            b'q' | b'r' | 0x94 | b'h' | b'j' => self.memo(opcode)?,
            b'c' | 0x93 => self.global(opcode)?,
            b'Q' => self.persistent()?,
            b'R' | 0x81 => self.call()?,
            b'b' => self.build()?,
            other => return Err(self.wrong(format!("opcode {other:#04x}{} has no place in a file of weights", name_of(other)))),
        }
        Ok(())
    }

    fn long(&mut self, opcode: u8) -> Result<()> {
        let length = if opcode == 0x8a { u32::from(self.byte()?) } else { self.u32()? };
        let bytes = self.take(length.into())?;
        if bytes.len() > size_of::<i64>() {
            self.push(Value::Other);
            return Ok(());
        }
        // Two's complement of that many bytes.
        let negative = bytes.last().is_some_and(|last| last & 0x80 != 0);
        let mut wide = [if negative { 0xff } else { 0 }; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        self.push(Value::Int(i64::from_le_bytes(wide)));
        Ok(())
    }

    fn text_or_bytes(&mut self, opcode: u8) -> Result<()> {
        let length = match opcode {
            0x8c | b'U' | b'C' => self.byte()?.into(),
            0x8d | 0x8e => u64::from_le_bytes(self.array()?),
            _ => self.u32()?.into(),
        };
        let value = match opcode {
            b'B' | b'C' | 0x8e => {
                self.take(length)?;
                Value::Other
            }
            _ => self.text(length)?,
        };
        self.push(value);
        Ok(())
    }

    fn container(&mut self, opcode: u8) -> Result<()> {
        match opcode {
            b')' => self.push_tuple(&[]),
            0x85..=0x87 => self.pop_tuple(usize::from(opcode - 0x84))?,
            b't' => {
                let values = self.pop_mark()?;
                self.push_tuple(&values);
            }
            b']' => self.push_list(),
            b'a' => {
                let value = self.pop()?;
                self.append(&[value])?;
            }
            b'e' => {
                let values = self.pop_mark()?;
                self.append(&values)?;
            }
            b'}' => self.push_dict(),
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.set(&[key, value])?;
            }
            _ => {
                let values = self.pop_mark()?;
                self.set(&values)?;
            }
        }
        Ok(())
    }

    fn append(&mut self, values: &[Value<'a>]) -> Result<()> {
        let Value::List(index) = self.top()? else { return Err(self.wrong("it appends to what is no list")) };
        self.lists[index as usize].extend_from_slice(values);
        Ok(())
    }

    fn set(&mut self, values: &[Value<'a>]) -> Result<()> {
        let Value::Dict(index) = self.top()? else { return Err(self.wrong("it sets a key of what is no dictionary")) };
        let (pairs, rest) = values.as_chunks::<2>();
        if !rest.is_empty() {
            return Err(self.wrong("a key has no value"));
        }
        self.dicts[index as usize].extend(pairs.iter().map(|&[key, value]| (key, value)));
        Ok(())
    }

    fn memo(&mut self, opcode: u8) -> Result<()> {
        match opcode {
            b'q' => {
                let index = self.byte()?.into();
                self.remember(index)
            }
            b'r' => {
                let index = self.u32()?;
                self.remember(index)
            }
            0x94 => self.remember(self.memo.len() as u32),
            b'h' => {
                let index = self.byte()?.into();
                self.recall(index)
            }
            _ => {
                let index = self.u32()?;
                self.recall(index)
            }
        }
    }

    /// State beside a dictionary's entries (torch keeps versions of modules there) is not needed.
    fn build(&mut self) -> Result<()> {
        let state = self.pop()?;
        match (self.top()?, state) {
            (Value::Dict(_), Value::Dict(_) | Value::None) => Ok(()),
            _ => Err(self.wrong("it gives a state to what is no dictionary")),
        }
    }

    fn finish(mut self) -> Result<Unpickled<'a>> {
        let result = self.pop()?;
        if !self.stack.is_empty() || !self.marks.is_empty() || self.position != self.pickle.len() {
            return Err(self.wrong("it ends before its own end"));
        }
        let Value::Dict(index) = result else {
            return Err(self.wrong("it holds no dictionary of tensors"));
        };
        Ok(Unpickled { entries: self.dicts.swap_remove(index as usize), tensors: self.tensors })
    }
}

/// The names of opcodes that run code or belong to other kinds of pickle.
fn name_of(opcode: u8) -> &'static str {
    match opcode {
        b'i' => " (INST, which calls a class)",
        b'o' => " (OBJ, which calls a class)",
        0x92 => " (NEWOBJ_EX, which calls a class)",
        0x82..=0x84 => " (EXT, which names a registered class)",
        b'P' => " (PERSID of protocol 0)",
        b'I' | b'L' | b'F' | b'S' | b'V' | b'p' | b'g' | b'd' | b'l' => " (of protocol 0 or 1)",
        0x8f..=0x91 => " (of sets)",
        0x96..=0x98 => " (of protocol 5's buffers)",
        _ => "",
    }
}
