//! How token bytes become text.
//!
//! Two kinds of vocabulary are told apart. In the first, text is the concatenation of the
//! tokens' bytes, read as UTF-8 with replacement characters, perhaps without spaces at its
//! start: byte-level BPE, SentencePiece. [`ByteText`] is that reading, used for whole texts and
//! for streams alike, so both give the same. In the second (WordPiece and others) a decoder of
//! the library looks at neighbouring tokens.

use serde_json::Value;

use crate::vocabulary::bytes_of_name;
use crate::{Result, TextError};

/// Which kind a vocabulary is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decoding {
    /// Text is the tokens' bytes.
    Bytes(TextStart),
    /// Text is what the library makes of the tokens.
    Library,
}

/// What happens to spaces at the start of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TextStart {
    /// They stay.
    Keep,
    /// Up to so many are dropped.
    DropSpaces(usize),
    /// Those of the first token are dropped (Metaspace).
    DropSpacesOfFirstToken,
}

/// Reads token bytes as text, holding back what may yet become a character.
#[derive(Clone, Debug)]
pub(crate) struct ByteText {
    /// Bytes of an incomplete character: at most three.
    pending: Vec<u8>,
    start: TextStart,
}

impl ByteText {
    pub(crate) fn new(start: TextStart) -> Self {
        Self { pending: Vec::new(), start }
    }

    /// Takes a token's bytes and appends the text that is complete with them.
    pub(crate) fn push(&mut self, bytes: &[u8], text: &mut String) {
        match self.start {
            TextStart::Keep => self.push_bytes(bytes, text),
            TextStart::DropSpaces(limit) => {
                let dropped = bytes.iter().take(limit).take_while(|b| **b == b' ').count();
                if dropped < bytes.len() {
                    self.start = TextStart::Keep;
                } else {
                    self.start = TextStart::DropSpaces(limit - dropped);
                }
                self.push_bytes(&bytes[dropped..], text);
            }
            TextStart::DropSpacesOfFirstToken => {
                self.start = TextStart::Keep;
                let kept: Vec<u8> = bytes.iter().copied().filter(|b| *b != b' ').collect();
                self.push_bytes(&kept, text);
            }
        }
    }

    fn push_bytes(&mut self, bytes: &[u8], text: &mut String) {
        if self.pending.is_empty()
            && let Ok(whole) = std::str::from_utf8(bytes)
        {
            text.push_str(whole);
            return;
        }
        self.pending.extend_from_slice(bytes);
        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    self.pending.clear();
                    return;
                }
                Err(error) => {
                    let (valid, tail) = rest.split_at(error.valid_up_to());
                    // The prefix was just found valid, so nothing is replaced here.
                    text.push_str(&String::from_utf8_lossy(valid));
                    let Some(invalid) = error.error_len() else {
                        self.pending = tail.to_vec();
                        return;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &tail[invalid..];
                }
            }
        }
    }

    /// Ends the text: an incomplete character becomes one replacement character.
    pub(crate) fn finish(&mut self, text: &mut String) {
        if !self.pending.is_empty() {
            self.pending.clear();
            text.push(char::REPLACEMENT_CHARACTER);
        }
    }
}

/// What a `tokenizer.json`'s decoder does to one token, where that is all it does.
#[derive(Debug)]
pub(crate) struct DecoderPlan {
    pub(crate) decoding: Decoding,
    byte_level: bool,
    byte_fallback: bool,
    /// Replacements in the token's name, in order.
    replacements: Vec<(String, String)>,
}

impl DecoderPlan {
    /// Reads the `decoder` field.
    ///
    /// # Errors
    /// [`TextError::Unsupported`] for a decoder that is not for text, or that joins bytes in a
    /// way that cannot be streamed.
    pub(crate) fn of(decoder: &Value) -> Result<Self> {
        let steps: Vec<&Value> = match decoder["type"].as_str() {
            Some("Sequence") => decoder["decoders"].as_array().into_iter().flatten().collect(),
            Some(_) => vec![decoder],
            None => vec![],
        };
        let mut plan =
            Self { decoding: Decoding::Bytes(TextStart::Keep), byte_level: false, byte_fallback: false, replacements: Vec::new() };
        let mut fused = false;
        let mut simple = !steps.is_empty();
        for step in steps {
            simple &= match step["type"].as_str().unwrap_or_default() {
                "ByteLevel" => plan.set_byte_level(fused),
                "ByteFallback" if !fused => {
                    plan.byte_fallback = true;
                    true
                }
                "Fuse" => {
                    fused = true;
                    true
                }
                "Replace" if !fused => plan.add_replacement(step),
                "Metaspace" if !fused => plan.set_metaspace(step),
                "Strip" if fused => plan.set_strip(step),
                "Replace" | "Strip" | "Metaspace" | "WordPiece" | "BPEDecoder" => false,
                other => {
                    return Err(TextError::Unsupported {
                        field: "tokenizer.json: decoder",
                        value: other.to_string(),
                        supported: "ByteLevel, ByteFallback, Fuse, Replace, Strip, Metaspace, \
                                    WordPiece, BPEDecoder"
                            .to_string(),
                    });
                }
            };
        }
        if !simple {
            if plan.byte_fallback || plan.byte_level {
                return Err(TextError::Unsupported {
                    field: "tokenizer.json: decoder",
                    value: decoder.to_string(),
                    supported: "ByteLevel alone; or Replace, ByteFallback, Fuse, Strip in this \
                                order; or Metaspace"
                        .to_string(),
                });
            }
            plan.decoding = Decoding::Library;
        }
        Ok(plan)
    }

    fn set_byte_level(&mut self, fused: bool) -> bool {
        self.byte_level = true;
        !fused && self.replacements.is_empty() && !self.byte_fallback
    }

    fn add_replacement(&mut self, step: &Value) -> bool {
        let (Some(from), Some(to)) = (step["pattern"]["String"].as_str(), step["content"].as_str()) else {
            return false;
        };
        self.replacements.push((from.to_string(), to.to_string()));
        !self.byte_level && !from.is_empty()
    }

    fn set_metaspace(&mut self, step: &Value) -> bool {
        let mark = step["replacement"].as_str().unwrap_or("▁");
        self.replacements.push((mark.to_string(), " ".to_string()));
        let never = match step["prepend_scheme"].as_str() {
            Some(scheme) => scheme == "never",
            None => step["add_prefix_space"].as_bool() == Some(false),
        };
        if !never {
            self.decoding = Decoding::Bytes(TextStart::DropSpacesOfFirstToken);
        }
        !self.byte_level
    }

    fn set_strip(&mut self, step: &Value) -> bool {
        let start = step["start"].as_u64().unwrap_or(0) as usize;
        self.decoding = Decoding::Bytes(TextStart::DropSpaces(start));
        step["content"].as_str() == Some(" ") && step["stop"].as_u64() == Some(0)
    }

    /// The bytes of a token; `None` where only the library knows. `added` tokens of a byte-level
    /// vocabulary are plain text.
    pub(crate) fn bytes(&self, name: &str, added: bool) -> Option<Vec<u8>> {
        if self.decoding == Decoding::Library {
            return None;
        }
        if self.byte_level {
            let bytes = if added { None } else { bytes_of_name(name) };
            return Some(bytes.unwrap_or_else(|| name.as_bytes().to_vec()));
        }
        let mut text = name.to_string();
        for (from, to) in &self.replacements {
            text = text.replace(from, to);
        }
        if self.byte_fallback && text.len() == 6 {
            let byte =
                (text.strip_prefix("<0x")).and_then(|rest| rest.strip_suffix('>')).and_then(|digits| u8::from_str_radix(digits, 16).ok());
            if let Some(byte) = byte {
                return Some(vec![byte]);
            }
        }
        Some(text.into_bytes())
    }
}
