//! The built program from outside: what goes to which stream, and how it exits.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// A home folder of its own, and the program in it.
struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Self {
        Home(tempfile::tempdir().expect("a temporary folder"))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_forgectl"));
        command.env_clear().env("FORGE_HOME", self.path()).env("HOME", self.path()).env("NO_PROXY", "*");
        command.args(arguments).current_dir(self.path()).stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Ran {
        Ran::of(self.command(arguments).output().expect("the program starts"), arguments)
    }
}

/// How it ended.
struct Ran {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Ran {
    fn of(output: Output, arguments: &[&str]) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
        let ran = Ran { code: output.status.code().expect("no signal"), stdout: text(output.stdout), stderr: text(output.stderr) };
        assert!(!ran.stderr.contains("panicked"), "{arguments:?}: {}", ran.stderr);
        ran
    }

    fn ok(self) -> String {
        assert_eq!(self.code, 0, "{}", self.stderr);
        self.stdout
    }

    fn json(self) -> Value {
        let text = self.ok();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// Failed with this code, nothing on standard output, and an error that holds all of these.
    fn fails(self, code: i32, expected: &[&str]) {
        assert_eq!(self.code, code, "{}", self.stderr);
        assert_eq!(self.stdout, "", "an error leaves standard output alone");
        assert!(self.stderr.contains("error: "), "{}", self.stderr);
        for part in expected {
            assert!(self.stderr.contains(part), "{part:?} is not in: {}", self.stderr);
        }
    }
}

#[test]
fn every_command_has_help_under_both_names() {
    let home = Home::new();
    let commands = [
        "serve",
        "run",
        "pull",
        "list",
        "show",
        "eval",
        "bench",
        "rm",
        "catalogue",
        "keys",
        "completions",
        "version",
        "cluster",
        "context",
        "apply",
        "get",
        "describe",
        "logs",
        "drain",
        "cordon",
        "uncordon",
        "scale",
        "rollout",
        "delete",
        "top",
    ];
    let overview = home.run(&["--help"]).ok();
    for command in commands {
        assert!(overview.contains(&format!("\n  {command} ")), "{command} is not in the overview");
        let help = home.run(&[command, "--help"]).ok();
        assert!(help.contains(&format!("Usage: forgectl {command}")), "{help}");
    }
    let short = Command::new(env!("CARGO_BIN_EXE_forge")).args(["pull", "--help"]).output().expect("the program starts");
    assert!(String::from_utf8_lossy(&short.stdout).contains("Usage: forge pull"));
}

#[test]
fn wrong_usage_exits_with_2_and_says_what_to_do() {
    let home = Home::new();
    let cases: &[(&[&str], &[&str])] = &[
        (&[], &[]),
        (&["srve"], &["'srve'", "serve"]),
        (&["serve", "--prt", "1"], &["--prt", "--port"]),
        (&["serve", "--port", "70000"], &["--port", "from 0 to 65535"]),
        (&["serve", "--kv-cache-dtype", "f8"], &["f32, f16, bf16"]),
        (&["serve", "--set", "gateway.prt=1"], &["unknown key `gateway.prt`", "help: did you mean `gateway.port`?"]),
        (&["serve", "--set", "port"], &["key=value"]),
        (&["serve", "--dry-run", "--max-step-tokens", "1"], &["spec.maxStepTokens", "maxBatchSize"]),
        (&["serve", "--host", "example.org"], &["--host", "help: write 127.0.0.1"]),
        (&["serve", "--host", "0.0.0.0"], &["without API keys", "help:", "keys create", "--insecure"]),
        (&["serve", "-f", "absent.yaml"], &["cannot read absent.yaml", "help:"]),
        (&["run", "--temperature", "3", "hello there"], &["temperature", "between 0 and 2"]),
        (&["run"], &["standard input is empty", "help:"]),
        (&["rm"], &["<MODELS>"]),
        (&["pull", "no such model"], &["names no model", "help:"]),
        (&["pull", "hf:a/b/c"], &["org/name"]),
        (&["list", "-o", "xml"], &["table", "yaml"]),
        (&["keys", "create", "ci", "--rpm", "0"], &["rpm", "at least 1"]),
        (&["get", "moons"], &["'moons'", "nodes, models, placements"]),
        (&["apply"], &["-f FILE"]),
        (&["scale", "demo", "--replicas", "-1"], &["'-1'", "--replicas", "at least 1"]),
        (&["scale", "demo", "--replicas", "0"], &["at least 1", "forgectl delete NAME"]),
        (&["scale", "demo", "--replicas", "two"], &["'two'", "in digits, such as 2"]),
        (&["context", "use", "absent"], &["no context \"absent\"", "context add"]),
        (&["cluster", "join-token", "--role", "king"], &["no role"]),
        (&["top", "--interval", "0"], &["--interval"]),
        (&["--log-level", "x=y=z", "list"], &["--log-level", "help:"]),
    ];
    for (arguments, expected) in cases {
        let ran = home.run(arguments);
        if arguments.is_empty() {
            assert_eq!(ran.code, 2);
            assert!(ran.stderr.contains("Usage:"), "{}", ran.stderr);
            continue;
        }
        ran.fails(2, expected);
    }
    home.run(&["get", "nodes"]).fails(4, &["no cluster runs", "help:", "forgectl serve", "cluster init"]);
}

#[test]
fn variables_that_are_wrong_are_named() {
    let home = Home::new();
    let with = |name: &str, value: &str, arguments: &[&str]| {
        let output = home.command(arguments).env(name, value).output().expect("the program starts");
        Ran::of(output, arguments)
    };
    with("FORGE_MAX_MODEL_LENGTH", "5", &["serve", "--dry-run"]).fails(2, &["FORGE_MAX_MODEL_LENGTH", "FORGE_MAX_MODEL_LEN`?"]);
    with("FORGE_PORT", "http", &["serve", "--dry-run"]).fails(2, &["FORGE_PORT"]);
    with("FORGE_HOME", "relative", &["list"]).fails(2, &["FORGE_HOME", "full path"]);
    with("FORGE_OFFLINE", "perhaps", &["pull", "gpt2"]).fails(2, &["FORGE_OFFLINE"]);
}

#[test]
fn each_layer_wins_over_the_ones_below() {
    let home = Home::new();
    let file = "apiVersion: forge/v1\nkind: ModelService\nmetadata: {name: demo}\nspec:\n  model: ./file\n  blockSize: 1\n  \
                maxWaiting: 1\n  threads: 1\n  maxBatchSize: 1\n";
    std::fs::write(home.path().join("spec.yaml"), file).expect("writable");
    let arguments = [
        "serve",
        "gpt2",
        "-f",
        "spec.yaml",
        "--threads",
        "3",
        "--max-batch-size",
        "3",
        "--set",
        "maxBatchSize=4",
        "--dry-run",
        "-o",
        "json",
    ];
    let output = home.command(&arguments).env("FORGE_MAX_WAITING", "2").env("FORGE_THREADS", "2").output().expect("starts");
    let service = Ran::of(output, &arguments).json();
    assert_eq!(service["metadata"]["name"], "demo");
    let spec = &service["spec"];
    assert_eq!(spec["model"], "gpt2");
    let numbers: Vec<&Value> = ["blockSize", "maxWaiting", "threads", "maxBatchSize", "maxStepTokens"].map(|key| &spec[key]).into();
    assert_eq!(numbers, [1, 2, 3, 4, 512]);
}

#[test]
fn a_printed_specification_loads_back_in_every_format() {
    let home = Home::new();
    let made = ["serve", "--kv-memory", "1.5GiB", "--cors-origin", "https://a.example,https://b.example", "--dry-run", "-o"];
    let original = home.run(&[&made[..], &["json"]].concat()).json();
    assert_eq!(original["spec"]["model"], "smollm2:135m", "the catalogue's default");
    for format in ["yaml", "toml", "json"] {
        let text = home.run(&[&made[..], &[format]].concat()).ok();
        // Without an extension, so that the format is found by content.
        std::fs::write(home.path().join("spec"), text).expect("writable");
        assert_eq!(home.run(&["serve", "-f", "spec", "--dry-run", "-o", "json"]).json(), original, "{format}");
    }
}

/// Serves one body at every path, on loopback, until the test ends.
fn serve_file(body: Vec<u8>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("bound");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("a connection");
            let mut lines = BufReader::new(stream.try_clone().expect("two handles")).lines();
            let request = lines.next().and_then(|line| line.ok()).unwrap_or_default();
            while lines.next().is_some_and(|line| line.is_ok_and(|line| !line.is_empty())) {}
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
            let body = if request.starts_with("HEAD") { &[][..] } else { &body };
            // The client may have heard enough.
            let _ = stream.write_all(&[head.as_bytes(), body].concat());
        }
    });
    format!("http://{address}/models/tiny.gguf")
}

#[test]
fn a_model_is_pulled_listed_and_removed() {
    let home = Home::new();
    let url = serve_file([b"GGUF".as_slice(), &[7; 5000]].concat());
    assert_eq!(home.run(&["list", "-o", "json"]).json(), serde_json::json!([]));
    assert!(home.run(&["list"]).ok().contains("forgectl pull"));
    let pulled = home.run(&["pull", &url]);
    assert!(pulled.stderr.contains("tiny.gguf"), "progress goes to standard error: {}", pulled.stderr);
    assert!(pulled.ok().contains("sha256:"));
    let listed = home.run(&["ls", "-o", "json"]).json();
    assert_eq!(listed[0]["name"], url.as_str());
    assert_eq!(listed[0]["sizeBytes"], 5004);
    assert!(listed[0]["digest"].as_str().is_some_and(|digest| digest.len() == 71), "{listed}");
    let table = home.run(&["list", "-o", "wide"]).ok();
    assert!(table.starts_with("NAME ") && table.contains("DIGEST"), "{table}");
    home.run(&["show", &url]).fails(1, &["cannot use the model", "GGUF"]);
    assert!(home.run(&["rm", &url]).ok().contains("4.89 KiB freed"));
    home.run(&["rm", &url]).fails(1, &["not in the local store", "help:"]);
    assert_eq!(home.run(&["list", "-o", "json"]).json(), serde_json::json!([]));
}

#[test]
fn sources_that_cannot_be_reached_are_all_told() {
    let home = Home::new();
    let output = home.command(&["pull", "smollm2:135m"]).env("FORGE_OFFLINE", "1").output().expect("starts");
    Ran::of(output, &["pull"]).fails(1, &["smollm2:135m", "FORGE_OFFLINE"]);
    let output = home.command(&["show", "org/name"]).env("FORGE_OFFLINE", "1").output().expect("starts");
    Ran::of(output, &["show"]).fails(1, &["hf:org/name", "FORGE_OFFLINE"]);
}

#[test]
fn the_catalogue_is_listed_and_shown_before_a_pull() {
    let home = Home::new();
    let catalogue = home.run(&["catalogue", "-o", "json"]).json();
    let entries = catalogue.as_array().expect("a list");
    assert!(entries.len() >= 20);
    assert_eq!(entries.iter().filter(|entry| entry["default"] == true).count(), 1);
    let shown = home.run(&["show", "-o", "json"]).json()["status"].clone();
    assert_eq!((&shown["name"], &shown["pulled"]), (&"smollm2:135m".into(), &false.into()));
    assert_eq!(shown["knownFrom"], "catalogue");
    assert!(home.run(&["show"]).ok().contains("the catalogue alone"));
    let yaml = home.run(&["show", "gpt2", "-o", "yaml"]).ok();
    assert!(yaml.contains("architecture: gpt2"), "{yaml}");
}

#[test]
fn a_key_is_shown_once_and_can_be_revoked() {
    let home = Home::new();
    assert!(home.run(&["keys", "list"]).ok().contains("keys create"));
    let created = home.run(&["keys", "create", "ci", "--rpm", "60", "--tpm", "1000"]);
    let key = created.ok().trim().to_owned();
    assert!(key.starts_with("sk-forge-") && !key.contains('\n'), "only the key is on standard output: {key}");
    home.run(&["keys", "create", "ci"]).fails(1, &["\"ci\""]);
    let listed = home.run(&["keys", "list", "-o", "json"]).json();
    assert_eq!(listed[0]["requestsPerMinute"], 60);
    let text = listed.to_string() + &std::fs::read_to_string(home.path().join("keys.json")).expect("a key file");
    assert!(!text.contains(&key) && !text.contains(&key[key.len() - 64..]), "the secret is nowhere");
    assert!(!listed.to_string().contains("hash") && !listed.to_string().contains("salt"));
    assert!(home.run(&["keys", "revoke", "ci"]).ok().contains("revoked ci"));
    home.run(&["keys", "revoke", "ci"]).fails(1, &["no key", "keys list"]);
    assert!(home.run(&["keys", "list"]).ok().contains("revoked"));
    let second = home.run(&["keys", "create", "ci", "-o", "json"]).json();
    assert!(second["key"].as_str().is_some_and(|key| key.starts_with("sk-forge-")));
}

#[test]
fn a_port_in_use_is_named_before_anything_is_pulled() {
    let home = Home::new();
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = taken.local_addr().expect("bound").port().to_string();
    home.run(&["serve", "--port", &port]).fails(1, &[&format!("port {port}"), "help:", "--port"]);
    home.run(&["serve", "--port", "0", "--metrics-port", &port]).fails(1, &["--metrics-port"]);
    assert!(!home.path().join("models").join("snapshots").read_dir().is_ok_and(|mut files| files.next().is_some()));
}

/// Sends a byte of a gigabyte now and then, or after the first none at all.
fn serve_slowly(silent: bool) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("bound");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("a connection");
            std::thread::spawn(move || {
                let mut lines = BufReader::new(stream.try_clone().expect("two handles")).lines();
                while lines.next().is_some_and(|line| line.is_ok_and(|line| !line.is_empty())) {}
                let mut sent = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\nG");
                while sent.is_ok() {
                    std::thread::sleep(Duration::from_millis(100));
                    sent = if silent { Ok(()) } else { stream.write_all(b"G") };
                }
            });
        }
    });
    format!("http://{address}/models/tiny.gguf")
}

#[test]
fn a_signal_ends_a_pull_soon_and_ports_stay_free_until_it_is_done() {
    let free = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = free.local_addr().expect("bound").port().to_string();
    drop(free);
    let serve = ["serve", "--port", "0", "--metrics-port", &port];
    for (command, signal, silent) in [
        (&["pull"][..], "INT", false),
        (&["pull"], "INT", true),
        (&serve, "INT", false),
        (&serve, "INT", true),
        (&serve, "TERM", false),
        (&serve, "INT", true),
        (&["run"], "INT", false),
    ] {
        let home = Home::new();
        let url = serve_slowly(silent);
        let mut arguments = [command, &[url.as_str()]].concat();
        if command == ["run"] {
            arguments.push("Hi");
        }
        let mut child = home.command(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
        let mut errors = BufReader::new(child.stderr.take().expect("piped"));
        let mut said = String::new();
        while !said.contains("source: ") {
            assert!(errors.read_line(&mut said).expect("UTF-8") > 0, "{arguments:?} ended by itself: {said}");
        }
        std::thread::sleep(Duration::from_millis(300));
        let probe = TcpStream::connect(("127.0.0.1", port.parse::<u16>().expect("a port")));
        assert!(probe.is_err(), "{arguments:?} accepts what it cannot answer");
        let signalled = Instant::now();
        let kill = Command::new("kill").args([&format!("-{signal}"), &child.id().to_string()]).status();
        assert!(kill.expect("kill is there").success());
        errors.read_to_string(&mut said).expect("UTF-8");
        let status = child.wait().expect("ends");
        assert!(signalled.elapsed() < Duration::from_secs(3), "{arguments:?}: {:?}", signalled.elapsed());
        assert_eq!(status.code(), Some(1), "{arguments:?}: {said}");
        assert!(said.contains("error: "), "{said}");
    }
}

#[test]
fn a_reader_that_leaves_early_is_no_error() {
    let home = Home::new();
    let mut child = home.command(&["catalogue", "-o", "json"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
    drop(child.stdout.take());
    let status = child.wait().expect("ends");
    let mut stderr = String::new();
    child.stderr.take().expect("piped").read_to_string(&mut stderr).expect("UTF-8");
    assert!(status.success() && stderr.is_empty(), "{status}: {stderr}");
}

#[test]
fn completions_are_for_the_name_it_was_called_by() {
    let home = Home::new();
    for shell in ["bash", "zsh", "fish", "powershell"] {
        assert!(home.run(&["completions", shell]).ok().contains("forgectl"), "{shell}");
    }
    let short = Command::new(env!("CARGO_BIN_EXE_forge")).args(["completions", "bash"]).output().expect("starts");
    let script = String::from_utf8_lossy(&short.stdout).into_owned();
    assert!(script.contains("_forge()") && !script.contains("forgectl"), "{script}");
}

#[test]
fn the_version_is_told_as_text_and_data() {
    let home = Home::new();
    assert_eq!(home.run(&["--version"]).ok(), format!("forgectl {}\n", env!("CARGO_PKG_VERSION")));
    let version = home.run(&["version", "-o", "json"]).json();
    assert_eq!(version["apiVersion"], "forge/v1");
    assert_eq!(version["home"], home.path().to_str().expect("UTF-8"));
}
