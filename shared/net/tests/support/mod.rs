//! A cluster's certificates for tests and benchmarks: a CA, and nodes whose certificates name them.
#![allow(dead_code, reason = "each test uses its part")]

pub mod raw;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use forge_net::{Fabric, FabricOptions, GroupId, GroupSpec, Member, PeerVerifier, Transport};
use forge_shared::ids::{Epoch, NodeId};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType};
use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

const SUFFIX: &str = ".worker.forge";

/// A cluster's CA.
pub struct Ca {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Ca {
    pub fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        Ca { pem: certificate.pem(), issuer: Issuer::new(params, key) }
    }

    /// What a node needs, in PEM, for this process or another.
    pub fn node_pem(&self, node: &str) -> NodePem {
        let mut params = CertificateParams::default();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.subject_alt_names = vec![SanType::DnsName(format!("{node}{SUFFIX}").try_into().unwrap())];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        NodePem { node: node.into(), certificate: certificate.pem(), key: key.serialize_pem(), ca: self.pem.clone() }
    }

    pub fn verifier(&self, node: &str) -> Arc<dyn PeerVerifier> {
        self.node_pem(node).verifier(true)
    }
}

/// A node's certificate and key, and the CA it believes.
pub struct NodePem {
    pub node: String,
    pub certificate: String,
    pub key: String,
    pub ca: String,
}

impl NodePem {
    /// With `shows` it shows its certificate to servers.
    pub fn verifier(&self, shows: bool) -> Arc<dyn PeerVerifier> {
        let certificate = CertificateDer::from_pem_slice(self.certificate.as_bytes()).unwrap();
        let key = PrivateKeyDer::from_pem_slice(self.key.as_bytes()).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.ca.as_bytes()).unwrap()).unwrap();
        let roots = Arc::new(roots);
        let tls13 = &[&rustls::version::TLS13];
        let clients = rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), provider());
        let server = rustls::ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(tls13)
            .unwrap()
            .with_client_cert_verifier(clients.allow_unauthenticated().build().unwrap())
            .with_single_cert(vec![certificate.clone()], key.clone_key())
            .unwrap();
        let client = rustls::ClientConfig::builder_with_provider(provider()).with_protocol_versions(tls13).unwrap();
        let client = client.with_root_certificates(roots);
        let client = if shows { client.with_client_auth_cert(vec![certificate], key).unwrap() } else { client.with_no_client_auth() };
        Arc::new(Verifier { server: Arc::new(server), client: Arc::new(client) })
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

struct Verifier {
    server: Arc<rustls::ServerConfig>,
    client: Arc<rustls::ClientConfig>,
}

impl PeerVerifier for Verifier {
    fn client_config(&self) -> Result<Arc<rustls::ClientConfig>, String> {
        Ok(Arc::clone(&self.client))
    }

    fn server_config(&self) -> Result<Arc<rustls::ServerConfig>, String> {
        Ok(Arc::clone(&self.server))
    }

    fn server_name(&self, node: &NodeId) -> String {
        format!("{node}{SUFFIX}")
    }

    /// The only name in these certificates; a cluster's real ones are read by forge-cluster.
    fn node_of(&self, certificate: &[u8]) -> Result<NodeId, String> {
        let end = certificate.windows(SUFFIX.len()).position(|window| window == SUFFIX.as_bytes()).ok_or("no worker's certificate")?;
        let name = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || *byte == b'-';
        let start = end - certificate[..end].iter().rev().take_while(|byte| name(byte)).count();
        Ok(NodeId(String::from_utf8_lossy(&certificate[start..end]).into_owned()))
    }
}

pub fn loopback(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// Where nobody dies: the machine that runs tests may be busy for seconds.
pub const PATIENT: Duration = Duration::from_secs(60);

/// A node's fabric on loopback.
pub fn fabric(verifier: Arc<dyn PeerVerifier>, node: &str, transport: Transport, silence: Duration) -> Fabric {
    Fabric::start(FabricOptions { node: node.into(), bind: loopback(0), transport, verifier, silence }).unwrap()
}

/// Fabrics of so many nodes, n0 to n9.
pub fn fabrics(count: usize, transport: Transport, silence: Duration) -> Vec<Fabric> {
    let ca = Ca::new();
    let node = |index: usize| format!("n{index}");
    (0..count).map(|index| fabric(ca.verifier(&node(index)), &node(index), transport, silence)).collect()
}

pub fn group_id(epoch: u64) -> GroupId {
    GroupId { name: "chat/0".into(), purpose: "tensor".into(), epoch: Epoch(epoch) }
}

/// A group with one rank on each node, or on the nodes that `of_rank` says.
pub fn spec(fabrics: &[Fabric], of_rank: &[usize], rank: usize, epoch: u64) -> GroupSpec {
    let member = |&node: &usize| Member { node: format!("n{node}").as_str().into(), address: Some(fabrics[node].local_address().unwrap()) };
    GroupSpec {
        id: group_id(epoch),
        members: of_rank.iter().map(member).collect(),
        rank,
        agreement: String::new(),
        urgent: false,
        form_timeout: PATIENT,
        deadline: PATIENT,
    }
}
