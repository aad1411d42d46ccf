//! Every example under `cluster-configs/` is loaded, and says what its folder's name says.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use forge_shared::config::{Format, ProcessLayers};
use serde_json::Value;

use super::*;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../cluster-configs")
}

fn read<T: ProcessConfig>(path: &Path) -> T {
    let text = std::fs::read_to_string(path).unwrap();
    let origin = path.display().to_string();
    let layers = ProcessLayers { file: Some((text.clone(), Format::detect(&origin, &text), origin)), ..ProcessLayers::default() };
    layers.resolve().unwrap_or_else(|error| panic!("{error}"))
}

/// The gateway's own keys are checked where its type is known; here any group will do.
type AnyGateway = GatewayFile<BTreeMap<String, Value>>;

fn kind_of(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().find_map(|line| line.strip_prefix("kind: ")).unwrap().trim().to_owned()
}

fn files(name: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder().join(name)).unwrap().map(|entry| entry.unwrap().path()).collect();
    found.sort();
    found
}

#[test]
fn every_example_is_loaded() {
    let mut counts: BTreeMap<String, [usize; 3]> = BTreeMap::new();
    for entry in std::fs::read_dir(folder()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name.ends_with(".md") {
            continue;
        }
        let (mut addresses, mut names) = (Vec::new(), Vec::new());
        for path in files(&name) {
            let count = counts.entry(name.clone()).or_default();
            match kind_of(&path).as_str() {
                "Coordinator" => {
                    let config: CoordinatorConfig = read(&path);
                    addresses.extend([config.listen, config.metrics_listen]);
                    names.push(config.name);
                    count[0] += 1;
                }
                "Worker" => {
                    let config: WorkerConfig = read(&path);
                    addresses.extend([config.listen, config.metrics_listen]);
                    names.push(config.name);
                    count[1] += 1;
                }
                "Gateway" => count[2] += 1,
                "ModelService" => {}
                other => panic!("{}: kind {other}", path.display()),
            }
        }
        // Processes of one host must not take each other's ports; on hosts of their own all may listen alike.
        if !addresses.iter().any(|address| address.starts_with("0.0.0.0")) {
            let all = addresses.len();
            addresses.sort();
            addresses.dedup();
            assert_eq!(addresses.len(), all, "{name}: two processes with one address");
        }
        let all = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), all, "{name}: two processes with one name");
    }
    let expected = [
        ("laptop", [1, 1, 1]),
        ("one-host", [3, 2, 1]),
        ("two-devices", [1, 1, 1]),
        ("two-workers", [1, 2, 1]),
        ("2x8-gpu", [1, 2, 1]),
        ("8x8-gpu", [3, 8, 2]),
    ];
    assert_eq!(counts, expected.map(|(name, count)| (name.to_owned(), count)).into());
}

#[test]
fn gpu_examples_declare_eight_devices_a_node() {
    for name in ["2x8-gpu", "8x8-gpu"] {
        for path in files(name).iter().filter(|path| kind_of(path) == "Worker") {
            let declared = read::<WorkerConfig>(path).declared();
            assert_eq!(declared.len(), 8, "{}", path.display());
            assert!(declared.iter().all(|device| device.is_virtual && device.memory_bytes == 80 << 30));
        }
    }
}

#[test]
fn gateways_are_loaded_with_their_own_keys() {
    for name in ["laptop", "one-host", "two-devices", "two-workers", "2x8-gpu", "8x8-gpu"] {
        for path in files(name).iter().filter(|path| kind_of(path) == "Gateway") {
            let text = std::fs::read_to_string(path).unwrap();
            let mut document: Value = serde_yaml_ng::from_str(&text).unwrap();
            let object = document.as_object_mut().unwrap();
            object.remove("apiVersion");
            object.remove("kind");
            let config: AnyGateway = serde_json::from_value(document).unwrap();
            assert!(config.check().is_ok() && config.gateway.contains_key("port"), "{}", path.display());
        }
    }
}

#[test]
fn contradictions_are_named() {
    let resolve = |assignments: &[&str]| {
        let assignments = assignments.iter().map(|text| text.to_string()).collect();
        ProcessLayers { assignments, ..ProcessLayers::default() }.resolve::<CoordinatorConfig>().map(|_| ()).unwrap_err().to_string()
    };
    assert!(resolve(&["listen=0.0.0.0:7000"]).contains("advertise"));
    assert!(resolve(&["listen=7000"]).contains("host:port"));
    assert!(resolve(&["name=My Host"]).contains("a-z"));
    assert!(resolve(&["leaseMs=100"]).contains("three times"));
    assert!(resolve(&["membership.token=a", "membership.tokenFile=b"]).contains("keep one"));
    let worker = |assignments: &[&str]| {
        let assignments = assignments.iter().map(|text| text.to_string()).collect();
        ProcessLayers { assignments, ..ProcessLayers::default() }.resolve::<WorkerConfig>()
    };
    for listen in ["0.0.0.0:7100", "[::]:7100"] {
        let listens = format!("listen={listen}");
        assert!(worker(&[&listens]).unwrap_err().to_string().contains("advertise"), "{listen}");
        assert!(worker(&[&listens, &format!("advertise={listen}")]).unwrap_err().to_string().contains("no address to dial"), "{listen}");
        assert_eq!(worker(&[&listens, "advertise=host:7100"]).unwrap().address(), "host:7100");
    }
    assert!(worker(&["coordinators="]).unwrap_err().to_string().contains("coordinators"));
    assert!(worker(&["drainTimeoutS=4000"]).unwrap_err().to_string().contains("3600"));
    let unknown = worker(&["drainTimeout=5"]).unwrap_err();
    assert!(unknown.to_string().contains("drainTimeout") && unknown.help().is_some_and(|help| help.contains("drainTimeoutS")), "{unknown}");
    let devices = worker(&[r#"devices=[{"cores":2,"memory":"1GiB"}]"#, "reserve=1GiB"]).unwrap();
    assert_eq!((devices.declared()[0].memory_bytes, devices.reserve.0), (1 << 30, 1 << 30));
}

#[test]
fn unknown_keys_of_files_are_named_with_the_nearest_valid_one() {
    fn refused<T: ProcessConfig + std::fmt::Debug>(body: &str) -> (String, Option<String>) {
        let text = format!("apiVersion: forge/v1\nkind: {}\n{body}\n", T::KIND);
        let layers = ProcessLayers { file: Some((text, Format::Yaml, "file.yaml".into())), ..ProcessLayers::default() };
        let error = layers.resolve::<T>().unwrap_err();
        (error.to_string(), error.help())
    }
    let cases = [
        (refused::<CoordinatorConfig>("leasMs: 3000"), "leasMs", "leaseMs"),
        (refused::<CoordinatorConfig>("membership:\n  tokenfile: t"), "membership.tokenfile", "membership.tokenFile"),
        (refused::<WorkerConfig>("devices:\n- cores: 2\n  memroy: 1GiB"), "devices[0].memroy", "memory"),
        (refused::<WorkerConfig>("offline: true"), "offline", "isOffline"),
        (refused::<AnyGateway>("coordinator: [a:1]"), "coordinator", "coordinators"),
    ];
    for ((error, help), key, nearest) in cases {
        assert!(error.contains("file.yaml") && error.contains(key), "{error}");
        assert!(help.as_ref().is_some_and(|help| help.contains(nearest)), "{key}: {help:?}");
    }
}

#[test]
fn a_token_that_every_user_can_read_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("token");
    std::fs::write(&file, "forge1.a\n").unwrap();
    let membership = Membership { token_file: Some(file.clone()), ..Membership::default() };
    for (mode, is_taken) in [(0o644, false), (0o604, false), (0o600, true), (0o640, true), (0o400, true)] {
        std::fs::set_permissions(&file, PermissionsExt::from_mode(mode)).unwrap();
        match membership.read_token() {
            Ok(token) => assert!(is_taken && token.as_deref() == Some("forge1.a"), "{mode:o}"),
            Err(error) => assert!(!is_taken && error.contains(&format!("mode is {mode:o}")) && error.contains("chmod 600"), "{error}"),
        }
    }
}
