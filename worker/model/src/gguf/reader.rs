//! A cursor over untrusted bytes: every read is checked against what is left, and so is every count before
//! anything is allocated for it.

use crate::error::{ModelError, Result};

/// The longest string a file may hold: a chat template or licence text, with room to spare.
const MAX_STRING_BYTES: u64 = 16 << 20;

pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    position: usize,
}

/// A GGUF error.
pub(super) fn malformed(reason: impl Into<String>) -> ModelError {
    ModelError::Malformed { format: "GGUF".to_owned(), reason: reason.into() }
}

/// Fixed-width little-endian numbers.
pub(super) trait Number: Sized {
    fn read(reader: &mut Reader<'_>) -> Result<Self>;
}

macro_rules! number {
    ($($kind:ty),*) => {$(
        impl Number for $kind {
            fn read(reader: &mut Reader<'_>) -> Result<Self> {
                Ok(<$kind>::from_le_bytes(reader.array()?))
            }
        }
    )*};
}
number!(u8, i8, u16, i16, u32, i32, u64, i64, f32, f64);

impl Number for bool {
    fn read(reader: &mut Reader<'_>) -> Result<Self> {
        match u8::read(reader)? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(malformed(format!("a boolean at byte {} is {other}", reader.position - 1))),
        }
    }
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Reader { bytes, position: 0 }
    }

    pub(super) fn position(&self) -> usize {
        self.position
    }

    pub(super) fn remaining(&self) -> usize {
        self.bytes.len() - self.position
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        if count > self.remaining() {
            return Err(malformed(format!("truncated: {count} bytes are needed at byte {}, {} are left", self.position, self.remaining())));
        }
        let taken = &self.bytes[self.position..self.position + count];
        self.position += count;
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    pub(super) fn number<T: Number>(&mut self) -> Result<T> {
        T::read(self)
    }

    /// A count of things of which each takes at least `smallest_bytes`: refused where they cannot be in the file.
    pub(super) fn count(&mut self, what: &str, smallest_bytes: usize) -> Result<usize> {
        let at = self.position;
        let count: u64 = self.number()?;
        let most = self.remaining() / smallest_bytes;
        match usize::try_from(count) {
            Ok(count) if count <= most => Ok(count),
            _ => Err(malformed(format!("{count} {what} at byte {at} cannot be in the {} bytes that follow", self.remaining()))),
        }
    }

    pub(super) fn numbers<T: Number>(&mut self, count: usize) -> Result<Vec<T>> {
        (0..count).map(|_| self.number()).collect()
    }

    pub(super) fn string(&mut self) -> Result<String> {
        let at = self.position;
        let length: u64 = self.number()?;
        if length > MAX_STRING_BYTES {
            return Err(malformed(format!("a string of {length} bytes at byte {at}; the most is {MAX_STRING_BYTES}")));
        }
        let bytes = self.take(length as usize)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(malformed(format!("the string at byte {at} is not UTF-8"))),
        }
    }
}
