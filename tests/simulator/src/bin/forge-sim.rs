//! `forge-sim`: runs seeds of the simulator, and replays one.

use std::ops::Range;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use forge_simulator::batch::{Batch, run_batch};
use forge_simulator::report::failure;
use forge_simulator::shrink::shrink;
use forge_simulator::simulation::Plan;

/// Runs that shrinking may take.
const SHRINK_TRIES: usize = 200;

/// Runs the simulated cluster. Ends with 1 where a seed breaks an invariant, and shows the lowest that does.
#[derive(Debug, Parser)]
struct Arguments {
    /// Seeds to run, as `0..1000`.
    #[arg(long, value_parser = parse_seeds, default_value = "0..100")]
    seeds: Range<u64>,
    /// One seed alone.
    #[arg(long, conflicts_with = "seeds")]
    seed: Option<u64>,
    /// Threads, each of which runs seeds of its own. What is found does not depend on it.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: u16,
    /// Prints everything that happens.
    #[arg(long, conflicts_with = "threads")]
    trace: bool,
    /// Does not look for a smaller run of a failing seed.
    #[arg(long)]
    no_shrink: bool,
}

fn parse_seeds(text: &str) -> Result<Range<u64>, String> {
    let (from, to) = text.split_once("..").ok_or("write it as FROM..TO, as in 0..1000")?;
    let number = |text: &str| text.parse::<u64>().map_err(|error| format!("{text:?}: {error}"));
    Ok(number(from)?..number(to)?)
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let seeds = arguments.seed.map_or(arguments.seeds, |seed| seed..seed + 1);
    let began = Instant::now();
    let plan_of = |seed| Plan { prints: arguments.trace, ..Plan::of_seed(seed) };
    let Batch { totals, failed } = run_batch(seeds, usize::from(arguments.threads), plan_of);
    if let Some((plan, outcome)) = failed {
        let quiet = Plan { prints: false, ..plan };
        let tries = if arguments.no_shrink { 0 } else { SHRINK_TRIES };
        let (small, came_to) = shrink(&quiet, &outcome, tries);
        print!("{}", failure(&small, &came_to, quiet.faults.len() - small.faults.len()));
        return ExitCode::FAILURE;
    }
    print!("{}", totals.text(began.elapsed().as_secs_f64()));
    ExitCode::SUCCESS
}
