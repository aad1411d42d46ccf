//! Text of a token stream, piece by piece, never a broken character.
//!
//! Invariant: the pieces, concatenated with [`IncrementalDecoder::flush`], are what
//! [`Tokenizer::decode`] gives for all tokens at once.

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
    /// Bytes that may yet become a character: at most three.
    Bytes(Vec<u8>),
    /// For decoders that look at neighbouring tokens.
    Window(Window),
}

/// Tokens whose text is not sent yet, with enough tokens before them for the decoder to see
/// what it would see in the whole.
#[derive(Clone, Debug, Default)]
struct Window {
    ids: Vec<u32>,
    /// Bytes of the window's text that were sent.
    sent_bytes: usize,
}

impl IncrementalDecoder {
    /// A decoder at the start of a text. `skip_special` leaves out special tokens.
    pub fn new(tokenizer: Tokenizer, skip_special: bool) -> Self {
        let method = if tokenizer.is_byte_level() {
            Method::Bytes(Vec::new())
        } else {
            Method::Window(Window::default())
        };
        Self {
            tokenizer,
            skip_special,
            method,
        }
    }

    /// Takes the next token and gives the text that is complete with it, often none.
    ///
    /// # Errors
    /// The library's error, for vocabularies that are not byte-level.
    pub fn push(&mut self, id: u32) -> Result<String> {
        todo!("{id} {} {:?}", self.skip_special, self.tokenizer)
    }

    /// The text of what was held back; the decoder is at the start of a text again.
    ///
    /// # Errors
    /// As for [`Self::push`].
    pub fn flush(&mut self) -> Result<String> {
        todo!("{:?}", self.method)
    }
}
