//! A number for a value: of everything that it writes of itself, in order, without making text of it.
//!
//! Invariant: equal values have equal numbers; values that would be written differently have different ones, but for a chance of
//! about one in 2^64.

use std::fmt;

use serde::ser::{self, Serialize, Serializer};

/// Takes in one value after the other.
#[derive(Debug)]
pub struct Fingerprint(u64);

/// Of kinds of values that could be taken for each other.
const NOTHING: u64 = 0x6e6f_7468_696e_6701;
const SOME: u64 = 0x736f_6d65_0000_0002;
const END: u64 = 0x656e_6400_0000_0003;

impl Fingerprint {
    /// Of one value.
    ///
    /// # Errors
    /// The value says that it has no serial form.
    pub fn of(value: &impl Serialize) -> Result<u64, fmt::Error> {
        let mut all = Fingerprint(0x9e37_79b9_7f4a_7c15);
        value.serialize(&mut all)?;
        Ok(all.0)
    }

    /// Of bytes.
    pub fn of_bytes(bytes: &[u8]) -> u64 {
        let mut all = Fingerprint(0x9e37_79b9_7f4a_7c15);
        all.bytes(bytes);
        all.0
    }

    /// One to one in what it takes in, and in what was there before.
    fn number(&mut self, number: u64) {
        let mixed = (self.0 ^ number).wrapping_mul(0xff51_afd7_ed55_8ccd);
        self.0 = (mixed ^ (mixed >> 32)).wrapping_add(0x9e37_79b9_7f4a_7c15);
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        let (words, rest) = bytes.as_chunks::<8>();
        words.iter().for_each(|word| self.number(u64::from_le_bytes(*word)));
        if !rest.is_empty() {
            let mut last = [0; 8];
            last[..rest.len()].copy_from_slice(rest);
            self.number(u64::from_le_bytes(last));
        }
    }
}

macro_rules! numbers {
    ($($name:ident: $type:ty),*) => {
        $(fn $name(self, value: $type) -> Result<(), fmt::Error> {
            self.number(value as u64);
            Ok(())
        })*
    };
}

impl<'a> Serializer for &'a mut Fingerprint {
    type Ok = ();
    type Error = fmt::Error;
    type SerializeSeq = Parts<'a>;
    type SerializeTuple = Parts<'a>;
    type SerializeTupleStruct = Parts<'a>;
    type SerializeTupleVariant = Parts<'a>;
    type SerializeMap = Parts<'a>;
    type SerializeStruct = Parts<'a>;
    type SerializeStructVariant = Parts<'a>;

    numbers!(serialize_bool: bool, serialize_i8: i8, serialize_i16: i16, serialize_i32: i32, serialize_i64: i64);
    numbers!(serialize_u8: u8, serialize_u16: u16, serialize_u32: u32, serialize_u64: u64, serialize_char: char);

    fn serialize_f32(self, value: f32) -> Result<(), fmt::Error> {
        self.serialize_f64(f64::from(value))
    }

    fn serialize_f64(self, value: f64) -> Result<(), fmt::Error> {
        self.number(value.to_bits());
        Ok(())
    }

    fn serialize_str(self, value: &str) -> Result<(), fmt::Error> {
        self.serialize_bytes(value.as_bytes())
    }

    fn serialize_bytes(self, value: &[u8]) -> Result<(), fmt::Error> {
        self.bytes(value);
        Ok(())
    }

    fn serialize_none(self) -> Result<(), fmt::Error> {
        self.serialize_unit()
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<(), fmt::Error> {
        self.number(SOME);
        value.serialize(self)
    }

    fn serialize_unit(self) -> Result<(), fmt::Error> {
        self.number(NOTHING);
        Ok(())
    }

    fn serialize_unit_struct(self, _: &'static str) -> Result<(), fmt::Error> {
        self.serialize_unit()
    }

    fn serialize_unit_variant(self, _: &'static str, _: u32, variant: &'static str) -> Result<(), fmt::Error> {
        self.serialize_str(variant)
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(self, _: &'static str, value: &T) -> Result<(), fmt::Error> {
        value.serialize(self)
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        value: &T,
    ) -> Result<(), fmt::Error> {
        self.bytes(variant.as_bytes());
        value.serialize(self)
    }

    fn serialize_seq(self, _: Option<usize>) -> Result<Parts<'a>, fmt::Error> {
        Ok(Parts(self))
    }

    fn serialize_tuple(self, _: usize) -> Result<Parts<'a>, fmt::Error> {
        Ok(Parts(self))
    }

    fn serialize_tuple_struct(self, _: &'static str, _: usize) -> Result<Parts<'a>, fmt::Error> {
        Ok(Parts(self))
    }

    fn serialize_tuple_variant(self, _: &'static str, _: u32, variant: &'static str, _: usize) -> Result<Parts<'a>, fmt::Error> {
        self.bytes(variant.as_bytes());
        Ok(Parts(self))
    }

    fn serialize_map(self, _: Option<usize>) -> Result<Parts<'a>, fmt::Error> {
        Ok(Parts(self))
    }

    fn serialize_struct(self, _: &'static str, _: usize) -> Result<Parts<'a>, fmt::Error> {
        Ok(Parts(self))
    }

    fn serialize_struct_variant(self, _: &'static str, _: u32, variant: &'static str, _: usize) -> Result<Parts<'a>, fmt::Error> {
        self.bytes(variant.as_bytes());
        Ok(Parts(self))
    }
}

/// The parts of a value that has several.
#[derive(Debug)]
pub struct Parts<'a>(&'a mut Fingerprint);

impl Parts<'_> {
    fn part<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), fmt::Error> {
        value.serialize(&mut *self.0)
    }

    fn field<T: Serialize + ?Sized>(&mut self, name: &'static str, value: &T) -> Result<(), fmt::Error> {
        // A field may be left out: its name says which one this is.
        self.0.bytes(name.as_bytes());
        self.part(value)
    }

    fn end(self) -> Result<(), fmt::Error> {
        self.0.number(END);
        Ok(())
    }
}

macro_rules! parts {
    ($($trait:ident::$method:ident),*) => {
        $(impl ser::$trait for Parts<'_> {
            type Ok = ();
            type Error = fmt::Error;

            fn $method<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), fmt::Error> {
                self.part(value)
            }

            fn end(self) -> Result<(), fmt::Error> {
                Parts::end(self)
            }
        })*
    };
}

parts!(
    SerializeSeq::serialize_element,
    SerializeTuple::serialize_element,
    SerializeTupleStruct::serialize_field,
    SerializeTupleVariant::serialize_field
);

macro_rules! fields {
    ($($trait:ident),*) => {
        $(impl ser::$trait for Parts<'_> {
            type Ok = ();
            type Error = fmt::Error;

            fn serialize_field<T: Serialize + ?Sized>(&mut self, name: &'static str, value: &T) -> Result<(), fmt::Error> {
                self.field(name, value)
            }

            fn end(self) -> Result<(), fmt::Error> {
                Parts::end(self)
            }
        })*
    };
}

fields!(SerializeStruct, SerializeStructVariant);

impl ser::SerializeMap for Parts<'_> {
    type Ok = ();
    type Error = fmt::Error;

    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<(), fmt::Error> {
        self.part(key)
    }

    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), fmt::Error> {
        self.part(value)
    }

    fn end(self) -> Result<(), fmt::Error> {
        Parts::end(self)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Serialize;

    use super::*;

    #[derive(Serialize, Clone, Default)]
    struct Value {
        name: String,
        number: Option<u64>,
        #[serde(skip_serializing_if = "Vec::is_empty")]
        list: Vec<Vec<u8>>,
        map: BTreeMap<String, Kind>,
    }

    #[derive(Serialize, Clone)]
    #[serde(tag = "kind", rename_all = "camelCase")]
    enum Kind {
        One { at: u32 },
        Other,
    }

    #[test]
    fn whatever_differs_has_another_number() {
        let value = Value { name: "abcdefghij".into(), ..Value::default() };
        let map = |name: &str, kind: Kind| BTreeMap::from([(name.to_owned(), kind)]);
        let values = [
            value.clone(),
            Value { name: "abcdefghi".into(), ..value.clone() },
            Value { name: "abcdefghij\0".into(), ..value.clone() },
            Value { number: Some(0), ..value.clone() },
            Value { number: Some(1), ..value.clone() },
            Value { list: vec![vec![1], vec![]], ..value.clone() },
            Value { list: vec![vec![], vec![1]], ..value.clone() },
            Value { list: vec![vec![1]], ..value.clone() },
            Value { map: map("a", Kind::One { at: 1 }), ..value.clone() },
            Value { map: map("b", Kind::One { at: 1 }), ..value.clone() },
            Value { map: map("a", Kind::One { at: 2 }), ..value.clone() },
            Value { map: map("a", Kind::Other), ..value.clone() },
        ];
        let numbers: Vec<u64> = values.iter().map(|value| Fingerprint::of(value).expect("plain data")).collect();
        for (place, number) in numbers.iter().enumerate() {
            assert_eq!(Fingerprint::of(&values[place].clone()), Ok(*number));
            assert!(!numbers[..place].contains(number), "{place} has the number of another");
        }
    }
}
