//! What every file of the repository must keep: size, a beginning that says what it is, no unfinished work, nothing
//! of the machine it was made on, links that lead somewhere.
//!
//! Forbidden words are put together here from halves, so that this file does not contain them.

use std::path::{Path, PathBuf};
use std::process::Command;

const MAX_LINES: usize = 800;
const MAX_BYTES: u64 = 1 << 20;

/// Where `unsafe` is allowed: kernels, and single files at the border to the operating system.
const UNSAFE_ALLOWED: &[&str] = &[
    "shared/net/src/quic/socket.rs",
    "tests/src/bin/relay/system.rs",
    "worker/kernels/",
    "worker/model/src/source.rs",
    "worker/src/machine.rs",
    "worker/src/probe/cuda.rs",
    "worker/src/threads.rs",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the package lies in the workspace").to_owned()
}

/// Files that are or would be tracked, relative to the root.
fn files() -> Vec<PathBuf> {
    let root = root();
    let git = Command::new("git").current_dir(&root).args(["ls-files", "--cached", "--others", "--exclude-standard", "-z"]).output();
    let listed: Vec<PathBuf> = match git {
        Ok(output) if output.status.success() => {
            let names = String::from_utf8(output.stdout).expect("file names are UTF-8");
            names.split('\0').filter(|name| !name.is_empty()).map(PathBuf::from).collect()
        }
        // An unpacked archive has no history: every file but build results.
        _ => walk(&root, Path::new("")),
    };
    let existing: Vec<_> = listed.into_iter().filter(|path| root.join(path).is_file()).collect();
    assert!(existing.len() > 50, "only {} files found below {}", existing.len(), root.display());
    existing
}

fn walk(root: &Path, folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(root.join(folder)).expect("the checkout is readable");
    let mut files = Vec::new();
    for entry in entries.map(|entry| entry.expect("the checkout is readable")) {
        let path = folder.join(entry.file_name());
        let skipped = path == Path::new("target") || path == Path::new(".git") || path == Path::new("fuzz/target");
        if entry.path().is_dir() {
            if !skipped {
                files.extend(walk(root, &path));
            }
        } else {
            files.push(path);
        }
    }
    files
}

fn has_extension(path: &Path, extensions: &[&str]) -> bool {
    path.extension().and_then(|extension| extension.to_str()).is_some_and(|extension| extensions.contains(&extension))
}

/// Text files with their content; binary fixtures are left out.
fn texts() -> impl Iterator<Item = (PathBuf, String)> {
    let root = root();
    files().into_iter().filter_map(move |path| {
        let text = String::from_utf8(std::fs::read(root.join(&path)).ok()?).ok()?;
        Some((path, text))
    })
}

fn code() -> impl Iterator<Item = (PathBuf, String)> {
    texts().filter(|(path, _)| has_extension(path, &["rs", "py", "sh"]))
}

fn assert_none(defects: Vec<String>) {
    assert!(defects.is_empty(), "{} defects:\n{}", defects.len(), defects.join("\n"));
}

#[test]
fn no_file_is_too_long() {
    let lengths = code().map(|(path, text)| (path, text.lines().count()));
    assert_none(
        lengths.filter(|(_, lines)| *lines > MAX_LINES).map(|(path, lines)| format!("{}: {lines} lines", path.display())).collect(),
    );
}

#[test]
fn no_file_is_too_large() {
    let root = root();
    let sizes = files().into_iter().map(|path| (std::fs::metadata(root.join(&path)).map_or(0, |facts| facts.len()), path));
    assert_none(sizes.filter(|(bytes, _)| *bytes > MAX_BYTES).map(|(bytes, path)| format!("{}: {bytes} bytes", path.display())).collect());
}

/// A test module beside its code continues that code's documentation.
fn is_test_module(path: &Path) -> bool {
    let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    stem == "tests" || stem.ends_with("_tests") || path.iter().any(|part| part == "tests") && !path.starts_with("tests")
}

#[test]
fn modules_say_what_they_are() {
    let modules = texts().filter(|(path, _)| has_extension(path, &["rs"]) && !is_test_module(path));
    let silent = modules.filter(|(_, text)| !text.starts_with("//!") && !text.starts_with("#![no_main]\n//!"));
    assert_none(silent.map(|(path, _)| format!("{} does not begin with //!", path.display())).collect());
}

#[test]
fn no_work_is_left_open() {
    let words: Vec<String> = [("to", "do!("), ("unimple", "mented!("), ("FIX", "ME"), ("TO", "DO"), ("#[igno", "re"), ("XX", "X:")]
        .map(|(left, right)| format!("{left}{right}"))
        .to_vec();
    let mut defects = Vec::new();
    for (path, text) in code() {
        for (number, line) in text.lines().enumerate() {
            for word in words.iter().filter(|word| line.contains(word.as_str())) {
                defects.push(format!("{}:{}: {word}", path.display(), number + 1));
            }
        }
    }
    assert_none(defects);
}

#[test]
fn nothing_names_registries_or_the_build_machine() {
    let words: Vec<String> = [
        ("py", "pi.org"),
        ("files.python", "hosted.org"),
        ("crates", ".io/api"),
        ("index.crates", ".io"),
        ("static.crates", ".io"),
        ("/work", "/main"),
        ("/work", "/shared"),
        ("/tmp", "/oracle"),
        ("/tmp", "/t-"),
        ("/ro", "ot/"),
    ]
    .map(|(left, right)| format!("{left}{right}"))
    .to_vec();
    let mut defects = Vec::new();
    for (path, text) in texts() {
        for word in words.iter().filter(|word| text.contains(word.as_str())) {
            defects.push(format!("{} contains {word}", path.display()));
        }
    }
    assert_none(defects);
}

#[test]
fn unsafe_stays_at_the_border() {
    let keyword = format!("{}{}", "un", "safe");
    let mut defects = Vec::new();
    for (path, text) in texts().filter(|(path, _)| has_extension(path, &["rs"])) {
        let allowed = UNSAFE_ALLOWED.iter().any(|prefix| path.to_string_lossy().starts_with(prefix));
        for (number, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            let used = ["{", "fn", "impl", "extern"].iter().any(|after| code.contains(&format!("{keyword} {after}")));
            if used && !allowed {
                defects.push(format!("{}:{}: {}", path.display(), number + 1, line.trim()));
            }
        }
    }
    assert_none(defects);
}

/// Every name a metric is registered under stands in one module.
#[test]
fn metrics_are_registered_in_one_module() {
    let call = format!(".{}{}", "regis", "ter(\"");
    let elsewhere = texts().filter(|(path, text)| {
        has_extension(path, &["rs"]) && path != Path::new("shared/src/telemetry.rs") && !is_test_module(path) && text.contains(&call)
    });
    assert_none(elsewhere.map(|(path, _)| format!("{} registers a metric", path.display())).collect());
}

/// Every metric has its row in the documentation.
#[test]
fn metrics_are_documented() {
    let call = format!(".{}{}", "regis", "ter(\"");
    let code = std::fs::read_to_string(root().join("shared/src/telemetry.rs")).expect("the module of metrics");
    let page = std::fs::read_to_string(root().join("docs/observing.md")).expect("the page of metrics");
    let names = code.split(&call).skip(1).filter_map(|rest| rest.split('"').next());
    let (known, missing): (Vec<&str>, Vec<&str>) = names.partition(|name| page.contains(&format!("`{name}`")));
    assert!(known.len() > 40, "{known:?}");
    assert_none(missing.into_iter().map(|name| format!("docs/observing.md does not have {name}")).collect());
}

/// Every level has its row in the documentation, up to this build's.
#[test]
fn levels_are_documented() {
    let code = std::fs::read_to_string(root().join("shared/src/version.rs")).expect("the module of levels");
    let page = std::fs::read_to_string(root().join("docs/upgrade.md")).expect("the page of levels");
    let level = code.split("pub const LEVEL: u32 = ").nth(1).and_then(|rest| rest.split(';').next()).expect("this build's level");
    let level: u32 = level.parse().expect("a number");
    let is_row =
        |line: &&str| line.strip_prefix("| ").and_then(|rest| rest.split(' ').next()).is_some_and(|cell| cell.parse::<u32>().is_ok());
    let rows: Vec<&str> = page.lines().filter(is_row).collect();
    assert_eq!(rows.len() as u32, level, "{rows:?}");
    for (row, number) in rows.iter().zip(1..) {
        assert!(row.starts_with(&format!("| {number} | ")) && row.len() > 20, "{row}");
    }
}

#[test]
fn the_licence_is_there() {
    let text = std::fs::read_to_string(root().join("LICENSE")).expect("LICENSE is at the root");
    assert!(text.contains("Apache License") && text.contains("Version 2.0, January 2004"));
    assert!(text.contains("END OF TERMS AND CONDITIONS"), "the whole text");
    let manifest = std::fs::read_to_string(root().join("Cargo.toml")).expect("the workspace has a manifest");
    assert!(manifest.contains("license = \"Apache-2.0\""));
}

/// Targets of `[text](target)` in a Markdown text.
fn links(text: &str) -> impl Iterator<Item = &str> {
    text.match_indices("](").filter_map(|(start, _)| {
        let target = &text[start + 2..];
        target.split_once(')').map(|(target, _)| target.split_whitespace().next().unwrap_or_default())
    })
}

#[test]
fn links_of_the_documentation_lead_somewhere() {
    let root = root();
    let mut defects = Vec::new();
    for (path, text) in texts().filter(|(path, _)| has_extension(path, &["md"])) {
        for link in links(&text) {
            let (file, _anchor) = link.split_once('#').unwrap_or((link, ""));
            if link.contains("://") || link.starts_with("mailto:") || file.is_empty() {
                continue;
            }
            let target = root.join(path.parent().unwrap_or(Path::new(""))).join(file);
            if !target.exists() {
                defects.push(format!("{} links to {link}", path.display()));
            }
        }
    }
    assert_none(defects);
}

#[test]
fn links_are_found() {
    let found: Vec<_> = links("see [a](b.md#c) and [d](https://e.f \"g\"), not (h)").collect();
    assert_eq!(found, ["b.md#c", "https://e.f"]);
}
