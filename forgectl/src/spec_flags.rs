//! The flags that set keys of a specification, made from the table in `forge_shared::config`.
//!
//! So a key's name, type, default, variable and help are written once, and a new key has its flag at once.

use std::marker::PhantomData;

use clap::builder::PossibleValuesParser;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};
use forge_shared::config::{Group, KEYS, Key, Kind, Setting, default_values};
use forge_shared::spec::ByteSize;
use serde_json::Value;

/// The key that has a second flag, `--no-prefix-cache`.
const PREFIX_CACHE: &str = "prefixCache";

/// Which keys a command takes as flags.
pub trait KeyChoice: Clone + Send + Sync + 'static {
    /// Whether it takes this key.
    fn takes(key: &Key) -> bool;
}

/// Keys of a model and its engine: `run`.
#[derive(Debug, Clone, Copy)]
pub struct EngineKeys;

impl KeyChoice for EngineKeys {
    fn takes(key: &Key) -> bool {
        matches!(key.group, Group::Model | Group::Engine)
    }
}

/// Those and the API's: `serve`.
#[derive(Debug, Clone, Copy)]
pub struct ServiceKeys;

impl KeyChoice for ServiceKeys {
    fn takes(key: &Key) -> bool {
        EngineKeys::takes(key) || key.group == Group::Api
    }
}

/// Keys of the numbers a model computes and how: `eval`, which needs no engine.
#[derive(Debug, Clone, Copy)]
pub struct MeasureKeys;

impl KeyChoice for MeasureKeys {
    fn takes(key: &Key) -> bool {
        ["arch", "ropeScaling", "slidingWindow", "kvCacheDtype", "threads", "load", "checkWeights"].contains(&key.path)
    }
}

/// Those, and how the model is divided: `bench model`.
#[derive(Debug, Clone, Copy)]
pub struct BenchKeys;

impl KeyChoice for BenchKeys {
    fn takes(key: &Key) -> bool {
        MeasureKeys::takes(key) || key.path.starts_with("layout.")
    }
}

/// The settings given by flags.
#[derive(Debug, Clone)]
pub struct SpecFlags<C> {
    /// One per flag given, in the order of the table.
    pub settings: Vec<Setting>,
    choice: PhantomData<C>,
}

/// The keys that have a flag in a command. `model` is an argument and not a flag.
fn keys<C: KeyChoice>() -> impl Iterator<Item = &'static Key> {
    KEYS.iter().filter(|key| key.path != "model" && C::takes(key))
}

impl<C: KeyChoice> Args for SpecFlags<C> {
    fn augment_args(command: Command) -> Command {
        let command = keys::<C>().fold(command, |command, key| command.arg(flag(key)));
        if !keys::<C>().any(|key| key.path == PREFIX_CACHE) {
            return command;
        }
        command.arg(
            Arg::new("no-prefix-cache")
                .long("no-prefix-cache")
                .help("The same as --prefix-cache=false")
                .help_heading(heading(Group::Engine))
                .action(ArgAction::SetTrue)
                .conflicts_with("prefix-cache"),
        )
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl<C: KeyChoice> FromArgMatches for SpecFlags<C> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut flags = SpecFlags { settings: Vec::new(), choice: PhantomData };
        flags.update_from_arg_matches(matches)?;
        Ok(flags)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        for key in keys::<C>() {
            let given = match key.kind {
                Kind::Choice(_) => matches.get_one::<String>(&key.flag()).map(|word| parse(key, word)).transpose()?,
                _ => matches.get_one::<Setting>(&key.flag()).cloned(),
            };
            self.settings.extend(given);
        }
        if let Some(key) = keys::<C>().find(|key| key.path == PREFIX_CACHE)
            && matches.get_flag("no-prefix-cache")
        {
            self.settings.push(parse(key, "false")?);
        }
        Ok(())
    }
}

fn parse(key: &'static Key, text: &str) -> Result<Setting, clap::Error> {
    Setting::flag(key, text).map_err(|reason| clap::Error::raw(clap::error::ErrorKind::InvalidValue, reason))
}

fn flag(key: &'static Key) -> Arg {
    let name = key.flag();
    let arg = Arg::new(name.clone()).long(name).help(help(key)).help_heading(heading(key.group)).action(ArgAction::Set);
    let arg = match key.kind {
        Kind::Choice(words) => return arg.value_name("WORD").value_parser(PossibleValuesParser::new(words)),
        Kind::Text if key.path == "chatTemplate" => arg.value_name("FILE"),
        Kind::Text => arg.value_name("TEXT"),
        Kind::Whole { .. } => arg.value_name("N"),
        Kind::Switch => arg.value_name("BOOL").num_args(0..=1).require_equals(true).default_missing_value("true"),
        Kind::Size => arg.value_name("SIZE"),
        Kind::Portion => arg.value_name("N"),
        Kind::List => arg.value_name("LIST").visible_alias("cors-origin"),
    };
    arg.value_parser(move |text: &str| Setting::flag(key, text))
}

fn heading(group: Group) -> &'static str {
    match group {
        Group::Model => "Model",
        Group::Engine => "Engine",
        Group::Api => "API",
        Group::Cluster => "Cluster",
    }
}

fn help(key: &Key) -> String {
    let default = match default_of(key) {
        Some(default) => format!(" [default: {default}]"),
        None => String::new(),
    };
    format!("{}{default} [env: {}]", key.help, key.variable())
}

/// How a command line sets a key: by its flag, or by `--set` where it has none.
pub fn assignment(path: &str, value: &str) -> String {
    match flagged(path) {
        Some(key) => format!("--{} {value}", key.flag()),
        None => format!("--set {path}={value}"),
    }
}

/// A key as errors name it: by its flag, where it has one, and by its path in a file.
pub fn name_of(path: &str) -> String {
    let path = path.strip_prefix("spec.").unwrap_or(path);
    match flagged(path) {
        Some(key) => format!("--{} (spec.{path})", key.flag()),
        None => format!("spec.{path}"),
    }
}

fn flagged(path: &str) -> Option<&'static Key> {
    Key::by_path(path).filter(|key| key.path != "model" && ServiceKeys::takes(key))
}

/// A key's default as people write it; nothing where it depends on model or machine, or is empty.
pub fn default_of(key: &Key) -> Option<String> {
    let defaults = default_values("");
    match defaults.pointer(&format!("/{}", key.path.replace('.', "/")))? {
        Value::Null => None,
        Value::Array(items) if items.is_empty() => None,
        Value::String(text) if text.is_empty() => None,
        Value::String(text) => Some(text.clone()),
        Value::Number(number) if key.kind == Kind::Size => number.as_u64().map(|bytes| ByteSize(bytes).to_string()),
        other => Some(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use serde_json::json;

    use super::*;

    #[derive(Debug, Parser)]
    struct Probe {
        #[command(flatten)]
        flags: SpecFlags<ServiceKeys>,
    }

    fn parse(arguments: &[&str]) -> Result<Vec<(&'static str, Value)>, String> {
        let probe = Probe::try_parse_from([&["probe"], arguments].concat()).map_err(|error| error.to_string())?;
        Ok(probe.flags.settings.iter().map(|setting| (setting.key().path, setting.value().clone())).collect())
    }

    #[test]
    fn every_key_of_the_machine_has_its_flag() {
        for key in keys::<ServiceKeys>() {
            let value = match key.kind {
                Kind::Choice(words) => words[0],
                Kind::Switch => "true",
                Kind::Size => "1MiB",
                Kind::Portion => "25%",
                Kind::Text | Kind::List => "text",
                Kind::Whole { .. } => "7",
            };
            let found = parse(&[&format!("--{}={value}", key.flag())]).expect("takes its own kind of value");
            assert_eq!(found, [(key.path, key.parse(value).expect("checked"))]);
        }
    }

    #[test]
    fn switches_work_bare_and_with_a_value() {
        assert_eq!(parse(&["--insecure"]), Ok(vec![("gateway.insecure", json!(true))]));
        assert_eq!(parse(&["--insecure=no"]), Ok(vec![("gateway.insecure", json!(false))]));
        assert_eq!(parse(&["--no-prefix-cache"]), Ok(vec![("prefixCache", json!(false))]));
        assert_eq!(parse(&["--cors-origin", "a,b"]), Ok(vec![("gateway.corsOrigins", json!(["a", "b"]))]));
    }

    #[test]
    fn keys_are_named_by_the_flags_they_have() {
        assert_eq!(assignment("maxModelLen", "512"), "--max-model-len 512");
        assert_eq!(assignment("layout.tensor", "1"), "--set layout.tensor=1");
        assert_eq!(name_of("spec.ropeScaling"), "--rope-scaling (spec.ropeScaling)");
        assert_eq!(name_of("gateway.host"), "--host (spec.gateway.host)");
        assert_eq!(name_of("spec.layout"), "spec.layout");
    }

    /// A key's line in the manual.
    fn manual_row(key: &Key) -> String {
        let values = match key.kind {
            Kind::Text => "text".to_owned(),
            Kind::Whole { .. } => "whole number".to_owned(),
            Kind::Switch => "true, false".to_owned(),
            Kind::Size => "size".to_owned(),
            Kind::Portion => "number or percentage".to_owned(),
            Kind::Choice(words) => words.join(", "),
            Kind::List => "list".to_owned(),
        };
        let flag = match (key.path, key.group) {
            ("model", _) => "argument".to_owned(),
            (_, Group::Cluster) => "`--set` only".to_owned(),
            _ => format!("`--{}`", key.flag()),
        };
        let default = default_of(key).map_or("-".to_owned(), |default| format!("`{default}`"));
        format!("| `{}` | {flag} | `{}` | {values} | {default} | {} |", key.path, key.variable(), key.help)
    }

    #[test]
    fn the_manual_has_a_row_for_every_key() {
        let manual = include_str!("../../docs/configuration.md");
        let missing: Vec<String> = KEYS.iter().map(manual_row).filter(|row| !manual.contains(row.as_str())).collect();
        assert!(missing.is_empty(), "docs/configuration.md lacks these rows:\n{}", missing.join("\n"));
    }

    #[test]
    fn wrong_values_name_the_flag() {
        for (argument, expected) in [
            ("--port=http", "'--port <N>': expected a whole number from 0 to 65535"),
            ("--kv-memory=2parsecs", "unknown unit"),
            ("--kv-cache-dtype=f8", "[possible values: f32, f16, bf16, int8]"),
            ("--max-model-length=5", "--max-model-len"),
        ] {
            let message = parse(&[argument]).expect_err(argument);
            assert!(message.contains(expected), "{message}");
        }
    }
}
