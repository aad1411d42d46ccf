//! A message typed on the terminal: edited, completed, remembered.
//!
//! Invariant: outside of [`LineInput::read`] the terminal and its signals are as they were, so that Ctrl-C during an
//! answer is a signal.

use std::path::PathBuf;

use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::{FileHistory, History};
use rustyline::validate::{ValidationContext, ValidationResult, Validator};
use rustyline::{Config, Context, Editor, Helper};

use super::{command, input};

/// Messages remembered between chats.
const HISTORY_ENTRIES: usize = 1000;

/// Reads messages, with the history of this and earlier chats.
pub struct LineInput {
    config: Config,
    history: FileHistory,
    path: PathBuf,
}

impl LineInput {
    /// Begins with the history at `path`, which need not exist yet.
    ///
    /// # Errors
    /// If the library refuses the configuration.
    pub fn new(path: PathBuf) -> rustyline::Result<Self> {
        let config = Config::builder().auto_add_history(false).max_history_size(HISTORY_ENTRIES)?.build();
        let mut history = FileHistory::with_config(&config);
        if path.exists()
            && let Err(error) = history.load(&path)
        {
            tracing::warn!(path = %path.display(), %error, "the history of messages cannot be read");
        }
        Ok(LineInput { config, history, path })
    }

    /// Lets one message be typed, of one or several lines.
    ///
    /// # Errors
    /// Ctrl-C, Ctrl-D, or a terminal that cannot be used.
    pub fn read(&mut self) -> Result<String, ReadlineError> {
        let history = std::mem::replace(&mut self.history, FileHistory::with_config(&self.config));
        // An editor per message: while one lives, it has the handler of SIGINT.
        let mut editor = Editor::with_history(self.config.clone(), history)?;
        editor.set_helper(Some(EditHelper));
        let typed = editor.readline(">>> ");
        self.history = std::mem::take(editor.history_mut());
        typed
    }

    /// Keeps a message for the arrow keys, now and in later chats.
    pub fn remember(&mut self, typed: &str) {
        let added = self.history.add(typed.trim_end()).unwrap_or(false);
        // A history that cannot be written is no reason not to chat, but worth a word.
        if added && let Err(error) = self.history.save(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the history of messages is not kept");
        }
    }
}

/// What the editor asks while a message is typed: is it whole, and which command is meant.
struct EditHelper;

impl Helper for EditHelper {}

impl Highlighter for EditHelper {}

impl Hinter for EditHelper {
    type Hint = String;
}

impl Validator for EditHelper {
    fn validate(&self, context: &mut ValidationContext<'_>) -> rustyline::Result<ValidationResult> {
        Ok(if input::is_complete(context.input()) { ValidationResult::Valid(None) } else { ValidationResult::Incomplete })
    }
}

impl Completer for EditHelper {
    type Candidate = String;

    fn complete(&self, line: &str, position: usize, _context: &Context<'_>) -> rustyline::Result<(usize, Vec<String>)> {
        let typed = &line[..position];
        let known = command::NAMES.iter().filter(|name| typed.starts_with('/') && name.starts_with(typed));
        Ok((0, known.map(|name| format!("{name} ")).collect()))
    }
}
