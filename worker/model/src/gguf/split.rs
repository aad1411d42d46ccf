//! GGUF models split into several files: `NAME-00001-of-00003.gguf` and its siblings, opened together.
//!
//! Each part is a whole GGUF file with its own tensors; the first has the metadata of all. Any part may be given.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::reader::malformed;
use super::{GgufTensor, Metadata};
use crate::checkpoint::LoadMode;
use crate::error::{ModelError, Result};
use crate::source::{self, SharedBytes};

/// Metadata key: how many parts there are.
pub(super) const COUNT: &str = "split.count";
/// Metadata key: which part this is, from 0.
const NUMBER: &str = "split.no";
/// Metadata key: tensors in all parts together.
const TENSORS: &str = "split.tensors.count";
/// Digits of both numbers in a part's name.
const DIGITS: usize = 5;
/// More parts than any model has.
const MAX_PARTS: u32 = 4096;

/// The files that a part with this metadata belongs with, in order; `None` for a file that is whole.
///
/// # Errors
/// Errors of the file's own metadata; [`ModelError::NotAModel`] where its name does not tell the others', or one is missing.
pub(crate) fn parts(path: &Path, metadata: &Metadata) -> Result<Option<Vec<PathBuf>>> {
    let named = path.file_name().and_then(|name| name.to_str()).and_then(Part::of);
    let count = match metadata.optional_u32(COUNT)? {
        None | Some(0 | 1) => return Ok(None),
        Some(count) if count > MAX_PARTS => return Err(malformed(format!("{COUNT} is {count}; the most is {MAX_PARTS}"))),
        Some(count) => count,
    };
    let not_a_model = |reason: String| ModelError::NotAModel { path: path.to_owned(), reason };
    let part = named.filter(|part| part.count == count).ok_or_else(|| {
        not_a_model(format!(
            "it is one of {count} parts, and its name does not tell the others'; name them as they were: NAME-00001-of-{count:05}.gguf"
        ))
    })?;
    let siblings: Vec<PathBuf> = (1..=count).map(|number| path.with_file_name(part.sibling(number))).collect();
    match siblings.iter().find(|sibling| !sibling.is_file()) {
        Some(missing) => Err(not_a_model(format!("it is one of {count} parts, and {} is missing; download it too", missing.display()))),
        None => Ok(Some(siblings)),
    }
}

/// Opens all parts, hands their tensors to `add` and returns the metadata of the first.
///
/// # Errors
/// Parts that do not belong together.
pub(crate) fn open(
    parts: &[PathBuf],
    mode: LoadMode,
    mut add: impl FnMut(SharedBytes, BTreeMap<String, GgufTensor>) -> Result<()>,
) -> Result<Metadata> {
    let mut first = None;
    let mut tensors = 0;
    for (number, path) in parts.iter().enumerate() {
        let bytes = source::open(path, mode)?;
        let file = super::parse((*bytes).as_ref())?;
        let said = (file.metadata.optional_u32(NUMBER)?, file.metadata.optional_u32(COUNT)?);
        if said != (Some(number as u32), Some(parts.len() as u32)) {
            return Err(malformed(format!(
                "{} says that it is part {:?} of {:?} (from 0), its name says {number} of {}",
                path.display(),
                said.0,
                said.1,
                parts.len()
            )));
        }
        tensors += file.tensors.len();
        add(bytes, file.tensors)?;
        first.get_or_insert(file.metadata);
    }
    let metadata = first.ok_or_else(|| malformed("a model of no parts"))?;
    match metadata.optional_u32(TENSORS)? {
        Some(count) if count as usize != tensors => Err(malformed(format!("its parts have {tensors} tensors, {TENSORS} says {count}"))),
        _ if tensors == 0 => Err(malformed("its parts have no tensors")),
        _ => Ok(metadata),
    }
}

/// What the name of a part says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Part<'a> {
    prefix: &'a str,
    count: u32,
}

impl<'a> Part<'a> {
    /// `PREFIX-00002-of-00003.gguf`.
    pub(crate) fn of(name: &'a str) -> Option<Self> {
        let number = |text: &str| -> Option<u32> {
            (text.len() == DIGITS && text.bytes().all(|byte| byte.is_ascii_digit())).then(|| text.parse().ok()).flatten()
        };
        let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (prefix, own) = rest.rsplit_once('-')?;
        let (own, count) = (number(own)?, number(count)?);
        (1..=count).contains(&own).then_some(Part { prefix, count })
    }

    fn sibling(&self, number: u32) -> String {
        format!("{}-{number:05}-of-{:05}.gguf", self.prefix, self.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_parts_are_read_and_written() {
        let part = Part::of("a-b-00002-of-00003.gguf").unwrap();
        assert_eq!(part, Part { prefix: "a-b", count: 3 });
        assert_eq!(part.sibling(1), "a-b-00001-of-00003.gguf");
        for other in
            ["a.gguf", "a-00004-of-00003.gguf", "a-00000-of-00003.gguf", "a-2-of-3.gguf", "a-00001-of-0000x.gguf", "00001-of-00001.gguf"]
        {
            assert_eq!(Part::of(other), None, "{other}");
        }
    }
}
