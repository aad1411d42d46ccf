//! SentencePiece's compiled replacement rules (`precompiled_charsmap`): the longest rule that the
//! text begins with decides what stands in its place.
//!
//! The bytes are a length, a double-array trie of 32-bit units over UTF-8, and the replacements,
//! each ended by a zero byte. Invariant: whatever the bytes hold, a look-up reads inside them.

use crate::{Result, TextError};

/// Largest set of rules; the largest published ones (NFKC with case folding) have some 500 kB.
const MAX_BYTES: usize = 8 << 20;

/// Longest rule looked for, and longest replacement, bytes: Unicode's own have at most 18 characters. A trie can be a
/// circle, and a text could grow by the length of a replacement with each of its characters.
const MAX_RULE_BYTES: usize = 64;

/// The rules of one model.
#[derive(Debug, Default)]
pub(crate) struct Charsmap {
    units: Vec<u32>,
    replacements: Vec<u8>,
}

/// The fields of a unit.
fn has_leaf(unit: u32) -> bool {
    (unit >> 8) & 1 == 1
}

fn label(unit: u32) -> u32 {
    unit & ((1 << 31) | 0xff)
}

fn offset(unit: u32) -> u32 {
    (unit >> 10) << ((unit & (1 << 9)) >> 6)
}

impl Charsmap {
    /// Reads the rules; `field` is where they come from. No bytes mean no rules.
    pub(crate) fn new(bytes: &[u8], field: &str) -> Result<Self> {
        if bytes.is_empty() {
            return Ok(Self::default());
        }
        let bad = |reason: &str| TextError::invalid(field, reason);
        if bytes.len() > MAX_BYTES {
            return Err(bad(&format!("it has {} bytes, at most {MAX_BYTES} are allowed", bytes.len())));
        }
        let (length, rest) = bytes.split_first_chunk::<4>().ok_or_else(|| bad("it is cut off"))?;
        let length = u32::from_le_bytes(*length) as usize;
        if !length.is_multiple_of(4) || length == 0 || length > rest.len() {
            return Err(bad(&format!("its trie is said to have {length} bytes, which does not fit")));
        }
        let (units, replacements) = rest.split_at(length);
        if std::str::from_utf8(replacements).is_err() || replacements.last().is_some_and(|byte| *byte != 0) {
            return Err(bad("its replacements are not text ended by zero bytes"));
        }
        if let Some(long) = replacements.split(|byte| *byte == 0).map(<[u8]>::len).find(|length| *length > MAX_RULE_BYTES) {
            return Err(bad(&format!("one of its replacements has {long} bytes, at most {MAX_RULE_BYTES} are allowed")));
        }
        Ok(Self {
            units: units.as_chunks::<4>().0.iter().map(|unit| u32::from_le_bytes(*unit)).collect(),
            replacements: replacements.to_vec(),
        })
    }

    /// The replacement for what the text begins with, and how many bytes of the text it stands
    /// for; the first character itself where no rule applies. The text is not empty.
    pub(super) fn replace<'a>(&'a self, text: &'a str) -> (&'a str, usize) {
        if let Some((start, length)) = self.longest_rule(text.as_bytes())
            && text.is_char_boundary(length)
            && let Some(replacement) = self.replacement(start)
        {
            return (replacement, length);
        }
        let length = text.chars().next().map_or(0, char::len_utf8);
        (&text[..length], length)
    }

    /// Start of the replacement and length of the longest rule.
    fn longest_rule(&self, text: &[u8]) -> Option<(usize, usize)> {
        let mut longest = None;
        let mut node = offset(*self.units.first()?);
        for (index, byte) in text.iter().take(MAX_RULE_BYTES).enumerate() {
            node ^= u32::from(*byte);
            let unit = *self.units.get(node as usize)?;
            if *byte == 0 || label(unit) != u32::from(*byte) {
                break;
            }
            node ^= offset(unit);
            if has_leaf(unit)
                && let Some(leaf) = self.units.get(node as usize)
            {
                longest = Some(((leaf & 0x7fff_ffff) as usize, index + 1));
            }
        }
        longest
    }

    fn replacement(&self, start: usize) -> Option<&str> {
        let rest = self.replacements.get(start..)?;
        let length = rest.iter().position(|byte| *byte == 0)?;
        std::str::from_utf8(&rest[..length]).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        assert!(Charsmap::new(&[], "f").is_ok());
        for bytes in
            [vec![1], vec![0, 0, 0, 0], vec![255; 8], vec![4, 0, 0, 0, 1, 2], vec![3, 0, 0, 0, 1, 2, 3], vec![4, 0, 0, 0, 0, 0, 0, 0, 65]]
        {
            assert!(Charsmap::new(&bytes, "f").is_err(), "{bytes:?}");
        }
    }

    #[test]
    fn a_trie_that_is_a_circle_is_left_after_the_longest_rule() {
        // Every node is the one that an `a` leads to.
        let units = vec![(0x61 << 10) | 0x61_u32; 256];
        let bytes: Vec<u8> = (1024_u32.to_le_bytes().into_iter()).chain(units.into_iter().flat_map(u32::to_le_bytes)).collect();
        let map = Charsmap::new(&bytes, "f").unwrap();
        let text = "a".repeat(200_000);
        let (mut rest, began) = (text.as_str(), std::time::Instant::now());
        while !rest.is_empty() {
            rest = &rest[map.replace(rest).1..];
        }
        assert!(began.elapsed() < std::time::Duration::from_secs(20), "{:?}", began.elapsed());
    }

    #[test]
    fn replacements_without_end_are_refused() {
        let bytes = [4_u32.to_le_bytes().to_vec(), 0_u32.to_le_bytes().to_vec(), vec![b'x'; 65], vec![0]].concat();
        assert!(Charsmap::new(&bytes, "f").unwrap_err().to_string().contains("65 bytes"));
    }

    #[test]
    fn a_trie_that_points_outside_applies_no_rule() {
        for unit in [0u32, u32::MAX, 0x8000_0000, 0xffff_fd00, 1 << 10] {
            let bytes = [4u32.to_le_bytes(), unit.to_le_bytes()].concat();
            let map = Charsmap::new(&bytes, "f").unwrap();
            for text in ["a", "\u{0}", "é", "\u{10ffff}x"] {
                let (replacement, length) = map.replace(text);
                assert_eq!(replacement, &text[..length]);
            }
        }
    }
}
