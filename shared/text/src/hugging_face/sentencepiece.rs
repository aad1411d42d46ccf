//! `tokenizer.model` without a `tokenizer.json`: a SentencePiece model and the tokens that the
//! small files add to it.

use std::collections::BTreeMap;

use serde_json::Value;

use super::side_files::{SideFiles, parse_object, token_text};
use crate::decoding::{Decoding, TextStart};
use crate::sentencepiece::{PrefixSpace, SentencePiece, SentencePieceModel, SpecialToken, parse_model_file};
use crate::tokenizer::TokenizerParts;
use crate::vocabulary::{Vocabulary, VocabularyEntry, check_size};
use crate::{Result, TextError};

/// Builds it.
pub(super) fn parts(model: &[u8], added_tokens: Option<&[u8]>, side: &SideFiles) -> Result<TokenizerParts> {
    let model = parse_model_file(model)?;
    let (specials, added) = special_tokens(&model, added_tokens, side)?;
    let prefix_space = prefix_space(&model, side);
    let mut entries = model.entries();
    for token in &specials {
        let (name, bytes) = (token.text.clone(), token.text.clone().into_bytes());
        let entry = VocabularyEntry { id: token.id, name, bytes, special: token.special };
        match entries.get_mut(token.id as usize) {
            Some(own) => own.special = token.special,
            None => entries.push(entry),
        }
    }
    let engine = SentencePiece::new(&model, &added, specials, prefix_space)?;
    let (wants_bos, wants_eos) = side.add_flags().unwrap_or((has_class(side, &["Llama", "Gemma", "CodeLlama"]), has_class(side, &["T5"])));
    let mut special = side.special_ids(|name| engine.id(name))?;
    special.bos = special.bos.or(model.bos_id);
    special.unknown = special.unknown.or(model.unknown_id);
    special.padding = special.padding.or(model.padding_id);
    if special.eos.is_empty() {
        special.eos = model.eos_id.into_iter().collect();
    }
    let own_eos = special.eos.first().copied();
    Ok(TokenizerParts {
        vocabulary: Vocabulary::new(entries)?,
        decoding: Decoding::Bytes(if prefix_space == PrefixSpace::Never { TextStart::Keep } else { TextStart::DropSpaces(1) }),
        prefix: special.bos.filter(|_| wants_bos).into_iter().collect(),
        suffix: own_eos.filter(|_| wants_eos).into_iter().collect(),
        special,
        engine: engine.into(),
    })
}

/// Whether `tokenizer_class` is one of these, with or without what its makers put behind it.
fn has_class(side: &SideFiles, names: &[&str]) -> bool {
    let class = side.tokenizer_config.get("tokenizer_class").and_then(Value::as_str).unwrap_or_default();
    names.iter().any(|name| class.strip_prefix(name).is_some_and(|rest| rest.starts_with("Tokenizer")))
}

/// `add_prefix_space` decides before the model's own flag. Old conversions (`legacy`) put a space
/// behind every special token, as does T5; new ones only at the start of the text.
fn prefix_space(model: &SentencePieceModel, side: &SideFiles) -> PrefixSpace {
    let flag = |name: &str| side.tokenizer_config.get(name).and_then(Value::as_bool);
    if !flag("add_prefix_space").unwrap_or(model.add_prefix_space) {
        PrefixSpace::Never
    } else if flag("legacy").unwrap_or(has_class(side, &["T5"])) {
        PrefixSpace::Always
    } else {
        PrefixSpace::First
    }
}

/// All tokens that are found in text before it is cut, and those of them that lie behind the
/// model's own, by ascending id.
fn special_tokens(
    model: &SentencePieceModel,
    added_tokens: Option<&[u8]>,
    side: &SideFiles,
) -> Result<(Vec<SpecialToken>, Vec<SpecialToken>)> {
    let size = model.pieces.len() as u32;
    let mut tokens: BTreeMap<u32, SpecialToken> = model.special_tokens().into_iter().map(|token| (token.id, token)).collect();
    let mut add = |file: &str, id: u64, text: &str, flags: &Value| -> Result<()> {
        let bad = |reason: String| TextError::invalid(file, reason);
        check_size(usize::try_from(id).unwrap_or(usize::MAX).saturating_add(1))?;
        let id = u32::try_from(id).map_err(|_| bad(format!("{text:?} has id {id}")))?;
        if let Some(own) = model.pieces.get(id as usize).filter(|piece| piece.text != text) {
            return Err(bad(format!("{text:?} has id {id}, which stands for {:?}", own.text)));
        }
        let flag = |name: &str| flags[name].as_bool().unwrap_or(false);
        if flag("single_word") {
            return Err(bad(format!("{text:?}: single_word is not supported without a tokenizer.json")));
        }
        let special = flags["special"].as_bool().unwrap_or_else(|| tokens.get(&id).is_some_and(|token| token.special));
        let token = SpecialToken { id, text: text.to_owned(), special, strip_left: flag("lstrip"), strip_right: flag("rstrip") };
        tokens.insert(id, token);
        Ok(())
    };
    if let Some(bytes) = added_tokens {
        let file = "added_tokens.json";
        for (text, id) in parse_object(file, bytes)? {
            let id = id.as_u64().ok_or_else(|| TextError::invalid(file, format!("{text:?} has id {id}, which is not a token id")))?;
            add(file, id, &text, &Value::Null)?;
        }
    }
    let file = "tokenizer_config.json: added_tokens_decoder";
    for (id, token) in side.tokenizer_config.get("added_tokens_decoder").and_then(Value::as_object).into_iter().flatten() {
        let id = id.parse().map_err(|_| TextError::invalid(file, format!("{id:?} is not a token id")))?;
        let text = token_text(token).ok_or_else(|| TextError::invalid(file, format!("token {id} has no content")))?;
        add(file, id, text, token)?;
    }
    mark_named(side, model, &mut tokens);
    let added: Vec<SpecialToken> = tokens.range(size..).map(|(_, token)| token.clone()).collect();
    for (token, expected) in added.iter().zip(size..) {
        if token.id != expected {
            return Err(TextError::invalid(file, format!("{:?} has id {} but the next free one is {expected}", token.text, token.id)));
        }
    }
    Ok((tokens.into_values().collect(), added))
}

/// Tokens that the files name as BOS, EOS and so on are special ones, whatever else they are.
fn mark_named(side: &SideFiles, model: &SentencePieceModel, tokens: &mut BTreeMap<u32, SpecialToken>) {
    for text in side.all_special_texts() {
        let found = tokens.values().find(|token| token.text == text).map(|token| token.id);
        let own = || model.pieces.iter().position(|piece| piece.text == text).map(|id| id as u32);
        if let Some(id) = found.or_else(own) {
            let token = SpecialToken { id, text, special: true, strip_left: false, strip_right: false };
            tokens.entry(id).or_insert(token).special = true;
        }
    }
}
