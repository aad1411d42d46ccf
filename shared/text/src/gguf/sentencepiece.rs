//! SentencePiece vocabularies: byte-pair merging by score (`llama`), unigram (`t5`).

use super::{CONTROL, GgufTokenizer, UNKNOWN, USER_DEFINED};
use crate::decoding::{Decoding, TextStart};
use crate::sentencepiece::{Algorithm, Piece, PieceKind, PrefixSpace, SentencePiece, SentencePieceModel, SpecialToken};
use crate::tokenizer::{SpecialIds, TokenizerParts};
use crate::vocabulary::Vocabulary;
use crate::{Result, TextError};

/// What holds where the metadata says nothing.
pub(super) struct Defaults {
    algorithm: Algorithm,
    add_bos: bool,
    add_eos: bool,
    bos: Option<u32>,
    eos: Option<u32>,
    unknown: Option<u32>,
}

/// `tokenizer.ggml.model` = `llama`.
pub(super) const LLAMA: Defaults =
    Defaults { algorithm: Algorithm::Bpe, add_bos: true, add_eos: false, bos: Some(1), eos: Some(2), unknown: Some(0) };

/// `tokenizer.ggml.model` = `t5`.
pub(super) const T5: Defaults =
    Defaults { algorithm: Algorithm::Unigram, add_bos: false, add_eos: true, bos: None, eos: Some(1), unknown: Some(2) };

/// Builds it.
pub(super) fn parts(metadata: &GgufTokenizer, defaults: Defaults) -> Result<TokenizerParts> {
    let model = model(metadata, &defaults)?;
    let specials = special_tokens(metadata, &model);
    let prefix_space = if model.add_prefix_space { PrefixSpace::Always } else { PrefixSpace::Never };
    let special = SpecialIds { bos: model.bos_id, unknown: model.unknown_id, ..special_ids(metadata, &model) };
    let around = |add: bool, id: Option<u32>| id.filter(|_| add).into_iter().collect();
    let start = if model.add_prefix_space { TextStart::DropSpaces(1) } else { TextStart::Keep };
    Ok(TokenizerParts {
        engine: SentencePiece::new(&model, &[], specials, prefix_space)?.into(),
        vocabulary: Vocabulary::new(model.entries())?,
        decoding: Decoding::Bytes(start),
        prefix: around(metadata.add_bos_token.unwrap_or(defaults.add_bos), special.bos),
        suffix: around(metadata.add_eos_token.unwrap_or(defaults.add_eos), model.eos_id),
        special,
    })
}

fn model(metadata: &GgufTokenizer, defaults: &Defaults) -> Result<SentencePieceModel> {
    let size = metadata.tokens.len();
    let scores = metadata.scores.as_deref().unwrap_or_default();
    if scores.len() != size {
        return Err(TextError::invalid("tokenizer.ggml.scores", format!("{} scores for {size} tokens", scores.len())));
    }
    let pieces = (metadata.tokens.iter().zip(scores).enumerate())
        .map(|(id, (text, &score))| {
            let kind = PieceKind::of(metadata.token_type(id)).unwrap_or(PieceKind::Normal);
            Piece { text: text.clone(), score, kind }
        })
        .collect();
    let within = |id: Option<u32>| id.filter(|&id| (id as usize) < size);
    Ok(SentencePieceModel {
        algorithm: defaults.algorithm,
        pieces,
        byte_fallback: true,
        suffix_spaces: false,
        remove_extra_spaces: metadata.remove_extra_whitespaces.unwrap_or(false),
        add_prefix_space: metadata.add_space_prefix.unwrap_or(true),
        charsmap: metadata.precompiled_charsmap.clone().unwrap_or_default(),
        unknown_id: metadata.unknown_id.or(within(defaults.unknown)),
        bos_id: metadata.bos_id.or(within(defaults.bos)),
        eos_id: metadata.eos_id.or(within(defaults.eos)),
        padding_id: metadata.padding_id,
        source: "tokenizer.ggml",
    })
}

/// The metadata's own end tokens, with the kind's where it names none.
fn special_ids(metadata: &GgufTokenizer, model: &SentencePieceModel) -> SpecialIds {
    let mut special = metadata.special_ids();
    if let Some(eos) = model.eos_id
        && !special.eos.contains(&eos)
    {
        special.eos.insert(0, eos);
    }
    special
}

/// What is found in text before it is cut.
fn special_tokens(metadata: &GgufTokenizer, model: &SentencePieceModel) -> Vec<SpecialToken> {
    let mut tokens = model.special_tokens();
    for token in &mut tokens {
        let kind = metadata.token_type(token.id as usize);
        token.strip_right = matches!(kind, CONTROL | UNKNOWN | USER_DEFINED) && metadata.strips_right(&token.text);
    }
    tokens
}
