//! Streams give what the whole gives, wherever they are cut.

mod common;

use std::sync::LazyLock;

use common::hugging_face;
use forge_text::{IncrementalDecoder, StopMatcher, StopOutcome, Tokenizer};
use proptest::prelude::*;

static TOKENIZERS: LazyLock<Vec<Tokenizer>> =
    LazyLock::new(|| ["byte_level", "sentencepiece", "metaspace", "wordpiece", "spm_bpe", "spm_unigram"].map(hugging_face).into());

fn stream(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> String {
    let mut decoder = IncrementalDecoder::new(tokenizer.clone(), skip_special);
    let mut text = String::new();
    for &id in ids {
        text += &decoder.push(id).unwrap();
    }
    text + &decoder.flush()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Random ids, most of them no valid UTF-8, some outside the vocabulary.
    #[test]
    fn pieces_of_random_ids_join_to_the_whole(
        which in 0usize..6,
        ids in prop::collection::vec(0u32..620, 0..60),
        skip_special in any::<bool>(),
    ) {
        let tokenizer = &TOKENIZERS[which];
        prop_assert_eq!(
            stream(tokenizer, &ids, skip_special),
            tokenizer.decode(&ids, skip_special).unwrap()
        );
    }

    #[test]
    fn pieces_of_any_text_join_to_it(text in any::<String>()) {
        let tokenizer = &TOKENIZERS[0];
        let ids = tokenizer.encode(&text, false).unwrap();
        prop_assert_eq!(stream(tokenizer, &ids, false), text);
    }

    /// A character is given with the token that completes it, not later.
    #[test]
    fn nothing_complete_is_held_back(text in any::<String>()) {
        let tokenizer = &TOKENIZERS[0];
        let mut decoder = IncrementalDecoder::new(tokenizer.clone(), false);
        let mut bytes: Vec<u8> = Vec::new();
        let mut given = String::new();
        for id in tokenizer.encode(&text, false).unwrap() {
            bytes.extend_from_slice(tokenizer.token_bytes(id));
            given += &decoder.push(id).unwrap();
            let complete = match std::str::from_utf8(&bytes) {
                Ok(all) => all,
                Err(error) => std::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap(),
            };
            prop_assert_eq!(&given, complete);
        }
    }

    /// Bytes read in any pieces give what the standard library's lossy reading gives.
    #[test]
    fn invalid_bytes_are_replaced_as_in_the_whole(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
        let tokenizer = &TOKENIZERS[1];
        let name = |byte: &u8| tokenizer.token_id(&format!("<0x{byte:02X}>")).unwrap();
        // The first space of a text is dropped in this layout.
        let start = tokenizer.token_id("▁").unwrap();
        let ids: Vec<u32> = std::iter::once(start).chain(bytes.iter().map(name)).collect();
        prop_assert_eq!(stream(tokenizer, &ids, false), String::from_utf8_lossy(&bytes));
    }
}

/// Reads the text character by character: the first character that completes a stop string ends
/// it, before the longest string that is completed there.
fn naive_stop(text: &str, stops: &[String]) -> (String, Option<String>) {
    for (start, character) in text.char_indices() {
        let end = start + character.len_utf8();
        let complete = stops.iter().filter(|stop| text[..end].ends_with(stop.as_str()));
        if let Some(stop) = complete.max_by_key(|stop| stop.len()) {
            return (text[..end - stop.len()].to_string(), Some(stop.clone()));
        }
    }
    (text.to_string(), None)
}

/// Pushes the text cut at `cuts` (in characters) and checks what is sent on the way.
fn stream_stop(text: &str, stops: &[String], cuts: &[usize]) -> (String, Option<String>) {
    let characters: Vec<char> = text.chars().collect();
    let mut matcher = StopMatcher::new(stops).unwrap();
    let (mut sent, mut pushed, mut start) = (String::new(), String::new(), 0);
    let mut ends: Vec<usize> = cuts.iter().map(|cut| cut % (characters.len() + 1)).collect();
    ends.sort_unstable();
    ends.push(characters.len());
    for end in ends {
        let delta: String = characters[start..end].iter().collect();
        start = end;
        pushed += &delta;
        match matcher.push(&delta) {
            StopOutcome::Emit(text) => sent += &text,
            StopOutcome::Stopped { text_before, matched } => {
                assert_eq!(matcher.push("more"), StopOutcome::Emit(String::new()));
                assert_eq!(matcher.flush(), "");
                return (sent + &text_before, Some(matched));
            }
        }
        // Held back is the longest end of the text that some stop string starts with.
        let held = &pushed[sent.len()..];
        let ends = pushed.char_indices().map(|(at, _)| &pushed[at..]).chain([""]);
        let longest = ends.filter(|end| stops.iter().any(|stop| stop.starts_with(end))).max_by_key(|end| end.len());
        assert_eq!(held, longest.unwrap_or(""));
    }
    (sent + &matcher.flush(), None)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Few letters, so that stop strings overlap themselves, each other and the cuts.
    #[test]
    fn stop_strings_are_found_wherever_the_text_is_cut(
        text in "[abé]{0,40}",
        stops in prop::collection::vec("[abé]{1,5}", 0..4),
        cuts in prop::collection::vec(any::<usize>(), 0..12),
    ) {
        prop_assert_eq!(stream_stop(&text, &stops, &cuts), naive_stop(&text, &stops));
    }
}

#[test]
fn the_first_completed_stop_string_counts_and_of_those_the_longest() {
    let stops = ["b".to_string(), "ab".to_string(), "xabc".to_string()];
    assert_eq!(
        StopMatcher::new(&stops).unwrap().push("xxabc"),
        StopOutcome::Stopped { text_before: "xx".to_string(), matched: "ab".to_string() }
    );
}

#[test]
fn stop_strings_out_of_bounds_are_refused() {
    for stops in [vec![String::new()], vec!["x".repeat(5000)], vec!["x".to_string(); 65]] {
        let error = StopMatcher::new(&stops).unwrap_err();
        assert!(error.is_request_error(), "{error}");
    }
    assert_eq!(StopMatcher::new(&[]).unwrap().push("all"), StopOutcome::Emit("all".to_string()));
}

/// The engine decodes a token for each of 32 sequences per step; this keeps it from becoming
/// noticeable. The bound is wide: builds without optimization run it too.
#[test]
fn a_token_costs_microseconds() {
    let tokenizer = &TOKENIZERS[0];
    let ids: Vec<u32> = (0..100_000u32).map(|n| n * 7919 % 500).collect();
    let mut decoder = IncrementalDecoder::new(tokenizer.clone(), true);
    let mut matcher = StopMatcher::new(&["\nUser:".to_string(), "###".to_string()]).unwrap();
    let started = std::time::Instant::now();
    let mut bytes = 0;
    for &id in &ids {
        if let StopOutcome::Emit(text) = matcher.push(&decoder.push(id).unwrap()) {
            bytes += text.len();
        }
    }
    let per_token = started.elapsed() / ids.len() as u32;
    assert!(bytes > ids.len());
    assert!(per_token < std::time::Duration::from_micros(20), "{per_token:?}");
    println!("{per_token:?} per token");
}
