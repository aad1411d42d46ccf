//! Who may know whom (DESIGN §2), checked on the manifests of all workspace members.
//!
//! Dev-dependencies are not looked at: a test may compare with anything. An edge that is missing in [`MAY_KNOW`] is
//! a defect of the manifest, or a decision that belongs into ARCHITECTURE.md and then into the table.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Each crate and the crates of this workspace it may depend on directly.
const MAY_KNOW: &[(&str, &[&str])] = &[
    ("forge-proto", &[]),
    ("forge-tree", &[]),
    ("forge-shared", &["forge-tree"]),
    ("forge-cluster", &["forge-proto", "forge-shared"]),
    ("forge-text", &["forge-shared"]),
    ("forge-kernels", &["forge-tree"]),
    ("forge-net", &["forge-shared", "forge-kernels"]),
    ("forge-model", &["forge-shared", "forge-kernels", "forge-net"]),
    ("forge-engine", &["forge-shared", "forge-text", "forge-kernels", "forge-net", "forge-model"]),
    ("forge-eval", &["forge-shared", "forge-kernels", "forge-net", "forge-model"]),
    ("forge-store", &["forge-shared"]),
    ("forge-coordinator", &["forge-proto", "forge-shared", "forge-cluster"]),
    (
        "forge-worker",
        &[
            "forge-proto",
            "forge-shared",
            "forge-cluster",
            "forge-text",
            "forge-kernels",
            "forge-net",
            "forge-model",
            "forge-engine",
            "forge-store",
        ],
    ),
    ("forge-gateway", &["forge-proto", "forge-shared", "forge-cluster", "forge-text"]),
    (
        "forgectl",
        &[
            "forge-shared",
            "forge-cluster",
            "forge-text",
            "forge-kernels",
            "forge-net",
            "forge-model",
            "forge-engine",
            "forge-eval",
            "forge-store",
            "forge-coordinator",
            "forge-worker",
            "forge-gateway",
        ],
    ),
    (
        "forge-simulator",
        &[
            "forge-proto",
            "forge-shared",
            "forge-cluster",
            "forge-text",
            "forge-kernels",
            "forge-model",
            "forge-engine",
            "forge-coordinator",
            "forge-worker",
            "forge-gateway",
        ],
    ),
    (
        "forge-tests",
        &[
            "forge-shared",
            "forge-cluster",
            "forge-text",
            "forge-kernels",
            "forge-net",
            "forge-model",
            "forge-engine",
            "forge-eval",
            "forge-store",
            "forge-coordinator",
            "forge-gateway",
        ],
    ),
];

/// What a gateway must never link, not even through others: it has to run on a machine without weights.
const NEVER_IN_GATEWAY: &[&str] = &["forge-kernels", "forge-net", "forge-model", "forge-engine", "forge-worker", "forge-store"];

/// Outside crates that only some may use, and why.
const RESERVED: &[(&str, &[&str], &str)] = &[
    ("candle-core", &[], "it is the oracle of tests, never the engine"),
    ("axum", &["forge-gateway", "forgectl"], "HTTP is the gateway's matter"),
    ("ureq", &["forge-store"], "only the store fetches"),
    ("reqwest", &["forgectl"], "it loads servers in `bench serve`, and fetches nothing"),
    ("tokenizers", &["forge-text"], "one place turns text into ids"),
    ("minijinja", &["forge-text"], "one sandbox runs templates"),
    ("memmap2", &["forge-model"], "one place maps checkpoints"),
    ("ractor", &["forge-worker", "forgectl"], "actors are thin shells; cores do not know them"),
];

struct Manifest {
    name: String,
    dependencies: BTreeSet<String>,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the package lies in the workspace").to_owned()
}

fn read(path: &Path) -> toml::Table {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    text.parse().unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Normal and build dependencies, those of single targets included.
fn dependencies(manifest: &toml::Table) -> BTreeSet<String> {
    let targets = manifest.get("target").and_then(toml::Value::as_table).into_iter().flat_map(|targets| targets.values());
    let tables = targets.filter_map(toml::Value::as_table).chain([manifest]);
    let kinds = tables.flat_map(|table| ["dependencies", "build-dependencies"].map(|kind| table.get(kind)));
    let entries = kinds.flatten().filter_map(toml::Value::as_table).flatten();
    entries.map(|(name, value)| value.get("package").and_then(toml::Value::as_str).unwrap_or(name).to_owned()).collect()
}

fn members() -> Vec<Manifest> {
    let root = root();
    let workspace = read(&root.join("Cargo.toml"));
    let members = workspace["workspace"]["members"].as_array().expect("members are a list");
    let names = members.iter().map(|member| member.as_str().expect("members are paths"));
    names
        .map(|member| {
            let manifest = read(&root.join(member).join("Cargo.toml"));
            let name = manifest["package"]["name"].as_str().expect("a package has a name").to_owned();
            Manifest { name, dependencies: dependencies(&manifest) }
        })
        .collect()
}

#[test]
fn imports_go_in_the_allowed_directions() {
    let table: BTreeMap<_, _> = MAY_KNOW.iter().copied().collect();
    let mut defects = Vec::new();
    let members = members();
    for member in &members {
        let Some(allowed) = table.get(member.name.as_str()) else {
            defects.push(format!("{} has no row in the table", member.name));
            continue;
        };
        for dependency in &member.dependencies {
            let ours = members.iter().any(|other| other.name == *dependency);
            if ours && !allowed.contains(&dependency.as_str()) {
                defects.push(format!("{} must not know {dependency}", member.name));
            }
        }
    }
    assert!(defects.is_empty(), "{defects:#?}");
    assert_eq!(members.len(), MAY_KNOW.len(), "every row of the table is a member");
}

#[test]
fn the_table_itself_has_no_cycle() {
    let mut known: BTreeSet<&str> = BTreeSet::new();
    let mut rest: Vec<_> = MAY_KNOW.to_vec();
    while !rest.is_empty() {
        let before = rest.len();
        rest.retain(|(name, allowed)| {
            let ready = allowed.iter().all(|dependency| known.contains(dependency));
            if ready {
                known.insert(name);
            }
            !ready
        });
        assert!(rest.len() < before, "a cycle among {:?}", rest.iter().map(|(name, _)| name).collect::<Vec<_>>());
    }
}

#[test]
fn the_gateway_links_no_kernel() {
    let members: BTreeMap<String, BTreeSet<String>> = members().into_iter().map(|member| (member.name, member.dependencies)).collect();
    // Crates from outside cannot depend on ours, so the closure over our own manifests is the whole truth.
    let mut reached = BTreeSet::new();
    let mut open = vec!["forge-gateway".to_owned()];
    while let Some(name) = open.pop() {
        for dependency in members.get(&name).into_iter().flatten() {
            if reached.insert(dependency.clone()) {
                open.push(dependency.clone());
            }
        }
    }
    let linked: Vec<_> = NEVER_IN_GATEWAY.iter().filter(|name| reached.contains(**name)).collect();
    assert!(linked.is_empty(), "forge-gateway links {linked:?}");
}

#[test]
fn reserved_crates_stay_where_they_belong() {
    let mut defects = Vec::new();
    for member in members() {
        for (name, users, reason) in RESERVED {
            if member.dependencies.contains(*name) && !users.contains(&member.name.as_str()) {
                defects.push(format!("{} uses {name}, but {reason}", member.name));
            }
        }
    }
    assert!(defects.is_empty(), "{defects:#?}");
}

#[test]
fn versions_live_in_the_one_table() {
    let mut defects = Vec::new();
    let root = root();
    for member in read(&root.join("Cargo.toml"))["workspace"]["members"].as_array().expect("members are a list") {
        let path = root.join(member.as_str().expect("members are paths")).join("Cargo.toml");
        let manifest = read(&path);
        for kind in ["dependencies", "dev-dependencies", "build-dependencies"] {
            for (name, value) in manifest.get(kind).and_then(toml::Value::as_table).into_iter().flatten() {
                if value.get("workspace").and_then(toml::Value::as_bool) != Some(true) {
                    defects.push(format!("{}: {name} names its own version", path.display()));
                }
            }
        }
    }
    assert!(defects.is_empty(), "{defects:#?}");
}
