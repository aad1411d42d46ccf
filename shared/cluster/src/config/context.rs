//! `context.json`: where the coordinators of a cluster are that an operator knows.
//!
//! What it is not: the certificate for it lies beside it, in files of its own.
//!
//! Invariant: what is read names one to [`MAX_SERVERS`] addresses of the form `host:port`, and nothing else.

use serde::{Deserialize, Serialize};

use super::check_host_port;

/// Largest file.
const MAX_FILE_BYTES: usize = 64 << 10;
/// Most coordinators; a group has five.
const MAX_SERVERS: usize = 64;

/// See the module documentation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ContextFile {
    /// `host:port` of coordinators.
    pub servers: Vec<String>,
}

impl ContextFile {
    /// Reads a file's text.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        if text.len() > MAX_FILE_BYTES {
            return Err(format!("it has {} bytes and is none of Forge's", text.len()));
        }
        let file: ContextFile = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        if !(1..=MAX_SERVERS).contains(&file.servers.len()) {
            return Err(format!("servers: {} addresses; there must be 1 to {MAX_SERVERS}", file.servers.len()));
        }
        file.servers.iter().try_for_each(|server| check_host_port(server).map_err(|reason| format!("servers: {reason}")))?;
        Ok(file)
    }

    /// The text of the file.
    ///
    /// # Errors
    /// None that plain data could cause; the serializer's own.
    pub fn to_text(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string_pretty(self).map(|text| text + "\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_comes_back_and_others_are_refused() {
        let file = ContextFile { servers: vec!["a.example:7000".into(), "[::1]:7000".into()] };
        assert_eq!(ContextFile::parse(file.to_text().unwrap().as_bytes()), Ok(file));
        let cases = [
            ("", "EOF"),
            ("{}", "servers"),
            (r#"{"servers":[]}"#, "0 addresses"),
            (r#"{"servers":["foo"]}"#, "host:port"),
            (r#"{"servers":["a:1"],"key":1}"#, "unknown field"),
        ];
        for (text, expected) in cases {
            let error = ContextFile::parse(text.as_bytes()).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
        assert!(ContextFile::parse(&vec![b' '; MAX_FILE_BYTES + 1]).unwrap_err().contains("bytes"));
    }
}
