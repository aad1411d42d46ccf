//! The program ends at once at a second signal.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use forge_cluster::signals::ENDED_AT_ONCE;
use forge_cluster::tls::{ClusterCa, Credentials, Identity, NODE_LIFETIME, NodeKey};
use forge_shared::cluster::node::Role;

#[test]
fn the_second_signal_ends_the_program_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let now_s = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let (ca, key) = (ClusterCa::create("test", now_s).unwrap(), NodeKey::generate().unwrap());
    let identity = Identity::new("test", Role::Coordinator, "n1").unwrap();
    let certificate = ca.sign(&key.signing_request_der().unwrap(), &identity, NODE_LIFETIME, now_s).unwrap();
    let tls = folder.path().join("tls");
    Credentials::from_pem(&certificate, &key.pem(), ca.certificate_pem()).unwrap().save(&tls).unwrap();
    ca.save(&tls).unwrap();
    let free = || std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (listen, metrics) = (free(), free());
    let config = format!(
        "apiVersion: forge/v1\nkind: Coordinator\nname: n1\ndataDir: {}\nlisten: {listen}\nmetricsListen: {metrics}\nmembership:\n  directory: {}\n",
        folder.path().join("data").display(),
        tls.display()
    );
    let file = folder.path().join("config.yaml");
    std::fs::write(&file, config).unwrap();
    let mut program = Command::new(env!("CARGO_BIN_EXE_forge-coordinator"))
        .arg("--config")
        .arg(&file)
        .arg("--bootstrap")
        .stderr(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    while std::net::TcpStream::connect(metrics).is_err() {
        assert!(program.try_wait().unwrap().is_none(), "it ended by itself");
        assert!(begun.elapsed() < Duration::from_secs(60), "it listens");
        std::thread::sleep(Duration::from_millis(20));
    }
    let begun = Instant::now();
    // Stopped meanwhile: one that has nothing to finish would be gone before the second.
    for signal in ["-STOP", "-TERM", "-INT", "-CONT"] {
        assert!(Command::new("kill").args([signal, &program.id().to_string()]).status().unwrap().success());
    }
    let status = program.wait().unwrap();
    assert_eq!(status.code(), Some(ENDED_AT_ONCE), "{status}");
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
}
