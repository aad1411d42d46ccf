//! The command line: `forgectl`, or `forge` for short.
//!
//! It puts the other crates together and shows what they do; `serve` runs gateway, engine and worker in this process.
//! What it is not: a library for others (they use forge-model, forge-engine, forge-gateway), and it decides nothing
//! about models or requests.
//!
//! Invariants: answers and listings go to standard output, all else to standard error; a failure is one message, its
//! causes and a remedy, with a documented exit code.

mod banner;
mod chat;
mod cli;
mod cluster;
mod commands;
mod context;
mod embedded;
mod failure;
mod loading;
mod logging;
mod measure;
mod meter;
mod names;
mod output;
mod progress;
mod replica;
mod runtime;
mod spec_flags;
mod support;
mod system;
mod time;

use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{ArgMatches, CommandFactory, FromArgMatches};

use cli::{Cli, Command};
use failure::Result;
use logging::{LogOptions, command_span};
use tracing::Span;

/// Runs the program with the process's arguments.
pub fn main() -> ExitCode {
    let program = program_name();
    let parsed = Cli::command().name(program).bin_name(program).try_get_matches();
    let parsed = parsed.and_then(|matches| {
        check_keys(&matches)?;
        Ok((typed(&matches), Cli::from_arg_matches(&matches)?))
    });
    let outcome = match parsed {
        Ok((typed, cli)) => dispatch(&cli, program, &typed),
        // Help and wrong usage: clap words both, to standard output and error, with 0 and 2.
        Err(error) => error.exit(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{failure}");
            failure.code()
        }
    }
}

/// `keys --server` without `--cluster` would make a key of this machine for somebody who meant a cluster's.
fn check_keys(matches: &ArgMatches) -> Result<(), clap::Error> {
    let Some(("keys", keys)) = matches.subcommand() else { return Ok(()) };
    let is_given = |id: &str| keys.value_source(id) == Some(ValueSource::CommandLine);
    if !keys.get_flag("cluster") && (is_given("server") || is_given("context")) {
        let reason = "--server and --context are for keys of a cluster: add --cluster";
        return Err(Cli::command().error(ErrorKind::MissingRequiredArgument, reason));
    }
    Ok(())
}

/// The name it was called by, so that help and completions say the same.
fn program_name() -> &'static str {
    let called = std::env::args_os().next().map(std::path::PathBuf::from);
    match called.as_deref().and_then(|path| path.file_stem()).and_then(|stem| stem.to_str()) {
        Some("forge") => "forge",
        _ => "forgectl",
    }
}

/// The names of the command and its subcommands: `cluster status`.
fn typed(matches: &ArgMatches) -> String {
    let mut names = Vec::new();
    let mut next = matches.subcommand();
    while let Some((name, inner)) = next {
        names.push(name);
        next = inner.subcommand();
    }
    names.join(" ")
}

fn dispatch(cli: &Cli, program: &str, typed: &str) -> Result<()> {
    let is_server = matches!(cli.command, Command::Serve(_));
    let default_level = if is_server { "info" } else { "warn" };
    let _logging = logging::start(&LogOptions {
        filter: cli.common.log_level.as_deref().unwrap_or(default_level),
        format: cli.common.log_format,
        otlp_endpoint: cli.common.otlp_endpoint.as_deref(),
    })?;
    // A server's work is its clients', whose requests are traces of their own.
    let span = if is_server { Span::none() } else { command_span(typed) };
    let _entered = span.entered();
    match &cli.command {
        Command::Serve(args) => commands::serve::serve(args),
        Command::Run(args) => commands::run::run(args),
        Command::Pull(args) => commands::pull::pull(args),
        Command::List(args) => commands::list::list(args),
        Command::Show(args) => commands::show::show(args),
        Command::Eval(args) => commands::eval::eval(args),
        Command::Bench(args) => commands::bench::bench(args),
        Command::Rm(args) => commands::rm::rm(args),
        Command::Catalogue(args) => commands::catalogue::catalogue(args),
        Command::Keys(args) if args.cluster => cluster::keys(&args.command, &args.server),
        Command::Keys(args) => commands::keys::keys(args),
        Command::Cluster(args) => cluster::cluster(args),
        Command::Context(args) => cluster::context(args),
        Command::Apply(args) => cluster::apply(args),
        Command::Get(args) => cluster::get(args),
        Command::Describe(args) => cluster::describe(args),
        Command::Logs(args) => cluster::logs(args),
        Command::Drain(args) => cluster::drain(args),
        Command::Cordon(args) => cluster::cordon(args, true),
        Command::Uncordon(args) => cluster::cordon(args, false),
        Command::Scale(args) => cluster::scale(args),
        Command::Rollout(args) => cluster::rollout(args),
        Command::Delete(args) => cluster::delete(args),
        Command::Top(args) => cluster::top(args),
        Command::Completions(args) => commands::completions::completions(args, program),
        Command::Version(args) => commands::version::version(args),
    }
}
