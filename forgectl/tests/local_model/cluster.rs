//! The cluster inside `serve`, as other commands with the same home see it.

use std::io::Read;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::{Home, Server};

/// For anything that must happen.
const SOON: Duration = Duration::from_secs(60);

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

impl Home {
    fn run(&self, arguments: &[&str]) -> Output {
        self.program(arguments).output().expect("the program starts")
    }

    /// Standard output of a command that succeeds.
    fn told(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    fn listed(&self, kind: &str) -> Vec<Value> {
        let listed: Value = serde_json::from_str(&self.told(&["get", kind, "-o", "json"])).expect("JSON");
        listed.as_array().expect("a list").clone()
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.0.path().join(name), text).expect("writable");
    }

    /// Folders of embedded clusters.
    fn folders(&self) -> usize {
        let entries = std::fs::read_dir(self.0.path().join("local")).expect("it is there");
        entries.filter(|entry| entry.as_ref().is_ok_and(|entry| entry.path().is_dir())).count()
    }
}

fn completion(server: &Server, model: &str) -> (u16, String) {
    let body = json!({"model": model, "prompt": "Hi", "max_tokens": 3}).to_string();
    server.request("API", "POST /v1/completions", &body)
}

fn soon(what: &str, is_so: impl Fn() -> bool) {
    let until = Instant::now() + SOON;
    while !is_so() {
        assert!(Instant::now() < until, "{what}: not in time");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn other_commands_see_change_and_add_to_what_is_served() {
    let home = Home::new();
    let model = home.0.path().join("tiny");
    let document = |name: &str| {
        format!("apiVersion: forge/v1\nkind: ModelService\nmetadata:\n  name: {name}\nspec:\n  model: {}\n  threads: 1\n", model.display())
    };
    home.write("first.yaml", &document("first"));
    home.write("second.yaml", &document("second"));
    let server = home.serve_what(&["-f", "first.yaml"], &[], &[]);
    assert!(server.banner.contains("first (llama") && server.banner.contains("forgectl get"), "{}", server.banner);
    assert_eq!(completion(&server, "first").0, 200);

    assert!(home.told(&["get", "models"]).contains("1/1       running"));
    let nodes = home.told(&["get", "nodes"]);
    assert!(nodes.contains("local") && nodes.contains("worker") && nodes.contains("gateway"), "{nodes}");
    let placed = home.listed("placements");
    assert_eq!(placed.len(), 1, "{placed:?}");
    let first = &placed[0];
    assert_eq!((&first["replica"], &first["node"], &first["state"]), (&json!("first/0"), &json!("local"), &json!("ready")), "{first}");
    assert!(
        first["memory"]["totalBytes"].as_u64().is_some_and(|bytes| bytes > first["memory"]["kvBytes"].as_u64().unwrap_or(0)),
        "{first}"
    );
    assert!(home.told(&["describe", "model", "first"]).contains("first"));
    for kind in ["nodes", "models", "placements", "events"] {
        let text = home.told(&["get", kind, "-o", "json"]);
        let snake = text.lines().find(|line| line.split(':').next().is_some_and(|key| key.contains('"') && key.contains('_')));
        assert_eq!(snake, None, "one casing in {kind}");
    }
    // What there is not is named with what there is.
    for (arguments, names) in
        [(["describe", "node", "locla"], "there are: local, gateway"), (["get", "models", "frist"], "there are: first")]
    {
        let output = home.run(&arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert!(text(&output.stderr).contains(names), "{}", text(&output.stderr));
    }
    let output = home.run(&["delete", "node", "local"]);
    assert!(text(&output.stderr).contains("it lives") && !text(&output.stderr).contains("exists"), "{}", text(&output.stderr));
    assert!(home.told(&["logs", "first"]).contains("model loaded"));
    // With the next heartbeat.
    soon("its load", || home.told(&["top", "-n", "1"]).contains("first/0"));

    home.told(&["scale", "first", "--replicas", "2"]);
    soon("two replicas", || home.told(&["get", "models"]).contains("2/2"));
    assert_eq!(home.listed("placements").len(), 2);
    home.told(&["apply", "-f", "second.yaml", "--wait", "running"]);
    soon("the second model", || completion(&server, "second").0 == 200);
    assert_eq!(completion(&server, "first").0, 200);
    assert!(home.told(&["apply", "-f", "second.yaml"]).contains("unchanged"));
    let applied: Value = serde_json::from_str(&home.told(&["apply", "-f", "second.yaml", "-o", "json"])).expect("JSON");
    assert_eq!((&applied["name"], &applied["changed"], &applied["reached"]), (&json!("second"), &json!(false), &json!("submitted")));
    let planned: Value = serde_json::from_str(&home.told(&["apply", "-f", "second.yaml", "--dry-run", "-o", "json"])).expect("JSON");
    assert_eq!((&planned["changes"], &planned["placements"][0]["state"]), (&json!(false), &json!("planned")), "{planned}");
    let refused = home.run(&["apply", "-f", "second.yaml", "--dry-run", "--set", "model=./nowhere"]);
    let said = text(&refused.stderr);
    assert!(refused.status.code() == Some(2) && said.contains("spec.model") && !said.contains("protocol"), "{said}");

    home.told(&["delete", "first"]);
    soon("the end of the first model", || completion(&server, "first").0 == 404);
    assert_eq!(completion(&server, "second").0, 200, "an operator's deletion ends nothing else");
    server.signal("TERM");
    let (code, stderr) = server.end();
    assert_eq!(code, 0, "{stderr}");

    let output = home.run(&["get", "models"]);
    assert_eq!(output.status.code(), Some(4), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("forgectl serve"), "{}", text(&output.stderr));
    assert_eq!(home.folders(), 0);
}

#[test]
fn what_a_killed_server_left_misleads_nobody() {
    let home = Home::new();
    let mut killed = home.serve(&[], &[]);
    killed.child.kill().expect("it runs");
    killed.child.wait().expect("it ended");
    let began = Instant::now();
    let output = home.run(&["get", "nodes"]);
    assert_eq!(output.status.code(), Some(4), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("forgectl serve") && began.elapsed() < Duration::from_secs(10));
    assert_eq!(home.folders(), 1);
    let next = home.serve(&[], &[]);
    assert_eq!(home.folders(), 1, "the next removes what was left");
    assert!(home.told(&["get", "models"]).contains("running"));
    next.signal("TERM");
    assert_eq!(next.end().0, 0);
}

#[test]
fn two_servers_of_one_home_do_not_meet_and_each_has_a_context() {
    let home = Home::new();
    let first = home.serve(&["--model-name", "one"], &[]);
    let second = home.serve(&["--model-name", "two"], &[]);
    assert_eq!((completion(&first, "one").0, completion(&first, "two").0), (200, 404));
    assert_eq!((completion(&second, "two").0, completion(&second, "one").0), (200, 404));
    let (one, two) = (first.address("API"), second.address("API"));
    assert!(!first.banner.contains("--context") && second.banner.contains("--context local-2"), "{}", second.banner);
    let nodes = |arguments: &[&str]| home.told(&[&["get", "nodes", "-o", "json"], arguments].concat());
    assert!(nodes(&[]).contains(&one), "the one that began first is meant");
    assert!(nodes(&["--context", "local"]).contains(&one) && nodes(&["--context", "local-2"]).contains(&two));
    first.signal("TERM");
    assert_eq!(first.end().0, 0);
    assert!(nodes(&[]).contains(&two), "it took only its own away");
    assert_eq!(home.run(&["get", "nodes", "--context", "local"]).status.code(), Some(4));
    let third = home.serve(&["--model-name", "three"], &[]);
    assert!(nodes(&["--context", "local"]).contains(&third.address("API")), "the name is free again");
    assert!(nodes(&["--context", "local-2"]).contains(&two));
    third.signal("TERM");
    assert_eq!(third.end().0, 0);
    second.signal("TERM");
    assert_eq!(second.end().0, 0);
    assert_eq!(home.run(&["get", "nodes"]).status.code(), Some(4));
}

#[test]
fn keys_of_this_machine_and_of_the_cluster_both_open() {
    let home = Home::new();
    let key = |arguments: &[&str]| home.told(arguments).trim().to_owned();
    let own = key(&["keys", "create", "own"]);
    let server = home.serve(&[], &[]);
    let ask = |key: &str| {
        let header = if key.is_empty() { String::new() } else { format!("authorization: Bearer {key}\r\n") };
        let body = r#"{"model": "tiny", "prompt": "Hi", "max_tokens": 1}"#;
        server.request_with("API", "POST /v1/completions", &header, body).0
    };
    assert_eq!((ask(""), ask(&own)), (401, 200));
    let told = key(&["keys", "create", "--cluster", "told", "--context", "local"]);
    let forgotten = home.run(&["keys", "create", "oops", "--context", "local"]);
    assert!(forgotten.status.code() == Some(2) && text(&forgotten.stderr).contains("--cluster"), "{}", text(&forgotten.stderr));
    assert!(home.told(&["keys", "--cluster", "list", "--context", "local"]).contains("told"));
    soon("the cluster's key", || ask(&told) == 200);
    assert_eq!(ask(&own), 200, "the cluster's keys take none of the machine's away");
    home.told(&["keys", "revoke", "own"]);
    soon("the revocation", || ask(&own) == 401);
    assert_eq!(ask(&told), 200);
    server.signal("TERM");
    assert_eq!(server.end().0, 0);
}

#[test]
fn a_backup_begins_a_coordinator_that_does_not_run() {
    let home = Home::new();
    let server = home.serve(&[], &[]);
    home.told(&["cluster", "backup", "saved", "--context", "local"]);
    server.signal("TERM");
    assert_eq!(server.end().0, 0);
    home.told(&["cluster", "init", "--dir", "c1", "--cluster", "local", "--context", "restored"]);
    let refused = |arguments: &[&str], expected: &str| {
        let output = home.run(arguments);
        assert!(!output.status.success() && text(&output.stderr).contains(expected), "{}", text(&output.stderr));
    };
    let whole = std::fs::read(home.0.path().join("saved")).expect("it was written");
    std::fs::write(home.0.path().join("cut"), &whole[..whole.len() - 1]).expect("writable");
    refused(&["cluster", "restore", "cut", "--dir", "c1"], "it was cut off");
    refused(&["cluster", "restore", "saved", "--dir", "elsewhere"], "elsewhere/coordinator.yaml");
    let told = home.told(&["cluster", "restore", "saved", "--dir", "c1"]);
    assert!(told.contains("restored cluster local as of revision"), "{told}");
    refused(&["cluster", "restore", "saved", "--config", "c1/coordinator.yaml"], "not empty");
}

/// Faults are compiled into debug builds only.
#[cfg(debug_assertions)]
#[test]
fn a_stop_while_it_loads_ends_it_and_probes_say_that_it_is_not_ready() {
    let home = Home::new();
    let mut command = home.command(&["serve", "./tiny", "--port", "0", "--metrics-port", "0"]);
    command.env("FORGE_FAULT", "load-takes-ms:3000").stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program starts");
    soon("its cluster", || home.run(&["get", "models"]).status.success());
    let nodes = home.listed("nodes");
    let gateway = nodes.iter().find(|node| node["spec"]["role"] == "gateway").expect("it is a node");
    let address = gateway["spec"]["metricsAddress"].as_str().expect("an address");
    let mut probe = std::net::TcpStream::connect(address).expect("it listens");
    std::io::Write::write_all(&mut probe, b"GET /readyz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").expect("it reads");
    let mut answer = String::new();
    probe.read_to_string(&mut answer).expect("UTF-8");
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    let began = Instant::now();
    let signal = std::process::Command::new("kill").args(["-TERM", &child.id().to_string()]).status();
    assert!(signal.expect("kill is there").success());
    let status = child.wait().expect("it ends");
    assert!(status.success() && began.elapsed() < Duration::from_secs(20), "{status}");
    assert_eq!(home.folders(), 0);
}
