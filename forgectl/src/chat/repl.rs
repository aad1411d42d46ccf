//! The chat loop: read a message or a command, answer it, again.
//!
//! While a line is edited Ctrl-C is a key; while an answer streams it is a signal that ends the answer.

use std::path::{Path, PathBuf};

use forge_worker::local::Served;
use rustyline::error::ReadlineError;
use tokio::runtime::Runtime;

use super::answer::{Answer, Ending, Question, ask};
use super::command::{self, Command};
use super::conversation::Conversation;
use super::editing::LineInput;
use super::{input as messages, settings};
use crate::cli::SamplingFlags;
use crate::failure::{Failure, Result};
use crate::output::print_text;
use crate::replica::{Replica, unless_failed};
use crate::time::Utc;

/// A chat with one model.
pub struct Chat {
    /// The engine, tokenizer and template.
    pub served: Served,
    /// How answers are sampled.
    pub settings: SamplingFlags,
    /// Whether to print measures after each answer.
    pub verbose: bool,
    /// What was said.
    pub conversation: Conversation,
    /// Where history and saved chats live.
    pub home: PathBuf,
}

impl Chat {
    /// A chat that has not begun.
    pub fn new(served: Served, settings: SamplingFlags, verbose: bool, home: &Path) -> Self {
        let conversation = Conversation { model: served.link.card().name.clone(), ..Default::default() };
        Chat { served, settings, verbose, conversation, home: home.to_owned() }
    }

    /// Answers one message, streaming to standard output. A failed or unanswered message is taken back.
    ///
    /// # Errors
    /// The engine's, the template's, or that standard output is gone.
    pub async fn answer(&mut self, message: &str) -> Result<Answer> {
        self.conversation.system = self.settings.system.clone();
        self.conversation.ask(message);
        let answered = self.try_answer().await;
        match &answered {
            Ok(answer) if !answer.text.is_empty() => self.conversation.answer(&answer.text),
            _ => self.conversation.take_back(),
        }
        answered
    }

    async fn try_answer(&self) -> Result<Answer> {
        let Served { link, tokenizer, chat_template } = &self.served;
        let now = i64::try_from(Utc::now().0).unwrap_or(i64::MAX);
        let prompt_tokens = self.conversation.prompt(chat_template.as_ref(), tokenizer, now).map_err(|error| Failure::of(&error))?;
        let card = link.card();
        let room = card.max_model_len.saturating_sub(prompt_tokens.len());
        if room == 0 {
            let message = format!("the conversation has {} tokens and the context {}", prompt_tokens.len(), card.max_model_len);
            return Err(Failure::new(message).help("/clear begins anew; --max-model-len may allow more"));
        }
        let params = settings::params(&self.settings, &card.default_sampling, u32::try_from(room).unwrap_or(u32::MAX));
        let question = Question { prompt_tokens, params, seed: self.settings.seed };
        ask(link.as_ref(), question, &mut |text| print_text(text)).await
    }

    /// Chats until Ctrl-D or `/exit`.
    ///
    /// # Errors
    /// If the terminal cannot be used, or the engine is dead for good.
    pub fn run(mut self, runtime: &Runtime, replica: &mut Replica) -> Result<()> {
        let terminal = |error: ReadlineError| Failure::of(&error).while_doing("cannot use this terminal");
        let mut input = LineInput::new(self.home.join("history")).map_err(terminal)?;
        self.greet()?;
        loop {
            let typed = match input.read() {
                Ok(typed) => typed,
                Err(ReadlineError::Interrupted) => {
                    eprintln!("Ctrl-D or /exit leaves.");
                    continue;
                }
                Err(ReadlineError::Eof) => return Ok(()),
                Err(error) => return Err(terminal(error)),
            };
            let message = messages::message(&typed);
            if message.is_empty() {
                continue;
            }
            input.remember(&typed);
            match command::parse(&message) {
                Some(Ok(Command::Exit)) => return Ok(()),
                Some(Ok(command)) => self.obey(command)?,
                Some(Err(reason)) => eprintln!("{reason}"),
                None => {
                    self.show_answer(runtime, replica, message.strip_prefix('/').filter(|rest| rest.starts_with('/')).unwrap_or(&message))?
                }
            }
        }
    }

    fn greet(&self) -> Result<()> {
        let card = self.served.link.card();
        let kind = if self.served.chat_template.is_some() { "" } else { " It has no chat template: it continues your text." };
        print_text(&format!(
            "{}, context {} tokens.{kind}\n/help lists commands, Ctrl-C stops an answer, Ctrl-D leaves.\n",
            card.name, card.max_model_len
        ))
    }

    fn show_answer(&mut self, runtime: &Runtime, replica: &mut Replica, message: &str) -> Result<()> {
        match runtime.block_on(unless_failed(replica, self.answer(message)))? {
            Ok(answer) => {
                let note = match answer.ending {
                    Ending::Complete => "",
                    Ending::CutOff => " [cut off: max_tokens or the model's context is used up]",
                    Ending::Stopped => " [stopped]",
                };
                print_text(&format!("{note}\n"))?;
                if self.verbose {
                    eprintln!("{}", answer.measures());
                }
            }
            // The chat goes on: the next message may fit, the engine may be back.
            Err(failure) => eprintln!("{failure}"),
        }
        print_text("\n")
    }

    fn obey(&mut self, command: Command) -> Result<()> {
        match command {
            Command::Help => print_text(command::HELP),
            Command::Set { name, value } => match settings::set(&mut self.settings, &name, &value) {
                Ok(()) => print_text(&format!("{name} is {value}\n")),
                Err(reason) => {
                    eprintln!("{reason}");
                    Ok(())
                }
            },
            Command::Show => self.show_settings(),
            Command::Clear => {
                self.conversation.messages.clear();
                print_text("forgotten\n")
            }
            Command::Save(path) => self.report(self.save(path)),
            Command::Load(path) => {
                let loaded = load(&path).map(|conversation| {
                    self.settings.system.clone_from(&conversation.system);
                    let count = conversation.messages.len();
                    self.conversation.messages = conversation.messages;
                    format!("{count} messages read")
                });
                self.report(loaded)
            }
            // The loop ends before it comes here.
            Command::Exit => Ok(()),
        }
    }

    fn report(&self, done: Result<String>) -> Result<()> {
        match done {
            Ok(text) => print_text(&format!("{text}\n")),
            Err(failure) => {
                eprintln!("{failure}");
                Ok(())
            }
        }
    }

    fn show_settings(&self) -> Result<()> {
        let card = self.served.link.card();
        let said = self.conversation.messages.len();
        let mut text = format!("{:20}{}\n{:20}{} tokens\n{:20}{said}\n", "model", card.name, "context", card.max_model_len, "messages");
        for (name, value) in settings::rows(&self.settings, &card.default_sampling) {
            text.push_str(&format!("{name:20}{value}\n"));
        }
        print_text(&text)
    }

    fn save(&self, path: Option<PathBuf>) -> Result<String> {
        let path = match path {
            // A bare name is a chat's name; with a separator it is a path.
            Some(path) if path.components().count() > 1 => path,
            Some(name) => self.home.join("chats").join(name).with_extension("json"),
            None => self.home.join("chats").join(format!("{}.json", Utc::now().to_string().replace(':', "-"))),
        };
        let conversation = Conversation { system: self.settings.system.clone(), ..self.conversation.clone() };
        let text = serde_json::to_string_pretty(&conversation).map_err(|error| Failure::of(&error))?;
        let written = path.parent().map_or(Ok(()), std::fs::create_dir_all).and_then(|()| std::fs::write(&path, text + "\n"));
        written.map_err(|error| Failure::of(&error).while_doing(&format!("cannot write {}", path.display())))?;
        Ok(format!("saved to {}", path.display()))
    }
}

fn load(path: &Path) -> Result<Conversation> {
    let failed = |error: &dyn std::error::Error| Failure::of(error).while_doing(&format!("cannot read {}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| failed(&error))?;
    serde_json::from_str(&text).map_err(|error| failed(&error))
}
