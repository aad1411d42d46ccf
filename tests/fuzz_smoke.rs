//! The fuzz targets without a fuzzer: every seed, and ten thousand mutations of each that are the same every time.
//!
//! A failure prints the target, the seed and the number of the mutation.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use forge_tests::fuzzing::{self, Numbers, mutate};
use forge_text::{HuggingFaceFiles, Tokenizer};

const MUTATIONS: u64 = 10_000;

fn seeds(target: &str) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds").join(target);
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut seeds: Vec<_> = entries
        .map(|entry| {
            let entry = entry.expect("the folder is readable");
            (entry.file_name().to_string_lossy().into_owned(), std::fs::read(entry.path()).expect("seeds are files"))
        })
        .collect();
    seeds.sort();
    assert!(seeds.len() > 2, "{target} has only {} seeds", seeds.len());
    seeds
}

fn smoke(target: &str, run: fn(&[u8])) {
    smoke_times(target, MUTATIONS, run);
}

/// With fewer mutations, for what takes milliseconds each.
fn smoke_times(target: &str, mutations: u64, run: fn(&[u8])) {
    let seeds = seeds(target);
    // At length without a fuzzer: seconds for each seed.
    let longer = std::env::var("FORGE_TEST_FUZZ_SECONDS").ok().and_then(|seconds| seconds.parse().ok()).unwrap_or(0);
    let longer = std::time::Duration::from_secs(longer);
    for (index, (name, seed)) in seeds.iter().enumerate() {
        run(seed);
        let (_, other) = &seeds[(index + 1) % seeds.len()];
        let started = std::time::Instant::now();
        for number in (0..).take_while(|&number| number < mutations || started.elapsed() < longer) {
            let bytes = mutate(seed, other, &mut Numbers(number));
            if catch_unwind(AssertUnwindSafe(|| run(&bytes))).is_err() {
                panic!("{target}: mutation {number} of seed {name} ({} bytes) panics", bytes.len());
            }
        }
    }
}

#[test]
fn gguf_files() {
    smoke("gguf", fuzzing::gguf);
}

#[test]
fn safetensors_headers() {
    smoke("safetensors", fuzzing::safetensors);
}

#[test]
fn submitted_requests() {
    smoke("submit_request", fuzzing::submit_request);
}

#[test]
fn engine_replies() {
    smoke("engine_reply", fuzzing::engine_reply);
}

#[test]
fn replica_updates() {
    smoke("replica_update", fuzzing::replica_update);
}

#[test]
fn join_tokens() {
    smoke("join_token", fuzzing::join_token);
}

#[test]
fn torch_files() {
    smoke("torch", fuzzing::torch);
}

#[test]
fn configurations() {
    smoke("config", fuzzing::config);
}

#[test]
fn weight_indexes() {
    smoke("weight_index", fuzzing::weight_index);
}

#[test]
fn sentencepiece_models() {
    smoke("sentencepiece", fuzzing::sentencepiece);
}

#[test]
fn tokenizer_json_files() {
    smoke_times("tokenizer_json", 2_000, fuzzing::tokenizer_json);
}

#[test]
fn vocabularies_with_merges() {
    smoke_times("vocab_merges", 2_000, fuzzing::vocab_merges);
}

#[test]
fn chat_templates() {
    smoke_times("chat_template", 500, fuzzing::chat_template);
}

#[test]
fn gguf_tokenizers() {
    smoke("gguf_tokenizer", fuzzing::gguf_tokenizer);
}

#[test]
fn chat_requests() {
    smoke("chat_request", fuzzing::chat_request);
}

#[test]
fn completion_requests() {
    smoke("completion_request", fuzzing::completion_request);
}

#[test]
fn raft_messages() {
    smoke("raft_messages", fuzzing::raft_messages);
}

#[test]
fn frames_of_the_data_plane() {
    smoke("frames", fuzzing::frames);
}

#[test]
fn raft_chunks() {
    smoke("raft_chunks", fuzzing::raft_chunks);
}

#[test]
fn raft_folders() {
    smoke("raft_folder", fuzzing::raft_folder);
}

#[test]
fn log_entries() {
    smoke("envelopes", fuzzing::envelopes);
}

#[test]
fn snapshots() {
    smoke("snapshot", fuzzing::snapshot);
}

#[test]
fn backups() {
    smoke("backup", fuzzing::backup);
}

#[test]
fn member_files() {
    smoke("member_file", fuzzing::member_file);
}

#[test]
fn coordinator_requests() {
    smoke("coordinator_request", fuzzing::coordinator_request);
}

#[test]
fn node_sessions() {
    smoke("node_session", fuzzing::node_session);
}

#[test]
fn coordinator_replies() {
    smoke("coordinator_reply", fuzzing::coordinator_reply);
}

#[test]
fn watches() {
    smoke("watch", fuzzing::watch);
}

#[test]
fn certificates() {
    smoke("certificate", fuzzing::certificate);
}

#[test]
fn process_configurations() {
    smoke("process_config", fuzzing::process_config);
}

#[test]
fn context_files() {
    smoke("context_file", fuzzing::context_file);
}

#[test]
fn service_files() {
    smoke("service_file", fuzzing::service_file);
}

#[test]
fn portable_texts() {
    smoke("portable_text", fuzzing::portable_text);
}

/// Seeds are what their names say: most are taken, and the ones named after a refusal are not.
#[test]
fn seeds_reach_behind_the_first_check() {
    for (name, seed) in seeds("gguf") {
        assert_eq!(forge_model::gguf::parse(&seed).is_ok(), name != "other_type", "{name}: {:?}", forge_model::gguf::parse(&seed).err());
    }
    for (name, seed) in seeds("safetensors") {
        let refused = ["other_type", "gap"].contains(&name.as_str());
        assert_eq!(forge_model::safetensors::parse_header(&seed, |_| true).is_err(), refused, "{name}");
    }
    for (name, seed) in seeds("torch") {
        let taken = forge_model::torch::parse(&seed, |_| true);
        assert_eq!(taken.is_ok(), name.starts_with("types") || name == "shared", "{name}: {:?}", taken.err());
    }
    for (name, seed) in seeds("config") {
        let taken = forge_model::arch::hf::from_config_json(&serde_json::from_slice(&seed).unwrap());
        assert!(taken.is_ok(), "{name}: {:?}", taken.err());
    }
    for (name, seed) in seeds("weight_index") {
        let taken = forge_model::checkpoint::weight_map(&serde_json::from_slice(&seed).unwrap());
        assert_eq!(taken.is_err(), name == "elsewhere", "{name}: {:?}", taken.err());
    }
    for (name, seed) in seeds("sentencepiece") {
        let files = HuggingFaceFiles { tokenizer_model: Some(seed), ..HuggingFaceFiles::default() };
        let built = Tokenizer::from_hugging_face(&files);
        assert_eq!(built.is_err(), name == "other_algorithm", "{name}: {:?}", built.err());
    }
    for (name, seed) in seeds("tokenizer_json") {
        let built = Tokenizer::from_hugging_face(&HuggingFaceFiles { tokenizer_json: Some(seed), ..HuggingFaceFiles::default() });
        assert!(built.is_ok(), "{name}: {:?}", built.err());
    }
    for (name, seed) in seeds("chat_template") {
        let built = forge_text::ChatTemplate::new(std::str::from_utf8(&seed).unwrap(), Default::default());
        assert!(built.is_ok(), "{name}: {:?}", built.err());
    }
    for (name, seed) in seeds("gguf_tokenizer") {
        let data = forge_model::GgufTokenizerData::from_metadata(&forge_model::gguf::parse(&seed).unwrap().metadata).unwrap();
        let built = Tokenizer::from_gguf(&forge_engine::gguf_tokenizer(data));
        assert!(built.is_ok(), "{name}: {:?}", built.err());
    }
    for (name, seed) in seeds("backup") {
        assert!(forge_coordinator::read_backup(&seed).is_ok(), "{name}");
    }
    for (name, seed) in seeds("context_file") {
        let taken = forge_cluster::config::ContextFile::parse(&seed);
        assert_eq!(taken.is_err(), name == "no_port", "{name}: {taken:?}");
    }
    for (name, seed) in seeds("portable_text") {
        let taken = forge_text::ModelText::from_portable(&seed);
        assert!(taken.is_ok(), "{name}: {:?}", taken.err());
    }
    for (name, seed) in seeds("chat_request") {
        let parsed = forge_gateway::request::parse_chat_request(&seed);
        assert_eq!(parsed.is_err(), name == "refused", "{name}: {:?}", parsed.err());
    }
}
