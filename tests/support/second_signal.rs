//! A program of a cluster that is told to end twice: shared by the tests of the three programs, which cannot see each
//! other's binaries. Not a test of its own.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use forge_cluster::signals::ENDED_AT_ONCE;
use forge_cluster::tls::{ClusterCa, Credentials, Identity, NODE_LIFETIME, NodeKey};
use forge_shared::cluster::node::Role;

/// Where a program is to listen, and the folder of its certificates.
pub struct Place<'a> {
    pub tls: &'a Path,
    pub listen: SocketAddr,
    pub metrics: SocketAddr,
}

/// Starts a program of `role` with the configuration that `config` gives for a place, waits until it listens at `answers`,
/// and signals it twice.
pub fn ends_at_once(role: Role, program: &mut Command, config: impl FnOnce(&Place<'_>) -> String, answers: fn(&Place<'_>) -> SocketAddr) {
    let folder = tempfile::tempdir().unwrap();
    let now_s = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let (ca, key) = (ClusterCa::create("test", now_s).unwrap(), NodeKey::generate().unwrap());
    let identity = Identity::new("test", role, "n1").unwrap();
    let certificate = ca.sign(&key.signing_request_der().unwrap(), &identity, NODE_LIFETIME, now_s).unwrap();
    let tls = folder.path().join("tls");
    Credentials::from_pem(&certificate, &key.pem(), ca.certificate_pem()).unwrap().save(&tls).unwrap();
    if role == Role::Coordinator {
        ca.save(&tls).unwrap();
    }
    let free = || std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let place = Place { tls: &tls, listen: free(), metrics: free() };
    let file = folder.path().join("config.yaml");
    std::fs::write(&file, config(&place)).unwrap();
    let mut program = program.arg("--config").arg(&file).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    let begun = Instant::now();
    while std::net::TcpStream::connect(answers(&place)).is_err() {
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
