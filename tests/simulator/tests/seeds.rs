//! A fixed set of seeds and a fresh batch run clean; equal plans give equal runs.
//!
//! `FORGE_TEST_SIM_SEED` gives the first seed of the fresh batch; without it the day does, so that each day's runs are new
//! and a failure can be had again.

use std::time::{SystemTime, UNIX_EPOCH};

use forge_simulator::report::failure;
use forge_simulator::shrink::shrink;
use forge_simulator::simulation::{Plan, run};

/// Of each batch.
const SEEDS: u64 = 12;
/// Seeds that once broke something, before there were gateways in these runs; see docs/reliability.md.
const REGRESSIONS: &[u64] = &[20_778_000];

fn check(seed: u64) {
    check_plan(&Plan::of_seed(seed));
}

fn check_plan(plan: &Plan) {
    let outcome = run(plan);
    if outcome.violation.is_some() {
        let (small, came_to) = shrink(plan, &outcome, 40);
        panic!("{}", failure(&small, &came_to, plan.faults.len() - small.faults.len()));
    }
}

#[test]
fn a_fixed_set_of_seeds_runs_clean() {
    (0..SEEDS).for_each(check);
}

#[test]
fn seeds_that_once_failed_run_clean() {
    REGRESSIONS.iter().for_each(|seed| check_plan(&Plan::without_gateways(*seed)));
}

#[test]
fn a_fresh_batch_runs_clean() {
    let first = match std::env::var("FORGE_TEST_SIM_SEED") {
        Ok(text) => text.parse().expect("FORGE_TEST_SIM_SEED is a number"),
        Err(_) => 1_000 * (SystemTime::now().duration_since(UNIX_EPOCH).expect("it is after 1970").as_secs() / 86_400),
    };
    println!("fresh seeds {first}..{}", first + SEEDS);
    (first..first + SEEDS).for_each(check);
}

#[test]
fn equal_plans_give_equal_runs() {
    let plan = Plan::of_seed(7);
    let [one, other] = [run(&plan), run(&plan)];
    assert_eq!(
        (one.digest, one.events, one.entries, one.answers, one.served.tokens),
        (other.digest, other.events, other.entries, other.answers, other.served.tokens)
    );
    assert_ne!(one.digest, run(&Plan::of_seed(8)).digest);
}
