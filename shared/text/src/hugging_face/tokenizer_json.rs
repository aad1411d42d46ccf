//! `tokenizer.json`, by the library that defines it.
//!
//! The library panics on some malformed files, so what it indexes is checked first
//! ([`check_model`]), and building runs behind an unwind guard: nothing is shared with it, so a
//! panic leaves nothing half-changed and becomes a typed error.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};

use serde_json::{Map, Value};
use tokenizers::AddedToken;
use tokenizers::processors::PostProcessorWrapper;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

use super::side_files::{SideFiles, parse_object, token_text};
use crate::decoding::DecoderPlan;
use crate::sentencepiece::charsmap::Charsmap;
use crate::sentencepiece::check_pieces;
use crate::tokenizer::TokenizerParts;
use crate::vocabulary::{Vocabulary, VocabularyEntry, check_size};
use crate::{Result, TextError};

/// Builds what the file describes.
pub(super) fn parts(bytes: &[u8], side: &SideFiles) -> Result<TokenizerParts> {
    let json = parse_object("tokenizer.json", bytes)?;
    check_model(&json)?;
    let plan = DecoderPlan::of(json.get("decoder").unwrap_or(&Value::Null))?;
    let (mut library, entries) = guarded(|| {
        let mut library = build(bytes)?;
        check_added_tokens(&json, &library)?;
        add_side_tokens(side, &mut library)?;
        try_out(&library)?;
        let entries = entries(&library, &plan)?;
        Ok((library, entries))
    })?;
    let special = side.special_ids(|name| library.token_to_id(name))?;
    let (prefix, suffix) = apply_flags(side, &mut library);
    Ok(TokenizerParts { vocabulary: Vocabulary::new(entries)?, decoding: plan.decoding, prefix, suffix, special, engine: library.into() })
}

/// Runs code of the library that may panic on malformed files.
fn guarded<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(TextError::invalid("tokenizer.json", "it is not consistent: the tokenizer library failed on it")))
}

/// Encodes once: a post-processor that names tokens it does not define panics only then, and one
/// with ids of its own would give ids that no model has a row for.
fn try_out(library: &tokenizers::Tokenizer) -> Result<()> {
    let encoding = library.encode_fast("Hello, wörld! 123 \n", true).map_err(|error| TextError::invalid("tokenizer.json", error))?;
    for &id in encoding.get_ids() {
        if library.id_to_token(id).is_none() {
            return Err(TextError::invalid(
                "tokenizer.json: post_processor",
                format!("it adds token {id}, which is not in the vocabulary"),
            ));
        }
    }
    Ok(())
}

/// Parses the file with the library. Truncation and padding are the caller's business here.
fn build(bytes: &[u8]) -> Result<tokenizers::Tokenizer> {
    let failed = |error: tokenizers::Error| TextError::invalid("tokenizer.json", error);
    let mut library = tokenizers::Tokenizer::from_bytes(bytes).map_err(failed)?;
    library.with_truncation(None).map_err(failed)?;
    library.with_padding(None);
    Ok(library)
}

/// Checks what the library takes for granted: sizes, and for BPE that merges are made of tokens.
fn check_model(json: &Map<String, Value>) -> Result<()> {
    let model = json.get("model").and_then(Value::as_object).ok_or_else(|| TextError::invalid("tokenizer.json: model", "it is missing"))?;
    let added = json.get("added_tokens").and_then(Value::as_array);
    for token in added.into_iter().flatten() {
        check_id("added_tokens", &token["id"])?;
    }
    check_charsmaps(json.get("normalizer").unwrap_or(&Value::Null))?;
    let vocabulary = match model.get("vocab") {
        Some(Value::Object(vocabulary)) => vocabulary,
        Some(Value::Array(pieces)) => {
            check_size(pieces.len())?;
            let texts = pieces.iter().filter_map(|piece| piece.get(0)?.as_str());
            return check_pieces(texts).map_err(|reason| TextError::invalid("tokenizer.json: model.vocab", reason));
        }
        _ => {
            return Err(TextError::invalid("tokenizer.json: model.vocab", "expected an object or a list of tokens"));
        }
    };
    check_size(vocabulary.len())?;
    for id in vocabulary.values() {
        check_id("model.vocab", id)?;
    }
    let Some(merges) = model.get("merges") else {
        return Ok(());
    };
    let prefix = model.get("continuing_subword_prefix").and_then(Value::as_str).unwrap_or("");
    let merges = merges.as_array().ok_or_else(|| TextError::invalid("tokenizer.json: model.merges", "expected a list of merges"))?;
    for (rank, merge) in merges.iter().enumerate() {
        check_merge(merge, prefix, vocabulary).ok_or_else(|| {
            TextError::invalid(
                "tokenizer.json: model.merges",
                format!("merge {rank} {merge}: expected two tokens of model.vocab that make a third"),
            )
        })?;
    }
    Ok(())
}

/// Checks the compiled replacement rules among the normalizers, which the library takes as they are.
fn check_charsmaps(normalizer: &Value) -> Result<()> {
    const FIELD: &str = "tokenizer.json: normalizer.precompiled_charsmap";
    for inner in normalizer.get("normalizers").and_then(Value::as_array).into_iter().flatten() {
        check_charsmaps(inner)?;
    }
    let Some(text) = normalizer.get("precompiled_charsmap").and_then(Value::as_str) else {
        return Ok(());
    };
    let bytes = BASE64_STANDARD.decode(text).map_err(|error| TextError::invalid(FIELD, format!("it is not base64: {error}")))?;
    Charsmap::new(&bytes, FIELD).map(drop)
}

/// `Some` for a merge of two tokens to a third.
fn check_merge(merge: &Value, prefix: &str, vocabulary: &Map<String, Value>) -> Option<()> {
    let (left, right) = match merge {
        Value::String(pair) => pair.split_once(' ')?,
        Value::Array(pair) => match pair.as_slice() {
            [left, right] => (left.as_str()?, right.as_str()?),
            _ => return None,
        },
        _ => return None,
    };
    let whole = [left, right.strip_prefix(prefix)?].concat();
    [left, right, &whole].iter().all(|token| vocabulary.contains_key(*token)).then_some(())
}

fn check_id(field: &str, id: &Value) -> Result<()> {
    match id.as_u64() {
        Some(id) => check_size((id as usize).saturating_add(1)),
        None => Err(TextError::invalid(format!("tokenizer.json: {field}"), format!("{id} is not a token id"))),
    }
}

/// The library numbers an added token anew where the file's id does not fit; then every later
/// id would be wrong, so that is an error.
fn check_added_tokens(json: &Map<String, Value>, library: &tokenizers::Tokenizer) -> Result<()> {
    let added = json.get("added_tokens").and_then(Value::as_array);
    for token in added.into_iter().flatten() {
        let content = token["content"].as_str().unwrap_or_default();
        let (given, found) = (token["id"].as_u64(), library.token_to_id(content));
        if !content.is_empty() && given != found.map(u64::from) {
            return Err(TextError::invalid(
                "tokenizer.json: added_tokens",
                format!("{content:?} has id {given:?} but its place in the vocabulary is {found:?}"),
            ));
        }
    }
    Ok(())
}

/// Tokens that only `tokenizer_config.json` declares, and those that it names as special ones.
/// A token that the vocabulary does not have is left out: no model has a row for it.
fn add_side_tokens(side: &SideFiles, library: &mut tokenizers::Tokenizer) -> Result<()> {
    let present: HashSet<String> = library.get_added_tokens_decoder().into_values().map(|token| token.content).collect();
    let mut tokens = Vec::new();
    let declared = side.tokenizer_config.get("added_tokens_decoder");
    let mut declared: Vec<(u64, &Value)> =
        (declared.and_then(Value::as_object).into_iter()).flatten().filter_map(|(id, token)| Some((id.parse().ok()?, token))).collect();
    declared.sort_by_key(|(id, _)| *id);
    for (id, token) in declared {
        let Some(content) = token_text(token).filter(|content| !present.contains(*content)) else {
            continue;
        };
        let flag = |name: &str| token[name].as_bool().unwrap_or(false);
        let added = AddedToken::from(content, flag("special"))
            .single_word(flag("single_word"))
            .lstrip(flag("lstrip"))
            .rstrip(flag("rstrip"))
            .normalized(flag("normalized"));
        let next = library.get_vocab_size(true) + tokens.len();
        let found = library.token_to_id(content).map_or(next as u64, u64::from);
        if found != id {
            return Err(TextError::invalid(
                "tokenizer_config.json: added_tokens_decoder",
                format!("{content:?} has id {id} but its place in the vocabulary is {found}"),
            ));
        }
        tokens.push(added);
    }
    for content in side.all_special_texts() {
        let known = library.token_to_id(&content).is_some();
        if known && !present.contains(&content) {
            tokens.push(AddedToken::from(content, true).normalized(false));
        }
    }
    library.add_tokens(tokens).map_err(|error| TextError::invalid("tokenizer_config.json", error))?;
    Ok(())
}

fn entries(library: &tokenizers::Tokenizer, plan: &DecoderPlan) -> Result<Vec<VocabularyEntry>> {
    let added = library.get_added_tokens_decoder();
    library
        .get_vocab(true)
        .into_iter()
        .map(|(name, id)| {
            let added = added.get(&id);
            let bytes = match plan.bytes(&name, added.is_some()) {
                Some(bytes) => bytes,
                None => library.decode(&[id], false).map_err(|error| TextError::invalid("tokenizer.json: decoder", error))?.into_bytes(),
            };
            Ok(VocabularyEntry { id, bytes, special: added.is_some_and(|token| token.special), name })
        })
        .collect()
}

/// `add_bos_token` and `add_eos_token` replace the post-processor where either is given.
fn apply_flags(side: &SideFiles, library: &mut tokenizers::Tokenizer) -> (Vec<u32>, Vec<u32>) {
    let Some((bos, eos)) = side.add_flags() else {
        return (Vec::new(), Vec::new());
    };
    let texts = side.special_token_texts();
    let id = |name: &str| library.token_to_id(texts.get(name)?);
    let around = |wanted: bool, name: &str| -> Vec<u32> { id(name).filter(|_| wanted).into_iter().collect() };
    let result = (around(bos, "bos_token"), around(eos, "eos_token"));
    library.with_post_processor(None::<PostProcessorWrapper>);
    result
}
