//! `show` from outside: what it prints is a configuration, and of a hub repository it fetches headers only.

#[path = "../../worker/store/tests/common/mod.rs"]
mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use common::{Fault, Server};
use serde_json::Value;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
}

fn command(home: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_forgectl"));
    command.env_clear().env("FORGE_HOME", home).env("HOME", home).env("NO_PROXY", "*");
    command.args(arguments).current_dir(home).stdin(Stdio::null());
    command
}

fn text(output: Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn run(home: &Path, arguments: &[&str]) -> String {
    text(command(home, arguments).output().expect("the program starts"))
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).expect("JSON")
}

#[test]
fn what_show_prints_loads_back_unchanged() {
    let home = tempfile::tempdir().expect("a temporary folder");
    let model = fixture("eval/model").display().to_string();
    let flags = ["--max-model-len", "48", "--kv-cache-dtype", "bf16", "--rope-scaling", "type=yarn,factor=2,original=64"];
    for format in ["json", "yaml"] {
        let shown = run(home.path(), &[&["show", &model, "-o", format], &flags[..]].concat());
        let file = home.path().join(format!("service.{format}"));
        std::fs::write(&file, &shown).expect("writable");
        let file = file.to_str().expect("UTF-8");
        assert_eq!(run(home.path(), &["show", "-f", file, "-o", format]), shown, "{format}");
        // The same wish is served as with the flags themselves.
        let served = json(&run(home.path(), &["serve", "-f", file, "--dry-run", "-o", "json"]));
        let meant = json(&run(home.path(), &[&["serve", &model, "--dry-run", "-o", "json"], &flags[..]].concat()));
        assert_eq!(served, meant);
        assert_eq!(
            (&served["spec"]["maxModelLen"], &served["spec"]["ropeScaling"]),
            (&48.into(), &"type=yarn,factor=2,original=64".into())
        );
    }
    let shown = json(&run(home.path(), &[&["show", &model, "-o", "json"], &flags[..]].concat()));
    assert_eq!(shown["kind"], "ModelService");
    assert_eq!(shown["status"]["contextLength"], 128, "extended twice");
    assert_eq!(shown["status"]["layout"]["layers"], 2);
}

#[test]
fn overrides_a_model_cannot_take_are_refused_by_name() {
    let home = tempfile::tempdir().expect("a temporary folder");
    let model = fixture("eval/model").display().to_string();
    for (flags, code, expected) in [
        (["--rope-scaling", "type=magic,factor=2"], 2, "--rope-scaling (spec.ropeScaling)"),
        (["--rope-scaling", "factor=2"], 2, "type is missing"),
        (["--rope-scaling", "type=yarn,factor=1e30"], 2, "error: --rope-scaling (spec.ropeScaling): context_length is "),
        (["--arch", "lama"], 2, "no family is called `lama`; did you mean `llama`?"),
        (["--arch", "gpt2"], 2, "lacks transformer.wte.weight"),
        (["--arch", "gpt2"], 2, "help: the files themselves say llama"),
        (["--sliding-window", "x"], 2, "--sliding-window"),
    ] {
        for command_name in ["show", "serve"] {
            let dry = if command_name == "serve" { &["--dry-run"][..] } else { &[] };
            let output = command(home.path(), &[&[command_name, &model], &flags[..], dry].concat()).output().expect("starts");
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(code), "{command_name} {flags:?}: {stderr}");
            assert!(stderr.contains(expected), "{command_name} {flags:?}: {stderr}");
        }
    }
    // One that fits by its tensors is taken, and said so.
    let output = command(home.path(), &["show", &model, "--arch", "mistral"]).output().expect("starts");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && stderr.contains("the files say llama, and --arch has them read as mistral"), "{stderr}");
    let windowed = run(home.path(), &["show", &model, "--sliding-window", "16", "--arch", "llama", "-o", "json"]);
    assert_eq!(json(&windowed)["spec"]["slidingWindow"], 16);
}

#[test]
fn a_dry_run_checks_files_and_memory() {
    let home = tempfile::tempdir().expect("a temporary folder");
    let model = fixture("eval/model").display().to_string();
    for (arguments, code, expected) in
        [(["--max-model-len", "65"], 2, "--max-model-len (spec.maxModelLen)"), (["--kv-memory", "1000TiB"], 3, "does not fit")]
    {
        let output = command(home.path(), &[&["serve", &model, "--dry-run"], &arguments[..]].concat()).output().expect("starts");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{stderr}");
        assert!(stderr.contains(expected) && output.stdout.is_empty(), "{stderr}");
    }
    let output = command(home.path(), &["serve", "gpt2", "--dry-run"]).output().expect("starts");
    assert!(String::from_utf8_lossy(&output.stderr).contains("not here yet") && output.status.success());
}

#[test]
fn of_a_hub_repository_only_headers_are_fetched() {
    let server = Server::start();
    let read = |name: &str| std::fs::read(fixture(name)).expect("the fixture is there");
    let weights = read("model/llama/model.safetensors");
    server.put_repo(
        "org/folder",
        &[("config.json", &read("model/llama/config.json")), ("model.safetensors", &weights), ("tokenizer.json", b"not fetched")],
    );
    server.put_repo("org/file", &[("tiny.f32.gguf", &read("model/gguf/llama-f32.gguf"))]);
    let path = server.resolve_path("org/folder", "model.safetensors");
    server.with_faults(&path, vec![Fault::CutAfter(100), Fault::Status(503, "")]);
    let home = tempfile::tempdir().expect("a temporary folder");
    let show = |arguments: &[&str]| {
        let output = command(home.path(), arguments).env("HF_ENDPOINT", &server.url).output().expect("the program starts");
        text(output)
    };
    let folder = json(&show(&["show", "org/folder", "-o", "json"]))["status"].clone();
    assert_eq!((&folder["architecture"], &folder["pulled"], &folder["quantization"]), (&"llama".into(), &false.into(), &"F32".into()));
    assert_eq!((&folder["licence"], &folder["layout"]["layers"]), (&"apache-2.0".into(), &3.into()));
    assert!(folder["memory"]["weightsBytes"].as_u64() > Some(100_000) && folder["sizeBytes"].as_u64() > Some(200_000), "{folder}");
    assert!(server.seen(&server.resolve_path("org/folder", "tokenizer.json")).is_empty());
    let local = json(&run(home.path(), &["show", fixture("eval/model").to_str().expect("UTF-8"), "-o", "json"]));
    assert_eq!(local["status"]["pulled"], true);
    let table = show(&["show", "hf:org/file"]);
    for part in ["GGUF: 3 layers", "memory", "theta 10000", "window", "beginnings of its files", "here", "forgectl pull hf:org/file"] {
        assert!(table.contains(part), "{part:?} is not in: {table}");
    }
    assert!(run(home.path(), &["list", "-o", "json"]).starts_with("[]"), "nothing was stored");
}
