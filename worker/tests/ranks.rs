//! Replicas of several ranks on one worker: the tokens of an undivided one, memory of every device, plans that cannot be.

mod common;

use common::{Models, Node, divided, generate};
use forge_shared::cluster::service::ReplicaPhase;
use forge_shared::link::EngineLink;
use forge_shared::plan::Plan;
use forge_shared::spec::Layout;
use forge_worker::actors::NodeEvent;

const PLENTY: u64 = 1 << 30;

#[tokio::test(flavor = "multi_thread")]
async fn every_layout_on_one_worker_gives_the_tokens_of_one_rank() {
    let models = Models::new();
    let mut node = Node::with_devices("w", &models, &[PLENTY, PLENTY]).await;
    let prompt = [5, 6, 7, 8, 9];
    for (name, layouts) in [("llama", [(2, 1, 1), (1, 3, 1), (2, 2, 1)]), ("mixtral", [(1, 1, 2), (2, 1, 2), (1, 2, 4)])] {
        let whole = models.assignment(models.service(name, name), 0, 1, "w");
        node.assign(vec![whole.clone()]);
        node.wait(&format!("{name}/0"), 1, ReplicaPhase::Ready).await;
        let link = node.link(&format!("{name}/0"), 1);
        let expected = generate(&*link, &prompt, 12).await;
        let numerics_id = link.card().numerics_id.clone();
        node.assign(vec![]);
        node.wait(&format!("{name}/0"), 1, ReplicaPhase::Stopped).await;
        for (number, (tensor, pipeline, expert)) in layouts.into_iter().enumerate() {
            let epoch = 2 + number as u64;
            let layout = Layout { tensor, pipeline, expert };
            let whole = models.assignment(models.service(name, name), 0, epoch, "w");
            node.assign(vec![divided(whole, layout, 2)]);
            node.wait(&format!("{name}/0"), epoch, ReplicaPhase::Ready).await;
            let link = node.link(&format!("{name}/0"), epoch);
            assert_eq!(link.card().numerics_id, numerics_id, "{name} {layout}");
            let (first, second, third) =
                tokio::join!(generate(&*link, &prompt, 12), generate(&*link, &prompt[1..], 9), generate(&*link, &prompt, 12));
            assert_eq!((first, third), (expected.clone(), expected.clone()), "{name} {layout}");
            assert_eq!(second.len(), 9);
            node.assign(vec![]);
            node.wait(&format!("{name}/0"), epoch, ReplicaPhase::Stopped).await;
        }
    }
}

/// Why a replica is given up.
async fn failure(node: &mut Node) -> String {
    let wanted = async {
        loop {
            let NodeEvent::Report(report) = node.worker.events.recv().await.expect("the node lives") else { continue };
            if report.status.phase == ReplicaPhase::Failed {
                return report.status.reason;
            }
        }
    };
    tokio::time::timeout(common::PATIENCE, wanted).await.expect("it fails")
}

#[tokio::test(flavor = "multi_thread")]
async fn plans_whose_ranks_cannot_be_here_are_refused_by_name() {
    let models = Models::new();
    let layout = Layout { tensor: 2, ..Layout::default() };
    let plan = |epoch| divided(models.assignment(models.service("s", "llama"), 0, epoch, "w"), layout, 2);
    let needed = plan(1).plan.ranks[0].memory.total_bytes();
    // The second device has too little for its rank; the first gives back what it had taken.
    let mut node = Node::with_devices("w", &models, &[PLENTY, needed - 1]).await;
    node.assign(vec![plan(1)]);
    assert!(failure(&mut node).await.contains("device 1 has"));
    type Change = fn(&mut Plan);
    let changes: [(Change, &str); 5] = [
        (|plan| plan.ranks[1].node = "v".into(), "w has no data plane"),
        (|plan| plan.ranks[1].tensor_rank = 0, "rank 1 is not where"),
        (|plan| plan.ranks.truncate(1), "are no stages of"),
        (|plan| plan.ranks[1].experts = 0..3, "is to hold experts 0..3"),
        (|plan| plan.ranks[1].memory.weights_bytes = 1, "device 1 has"),
    ];
    let mut node = Node::with_devices("w", &models, &[PLENTY, PLENTY]).await;
    for (number, (change, expected)) in changes.into_iter().enumerate() {
        let mut assignment = plan(10 + number as u64);
        change(&mut assignment.plan);
        if expected.starts_with("device") {
            assignment.plan.ranks[1].memory = forge_shared::plan::RankMemory::default();
        }
        node.assign(vec![assignment]);
        let reason = failure(&mut node).await;
        assert!(reason.contains(expected), "{expected}: {reason}");
    }
}
