//! Certificates, tokens and handshakes over real sockets.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use forge_proto::node::admission_client::AdmissionClient;
use forge_proto::node::admission_server::{Admission, AdmissionServer};
use forge_proto::node::nodes_client::NodesClient;
use forge_proto::node::nodes_server::{Nodes, NodesServer};
use forge_proto::node::{
    ConfirmReply, ConfirmRequest, JoinReply, JoinRequest, RenewReply, RenewRequest, SessionDown, SessionUp, SigningKeyReply,
    SigningKeyRequest,
};
use forge_shared::cluster::certificate::{CaRecord, Trust};
use forge_shared::cluster::node::Role;
use futures::stream::BoxStream;
use tokio::net::TcpListener;
use tonic::{Request, Response, Status, Streaming};

use super::*;
use crate::api::ClusterError;
use crate::status::from_status;

const DAY: Duration = Duration::from_secs(24 * 3600);

fn issue(ca: &ClusterCa, role: Role, name: &str, lifetime: Duration, now_s: u64) -> Credentials {
    let key = NodeKey::generate().unwrap();
    let identity = Identity::new(ca.cluster_id(), role, name).unwrap();
    let certificate = ca.sign(&key.signing_request_der().unwrap(), &identity, lifetime, now_s).unwrap();
    Credentials::from_pem(&certificate, &key.pem(), ca.certificate_pem()).unwrap()
}

/// Answers who called in the certificate's field of `Renew`, and lets in whoever has the token.
struct Echo {
    ca: ClusterCa,
    token: JoinTokenText,
    /// Tokens that were shown.
    shown: Arc<AtomicUsize>,
}

#[tonic::async_trait]
impl Nodes for Echo {
    type SessionStream = BoxStream<'static, Result<SessionDown, Status>>;

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<RenewReply>, Status> {
        let caller = Peer::require(&request, &[Role::Worker, Role::Gateway])?;
        Ok(Response::new(RenewReply { certificate_pem: caller.uri(), ..Default::default() }))
    }

    async fn confirm(&self, _: Request<ConfirmRequest>) -> Result<Response<ConfirmReply>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    async fn signing_key(&self, _: Request<SigningKeyRequest>) -> Result<Response<SigningKeyReply>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    async fn session(&self, _: Request<Streaming<SessionUp>>) -> Result<Response<Self::SessionStream>, Status> {
        Err(Status::unimplemented("not in this test"))
    }
}

#[tonic::async_trait]
impl Admission for Echo {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinReply>, Status> {
        self.shown.fetch_add(1, Ordering::Relaxed);
        let request = request.into_inner();
        let record = self.token.record(Role::Worker, u64::MAX, 1);
        if request.token_id != record.id || !secret_matches(&record, &request.token_secret) {
            return Err(TlsError::Token { reason: "unknown".into() }.into());
        }
        let identity = Identity::new(self.ca.cluster_id(), Role::Worker, &request.name)?;
        let certificate_pem = self.ca.sign(&request.signing_request_der, &identity, NODE_LIFETIME, clock_s())?;
        Ok(Response::new(JoinReply {
            cluster_id: self.ca.cluster_id().into(),
            certificate_pem,
            ca_certificate_pem: self.ca.certificate_pem().into(),
            ..Default::default()
        }))
    }
}

/// Serves with these credentials; gives the address.
async fn serve(ca: ClusterCa, server: Credentials) -> (String, JoinTokenText) {
    let (address, token, _) = serve_shared(ca, &SharedCredentials::new(server)).await;
    (address, token)
}

async fn serve_shared(ca: ClusterCa, server: &SharedCredentials) -> (String, JoinTokenText, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let token = JoinTokenText::generate(ca.digest(), vec![address.clone()]).unwrap();
    let incoming = TlsIncoming::new(listener, server).unwrap();
    let shown = Arc::new(AtomicUsize::new(0));
    let (nodes, admission) = (
        Echo { ca: ClusterCa::from_pem(ca.certificate_pem(), &ca.key_pem()).unwrap(), token: token.clone(), shown: shown.clone() },
        Echo { ca, token: token.clone(), shown: shown.clone() },
    );
    let router = tonic::transport::Server::builder().add_service(NodesServer::new(nodes)).add_service(AdmissionServer::new(admission));
    tokio::spawn(router.serve_with_incoming(incoming));
    (address, token, shown)
}

async fn call(address: &str, peer: PeerName, credentials: Credentials) -> Result<String, ClusterError> {
    let expected = peer.dns_name();
    let channel = channel(address, &peer, &SharedCredentials::new(credentials), ChannelOptions::default()).unwrap();
    match NodesClient::new(channel).renew(RenewRequest::default()).await {
        Ok(reply) => Ok(reply.into_inner().certificate_pem),
        Err(status) => Err(from_status(&status, &expected).error),
    }
}

fn reason(result: Result<String, ClusterError>) -> String {
    match result {
        Err(ClusterError::Forbidden { reason }) => reason,
        other => panic!("{other:?}"),
    }
}

fn coordinator() -> PeerName {
    PeerName::Any(Role::Coordinator)
}

#[tokio::test]
async fn callers_are_who_their_certificate_says() {
    let ca = ClusterCa::create("c1", clock_s()).unwrap();
    let worker = issue(&ca, Role::Worker, "w1", DAY, clock_s());
    let admin = issue(&ca, Role::Admin, "root", DAY, clock_s());
    let server = issue(&ca, Role::Coordinator, "a", DAY, clock_s());
    let (address, _) = serve(ca, server).await;
    assert_eq!(call(&address, coordinator(), worker.clone()).await.unwrap(), "forge://c1/worker/w1");
    let named = PeerName::One(Role::Coordinator, "a".into());
    assert_eq!(call(&address, named, worker.clone()).await.unwrap(), "forge://c1/worker/w1");
    assert!(reason(call(&address, coordinator(), admin).await).contains("takes a certificate of role worker or gateway"));
    let other = PeerName::One(Role::Coordinator, "b".into());
    assert!(reason(call(&address, other, worker).await).contains("the server is not b.coordinator.forge"));
}

#[tokio::test]
async fn a_certificate_of_another_ca_is_named_on_both_sides() {
    let ca = ClusterCa::create("c1", clock_s()).unwrap();
    let foreign = ClusterCa::create("c1", clock_s()).unwrap();
    let server = issue(&ca, Role::Coordinator, "a", DAY, clock_s());
    let stranger = issue(&foreign, Role::Worker, "w1", DAY, clock_s());
    let (address, _) = serve(ca, server).await;
    assert!(reason(call(&address, coordinator(), stranger).await).contains("the server is not of this cluster's CA"));
}

#[tokio::test]
async fn expired_certificates_are_named() {
    let ca = ClusterCa::create("c1", clock_s() - 1_000_000).unwrap();
    let old = issue(&ca, Role::Worker, "w1", DAY, clock_s() - 500_000);
    let early = issue(&ca, Role::Worker, "w1", DAY, clock_s() + 500_000);
    let good = issue(&ca, Role::Worker, "w1", DAY, clock_s());
    let server = issue(&ca, Role::Coordinator, "a", DAY, clock_s() - 500_000);
    let (address, _) = serve(ca, server).await;
    assert!(reason(call(&address, coordinator(), old).await).contains("worker w1 of cluster c1 has expired"));
    assert!(reason(call(&address, coordinator(), early).await).contains("is not valid yet"));
    assert!(reason(call(&address, coordinator(), good).await).contains("the server has expired"));
}

#[tokio::test]
async fn a_token_lets_in_and_pins_the_ca() {
    let ca = ClusterCa::create("c1", clock_s()).unwrap();
    let server = issue(&ca, Role::Coordinator, "a", DAY, clock_s());
    let digest = ca.digest();
    let (address, token) = serve(ca, server).await;
    let wish = JoinWish { role: Role::Worker, name: "w9".into(), address: String::new(), build: Default::default() };
    let joined = join(&token, &wish, Duration::from_secs(5)).await.unwrap();
    assert_eq!(joined.credentials.ca_digest(), digest);
    assert_eq!(call(&address, coordinator(), joined.credentials).await.unwrap(), "forge://c1/worker/w9");

    // A certificate-less caller can join and nothing else.
    let anonymous = pinned_channel(&address, digest, ChannelOptions::default()).unwrap();
    let status = NodesClient::new(anonymous).renew(RenewRequest::default()).await.unwrap_err();
    assert!(status.message().contains("a client certificate is needed"), "{status:?}");

    let mut other_ca = token.clone();
    other_ca.ca_sha256[0] ^= 1;
    // All there are refuse: that is said at once, and not when the time is over.
    let begun = std::time::Instant::now();
    let error = join(&other_ca, &wish, Duration::from_secs(60)).await.unwrap_err();
    assert!(matches!(&error, ClusterError::Forbidden { reason } if reason.contains("CA")), "{error:?}");
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    // One that is of another cluster is no reason to give up the others.
    let (stranger, ..) = {
        let other = ClusterCa::create("c2", clock_s()).unwrap();
        let server = issue(&other, Role::Coordinator, "a", DAY, clock_s());
        serve(other, server).await
    };
    let mut two = token.clone();
    two.addresses.insert(0, stranger);
    join(&two, &wish, Duration::from_secs(30)).await.unwrap();

    let forged = JoinTokenText::generate(digest, vec![address]).unwrap();
    let error = join(&forged, &wish, Duration::from_secs(5)).await.unwrap_err();
    assert!(matches!(&error, ClusterError::Forbidden { reason } if reason.contains("join token")), "{error:?}");
}

#[tokio::test]
async fn a_token_of_another_cluster_than_the_configured_coordinators_is_refused_unused() {
    let served = async |cluster: &str| {
        let ca = ClusterCa::create(cluster, clock_s()).unwrap();
        let server = SharedCredentials::new(issue(&ca, Role::Coordinator, "a", DAY, clock_s()));
        serve_shared(ca, &server).await
    };
    let (address, token, shown) = served("c1").await;
    let (stranger, ..) = served("c2").await;
    let folder = tempfile::tempdir().unwrap();
    let membership = crate::config::Membership { directory: folder.path().to_owned(), token: Some(token.to_text()), token_file: None };
    let enter = async |configured: &[&str]| {
        let configured: Vec<String> = configured.iter().map(|address| (*address).to_owned()).collect();
        membership.enter(Role::Worker, "w9", &configured, Duration::from_secs(30)).await
    };
    let error = enter(&[&stranger]).await.unwrap_err();
    assert!(error.contains("another cluster") && error.contains(&stranger) && error.contains(&address), "{error}");
    assert_eq!(shown.load(Ordering::Relaxed), 0);
    // One that does not answer says nothing; one that the token names is enough.
    enter(&["127.0.0.1:9", &stranger]).await.unwrap_err();
    enter(&["127.0.0.1:9"]).await.unwrap();
    std::fs::remove_file(folder.path().join(NODE_FILE)).unwrap();
    enter(&[&address, &stranger]).await.unwrap();
}

#[tokio::test]
async fn a_token_is_not_shown_to_a_man_in_the_middle() {
    let ca = ClusterCa::create("c1", clock_s()).unwrap();
    let evil = ClusterCa::create("c1", clock_s()).unwrap();
    let server = issue(&evil, Role::Coordinator, "a", DAY, clock_s());
    // The cluster's CA is no secret: whoever is in between can show it beside a certificate of another.
    let chained = [evil.certificate_pem(), ca.certificate_pem()].concat();
    for cas in [evil.certificate_pem(), &chained] {
        let server = SharedCredentials::new(server.with_cas(cas).unwrap());
        let (address, _, shown) = serve_shared(ClusterCa::from_pem(evil.certificate_pem(), &evil.key_pem()).unwrap(), &server).await;
        let token = JoinTokenText::generate(ca.digest(), vec![address]).unwrap();
        let wish = JoinWish { role: Role::Worker, name: "w9".into(), address: String::new(), build: Default::default() };
        let error = join(&token, &wish, Duration::from_millis(300)).await.unwrap_err();
        assert!(matches!(&error, ClusterError::Forbidden { reason } if reason.contains("is not of this cluster's CA")), "{error:?}");
        assert_eq!(shown.load(Ordering::Relaxed), 0, "the secret went to a stranger");
    }
}

#[tokio::test]
async fn whoever_is_revoked_is_cut_and_refused_whichever_end_it_is() {
    let ca = ClusterCa::create("c1", clock_s()).unwrap();
    let pem = ca.certificate_pem().to_owned();
    let server = SharedCredentials::new(issue(&ca, Role::Coordinator, "a", DAY, clock_s()));
    let [w1, w2] = ["w1", "w2"].map(|name| SharedCredentials::new(issue(&ca, Role::Worker, name, DAY, clock_s())));
    let (address, ..) = serve_shared(ca, &server).await;
    let client = |credentials: &SharedCredentials| {
        NodesClient::new(channel(&address, &coordinator(), credentials, ChannelOptions::default()).unwrap())
    };
    let (mut first, mut second) = (client(&w1), client(&w2));
    first.renew(RenewRequest::default()).await.unwrap();
    second.renew(RenewRequest::default()).await.unwrap();
    assert_eq!(server.peers().len(), 2);

    let serial = w1.get().serial().unwrap();
    assert_eq!(server.trust(&pem, BTreeSet::from([serial])).unwrap(), ["worker w1 of cluster c1"]);
    let refused = async |client: &mut NodesClient<tonic::transport::Channel>| {
        // The call that finds the connection cut may only learn that it broke.
        let mut found = String::new();
        for _ in 0..3 {
            found = from_status(&client.renew(RenewRequest::default()).await.unwrap_err(), "coordinator.forge").error.to_string();
        }
        found
    };
    let error = refused(&mut first).await;
    assert!(error.contains("this process was revoked") && error.contains("join"), "{error}");
    second.renew(RenewRequest::default()).await.unwrap();

    let serial = server.get().serial().unwrap();
    assert_eq!(w2.trust(&pem, BTreeSet::from([serial])).unwrap(), ["coordinator a of cluster c1"]);
    let error = refused(&mut second).await;
    assert!(error.contains("the server was revoked"), "{error}");
}

#[tokio::test]
async fn two_cas_are_believed_until_the_old_one_is_dropped() {
    let (old, new) = (ClusterCa::create("c1", clock_s()).unwrap(), ClusterCa::create("c1", clock_s()).unwrap());
    let both = [old.certificate_pem(), new.certificate_pem()].concat();
    let server = SharedCredentials::new(issue(&old, Role::Coordinator, "a", DAY, clock_s()).with_cas(&both).unwrap());
    let (of_old, of_new) = (issue(&old, Role::Worker, "w1", DAY, clock_s()), issue(&new, Role::Worker, "w2", DAY, clock_s()));
    let renewed = issue(&new, Role::Coordinator, "a", DAY, clock_s());
    let (new_pem, new_digest) = (new.certificate_pem().to_owned(), new.digest());
    let (address, ..) = serve_shared(old, &server).await;
    for client in [&of_old, &of_new] {
        call(&address, coordinator(), client.with_cas(&both).unwrap()).await.unwrap();
    }
    server.replace(renewed.with_cas(&both).unwrap()).unwrap();
    assert_eq!(server.get().ca_digest(), new_digest);
    for client in [&of_old, &of_new] {
        call(&address, coordinator(), client.with_cas(&both).unwrap()).await.unwrap();
    }
    server.trust(&new_pem, BTreeSet::new()).unwrap();
    call(&address, coordinator(), of_new.clone()).await.unwrap();
    let error = reason(call(&address, coordinator(), of_old.with_cas(&both).unwrap()).await);
    assert!(error.contains("this process is not of this cluster's CA") && error.contains("rotated"), "{error}");
    assert!(server.trust("", BTreeSet::new()).is_err(), "believing nobody is no choice");
}

#[tokio::test]
async fn connections_without_a_certificate_are_bounded_and_shut_nobody_out() {
    let ca = ClusterCa::create("c1", clock_s()).unwrap();
    let server = issue(&ca, Role::Coordinator, "a", DAY, clock_s());
    let worker = issue(&ca, Role::Worker, "w1", DAY, clock_s());
    let digest = ca.digest();
    let (address, _) = serve(ca, server).await;
    let mut strangers = Vec::new();
    for _ in 0..300 {
        let channel = super::connector::pinned_channel(&address, digest, ChannelOptions::default()).unwrap();
        let mut client = AdmissionClient::new(channel);
        assert!(client.join(JoinRequest::default()).await.is_err());
        strangers.push(client);
    }
    // The first ones had to make room.
    let begun = tokio::time::Instant::now();
    while open_sockets(&address) > 2 * 256 {
        assert!(begun.elapsed() < Duration::from_secs(10), "{} ends of {} connections", open_sockets(&address), strangers.len());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(call(&address, coordinator(), worker).await.unwrap(), "forge://c1/worker/w1");
}

/// Ends of connections of a port of this machine that stand.
fn open_sockets(address: &str) -> usize {
    let port: u16 = address.rsplit(':').next().unwrap().parse().unwrap();
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let of_port = format!(":{port:04X}");
    let is_open = |line: &&str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        fields.len() > 3 && (fields[1].ends_with(&of_port) || fields[2].ends_with(&of_port)) && fields[3] == "01"
    };
    table.lines().filter(is_open).count()
}

fn believing(cas: &[&ClusterCa], revoked: &[&str]) -> Trust {
    let record = |ca: &&ClusterCa| CaRecord { sha256: ca.digest_text(), certificate_pem: ca.certificate_pem().into() };
    Trust { cas: cas.iter().map(record).collect(), rotation: None, revoked: revoked.iter().map(|serial| (*serial).into()).collect() }
}

#[test]
fn a_renewal_that_began_before_brings_no_dropped_ca_back() {
    let folder = tempfile::tempdir().unwrap();
    let (old, new) = (ClusterCa::create("c1", clock_s()).unwrap(), ClusterCa::create("c1", clock_s()).unwrap());
    let both = [new.certificate_pem(), old.certificate_pem()].concat();
    let shared = SharedCredentials::new(issue(&new, Role::Worker, "w1", DAY, clock_s()).with_cas(&both).unwrap());
    // Its answer was written while both were believed.
    let answer = issue(&new, Role::Worker, "w1", DAY, clock_s()).with_cas(&both).unwrap();
    shared.carry_out(&believing(&[&new], &["0a"]), folder.path()).unwrap();
    shared.keep(answer.clone(), folder.path()).unwrap();
    assert_eq!(shared.get().serial().unwrap(), answer.serial().unwrap());
    assert_eq!(shared.believed_cas(), [new.digest_text()]);
    assert_eq!(shared.trusted().cas().len(), 1);
    assert!(shared.trusted().revoked().contains("0a"));
    let kept = Credentials::load(folder.path()).unwrap();
    assert_eq!((kept.ca_pem(), kept.serial().unwrap()), (new.certificate_pem(), answer.serial().unwrap()));
    // One of the CA that was dropped is of no use any more.
    let late = issue(&old, Role::Worker, "w1", DAY, clock_s()).with_cas(&both).unwrap();
    assert!(matches!(shared.keep(late, folder.path()), Err(TlsError::WrongCa { .. })));
    assert_eq!(Credentials::load(folder.path()).unwrap().serial().unwrap(), answer.serial().unwrap());
}

#[test]
fn what_is_kept_is_what_is_in_use_whoever_comes_between() {
    let folder = tempfile::tempdir().unwrap();
    let (old, new) = (ClusterCa::create("c1", clock_s()).unwrap(), ClusterCa::create("c1", clock_s()).unwrap());
    let shared = SharedCredentials::new(issue(&old, Role::Worker, "w1", DAY, clock_s()));
    let renewals: Vec<Credentials> = (0..40).map(|_| issue(&old, Role::Worker, "w1", DAY, clock_s())).collect();
    let last = renewals.last().unwrap().serial().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| renewals.into_iter().for_each(|renewed| shared.keep(renewed, folder.path()).unwrap()));
        scope.spawn(|| {
            for turn in 0..40 {
                let cas: &[&ClusterCa] = if turn % 2 == 0 { &[&old, &new] } else { &[&old] };
                shared.carry_out(&believing(cas, &["0a"]), folder.path()).unwrap();
            }
        });
    });
    let kept = Credentials::load(folder.path()).unwrap();
    assert_eq!(shared.get().serial().unwrap(), last, "an older one came back");
    assert_eq!(kept.serial().unwrap(), last);
    assert_eq!((kept.ca_pem(), shared.get().ca_pem()), (old.certificate_pem(), old.certificate_pem()));
}

#[test]
fn what_cannot_be_kept_is_not_said_to_be_believed() {
    let folder = tempfile::tempdir().unwrap();
    let full = folder.path().join("full");
    std::fs::write(&full, "no folder").unwrap();
    let (old, new) = (ClusterCa::create("c1", clock_s()).unwrap(), ClusterCa::create("c1", clock_s()).unwrap());
    let shared = SharedCredentials::new(issue(&old, Role::Worker, "w1", DAY, clock_s()));
    let trust = believing(&[&old, &new], &[]);
    assert!(matches!(shared.carry_out(&trust, &full), Err(TlsError::File { .. })));
    assert_eq!(shared.believed_cas(), [old.digest_text()], "after a restart it would not be");
    assert_eq!(shared.trusted().cas().len(), 2, "in use at once");
    std::fs::remove_file(&full).unwrap();
    shared.carry_out(&trust, &full).unwrap();
    assert_eq!(shared.believed_cas(), [old.digest_text(), new.digest_text()]);
}

#[tokio::test]
async fn silent_connections_hold_up_nobody() {
    let ca = ClusterCa::create("c1", clock_s()).unwrap();
    let worker = issue(&ca, Role::Worker, "w1", DAY, clock_s());
    let server = issue(&ca, Role::Coordinator, "a", DAY, clock_s());
    let (address, _) = serve(ca, server).await;
    let mut silent = Vec::new();
    for _ in 0..200 {
        silent.push(tokio::net::TcpStream::connect(&address).await.unwrap());
    }
    assert_eq!(call(&address, coordinator(), worker).await.unwrap(), "forge://c1/worker/w1");
    drop(silent);
}

#[tokio::test]
async fn replaced_credentials_are_shown_at_the_next_connection() {
    let ca = ClusterCa::create("c1", clock_s()).unwrap();
    let shared = SharedCredentials::new(issue(&ca, Role::Worker, "w1", DAY, clock_s() - 2 * 24 * 3600));
    let stranger = issue(&ca, Role::Worker, "w2", DAY, clock_s());
    let fresh = issue(&ca, Role::Worker, "w1", DAY, clock_s());
    let server = issue(&ca, Role::Coordinator, "a", DAY, clock_s());
    let (address, _) = serve(ca, server).await;
    let mut client = NodesClient::new(channel(&address, &coordinator(), &shared, ChannelOptions::default()).unwrap());
    assert!(client.renew(RenewRequest::default()).await.is_err());
    assert!(shared.replace(stranger).is_err());
    shared.replace(fresh).unwrap();
    assert!(client.renew(RenewRequest::default()).await.is_ok());
}

#[test]
fn files_are_private_and_come_back() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let ca = ClusterCa::create("c1", clock_s()).unwrap();
    ca.save(folder.path()).unwrap();
    let credentials = issue(&ca, Role::Worker, "w1", DAY, clock_s());
    credentials.save(folder.path()).unwrap();
    for file in [CA_KEY_FILE, NODE_FILE] {
        let mode = std::fs::metadata(folder.path().join(file)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{file}");
    }
    assert_eq!(ClusterCa::load(folder.path()).unwrap().digest(), ca.digest());
    assert_eq!(Credentials::load(folder.path()).unwrap().identity(), credentials.identity());

    let other = ClusterCa::create("c2", clock_s()).unwrap();
    assert!(other.save(folder.path()).unwrap_err().to_string().contains("another cluster's CA"));
    std::fs::set_permissions(folder.path().join(NODE_FILE), std::fs::Permissions::from_mode(0o644)).unwrap();
    assert!(Credentials::load(folder.path()).unwrap_err().to_string().contains("chmod 600"));
}

#[test]
fn parts_that_do_not_belong_together_are_refused() {
    let (ca, other) = (ClusterCa::create("c1", clock_s()).unwrap(), ClusterCa::create("c1", clock_s()).unwrap());
    let credentials = issue(&ca, Role::Worker, "w1", DAY, clock_s());
    let stranger = NodeKey::generate().unwrap();
    let (certificate, key) = (credentials.certificate_pem(), credentials.key_pem());
    assert!(Credentials::from_pem(certificate, &stranger.pem(), ca.certificate_pem()).is_err());
    assert!(matches!(Credentials::from_pem(certificate, key, other.certificate_pem()), Err(TlsError::WrongCa { .. })));
    assert!(ClusterCa::from_pem(ca.certificate_pem(), &other.key_pem()).is_err());
    let identity = Identity::new("c2", Role::Worker, "w1").unwrap();
    assert!(ca.sign(&stranger.signing_request_der().unwrap(), &identity, DAY, clock_s()).is_err());
    let mut forged = stranger.signing_request_der().unwrap();
    let last = forged.len() - 1;
    forged[last] ^= 1;
    let identity = Identity::new("c1", Role::Worker, "w1").unwrap();
    assert!(ca.sign(&forged, &identity, DAY, clock_s()).is_err());
}

#[test]
fn tokens_come_back_and_never_print_their_secret() {
    let token = JoinTokenText::generate([7; 32], vec!["10.0.0.1:7000".into(), "[::1]:7000".into(), "host.example:1".into()]).unwrap();
    assert_eq!(JoinTokenText::parse(&token.to_text()).unwrap(), token);
    let secret = hex::encode(token.secret());
    assert!(!format!("{token:?}").contains(&secret));
    let record = token.record(Role::Worker, 5, 1);
    assert!(secret_matches(&record, token.secret()) && !secret_matches(&record, b"other"));
    assert!(!serde_json::to_string(&record).unwrap().contains(&secret));
    let text = token.to_text();
    for (damaged, word) in [
        (text.replace("forge1", "forge2"), "forge1"),
        (text.split_at(30).0.to_owned(), "secret"),
        (text.replace("10.0.0.1:7000", "10.0.0.1"), "host:port"),
        (format!("{text}{}", "x".repeat(5000)), "longer"),
    ] {
        let error = JoinTokenText::parse(&damaged).unwrap_err().to_string();
        assert!(error.contains(word) && !error.contains(&secret), "{error}");
    }
}
