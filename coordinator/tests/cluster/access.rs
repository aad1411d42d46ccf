//! Who is let in, and what is refused: roles, certificates, tokens, sizes, damage.

use std::time::Duration;

use forge_cluster::api::{ClusterApi, ClusterError};
use forge_cluster::client::RemoteCluster;
use forge_cluster::tls::{
    ChannelOptions, ClusterCa, JoinTokenText, JoinWish, NODE_LIFETIME, NodeKey, PeerName, SharedCredentials, channel, join, pinned_channel,
};
use forge_proto::cluster::cluster_client::ClusterClient;
use forge_proto::cluster::{ExecuteRequest, ReadRequest, StatusRequest};
use forge_proto::node::admission_client::AdmissionClient;
use forge_proto::node::nodes_client::NodesClient;
use forge_proto::node::{JoinRequest, SessionUp};
use forge_shared::cluster::command::{Command, CommandError};
use forge_shared::cluster::event::Kind;
use forge_shared::cluster::node::Role;
use tonic::Code;

use crate::support::{CLUSTER, Cluster, SOON, credentials, now_s, wish};

const BRIEFLY: Duration = Duration::from_secs(3);

async fn raw(cluster: &Cluster, role: Role) -> tonic::transport::Channel {
    let identity = SharedCredentials::new(credentials(&cluster.ca, role, "someone", now_s(), NODE_LIFETIME));
    channel(&cluster.members[0].address, &PeerName::Any(Role::Coordinator), &identity, ChannelOptions::default()).expect("a channel")
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_may_do_what_is_theirs() {
    let cluster = Cluster::found().await;
    let apply = || Command::ApplyService { service: Box::new(wish("s", 1)) };
    for role in [Role::Worker, Role::Gateway, Role::Coordinator] {
        let refused = cluster.client(role, "x").execute("r".into(), apply(), BRIEFLY).await;
        assert!(matches!(&refused, Err(ClusterError::Forbidden { .. })), "{role}: {refused:?}");
    }
    let inner = Command::LoseNode { node: "a".into(), incarnation: Default::default(), reason: String::new() };
    let refused = cluster.admin().execute("r".into(), inner, BRIEFLY).await;
    assert!(matches!(&refused, Err(ClusterError::Forbidden { reason }) if reason.contains("leader")), "{refused:?}");
    let refused = cluster.client(Role::Worker, "x").read(Kind::Key, None, BRIEFLY).await;
    assert!(matches!(&refused, Err(ClusterError::Forbidden { .. })), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_certificates_of_this_cluster_that_are_valid_are_taken() {
    let cluster = Cluster::found().await;
    let addresses = cluster.addresses();
    let ask = async |credentials| {
        let client = RemoteCluster::new(&addresses, &SharedCredentials::new(credentials)).expect("a client");
        client.status(BRIEFLY).await
    };
    let other = ClusterCa::create(CLUSTER, now_s()).expect("another CA");
    let foreign = ask(credentials(&other, Role::Admin, "operator", now_s(), NODE_LIFETIME)).await;
    assert!(foreign.is_err(), "{foreign:?}");
    let expired = ask(credentials(&cluster.ca, Role::Admin, "operator", now_s() - 7200, Duration::from_secs(3600))).await;
    assert!(expired.is_err(), "{expired:?}");

    let without = pinned_channel(&addresses[0], cluster.ca.digest(), ChannelOptions::default()).expect("a channel");
    let refused = ClusterClient::new(without.clone()).status(StatusRequest {}).await.expect_err("no certificate");
    assert!(matches!(refused.code(), Code::PermissionDenied | Code::Unauthenticated), "{refused:?}");
    let up = futures::stream::iter([SessionUp::default()]);
    let refused = NodesClient::new(without).session(up).await.expect_err("no certificate");
    assert!(matches!(refused.code(), Code::PermissionDenied | Code::Unauthenticated), "{refused:?}");
    assert_eq!(ask(credentials(&cluster.ca, Role::Admin, "operator", now_s(), NODE_LIFETIME)).await.map(|status| status.leader_id), Ok(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_and_oversized_messages_are_refused_and_the_coordinator_goes_on() {
    let cluster = Cluster::found().await;
    let mut client = ClusterClient::new(raw(&cluster, Role::Admin).await).max_encoding_message_size(64 << 20);
    for command_json in [&b""[..], b"{", b"{\"do\":\"explode\"}", b"null", b"{\"do\":\"scaleService\",\"name\":\"a\",\"replicas\":-1}"] {
        let request = ExecuteRequest { request_id: "r".into(), command_json: command_json.into() };
        let refused = client.execute(request).await.expect_err("it is no command");
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
        assert!(refused.message().contains("command_json"), "{refused:?}");
    }
    let large = ExecuteRequest { request_id: "r".into(), command_json: vec![b' '; 8 << 20].into() };
    let refused = client.execute(large).await.expect_err("it is too large");
    assert_eq!(refused.code(), Code::OutOfRange, "{refused:?}");
    for request_id in ["", "with space", &"x".repeat(129)] {
        let command_json = serde_json::to_vec(&Command::DeleteService { name: "s".into() }).expect("JSON").into();
        let refused = client.execute(ExecuteRequest { request_id: request_id.into(), command_json }).await.expect_err("a bad id");
        assert!(refused.message().contains("request_id"), "{refused:?}");
    }
    let refused = client.read(ReadRequest { kind: "everything".into(), ..Default::default() }).await.expect_err("no kind");
    assert!(refused.message().contains("everything"), "{refused:?}");

    let mut nodes = NodesClient::new(raw(&cluster, Role::Worker).await).max_encoding_message_size(64 << 20);
    for message_json in [b"".to_vec(), b"[]".to_vec(), b"{\"type\":\"goodbye\"}".to_vec(), vec![b' '; 8 << 20]] {
        let up = futures::stream::iter([SessionUp { message_json: message_json.into() }]);
        let refused = nodes.session(up).await.expect_err("no hello");
        assert!(matches!(refused.code(), Code::InvalidArgument | Code::OutOfRange), "{refused:?}");
    }
    cluster.admin().status(SOON).await.expect("it goes on");
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_let_in_whom_they_say_and_as_often() {
    let cluster = Cluster::found().await;
    let token = JoinTokenText::parse(&cluster.token(Role::Worker, 1).await).expect("a token");
    let wish = |role, name: &str| JoinWish { role, name: name.into(), address: String::new(), build: Default::default() };
    let refused = |joined: Result<forge_cluster::tls::Joined, ClusterError>| match joined {
        Err(ClusterError::Command(CommandError::Token { reason })) => reason,
        other => panic!("refused: {other:?}"),
    };
    refused(join(&token, &wish(Role::Gateway, "g"), BRIEFLY).await);
    let guessed = JoinTokenText::generate(cluster.ca.digest(), cluster.addresses()).expect("a token");
    refused(join(&guessed, &wish(Role::Worker, "w"), BRIEFLY).await);
    let joined = join(&token, &wish(Role::Worker, "w"), BRIEFLY).await.expect("let in");
    assert_eq!(joined.credentials.identity().name, "w");
    assert!(joined.ca_key_pem.is_none(), "workers do not get the CA's key");
    refused(join(&token, &wish(Role::Worker, "w2"), BRIEFLY).await);

    // What it got is good, and can be renewed once it is known.
    let client = RemoteCluster::new(&joined.coordinators, &SharedCredentials::new(joined.credentials)).expect("a client");
    assert!(matches!(client.renew(BRIEFLY).await, Err(ClusterError::Forbidden { .. })), "it has had no session yet");
    client.session(crate::support::worker_spec("w", 1), SOON).await.expect("a session");
    client.renew(SOON).await.expect("renewed");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_did_not_hear_that_it_was_let_in_asks_again_and_uses_nothing_up() {
    let cluster = Cluster::found().await;
    let token = JoinTokenText::parse(&cluster.token(Role::Worker, 1).await).expect("a token");
    let request = |name: &str| JoinRequest {
        token_id: token.id.clone(),
        token_secret: token.secret().to_vec().into(),
        role: Role::Worker.to_string(),
        name: name.into(),
        signing_request_der: NodeKey::generate().and_then(|key| key.signing_request_der()).expect("a request").into(),
        address: String::new(),
        version: String::new(),
        level: forge_shared::version::LEVEL,
    };
    let mut admission = AdmissionClient::new(raw(&cluster, Role::Worker).await);
    let first = request("w");
    for _ in 0..3 {
        let reply = admission.join(first.clone()).await.expect("the same request, also after the token's last use").into_inner();
        assert_eq!(reply.cluster_id, CLUSTER);
    }
    for other in [request("w"), request("w2"), JoinRequest { token_secret: vec![0; 32].into(), ..first.clone() }] {
        admission.join(other).await.expect_err("another key, another name, a guessed secret");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_and_metrics_tell_how_it_stands() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let cluster = Cluster::found().await;
    let ask = async |path: &str| {
        let mut stream =
            tokio::net::TcpStream::connect(cluster.members[0].metrics.expect("they have one")).await.expect("the port is open");
        stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes()).await.expect("writes");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("reads");
        answer
    };
    assert!(ask("/livez").await.starts_with("HTTP/1.1 200"));
    assert!(ask("/readyz").await.starts_with("HTTP/1.1 200"));
    tokio::time::sleep(Duration::from_millis(1200)).await;
    let page = ask("/metrics").await;
    assert!(page.contains("forge_raft_is_leader 1"), "{page}");
}
