//! The Hugging Face hub, or a mirror with the same interface: which files of a repository make a
//! model, at which commit, with which digests.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;
use url::Url;

use crate::digest::Digest;
use crate::download::RemoteFile;
use crate::error::{Result, StoreError};
use crate::gguf_choice::choose_gguf;
use crate::http::{Authorization, Get, HttpClient, host_of};
use crate::names::check_relative_path;
use crate::options::PullOptions;
use crate::source::{HubSource, check_scheme};

const MAX_LISTING_BYTES: u64 = 32 << 20;
const MAX_INDEX_BYTES: u64 = 64 << 20;
pub(crate) const SHARD_INDEX: &str = "model.safetensors.index.json";
/// The same beside PyTorch files, which the loader reads without executing what they hold.
const TORCH_INDEX: &str = "pytorch_model.bin.index.json";
const TORCH_WHOLE: &str = "pytorch_model.bin";

/// Files beside the weights that a loader may read.
const COMPANIONS: [&str; 9] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
];

/// Everything needed to fetch one model from the hub.
pub(crate) struct HubPlan {
    /// The source with its commit.
    pub(crate) source: HubSource,
    /// File name within the model, and where its bytes are.
    pub(crate) files: Vec<(String, RemoteFile)>,
    pub(crate) licence: Option<String>,
    pub(crate) note: Option<String>,
}

#[derive(Deserialize)]
struct Listing {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
    #[serde(default)]
    tags: Vec<String>,
}

/// One file of a repository as the hub lists it.
#[derive(Debug, Clone, Deserialize)]
struct Sibling {
    rfilename: String,
    #[serde(default)]
    size: Option<u64>,
    #[serde(default)]
    lfs: Option<Lfs>,
}

#[derive(Debug, Clone, Deserialize)]
struct Lfs {
    sha256: Digest,
    #[serde(default)]
    size: Option<u64>,
}

/// The hub as one pull sees it.
pub(crate) struct HubClient<'a> {
    http: &'a HttpClient,
    endpoint: Url,
    authorization: Option<Authorization>,
}

impl<'a> HubClient<'a> {
    pub(crate) fn new(http: &'a HttpClient, options: &PullOptions) -> Result<Self> {
        let wrong = |reason: String| StoreError::Setting { name: "HF_ENDPOINT".into(), reason };
        let mut endpoint =
            Url::parse(options.hub_endpoint.trim_end_matches('/')).map_err(|error| wrong(format!("is not a URL ({error})")))?;
        check_scheme(&endpoint).map_err(wrong)?;
        let own = Authorization::take_from(&mut endpoint);
        let token = options.hub_token.as_ref().map(|token| Authorization::bearer(&endpoint, token));
        Ok(Self { http, endpoint, authorization: own.or(token) })
    }

    /// Asks for the repository's files and picks those that make a model.
    pub(crate) fn plan(&self, source: &HubSource) -> Result<HubPlan> {
        let listing = self.list(source)?;
        let commit = &listing.sha;
        let chosen = match choose(&listing.siblings, source.filter.as_deref()) {
            Ok(chosen) => chosen,
            Err(reason) => return Err(StoreError::NoUsableWeights { place: source.repo.clone(), reason }),
        };
        let chosen = match chosen.index {
            Some(index) => self.resolve_shards(source, commit, &listing.siblings, chosen, index)?,
            None => chosen,
        };
        let mut files = Vec::new();
        for sibling in chosen.files {
            let path = &sibling.rfilename;
            check_relative_path(path).map_err(|reason| self.bad(format!("file '{path}' {reason}")))?;
            let name = if chosen.flatten { base_name(path) } else { path };
            files.push((name.to_owned(), self.remote_file(source, commit, sibling)?));
        }
        let licence = listing.tags.iter().find_map(|tag| tag.strip_prefix("license:")).map(Into::into);
        let source = HubSource { revision: Some(commit.clone()), ..source.clone() };
        Ok(HubPlan { source, files, licence, note: chosen.note })
    }

    fn list(&self, source: &HubSource) -> Result<Listing> {
        let revision = source.revision.as_deref().unwrap_or("main");
        let mut url = self.url(&["api", "models"], &source.repo, &["revision", revision])?;
        url.set_query(Some("blobs=true"));
        let what = format!("the file list of {}", source.repo);
        let get = Get { authorization: self.authorization.as_ref(), ..Get::new(&url, &what) };
        let (answer, bytes) = self.http.fetch_document(&get, MAX_LISTING_BYTES)?;
        let listing: Listing = serde_json::from_slice(&bytes).map_err(|error| StoreError::BadAnswer {
            host: answer.host,
            reason: format!("{what} is not what the hub's interface promises ({error})"),
        })?;
        let is_commit = listing.sha.len() == 40 && listing.sha.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !is_commit {
            return Err(self.bad(format!("'{}' is no commit", listing.sha.escape_debug())));
        }
        Ok(listing)
    }

    /// Replaces "every shard-like file" by the files the shard index names.
    fn resolve_shards<'s>(
        &self,
        source: &HubSource,
        commit: &str,
        siblings: &'s [Sibling],
        mut chosen: Chosen<'s>,
        index_name: &str,
    ) -> Result<Chosen<'s>> {
        #[derive(Deserialize)]
        struct ShardIndex {
            weight_map: BTreeMap<String, String>,
        }
        let url = self.file_url(&source.repo, commit, index_name)?;
        let get = Get { authorization: self.authorization.as_ref(), ..Get::new(&url, index_name) };
        let (_, bytes) = self.http.fetch_document(&get, MAX_INDEX_BYTES)?;
        let index: ShardIndex =
            serde_json::from_slice(&bytes).map_err(|error| self.bad(format!("{index_name} cannot be read ({error})")))?;
        let shards: BTreeSet<&str> = index.weight_map.values().map(String::as_str).collect();
        for shard in shards {
            let file = siblings
                .iter()
                .find(|file| file.rfilename == shard)
                .ok_or_else(|| self.bad(format!("{index_name} names '{}', which is not there", shard.escape_debug())))?;
            chosen.files.push(file);
        }
        Ok(chosen)
    }

    fn remote_file(&self, source: &HubSource, commit: &str, sibling: &Sibling) -> Result<RemoteFile> {
        Ok(RemoteFile {
            url: self.file_url(&source.repo, commit, &sibling.rfilename)?,
            name: base_name(&sibling.rfilename).to_owned(),
            authorization: self.authorization.clone(),
            sha256: sibling.lfs.as_ref().map(|lfs| lfs.sha256),
            size_bytes: sibling.lfs.as_ref().and_then(|lfs| lfs.size).or(sibling.size),
        })
    }

    fn file_url(&self, repo: &str, commit: &str, path: &str) -> Result<Url> {
        let mut tail = vec!["resolve", commit];
        tail.extend(path.split('/'));
        self.url(&[], repo, &tail)
    }

    /// `endpoint/head/repo/tail`, every part escaped.
    fn url(&self, head: &[&str], repo: &str, tail: &[&str]) -> Result<Url> {
        let mut url = self.endpoint.clone();
        url.path_segments_mut()
            .map_err(|()| StoreError::Setting { name: "HF_ENDPOINT".into(), reason: "cannot be the start of an address".into() })?
            .pop_if_empty()
            .extend(head)
            .extend(repo.split('/'))
            .extend(tail);
        Ok(url)
    }

    fn bad(&self, reason: String) -> StoreError {
        StoreError::BadAnswer { host: host_of(&self.endpoint), reason }
    }
}

/// The files of a repository that make a model.
#[derive(Debug)]
struct Chosen<'a> {
    files: Vec<&'a Sibling>,
    /// The shards are still to be added, as this index among the files names them.
    index: Option<&'static str>,
    /// A single file, known by its base name.
    flatten: bool,
    note: Option<String>,
}

/// Without a filter safetensors with a config are preferred to GGUF, and GGUF to PyTorch files. A filter always means a
/// GGUF.
fn choose<'a>(siblings: &'a [Sibling], filter: Option<&str>) -> Result<Chosen<'a>, String> {
    let find = |name: &str| siblings.iter().find(|file| file.rfilename == name);
    let has_config = find("config.json").is_some();
    let safetensors: Vec<&Sibling> =
        siblings.iter().filter(|file| file.rfilename.ends_with(".safetensors") && !file.rfilename.contains('/')).collect();
    let names: Vec<&str> = siblings.iter().map(|file| file.rfilename.as_str()).collect();
    let has_gguf = names.iter().any(|name| name.to_ascii_lowercase().ends_with(".gguf"));
    let folder = |weights: Weights<'a>| {
        let mut files: Vec<&Sibling> = siblings.iter().filter(|file| is_companion(&file.rfilename)).collect();
        let (file, index) = match weights {
            Weights::Whole(file) => (Some(file), None),
            Weights::Sharded(index) => (find(index), Some(index)),
        };
        files.extend(file);
        Chosen { files, index, flatten: false, note: None }
    };
    if filter.is_none() && has_config && !safetensors.is_empty() {
        // Some repositories hold the same weights once more under another name.
        return match (find(SHARD_INDEX), find("model.safetensors"), &safetensors[..]) {
            (Some(_), _, _) => Ok(folder(Weights::Sharded(SHARD_INDEX))),
            (None, Some(whole), _) => Ok(folder(Weights::Whole(whole))),
            (None, None, [one]) => Ok(folder(Weights::Whole(one))),
            (None, None, _) => Err(format!("there are several safetensors files and no {SHARD_INDEX}")),
        };
    }
    if filter.is_none() && has_config && !has_gguf {
        if find(TORCH_INDEX).is_some() {
            return Ok(folder(Weights::Sharded(TORCH_INDEX)));
        }
        if let Some(whole) = find(TORCH_WHOLE) {
            return Ok(folder(Weights::Whole(whole)));
        }
    }
    if !has_gguf {
        return Err(if safetensors.is_empty() {
            format!("it holds neither safetensors, GGUF nor {TORCH_WHOLE} files, which are what can be loaded")
        } else if filter.is_some() {
            "it holds no GGUF file to choose from; leave the part after the colon out".into()
        } else {
            "it has safetensors but no config.json; if this is an adapter, name its base model".into()
        });
    }
    let choice = choose_gguf(&names, filter)?;
    Ok(Chosen { files: vec![&siblings[choice.index]], index: None, flatten: true, note: choice.note })
}

/// Weights of a repository in Hugging Face layout.
enum Weights<'a> {
    Whole(&'a Sibling),
    /// As this index names them.
    Sharded(&'static str),
}

fn is_companion(name: &str) -> bool {
    let template = name.starts_with("chat_template") && (name.ends_with(".json") || name.ends_with(".jinja"));
    !name.contains('/') && (template || COMPANIONS.contains(&name))
}

fn base_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn siblings(names: &[&str]) -> Vec<Sibling> {
        names.iter().map(|name| Sibling { rfilename: (*name).into(), size: None, lfs: None }).collect()
    }

    fn chosen(names: &[&str], filter: Option<&str>) -> Result<Vec<String>, String> {
        choose(&siblings(names), filter).map(|chosen| chosen.files.iter().map(|file| file.rfilename.clone()).collect())
    }

    #[test]
    fn only_the_files_needed_are_chosen() {
        let names = [
            ".gitattributes",
            "README.md",
            "config.json",
            "model.safetensors",
            "consolidated.safetensors",
            "pytorch_model.bin",
            "tokenizer.json",
            "chat_template.jinja",
            "onnx/model.onnx",
            "original/config.json",
        ];
        let expected = ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"];
        assert_eq!(chosen(&names, None).unwrap(), expected);
        let list = siblings(&["config.json", "model-00001-of-00002.safetensors", SHARD_INDEX]);
        assert_eq!(choose(&list, None).unwrap().index, Some(SHARD_INDEX));
        assert_eq!(chosen(&["config.json", SHARD_INDEX, "a.safetensors"], None).unwrap(), ["config.json", SHARD_INDEX]);
    }

    #[test]
    fn pytorch_files_are_the_last_choice() {
        let whole = ["config.json", "pytorch_model.bin", "training_args.bin"];
        assert_eq!(chosen(&whole, None).unwrap(), ["config.json", "pytorch_model.bin"]);
        let shards = ["config.json", "pytorch_model-00001-of-00002.bin", TORCH_INDEX];
        assert_eq!(chosen(&shards, None).unwrap(), ["config.json", TORCH_INDEX]);
        assert_eq!(choose(&siblings(&shards), None).unwrap().index, Some(TORCH_INDEX));
        assert_eq!(chosen(&["config.json", "pytorch_model.bin", "m.Q4_1.gguf"], None).unwrap(), ["m.Q4_1.gguf"]);
    }

    #[test]
    fn a_filter_or_a_repository_without_config_means_gguf() {
        let names = ["config.json", "model.safetensors", "m.Q4_1.gguf", "m.Q8_0.gguf"];
        assert_eq!(chosen(&names, Some("Q4_1")).unwrap(), ["m.Q4_1.gguf"]);
        assert_eq!(chosen(&names[2..], None).unwrap(), ["m.Q8_0.gguf"]);
    }

    #[test]
    fn a_repository_without_weights_is_refused_with_the_reason() {
        let cases: [(&[&str], Option<&str>, &str); 5] = [
            (&["config.json", "tf_model.h5"], None, "neither safetensors"),
            (&["pytorch_model.bin"], None, "neither safetensors"),
            (&["adapter_model.safetensors"], None, "no config.json"),
            (&["config.json", "a.safetensors", "b.safetensors"], None, "several"),
            (&["config.json", "model.safetensors"], Some("Q4_0"), "no GGUF"),
        ];
        for (names, filter, expected) in cases {
            let reason = chosen(names, filter).unwrap_err();
            assert!(reason.contains(expected), "{reason}");
        }
    }
}
