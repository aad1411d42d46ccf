//! A node with real tiny checkpoints: replicas of several services, digests, memory, epochs, draining.

mod common;

use std::time::Duration;

use common::{Models, Node, generate, request, tokens};
use forge_shared::cluster::service::ReplicaPhase;
use forge_shared::generate::AdmitError;
use forge_shared::link::EngineLink;
use forge_worker::actors::{NodeEvent, NodeMessage};

const PLENTY: u64 = 1 << 30;

#[tokio::test(flavor = "multi_thread")]
async fn replicas_of_two_services_run_beside_each_other_under_one_numerics_id_each() {
    let models = Models::new();
    let mut node = Node::start("w", &models, PLENTY).await;
    let (llama, qwen) = (models.service("llama", "llama"), models.service("qwen", "qwen2"));
    node.assign(vec![
        models.assignment(llama.clone(), 0, 1, "w"),
        models.assignment(llama.clone(), 1, 2, "w"),
        models.assignment(qwen, 0, 1, "w"),
    ]);
    // Reports of all come over one channel, in any order: each is looked at when all are there.
    common::until("all three answer", || {
        [("llama/0", 1), ("llama/1", 2), ("qwen/0", 1)].iter().all(|(replica, epoch)| {
            let run = forge_worker::agent::RunId { replica: (*replica).into(), epoch: forge_shared::ids::Epoch(*epoch) };
            node.worker.board.get(&run).is_some_and(|link| link.status().ready)
        })
    })
    .await;
    let [first, second, other] = [("llama/0", 1), ("llama/1", 2), ("qwen/0", 1)].map(|(replica, epoch)| node.link(replica, epoch));
    let prompt = [5, 6, 7, 8, 9];
    let answer = generate(&*first, &prompt, 12).await;
    assert_eq!(answer.len(), 12);
    assert_eq!(generate(&*second, &prompt, 12).await, answer);
    assert_eq!(first.card().numerics_id, second.card().numerics_id);
    assert_ne!(first.card().numerics_id, other.card().numerics_id);
    assert_eq!(first.card().names[0], "llama");

    // Another node of the same kind, with a copy of the files, has the same numerics: an answer can go on there.
    let copies = Models::new();
    let mut elsewhere = Node::start("v", &copies, PLENTY).await;
    elsewhere.assign(vec![copies.assignment(copies.service("llama", "llama"), 0, 9, "v")]);
    let (report, phases) = elsewhere.wait("llama/0", 9, ReplicaPhase::Ready).await;
    assert_eq!(phases, [ReplicaPhase::Pulling, ReplicaPhase::Loading, ReplicaPhase::Ready]);
    assert_eq!(report.status.numerics_id, first.card().numerics_id);
    let mut rest = request(&prompt, 12);
    rest.choices[0].emitted_tokens = answer[..5].to_vec();
    let resumed = elsewhere.link("llama/0", 9).submit(rest).await.expect("admitted");
    assert_eq!(tokens(resumed).await, answer[5..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn other_weights_than_those_planned_for_are_refused() {
    let models = Models::new();
    let mut node = Node::start("w", &models, PLENTY).await;
    let mut assignment = models.assignment(models.service("s", "llama"), 0, 1, "w");
    let config = models.path("llama").join("config.json");
    let text = std::fs::read_to_string(&config).expect("readable");
    std::fs::write(&config, text.replace("\"rms_norm_eps\": 1e-05", "\"rms_norm_eps\": 1e-06")).expect("writable");
    node.assign(vec![assignment.clone()]);
    let (report, _) = failed(&mut node, "s/0", 1).await;
    assert!(report.contains(&assignment.weights_digest) && report.contains("was planned for"), "{report}");

    assignment.weights_digest = "source:hub/model@commit".into();
    assignment.plan.epoch = assignment.plan.epoch.next();
    node.assign(vec![assignment]);
    let (report, _) = failed(&mut node, "s/0", 2).await;
    assert!(report.contains("source:a local path"), "{report}");
}

/// The reason and the memory that was found.
async fn failed(node: &mut Node, replica: &str, epoch: u64) -> (String, Option<u64>) {
    let wanted = async {
        loop {
            let NodeEvent::Report(report) = node.worker.events.recv().await.expect("the node lives") else { continue };
            let same = report.replica.to_string() == replica && report.epoch.0 == epoch;
            if same && report.status.phase == ReplicaPhase::Failed {
                return (report.status.reason, report.found_memory_bytes);
            }
        }
    };
    tokio::time::timeout(common::PATIENCE, wanted).await.expect("it fails")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_its_device_cannot_hold_is_refused_before_it_loads() {
    let models = Models::new();
    let assignment = models.assignment(models.service("s", "llama"), 0, 1, "w");
    let needed = assignment.plan.ranks[0].memory.total_bytes();
    let mut node = Node::start("w", &models, needed - 1).await;
    node.assign(vec![assignment]);
    let (reason, _) = failed(&mut node, "s/0", 1).await;
    assert!(reason.contains("iB free, and the replica takes ") && !reason.contains(&needed.to_string()), "{reason}");

    // A plan that gives less than the model takes was made for another model.
    let mut node = Node::start("w", &models, PLENTY).await;
    let mut small = models.assignment(models.service("s", "llama"), 0, 2, "w");
    small.plan.ranks[0].memory.weights_bytes /= 2;
    node.assign(vec![small]);
    assert!(failed(&mut node, "s/0", 2).await.0.contains("iB free, and the replica takes"));

    // A plan of ranks elsewhere is not ours to carry out.
    let elsewhere = models.assignment(models.service("t", "llama"), 0, 3, "other");
    node.assign(vec![elsewhere]);
    assert!(failed(&mut node, "t/0", 3).await.0.contains("none of the plan's ranks is on w"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_epoch_serves_beside_the_old_one_which_drains_with_its_requests() {
    let models = Models::new();
    let mut node = Node::start("w", &models, PLENTY).await;
    let plan = |epoch| models.assignment(models.service("s", "llama"), 0, epoch, "w");
    node.assign(vec![plan(1)]);
    node.wait("s/0", 1, ReplicaPhase::Ready).await;
    node.assign(vec![plan(1), plan(2)]);
    node.wait("s/0", 2, ReplicaPhase::Ready).await;
    let (old, new) = (node.link("s/0", 1), node.link("s/0", 2));
    let expected = generate(&*new, &[3, 4, 5], 40).await;
    let under_way = old.submit(request(&[3, 4, 5], 40)).await.expect("it still serves");
    node.assign(vec![forge_shared::cluster::session::Assignment { drain_ms: Some(30_000), ..plan(1) }, plan(2)]);
    assert_eq!(tokens(under_way).await, expected);
    node.wait("s/0", 1, ReplicaPhase::Stopped).await;
    let refused = old.submit(request(&[3], 1)).await.map(drop);
    assert!(matches!(refused, Err(AdmitError::Unavailable { .. })), "{refused:?}");
    assert_eq!(generate(&*new, &[3, 4, 5], 40).await, expected);
    node.assign(vec![]);
    node.wait("s/0", 2, ReplicaPhase::Stopped).await;
    forgotten(&node).await;
}

/// The report goes out first, since it still needs the board.
async fn forgotten(node: &Node) {
    let forgotten = async {
        while !node.worker.board.loads().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(common::PATIENCE, forgotten).await.expect("the board forgets it");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_given_up_stops_serving_and_can_be_taken_in_again() {
    let models = Models::new();
    let mut node = Node::start("w", &models, PLENTY).await;
    let plan = models.assignment(models.service("s", "llama"), 0, 1, "w");
    node.assign(vec![plan.clone()]);
    node.wait("s/0", 1, ReplicaPhase::Ready).await;
    node.worker.actor.cast(NodeMessage::Expired).expect("it lives");
    node.wait("s/0", 1, ReplicaPhase::Stopped).await;
    forgotten(&node).await;
    node.assign(vec![plan]);
    node.wait("s/0", 1, ReplicaPhase::Ready).await;

    node.worker.actor.cast(NodeMessage::Drain(Duration::from_secs(5))).expect("it lives");
    let drained = async { while node.worker.events.recv().await.expect("it lives") != NodeEvent::Drained {} };
    tokio::time::timeout(common::PATIENCE, drained).await.expect("it drains");
}
