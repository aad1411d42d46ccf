//! How long prompts and answers are: fixed, uniform, as in conversations, or as in a file; always from a seed.

use rand::Rng;
use rand::rngs::StdRng;
use rand_distr::{Distribution, LogNormal};
use serde::{Deserialize, Serialize};

/// A length in tokens, or a range of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Range {
    /// Shortest.
    pub low: usize,
    /// Longest.
    pub high: usize,
}

impl std::str::FromStr for Range {
    type Err = String;

    /// `128`, or `64-256`.
    fn from_str(text: &str) -> Result<Self, String> {
        let number = |part: &str| {
            let found = part.trim().parse::<usize>().ok().filter(|number| (1..=1 << 20).contains(number));
            found.ok_or_else(|| format!("{text:?} is no length; write 128, or 64-256"))
        };
        let range = match text.split_once('-') {
            Some((low, high)) => Range { low: number(low)?, high: number(high)? },
            None => Range { low: number(text)?, high: number(text)? },
        };
        if range.low > range.high { Err(format!("{text:?} ends before it begins")) } else { Ok(range) }
    }
}

impl Range {
    fn sample(&self, random: &mut StdRng) -> usize {
        random.random_range(self.low..=self.high)
    }
}

/// Conversations as in ShareGPT: log-normal lengths whose means are those published for it with vLLM (161 tokens of
/// prompt, 338 of answer; Kwon et al. 2023), the spreads assumed, within 4 to 1024 tokens as benchmarks clip them.
mod conversation {
    pub const PROMPT_MEAN: f64 = 161.0;
    pub const PROMPT_SIGMA: f64 = 1.2;
    pub const ANSWER_MEAN: f64 = 338.0;
    pub const ANSWER_SIGMA: f64 = 0.9;
    pub const SHORTEST: f64 = 4.0;
    pub const LONGEST: f64 = 1024.0;
}

/// Where lengths, and perhaps prompts, come from.
#[derive(Debug, Clone)]
pub enum Workload {
    /// Each from its range.
    Ranges {
        /// Prompt tokens.
        input: Range,
        /// Answer tokens.
        output: Range,
    },
    /// As in conversations.
    Conversations,
    /// Prompts and lengths of answers from a file.
    Dataset(Vec<Turn>),
}

/// A question and the length of its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    /// The prompt.
    pub prompt: String,
    /// Bytes of the answer in the file.
    pub answer_bytes: usize,
}

/// Bytes of a token of English text, about; only for lengths of a dataset.
const BYTES_PER_TOKEN: usize = 4;

/// What a request asks for, before its prompt is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Draft {
    /// A prompt from a file; else one of `input` tokens is made.
    pub prompt: Option<String>,
    /// Prompt tokens.
    pub input: usize,
    /// Answer tokens.
    pub output: usize,
}

impl Workload {
    /// The next request.
    pub fn draw(&self, random: &mut StdRng) -> Draft {
        match self {
            Workload::Ranges { input, output } => {
                let (input, output) = (input.sample(random), output.sample(random));
                Draft { prompt: None, input, output }
            }
            Workload::Conversations => {
                use conversation::{ANSWER_MEAN, ANSWER_SIGMA, PROMPT_MEAN, PROMPT_SIGMA};
                let input = log_normal(PROMPT_MEAN, PROMPT_SIGMA, random);
                Draft { prompt: None, input, output: log_normal(ANSWER_MEAN, ANSWER_SIGMA, random) }
            }
            Workload::Dataset(turns) => {
                let turn = &turns[random.random_range(0..turns.len())];
                let tokens = |bytes: usize| (bytes / BYTES_PER_TOKEN).max(1);
                Draft { prompt: Some(turn.prompt.clone()), input: tokens(turn.prompt.len()), output: tokens(turn.answer_bytes) }
            }
        }
    }
}

fn log_normal(mean: f64, sigma: f64, random: &mut StdRng) -> usize {
    use conversation::{LONGEST, SHORTEST};
    // The mean of a log-normal is exp(mu + sigma²/2). The constants are finite, so the distribution exists.
    let distribution = LogNormal::new(mean.ln() - sigma * sigma / 2.0, sigma);
    let value = distribution.map_or(mean, |distribution| distribution.sample(random));
    value.clamp(SHORTEST, LONGEST).round() as usize
}

/// Reads a file of conversations as ShareGPT has them: a list of `{"conversations": [{"from", "value"}, …]}`. The first
/// question and its answer of each counts; very short and very long ones are left out, as benchmarks do.
///
/// # Errors
/// A file that is no such list, or has no conversation that counts.
pub fn read_dataset(text: &str) -> Result<Vec<Turn>, String> {
    #[derive(Deserialize)]
    struct Conversation {
        #[serde(default, alias = "conversation")]
        conversations: Vec<Message>,
    }
    #[derive(Deserialize)]
    struct Message {
        #[serde(alias = "content")]
        value: String,
    }
    let read: Vec<Conversation> = serde_json::from_str(text).map_err(|error| format!("is no list of conversations: {error}"))?;
    let turns = read.iter().filter_map(|conversation| {
        let [question, answer, ..] = conversation.conversations.as_slice() else { return None };
        let turn = Turn { prompt: question.value.clone(), answer_bytes: answer.value.len() };
        let fits = |bytes: usize| (4 * BYTES_PER_TOKEN..=1024 * BYTES_PER_TOKEN).contains(&bytes);
        (fits(turn.prompt.len()) && fits(turn.answer_bytes)).then_some(turn)
    });
    let turns: Vec<Turn> = turns.collect();
    if turns.is_empty() { Err("has no conversation of two turns of usual length".into()) } else { Ok(turns) }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn lengths_stay_in_their_range_and_repeat_with_their_seed() {
        let workload = Workload::Ranges { input: "64-256".parse().expect("valid"), output: "8".parse().expect("valid") };
        let draw = |seed| {
            let mut random = StdRng::seed_from_u64(seed);
            (0..200).map(|_| workload.draw(&mut random)).collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
        assert!(draw(1).iter().all(|draft| (64..=256).contains(&draft.input) && draft.output == 8));
        for text in ["", "0", "x", "9-3", "1-2-3"] {
            assert!(text.parse::<Range>().is_err(), "{text}");
        }
    }

    #[test]
    fn conversations_have_the_published_means() {
        let mut random = StdRng::seed_from_u64(7);
        let drafts: Vec<Draft> = (0..20_000).map(|_| Workload::Conversations.draw(&mut random)).collect();
        let mean = |length: fn(&Draft) -> usize| drafts.iter().map(length).sum::<usize>() as f64 / drafts.len() as f64;
        let (input, output) = (mean(|draft| draft.input), mean(|draft| draft.output));
        // Clipping at 1024 takes a part of the tail.
        assert!((130.0..165.0).contains(&input) && (290.0..345.0).contains(&output), "{input} {output}");
    }

    #[test]
    fn a_dataset_gives_first_turns_of_usual_length() {
        let message = |text: &str| serde_json::json!({"from": "human", "value": text});
        let (question, answer) = ("How do tides come about, in short?", "By the moon's pull, and the sun's.");
        let text = serde_json::json!([
            {"id": "a", "conversations": [message(question), message(answer), message("more")]},
            {"id": "b", "conversations": [message("Hi"), message("Hello")]},
            {"id": "c", "conversations": [message(question)]},
        ]);
        let turns = read_dataset(&text.to_string()).expect("one counts");
        assert_eq!(turns, [Turn { prompt: question.into(), answer_bytes: answer.len() }]);
        assert!(read_dataset("[]").is_err() && read_dataset("{}").is_err());
    }
}
