//! The entry points that are fuzzed, and a small mutator that drives them without a fuzzer.
//!
//! `fuzz/fuzz_targets` calls the same functions under libFuzzer; `fuzz_smoke.rs` calls them on seeds and on
//! mutations that depend on nothing but a number, so that a failure is found again.

use std::collections::BTreeMap;

use forge_cluster::config::{ContextFile, CoordinatorConfig, GatewayFile, WorkerConfig};
use forge_gateway::cluster::Directory;
use forge_gateway::request::{parse_chat_request, parse_completion_request};
use forge_gateway::{GatewayConfig, RequestLimits};
use forge_model::GgufTokenizerData;
use forge_shared::config::{Format, Layers, ProcessConfig, ProcessLayers, parse_document};
use forge_text::{ChatRender, ChatTemplate, HuggingFaceFiles, ModelText, TemplateLimits, Tokenizer};

/// A GGUF file: must be taken or refused, and what is taken must lie within the file.
pub fn gguf(bytes: &[u8]) {
    if let Ok(file) = forge_model::gguf::parse(bytes) {
        assert!(file.tensors.values().all(|tensor| tensor.bytes.end <= bytes.len()), "a tensor lies outside the file");
    }
}

/// The header of a safetensors file: as [`gguf`].
pub fn safetensors(bytes: &[u8]) {
    if let Ok(tensors) = forge_model::safetensors::parse_header(bytes, |_| true) {
        assert!(tensors.values().all(|tensor| tensor.bytes.end <= bytes.len()), "a tensor lies outside the file");
    }
}

/// A file that torch.save wrote: as [`gguf`].
pub fn torch(bytes: &[u8]) {
    if let Ok(tensors) = forge_model::torch::parse(bytes, |_| true) {
        assert!(tensors.values().all(|tensor| tensor.bytes.end <= bytes.len()), "a tensor lies outside the file");
    }
}

/// A config.json: must become an architecture or be refused.
pub fn config(bytes: &[u8]) {
    if let Ok(config) = serde_json::from_slice(bytes) {
        drop(forge_model::arch::hf::from_config_json(&config));
    }
}

/// An index of sharded weights: every file that it names must be one beside it.
pub fn weight_index(bytes: &[u8]) {
    let Ok(index) = serde_json::from_slice(bytes) else { return };
    for file in forge_model::checkpoint::weight_map(&index).into_iter().flat_map(std::collections::BTreeMap::into_values) {
        assert_eq!(std::path::Path::new("folder").join(&file).parent(), Some(std::path::Path::new("folder")), "{file}");
    }
}

/// A request that a gateway submits: must be taken or refused, and what is taken must come back the same.
pub fn submit_request(bytes: &[u8]) {
    drop(forge_cluster::engine::fuzz::submit_request(bytes));
}

/// Events that a worker answers with: as [`submit_request`].
pub fn engine_reply(bytes: &[u8]) {
    drop(forge_cluster::engine::fuzz::engine_reply(bytes));
}

/// What a worker says of a replica: as [`submit_request`].
pub fn replica_update(bytes: &[u8]) {
    drop(forge_cluster::engine::fuzz::replica_update(bytes));
}

/// A join token as an operator pastes it: must be read or refused, and what is read must print the same.
pub fn join_token(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(token) = forge_cluster::tls::JoinTokenText::parse(text) {
        assert_eq!(forge_cluster::tls::JoinTokenText::parse(&token.to_text()), Ok(token));
    }
}

/// A SentencePiece model file: must be taken or refused, and what is taken must encode and decode.
pub fn sentencepiece(bytes: &[u8]) {
    let files = HuggingFaceFiles { tokenizer_model: Some(bytes.to_vec()), ..HuggingFaceFiles::default() };
    if let Ok(tokenizer) = Tokenizer::from_hugging_face(&files) {
        use_tokenizer(&tokenizer);
    }
}

/// A tokenizer.json: as [`sentencepiece`].
pub fn tokenizer_json(bytes: &[u8]) {
    let files = HuggingFaceFiles { tokenizer_json: Some(bytes.to_vec()), ..HuggingFaceFiles::default() };
    if let Ok(tokenizer) = Tokenizer::from_hugging_face(&files) {
        use_tokenizer(&tokenizer);
    }
}

/// A vocab.json and a merges.txt, with a zero byte between them: as [`sentencepiece`].
pub fn vocab_merges(bytes: &[u8]) {
    let Some(middle) = bytes.iter().position(|&byte| byte == 0) else { return };
    let (vocab_json, merges_txt) = (Some(bytes[..middle].to_vec()), Some(bytes[middle + 1..].to_vec()));
    if let Ok(tokenizer) = Tokenizer::from_hugging_face(&HuggingFaceFiles { vocab_json, merges_txt, ..HuggingFaceFiles::default() }) {
        use_tokenizer(&tokenizer);
    }
}

/// A chat template: must be taken or refused, and what is taken must end within its limits.
pub fn chat_template(bytes: &[u8]) {
    let Ok(source) = std::str::from_utf8(bytes) else { return };
    let limits = TemplateLimits { fuel: 20_000, memory_bytes: 1 << 20, output_bytes: 1 << 16, ..TemplateLimits::default() };
    let Ok(template) = ChatTemplate::new(source, BTreeMap::new()) else { return };
    let messages = [serde_json::json!({"role": "user", "content": "a\u{1f642}"}), serde_json::json!({"role": "assistant", "content": ""})];
    let request = ChatRender { messages: &messages, add_generation_prompt: true, ..ChatRender::default() };
    if let Ok(text) = template.with_limits(limits).render(&request) {
        assert!(text.len() <= limits.output_bytes, "a prompt of {} bytes", text.len());
    }
}

/// The tokenizer of a GGUF file: as [`sentencepiece`].
pub fn gguf_tokenizer(bytes: &[u8]) {
    let Ok(file) = forge_model::gguf::parse(bytes) else { return };
    let Ok(data) = GgufTokenizerData::from_metadata(&file.metadata) else { return };
    if let Ok(tokenizer) = Tokenizer::from_gguf(&forge_engine::gguf_tokenizer(data)) {
        use_tokenizer(&tokenizer);
    }
}

/// Every id it gives must be one that it knows.
fn use_tokenizer(tokenizer: &Tokenizer) {
    for text in ["", " ab  a\u{0}<s>é\u{1f642}▁", "aaaabbbb\n\t123"] {
        for parse_special in [true, false] {
            let Ok(ids) = tokenizer.encode_with_special_parsing(text, parse_special) else { continue };
            assert!(ids.iter().all(|&id| tokenizer.is_known(id)), "an id without a token");
            assert!(tokenizer.decode(&ids, false).is_ok());
        }
    }
}

/// The body of a chat request: an error must be an answer of the class 400 to 499.
pub fn chat_request(bytes: &[u8]) {
    if let Err(error) = parse_chat_request(bytes) {
        assert!(error.status().is_client_error(), "{error}");
    }
}

/// The body of a completion request: as [`chat_request`].
pub fn completion_request(bytes: &[u8]) {
    if let Err(error) = parse_completion_request(bytes, &RequestLimits::default()) {
        assert!(error.status().is_client_error(), "{error}");
    }
}

/// Messages between coordinators: taken or refused, and a member that steps them must go on.
pub fn raft_messages(bytes: &[u8]) {
    forge_coordinator::raft::fuzz::messages(bytes);
}

/// One stream of the data plane: frames or a refusal, and what is read is written back as the same bytes.
pub fn frames(bytes: &[u8]) {
    forge_net::fuzz::frames(bytes);
}

/// A coordinator's snapshot, in chunks: taken or refused.
pub fn raft_chunks(bytes: &[u8]) {
    forge_coordinator::raft::fuzz::chunks(bytes);
}

/// A coordinator's data directory: what is read must be written on and read again.
pub fn raft_folder(bytes: &[u8]) {
    forge_coordinator::raft::fuzz::folder_bytes(bytes);
}

/// The log of a coordinator, entry by entry: lines of JSON applied to a small cluster, whose rules hold after each.
pub fn envelopes(bytes: &[u8]) {
    forge_coordinator::state::fuzz_envelopes(bytes);
}

/// A snapshot of the cluster's state: taken or refused, and what is taken is written and read the same.
pub fn snapshot(bytes: &[u8]) {
    forge_coordinator::state::fuzz_snapshot(bytes);
}

/// A backup file.
pub fn backup(bytes: &[u8]) {
    forge_coordinator::fuzz_backup(bytes);
}

/// What a coordinator's folder says of its membership.
pub fn member_file(bytes: &[u8]) {
    forge_coordinator::fuzz_member_file(bytes);
}

/// What operators, programs and joining processes ask of a coordinator.
pub fn coordinator_request(bytes: &[u8]) {
    forge_coordinator::fuzz_request(bytes);
}

/// What a worker says in its session.
pub fn node_session(bytes: &[u8]) {
    forge_coordinator::fuzz_session(bytes);
}

/// What coordinators answer: taken or refused in words, and what is taken comes back the same.
pub fn coordinator_reply(bytes: &[u8]) {
    forge_cluster::client::fuzz::coordinator_reply(bytes);
}

/// What a watch tells a gateway: whatever its batches say, every replica to dial has a node that is known.
pub fn watch(bytes: &[u8]) {
    let mut directory = Directory::default();
    for item in forge_cluster::client::fuzz::watch(bytes) {
        if directory.apply(item) {
            let wanted = directory.wanted();
            assert!(wanted.iter().all(|wanted| wanted.key.starts_with(&wanted.target.replica.to_string())));
            drop((directory.services(), directory.keys().count()));
        }
    }
}

/// A peer's certificate, and the answer that brings a process its own.
pub fn certificate(bytes: &[u8]) {
    forge_cluster::tls::fuzz::certificate(bytes);
    forge_cluster::tls::fuzz::certificate_files(bytes);
    forge_cluster::tls::fuzz::join_reply(bytes);
}

/// The configuration file of a coordinator, worker or gateway: taken or refused by key, and what is taken is what its own
/// JSON says.
pub fn process_config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let format = Format::detect("", text);
    resolve::<CoordinatorConfig>(text, format);
    resolve::<WorkerConfig>(text, format);
    resolve::<GatewayFile<GatewayConfig>>(text, format);
}

fn resolve<T: ProcessConfig + PartialEq + std::fmt::Debug>(text: &str, format: Format) {
    let layers = |text: &str, format| ProcessLayers { file: Some((text.into(), format, "file".into())), ..ProcessLayers::default() };
    let Ok(taken) = layers(text, format).resolve::<T>() else { return };
    let mut written = serde_json::to_value(&taken).expect("a configuration has JSON");
    written["apiVersion"] = forge_shared::spec::API_VERSION.into();
    written["kind"] = T::KIND.into();
    let again = layers(&written.to_string(), Format::Json).resolve::<T>();
    assert_eq!(again.as_ref().ok(), Some(&taken), "a configuration changed on its way");
}

/// The file of a cluster that `forgectl` knows: taken or refused, and what is taken is written and read the same.
pub fn context_file(bytes: &[u8]) {
    let Ok(taken) = ContextFile::parse(bytes) else { return };
    assert!(!taken.servers.is_empty(), "a context without an address was taken");
    let written = taken.to_text().expect("what was read can be written");
    assert_eq!(ContextFile::parse(written.as_bytes()), Ok(taken), "a context changed on its way");
}

/// A `ModelService` document: taken or refused by key, and what is taken is written and read the same.
pub fn service_file(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let read = |text: &str, format| {
        let layers = Layers { file: Some(parse_document(text, format, "file")?), ..Layers::default() };
        layers.resolve()
    };
    let Ok(taken) = read(text, Format::detect("", text)) else { return };
    for format in [Format::Yaml, Format::Toml, Format::Json] {
        let written = forge_shared::config::render(&taken, format).expect("a service can be written");
        assert_eq!(read(&written, format).as_ref().ok(), Some(&taken), "a service changed on its way as {format:?}");
    }
}

/// The text part of a model that a worker sends: must be built or refused, and what is built works and has the same form.
pub fn portable_text(bytes: &[u8]) {
    let Ok(text) = ModelText::from_portable(bytes) else { return };
    use_tokenizer(text.tokenizer());
    let written = text.to_portable().expect("what was read can be written");
    let again = ModelText::from_portable(&written).and_then(|text| text.to_portable());
    assert!(again.is_ok_and(|again| again == written), "a model's text changed on its way");
}

/// A sequence of numbers that looks random (splitmix64) and depends on its start alone.
pub struct Numbers(pub u64);

impl Numbers {
    /// The next number.
    pub fn next_number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.next_number() % bound as u64) as usize
    }
}

/// Values at which length checks go wrong.
const EDGES: [u64; 10] = [0, 1, 0x7f, 0xff, 0xffff, 0x7fff_ffff, 0xffff_ffff, 0x7fff_ffff_ffff_ffff, u64::MAX, 0x8000_0000_0000_0000];

/// Changes a copy of `seed` in one to four places: bits, edge values, cuts, insertions, repetitions, and pieces of
/// `other`.
pub fn mutate(seed: &[u8], other: &[u8], numbers: &mut Numbers) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..=numbers.below(4) {
        if bytes.is_empty() {
            bytes.push(numbers.next_number() as u8);
        }
        let at = numbers.below(bytes.len());
        match numbers.below(7) {
            0 => bytes[at] ^= 1 << numbers.below(8),
            1 => bytes[at] = numbers.next_number() as u8,
            2 => {
                let edge = EDGES[numbers.below(EDGES.len())].to_le_bytes();
                let width = [1, 2, 4, 8][numbers.below(4)].min(bytes.len() - at);
                bytes[at..at + width].copy_from_slice(&edge[..width]);
            }
            3 => bytes.truncate(at),
            4 => {
                let end = (at + 1 + numbers.below(16)).min(bytes.len());
                bytes.drain(at..end);
            }
            5 => {
                let end = (at + 1 + numbers.below(32)).min(bytes.len());
                let piece = bytes[at..end].to_vec();
                bytes.splice(at..at, piece);
            }
            _ => {
                let start = numbers.below(other.len().max(1)).min(other.len());
                let end = (start + 1 + numbers.below(32)).min(other.len());
                bytes.splice(at..at, other[start..end].iter().copied());
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mutations_depend_on_the_number_alone() {
        let seed = b"some bytes of a file".as_slice();
        let once: Vec<_> = (0..50).map(|number| mutate(seed, b"other", &mut Numbers(number))).collect();
        let again: Vec<_> = (0..50).map(|number| mutate(seed, b"other", &mut Numbers(number))).collect();
        assert_eq!(once, again);
        assert!(once.iter().filter(|bytes| bytes.as_slice() != seed).count() > 45);
    }
}
