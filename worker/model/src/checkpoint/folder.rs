//! Hugging Face checkpoints: config.json and the files with the weights beside it.
//!
//! A file of weights is recognized by its content, whatever its name: safetensors, or what torch.save writes.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::foreign::{self, Kind, first_bytes, kind};
use super::quantized::{self, Fp8};
use super::{Checkpoint, Directory, LoadMode, RawConfig, mxfp4};
use crate::arch::detect;
use crate::arch::families::{Family, Ignored};
use crate::error::{ModelError, Result};
use crate::gguf::split::Part;
use crate::source::{self, SharedBytes};
use crate::{safetensors, torch};

const CONFIG: &str = "config.json";
/// Names by which a folder's weights are found, the preferred first: alone, and the index of several.
const NAMES: [(&str, &str); 2] =
    [("model.safetensors", "model.safetensors.index.json"), ("pytorch_model.bin", "pytorch_model.bin.index.json")];

/// The files to read, and what an index says of them.
struct WeightFiles {
    names: Vec<String>,
    /// The index's name, and the file of each tensor.
    index: Option<(&'static str, BTreeMap<String, String>)>,
}

/// The folder a file lies in.
pub(super) fn parent(file: &Path) -> &Path {
    match file.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// Opens a folder that has config.json.
pub(super) fn open_folder(path: &Path, mode: LoadMode, family: Option<&'static Family>) -> Result<Checkpoint> {
    let (config, generation) = read_config(path)?;
    let fp8 = quantized::scheme(&config)?;
    // Buffers that some exporters save have types no decoder needs (boolean masks); the family knows them.
    let ignored = Ignored::new(family, &config);
    let files = weight_files(path)?;
    let mut directory = Directory::default();
    for name in &files.names {
        add_file(&mut directory, &path.join(name), mode, &ignored)?;
    }
    if let Some((index, map)) = &files.index {
        check_index(index, map, &files.names, &directory, &ignored)?;
    }
    finish(path, config, generation, directory, fp8)
}

/// Every tensor is in the file that the index says.
fn check_index(index: &str, map: &BTreeMap<String, String>, names: &[String], directory: &Directory, ignored: &Ignored) -> Result<()> {
    for (tensor, file) in map.iter().filter(|(tensor, _)| !ignored.has(tensor)) {
        let found = directory.file_of(tensor).map(|source| &names[source]);
        if found != Some(file) {
            let found = found.map_or_else(|| "is not".to_owned(), |other| format!("is in {other}"));
            let reason = format!("weight_map: tensor {tensor:?} should be in {file} and {found}");
            return Err(ModelError::Malformed { format: index.to_owned(), reason });
        }
    }
    Ok(())
}

/// Opens one file of weights with config.json beside it, whatever else is there.
pub(super) fn open_file(path: &Path, mode: LoadMode, family: Option<&'static Family>) -> Result<Checkpoint> {
    let folder = parent(path);
    let mut directory = Directory::default();
    if !folder.join(CONFIG).is_file() {
        add_file(&mut directory, path, mode, &Ignored::new(family, &serde_json::Value::Null))?;
        return Err(ModelError::NotAModel { path: path.to_owned(), reason: without_config(&directory) });
    }
    let (config, generation) = read_config(folder)?;
    let fp8 = quantized::scheme(&config)?;
    add_file(&mut directory, path, mode, &Ignored::new(family, &config))?;
    finish(path, config, generation, directory, fp8)
}

/// What a file of weights without configuration may be, and what to add.
fn without_config(directory: &Directory) -> String {
    format!(
        "it holds {} tensors and no configuration; put the model's config.json beside it, and its tokenizer.json. By the names of its \
         tensors it is like: {}",
        directory.tensors.len(),
        detect::nearest(&directory.tensors)
    )
}

fn read_config(folder: &Path) -> Result<(serde_json::Value, Option<serde_json::Value>)> {
    let config = source::read_json(&folder.join(CONFIG))?;
    let generation = folder.join("generation_config.json");
    let generation = if generation.is_file() { Some(source::read_json(&generation)?) } else { None };
    Ok((config, generation))
}

fn finish(
    path: &Path,
    config: serde_json::Value,
    generation: Option<serde_json::Value>,
    mut directory: Directory,
    fp8: Option<Fp8>,
) -> Result<Checkpoint> {
    directory.packed = mxfp4::join(std::mem::take(&mut directory.packed), &mut directory.tensors)?;
    let sources: &[SharedBytes] = &directory.sources;
    let bytes = |entry: &super::TensorEntry| &(*sources[entry.source]).as_ref()[entry.bytes.clone()];
    directory.scales = quantized::take_scales(path, &mut directory.tensors, bytes, fp8.unwrap_or_default())?;
    Ok(Checkpoint::new(path, RawConfig::HuggingFace { config, generation }, directory))
}

/// Adds the tensors of a file, told by its content.
fn add_file(directory: &mut Directory, path: &Path, mode: LoadMode, ignored: &Ignored) -> Result<()> {
    let name = path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned());
    let packed = RefCell::new(None);
    let wanted = |tensor: &str| {
        if let Some(scheme) = quantized::packed(tensor) {
            packed.borrow_mut().get_or_insert(scheme);
            return false;
        }
        !ignored.has(tensor)
    };
    let start = first_bytes(path)?;
    let added = match kind(&start) {
        Kind::Zip => {
            let bytes = source::open(path, mode)?;
            let found = torch::parse((*bytes).as_ref(), wanted).map_err(|error| in_file(&name, error))?;
            directory.add(bytes, found.into_iter().map(|(name, tensor)| (name, Some(tensor.dtype), tensor.shape, tensor.bytes)))
        }
        // A damaged header is safetensors' own to describe.
        Kind::Other if !name.ends_with(".safetensors") || start.is_empty() => {
            return Err(ModelError::NotAModel { path: path.to_owned(), reason: foreign::describe(&start) });
        }
        Kind::Gguf => {
            let reason = "it is a GGUF file where safetensors are expected; give the file itself".to_owned();
            return Err(ModelError::NotAModel { path: path.to_owned(), reason });
        }
        Kind::Safetensors | Kind::Other => {
            let bytes = source::open(path, mode)?;
            let found = safetensors::parse_header((*bytes).as_ref(), wanted).map_err(|error| in_file(&name, error))?;
            directory.add(bytes, found.into_iter().map(|(name, tensor)| (name, tensor.dtype, tensor.shape, tensor.bytes)))
        }
    };
    match packed.into_inner() {
        Some(scheme) => Err(scheme),
        None => added,
    }
}

/// Puts the file's name into a format error.
fn in_file(name: &str, error: ModelError) -> ModelError {
    match error {
        ModelError::Malformed { format, reason } => ModelError::Malformed { format: format!("{format} {name}"), reason },
        ModelError::ForeignCode { format, name: global, offset } => {
            ModelError::ForeignCode { format: format!("{format} {name}"), name: global, offset }
        }
        other => other,
    }
}

fn file_names(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(source::io_error(folder))? {
        let entry = entry.map_err(source::io_error(folder))?;
        if let Ok(name) = entry.file_name().into_string()
            && entry.path().is_file()
        {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// The one GGUF model of a folder without config.json: a file, or the first part of a split one.
pub(super) fn only_gguf_in(folder: &Path) -> Result<PathBuf> {
    let mut found = Vec::new();
    let mut foreign = Vec::new();
    for name in file_names(folder)? {
        let path = folder.join(&name);
        let start = first_bytes(&path)?;
        match kind(&start) {
            Kind::Gguf => found.push(name),
            Kind::Safetensors | Kind::Zip => foreign.push(name),
            Kind::Other => {}
        }
    }
    let split = found.first().and_then(|name| Part::of(name));
    let reason = match found.len() {
        1 => return Ok(folder.join(found.remove(0))),
        0 if foreign.is_empty() => "the folder has neither config.json nor a GGUF file".to_owned(),
        0 => {
            let mut directory = Directory::default();
            let ignored = Ignored::new(None, &serde_json::Value::Null);
            let read = foreign.iter().try_for_each(|name| add_file(&mut directory, &folder.join(name), LoadMode::Mmap, &ignored));
            match read {
                Ok(()) => format!("{}: {}", foreign.join(", "), without_config(&directory)),
                Err(_) => format!("{} has weights, but config.json is missing; download it too", foreign[0]),
            }
        }
        _ if split.is_some() && found.iter().all(|name| Part::of(name) == split) => return Ok(folder.join(found.remove(0))),
        count => format!("the folder has {count} GGUF files and no config.json; give one of the files"),
    };
    Err(ModelError::NotAModel { path: folder.to_owned(), reason })
}

/// The files with the weights of a folder: by their usual names, by an index, or the only one that is safetensors.
fn weight_files(folder: &Path) -> Result<WeightFiles> {
    let alone = |name: String| WeightFiles { names: vec![name], index: None };
    let names = file_names(folder)?;
    let mut safetensors: Vec<&String> = names.iter().filter(|name| name.ends_with(".safetensors")).collect();
    for (place, (single, index)) in NAMES.into_iter().enumerate() {
        if names.iter().any(|name| name == single) {
            return Ok(alone(single.to_owned()));
        }
        if names.iter().any(|name| name == index) {
            return indexed_files(folder, index);
        }
        // Safetensors of any name go before pickles of the usual one.
        match safetensors.len() {
            0 => {}
            1 if place == 0 => return Ok(alone(safetensors.remove(0).clone())),
            count if place == 0 => {
                let reason = format!("the folder has {count} safetensors files but neither {single} nor {index}; download the index");
                return Err(ModelError::NotAModel { path: folder.to_owned(), reason });
            }
            _ => {}
        }
    }
    Err(ModelError::NotAModel { path: folder.to_owned(), reason: no_weights(folder, &names)? })
}

/// Why a folder with config.json has no weights that can be read: by the largest file that is something else.
fn no_weights(folder: &Path, names: &[String]) -> Result<String> {
    const BESIDE: [&str; 8] = [".json", ".txt", ".md", ".model", ".jinja", ".py", ".jsonl", ".gitattributes"];
    let others = names.iter().filter(|name| !BESIDE.iter().any(|ending| name.ends_with(ending)));
    let size = |name: &&String| folder.join(name).metadata().map_or(0, |metadata| metadata.len());
    let Some(largest) = others.max_by_key(size) else {
        return Ok("the folder has config.json but no weights; download it again with its safetensors".to_owned());
    };
    let start = first_bytes(&folder.join(largest))?;
    Ok(match kind(&start) {
        Kind::Gguf => format!("its weights are in the GGUF file {largest}; give that file"),
        Kind::Zip => format!("{largest} may hold its weights; give that file, or name it pytorch_model.bin"),
        _ => format!("the folder has config.json but no weights that can be read. {largest}: {}", foreign::describe(&start)),
    })
}

fn indexed_files(folder: &Path, index: &'static str) -> Result<WeightFiles> {
    let map = weight_map(&source::read_json(&folder.join(index))?).map_err(|error| match error {
        ModelError::Malformed { reason, .. } => ModelError::Malformed { format: index.to_owned(), reason },
        other => other,
    })?;
    let names: BTreeSet<&String> = map.values().collect();
    if let Some(missing) = names.iter().find(|name| !folder.join(name).is_file()) {
        let reason = format!("{missing}, which {index} names, is missing; download it too");
        return Err(ModelError::NotAModel { path: folder.to_owned(), reason });
    }
    Ok(WeightFiles { names: names.into_iter().cloned().collect(), index: Some((index, map)) })
}

/// The file of each tensor by an index (`model.safetensors.index.json`): plain names of files beside it.
///
/// # Errors
/// [`ModelError::Malformed`] where it has no such map, or names files elsewhere.
pub fn weight_map(index: &serde_json::Value) -> Result<BTreeMap<String, String>> {
    let wrong = |reason: String| ModelError::Malformed { format: "index of the weights".to_owned(), reason: format!("weight_map{reason}") };
    let map = index.get("weight_map").and_then(serde_json::Value::as_object).ok_or_else(|| wrong(" is missing or no object".to_owned()))?;
    let mut files = BTreeMap::new();
    for (tensor, file) in map {
        let name = file.as_str().ok_or_else(|| wrong(format!(": the file of {tensor:?} is no string")))?;
        let plain = Path::new(name).file_name().is_some_and(|plain| plain == name) && !name.contains(['/', '\\', '\0', ':']);
        if !plain {
            return Err(wrong(format!(": {name:?} is no plain file name")));
        }
        files.insert(tensor.clone(), name.to_owned());
    }
    if files.is_empty() {
        return Err(wrong(" is empty".to_owned()));
    }
    Ok(files)
}
