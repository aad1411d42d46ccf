//! `bench serve` against the real server with a tiny model, and against endpoints that are no good.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/eval/model");

fn forgectl(home: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_forgectl"));
    command.env_clear().env("FORGE_HOME", home).env("HOME", home).env("FORGE_OFFLINE", "1").env("NO_PROXY", "*");
    command.args(arguments).current_dir(home).stdin(Stdio::null());
    command
}

/// A server of the tiny model, on a free port.
struct Server {
    home: tempfile::TempDir,
    child: Child,
    url: String,
}

impl Server {
    fn start() -> Self {
        let home = tempfile::tempdir().expect("a temporary folder");
        let arguments = ["serve", MODEL, "--model-name", "tiny", "--port", "0", "--metrics-port", "0", "--threads", "1"];
        let mut child = forgectl(home.path(), &arguments).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("starts");
        let mut lines = BufReader::new(child.stdout.take().expect("piped"));
        let mut banner = String::new();
        while !banner.contains("Ctrl-C stops it") {
            assert!(lines.read_line(&mut banner).expect("UTF-8") > 0, "it ended before it was ready: {banner}");
        }
        let line = banner.lines().find(|line| line.trim_start().starts_with("API")).expect("in the banner");
        let (_, rest) = line.split_once("http://").expect("an address");
        let url = format!("http://{}/v1", rest.split('/').next().expect("host and port"));
        Server { home, child, url }
    }

    fn bench(&self, arguments: &[&str]) -> Output {
        let all = [&["bench", "serve", "--url", &self.url, "--input-tokens", "20-30", "--output-tokens", "8"], arguments].concat();
        forgectl(self.home.path(), &all).output().expect("the program starts")
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let output = self.bench(&[arguments, &["-o", "json"]].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).expect("JSON")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Nothing is left to say to it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_server_under_load_gives_figures_raw_data_and_a_plot() {
    let server = Server::start();
    let report = server.json(&["--concurrency", "2,4", "--requests", "12", "--slo", "ttft:60s,itl:60s", "--plot", "plot.svg"]);
    assert_eq!(
        (&report["model"], &report["extras"]["ignoreEos"], &report["extras"]["usage"]),
        (&"tiny".into(), &true.into(), &true.into())
    );
    let points = report["points"].as_array().expect("a list");
    assert_eq!(points.len(), 2);
    for (point, at_once) in points.iter().zip([2, 4]) {
        let summary = &point["summary"];
        assert_eq!((summary["completed"].as_u64(), point["load"]["concurrency"].as_u64()), (Some(12), Some(at_once)), "{summary}");
        assert_eq!(summary["peakConcurrency"].as_u64(), Some(at_once));
        assert_eq!(summary["meanOutputTokens"].as_f64(), Some(8.0), "the end token is ignored");
        assert_eq!(summary["goodput"]["share"].as_f64(), Some(1.0));
        for name in ["ttftMs", "tpotMs", "e2eMs"] {
            assert!(
                summary[name]["p99"].as_f64() >= summary[name]["p50"].as_f64() && summary[name]["p50"].as_f64() > Some(0.0),
                "{summary}"
            );
        }
        for request in point["requests"].as_array().expect("all of them") {
            // The tiny tokenizer has a token per letter, so that prompts are only about as long as they should be.
            let (wanted, counted) = (request["wantedInputTokens"].as_u64(), request["inputTokens"].as_u64());
            assert!((20..=30).contains(&wanted.expect("asked for")) && counted > Some(5), "{request}");
            let span = request["ttftS"].as_f64().expect("it answered")
                + request["gapsS"].as_array().expect("gaps").iter().filter_map(Value::as_f64).sum::<f64>();
            assert!(span <= request["e2eS"].as_f64().expect("timed") + 1e-6);
        }
    }
    let plot = std::fs::read_to_string(server.home.path().join("plot.svg")).expect("written");
    assert!(plot.starts_with("<svg") && plot.contains("first token, median") && plot.trim_end().ends_with("</svg>"));
    // The same seed asks for the same.
    let wanted = |report: &Value| {
        let requests = report["points"][0]["requests"].as_array().cloned().unwrap_or_default();
        let mut lengths: Vec<_> = requests.iter().map(|request| request["wantedInputTokens"].as_u64()).collect();
        lengths.sort();
        lengths
    };
    assert_eq!(wanted(&report), wanted(&server.json(&["--concurrency", "2", "--requests", "12", "--warmup", "2"])));
}

#[test]
fn arrivals_at_a_rate_chats_and_tables() {
    let server = Server::start();
    let report = server.json(&["--request-rate", "40", "--requests", "10", "--warmup", "0"]);
    let summary = &report["points"][0]["summary"];
    assert_eq!((summary["completed"].as_u64(), report["points"][0]["load"]["requestRate"].as_f64()), (Some(10), Some(40.0)));
    let output = server.bench(&["--concurrency", "3", "--requests", "6", "--plot", "one.svg", "--slo", "e2e:1us"]);
    let table = String::from_utf8_lossy(&output.stdout);
    for part in ["time to first token", "between tokens (ITL)", "P99", "answer tokens/s", "6 completed", "goodput", "0.0 % of requests"] {
        assert!(table.contains(part), "{part:?} is not in: {table}");
    }
    assert!(std::fs::read_to_string(server.home.path().join("one.svg")).expect("written").contains("whole request"));
    let sweep = server.bench(&["--concurrency", "1,2", "--requests", "4"]);
    let table = String::from_utf8_lossy(&sweep.stdout);
    assert!(table.contains("OUT TOK/S") && table.contains("1 at once") && table.contains("2 at once"), "{table}");
    // The tiny model has no chat template: every request is refused, and said so.
    let refused = server.bench(&["--endpoint", "chat", "--requests", "2"]);
    let stderr = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("answers no request") && stderr.contains("template") && stderr.contains("help:"), "{stderr}");
}

#[test]
fn ctrl_c_in_a_sweep_keeps_what_was_measured() {
    let server = Server::start();
    let arguments = ["bench", "serve", "--url", &server.url, "--input-tokens", "20", "--output-tokens", "4", "--warmup", "0"];
    let sweep = ["--request-rate", "5,6", "--requests", "200", "--plot", "part.svg", "-o", "json"];
    let all = [&arguments[..], &sweep[..]].concat();
    let child = forgectl(server.home.path(), &all).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
    std::thread::sleep(std::time::Duration::from_secs(3));
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(killed.expect("kill is there").success());
    let output = child.wait_with_output().expect("ends");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("error: stopped"), "{stderr}");
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!((&report["stopped"], &report["asked"]["loads"]), (&true.into(), &2.into()));
    let ended = report["points"][0]["requests"].as_array().expect("those that ended").len();
    assert!((1..200).contains(&ended) && report["points"].as_array().is_some_and(|points| points.len() == 1), "{ended}");
    assert!(std::fs::read_to_string(server.home.path().join("part.svg")).expect("written").contains("</svg>"));
}

#[test]
fn an_address_without_v1_is_told_so() {
    let server = Server::start();
    let url = server.url.trim_end_matches("/v1");
    for rest in [&[][..], &["--model", "tiny"]] {
        let output = forgectl(server.home.path(), &[&["bench", "serve", "--url", url], rest].concat()).output().expect("starts");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains(&format!("try --url {}", server.url)), "{stderr}");
    }
}

#[test]
fn nobody_there_is_lost_contact_and_wrong_flags_are_usage() {
    let home = tempfile::tempdir().expect("a temporary folder");
    let free = TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("bound").port();
    let run = |arguments: &[&str]| {
        let output = forgectl(home.path(), &[&["bench", "serve"], arguments].concat()).output().expect("starts");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let url = format!("http://127.0.0.1:{free}/v1");
    for rest in [&["--requests", "1"][..], &["--requests", "1", "--model", "any"]] {
        let (code, stderr) = run(&[&["--url", &url], rest].concat());
        assert_eq!(code, Some(4), "{stderr}");
        assert!(stderr.contains("error: ") && stderr.contains("help: Is a server listening there?"), "{stderr}");
    }
    for (arguments, expected) in [
        (&["--concurrency", "0"][..], "at least 1"),
        (&["--request-rate", "0"], "more than 0"),
        (&["--request-rate", "1", "--concurrency", "1"], "cannot be used with"),
        (&["--slo", "speed:1s"], "no objective"),
        (&["--input-tokens", "9-3"], "ends before it begins"),
        (&["--dataset", "absent.json"], "cannot read absent.json"),
        (&["--requests", "0"], "from 1 to 1000000"),
        (&["--warmup", "1000001"], "from 0 to 1000000"),
    ] {
        let (code, stderr) = run(arguments);
        assert_eq!(code, Some(2), "{arguments:?}: {stderr}");
        assert!(stderr.contains(expected), "{stderr}");
    }
}

/// An endpoint that streams two chunks, knows neither `ignore_eos` nor usage, and breaks every third stream off.
fn plain_endpoint() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("bound");
    std::thread::spawn(move || {
        let mut answered = 0;
        for stream in listener.incoming() {
            let mut stream = stream.expect("a connection");
            let mut reader = BufReader::new(stream.try_clone().expect("two handles"));
            let mut length = 0;
            loop {
                let mut line = String::new();
                if reader.read_line(&mut line).unwrap_or(0) == 0 || line.trim().is_empty() {
                    break;
                }
                if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                    length = value.trim().parse().expect("a number");
                }
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).expect("the body");
            let body = String::from_utf8(body).expect("UTF-8");
            let head = |status: &str| format!("HTTP/1.1 {status}\r\nconnection: close\r\n");
            let answer = if body.contains("ignore_eos") || body.contains("stream_options") {
                let error = r#"{"error": {"message": "unknown field"}}"#;
                format!("{}content-length: {}\r\n\r\n{error}", head("400 Bad Request"), error.len())
            } else {
                answered += 1;
                let events = "data: {\"choices\": [{\"text\": \"a\"}]}\n\ndata: {\"choices\": [{\"text\": \"b\"}]}\n\n";
                // The first two answers are the probes'.
                let end = if answered > 2 && answered % 3 == 0 { "" } else { "data: [DONE]\n\n" };
                format!("{}content-type: text/event-stream\r\n\r\n{events}{end}", head("200 OK"))
            };
            // A client that left is its own matter.
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    format!("http://{address}/v1")
}

#[test]
fn a_plain_endpoint_is_measured_by_chunks_and_failures_are_counted_by_kind() {
    let home = tempfile::tempdir().expect("a temporary folder");
    let run = |format: &str| {
        let url = plain_endpoint();
        let arguments = ["bench", "serve", "--url", &url, "--model", "any", "--requests", "9", "--concurrency", "1", "--warmup", "0"];
        forgectl(home.path(), &[&arguments[..], &["-o", format]].concat()).output().expect("starts")
    };
    let output = run("json");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!((&report["extras"]["ignoreEos"], &report["extras"]["usage"]), (&false.into(), &false.into()));
    let summary = &report["points"][0]["summary"];
    assert_eq!((summary["completed"].as_u64(), summary["failed"]["broken"]["count"].as_u64()), (Some(6), Some(3)), "{summary}");
    assert_eq!(summary["meanOutputTokens"].as_f64(), Some(2.0));
    let output = run("table");
    let table = String::from_utf8_lossy(&output.stdout);
    assert!(table.contains("tells no usage") && table.contains("without [DONE]") && table.contains("may end early"), "{table}");
}
