//! Makes a failing run smaller: leaves out faults that do not matter.

use crate::simulation::{Outcome, Plan, run};

/// The plan with as few faults as still break the same invariant, and what it comes to. Tries each fault alone, over and
/// over, in parts first; at most `tries` runs.
pub fn shrink(plan: &Plan, outcome: &Outcome, tries: usize) -> (Plan, Outcome) {
    let Some(violation) = &outcome.violation else { return (plan.clone(), outcome.clone()) };
    let (mut best, mut came_to, mut left) = (plan.clone(), outcome.clone(), tries);
    let mut part = best.faults.len().div_ceil(2).max(1);
    loop {
        let (mut at, mut is_smaller) = (0, false);
        while at < best.faults.len() && left > 0 {
            let mut smaller = best.clone();
            smaller.faults.drain(at..(at + part).min(best.faults.len()));
            left -= 1;
            let tried = run(&smaller);
            if tried.violation.as_ref().is_some_and(|found| found.invariant == violation.invariant) {
                (best, came_to, is_smaller) = (smaller, tried, true);
            } else {
                at += part;
            }
        }
        if part == 1 && !is_smaller || left == 0 || best.faults.is_empty() {
            return (best, came_to);
        }
        part = (part / 2).max(1);
    }
}
