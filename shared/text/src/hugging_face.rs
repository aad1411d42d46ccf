//! Tokenizers from Hugging Face files: `tokenizer.json` and the small files around it.
//!
//! The library panics on some malformed files, so what it indexes is checked first
//! ([`check_model`]), and building runs behind an unwind guard: nothing is shared with it, so a
//! panic leaves nothing half-changed and becomes a typed error.

use std::collections::{BTreeMap, HashSet};
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::AddedToken;
use tokenizers::processors::PostProcessorWrapper;

use crate::decoding::DecoderPlan;
use crate::tokenizer::{SpecialIds, Tokenizer, TokenizerParts};
use crate::vocabulary::{Vocabulary, VocabularyEntry, check_size};
use crate::{Result, TextError};

/// Largest `tokenizer.json`; the largest published ones have some 35 MB.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;
/// Largest of the other files.
const MAX_SIDE_FILE_BYTES: u64 = 16 << 20;

/// The names under which chat templates and configurations know special tokens.
const SPECIAL_NAMES: &[&str] = &["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The files of a model's folder that concern text, as read.
#[derive(Clone, Debug, Default)]
pub struct HuggingFaceFiles {
    /// `tokenizer.json`.
    pub tokenizer_json: Vec<u8>,
    /// `tokenizer_config.json`.
    pub tokenizer_config: Option<Vec<u8>>,
    /// `special_tokens_map.json`.
    pub special_tokens_map: Option<Vec<u8>>,
    /// `generation_config.json`.
    pub generation_config: Option<Vec<u8>>,
    /// `config.json`.
    pub config: Option<Vec<u8>>,
    /// `chat_template.jinja`.
    pub chat_template_jinja: Option<Vec<u8>>,
    /// `chat_template.json`.
    pub chat_template_json: Option<Vec<u8>>,
}

impl HuggingFaceFiles {
    /// Reads those files of a folder that are there; `tokenizer.json` must be.
    ///
    /// # Errors
    /// [`TextError::Read`] for a file that is missing, unreadable or far too large.
    pub fn read(folder: &Path) -> Result<Self> {
        let side = |name: &str| read_file(&folder.join(name), MAX_SIDE_FILE_BYTES);
        let tokenizer_path = folder.join("tokenizer.json");
        let tokenizer_json = read_file(&tokenizer_path, MAX_TOKENIZER_BYTES)?;
        Ok(Self {
            tokenizer_json: tokenizer_json.ok_or_else(|| TextError::Read {
                path: tokenizer_path.display().to_string(),
                reason: "it is missing; a Hugging Face folder needs a tokenizer.json".to_string(),
            })?,
            tokenizer_config: side("tokenizer_config.json")?,
            special_tokens_map: side("special_tokens_map.json")?,
            generation_config: side("generation_config.json")?,
            config: side("config.json")?,
            chat_template_jinja: side("chat_template.jinja")?,
            chat_template_json: side("chat_template.json")?,
        })
    }
}

/// The bytes of a file, `None` where there is none.
fn read_file(path: &Path, limit_bytes: u64) -> Result<Option<Vec<u8>>> {
    let failed = |reason: String| TextError::Read { path: path.display().to_string(), reason };
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error.to_string())),
    };
    let mut bytes = Vec::new();
    file.take(limit_bytes + 1).read_to_end(&mut bytes).map_err(|error| failed(error.to_string()))?;
    if bytes.len() as u64 > limit_bytes {
        return Err(failed(format!("it has more than {limit_bytes} bytes")));
    }
    Ok(Some(bytes))
}

/// The small files, parsed.
#[derive(Debug, Default)]
pub(crate) struct SideFiles {
    pub(crate) tokenizer_config: Map<String, Value>,
    special_tokens_map: Map<String, Value>,
    generation_config: Map<String, Value>,
    config: Map<String, Value>,
}

impl SideFiles {
    pub(crate) fn parse(files: &HuggingFaceFiles) -> Result<Self> {
        let parse = |name: &str, bytes: &Option<Vec<u8>>| match bytes {
            Some(bytes) => parse_object(name, bytes),
            None => Ok(Map::new()),
        };
        Ok(Self {
            tokenizer_config: parse("tokenizer_config.json", &files.tokenizer_config)?,
            special_tokens_map: parse("special_tokens_map.json", &files.special_tokens_map)?,
            generation_config: parse("generation_config.json", &files.generation_config)?,
            config: parse("config.json", &files.config)?,
        })
    }

    /// The text of special tokens under the names that chat templates use.
    pub(crate) fn special_token_texts(&self) -> BTreeMap<String, String> {
        SPECIAL_NAMES
            .iter()
            .filter_map(|name| {
                let text = [&self.tokenizer_config, &self.special_tokens_map].into_iter().find_map(|file| token_text(file.get(*name)?))?;
                Some(((*name).to_string(), text.to_string()))
            })
            .collect()
    }

    /// The id or ids of a field that holds an id, a list of ids or null.
    fn ids(file: &Map<String, Value>, file_name: &str, field: &str) -> Result<Vec<u32>> {
        let one = |value: &Value| {
            value
                .as_u64()
                .and_then(|id| u32::try_from(id).ok())
                .ok_or_else(|| TextError::invalid(format!("{file_name}: {field}"), format!("{value} is not a token id")))
        };
        match file.get(field) {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(Value::Array(values)) => values.iter().map(one).collect(),
            Some(value) => Ok(vec![one(value)?]),
        }
    }

    /// Ids with a meaning: the tokenizer's own, then those of the generation's configuration;
    /// the model's configuration counts where neither says anything.
    fn special_ids(&self, library: &tokenizers::Tokenizer) -> Result<SpecialIds> {
        let texts = self.special_token_texts();
        let own = |name: &str| library.token_to_id(texts.get(name)?);
        let generation = |field| Self::ids(&self.generation_config, "generation_config.json", field);
        let model = |field| Self::ids(&self.config, "config.json", field);
        let mut eos: Vec<u32> = Vec::new();
        for id in own("eos_token").into_iter().chain(generation("eos_token_id")?) {
            if !eos.contains(&id) {
                eos.push(id);
            }
        }
        if eos.is_empty() {
            eos = model("eos_token_id")?;
        }
        let mut bos = own("bos_token");
        if bos.is_none() {
            bos = generation("bos_token_id")?.first().copied();
        }
        if bos.is_none() {
            bos = model("bos_token_id")?.first().copied();
        }
        Ok(SpecialIds { bos, eos, padding: own("pad_token"), unknown: own("unk_token") })
    }
}

/// A token given as its text or as an object with `content`.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// Parses a JSON object.
pub(crate) fn parse_object(name: &str, bytes: &[u8]) -> Result<Map<String, Value>> {
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(TextError::invalid(name, "expected a JSON object")),
        Err(error) => Err(TextError::invalid(name, error)),
    }
}

impl Tokenizer {
    /// Builds the tokenizer of a Hugging Face model.
    ///
    /// # Errors
    /// [`TextError::Invalid`] or [`TextError::Unsupported`], naming file and field.
    pub fn from_hugging_face(files: &HuggingFaceFiles) -> Result<Self> {
        let json = parse_object("tokenizer.json", &files.tokenizer_json)?;
        let side = SideFiles::parse(files)?;
        check_model(&json)?;
        let plan = DecoderPlan::of(json.get("decoder").unwrap_or(&Value::Null))?;
        let (library, entries) = guarded(|| {
            let mut library = build(&files.tokenizer_json)?;
            check_added_tokens(&json, &library)?;
            add_side_tokens(&side, &mut library)?;
            try_out(&library)?;
            let entries = entries(&library, &plan)?;
            Ok((library, entries))
        })?;
        let special = side.special_ids(&library)?;
        let mut parts = TokenizerParts {
            vocabulary: Vocabulary::new(entries)?,
            decoding: plan.decoding,
            prefix: Vec::new(),
            suffix: Vec::new(),
            special,
            library,
        };
        apply_flags(&side, &mut parts);
        Ok(Self::new(parts))
    }
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
    let vocabulary = match model.get("vocab") {
        Some(Value::Object(vocabulary)) => vocabulary,
        Some(Value::Array(pieces)) => return check_size(pieces.len()),
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
    for content in side.special_token_texts().into_values() {
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
fn apply_flags(side: &SideFiles, parts: &mut TokenizerParts) {
    let flag = |name: &str| side.tokenizer_config.get(name).and_then(Value::as_bool);
    let (bos, eos) = (flag("add_bos_token"), flag("add_eos_token"));
    if bos.is_none() && eos.is_none() {
        return;
    }
    let texts = side.special_token_texts();
    let id = |name: &str| parts.library.token_to_id(texts.get(name)?);
    let around = |wanted: Option<bool>, name: &str| -> Vec<u32> { id(name).filter(|_| wanted == Some(true)).into_iter().collect() };
    parts.prefix = around(bos, "bos_token");
    parts.suffix = around(eos, "eos_token");
    parts.library.with_post_processor(None::<PostProcessorWrapper>);
}
