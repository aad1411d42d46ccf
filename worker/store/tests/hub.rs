//! Pulling from the hub: which files, credentials, cut and stalled connections, wrong content.

mod common;

use std::time::Duration;

use common::{Bench, Fault, Page, Recorder, Server, weights};
use forge_store::{ContentDigest, Digest, PullEvent, Secret, Silent, StoreError};

#[test]
fn a_repository_becomes_a_folder_and_is_found_again() {
    let server = Server::start();
    let shard = |number: usize| weights(2000 + number);
    let index = r#"{"weight_map":{"a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors"}}"#;
    server.put_repo(
        "org/model",
        &[
            ("config.json", b"{}"),
            ("README.md", b"text"),
            ("tokenizer.json", b"{\"t\":1}"),
            ("model-00001-of-00002.safetensors", &shard(1)),
            ("model-00002-of-00002.safetensors", &shard(2)),
            ("model-00003-of-00003.safetensors", b"not in the index"),
            ("model.safetensors.index.json", index.as_bytes()),
        ],
    );
    let bench = Bench::new(&server);
    let store = bench.store();
    assert!(store.resolve("org/model", &Silent).unwrap().is_none());
    let model = store.pull("org/model", &bench.options, &Silent).unwrap();
    let mut names: Vec<_> =
        std::fs::read_dir(model.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    let expected = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ];
    assert_eq!(names, expected);
    let second = std::fs::read(model.path().join("model-00002-of-00002.safetensors")).unwrap();
    assert_eq!(second, shard(2));
    assert_eq!(model.manifest().unwrap().licence.as_deref(), Some("apache-2.0"));
    assert_eq!(model.manifest().unwrap().source, "hf:org/model@0123456789abcdef0123456789abcdef01234567");

    let listing = "/api/models/org/model/revision/main";
    let requests = server.seen(listing).len();
    let again = store.pull("hf:org/model", &bench.options, &Silent).unwrap();
    assert_eq!(again.digest(), model.digest());
    assert_eq!(server.seen(listing).len(), requests, "a stored model asks nobody");
    let mut refresh = bench.options.clone();
    refresh.refresh = true;
    store.pull("org/model", &refresh, &Silent).unwrap();
    assert_eq!(server.seen(listing).len(), requests + 1);
    let weights_path = server.resolve_path("org/model", "model-00001-of-00002.safetensors");
    assert_eq!(server.seen(&weights_path).len(), 1, "unchanged weights are not fetched again");
}

#[test]
fn the_gguf_asked_for_is_chosen_and_is_a_file() {
    let server = Server::start();
    let (small, large) = (weights(1000), weights(3000));
    server.put_repo("org/m-GGUF", &[("m.Q4_1.gguf", &small), ("sub/m.Q8_0.gguf", &large), ("config.json", b"{}")]);
    let bench = Bench::new(&server);
    let store = bench.store();
    let recorder = Recorder::default();
    let model = store.pull("org/m-GGUF", &bench.options, &recorder).unwrap();
    assert!(model.path().ends_with("m.Q8_0.gguf"));
    assert_eq!(std::fs::read(model.path()).unwrap(), large);
    assert!(recorder.text().contains("chose m.Q8_0.gguf"), "{}", recorder.text());
    let model = store.pull("org/m-GGUF@v1:Q4_1", &bench.options, &Silent).unwrap();
    assert_eq!(model.name(), "hf:org/m-GGUF@v1:Q4_1");
    assert_eq!(std::fs::read(model.path()).unwrap(), small);
    let error = store.pull("org/m-GGUF:Q5_0", &bench.options, &Silent).unwrap_err().to_string();
    assert!(error.contains("no file fits 'Q5_0'; there are m.Q4_1.gguf, m.Q8_0.gguf"), "{error}");
}

#[test]
fn a_cut_connection_is_resumed_where_it_broke() {
    let server = Server::start();
    let body = weights(900_000);
    server.put_repo("org/m", &[("m.gguf", &body)]);
    let path = server.resolve_path("org/m", "m.gguf");
    server.with_faults(&path, vec![Fault::CutAfter(300_000), Fault::Status(503, "Retry-After: 0\r\n"), Fault::CutAfter(200_000)]);
    let bench = Bench::new(&server);
    let recorder = Recorder::default();
    let model = bench.store().pull("org/m", &bench.options, &recorder).unwrap();
    assert_eq!(std::fs::read(model.path()).unwrap(), body);
    let ranges: Vec<_> = server.seen(&path).iter().map(|one| one.headers.get("range").cloned()).collect();
    assert_eq!(ranges.len(), 4);
    assert_eq!(ranges[0], None);
    assert_eq!(ranges[1].as_deref(), Some("bytes=300000-"));
    assert_eq!(ranges[3].as_deref(), Some("bytes=500000-"));
    assert_eq!(server.seen(&path)[1].headers["if-range"], "\"tag-1\"");
    assert_eq!(recorder.count(|event| matches!(event, PullEvent::Retrying { .. })), 3);
    assert!(bench.names("partial").is_empty(), "nothing is left over");
}

#[test]
fn a_pull_that_gave_up_is_resumed_by_the_next() {
    let server = Server::start();
    let body = weights(500_000);
    server.put_repo("org/m", &[("m.gguf", &body)]);
    let path = server.resolve_path("org/m", "m.gguf");
    // The first connection delivers a part; the rest only errors, until the retries are used up.
    let mut faults = vec![Fault::CutAfter(123_456)];
    faults.extend(vec![Fault::Status(500, ""); 4]);
    server.with_faults(&path, faults);
    let bench = Bench::new(&server);
    let store = bench.store();
    let error = store.pull("org/m", &bench.options, &Silent).unwrap_err();
    let StoreError::AllSourcesFailed { failures, .. } = &error else { panic!("{error}") };
    assert!(failures[0].reason.contains("answered 500"), "{error}");
    let recorder = Recorder::default();
    server.with_faults(&path, Vec::new());
    let model = store.pull("org/m", &bench.options, &recorder).unwrap();
    assert_eq!(std::fs::read(model.path()).unwrap(), body);
    let resumed = |event: &PullEvent| matches!(event, PullEvent::FileStarted { resumed_at_bytes: 123_456, .. });
    assert_eq!(recorder.count(resumed), 1, "{}", recorder.text());
    assert_eq!(server.seen(&path).last().unwrap().headers["range"], "bytes=123456-");
}

#[test]
fn a_server_without_ranges_starts_over_and_a_stalled_one_is_left() {
    let server = Server::start();
    let body = weights(300_000);
    server.put_repo("org/m", &[("m.gguf", &body)]);
    let path = server.resolve_path("org/m", "m.gguf");
    let stall = Fault::StallAfter(100_000, Duration::from_secs(3));
    server.with_faults(&path, vec![stall, Fault::StartOver(usize::MAX)]);
    let bench = Bench::new(&server);
    let recorder = Recorder::default();
    let model = bench.store().pull("org/m", &bench.options, &recorder).unwrap();
    assert_eq!(std::fs::read(model.path()).unwrap(), body);
    assert!(recorder.text().contains("sent nothing for 0.4 s"), "{}", recorder.text());
}

#[test]
fn a_server_that_always_breaks_at_the_same_place_is_given_up_on() {
    let server = Server::start();
    let body = weights(300_000);
    server.put_repo("org/m", &[("m.gguf", &body)]);
    let path = server.resolve_path("org/m", "m.gguf");
    // Each connection brings bytes, but never one that was not there before.
    server.with_faults(&path, vec![Fault::StartOver(100_000); 40]);
    let bench = Bench::new(&server);
    let error = bench.store().pull("org/m", &bench.options, &Silent).unwrap_err().to_string();
    assert!(error.contains("100000") || error.contains("broke the transfer off"), "{error}");
    assert_eq!(server.seen(&path).len(), 4, "the first and three retries");
}

#[test]
fn a_server_that_is_away_for_a_moment_is_waited_for() {
    let server = Server::start();
    let body = weights(300_000);
    server.put_repo("org/m", &[("m.gguf", &body)]);
    let path = server.resolve_path("org/m", "m.gguf");
    server.with_faults(&path, vec![Fault::GoAway(100_000, Duration::from_millis(300))]);
    let mut bench = Bench::new(&server);
    bench.options.waits.retries = 10;
    let recorder = Recorder::default();
    let model = bench.store().pull("org/m", &bench.options, &recorder).unwrap();
    assert_eq!(std::fs::read(model.path()).unwrap(), body);
    assert!(recorder.text().contains("refused the connection"), "{}", recorder.text());
}

#[test]
fn the_digest_named_before_a_redirect_holds_where_the_list_has_none() {
    let server = Server::start();
    let body = weights(5000);
    let listing = r#"{"sha":"0123456789abcdef0123456789abcdef01234567","siblings":[{"rfilename":"m.gguf"}]}"#;
    server.put_body("/api/models/org/m/revision/main", listing.as_bytes());
    server.put_body("/cdn/m", &body);
    let path = server.resolve_path("org/m", "m.gguf");
    let bench = Bench::new(&server);
    let serve = |digest: Digest| {
        let linked_etag = Some(digest.to_string());
        server.put(&path, Page { linked_etag, faults: vec![Fault::Redirect("/cdn/m".into())], ..Page::default() });
        bench.store().pull("org/m", &bench.options, &Silent)
    };
    let error = serve(Digest::of(b"something else")).unwrap_err().to_string();
    assert!(error.contains("does not match its published sha256"), "{error}");
    assert_eq!(serve(Digest::of(&body)).unwrap().size_bytes(), 5000);
}

#[test]
fn wrong_content_is_refused_and_discarded() {
    let server = Server::start();
    server.put_repo("org/m", &[("m.gguf", &weights(10_000))]);
    let path = server.resolve_path("org/m", "m.gguf");
    let mut wrong = weights(10_000);
    wrong[5000] ^= 1;
    server.put_body(&path, &wrong);
    let bench = Bench::new(&server);
    let store = bench.store();
    let error = store.pull("org/m", &bench.options, &Silent).unwrap_err().to_string();
    assert!(error.contains("does not match its published sha256"), "{error}");
    assert!(bench.names("partial").is_empty() && bench.names("blobs").is_empty());
    server.put_body(&path, &weights(9_999));
    let error = store.pull("org/m", &bench.options, &Silent).unwrap_err().to_string();
    assert!(error.contains("published size (expected 10000, got 9999)"), "{error}");
}

#[test]
fn the_token_goes_to_the_hub_and_nowhere_else() {
    let (server, elsewhere) = (Server::start(), Server::start());
    let body = weights(5000);
    server.put_repo("org/gated", &[("m.gguf", &body)]);
    let path = server.resolve_path("org/gated", "m.gguf");
    server.require_token("/api/models/org/gated/revision/main", "hf_good");
    server.require_token(&path, "hf_good");
    elsewhere.put_body("/cdn/m", &body);
    server.with_faults(&path, vec![Fault::Redirect(format!("{}/cdn/m", elsewhere.url))]);
    let mut bench = Bench::new(&server);
    let store = bench.store();
    let error = store.pull("org/gated", &bench.options, &Silent).unwrap_err().to_string();
    assert!(error.contains("401") && error.contains("HF_TOKEN"), "{error}");
    bench.options.hub_token = Some(Secret::new("hf_good"));
    let model = store.pull("org/gated", &bench.options, &Silent).unwrap();
    assert_eq!(model.size_bytes(), 5000);
    let request = &elsewhere.seen("/cdn/m")[0];
    assert!(!request.headers.contains_key("authorization"), "{request:?}");
}

#[test]
fn what_a_hub_may_not_say_is_refused() {
    let server = Server::start();
    let bench = Bench::new(&server);
    let store = bench.store();
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let cases = [
        (format!(r#"{{"sha":"{commit}","siblings":[{{"rfilename":"../../evil.gguf"}}]}}"#), "would leave"),
        (format!(r#"{{"sha":"{commit}","siblings":[{{"rfilename":"/etc/x.gguf"}}]}}"#), "would leave"),
        (r#"{"sha":"../x","siblings":[{"rfilename":"m.gguf"}]}"#.to_owned(), "is no commit"),
        ("<html>".to_owned(), "is not what the hub's interface promises"),
        (format!(r#"{{"sha":"{commit}","siblings":[{{"rfilename":"x.bin"}}]}}"#), "neither safetensors"),
    ];
    for (number, (listing, expected)) in cases.iter().enumerate() {
        server.put_body(&format!("/api/models/evil/m{number}/revision/main"), listing.as_bytes());
        let error = store.pull(&format!("evil/m{number}"), &bench.options, &Silent).unwrap_err().to_string();
        assert!(error.contains(expected), "{listing}: {error}");
    }
    let error = store.pull("evil/absent", &bench.options, &Silent).unwrap_err().to_string();
    assert!(error.contains("404") && error.contains("check the name"), "{error}");
    assert!(bench.names("blobs").is_empty() && bench.names("manifests").is_empty());
}

#[test]
fn a_redirect_to_plain_http_elsewhere_is_refused() {
    let server = Server::start();
    server.put_repo("org/m", &[("m.gguf", &weights(10))]);
    let path = server.resolve_path("org/m", "m.gguf");
    server.with_faults(&path, vec![Fault::Redirect("http://192.0.2.1/m.gguf".into())]);
    let bench = Bench::new(&server);
    let error = bench.store().pull("org/m", &bench.options, &Silent).unwrap_err().to_string();
    assert!(error.contains("leads to an address that is refused"), "{error}");
}

#[test]
fn an_address_of_one_file_is_pulled_and_resumed_only_with_its_tag() {
    let server = Server::start();
    let body = weights(200_000);
    server.put("/a/m%20x.gguf", Page { body: body.clone(), etag: Some("\"one\""), ..Page::default() });
    server.with_faults("/a/m%20x.gguf", vec![Fault::CutAfter(70_000)]);
    let bench = Bench::new(&server);
    let name = format!("{}/a/m%20x.gguf", server.url);
    let model = bench.store().pull(&name, &bench.options, &Silent).unwrap();
    assert!(model.path().ends_with("m x.gguf"));
    assert_eq!(std::fs::read(model.path()).unwrap(), body);
    assert_eq!(server.seen("/a/m%20x.gguf")[1].headers["if-range"], "\"one\"");
    assert!(matches!(model.digest(), ContentDigest::Full(_)));

    // Without tag and digest a cut file is fetched from its start, and a changed one anew.
    server.put("/b/m.gguf", Page { body: body.clone(), ..Page::default() });
    server.with_faults("/b/m.gguf", vec![Fault::CutAfter(70_000), Fault::Status(500, "")]);
    let mut once = bench.options.clone();
    once.waits.retries = 1;
    let name = format!("{}/b/m.gguf", server.url);
    bench.store().pull(&name, &once, &Silent).unwrap_err();
    let recorder = Recorder::default();
    bench.store().pull(&name, &once, &recorder).unwrap();
    let from_start = |event: &PullEvent| matches!(event, PullEvent::FileStarted { resumed_at_bytes: 0, .. });
    assert_eq!(recorder.count(from_start), 1);
}
