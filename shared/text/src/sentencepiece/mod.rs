//! SentencePiece vocabularies: byte-pair merging by score, and unigram.
//!
//! They come from GGUF metadata and from `tokenizer.model` files; both loaders fill in one
//! [`SentencePieceModel`]. Text is cut at special tokens first, then each stretch is normalized
//! (rules of the model, spaces written as `▁`, one in front) and cut into pieces. What is no
//! piece becomes byte tokens, else the unknown token.
//!
//! Invariant: encoding takes n log n steps for a text of n characters, whatever it holds.

pub(crate) mod charsmap;
mod merge;
mod model_file;
mod special_tokens;

use std::collections::HashMap;

use tokenizers::Model as _;
use tokenizers::models::unigram::Unigram;

use self::charsmap::Charsmap;
use self::special_tokens::{Part, SpecialTokens};
use crate::vocabulary::VocabularyEntry;
use crate::{Result, TextError};

pub(crate) use self::model_file::parse as parse_model_file;
pub(crate) use self::special_tokens::SpecialToken;

/// How a space is written in pieces.
const SPACE: char = '\u{2581}';

/// How pieces are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Algorithm {
    Bpe,
    Unigram,
}

/// What a piece is for; the numbers are those of the model file and of GGUF's token types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PieceKind {
    Normal = 1,
    Unknown = 2,
    Control = 3,
    UserDefined = 4,
    Unused = 5,
    Byte = 6,
}

impl PieceKind {
    /// The kind of a number.
    pub(crate) fn of(number: i32) -> Option<Self> {
        [Self::Normal, Self::Unknown, Self::Control, Self::UserDefined, Self::Unused, Self::Byte]
            .into_iter()
            .find(|kind| *kind as i32 == number)
    }
}

/// One piece; its place in the list is its id.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    pub(crate) text: String,
    pub(crate) score: f32,
    pub(crate) kind: PieceKind,
}

impl Piece {
    /// The bytes it stands for.
    fn bytes(&self) -> Vec<u8> {
        match self.kind {
            PieceKind::Byte => byte_of(&self.text).map_or_else(Vec::new, |byte| vec![byte]),
            PieceKind::Control | PieceKind::Unknown => self.text.clone().into_bytes(),
            PieceKind::Normal | PieceKind::Unused | PieceKind::UserDefined => self.text.replace(SPACE, " ").into_bytes(),
        }
    }

    fn is_special(&self) -> bool {
        matches!(self.kind, PieceKind::Control | PieceKind::Unknown)
    }
}

/// The byte of a piece such as `<0x0A>`.
fn byte_of(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// Where a space is put in front of text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PrefixSpace {
    Never,
    /// Where the whole text begins.
    First,
    /// There, and behind every special token.
    Always,
}

/// A model as its file or metadata describes it.
#[derive(Clone, Debug)]
pub(crate) struct SentencePieceModel {
    pub(crate) algorithm: Algorithm,
    pub(crate) pieces: Vec<Piece>,
    /// Characters that are no piece become bytes.
    pub(crate) byte_fallback: bool,
    /// The space belongs to the word before it.
    pub(crate) suffix_spaces: bool,
    /// Runs of spaces become one, those at the ends none.
    pub(crate) remove_extra_spaces: bool,
    pub(crate) add_prefix_space: bool,
    /// Compiled replacement rules.
    pub(crate) charsmap: Vec<u8>,
    pub(crate) unknown_id: Option<u32>,
    pub(crate) bos_id: Option<u32>,
    pub(crate) eos_id: Option<u32>,
    pub(crate) padding_id: Option<u32>,
    /// File or metadata, for errors.
    pub(crate) source: &'static str,
}

impl SentencePieceModel {
    fn invalid(&self, field: &str, reason: impl ToString) -> TextError {
        TextError::invalid(format!("{}: {field}", self.source), reason)
    }

    /// What the pieces stand for.
    pub(crate) fn entries(&self) -> Vec<VocabularyEntry> {
        (self.pieces.iter().zip(0u32..))
            .map(|(piece, id)| VocabularyEntry { id, name: piece.text.clone(), bytes: piece.bytes(), special: piece.is_special() })
            .collect()
    }

    /// The tokens that the model itself wants found in text before it is normalized.
    pub(crate) fn special_tokens(&self) -> Vec<SpecialToken> {
        self.tokens(|piece| piece.is_special() || (piece.kind == PieceKind::UserDefined && !piece.text.contains(SPACE)))
    }

    /// Those that are written with `▁`, and so are found in normalized text.
    fn spaced_tokens(&self) -> Vec<SpecialToken> {
        self.tokens(|piece| piece.kind == PieceKind::UserDefined && piece.text.contains(SPACE))
    }

    fn tokens(&self, is_wanted: impl Fn(&Piece) -> bool) -> Vec<SpecialToken> {
        (self.pieces.iter().zip(0u32..))
            .filter(|(piece, _)| is_wanted(piece))
            .map(|(piece, id)| SpecialToken {
                id,
                text: piece.text.clone(),
                special: piece.is_special(),
                strip_left: false,
                strip_right: false,
            })
            .collect()
    }

    /// Everything that later steps take for granted.
    fn check(&self) -> Result<()> {
        if self.pieces.is_empty() {
            return Err(self.invalid("pieces", "there are none"));
        }
        if let Some((id, piece)) = self.pieces.iter().enumerate().find(|(_, piece)| !piece.score.is_finite()) {
            return Err(self.invalid("scores", format!("token {id} {:?} has the score {}", piece.text, piece.score)));
        }
        let mut seen = HashMap::with_capacity(self.pieces.len());
        for (id, piece) in self.pieces.iter().enumerate() {
            if piece.kind == PieceKind::Byte && byte_of(&piece.text).is_none() {
                return Err(
                    self.invalid("pieces", format!("token {id} is a byte but is called {:?}, expected <0x00> to <0xFF>", piece.text))
                );
            }
            if !piece.text.is_empty()
                && let Some(first) = seen.insert(piece.text.as_str(), id)
            {
                return Err(self.invalid("pieces", format!("{:?} is both token {first} and token {id}", piece.text)));
            }
        }
        let size = self.pieces.len();
        for (field, id) in [("unk_id", self.unknown_id), ("bos_id", self.bos_id), ("eos_id", self.eos_id), ("pad_id", self.padding_id)] {
            if let Some(id) = id.filter(|&id| id as usize >= size) {
                return Err(self.invalid(field, format!("{id} is outside the vocabulary of {size} tokens")));
            }
        }
        if self.algorithm == Algorithm::Unigram && self.pieces.iter().any(|piece| piece.kind == PieceKind::Unused) {
            return Err(self.invalid("pieces", "unused pieces are not supported with unigram; take the model's tokenizer.json"));
        }
        Ok(())
    }
}

/// A piece as merging sees it.
#[derive(Clone, Copy, Debug)]
struct PieceRow {
    id: u32,
    score: f32,
    unused: bool,
}

/// Pieces that text can be made of, by their text.
#[derive(Debug)]
struct Pieces {
    rows: HashMap<Box<str>, PieceRow>,
    longest_bytes: usize,
}

impl Pieces {
    /// Control, unknown and byte pieces are not for text.
    fn new(pieces: &[Piece]) -> Self {
        let rows: HashMap<Box<str>, PieceRow> = (pieces.iter().zip(0u32..))
            .filter(|(piece, _)| matches!(piece.kind, PieceKind::Normal | PieceKind::UserDefined | PieceKind::Unused))
            .filter(|(piece, _)| !piece.text.is_empty())
            .map(|(piece, id)| {
                let row = PieceRow { id, score: piece.score, unused: piece.kind == PieceKind::Unused };
                (piece.text.as_str().into(), row)
            })
            .collect();
        Self { longest_bytes: rows.keys().map(|text| text.len()).max().unwrap_or(0), rows }
    }

    fn get(&self, text: &str) -> Option<PieceRow> {
        if text.len() > self.longest_bytes { None } else { self.rows.get(text).copied() }
    }
}

/// How normalized text becomes ids.
#[derive(Debug)]
enum Cutter {
    Bpe(Pieces),
    Unigram(Box<Unigram>),
}

/// Encodes with a SentencePiece vocabulary.
#[derive(Debug)]
pub(crate) struct SentencePiece {
    cutter: Cutter,
    charsmap: Charsmap,
    prefix_space: PrefixSpace,
    suffix_spaces: bool,
    remove_extra_spaces: bool,
    /// Found before text is normalized.
    specials: SpecialTokens,
    /// Found in normalized text.
    spaced: SpecialTokens,
    /// Ids of the 256 byte pieces, where there are all of them.
    bytes: Option<Vec<u32>>,
    unknown_id: Option<u32>,
    ids: HashMap<String, u32>,
    names: Vec<String>,
}

impl SentencePiece {
    /// Checks a model and makes it ready. `added` are tokens behind the model's own, by ascending
    /// id without a hole; `specials` is all that is found in text before it is cut.
    pub(crate) fn new(
        model: &SentencePieceModel,
        added: &[SpecialToken],
        specials: Vec<SpecialToken>,
        prefix_space: PrefixSpace,
    ) -> Result<Self> {
        model.check()?;
        let bytes = byte_ids(&model.pieces).filter(|_| model.byte_fallback);
        if bytes.is_none() && model.unknown_id.is_none() {
            return Err(model.invalid("unk_id", "there is neither an unknown token nor a byte token for each byte"));
        }
        let names: Vec<String> =
            model.pieces.iter().map(|piece| piece.text.clone()).chain(added.iter().map(|token| token.text.clone())).collect();
        Ok(Self {
            cutter: match model.algorithm {
                Algorithm::Bpe => Cutter::Bpe(Pieces::new(&model.pieces)),
                Algorithm::Unigram => Cutter::Unigram(Box::new(unigram(model)?)),
            },
            charsmap: Charsmap::new(&model.charsmap, &format!("{}: precompiled_charsmap", model.source))?,
            prefix_space,
            suffix_spaces: model.suffix_spaces,
            remove_extra_spaces: model.remove_extra_spaces,
            specials: SpecialTokens::new(specials)?,
            spaced: SpecialTokens::new(model.spaced_tokens())?,
            bytes,
            unknown_id: model.unknown_id,
            ids: names.iter().cloned().zip(0u32..).collect(),
            names,
        })
    }

    /// Ids of a text; with `parse_special` the text of special tokens becomes those tokens.
    pub(crate) fn encode(&self, text: &str, parse_special: bool) -> Result<Vec<u32>> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        let mut is_first = true;
        let mut after_special = true;
        for part in self.specials.split(text, parse_special) {
            match part {
                Part::Token(id) => {
                    ids.push(id);
                    after_special = true;
                }
                Part::Text(text) => {
                    let prefix = match self.prefix_space {
                        PrefixSpace::Never => false,
                        PrefixSpace::First => is_first,
                        PrefixSpace::Always => after_special,
                    };
                    self.encode_normalized(&self.normalize(text, prefix), &mut ids)?;
                    after_special = false;
                }
            }
            is_first = false;
        }
        Ok(ids)
    }

    pub(crate) fn id(&self, name: &str) -> Option<u32> {
        self.ids.get(name).copied()
    }

    pub(crate) fn name(&self, id: u32) -> Option<&str> {
        self.names.get(id as usize).map(String::as_str)
    }

    /// Applies the model's rules and writes spaces as `▁`.
    fn normalize(&self, text: &str, prefix: bool) -> String {
        let mut result = String::with_capacity(text.len() + text.len() / 4 + 3);
        let mut rest = text;
        let mut after_space = self.remove_extra_spaces;
        while !rest.is_empty() {
            let (replacement, length) = self.charsmap.replace(rest);
            rest = &rest[length..];
            for character in replacement.chars() {
                let is_space = character == ' ';
                if !(is_space && after_space) {
                    result.push(if is_space { SPACE } else { character });
                }
                after_space = is_space && self.remove_extra_spaces;
            }
        }
        if self.remove_extra_spaces {
            result.truncate(result.trim_end_matches(SPACE).len());
        }
        if prefix && !result.is_empty() {
            if self.suffix_spaces {
                result.push(SPACE);
            } else {
                result.insert(0, SPACE);
            }
        }
        result
    }

    fn encode_normalized(&self, text: &str, ids: &mut Vec<u32>) -> Result<()> {
        for part in self.spaced.split(text, true) {
            match part {
                Part::Token(id) => ids.push(id),
                Part::Text(text) => self.cut(text, ids)?,
            }
        }
        Ok(())
    }

    fn cut(&self, text: &str, ids: &mut Vec<u32>) -> Result<()> {
        match &self.cutter {
            Cutter::Bpe(pieces) => {
                let mut after_unknown = false;
                for (start, end) in merge::merge(text, pieces).0 {
                    let part = &text[start..end];
                    let found = pieces.get(part);
                    match found {
                        Some(piece) => ids.push(piece.id),
                        None => self.push_unknown(part, after_unknown, ids),
                    }
                    after_unknown = found.is_none();
                }
            }
            Cutter::Unigram(model) => {
                let tokens = model.tokenize(text).map_err(|error| TextError::Tokenize { action: "encode", reason: error.to_string() })?;
                let mut after_unknown = false;
                for token in tokens {
                    let is_unknown = Some(token.id) == self.unknown_id;
                    if is_unknown {
                        self.push_unknown(&token.value, after_unknown, ids);
                    } else {
                        ids.push(token.id);
                    }
                    after_unknown = is_unknown;
                }
            }
        }
        Ok(())
    }

    /// Text that is no piece: its bytes, else one unknown token for all of it in a row.
    fn push_unknown(&self, text: &str, after_unknown: bool, ids: &mut Vec<u32>) {
        match &self.bytes {
            Some(bytes) => ids.extend(text.bytes().map(|byte| bytes[usize::from(byte)])),
            None if after_unknown => {}
            None => ids.extend(self.unknown_id),
        }
    }
}

/// The ids of all byte pieces, where there are all of them.
fn byte_ids(pieces: &[Piece]) -> Option<Vec<u32>> {
    let mut ids = vec![None; 256];
    for (piece, id) in pieces.iter().zip(0u32..) {
        if let Some(byte) = byte_of(&piece.text).filter(|_| piece.kind == PieceKind::Byte) {
            ids[usize::from(byte)] = Some(id);
        }
    }
    ids.into_iter().collect()
}

/// Longest piece of a unigram model, bytes; published ones have at most some fifty.
const MAX_PIECE_BYTES: usize = 512;
/// Most bytes of all its pieces; the largest published vocabularies have some 3 MB.
const MAX_PIECES_BYTES: usize = 8 << 20;

/// Checks what the library makes of a unigram's pieces: a tree with a level, and hundreds of bytes, for each of their bytes.
///
/// # Errors
/// What is too long.
pub(crate) fn check_pieces<'a>(pieces: impl Iterator<Item = &'a str>) -> std::result::Result<(), String> {
    let mut bytes = 0;
    for (id, piece) in pieces.enumerate() {
        if piece.len() > MAX_PIECE_BYTES {
            return Err(format!("piece {id} has {} bytes, at most {MAX_PIECE_BYTES} are allowed", piece.len()));
        }
        bytes += piece.len();
        if bytes > MAX_PIECES_BYTES {
            return Err(format!("they have more than {MAX_PIECES_BYTES} bytes"));
        }
    }
    Ok(())
}

/// The library's unigram model. Pieces that are not for text get a name that no text has: the
/// library looks for every piece it knows.
fn unigram(model: &SentencePieceModel) -> Result<Unigram> {
    let unknown = model.unknown_id.ok_or_else(|| model.invalid("unk_id", "unigram needs an unknown token"))?;
    let lowest = model.pieces.iter().filter(|piece| piece.kind == PieceKind::Normal).map(|piece| piece.score).fold(0.0, f32::min);
    check_pieces(model.pieces.iter().map(|piece| piece.text.as_str())).map_err(|reason| model.invalid("pieces", reason))?;
    let vocabulary = (model.pieces.iter().enumerate())
        .map(|(id, piece)| match piece.kind {
            PieceKind::Normal => (piece.text.clone(), f64::from(piece.score)),
            PieceKind::UserDefined => (piece.text.clone(), 0.0),
            _ => (format!("\u{0}{id}\u{0}"), f64::from(lowest)),
        })
        .collect();
    Unigram::from(vocabulary, Some(unknown as usize), false).map_err(|error| model.invalid("pieces", error))
}
