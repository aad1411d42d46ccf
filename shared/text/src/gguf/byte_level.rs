//! Byte-level BPE: the merges and, by name, how text is cut into words.

use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use super::pre_tokenizer::PreTokenizer;
use super::{CONTROL, GgufTokenizer, UNUSED, USER_DEFINED};
use crate::decoding::{Decoding, TextStart};
use crate::tokenizer::TokenizerParts;
use crate::vocabulary::{Vocabulary, VocabularyEntry, bytes_of_name};
use crate::{Result, TextError};

/// Builds it.
pub(super) fn parts(metadata: &GgufTokenizer) -> Result<TokenizerParts> {
    let pre = match metadata.pre.as_str() {
        "" => PreTokenizer::named("default")?,
        name => PreTokenizer::named(name)?,
    };
    if metadata.merges.is_empty() {
        return Err(TextError::invalid("tokenizer.ggml.merges", "it is empty; byte-level BPE needs merges"));
    }
    if metadata.add_space_prefix == Some(true) {
        return Err(TextError::invalid("tokenizer.ggml.add_space_prefix", "true is not supported with byte-level BPE"));
    }
    let mut library = tokenizers::Tokenizer::new(model(metadata, pre)?);
    library.with_pre_tokenizer(Some(pipeline(pre)?));
    library.with_decoder(Some(ByteLevel::new(false, true, false)));
    library.add_tokens(added_tokens(metadata)).map_err(|error| TextError::invalid("tokenizer.ggml.tokens", error))?;

    let special = metadata.special_ids();
    let around = |add: bool, id: Option<u32>| id.filter(|_| add).into_iter().collect();
    Ok(TokenizerParts {
        vocabulary: Vocabulary::new(entries(metadata))?,
        decoding: Decoding::Bytes(TextStart::Keep),
        prefix: around(metadata.add_bos_token.unwrap_or(pre.add_bos), special.bos),
        suffix: around(metadata.add_eos_token.unwrap_or(false), metadata.eos_id),
        special,
        engine: library.into(),
    })
}

/// The merge model. Every merge is checked here, since the library may panic on a bad one.
fn model(metadata: &GgufTokenizer, pre: &PreTokenizer) -> Result<BPE> {
    let mut vocabulary = tokenizers::models::bpe::Vocab::with_capacity(metadata.tokens.len());
    for (id, token) in metadata.tokens.iter().enumerate() {
        if let Some(first) = vocabulary.insert(token.clone(), id as u32) {
            return Err(TextError::invalid("tokenizer.ggml.tokens", format!("{token:?} is both token {first} and token {id}")));
        }
    }
    let mut merges = Vec::with_capacity(metadata.merges.len());
    for (rank, merge) in metadata.merges.iter().enumerate() {
        let bad = |reason: &str| TextError::invalid("tokenizer.ggml.merges", format!("merge {rank} {merge:?}: {reason}"));
        let (left, right) = merge
            .split_once(' ')
            .filter(|(left, right)| !left.is_empty() && !right.is_empty())
            .ok_or_else(|| bad("expected two tokens with a space between"))?;
        if !(vocabulary.contains_key(left) && vocabulary.contains_key(right) && vocabulary.contains_key(&[left, right].concat())) {
            return Err(bad("a part or the whole is not in tokenizer.ggml.tokens"));
        }
        merges.push((left.to_string(), right.to_string()));
    }
    BPE::builder()
        .vocab_and_merges(vocabulary, merges)
        .ignore_merges(pre.ignore_merges)
        .build()
        .map_err(|error| TextError::invalid("tokenizer.ggml.merges", error))
}

/// Tokens that are found in text before it is cut.
fn added_tokens(metadata: &GgufTokenizer) -> Vec<AddedToken> {
    (metadata.tokens.iter().enumerate())
        .filter(|(id, token)| matches!(metadata.token_type(*id), CONTROL | USER_DEFINED) && !token.is_empty())
        .map(|(id, token)| {
            AddedToken::from(token.clone(), metadata.token_type(id) == CONTROL).normalized(false).rstrip(metadata.strips_right(token))
        })
        .collect()
}

fn entries(metadata: &GgufTokenizer) -> Vec<VocabularyEntry> {
    (metadata.tokens.iter().enumerate())
        .map(|(id, token)| {
            let raw = || token.as_bytes().to_vec();
            VocabularyEntry {
                id: id as u32,
                name: token.clone(),
                bytes: match metadata.token_type(id) {
                    CONTROL | USER_DEFINED | UNUSED => raw(),
                    _ => bytes_of_name(token).unwrap_or_else(raw),
                },
                special: metadata.token_type(id) == CONTROL,
            }
        })
        .collect()
}

/// The cuts of a row, then bytes to their characters.
fn pipeline(pre: &PreTokenizer) -> Result<Sequence> {
    let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
    for pattern in pre.patterns {
        let split = Split::new(SplitPattern::Regex((*pattern).to_string()), SplitDelimiterBehavior::Isolated, false)
            .map_err(|error| TextError::invalid("tokenizer.ggml.pre", error))?;
        steps.push(split.into());
    }
    steps.push(ByteLevel::new(false, true, false).into());
    Ok(Sequence::new(steps))
}
