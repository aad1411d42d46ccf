//! What a pickle of weights may name and call: storages, tensors, parameters, ordered dictionaries. The descriptions that
//! calls make of tensors are checked later, against the archive (`state`).

use super::element::Element;
use super::pickle::{Machine, Storage, Tensor, Value};
use crate::error::{ModelError, Result};

/// What a pickle of tensors may name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Global {
    OrderedDict,
    /// `_rebuild_tensor` and `_rebuild_tensor_v2`: storage, offset, size, stride, ….
    Tensor,
    /// `_rebuild_tensor_v3`: the same with the element type behind.
    TypedTensor,
    /// `_rebuild_parameter`: a tensor, and whether it is trained.
    Parameter,
    Size,
    Storage(Element),
    Type(Element),
}

impl Global {
    fn find(module: &str, name: &str) -> Option<Global> {
        match (module, name) {
            ("collections", "OrderedDict") => Some(Global::OrderedDict),
            ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => Some(Global::Tensor),
            ("torch._utils", "_rebuild_tensor_v3") => Some(Global::TypedTensor),
            ("torch._utils", "_rebuild_parameter") => Some(Global::Parameter),
            ("torch", "Size") => Some(Global::Size),
            ("torch" | "torch.storage", name) => {
                Element::by_storage(name).map(Global::Storage).or_else(|| Element::by_name(name).map(Global::Type))
            }
            _ => None,
        }
    }
}

impl<'a> Machine<'a> {
    pub(super) fn global(&mut self, opcode: u8) -> Result<()> {
        let (module, name) = match opcode {
            b'c' => (self.line()?, self.line()?),
            _ => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Value::Text(module), Value::Text(name)) = (module, name) else {
                    return Err(self.wrong("it names something by what is no text"));
                };
                (module, name)
            }
        };
        let global = Global::find(module, name).ok_or_else(|| ModelError::ForeignCode {
            format: super::FORMAT.to_owned(),
            name: shortened(&format!("{module}.{name}")),
            offset: self.opcode_at,
        })?;
        self.push(Value::Global(global));
        Ok(())
    }

    /// ('storage', class, key, device, elements, …).
    pub(super) fn persistent(&mut self) -> Result<()> {
        let id = self.pop()?;
        let storage = match self.tuple(id) {
            Some(
                [Value::Text("storage"), Value::Global(Global::Storage(element)), Value::Text(key), Value::Text(_), Value::Int(count), ..],
            ) => usize::try_from(*count).ok().map(|count| Storage { element: *element, key, count }),
            _ => None,
        };
        let storage = storage.ok_or_else(|| self.wrong("it refers to something else than a storage of this archive"))?;
        self.storages.push(storage);
        self.push(Value::Storage(self.storages.len() as u32 - 1));
        Ok(())
    }

    pub(super) fn call(&mut self) -> Result<()> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let Value::Global(function) = function else { return Err(self.wrong("it calls what is no function")) };
        let Value::Tuple(range) = arguments else { return Err(self.wrong("it calls without a tuple of arguments")) };
        let range = self.tuples[range as usize].clone();
        let made = match (function, &self.items[range]) {
            (Global::OrderedDict, []) => {
                self.push_dict();
                return Ok(());
            }
            (Global::Size, &[Value::Tuple(sizes)]) => Some(Value::Tuple(sizes)),
            (Global::Parameter, &[Value::Tensor(tensor), ..]) => Some(Value::Tensor(tensor)),
            (Global::Tensor, &[Value::Storage(storage), Value::Int(offset), sizes, strides, ..]) => {
                let tensor = self.tensor(storage, offset, sizes, strides, None);
                tensor.map(|tensor| self.keep(tensor))
            }
            (
                Global::TypedTensor,
                &[Value::Storage(storage), Value::Int(offset), sizes, strides, _, _, Value::Global(Global::Type(element)), ..],
            ) => {
                let tensor = self.tensor(storage, offset, sizes, strides, Some(element));
                tensor.map(|tensor| self.keep(tensor))
            }
            _ => None,
        };
        let made = made.ok_or_else(|| self.wrong(format!("{function:?} is called with arguments that it cannot have")))?;
        self.push(made);
        Ok(())
    }

    fn keep(&mut self, tensor: Tensor<'a>) -> Value<'a> {
        self.pushed += 2 * tensor.shape.len();
        self.tensors.push(tensor);
        Value::Tensor(self.tensors.len() as u32 - 1)
    }

    fn tensor(&self, storage: u32, offset: i64, shape: Value<'a>, strides: Value<'a>, element: Option<Element>) -> Option<Tensor<'a>> {
        const MAX_DIMENSIONS: usize = 8;
        let numbers = |value| -> Option<Vec<usize>> {
            let values = self.tuple(value).filter(|values| values.len() <= MAX_DIMENSIONS)?;
            values.iter().map(|value| if let Value::Int(number) = value { usize::try_from(*number).ok() } else { None }).collect()
        };
        let storage = self.storages[storage as usize];
        let (shape, strides) = (numbers(shape)?, numbers(strides)?);
        let offset = usize::try_from(offset).ok()?;
        (shape.len() == strides.len()).then(|| Tensor { storage, element: element.unwrap_or(storage.element), offset, shape, strides })
    }
}

/// A name as it can stand in a message.
fn shortened(name: &str) -> String {
    const SHOWN: usize = 80;
    let printable = name.chars().map(|letter| if letter.is_control() { '\u{fffd}' } else { letter });
    let mut text: String = printable.take(SHOWN).collect();
    if name.chars().nth(SHOWN).is_some() {
        text.push('…');
    }
    text
}
