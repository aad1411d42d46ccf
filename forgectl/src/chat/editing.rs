//! What the line editor asks while a message is typed: is it whole, and which command is meant.

use rustyline::completion::Completer;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::validate::{ValidationContext, ValidationResult, Validator};
use rustyline::{Context, Helper};

use super::{command, input};

/// Helps the editor; it keeps nothing.
pub struct EditHelper;

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
