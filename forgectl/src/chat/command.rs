//! The `/commands` of a chat, parsed.

use std::path::PathBuf;

/// Names for completion and for errors, in the order of the help.
pub const NAMES: [&str; 8] = ["/help", "/set", "/show", "/clear", "/save", "/load", "/exit", "/quit"];

/// What `/help` prints.
pub const HELP: &str = "\
/set NAME VALUE   change temperature, top_p, top_k, min_p, repetition_penalty, max_tokens, seed or system;
                  the value `default` goes back
/show             show the model and all settings
/clear            forget the conversation
/save [FILE]      save the conversation; without a path it goes to FORGE_HOME/chats
/load FILE        go on with a saved conversation
/help             show this
/exit             leave (Ctrl-D too)

\"\"\" begins and ends a message of several lines; so does a backslash at a line's end.
Ctrl-C stops an answer. The arrow keys go through what you wrote before.
";

/// One command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// List the commands.
    Help,
    /// Change a setting.
    Set {
        /// Which.
        name: String,
        /// To what.
        value: String,
    },
    /// Show model and settings.
    Show,
    /// Forget the conversation.
    Clear,
    /// Write the conversation to a file.
    Save(Option<PathBuf>),
    /// Read a conversation from a file.
    Load(PathBuf),
    /// Leave.
    Exit,
}

/// The command in a message; `None` where it is a message to the model.
///
/// # Errors
/// What is wrong with it and how it is written.
pub fn parse(message: &str) -> Option<Result<Command, String>> {
    if !message.starts_with('/') || message.starts_with("//") {
        return None;
    }
    let (name, rest) = message.split_once(char::is_whitespace).unwrap_or((message, ""));
    let rest = rest.trim();
    let path = || (!rest.is_empty()).then(|| PathBuf::from(rest));
    Some(match name {
        "/help" | "/?" => Ok(Command::Help),
        "/set" => match rest.split_once(char::is_whitespace) {
            Some((name, value)) => Ok(Command::Set { name: name.to_owned(), value: value.trim().to_owned() }),
            None if rest.is_empty() => Ok(Command::Show),
            None => Err(format!("write /set {rest} VALUE, for example /set temperature 0.2")),
        },
        "/show" => Ok(Command::Show),
        "/clear" => Ok(Command::Clear),
        "/save" => Ok(Command::Save(path())),
        "/load" => path().map(Command::Load).ok_or("write /load FILE".to_owned()),
        "/exit" | "/quit" | "/bye" => Ok(Command::Exit),
        _ => Err(format!("there is no command {name}; /help lists them. To send it as text, begin with //")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_told_from_messages() {
        assert_eq!(parse("hello /set"), None);
        assert_eq!(parse("// a comment"), None);
        assert_eq!(parse("/exit"), Some(Ok(Command::Exit)));
        assert_eq!(parse("/save"), Some(Ok(Command::Save(None))));
        assert_eq!(parse("/save a b.json"), Some(Ok(Command::Save(Some("a b.json".into())))));
        let set = Command::Set { name: "system".into(), value: "Be brief.\nBe kind.".into() };
        assert_eq!(parse("/set system  Be brief.\nBe kind. "), Some(Ok(set)));
        for (text, expected) in [("/set seed", "/set seed VALUE"), ("/load", "/load FILE"), ("/frobnicate", "/help")] {
            let message = parse(text).expect("a command").expect_err("wrong");
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn every_name_is_known() {
        for name in NAMES {
            assert!(!matches!(parse(name), None | Some(Err(_))) || name == "/load", "{name}");
        }
    }
}
