//! What one request was and how it went.

use serde::Serialize;

/// Kinds of failure that are counted apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorKind {
    /// No connection.
    Connect,
    /// Another status than 200 below 500, such as 429.
    Refused,
    /// A status of 500 or more.
    Server,
    /// The request's deadline passed.
    Deadline,
    /// The stream ended before it was done, or broke.
    Broken,
    /// An error event in the stream.
    InStream,
    /// Something that is no event of this API.
    Malformed,
    /// A stream that was done without any text.
    Empty,
}

impl ErrorKind {
    /// Whether it says that nobody answers, rather than that the answer is no good.
    pub fn is_lost_contact(self) -> bool {
        matches!(self, ErrorKind::Connect | ErrorKind::Deadline | ErrorKind::Broken)
    }
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RequestError {
    /// What kind.
    pub kind: ErrorKind,
    /// What was said.
    pub message: String,
}

impl RequestError {
    /// An error of a kind.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        let mut message = message.into();
        message.truncate(message.floor_char_boundary(300));
        RequestError { kind, message }
    }
}

/// One request. Times are seconds.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// When it was sent, or was to be sent, after the point's beginning.
    pub start_s: f64,
    /// Prompt tokens asked for.
    pub wanted_input_tokens: usize,
    /// Answer tokens asked for.
    pub wanted_output_tokens: usize,
    /// Prompt tokens as the server counts them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input_tokens: Option<usize>,
    /// Answer tokens as the server counts them, else chunks with text.
    pub output_tokens: usize,
    /// Time to the first text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttft_s: Option<f64>,
    /// Times between chunks with text.
    pub gaps_s: Vec<f64>,
    /// Time to the stream's end.
    pub e2e_s: f64,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<RequestError>,
}

impl Record {
    /// Mean time between chunks.
    pub fn mean_gap_s(&self) -> Option<f64> {
        (!self.gaps_s.is_empty()).then(|| self.gaps_s.iter().sum::<f64>() / self.gaps_s.len() as f64)
    }

    /// Time per token after the first.
    pub fn tpot_s(&self) -> Option<f64> {
        let tokens = self.output_tokens.checked_sub(1).filter(|tokens| *tokens > 0)?;
        Some((self.gaps_s.iter().sum::<f64>()) / tokens as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_per_token_count_tokens_and_not_chunks() {
        let record = Record { output_tokens: 5, gaps_s: vec![0.2, 0.2], ..Record::default() };
        assert_eq!((record.mean_gap_s(), record.tpot_s()), (Some(0.2), Some(0.1)));
        let single = Record { output_tokens: 1, ..Record::default() };
        assert_eq!((single.mean_gap_s(), single.tpot_s()), (None, None));
    }

    #[test]
    fn messages_are_cut_between_letters() {
        let error = RequestError::new(ErrorKind::Server, "é".repeat(400));
        assert!(error.message.len() == 300 && error.message.ends_with('é'));
        assert_eq!(RequestError::new(ErrorKind::Server, "short").message, "short");
    }
}
