//! `forgectl run`: a chat in the terminal, or one answer.

use std::io::{IsTerminal, Read};
use std::path::Path;
use std::pin::pin;
use std::time::Duration;

use forge_shared::telemetry::Metrics;
use indicatif::ProgressBar;

use crate::chat::answer::Ending;
use crate::chat::repl::Chat;
use crate::chat::settings;
use crate::cli::RunArgs;
use crate::context::{self, Context};
use crate::failure::{Failure, Result};
use crate::names::served_names;
use crate::output::print_text;
use crate::replica::{Replica, unless_failed, unless_stopped};
use crate::runtime;
use crate::support;

/// Longest prompt read from a pipe.
const MAX_PROMPT_BYTES: u64 = 8 << 20;
/// Nothing is running any more when a chat ends.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);

/// Answers once, or chats.
///
/// # Errors
/// A model that cannot be had or run, or an answer that failed.
pub fn run(args: &RunArgs) -> Result<()> {
    settings::check(&args.sampling).map_err(Failure::usage)?;
    let context = Context::open()?;
    let (model, prompt) = model_and_prompt(args);
    let service = context.service(&args.sources, model, &args.keys.settings)?;
    support::check(&context, &service.spec.model)?;
    let prompt = match prompt {
        Some(prompt) => Some(prompt),
        None if std::io::stdin().is_terminal() => None,
        None => Some(piped_prompt()?),
    };
    let runtime = runtime::start()?;
    // A chat ends at once; only `serve` has others' answers to finish.
    runtime.spawn(async {
        runtime::terminate().await;
        std::process::exit(1);
    });
    let starting = async {
        let resolved = context::pull(&service.spec.model, false).await?;
        let names = served_names(&context, &service, &resolved)?;
        let loading = spinner(&format!("opening {}", resolved.name()));
        let mut replica = Replica::start(&service, resolved, names, Metrics::new()).await?;
        loading.finish_and_clear();
        replica.ready().await?;
        Ok(replica)
    };
    let mut replica = runtime.block_on(async { unless_stopped(pin!(runtime::stop_signal()), starting).await })?;
    let chat = Chat::new(replica.served(), args.sampling.clone(), args.verbose, context.home.root());
    let outcome = match prompt {
        Some(prompt) => runtime.block_on(answer_once(chat, &mut replica, &prompt)),
        None => chat.run(&runtime, &mut replica),
    };
    runtime.block_on(replica.shutdown(SHUTDOWN_TIMEOUT));
    outcome
}

/// A first argument that cannot be a model is the prompt's beginning.
fn model_and_prompt(args: &RunArgs) -> (Option<&str>, Option<String>) {
    let mut words: Vec<&str> = args.prompt.iter().map(String::as_str).collect();
    let mut model = args.model.as_deref();
    if let Some(text) = model.filter(|text| text.contains(char::is_whitespace) && !Path::new(text).exists()) {
        words.insert(0, text);
        model = None;
    }
    (model, (!words.is_empty()).then(|| words.join(" ")))
}

fn piped_prompt() -> Result<String> {
    let mut prompt = String::new();
    let read = std::io::stdin().take(MAX_PROMPT_BYTES + 1).read_to_string(&mut prompt);
    read.map_err(|error| Failure::of(&error).while_doing("cannot read the prompt from standard input"))?;
    if prompt.len() as u64 > MAX_PROMPT_BYTES {
        return Err(Failure::usage(format!("the prompt from standard input is longer than {MAX_PROMPT_BYTES} bytes")));
    }
    let prompt = prompt.trim_end().to_owned();
    if prompt.is_empty() {
        return Err(Failure::usage("there is no prompt: standard input is empty and no argument gives one")
            .help("write forgectl run MODEL \"prompt\", or start it on a terminal to chat"));
    }
    Ok(prompt)
}

async fn answer_once(mut chat: Chat, replica: &mut Replica, prompt: &str) -> Result<()> {
    let answer = unless_failed(replica, chat.answer(prompt)).await??;
    print_text("\n")?;
    if chat.verbose {
        eprintln!("{}", answer.measures());
    }
    match answer.ending {
        Ending::Complete => Ok(()),
        Ending::CutOff => {
            tracing::info!("the answer was cut off: max_tokens or the model's context is used up");
            Ok(())
        }
        Ending::Stopped => Err(Failure::new("the answer was stopped")),
    }
}

/// Turns on a terminal, and is silent in a pipe.
fn spinner(text: &str) -> ProgressBar {
    let spinner = ProgressBar::new_spinner().with_message(text.to_owned());
    spinner.enable_steady_tick(Duration::from_millis(100));
    spinner
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn parsed(arguments: &[&str]) -> (Option<String>, Option<String>) {
        let cli = Cli::try_parse_from([&["forgectl", "run"], arguments].concat()).expect("valid usage");
        let Command::Run(args) = cli.command else { panic!("run was parsed as another command") };
        let (model, prompt) = model_and_prompt(&args);
        (model.map(str::to_owned), prompt)
    }

    #[test]
    fn a_first_argument_with_a_space_is_the_prompt() {
        let text = |text: &str| Some(text.to_owned());
        assert_eq!(parsed(&[]), (None, None));
        assert_eq!(parsed(&["gpt2"]), (text("gpt2"), None));
        assert_eq!(parsed(&["Why is it blue?"]), (None, text("Why is it blue?")));
        assert_eq!(parsed(&["gpt2", "Why"]), (text("gpt2"), text("Why")));
        assert_eq!(parsed(&["gpt2", "why", "is", "it"]), (text("gpt2"), text("why is it")));
        assert_eq!(parsed(&["--temperature", "0", "gpt2", "why"]), (text("gpt2"), text("why")));
    }
}
