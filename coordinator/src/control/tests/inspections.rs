//! Looks at models: whom the leader asks, what it makes of the answers, and what it says meanwhile.

use super::*;

#[test]
fn a_model_is_unusable_after_several_workers_said_so() {
    let mut leader = Leader::of(&[("a", 1_000), ("b", 1_000)]);
    leader.apply("demo", spec(1));
    let (name, mut asked) = (ServiceName::from("demo"), Vec::new());
    for _ in 0..2 {
        leader.leases.follow(leader.now_ms, &leader.world.state);
        let intents = leader.controller.decide(leader.now_ms, &leader.world.state, &leader.leases);
        let [Intent::Inspect { node, .. }] = intents.as_slice() else { panic!("{intents:?}") };
        asked.push(node.clone());
        let answer = leader.controller.inspected(leader.now_ms, &leader.world.state, (node, &name), Some(Err("no such file".into())));
        if let Some(command) = answer {
            leader.world.run(command).expect("recorded");
        }
    }
    assert_eq!(asked, [NodeId::from("a"), NodeId::from("b")]);
    assert!(matches!(&leader.service("demo").facts, Facts::Failed { reason } if reason == "a: no such file; b: no such file"));
    assert_eq!(leader.decide(), 0);
}

#[test]
fn a_question_without_an_answer_is_asked_of_the_next() {
    let mut leader = Leader::of(&[("a", 1_000), ("b", 1_000)]);
    leader.apply("demo", spec(1));
    let ask = |leader: &mut Leader, now_ms: u64| {
        leader.leases.follow(now_ms, &leader.world.state);
        ["a", "b"].iter().for_each(|id| assert!(leader.leases.renew(&NodeId::from(*id), Incarnation(1), now_ms)));
        let mut intents = leader.controller.decide(now_ms, &leader.world.state, &leader.leases);
        // What is said meanwhile is not looked at here.
        intents.retain(|intent| !matches!(intent, Intent::Propose(Command::RecordWait { .. })));
        intents
    };
    assert!(matches!(ask(&mut leader, 0).as_slice(), [Intent::Inspect { node, .. }] if node.0 == "a"));
    assert!(ask(&mut leader, 100_000).is_empty());
    assert!(ask(&mut leader, 120_000).is_empty());
    assert!(matches!(ask(&mut leader, 121_000).as_slice(), [Intent::Inspect { node, .. }] if node.0 == "b"));
    let name = ServiceName::from("demo");
    assert_eq!(leader.controller.inspected(121_100, &leader.world.state, (&NodeId::from("b"), &name), None), None);
    assert!(matches!(ask(&mut leader, 130_000).as_slice(), [Intent::Inspect { node, .. }] if node.0 == "a"));
}

#[test]
fn a_busy_worker_has_judged_no_model_and_is_asked_about_few_at_a_time() {
    let mut leader = Leader::of(&[("a", 1_000), ("b", 1_000)]);
    (0..9).for_each(|number| leader.apply(&format!("m{number}"), spec(1)));
    let ask = |leader: &mut Leader, now_ms: u64| -> Vec<(NodeId, ServiceName)> {
        leader.leases.follow(now_ms, &leader.world.state);
        ["a", "b"].iter().for_each(|id| assert!(leader.leases.renew(&NodeId::from(*id), Incarnation(1), now_ms)));
        let intents = leader.controller.decide(now_ms, &leader.world.state, &leader.leases);
        let question = |intent| match intent {
            Intent::Inspect { node, service, .. } => Some((node, ServiceName(service.metadata.name))),
            // What is placed is not looked at here.
            Intent::Propose(_) => None,
        };
        intents.into_iter().filter_map(question).collect()
    };
    let mut open = ask(&mut leader, 0);
    let asked = |id: &str| open.iter().filter(|(node, _)| node.0 == id).count();
    assert_eq!((asked("a"), asked("b")), (2, 2), "{open:?}");
    assert!(ask(&mut leader, 1).is_empty(), "both have enough to do");

    // One is busy for long, and the other has not the files of one model: one verdict of two is none.
    let missing = open[0].1.clone();
    let mut refusals = 0;
    for second in 1..400 {
        for (node, name) in std::mem::take(&mut open) {
            let answer = match node.0.as_str() {
                "a" if second < 200 => None,
                "b" if name == missing => Some(Err("no such file".into())),
                _ => Some(Ok(Box::new(facts(1)))),
            };
            refusals += u32::from(matches!(answer, Some(Err(_))));
            if let Some(command) = leader.controller.inspected(second * 1_000, &leader.world.state, (&node, &name), answer) {
                leader.world.run(command).expect("recorded");
            }
        }
        open = ask(&mut leader, second * 1_000);
        for (name, record) in leader.world.state.services() {
            let is_known = matches!(record.facts, Facts::Known { .. });
            assert!(is_known || matches!(record.facts, Facts::Unknown { .. }), "{second} {name}: {:?}", record.facts);
            assert!(is_known || second < 190 || *name == missing, "{second}: {name} waits for the other");
        }
    }
    assert!(refusals > 0);
    assert!(matches!(leader.service(&missing.0).facts, Facts::Known { .. }), "found by the one that has the files");
}

#[test]
fn whoever_waits_for_a_look_at_its_model_says_for_what() {
    let mut leader = Leader::of(&[]);
    (0..4).for_each(|number| leader.apply(&format!("m{number}"), spec(1)));
    let pass = |leader: &mut Leader, now_ms: u64| {
        leader.leases.follow(now_ms, &leader.world.state);
        leader.world.state.nodes().keys().for_each(|id| assert!(leader.leases.renew(id, Incarnation(1), now_ms)));
        for intent in leader.controller.decide(now_ms, &leader.world.state, &leader.leases) {
            if let Intent::Propose(command) = intent {
                leader.world.run(command).expect("said");
            }
        }
    };
    let said = |leader: &Leader, name: &str| match &leader.service(name).facts {
        Facts::Unknown { waits_for } => waits_for.clone(),
        other => panic!("{other:?}"),
    };
    pass(&mut leader, 0);
    assert_eq!(said(&leader, "m0"), "", "not for what is over in a moment");
    pass(&mut leader, 2_000);
    assert!(said(&leader, "m0").contains("no worker is there"));
    let before = leader.world.state.placement_revision();
    leader.world.join("a", 1, &[1_000]).expect("joins");
    // The worker never answers: two models are with it, the others wait.
    (4..10).for_each(|second| pass(&mut leader, second * 1_000));
    assert!(said(&leader, "m0").starts_with("worker a is reading the model"), "{}", said(&leader, "m0"));
    assert!(said(&leader, "m3").contains("waits for its turn"), "{}", said(&leader, "m3"));
    let (node, name) = (NodeId::from("a"), ServiceName::from("m0"));
    assert_eq!(leader.controller.inspected(10_000, &leader.world.state, (&node, &name), None), None);
    pass(&mut leader, 10_500);
    assert!(said(&leader, "m0").contains("busy, or did not answer"), "{}", said(&leader, "m0"));
    let revision = leader.world.state.revision();
    pass(&mut leader, 10_600);
    assert_eq!(leader.world.state.revision(), revision, "once is enough");
    assert!(leader.world.state.placement_revision() > before, "a node joined, and nothing else moved anything");
}
