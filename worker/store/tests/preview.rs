//! Looking at models of the hub: only configuration and the beginnings of weights travel, whatever goes wrong.

mod common;

use std::time::Duration;

use common::{Bench, Fault, Server, weights};
use forge_store::{HubSource, StoreError};

fn hub(filter: Option<&str>) -> HubSource {
    HubSource { repo: "org/model".into(), revision: None, filter: filter.map(Into::into) }
}

/// A safetensors-like file: eight bytes of length, a header of so many bytes, a long rest.
fn safetensors(header_bytes: usize) -> Vec<u8> {
    [(header_bytes as u64).to_le_bytes().to_vec(), vec![b'h'; header_bytes], weights(3 << 20)].concat()
}

#[test]
fn only_headers_travel_and_files_keep_their_length() {
    let server = Server::start();
    let (short, long) = (safetensors(5_000), safetensors(300_000));
    let index = r#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}"#;
    server.put_repo(
        "org/model",
        &[
            ("config.json", b"{}"),
            ("tokenizer.json", &weights(1 << 20)),
            ("model-00001-of-00002.safetensors", &short),
            ("model-00002-of-00002.safetensors", &long),
            ("model.safetensors.index.json", index.as_bytes()),
        ],
    );
    let bench = Bench::new(&server);
    let preview = bench.store().preview(&hub(None), &bench.options, |_, _| panic!("there is no GGUF file")).unwrap();
    let read = |name: &str| std::fs::read(preview.path().join(name)).unwrap();
    for (name, whole, header) in [("model-00001-of-00002.safetensors", &short, 5_008), ("model-00002-of-00002.safetensors", &long, 300_008)]
    {
        let found = read(name);
        assert_eq!(found.len(), whole.len());
        assert_eq!(found[..header], whole[..header]);
        assert!(found[found.len() - 1000..].iter().all(|byte| *byte == 0), "the rest is a hole");
    }
    assert_eq!(read("config.json"), b"{}");
    assert!(!preview.path().join("tokenizer.json").exists());
    assert!(preview.fetched_bytes() < 600_000 && preview.size_bytes() > 7 << 20, "{preview:?}");
    assert_eq!(preview.source(), "hf:org/model@0123456789abcdef0123456789abcdef01234567");
    assert_eq!(preview.licence(), Some("apache-2.0"));
    assert!(server.seen(&server.resolve_path("org/model", "tokenizer.json")).is_empty());
    let folder = preview.path().to_owned();
    drop(preview);
    assert!(!folder.exists(), "it leaves nothing behind");
}

#[test]
fn pytorch_files_have_no_header_to_look_at() {
    let server = Server::start();
    server.put_repo("org/model", &[("config.json", b"{}"), ("pytorch_model.bin", &weights(1 << 20))]);
    let bench = Bench::new(&server);
    let error = bench.store().preview(&hub(None), &bench.options, |_, _| panic!("there is no GGUF file")).unwrap_err();
    assert!(matches!(&error, StoreError::NoUsableWeights { reason, .. } if reason.contains("forgectl pull hf:org/model")), "{error}");
    assert!(server.seen(&server.resolve_path("org/model", "pytorch_model.bin")).is_empty());
}

#[test]
fn a_gguf_header_grows_until_its_loader_is_content() {
    let server = Server::start();
    let file = weights(4 << 20);
    server.put_repo("org/model", &[("m.Q8_0.gguf", &file)]);
    let bench = Bench::new(&server);
    let preview = bench.store().preview(&hub(None), &bench.options, |_, bytes| bytes > 700_000).unwrap();
    assert!(preview.path().ends_with("m.Q8_0.gguf"));
    let found = std::fs::read(preview.path()).unwrap();
    assert_eq!((found.len(), preview.fetched_bytes()), (file.len(), 1 << 20));
    assert_eq!(found[..1 << 20], file[..1 << 20]);
    // One that is never content gets the whole file, if that is small, and no more.
    server.put_repo("org/model", &[("m.Q8_0.gguf", &file[..200_000])]);
    let preview = bench.store().preview(&hub(None), &bench.options, |_, _| false).unwrap();
    assert_eq!(preview.fetched_bytes(), 200_000);
}

#[test]
fn faults_on_the_way_are_gone_over() {
    let server = Server::start();
    let file = safetensors(400_000);
    server.put_repo("org/model", &[("config.json", b"{}"), ("model.safetensors", &file)]);
    let path = server.resolve_path("org/model", "model.safetensors");
    let bench = Bench::new(&server);
    for faults in [
        vec![Fault::CutAfter(1000), Fault::CutAfter(200_000)],
        vec![Fault::Status(503, "")],
        vec![Fault::StallAfter(10, Duration::from_secs(1))],
        vec![Fault::CutAfter(100_000), Fault::StartOver(150_000)],
        vec![Fault::Redirect(format!("{}/elsewhere", server.url))],
    ] {
        server.with_faults(&path, faults);
        server.put_body("/elsewhere", &file);
        let preview = bench.store().preview(&hub(None), &bench.options, |_, _| true).unwrap();
        let found = std::fs::read(preview.path().join("model.safetensors")).unwrap();
        assert!(found.len() == file.len() && found[..400_008] == file[..400_008]);
    }
}

#[test]
fn a_length_that_lies_and_a_closed_network_are_refused() {
    let server = Server::start();
    let mut file = safetensors(1000);
    file[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    server.put_repo("org/model", &[("config.json", b"{}"), ("model.safetensors", &file)]);
    let mut bench = Bench::new(&server);
    let error = bench.store().preview(&hub(None), &bench.options, |_, _| true).unwrap_err();
    assert!(matches!(error, StoreError::BadAnswer { .. }) && error.to_string().contains("model.safetensors"), "{error}");
    bench.options.offline = true;
    let error = bench.store().preview(&hub(None), &bench.options, |_, _| true).unwrap_err();
    assert!(matches!(error, StoreError::Offline { .. }), "{error}");
}
