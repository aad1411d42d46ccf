//! `serve` and `run` with a tiny model in a local folder: the whole system in one process, from outside.
//!
//! The weights are the parity suite's; their tokenizer is made here, one token per printable character.

mod cluster;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::Duration;

use serde_json::{Map, Value, json};

const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/model/llama");

/// A home folder with the model in its subfolder `tiny`.
struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Self {
        let home = tempfile::tempdir().expect("a temporary folder");
        let model = home.path().join("tiny");
        std::fs::create_dir(&model).expect("writable");
        for file in ["config.json", "model.safetensors"] {
            std::fs::copy(Path::new(FIXTURE).join(file), model.join(file)).expect("the fixture is there");
        }
        std::fs::write(model.join("tokenizer.json"), tokenizer().to_string()).expect("writable");
        let template = "{% for message in messages %}{{ message.content }}{% endfor %}";
        std::fs::write(model.join("chat_template.jinja"), template).expect("writable");
        Home(home)
    }

    /// A command that runs no model.
    fn program(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_forgectl"));
        command.env_clear().env("FORGE_HOME", self.0.path()).env("HOME", self.0.path()).env("FORGE_OFFLINE", "1");
        command.args(arguments).current_dir(self.0.path()).stdin(Stdio::null());
        command
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.program(arguments);
        command.args(["--threads", "1"]);
        command
    }

    fn output(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("the program starts")
    }

    /// Serves the model on free ports and waits until it is ready.
    fn serve(&self, arguments: &[&str], variables: &[(&str, &str)]) -> Server {
        self.serve_what(&["./tiny"], arguments, variables)
    }

    fn serve_what(&self, what: &[&str], arguments: &[&str], variables: &[(&str, &str)]) -> Server {
        let all = [&["serve", "--port", "0", "--metrics-port", "0"], what, arguments].concat();
        let mut child = self
            .command(&all)
            .envs(variables.iter().copied())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let mut lines = BufReader::new(child.stdout.take().expect("piped"));
        let mut banner = String::new();
        while !banner.contains("Ctrl-C stops it") {
            let read = lines.read_line(&mut banner).expect("UTF-8");
            assert!(read > 0, "it ended before it was ready: {banner}{}", rest(&mut child));
        }
        Server { child, _stdout: lines, banner }
    }
}

/// What it wrote to standard error until it ended.
fn rest(child: &mut Child) -> String {
    let mut text = String::new();
    child.stderr.take().expect("piped").read_to_string(&mut text).expect("UTF-8");
    text
}

/// One token per printable character, for a vocabulary of 96.
fn tokenizer() -> Value {
    let mut vocabulary = Map::new();
    for (id, token) in ["\u{120}".to_owned(), "<s>".into(), "</s>".into()]
        .into_iter()
        .chain((b'!'..b'~').map(|byte| char::from(byte).to_string()))
        .enumerate()
    {
        vocabulary.insert(token, json!(id));
    }
    let special = |id: u32, content: &str| json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false});
    json!({
        "version": "1.0",
        "added_tokens": [special(1, "<s>"), special(2, "</s>")],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [], "ignore_merges": false}
    })
}

struct Server {
    child: Child,
    /// Kept open: a closed pipe would be another test.
    _stdout: BufReader<ChildStdout>,
    banner: String,
}

impl Server {
    /// `host:port` of a line of the banner.
    fn address(&self, name: &str) -> String {
        let line = self.banner.lines().find(|line| line.trim_start().starts_with(name)).expect("in the banner");
        let (_, url) = line.split_once("http://").expect("an address");
        url.split('/').next().expect("host and port").to_owned()
    }

    fn request(&self, name: &str, request: &str, body: &str) -> (u16, String) {
        self.request_with(name, request, "", body)
    }

    fn request_with(&self, name: &str, request: &str, headers: &str, body: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.address(name)).expect("it listens");
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a valid time");
        let length = body.len();
        let head = format!(
            "{request} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{headers}content-type: application/json\r\ncontent-length: {length}\r\n\r\n"
        );
        stream.write_all((head + body).as_bytes()).expect("it reads");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("UTF-8");
        let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status line");
        (status, answer)
    }

    fn signal(&self, name: &str) {
        let status = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status();
        assert!(status.expect("kill is there").success());
    }

    /// Waits for its end: the exit code and standard error.
    fn end(mut self) -> (i32, String) {
        let stderr = rest(&mut self.child);
        let status = self.child.wait().expect("it ends");
        (status.code().expect("ended by itself"), stderr)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // A test that failed leaves it running; one that passed has seen its end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_server_answers_and_ends_by_a_signal() {
    let home = Home::new();
    let server = home.serve(&[], &[]);
    for part in ["tiny (llama", "64 tokens", "/v1/chat/completions", "any key is accepted"] {
        assert!(server.banner.contains(part), "{part:?} is not in: {}", server.banner);
    }
    let (status, models) = server.request("API", "GET /v1/models", "");
    assert!(status == 200 && models.contains("\"id\":\"tiny\""), "{models}");
    let path = home.0.path().join("tiny").canonicalize().expect("it is there").display().to_string();
    assert!(!models.contains(&path) && !server.banner.contains(&path), "a path of the machine is no client's matter: {models}");
    let body = json!({"model": path, "prompt": "Hi", "max_tokens": 1}).to_string();
    assert_eq!(server.request("API", "POST /v1/completions", &body).0, 200, "but it is a name that is known");
    assert_eq!(server.request("metrics", "GET /readyz", "").0, 200);
    let (status, metrics) = server.request("metrics", "GET /metrics", "");
    assert!(status == 200 && metrics.contains("forge_"), "{metrics}");
    let body = r#"{"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}"#;
    let (status, answer) = server.request("API", "POST /v1/chat/completions", body);
    assert!(status == 200 && answer.contains("\"assistant\""), "{answer}");
    server.signal("TERM");
    let (code, stderr) = server.end();
    assert_eq!(code, 0, "{stderr}");
    assert!(stderr.contains("draining"), "{stderr}");
}

#[test]
fn flags_reach_the_engine_and_the_gateway() {
    let home = Home::new();
    let server = home.serve(&["--model-name", "mine", "--max-model-len", "32", "--set", "kvCacheDtype=f32"], &[]);
    assert!(server.banner.contains("32 tokens") && server.banner.contains("in f32"), "{}", server.banner);
    let body = format!(r#"{{"model": "mine", "prompt": "{}", "max_tokens": 4}}"#, "a".repeat(40));
    let (status, answer) = server.request("API", "POST /v1/completions", &body);
    assert!(status == 400 && answer.contains("context_length_exceeded"), "{answer}");
    server.signal("INT");
    assert_eq!(server.end().0, 0);
}

#[test]
fn a_wish_that_does_not_fit_exits_with_3_and_the_nearest_that_does() {
    let home = Home::new();
    for (arguments, expected) in
        [(["--kv-memory", "1000TiB"], "help: this would fit: --kv-memory "), (["--set", "layout.tensor=3"], "--set layout.tensor=1")]
    {
        let output = home.output(&[&["serve", "./tiny", "--port", "0", "--metrics-port", "0"][..], &arguments].concat());
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{arguments:?}: {stderr}");
        assert!(stderr.contains(expected) && stderr.contains("help:"), "{stderr}");
    }
}

#[test]
fn a_model_divided_among_ranks_answers_as_a_whole_one() {
    let home = Home::new();
    let body = r#"{"model": "mine", "prompt": "abcdefg", "max_tokens": 12, "seed": 5, "temperature": 0.9, "logprobs": 2}"#;
    let answer = |layout: &[&str]| {
        let server = home.serve(&[&["--model-name", "mine"][..], layout].concat(), &[]);
        let (status, answer) = server.request("API", "POST /v1/completions", body);
        assert_eq!(status, 200, "{answer}");
        server.signal("INT");
        assert_eq!(server.end().0, 0);
        let (_, body) = answer.split_once("\r\n\r\n").expect("a body");
        let answer: Value = serde_json::from_str(body).expect("JSON");
        (answer["choices"].clone(), answer["system_fingerprint"].clone())
    };
    let whole = answer(&[]);
    for layout in [&["--set", "layout.tensor=2"][..], &["--set", "layout.pipeline=2", "--set", "layout.tensor=2"]] {
        assert_eq!(answer(layout), whole, "{layout:?}");
    }
}

#[test]
fn replicas_that_do_not_all_fit_are_refused_with_how_many_do() {
    let home = Home::new();
    let memory = std::fs::read_to_string("/proc/meminfo").expect("this system has it");
    let line = memory.lines().find(|line| line.starts_with("MemAvailable:")).expect("it is there");
    let available_kib: u64 = line.split_whitespace().nth(1).expect("a number").parse().expect("a number");
    // One takes half of what there is and more, two do not fit.
    let kv_memory = format!("{}KiB", available_kib / 100 * 55);
    let arguments = ["serve", "./tiny", "--port", "0", "--metrics-port", "0", "--kv-memory", &kv_memory, "--set", "replicas=2"];
    for arguments in [&arguments[..], &[&arguments[..], &["--dry-run"]].concat()] {
        let output = home.output(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{stderr}");
        assert!(stderr.contains("this would fit: --set replicas=1"), "{stderr}");
    }
}

#[test]
fn a_length_beyond_the_context_is_a_wrong_setting_and_not_a_small_machine() {
    let home = Home::new();
    let output = home.output(&["serve", "./tiny", "--port", "0", "--metrics-port", "0", "--max-model-len", "65"]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    for part in ["error: --max-model-len", "65 is beyond the model's context of 64 tokens", "fit: --max-model-len 64", "--rope-scaling"] {
        assert!(stderr.contains(part), "{part:?} is not in: {stderr}");
    }
}

#[test]
fn a_folder_that_is_no_model_is_refused_by_name() {
    let home = Home::new();
    std::fs::remove_file(home.0.path().join("tiny/tokenizer.json")).expect("it was there");
    let output = home.output(&["run", "./tiny", "Hi"]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("error: cannot use the model") && stderr.contains("tokenizer.json"), "{stderr}");
    assert!(output.stdout.is_empty());
}

/// Arguments of a greedy answer of a dozen tokens.
const ASK: [&str; 8] = ["run", "--temperature", "0", "--max-tokens", "12", "--log-level", "error", "./tiny"];

#[test]
fn one_answer_goes_to_standard_output_and_nothing_else_does() {
    let home = Home::new();
    let first = home.output(&[&ASK[..], &["Hi", "there"]].concat());
    assert!(first.status.success(), "{}", String::from_utf8_lossy(&first.stderr));
    let answer = String::from_utf8(first.stdout).expect("UTF-8");
    assert!(answer.len() > 1 && answer.ends_with('\n'), "{answer:?}");
    let mut piped = home.command(&ASK).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
    piped.stdin.take().expect("piped").write_all(b"Hi there\n").expect("it reads");
    let output = piped.wait_with_output().expect("ends");
    assert_eq!(String::from_utf8_lossy(&output.stdout), answer, "a pipe asks the same as arguments");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "", "no noise in a pipe");
    let verbose = home.output(&[&["run", "--verbose"], &ASK[1..], &["Hi", "there"]].concat());
    assert_eq!(String::from_utf8_lossy(&verbose.stdout), answer);
    assert!(String::from_utf8_lossy(&verbose.stderr).contains("tokens/s"));
}

#[test]
fn a_prompt_beyond_the_context_is_refused_with_the_numbers() {
    let home = Home::new();
    let output = home.output(&["run", "./tiny", &"a".repeat(100)]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("100 tokens") && stderr.contains("64") && stderr.contains("help:"), "{stderr}");
}

/// Faults are compiled into debug builds only.
#[cfg(debug_assertions)]
mod faults {
    use std::time::Instant;

    use super::*;

    #[test]
    fn an_answer_survives_its_engine_unchanged() {
        let home = Home::new();
        let calm = home.output(&[&ASK[..], &["Hi there"]].concat());
        let arguments = [&ASK[..], &["Hi there"]].concat();
        let shaken = home.command(&arguments).env("FORGE_FAULT", "engine-panic-at-step:5").output().expect("starts");
        let stderr = String::from_utf8_lossy(&shaken.stderr);
        assert!(shaken.status.success() && stderr.contains("injected fault at step 5"), "{stderr}");
        assert_eq!(shaken.stdout, calm.stdout);
    }

    #[test]
    fn an_answer_that_kills_every_engine_ends_the_program() {
        let home = Home::new();
        let arguments = [&ASK[..], &["Hi there"]].concat();
        let started = Instant::now();
        let output = home.command(&arguments).env("FORGE_FAULT", "engine-panic-every:1").output().expect("starts");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains("error: ") && stderr.contains("died"), "{stderr}");
        assert!(started.elapsed() < Duration::from_secs(30), "it waited for an engine that does not come");
    }

    #[test]
    fn an_engine_that_cannot_come_back_ends_the_server_with_1() {
        let home = Home::new();
        let mut server = home.serve(&[], &[("FORGE_FAULT", "engine-panic-every:1")]);
        let address = server.address("API");
        let body = r#"{"model": "tiny", "prompt": "Hi", "max_tokens": 4}"#;
        let (status, answer) = server.request("API", "POST /v1/completions", body);
        assert!(status >= 500, "{answer}");
        // One request may kill two engines and not the server. More of them end it; one that comes while an engine
        // is restarted kills none, and one that comes at the end hears nothing.
        let deadline = Instant::now() + Duration::from_secs(60);
        while server.child.try_wait().expect("our child").is_none() {
            assert!(Instant::now() < deadline, "it still serves");
            if let Ok(mut stream) = TcpStream::connect(&address) {
                stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a valid time");
                let head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json";
                let sent = write!(stream, "{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
                let _ = sent.and_then(|()| stream.read_to_end(&mut Vec::new()));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        let (code, stderr) = server.end();
        assert_eq!(code, 1, "{stderr}");
        assert!(stderr.contains("error: ") && stderr.contains("given up"), "{stderr}");
    }
}
