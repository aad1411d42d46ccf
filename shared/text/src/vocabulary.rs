//! What every token id stands for, as flat tables: raw bytes and flags by id.
//!
//! Invariant: for a byte-level vocabulary the concatenated bytes of a sequence, read as UTF-8
//! with replacement characters, are its decoded text. Decoding and streaming rest on that.

use crate::{Result, TextError};

/// Highest number of ids; the largest published vocabularies have a quarter million.
pub(crate) const MAX_VOCABULARY: usize = 1 << 22;

/// One entry as the tables are built from it.
pub(crate) struct VocabularyEntry {
    pub(crate) id: u32,
    /// The token as the vocabulary writes it, such as `Ġthe`.
    pub(crate) name: String,
    /// The bytes it stands for, such as ` the`.
    pub(crate) bytes: Vec<u8>,
    /// Left out of text meant for people.
    pub(crate) special: bool,
}

/// Bytes and flags by id.
#[derive(Debug)]
pub(crate) struct Vocabulary {
    /// The bytes of all tokens, back to back.
    bytes: Vec<u8>,
    /// Token `id` is `bytes[ends[id - 1]..ends[id]]`.
    ends: Vec<u32>,
    known: Vec<bool>,
    special: Vec<bool>,
    digest: String,
}

impl Vocabulary {
    /// Builds the tables; ids may have gaps.
    pub(crate) fn new(mut entries: Vec<VocabularyEntry>) -> Result<Self> {
        entries.sort_by_key(|entry| entry.id);
        let size = entries.last().map_or(0, |entry| entry.id as usize + 1);
        if size == 0 {
            return Err(TextError::invalid("vocabulary", "it has no tokens"));
        }
        check_size(size)?;
        let total: usize = entries.iter().map(|entry| entry.bytes.len()).sum();
        if u32::try_from(total).is_err() {
            return Err(TextError::invalid("vocabulary", format!("its tokens have {total} bytes together, more than 4 GiB")));
        }
        let mut tables = Self {
            bytes: Vec::with_capacity(total),
            ends: Vec::with_capacity(size),
            known: vec![false; size],
            special: vec![false; size],
            digest: String::new(),
        };
        let mut hasher = blake3::Hasher::new_derive_key("forge 2026 vocabulary digest v1");
        for entry in &entries {
            let id = entry.id as usize;
            if tables.known[id] {
                return Err(TextError::invalid(
                    "vocabulary",
                    format!("id {id} stands for more than one token, {:?} among them", entry.name),
                ));
            }
            tables.ends.resize(id, tables.bytes.len() as u32);
            tables.bytes.extend_from_slice(&entry.bytes);
            tables.ends.push(tables.bytes.len() as u32);
            tables.known[id] = true;
            tables.special[id] = entry.special;
            hasher.update(&entry.id.to_le_bytes());
            hasher.update(&(entry.name.len() as u64).to_le_bytes());
            hasher.update(entry.name.as_bytes());
            hasher.update(&[u8::from(entry.special)]);
        }
        tables.digest = hasher.finalize().to_hex().to_string();
        Ok(tables)
    }

    /// Highest id plus one.
    pub(crate) fn size(&self) -> usize {
        self.ends.len()
    }

    /// The bytes of a token; none for an id that stands for nothing.
    pub(crate) fn bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else {
            return &[];
        };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start as usize..end as usize]
    }

    pub(crate) fn is_known(&self, id: u32) -> bool {
        self.known.get(id as usize).copied().unwrap_or(false)
    }

    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    /// Hex BLAKE3 over ids, names and special flags.
    pub(crate) fn digest(&self) -> &str {
        &self.digest
    }
}

/// Refuses vocabularies larger than any real one, before anything of their size is allocated.
pub(crate) fn check_size(size: usize) -> Result<()> {
    if size > MAX_VOCABULARY {
        return Err(TextError::invalid("vocabulary", format!("its highest id is {}, the most is {}", size - 1, MAX_VOCABULARY - 1)));
    }
    Ok(())
}

/// The byte that a character of a byte-level vocabulary stands for: GPT-2's reversible mapping,
/// where printable Latin-1 characters stand for themselves and the other 68 bytes, in order,
/// for the characters from U+0100 on.
pub(crate) fn byte_of_char(character: char) -> Option<u8> {
    let code = u32::from(character);
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => Some(code as u8),
        0x100..=0x120 => Some((code - 0x100) as u8),
        0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// The bytes of a byte-level token; `None` where a character stands for no byte.
pub(crate) fn bytes_of_name(name: &str) -> Option<Vec<u8>> {
    name.chars().map(byte_of_char).collect()
}
