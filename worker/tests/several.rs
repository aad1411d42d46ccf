//! One replica whose ranks are on several workers: the tokens and log-probabilities of one process, and one end for all.

mod common;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::{Models, Node, PATIENCE, divided, request};
use forge_cluster::config::DataPlaneConfig;
use forge_cluster::tls::{ClusterCa, Credentials, Identity, NodeKey, SharedCredentials};
use forge_shared::cluster::node::{DataTransport, Role};
use forge_shared::cluster::service::{ReplicaPhase, ReplicaReport};
use forge_shared::cluster::session::{Assignment, Peer};
use forge_shared::generate::{EngineEvent, GenerateRequest};
use forge_shared::link::EngineLink;
use forge_shared::spec::Layout;
use forge_worker::actors::{NodeEvent, NodeMessage};
use forge_worker::data_plane::{DataPlane, DataPlaneOptions};
use forge_worker::ledger::LedgerDevice;

const PLENTY: u64 = 1 << 30;
const NAMES: [&str; 3] = ["w0", "w1", "w2"];

/// Workers that reach each other.
struct Workers {
    nodes: Vec<Node>,
    planes: Vec<DataPlane>,
    models: Models,
}

impl Workers {
    async fn start(count: usize, transport: DataTransport) -> Self {
        Self::with_memory(&vec![PLENTY; count], transport).await
    }

    async fn with_memory(memory_bytes: &[u64], transport: DataTransport) -> Self {
        let now_s = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let (ca, models) = (ClusterCa::create("c-1", now_s).unwrap(), Models::new());
        let (mut nodes, mut planes) = (Vec::new(), Vec::new());
        for (name, &memory_bytes) in NAMES.into_iter().zip(memory_bytes) {
            let key = NodeKey::generate().unwrap();
            let identity = Identity::new(ca.cluster_id(), Role::Worker, name).unwrap();
            let certificate = ca.sign(&key.signing_request_der().unwrap(), &identity, Duration::from_secs(3600), now_s).unwrap();
            let credentials = Credentials::from_pem(&certificate, &key.pem(), ca.certificate_pem()).unwrap();
            let plane = DataPlane::start(DataPlaneOptions {
                node: name.into(),
                config: &DataPlaneConfig { transport, ..DataPlaneConfig::default() },
                engine_listen: "127.0.0.1:0".parse().unwrap(),
                engine_port: 1,
                engine_address: "127.0.0.1:1".into(),
                credentials: &SharedCredentials::new(credentials),
            })
            .unwrap();
            let device = |index| LedgerDevice { index, memory_bytes, cores: Vec::new(), niceness: 0 };
            nodes.push(Node::with_fabric(name, &models, vec![device(0), device(1)], Some(plane.fabric().clone())).await);
            planes.push(plane);
        }
        Workers { nodes, planes, models }
    }

    /// A replica of `model`, whose rank r is on the worker that `places` says; two devices of a worker take turns.
    fn plan(&self, model: &str, epoch: u64, layout: Layout, places: &[usize]) -> Assignment {
        let whole = self.models.assignment(self.models.service(model, model), 0, epoch, NAMES[0]);
        let mut assignment = divided(whole, layout, 2);
        assert_eq!(assignment.plan.ranks.len(), places.len());
        for (rank, &place) in assignment.plan.ranks.iter_mut().zip(places) {
            rank.node = NAMES[place].into();
        }
        let peer = |(name, plane): (&&str, &DataPlane)| Peer { node: (*name).into(), data_plane: plane.told().clone() };
        assignment.peers = NAMES.iter().zip(&self.planes).map(peer).collect();
        assignment
    }

    fn assign(&mut self, assignment: &Assignment) {
        for (node, name) in self.nodes.iter_mut().zip(NAMES) {
            let is_here = assignment.plan.ranks.iter().any(|rank| rank.node == name.into());
            node.assign(if is_here { vec![assignment.clone()] } else { Vec::new() });
        }
    }

    fn unassign(&mut self) {
        self.nodes.iter_mut().for_each(|node| node.assign(Vec::new()));
    }

    /// Waits until all ranks are loaded; the leading worker's report.
    async fn ready(&mut self, assignment: &Assignment) -> ReplicaReport {
        self.all(assignment, ReplicaPhase::Ready).await
    }

    async fn all(&mut self, assignment: &Assignment, phase: ReplicaPhase) -> ReplicaReport {
        let (replica, epoch) = (assignment.plan.replica.to_string(), assignment.plan.epoch.0);
        let mut leading = None;
        for name in assignment.plan.nodes() {
            let at = NAMES.iter().position(|known| *known == name.0).unwrap();
            let (report, _) = self.nodes[at].wait(&replica, epoch, phase).await;
            leading = leading.or(Some(report));
        }
        leading.unwrap()
    }

    fn link(&self, assignment: &Assignment) -> Arc<dyn EngineLink> {
        self.nodes[0].link(&assignment.plan.replica.to_string(), assignment.plan.epoch.0)
    }
}

/// Why a worker gives a replica up.
async fn failure(node: &mut Node) -> ReplicaReport {
    let wanted = async {
        loop {
            let NodeEvent::Report(report) = node.worker.events.recv().await.expect("the node lives") else { continue };
            if report.status.phase == ReplicaPhase::Failed {
                return *report;
            }
        }
    };
    tokio::time::timeout(PATIENCE, wanted).await.expect("it fails")
}

/// A token, and the bits of the log-probabilities of the best at its place.
type Scored = (u32, Vec<(u32, u32)>);

fn scored(prompt: &[u32], max_tokens: u32) -> GenerateRequest {
    let mut request = request(prompt, max_tokens);
    request.params.logprobs = Some(5);
    request
}

/// All tokens, or those before it failed and why.
async fn answer(link: &dyn EngineLink, request: GenerateRequest) -> Result<Vec<Scored>, (Vec<Scored>, String)> {
    let mut stream = link.submit(request).await.expect("admitted");
    let mut tokens = Vec::new();
    let all = async {
        while let Some(event) = stream.recv().await {
            match event {
                EngineEvent::Token(token) => {
                    let top = token.logprobs.expect("asked for").top;
                    tokens.push((token.token, top.iter().map(|entry| (entry.token, entry.logprob.to_bits())).collect()));
                }
                EngineEvent::Failed { reason, .. } => return Err(reason),
                EngineEvent::Done(_) => return Ok(()),
                _ => {}
            }
        }
        Err("the stream ended".to_owned())
    };
    match tokio::time::timeout(PATIENCE, all).await.expect("it ends") {
        Ok(()) => Ok(tokens),
        Err(reason) => Err((tokens, reason)),
    }
}

async fn three(link: &dyn EngineLink) -> [Vec<Scored>; 3] {
    let (long, short) = ([5, 6, 7, 8, 9], [9, 4]);
    let (first, second, third) =
        tokio::join!(answer(link, scored(&long, 12)), answer(link, scored(&long[1..], 9)), answer(link, scored(&short, 12)));
    [first.unwrap(), second.unwrap(), third.unwrap()]
}

async fn every_layout(transport: DataTransport) {
    let mut workers = Workers::start(3, transport).await;
    let layout = |tensor, pipeline, expert| Layout { tensor, pipeline, expert };
    let dense: [(Layout, &[usize]); 5] = [
        (layout(2, 1, 1), &[0, 1]),
        (layout(4, 1, 1), &[0, 1, 2, 0]),
        (layout(1, 3, 1), &[0, 1, 2]),
        // Sums in one process, stages in two; and the other way round.
        (layout(2, 2, 1), &[0, 0, 1, 1]),
        (layout(2, 2, 1), &[0, 1, 0, 1]),
    ];
    let mixture: [(Layout, &[usize]); 3] = [(layout(1, 1, 2), &[0, 1]), (layout(2, 1, 2), &[0, 1, 2, 1]), (layout(1, 2, 2), &[0, 1, 1, 2])];
    let mut epoch = 0;
    for (name, layouts) in [("llama", dense.as_slice()), ("mixtral", mixture.as_slice())] {
        epoch += 1;
        let whole = workers.plan(name, epoch, Layout::default(), &[0]);
        workers.assign(&whole);
        let numerics_id = workers.ready(&whole).await.status.numerics_id;
        let expected = three(&*workers.link(&whole)).await;
        workers.unassign();
        workers.all(&whole, ReplicaPhase::Stopped).await;
        for &(layout, places) in layouts {
            epoch += 1;
            let plan = workers.plan(name, epoch, layout, places);
            workers.assign(&plan);
            assert_eq!(workers.ready(&plan).await.status.numerics_id, numerics_id, "{name} {layout} {places:?}");
            assert_eq!(three(&*workers.link(&plan)).await, expected, "{name} {layout} {places:?} over {transport}");
            workers.unassign();
            workers.all(&plan, ReplicaPhase::Stopped).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_layout_over_several_workers_gives_the_bits_of_one_over_quic() {
    every_layout(DataTransport::Quic).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_layout_over_several_workers_gives_the_bits_of_one_over_tcp() {
    every_layout(DataTransport::Tcp).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_goes_away_ends_the_epoch_for_all_and_answers_go_on_in_the_next() {
    for transport in [DataTransport::Quic, DataTransport::Tcp] {
        let mut workers = Workers::start(3, transport).await;
        let plan =
            |workers: &Workers, epoch, places: &[usize]| workers.plan("llama", epoch, Layout { tensor: 2, pipeline: 2, expert: 1 }, places);
        let first = plan(&workers, 1, &[0, 2, 1, 2]);
        workers.assign(&first);
        workers.ready(&first).await;
        let link = workers.link(&first);
        let expected = answer(&*link, scored(&[5, 6, 7], 55)).await.unwrap();
        let running = tokio::spawn(async move { answer(&*link, scored(&[5, 6, 7], 55)).await });
        // The last worker's connections end, as its process's death would end them.
        workers.planes.pop();
        let gone = workers.nodes.pop().unwrap();
        gone.worker.actor.cast(NodeMessage::Expired).unwrap();
        let reports = [failure(&mut workers.nodes[0]).await, failure(&mut workers.nodes[1]).await];
        assert!(reports.iter().all(|report| report.status.restarts == 0), "the epoch is over: {reports:?}");
        let (mut tokens, reason) = match running.await.unwrap() {
            // It may have been done by then.
            Ok(tokens) => (tokens, String::new()),
            Err(ended) => ended,
        };
        assert!(tokens.len() <= expected.len() && tokens[..] == expected[..tokens.len()], "{reason}");
        // The same process holds ranks of the next epoch, and goes on from the tokens that were sent.
        let second = plan(&workers, 2, &[0, 1, 1, 0]);
        workers.assign(&second);
        workers.ready(&second).await;
        let mut rest = scored(&[5, 6, 7], 55);
        rest.choices[0].emitted_tokens = tokens.iter().map(|(token, _)| *token).collect();
        if tokens.len() < expected.len() {
            tokens.extend(answer(&*workers.link(&second), rest).await.unwrap());
        }
        assert_eq!(tokens, expected, "{transport}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_cannot_take_part_ends_the_run_for_all_and_is_named() {
    let mut workers = Workers::with_memory(&[PLENTY, 1 << 10], DataTransport::Quic).await;
    let layout = Layout { tensor: 2, ..Layout::default() };
    let poor = workers.plan("llama", 1, layout, &[0, 1]);
    workers.assign(&poor);
    for at in [1, 0] {
        let report = failure(&mut workers.nodes[at]).await;
        assert!(report.status.reason.contains("device"), "{report:?}");
        assert!(at == 0 || report.status.fault == Some("w1".into()), "{report:?}");
    }
    // Other weights under the same plan: found out before anything is computed.
    let plan = workers.plan("llama", 2, layout, &[0, 1]);
    let mut other = plan.clone();
    other.weights_digest = "sha256:00".into();
    workers.nodes[0].assign(vec![plan]);
    workers.nodes[1].assign(vec![other]);
    let reasons = [failure(&mut workers.nodes[0]).await, failure(&mut workers.nodes[1]).await].map(|report| report.status.reason);
    assert!(reasons.iter().any(|reason| reason.contains("agreement")), "{reasons:?}");
    // A worker without a data plane, and a plan that does not say where the others are.
    let mut plan = workers.plan("llama", 3, layout, &[0, 1]);
    plan.peers.clear();
    workers.nodes[0].assign(vec![plan]);
    assert!(failure(&mut workers.nodes[0]).await.status.reason.contains("whose data plane it does not name"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_following_worker_that_is_asked_to_end_lets_requests_finish() {
    let mut workers = Workers::start(2, DataTransport::Quic).await;
    let plan = workers.plan("llama", 1, Layout { pipeline: 2, ..Layout::default() }, &[0, 1]);
    workers.assign(&plan);
    workers.ready(&plan).await;
    let link = workers.link(&plan);
    let mut stream = link.submit(scored(&[5, 6, 7], 55)).await.expect("admitted");
    workers.nodes[1].worker.actor.cast(NodeMessage::Drain(PATIENCE)).unwrap();
    let mut tokens = 0;
    while let Some(event) = tokio::time::timeout(PATIENCE, stream.recv()).await.expect("it ends") {
        tokens += usize::from(matches!(event, EngineEvent::Token(_)));
        assert!(!matches!(event, EngineEvent::Failed { .. }), "{event:?}");
    }
    assert_eq!(tokens, 55);
    let drained = async { while !matches!(workers.nodes[1].worker.events.recv().await, Some(NodeEvent::Drained)) {} };
    tokio::time::timeout(Duration::from_secs(20), drained).await.expect("long before its time is over");
    assert_eq!(failure(&mut workers.nodes[0]).await.status.fault, Some("w1".into()));
}
