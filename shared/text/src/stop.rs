//! Stop strings over streamed text: nothing of a stop string is ever sent, wherever the deltas
//! are cut.
//!
//! The outcome depends on the text alone, never on its cuts: the text ends before the first stop
//! string to be completed; where several are completed by the same character, before the longest.
//! One Knuth-Morris-Pratt automaton per stop string makes a byte cost a few comparisons.

use crate::{Result, TextError};

/// Most stop strings of one request.
const MAX_STOPS: usize = 64;
/// Longest stop string: bounds what is held back.
const MAX_STOP_BYTES: usize = 4096;

/// What a delta led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopOutcome {
    /// No stop string is complete; this much (perhaps nothing) can be sent.
    Emit(String),
    /// A stop string is complete: send `text_before` and end. Text behind it is dropped.
    Stopped {
        /// Text that was held back or new, up to the stop string.
        text_before: String,
        /// The stop string that was found.
        matched: String,
    },
}

/// Finds stop strings in a stream of deltas. See the module's documentation.
///
/// ```
/// use forge_text::{StopMatcher, StopOutcome};
/// let mut stops = StopMatcher::new(&["\nUser:".to_string()]).unwrap();
/// assert_eq!(stops.push("Hi.\nUs"), StopOutcome::Emit("Hi.".into()));
/// assert_eq!(stops.push("ual"), StopOutcome::Emit("\nUsual".into()));
/// ```
#[derive(Clone, Debug)]
pub struct StopMatcher {
    automata: Vec<Automaton>,
    /// Text seen and not yet sent: always a prefix of some stop string.
    held: String,
    stopped: bool,
}

/// Knuth-Morris-Pratt over bytes.
#[derive(Clone, Debug)]
struct Automaton {
    stop: String,
    /// `border[i]`: longest proper border of `stop[..=i]`, in bytes.
    border: Vec<usize>,
    /// Bytes of `stop` that the text seen so far ends with.
    matched: usize,
}

impl Automaton {
    fn new(stop: &str) -> Self {
        let bytes = stop.as_bytes();
        let mut border = vec![0; bytes.len()];
        let mut length = 0;
        for i in 1..bytes.len() {
            while length > 0 && bytes[i] != bytes[length] {
                length = border[length - 1];
            }
            length += usize::from(bytes[i] == bytes[length]);
            border[i] = length;
        }
        Self { stop: stop.to_string(), border, matched: 0 }
    }

    /// Takes the next byte; true when it completes the stop string.
    fn step(&mut self, byte: u8) -> bool {
        let stop = self.stop.as_bytes();
        while self.matched > 0 && stop[self.matched] != byte {
            self.matched = self.border[self.matched - 1];
        }
        self.matched += usize::from(stop[self.matched] == byte);
        self.matched == stop.len()
    }
}

impl StopMatcher {
    /// A matcher for these stop strings; an empty list lets everything through at once.
    ///
    /// # Errors
    /// An empty stop string, more than 64 of them, or one longer than 4096 bytes.
    pub fn new(stops: &[String]) -> Result<Self> {
        if stops.len() > MAX_STOPS {
            return Err(TextError::Stop(format!("{} strings, at most {MAX_STOPS} are allowed", stops.len())));
        }
        for (index, stop) in stops.iter().enumerate() {
            if stop.is_empty() {
                return Err(TextError::Stop(format!("string {index} is empty; leave it out")));
            }
            if stop.len() > MAX_STOP_BYTES {
                return Err(TextError::Stop(format!("string {index} has {} bytes, at most {MAX_STOP_BYTES} are allowed", stop.len())));
            }
        }
        Ok(Self { automata: stops.iter().map(|stop| Automaton::new(stop)).collect(), held: String::new(), stopped: false })
    }

    /// Takes the next text. After a stop was found, further text is dropped.
    pub fn push(&mut self, delta: &str) -> StopOutcome {
        if self.stopped {
            return StopOutcome::Emit(String::new());
        }
        if self.automata.is_empty() {
            return StopOutcome::Emit(delta.to_string());
        }
        let delta_start = self.held.len();
        self.held.push_str(delta);
        for (offset, byte) in delta.bytes().enumerate() {
            let mut found: Option<&str> = None;
            for automaton in &mut self.automata {
                let complete = automaton.step(byte);
                if complete && found.is_none_or(|best| automaton.stop.len() > best.len()) {
                    found = Some(&automaton.stop);
                }
            }
            if let Some(matched) = found {
                let matched = matched.to_string();
                self.stopped = true;
                self.held.truncate(delta_start + offset + 1 - matched.len());
                let text_before = std::mem::take(&mut self.held);
                return StopOutcome::Stopped { text_before, matched };
            }
        }
        let hold = self.automata.iter().map(|a| a.matched).max().unwrap_or(0);
        let keep = self.held.split_off(self.held.len() - hold);
        StopOutcome::Emit(std::mem::replace(&mut self.held, keep))
    }

    /// The held text, when the stream ends without a stop string.
    pub fn flush(&mut self) -> String {
        for automaton in &mut self.automata {
            automaton.matched = 0;
        }
        std::mem::take(&mut self.held)
    }
}
