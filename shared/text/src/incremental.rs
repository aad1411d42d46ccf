//! Text of a token stream, piece by piece, never a broken character.
//!
//! Invariant: the pieces, concatenated with [`IncrementalDecoder::flush`], are what
//! [`Tokenizer::decode`] gives for all tokens at once.

use crate::decoding::{ByteText, Decoding};
use crate::{Result, Tokenizer};

/// Turns ids into text as they come. One per sequence.
#[derive(Clone, Debug)]
pub struct IncrementalDecoder {
    tokenizer: Tokenizer,
    skip_special: bool,
    method: Method,
}

#[derive(Clone, Debug)]
enum Method {
    Bytes(ByteText),
    Window(Window),
}

/// For decoders that look at neighbouring tokens: the last token whose text was given and the
/// ones behind it, decoded together so that none looks like a text's first.
#[derive(Clone, Debug, Default)]
struct Window {
    ids: Vec<u32>,
    /// Bytes of the window's text that were given.
    given_bytes: usize,
}

impl IncrementalDecoder {
    /// A decoder at the start of a text. `skip_special` leaves out special tokens.
    pub fn new(tokenizer: Tokenizer, skip_special: bool) -> Self {
        Self { method: Self::method(&tokenizer), tokenizer, skip_special }
    }

    fn method(tokenizer: &Tokenizer) -> Method {
        match tokenizer.decoding() {
            Decoding::Bytes(start) => Method::Bytes(ByteText::new(start)),
            Decoding::Library => Method::Window(Window::default()),
        }
    }

    /// Takes the next token and gives the text that is complete with it, often none.
    ///
    /// # Errors
    /// The library's error, for vocabularies whose text is not their tokens' bytes.
    pub fn push(&mut self, id: u32) -> Result<String> {
        let mut text = String::new();
        if !self.tokenizer.is_known(id) || (self.skip_special && self.tokenizer.is_special(id)) {
            return Ok(text);
        }
        match &mut self.method {
            Method::Bytes(bytes) => bytes.push(self.tokenizer.token_bytes(id), &mut text),
            Method::Window(window) => window.push(id, &self.tokenizer, &mut text)?,
        }
        Ok(text)
    }

    /// The text of what was held back; the decoder is at the start of a text again.
    pub fn flush(&mut self) -> String {
        let mut text = String::new();
        if let Method::Bytes(bytes) = &mut self.method {
            bytes.finish(&mut text);
        }
        self.method = Self::method(&self.tokenizer);
        text
    }
}

impl Window {
    fn push(&mut self, id: u32, tokenizer: &Tokenizer, text: &mut String) -> Result<()> {
        self.ids.push(id);
        let decoded = tokenizer.decode(&self.ids, false)?;
        // A decoder that takes back what it gave would break the invariant; none of those
        // accepted does, and giving nothing is the harmless answer if one did.
        let Some(new) = decoded.get(self.given_bytes..) else {
            return Ok(());
        };
        text.push_str(new);
        if self.ids.len() > 1 && !new.is_empty() {
            self.ids.drain(..self.ids.len() - 1);
            self.given_bytes = tokenizer.decode(&self.ids, false)?.len();
        } else {
            self.given_bytes = decoded.len();
        }
        Ok(())
    }
}
