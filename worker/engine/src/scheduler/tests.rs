//! The scheduler alone, its decisions one by one. What they mean for answers is tested in `tests/invariance.rs`.

use forge_model::StepPlan;
use forge_text::PrefixHasher;
use proptest::prelude::*;

use super::*;

fn limits() -> SchedulerLimits {
    SchedulerLimits { max_step_rows: 32, max_logits_rows: 32, max_batch_size: 8, max_chunk_rows: 16, prefix_caching: false }
}

fn scheduler(limits: SchedulerLimits, blocks: usize) -> Scheduler {
    Scheduler::new(limits, BlockManager::new(blocks, 4))
}

fn new_request(len: usize) -> NewRequest {
    NewRequest {
        priority: 0,
        prompt: (0..len as u32).collect(),
        answers: vec![Vec::new()],
        root: PrefixHasher::root(b"t", "n"),
        scores_prompt: false,
        generates: true,
    }
}

/// Runs a step; every sequence that may sample gets token 1. Returns rows per sequence as (first, count).
fn step(scheduler: &mut Scheduler) -> Vec<(u32, u32)> {
    let mut plan = StepPlan::default();
    if !scheduler.plan(&mut plan) {
        return Vec::new();
    }
    for used in scheduler.complete() {
        scheduler.append(used.id, 1);
    }
    scheduler.check().unwrap();
    plan.sequences.iter().map(|slice| (slice.first_position, slice.row_count)).collect()
}

#[test]
fn prompts_are_cut_into_chunks_and_answers_get_their_row() {
    let mut scheduler = scheduler(limits(), 100);
    scheduler.submit(new_request(40));
    scheduler.submit(new_request(3));
    assert_eq!(step(&mut scheduler), [(0, 16), (0, 3)]);
    assert_eq!(step(&mut scheduler), [(16, 16), (3, 1)]);
    assert_eq!(step(&mut scheduler), [(32, 8), (4, 1)]);
    assert_eq!(step(&mut scheduler), [(40, 1), (5, 1)]);
}

#[test]
fn the_latest_is_preempted_and_comes_back() {
    let mut scheduler = scheduler(limits(), 4);
    scheduler.submit(new_request(7));
    let second = scheduler.submit(new_request(7))[0];
    // Two blocks are free, but one must stay so for the first to grow: the second waits.
    assert_eq!(step(&mut scheduler), [(0, 7)]);
    assert_eq!((scheduler.running(), scheduler.waiting()), (1, 1));
    scheduler.preempt(*scheduler.running.first().unwrap());
    assert_eq!(scheduler.blocks().used(), 0);
    assert_eq!(step(&mut scheduler), [(0, 8)]);
    scheduler.remove(second);
    for position in 8..16 {
        assert_eq!(step(&mut scheduler), [(position, 1)]);
    }
    assert_eq!((scheduler.counts().preemptions, scheduler.blocks().used()), (1, 4));
}

#[test]
fn rows_of_logits_bound_the_scoring_of_a_prompt() {
    let mut scheduler = scheduler(SchedulerLimits { max_logits_rows: 8, ..limits() }, 100);
    scheduler.submit(NewRequest { scores_prompt: true, ..new_request(20) });
    let mut plan = StepPlan::default();
    let mut scored = Vec::new();
    while scheduler.queued_requests() > 0 || scheduler.running() > 0 {
        assert!(scheduler.plan(&mut plan) && plan.logits_rows.len() <= 8);
        let uses = scheduler.complete();
        assert_eq!(uses.len(), plan.logits_rows.len());
        for used in uses {
            match used.purpose {
                LogitsPurpose::Score { position } => scored.push(position),
                LogitsPurpose::Sample => scheduler.remove(used.id),
            }
        }
    }
    assert_eq!(scored, (1..20).collect::<Vec<_>>());
}

#[test]
fn a_request_of_higher_priority_starts_at_once() {
    let mut scheduler = scheduler(SchedulerLimits { max_batch_size: 1, ..limits() }, 100);
    scheduler.submit(new_request(4));
    step(&mut scheduler);
    let urgent = scheduler.submit(NewRequest { priority: 5, ..new_request(6) })[0];
    assert_eq!(step(&mut scheduler), [(0, 6)]);
    assert_eq!(scheduler.running.first(), Some(&urgent));
    scheduler.remove(urgent);
    assert_eq!(step(&mut scheduler), [(0, 5)]);
}

#[test]
fn what_another_engine_began_goes_before_what_begins_here_and_takes_nobody_s_place() {
    let mut scheduler = scheduler(SchedulerLimits { max_batch_size: 1, ..limits() }, 100);
    let running = scheduler.submit(new_request(4))[0];
    step(&mut scheduler);
    let fresh = scheduler.submit(new_request(5))[0];
    let again = scheduler.submit(NewRequest { answers: vec![vec![7; 3]], ..new_request(6) })[0];
    assert_eq!(step(&mut scheduler), [(4, 1)], "who runs goes on");
    scheduler.remove(running);
    assert_eq!(step(&mut scheduler), [(0, 9)], "prompt and the tokens there are");
    assert_eq!(scheduler.running.first(), Some(&again));
    // A priority is still more.
    let urgent = scheduler.submit(NewRequest { priority: 1, ..new_request(2) })[0];
    scheduler.remove(again);
    step(&mut scheduler);
    assert_eq!(scheduler.running.first(), Some(&urgent));
    scheduler.remove(urgent);
    step(&mut scheduler);
    assert_eq!(scheduler.running.first(), Some(&fresh));
}

#[test]
fn a_stalled_sequence_holds_nobody_up() {
    let mut scheduler = scheduler(SchedulerLimits { max_batch_size: 1, ..limits() }, 4);
    let first = scheduler.submit(new_request(10))[0];
    step(&mut scheduler);
    scheduler.set_stalled(first.arrival, true);
    assert_eq!(step(&mut scheduler), []);
    let second = scheduler.submit(new_request(10))[0];
    assert_eq!(step(&mut scheduler), [(0, 10)]);
    scheduler.remove(second);
    assert_eq!(step(&mut scheduler), []);
    scheduler.set_stalled(first.arrival, false);
    assert_eq!(step(&mut scheduler), [(0, 11)]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    /// Whatever the sizes: the first that runs gets on in every step, bounds hold, and all end.
    #[test]
    fn every_sequence_ends(
        lengths in prop::collection::vec((1usize..40, 1usize..10, -1i32..2, 1usize..4), 1..12),
        extra in 0usize..4, max_step_rows in 4usize..40, max_chunk_rows in 1usize..40, max_batch_size in 1usize..5, prefix_caching in any::<bool>(),
    ) {
        let limits = SchedulerLimits { max_step_rows, max_logits_rows: max_step_rows, max_batch_size, max_chunk_rows, prefix_caching };
        let needed = lengths.iter().map(|&(prompt, answer, ..)| (prompt + answer - 1).div_ceil(4)).max().unwrap();
        let mut scheduler = scheduler(limits, needed + extra);
        let mut left: BTreeMap<SequenceId, usize> = BTreeMap::new();
        for &(prompt, answer, priority, n) in &lengths {
            let request = NewRequest { priority, answers: vec![Vec::new(); n], ..new_request(prompt) };
            left.extend(scheduler.submit(request).into_iter().map(|id| (id, answer)));
        }
        let mut plan = StepPlan::default();
        while !left.is_empty() {
            let first = scheduler.running.first().copied();
            let before = first.map_or(0, |first| scheduler.sequences[&first].computed);
            prop_assert!(scheduler.plan(&mut plan));
            prop_assert!(plan.tokens.len() <= max_step_rows && plan.sequences.len() <= max_batch_size);
            prop_assert!(plan.sequences.iter().all(|slice| slice.row_count as usize <= max_chunk_rows));
            let uses = scheduler.complete();
            if let Some(first) = first.filter(|first| scheduler.running.first() == Some(first)) {
                prop_assert!(scheduler.sequences[&first].computed > before, "the first stands still");
            }
            for used in uses {
                let rest = left.get_mut(&used.id).unwrap();
                *rest -= 1;
                if *rest == 0 {
                    left.remove(&used.id);
                    scheduler.remove(used.id);
                } else {
                    scheduler.append(used.id, 1);
                }
            }
            prop_assert_eq!(scheduler.check(), Ok(()));
        }
        prop_assert!(scheduler.is_empty() && scheduler.blocks().used() == 0);
    }
}

/// Plans a step, and says who is in it.
fn begin(scheduler: &mut Scheduler) -> Vec<u64> {
    let mut plan = StepPlan::default();
    if !scheduler.plan(&mut plan) {
        return Vec::new();
    }
    scheduler.check().unwrap();
    scheduler.steps.back().unwrap().iter().map(|planned| planned.id().arrival).collect()
}

fn finish(scheduler: &mut Scheduler) {
    for used in scheduler.complete() {
        scheduler.append(used.id, 1);
    }
    scheduler.check().unwrap();
}

#[test]
fn steps_under_way_share_the_sequences_and_leave_each_other_alone() {
    let mut scheduler = scheduler(limits(), 100);
    scheduler.allow_under_way(2);
    let ids: Vec<_> = (0..5).map(|_| scheduler.submit(new_request(3))[0]).collect();
    assert_eq!(begin(&mut scheduler), [0, 1, 2]);
    assert_eq!(begin(&mut scheduler), [3, 4]);
    assert!(begin(&mut scheduler).is_empty(), "no more than two");
    finish(&mut scheduler);
    assert_eq!(begin(&mut scheduler), [0, 1, 2]);
    // Whoever ends while under way has no use for its rows, and the others of the step have theirs.
    scheduler.remove(ids[3]);
    let uses: Vec<_> = scheduler.complete().into_iter().map(|used| (used.row, used.id.arrival)).collect();
    assert_eq!(uses, [(1, 4)]);
    scheduler.append(ids[4], 1);
    assert_eq!(begin(&mut scheduler), [4]);
    assert_eq!(scheduler.under_way(), 2);
}

#[test]
fn a_sequence_under_way_keeps_its_blocks() {
    // Two blocks of four slots for each; growing takes a third.
    let mut scheduler = scheduler(limits(), 5);
    scheduler.allow_under_way(2);
    scheduler.submit(new_request(4));
    scheduler.submit(new_request(7));
    assert_eq!(begin(&mut scheduler), [0]);
    assert_eq!(begin(&mut scheduler), [1]);
    let mut rounds = 0;
    while scheduler.counts().preemptions == 0 {
        rounds += 1;
        assert!(rounds < 40, "there is not room for both to grow");
        finish(&mut scheduler);
        begin(&mut scheduler);
    }
    // The last one made room, once its step had come back, and the first goes on.
    let state = |arrival| scheduler.sequences.iter().find(|(id, _)| id.arrival == arrival).map(|(_, sequence)| sequence.state);
    assert_eq!((state(0), state(1)), (Some(State::Running), Some(State::Waiting)));
    assert_eq!(scheduler.under_way(), 1);
}
