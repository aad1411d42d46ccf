//! The first signal ends a process in order, the second at once: seen with a process, which is this test's own program.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const AS_CHILD: &str = "FORGE_TEST_SIGNALS_CHILD";

/// What the child does in the child, and nothing elsewhere: it says when it listens and when it was told, then it hangs.
#[test]
fn child() {
    if std::env::var_os(AS_CHILD).is_none() {
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let told = forge_cluster::signals::first_of_two().unwrap();
        println!("\nlistens");
        told.await;
        println!("\ntold");
        tokio::time::sleep(Duration::from_secs(60)).await;
    });
}

#[test]
fn the_second_signal_ends_a_process_that_hangs() {
    for (first, second) in [("TERM", "TERM"), ("INT", "TERM")] {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--nocapture"])
            .env(AS_CHILD, "1")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut wait_for = |word: &str| assert!(lines.any(|line| line.unwrap() == word), "the child ended before it said {word:?}");
        let signal = |name: &str| {
            let sent = Command::new("kill").args([format!("-{name}"), child.id().to_string()]).status().unwrap();
            assert!(sent.success());
        };
        wait_for("listens");
        signal(first);
        wait_for("told");
        let begun = Instant::now();
        signal(second);
        let status = child.wait().unwrap();
        assert_eq!(status.code(), Some(forge_cluster::signals::ENDED_AT_ONCE), "{status}");
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    }
}
