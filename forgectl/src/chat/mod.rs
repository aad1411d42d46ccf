//! Conversations in the terminal.
//!
//! | concept | where | I/O |
//! |---|---|---|
//! | what was said, and the prompt made of it | [`conversation`] | none |
//! | how answers are sampled | [`settings`] | none |
//! | messages and `/commands` | [`input`], [`command`] | none |
//! | keys while a message is typed | `editing` | none |
//! | one answer, streamed | [`answer`] | an engine |
//! | the loop | [`repl`] | the terminal |

pub mod answer;
pub mod command;
pub mod conversation;
mod editing;
pub mod input;
pub mod repl;
pub mod settings;
