//! Where the Python package index is, asked of pip: its environment, its configuration files, and
//! last the installed pip itself. No address is written here.
//!
//! pip's own precedence holds: the environment, then the file named by `PIP_CONFIG_FILE`, then the
//! virtual environment's, the user's and the machine's; within the files, `[download]` over
//! `[install]` over `[global]`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::error::{Result, StoreError};

/// How long the installed pip may take to answer.
const PIP_LIMIT: Duration = Duration::from_secs(20);
const MAX_HELP_BYTES: u64 = 1 << 20;
const SECTIONS: [&str; 3] = ["download", "install", "global"];

/// pip's settings the store needs.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct PipSettings {
    pub(crate) index_url: Option<String>,
    pub(crate) certificates: Option<PathBuf>,
}

impl PipSettings {
    /// Reads pip's environment and configuration files. Files that cannot be read count as absent,
    /// as they do for pip.
    pub(crate) fn read() -> Self {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let files: Vec<Settings> = configuration_files(&variable)
            .iter()
            .filter_map(|path| std::fs::read_to_string(path).ok())
            .map(|text| parse_ini(&text))
            .collect();
        Self::combine(&variable, &files)
    }

    fn combine(variable: &dyn Fn(&str) -> Option<String>, files: &[Settings]) -> Self {
        Self {
            index_url: variable("PIP_INDEX_URL").or_else(|| look_up(files, "index-url")),
            certificates: variable("PIP_CERT").or_else(|| look_up(files, "cert")).map(PathBuf::from),
        }
    }
}

/// The address pip uses when nothing configures one, asked of the installed pip's help text.
pub(crate) fn default_index_url() -> Result<String> {
    let mut reasons = vec!["pip's configuration names none".to_owned()];
    for python in ["python3", "python"] {
        let mut command = Command::new(python);
        // A wide terminal keeps the address in one piece.
        command.args(["-m", "pip", "download", "--help"]).env("COLUMNS", "1000").env("NO_COLOR", "1");
        match run_bounded(&mut command, PIP_LIMIT) {
            Ok(text) => match find_default(&text) {
                Some(url) => return Ok(url),
                None => reasons.push(format!("`{python} -m pip download --help` does not tell its default")),
            },
            Err(reason) => reasons.push(format!("`{python} -m pip` {reason}")),
        }
    }
    Err(StoreError::NoPackageIndex { reason: reasons.join("; ") })
}

/// One file's settings as (section, key, value).
type Settings = Vec<(String, String, String)>;

fn look_up(files: &[Settings], key: &str) -> Option<String> {
    SECTIONS.iter().find_map(|section| {
        files.iter().find_map(|file| {
            let is_it = |entry: &&(String, String, String)| entry.0 == *section && entry.1 == key;
            file.iter().rev().find(is_it).map(|entry| entry.2.clone())
        })
    })
}

/// Files in order of precedence, the strongest first.
fn configuration_files(variable: &dyn Fn(&str) -> Option<String>) -> Vec<PathBuf> {
    let named = variable("PIP_CONFIG_FILE");
    if named.as_deref() == Some("/dev/null") {
        return Vec::new();
    }
    let mut files: Vec<PathBuf> = named.into_iter().map(PathBuf::from).collect();
    let environments = ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(|name| variable(name));
    files.extend(environments.map(|root| Path::new(&root).join("pip.conf")));
    if let Some(home) = variable("HOME").map(PathBuf::from) {
        let config = variable("XDG_CONFIG_HOME").map_or_else(|| home.join(".config"), PathBuf::from);
        if cfg!(target_os = "macos") {
            files.push(home.join("Library/Application Support/pip/pip.conf"));
        }
        files.push(config.join("pip/pip.conf"));
        files.push(home.join(".pip/pip.conf"));
    }
    let shared = variable("XDG_CONFIG_DIRS").unwrap_or_else(|| "/etc/xdg".into());
    // Of the machine's files pip lets the later one win.
    files.push("/etc/pip.conf".into());
    files.extend(shared.split(':').rev().map(|root| Path::new(root).join("pip/pip.conf")));
    if cfg!(target_os = "macos") {
        files.push("/Library/Application Support/pip/pip.conf".into());
    }
    files
}

/// The part of the INI format pip's files use: sections, `key = value` or `key: value`, indented
/// continuation lines, whole-line comments.
fn parse_ini(text: &str) -> Settings {
    let mut settings = Settings::new();
    let mut section = String::new();
    for line in text.lines() {
        let trimmed = line.trim();
        if trimmed.is_empty() || trimmed.starts_with(['#', ';']) {
            continue;
        }
        if line.starts_with([' ', '\t']) {
            if let Some((_, _, value)) = settings.last_mut() {
                if !value.is_empty() {
                    value.push(' ');
                }
                value.push_str(trimmed);
            }
            continue;
        }
        if let Some(name) = trimmed.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            section = name.trim().to_ascii_lowercase();
        } else if let Some(cut) = trimmed.find(['=', ':']) {
            let key = trimmed[..cut].trim().to_ascii_lowercase().replace('_', "-");
            settings.push((section.clone(), key, trimmed[cut + 1..].trim().to_owned()));
        }
    }
    settings
}

/// The address in "Base URL of the Python Package Index (default ADDRESS)", however it is wrapped.
fn find_default(help: &str) -> Option<String> {
    let flat = help.split_whitespace().collect::<Vec<_>>().join(" ");
    let start = flat.find("Base URL of the Python Package Index")?;
    let rest = &flat[start..];
    let address = rest[rest.find("(default ")? + "(default ".len()..].split([')', ' ']).next()?;
    let url = url::Url::parse(address).ok()?;
    url.has_host().then(|| address.to_owned())
}

/// Standard output of a command that may take only so long; the error continues "`command` …".
fn run_bounded(command: &mut Command, limit: Duration) -> Result<String, String> {
    use std::io::Read as _;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| format!("cannot be started ({error})"))?;
    let stdout = child.stdout.take().expect("stdout was asked to be piped");
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        stdout.take(MAX_HELP_BYTES).read_to_end(&mut text).map(|_| text)
    });
    let deadline = Instant::now() + limit;
    let status = loop {
        match child.try_wait().map_err(|error| format!("cannot be waited for ({error})"))? {
            Some(status) => break status,
            None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
            None => {
                // It may have ended in this very moment; either way it is gone after this.
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("did not answer within {} s", limit.as_secs()));
            }
        }
    };
    let text = reader.join().map_err(|_| "could not be read".to_owned())?;
    if !status.success() {
        return Err(format!("failed ({status})"));
    }
    let text = text.map_err(|error| format!("could not be read ({error})"))?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn precedence_is_pips() {
        let user = parse_ini("# mine\n[global]\nindex-url = https://user.example/simple\n");
        let machine = parse_ini("[global]\nindex_url: https://machine.example/simple\ncert = /ca.pem\n\n[download]\nno-deps = yes\n");
        let files = [user, machine];
        let none = |_: &str| None;
        let settings = PipSettings::combine(&none, &files);
        assert_eq!(settings.index_url.as_deref(), Some("https://user.example/simple"));
        assert_eq!(settings.certificates, Some(PathBuf::from("/ca.pem")));

        let special = parse_ini("[download]\nindex-url =\n  https://special.example/simple\n");
        let [user, machine] = files;
        let settings = PipSettings::combine(&none, &[user, machine, special]);
        assert_eq!(settings.index_url.as_deref(), Some("https://special.example/simple"));

        let variable = |name: &str| (name == "PIP_INDEX_URL").then(|| "https://env.example".to_owned());
        assert_eq!(PipSettings::combine(&variable, &[]).index_url.as_deref(), Some("https://env.example"));
        assert_eq!(PipSettings::combine(&none, &[]), PipSettings::default());
    }

    #[test]
    fn the_files_are_looked_for_where_pip_does() {
        let variable = |name: &str| match name {
            "PIP_CONFIG_FILE" => Some("/named.conf".to_owned()),
            "VIRTUAL_ENV" => Some("/venv".into()),
            "HOME" => Some("/home/u".into()),
            _ => None,
        };
        let files = configuration_files(&variable);
        let place = |path: &str| files.iter().position(|file| file == Path::new(path)).unwrap();
        assert_eq!(place("/named.conf"), 0);
        assert!(place("/venv/pip.conf") < place("/home/u/.config/pip/pip.conf"));
        assert!(place("/home/u/.config/pip/pip.conf") < place("/etc/pip.conf"));
        assert!(configuration_files(&|name| (name == "PIP_CONFIG_FILE").then(|| "/dev/null".into())).is_empty());
    }

    #[test]
    fn the_default_is_found_in_wrapped_help() {
        let help = "  -i, --index-url <url>  Base URL of the Python Package\n      Index (default\n\
                    \x20      https://index.example/simple). This should point\n";
        assert_eq!(find_default(help).as_deref(), Some("https://index.example/simple"));
        assert_eq!(find_default("Base URL of the Python Package Index (default none)"), None);
        assert_eq!(find_default("unrelated"), None);
    }

    #[test]
    fn a_command_that_hangs_is_ended() {
        let reason = run_bounded(Command::new("sleep").arg("30"), Duration::from_millis(100)).unwrap_err();
        assert!(reason.contains("did not answer"), "{reason}");
        assert!(run_bounded(&mut Command::new("/absent/program"), PIP_LIMIT).is_err());
    }
}
