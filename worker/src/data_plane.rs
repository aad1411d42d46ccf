//! This worker's place in the data plane: its port, whom it believes, and where peers reach it.
//!
//! What it is not: a transport; forge-net has that, and asks this for TLS configurations and for names.
//!
//! Invariants: only workers of this cluster with believed certificates take part; a connection to one whose certificate is
//! revoked, or whose CA is dropped, ends as soon as this process hears of it.

use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;

use forge_cluster::config::DataPlaneConfig;
use forge_cluster::tls::{PeerName, SharedCredentials, client_config, server_config};
use forge_net::{Fabric, FabricOptions, PeerVerifier, SILENCE, Transport};
use forge_shared::cluster::node::{self, DataTransport, Role};
use forge_shared::ids::NodeId;

use crate::WorkerError;

/// The cluster's CA and this worker's certificate, the newest of which each new connection uses.
#[derive(Debug, Clone)]
pub struct WorkerVerifier {
    credentials: SharedCredentials,
}

impl WorkerVerifier {
    /// With these credentials, which may be replaced while it is used.
    pub fn new(credentials: SharedCredentials) -> Self {
        WorkerVerifier { credentials }
    }
}

impl PeerVerifier for WorkerVerifier {
    fn client_config(&self) -> Result<Arc<rustls::ClientConfig>, String> {
        client_config(&self.credentials).map(Arc::new).map_err(|error| error.to_string())
    }

    fn server_config(&self) -> Result<Arc<rustls::ServerConfig>, String> {
        server_config(&self.credentials).map(Arc::new).map_err(|error| error.to_string())
    }

    fn server_name(&self, node: &NodeId) -> String {
        PeerName::One(Role::Worker, node.0.clone()).dns_name()
    }

    fn node_of(&self, certificate: &[u8]) -> Result<NodeId, String> {
        let identity = self.credentials.identify(certificate).map_err(|error| error.to_string())?;
        if identity.role != Role::Worker {
            return Err(format!("{identity} is no worker: only workers exchange activations"));
        }
        Ok(NodeId(identity.name))
    }
}

/// What a worker's data plane is started with.
pub struct DataPlaneOptions<'a> {
    /// This worker.
    pub node: NodeId,
    /// Its settings.
    pub config: &'a DataPlaneConfig,
    /// Where the engine service was told to listen: the data plane is on the same interface, and by default has its number.
    pub engine_listen: SocketAddr,
    /// The port that the engine service has.
    pub engine_port: u16,
    /// `host:port` where gateways reach the engine service: other workers reach the data plane on the same host.
    pub engine_address: String,
    /// This worker's identity.
    pub credentials: &'a SharedCredentials,
}

/// A running data plane.
pub struct DataPlane {
    fabric: Arc<Fabric>,
    told: node::DataPlane,
}

impl DataPlane {
    /// Takes the port and begins to answer peers.
    ///
    /// # Errors
    /// [`WorkerError::Setting`] for an address that cannot be had or a certificate that cannot be used.
    pub fn start(options: DataPlaneOptions<'_>) -> Result<Self, WorkerError> {
        let DataPlaneOptions { node, config, engine_listen, engine_port, engine_address, credentials } = options;
        let wrong = |reason: String| WorkerError::Setting { field: "dataPlane.listen", reason };
        let bind = match &config.listen {
            Some(text) => resolve(text).map_err(wrong)?,
            None => {
                // The number that the engine service has is this worker's own; with TCP it has taken it itself.
                let has_number = config.transport == DataTransport::Quic && engine_listen.port() != 0;
                SocketAddr::new(engine_listen.ip(), if has_number { engine_port } else { 0 })
            }
        };
        let transport = transport(config.transport);
        let verifier: Arc<dyn PeerVerifier> = Arc::new(WorkerVerifier::new(credentials.clone()));
        let fabric = Fabric::start(FabricOptions { node, bind, transport, verifier, silence: SILENCE });
        let fabric = Arc::new(fabric.map_err(|error| wrong(error.to_string()))?);
        let port = fabric.local_address().map_err(|error| wrong(error.to_string()))?.port();
        let host = engine_address.rsplit_once(':').map_or(engine_address.as_str(), |(host, _)| host);
        let address = config.advertise.clone().unwrap_or_else(|| format!("{host}:{port}"));
        let peers = Arc::downgrade(&fabric);
        credentials.on_trust(move || {
            if let Some(fabric) = peers.upgrade() {
                fabric.recheck();
            }
        });
        Ok(DataPlane { fabric, told: node::DataPlane { address, transport: config.transport } })
    }

    /// Where peers reach it, as the cluster is told.
    pub fn told(&self) -> &node::DataPlane {
        &self.told
    }

    /// For groups of ranks.
    pub fn fabric(&self) -> &Arc<Fabric> {
        &self.fabric
    }
}

/// The address that a `host:port` names first.
///
/// # Errors
/// In words, naming it.
pub(crate) fn resolve(address: &str) -> Result<SocketAddr, String> {
    let mut found = address.to_socket_addrs().map_err(|error| format!("{address:?} cannot be resolved: {error}"))?;
    found.next().ok_or_else(|| format!("{address:?} has no address"))
}

fn transport(transport: DataTransport) -> Transport {
    match transport {
        DataTransport::Quic => Transport::Quic,
        DataTransport::Tcp => Transport::Tcp,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::{Duration, SystemTime, UNIX_EPOCH};

    use forge_cluster::tls::{ClusterCa, Credentials, Identity, NodeKey};
    use forge_net::{GroupId, GroupSpec, Member, MessageLinks, NetError};
    use forge_shared::ids::Epoch;

    use super::*;

    const PATIENT: Duration = Duration::from_secs(60);

    fn now_s() -> u64 {
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
    }

    fn credentials(ca: &ClusterCa, role: Role, name: &str) -> Credentials {
        let key = NodeKey::generate().unwrap();
        let identity = Identity::new(ca.cluster_id(), role, name).unwrap();
        let request = key.signing_request_der().unwrap();
        let certificate = ca.sign(&request, &identity, Duration::from_secs(3600), now_s()).unwrap();
        Credentials::from_pem(&certificate, &key.pem(), ca.certificate_pem()).unwrap()
    }

    fn start(credentials: &SharedCredentials, name: &str, transport: DataTransport) -> DataPlane {
        let options = DataPlaneOptions {
            node: name.into(),
            config: &DataPlaneConfig { transport, ..DataPlaneConfig::default() },
            engine_listen: "127.0.0.1:0".parse().unwrap(),
            engine_port: 1,
            engine_address: "localhost:1".into(),
            credentials,
        };
        DataPlane::start(options).unwrap()
    }

    fn links(planes: &[&DataPlane; 2], rank: usize, epoch: u64) -> Result<MessageLinks, NetError> {
        let member = |index: usize| {
            let address = planes[index].fabric.local_address().unwrap();
            Member { node: format!("w{index}").as_str().into(), address: Some(address) }
        };
        planes[rank].fabric.links(GroupSpec {
            id: GroupId { name: "chat/0".into(), purpose: "steps".into(), epoch: Epoch(epoch) },
            members: vec![member(0), member(1)],
            rank,
            agreement: String::new(),
            urgent: true,
            form_timeout: PATIENT,
            deadline: PATIENT,
        })
    }

    /// One of a pair, tried again where the old connection's end was not heard of yet.
    fn again(planes: &[&DataPlane; 2], rank: usize, epoch: u64) -> MessageLinks {
        loop {
            match links(planes, rank, epoch) {
                Err(NetError::PeerLost { .. }) => {}
                formed => return formed.unwrap(),
            }
        }
    }

    fn both(planes: &[&DataPlane; 2], epoch: u64) -> [MessageLinks; 2] {
        std::thread::scope(|scope| {
            let far = scope.spawn(|| again(planes, 1, epoch));
            [again(planes, 0, epoch), far.join().unwrap()]
        })
    }

    #[test]
    fn workers_of_the_cluster_reach_each_other_and_nobody_else_does() {
        let (ca, other) = (ClusterCa::create("c-1", now_s()).unwrap(), ClusterCa::create("c-2", now_s()).unwrap());
        for transport in [DataTransport::Quic, DataTransport::Tcp] {
            let plane =
                |ca: &ClusterCa, role: Role, name: &str| start(&SharedCredentials::new(credentials(ca, role, name)), name, transport);
            let planes = [plane(&ca, Role::Worker, "w0"), plane(&ca, Role::Worker, "w1")];
            assert!(planes[0].told.address.starts_with("localhost:") && planes[0].told.transport == transport);
            let [near, far] = both(&[&planes[0], &planes[1]], 1);
            near.send(1, b"step").unwrap();
            assert_eq!(far.recv(0, PATIENT).unwrap().unwrap(), b"step");
            let stranger = plane(&other, Role::Worker, "w0");
            assert!(links(&[&stranger, &planes[1]], 0, 1).is_err());
            let gateway = plane(&ca, Role::Gateway, "w0");
            let error = links(&[&gateway, &planes[1]], 0, 1).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains("is no worker") || error.contains("w1"), "{error}");
        }
    }

    #[test]
    fn who_is_revoked_is_cut_off_and_comes_back_with_a_new_certificate() {
        let ca = ClusterCa::create("c-1", now_s()).unwrap();
        for transport in [DataTransport::Quic, DataTransport::Tcp] {
            let held = ["w0", "w1"].map(|name| SharedCredentials::new(credentials(&ca, Role::Worker, name)));
            let planes = [start(&held[0], "w0", transport), start(&held[1], "w1", transport)];
            let planes = [&planes[0], &planes[1]];
            let [near, _far] = both(&planes, 1);
            let revoked = BTreeSet::from([held[1].get().serial().unwrap()]);
            held[0].trust(ca.certificate_pem(), revoked).unwrap();
            let error = near.recv(1, PATIENT).unwrap_err().to_string();
            assert!(error.contains("revoked"), "{error}");
            // It is believed with another, which its next connection shows.
            held[1].replace(credentials(&ca, Role::Worker, "w1")).unwrap();
            let [near, far] = both(&planes, 2);
            far.send(0, b"again").unwrap();
            assert_eq!(near.recv(1, PATIENT).unwrap().unwrap(), b"again");
        }
    }
}
