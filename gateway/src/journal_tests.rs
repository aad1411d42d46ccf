//! The journal against an engine that dies anywhere.

use forge_shared::generate::{FinishReason, SamplingParams, TenantSalt, TokenEvent};
use proptest::prelude::*;

use super::*;

const FAR: Duration = Duration::from_secs(600);

fn request(choices: u32) -> GenerateRequest {
    GenerateRequest {
        id: "r".into(),
        tenant: TenantSalt::anonymous(),
        prompt_tokens: vec![1, 2, 3].into(),
        choices: (0..choices).map(|index| Choice { index, emitted_tokens: vec![] }).collect(),
        seed: 9,
        params: SamplingParams::default(),
        priority: 0,
    }
}

fn token(choice: u32, position: u32, token: u32) -> EngineEvent {
    EngineEvent::Token(TokenEvent { choice, position, token, text: format!("{token} "), logprobs: None })
}

fn finished(choice: u32) -> EngineEvent {
    EngineEvent::Finished { choice, reason: FinishReason::Length, text: String::new() }
}

/// What a correct engine sends: a function of seed, choice and position alone, answers interleaved.
fn run(request: &GenerateRequest, lengths: &[u32]) -> Vec<EngineEvent> {
    let mut events = Vec::new();
    let longest = lengths.iter().max().copied().unwrap_or(0);
    for position in 0..=longest {
        for choice in &request.choices {
            let length = lengths[choice.index as usize];
            if position >= choice.emitted_tokens.len() as u32 && position < length {
                events.push(token(choice.index, position, choice.index * 1000 + position + request.seed as u32));
            }
            // An answer that was complete when its engine died ends in the replay's first step.
            if position == length {
                events.push(finished(choice.index));
            }
        }
    }
    let completion_tokens = request.choices.iter().map(|choice| lengths[choice.index as usize]).sum();
    events.push(EngineEvent::Done(Usage { prompt_tokens: 3, cached_prompt_tokens: 0, completion_tokens }));
    events
}

proptest! {
    #[test]
    fn client_sees_the_same_events_wherever_engines_die(
        lengths in prop::collection::vec(0u32..12, 1..5),
        deaths in prop::collection::vec(0usize..40, 0..12),
    ) {
        let original = request(lengths.len() as u32);
        let mut journal = RequestJournal::admit(original.clone(), FAR);
        let mut seen: BTreeMap<u32, Vec<EngineEvent>> = BTreeMap::new();
        let usage;
        let mut current = original.clone();
        let mut deaths = deaths.into_iter();
        'engines: loop {
            let dies_after = deaths.next().unwrap_or(usize::MAX);
            for (count, mut event) in run(&current, &lengths).into_iter().enumerate() {
                if count == dies_after {
                    break;
                }
                prop_assert_eq!(journal.record(&mut event), Ok(Recorded::Forward), "nothing is sent twice");
                match &event {
                    EngineEvent::Done(total) => { usage = *total; break 'engines; }
                    EngineEvent::Token(token) => seen.entry(token.choice).or_default().push(event),
                    EngineEvent::Finished { choice, .. } => seen.entry(*choice).or_default().push(event),
                    _ => {}
                }
            }
            match journal.engine_lost(Loss::Died("a"), Duration::ZERO) {
                Next::Resubmit { request, wait } => {
                    prop_assert!(wait <= Duration::from_secs(1));
                    prop_assert_eq!((request.seed, &request.params, &request.prompt_tokens),
                        (original.seed, &original.params, &original.prompt_tokens));
                    current = *request;
                }
                Next::Complete(total) => { usage = total; break; }
                Next::GiveUp => { prop_assert!(journal.submissions() >= MAX_FRUITLESS_DEATHS); return Ok(()); }
                Next::DeadlineOver => { prop_assert!(false, "no time passed"); unreachable!() }
            }
        }
        for choice in &original.choices {
            let expected: Vec<_> = run(&original, &lengths)
                .into_iter()
                .filter(|event| matches!(event,
                    EngineEvent::Token(TokenEvent { choice: index, .. }) | EngineEvent::Finished { choice: index, .. }
                    if *index == choice.index))
                .collect();
            prop_assert_eq!(seen.get(&choice.index), Some(&expected));
        }
        prop_assert_eq!(usage.completion_tokens, lengths.iter().sum::<u32>());
    }

    #[test]
    fn arbitrary_events_never_break_the_invariant(
        events in prop::collection::vec((0u32..3, 0u32..5, 0u32..3, any::<bool>()), 0..60),
    ) {
        let mut journal = RequestJournal::admit(request(2), FAR);
        let mut next = BTreeMap::from([(0u32, 0u32), (1, 0)]);
        let mut ended = std::collections::BTreeSet::new();
        for (choice, position, id, is_end) in events {
            let mut event = if is_end { finished(choice) } else { token(choice, position, id) };
            if journal.record(&mut event) != Ok(Recorded::Forward) {
                continue;
            }
            prop_assert!(!ended.contains(&choice), "nothing after the end");
            if is_end {
                ended.insert(choice);
            } else {
                prop_assert_eq!(next[&choice], position);
                *next.get_mut(&choice).unwrap() += 1;
            }
        }
    }
}

#[test]
fn repeated_is_dropped_and_changed_is_a_violation() {
    let mut journal = RequestJournal::admit(request(1), FAR);
    assert_eq!(journal.record(&mut token(0, 0, 7)), Ok(Recorded::Forward));
    assert_eq!(journal.record(&mut token(0, 0, 7)), Ok(Recorded::Repeated));
    assert_eq!(journal.record(&mut token(0, 0, 8)), Err(Violation::Changed { choice: 0, position: 0 }));
    assert!(matches!(journal.record(&mut token(0, 2, 8)), Err(Violation::OutOfOrder { expected: 1, got: 2, .. })));
    assert_eq!(journal.record(&mut token(4, 0, 8)), Err(Violation::UnknownChoice(4)));
    assert_eq!(journal.record(&mut EngineEvent::Done(Usage::default())), Err(Violation::EarlyEnd));
}

#[test]
fn a_request_that_kills_every_engine_is_given_up_and_a_late_one_meets_its_deadline() {
    let mut journal = RequestJournal::admit(request(1), FAR);
    let mut deaths = 1;
    while let Next::Resubmit { .. } = journal.engine_lost(Loss::Died("a"), Duration::ZERO) {
        deaths += 1;
    }
    assert_eq!((deaths, journal.submissions()), (2, 2), "a third death would bring the replica close to being given up");
    assert_eq!(journal.engine_lost(Loss::Died("a"), Duration::ZERO), Next::GiveUp);

    let mut journal = RequestJournal::admit(request(1), FAR);
    assert_eq!(journal.engine_lost(Loss::Died("a"), FAR), Next::DeadlineOver);
}

#[test]
fn two_workers_that_die_one_after_the_other_do_not_end_a_request() {
    let mut journal = RequestJournal::admit(request(1), FAR);
    assert!(matches!(journal.engine_lost(Loss::Died("s/0@1"), Duration::ZERO), Next::Resubmit { .. }));
    assert!(matches!(journal.engine_lost(Loss::Died("s/1@2"), Duration::ZERO), Next::Resubmit { .. }));
    assert_eq!(journal.engine_lost(Loss::Died("s/0@3"), Duration::ZERO), Next::GiveUp, "three are no accident");
}

/// A gateway whose link is cut twice, and whose worker is stopped meanwhile.
#[test]
fn engines_that_went_away_are_not_held_against_a_request() {
    let mut journal = RequestJournal::admit(request(1), FAR);
    for _ in 1..MAX_FRUITLESS_LOSSES {
        assert!(matches!(journal.engine_lost(Loss::Away, Duration::ZERO), Next::Resubmit { .. }));
    }
    let mut twin = journal.clone();
    assert_eq!(twin.record(&mut token(0, 0, 1)), Ok(Recorded::Forward));
    assert!(matches!(twin.engine_lost(Loss::Away, Duration::ZERO), Next::Resubmit { .. }), "a token tells that it can be done");
    assert_eq!(journal.engine_lost(Loss::Away, Duration::ZERO), Next::GiveUp, "it may be what takes processes down");
}

#[test]
fn progress_resets_the_count_of_fruitless_tries() {
    let mut journal = RequestJournal::admit(request(1), FAR);
    for position in 0..50 {
        assert!(matches!(journal.engine_lost(Loss::Died("a"), Duration::ZERO), Next::Resubmit { .. }));
        assert_eq!(journal.record(&mut token(0, position, 1)), Ok(Recorded::Forward));
    }
}
