//! What one core does step by step: joining and leaving, refusal, cancellation, stops, broken logits, back pressure.

mod common;

use common::*;
use forge_engine::EngineOptions;
use forge_model::{StepModel, StepPlan};
use forge_shared::generate::*;
use forge_shared::telemetry::Metrics;

/// Greedy decoding without an engine: one contiguous block table, one row at a time, the lowest of the largest.
fn plain_greedy(prompt: &[u32], count: usize) -> Vec<u32> {
    let mut model = FakeModel::new(info(4, 64, 256));
    let (mut tokens, mut logits) = (prompt.to_vec(), Vec::new());
    for position in 0..prompt.len() + count - 1 {
        let plan = StepPlan {
            tokens: vec![tokens[position]],
            positions: vec![position as u32],
            slots: vec![position as u32],
            sequences: vec![forge_kernels::SequenceSlice {
                row_start: 0,
                row_count: 1,
                first_position: position as u32,
                table_start: 0,
                table_len: 64,
            }],
            block_tables: (0..64).collect(),
            logits_rows: vec![0],
            ..StepPlan::default()
        };
        model.step(&plan, &mut logits).unwrap();
        if position + 1 >= prompt.len() {
            let max = logits.iter().copied().fold(f32::MIN, f32::max);
            tokens.push(logits.iter().position(|&logit| logit == max).unwrap() as u32);
        }
    }
    tokens[prompt.len()..].to_vec()
}

#[test]
fn greedy_decoding_is_the_plain_loop() {
    for start in 0..20 {
        let prompt: Vec<u32> = (start..start + 9).collect();
        assert_eq!(alone(&request(&prompt, greedy(12))).tokens(0), plain_greedy(&prompt, 12));
    }
}

#[test]
fn a_short_request_joins_and_leaves_while_long_ones_run() {
    let (info, options) = roomy();
    let mut harness = Harness::new(info, options);
    let mut long: Vec<_> = (0..3).map(|i| harness.submit(request(&[i, 2], greedy(80)), 1000).unwrap()).collect();
    for _ in 0..10 {
        harness.step();
    }
    let mut short = harness.submit(request(&[9, 9, 9], greedy(3)), 1000).unwrap();
    for _ in 0..3 {
        harness.step();
    }
    let mut record = Record::default();
    assert!(record.drain(&mut short, usize::MAX), "three tokens take three steps");
    assert_eq!(record.tokens(0).len(), 3);
    for receiver in &mut long {
        let mut record = Record::default();
        assert!(!record.drain(receiver, usize::MAX));
        assert_eq!(record.tokens(0).len(), 13, "the long ones had a token in every step");
    }
}

#[test]
fn a_long_prompt_does_not_starve_answers() {
    let options = EngineOptions { max_chunk_rows: 64, max_batch_size: 4, ..EngineOptions::default() };
    let mut harness = Harness::new(info(4, 200, 8), options);
    let mut long = harness.submit(request(&[1; 80], greedy(2)), 1000).unwrap();
    let mut short = harness.submit(request(&[2], greedy(10)), 1000).unwrap();
    for _ in 0..10 {
        harness.step();
    }
    let (mut first, mut second) = (Record::default(), Record::default());
    first.drain(&mut long, usize::MAX);
    second.drain(&mut short, usize::MAX);
    assert_eq!((first.tokens(0).len(), second.tokens(0).len()), (0, 10), "two rows of eight were kept for others");
    harness.run();
}

#[test]
fn answers_share_their_prompt_and_differ() {
    let (info, options) = roomy();
    let mut harness = Harness::new(info, options);
    let mut request = request(&[4; 33], SamplingParams { max_tokens: 5, ignore_eos: true, ..SamplingParams::default() });
    request.choices = (0..4).map(|index| Choice { index, emitted_tokens: Vec::new() }).collect();
    let mut receiver = harness.submit(request, 1000).unwrap();
    harness.step();
    assert_eq!(harness.model.rows, 33, "the prompt is computed once");
    assert_eq!((harness.core.scheduler().running(), harness.core.scheduler().blocks().used()), (4, 3));
    harness.run();
    assert_eq!(harness.model.rows, 33 + 4 * 4);
    let mut record = Record::default();
    record.drain(&mut receiver, usize::MAX);
    assert_eq!(record.done.unwrap().completion_tokens, 20);
    assert!((1..4).any(|choice| record.tokens(choice) != record.tokens(0)));
}

#[test]
fn cancellation_frees_everything_within_one_step() {
    let (info, options) = roomy();
    let mut harness = Harness::new(info, options);
    let mut request = request(&[4; 33], greedy(50));
    request.choices = (0..3).map(|index| Choice { index, emitted_tokens: Vec::new() }).collect();
    let receiver = harness.submit(request, 1000).unwrap();
    for _ in 0..5 {
        harness.step();
    }
    assert!(harness.core.scheduler().blocks().used() > 0);
    drop(receiver);
    harness.step();
    assert_eq!(harness.core.scheduler().blocks().used(), 0);
    assert!(harness.core.is_idle());
}

#[test]
fn a_cached_prefix_is_not_computed_again_and_tenants_do_not_share() {
    let (info, options) = roomy();
    let mut harness = Harness::new(info, EngineOptions { prefix_caching: true, ..options });
    let mut cached = |tenant: &[u8]| {
        let mut request = request(&[4; 40], greedy(1));
        request.tenant = TenantSalt(tenant.into());
        let rows = harness.model.rows;
        let mut receiver = harness.submit(request, 10).unwrap();
        harness.run();
        let mut usage = None;
        while let Ok(event) = receiver.try_recv() {
            if let EngineEvent::Done(done) = event {
                usage = Some(done.cached_prompt_tokens as usize);
            }
        }
        (usage.unwrap(), harness.model.rows - rows)
    };
    assert_eq!(cached(b"a"), (0, 40));
    assert_eq!(cached(b"a"), (32, 8));
    assert_eq!(cached(b"b"), (0, 40));
}

#[test]
fn higher_priority_takes_seats_and_blocks() {
    let options = EngineOptions { max_batch_size: 2, ..EngineOptions::default() };
    let mut harness = Harness::new(info(4, 24, 64), options);
    let mut low: Vec<_> = (0..3).map(|i| harness.submit(request(&[i; 20], greedy(20)), 100).unwrap()).collect();
    harness.step();
    let mut urgent = request(&[7; 20], greedy(3));
    urgent.priority = 1;
    let mut high = harness.submit(urgent.clone(), 100).unwrap();
    for _ in 0..3 {
        harness.step();
    }
    let mut record = Record::default();
    assert!(record.drain(&mut high, usize::MAX));
    assert_eq!(record, alone(&urgent));
    harness.run();
    for (i, receiver) in low.iter_mut().enumerate() {
        let mut record = Record::default();
        record.drain(receiver, usize::MAX);
        assert_eq!(record, alone(&request(&[i as u32; 20], greedy(20))));
    }
}

#[test]
fn what_can_never_fit_is_refused_with_the_numbers() {
    let options = EngineOptions { max_batch_size: 4, ..EngineOptions::default() };
    let mut harness = Harness::new(info(4, 10, 64), options);
    let mut refusal = |prompt: usize, max_tokens: u32| harness.submit(request(&vec![1; prompt], greedy(max_tokens)), 10).err();
    assert_eq!(refusal(96, 1), Some(AdmitError::PromptTooLong { prompt_tokens: 96, max_model_len: 96 }));
    assert_eq!(refusal(40, 2), Some(AdmitError::NeverFits { needed_blocks: 11, total_blocks: 10 }));
    assert_eq!(refusal(40, 1), None);
    let mut invalid = |change: fn(&mut GenerateRequest)| {
        let mut request = request(&[1, 2], greedy(3));
        change(&mut request);
        harness.submit(request, 10).unwrap_err()
    };
    assert_eq!(invalid(|r| r.prompt_tokens = [64].into()), AdmitError::UnknownToken { token: 64, vocab_size: 64 });
    assert_eq!(invalid(|r| r.params.logit_bias = vec![(99, 1.0)]), AdmitError::UnknownToken { token: 99, vocab_size: 64 });
    for (change, field) in [
        ((|r| r.prompt_tokens = [].into()) as fn(&mut GenerateRequest), "prompt"),
        (|r| r.choices.clear(), "n"),
        (|r| r.choices = vec![r.choices[0].clone(); 2], "choices"),
        (|r| r.choices[0].emitted_tokens = vec![1; 4], "emitted_tokens"),
        (|r| r.params.temperature = f32::NAN, "temperature"),
    ] {
        let AdmitError::Invalid(error) = invalid(change) else { panic!("{field} was not refused") };
        assert_eq!(error.field, field);
    }
    harness.run();
}

#[test]
fn a_full_queue_refuses_and_says_when_to_come_back() {
    let options = EngineOptions { max_batch_size: 1, max_waiting: 2, ..EngineOptions::default() };
    let mut harness = Harness::new(info(4, 100, 64), options);
    let mut receivers = vec![harness.submit(request(&[1], greedy(5)), 100).unwrap()];
    harness.step();
    for _ in 0..2 {
        receivers.push(harness.submit(request(&[1], greedy(5)), 100).unwrap());
    }
    let refused = harness.submit(request(&[1], greedy(5)), 100).unwrap_err();
    assert_eq!(refused, AdmitError::Overloaded { waiting: 2, retry_after_s: 1 });
    harness.run();
    for mut receiver in receivers {
        let mut record = Record::default();
        assert!(record.drain(&mut receiver, usize::MAX) && record.done.is_some());
    }
}

#[test]
fn the_answer_ends_where_the_context_does() {
    let record = alone(&request(&[3; 90], greedy(50)));
    assert_eq!((record.tokens(0).len(), record.finish_reason(0)), (6, FinishReason::Length));
}

#[test]
fn broken_logits_fail_one_request_and_no_other() {
    let (info, options) = roomy();
    let mut harness = Harness::new(info, options);
    harness.model.poison = Some(50);
    let mut bad = harness.submit(request(&[1, 2, 50], greedy(5)), 100).unwrap();
    let mut scored = harness.submit(request(&[1, 50, 3], SamplingParams { prompt_logprobs: Some(1), ..greedy(5) }), 100).unwrap();
    let mut good = harness.submit(request(&[1, 2, 3], greedy(1)), 100).unwrap();
    harness.run();
    for receiver in [&mut bad, &mut scored] {
        let mut record = Record::default();
        assert!(record.drain(receiver, usize::MAX));
        let (reason, retryable) = record.failed.unwrap();
        assert!(reason.contains("not finite") && !retryable, "{reason}");
    }
    let mut record = Record::default();
    record.drain(&mut good, usize::MAX);
    assert_eq!(record, alone(&request(&[1, 2, 3], greedy(1))));
    assert_eq!(harness.core.scheduler().blocks().used(), 0);
}

/// Every stop string that occurs in an answer's text, cut at every token boundary: nothing of it is ever sent.
#[test]
fn stop_strings_end_the_text_before_them() {
    let full = alone(&request(&[5, 6, 7], greedy(30)));
    let text = full.text(0);
    let starts: Vec<usize> = text.char_indices().map(|(start, _)| start).collect();
    for (index, &start) in starts.iter().enumerate() {
        for &end in starts[index + 1..].iter().take(6) {
            let stop = text[start..end].to_string();
            let mut request = request(&[5, 6, 7], greedy(30));
            request.params.stop = vec![stop.clone()];
            let record = alone(&request);
            assert_eq!(record.text(0), text[..text.find(&stop).unwrap()], "stop {stop:?}");
            assert_eq!(record.finish_reason(0), FinishReason::StopString(stop));
        }
    }
}

#[test]
fn stop_tokens_and_end_tokens_wait_for_min_tokens() {
    let tokens = alone(&request(&[5, 6, 7], greedy(30))).tokens(0);
    let stop = tokens[10];
    let first = tokens.iter().position(|&token| token == stop).unwrap();
    let mut request = request(&[5, 6, 7], greedy(30));
    request.params.stop_token_ids = vec![stop];
    let record = alone(&request);
    assert_eq!(record.tokens(0), tokens[..=first]);
    assert_eq!(record.finish_reason(0), FinishReason::StopToken(stop));
    assert_eq!(record.done.unwrap().completion_tokens as usize, first + 1);
    request.params.min_tokens = 20;
    let record = alone(&request);
    assert!(record.tokens(0).len() > 20 && !record.tokens(0)[..20].contains(&stop));

    let mut forced = common::request(&[5, 6, 7], SamplingParams { logit_bias: vec![(END, 100.0)], ..greedy(30) });
    forced.params.ignore_eos = false;
    let record = alone(&forced);
    assert_eq!((record.tokens(0), record.finish_reason(0)), (vec![END], FinishReason::EndOfText));
    forced.params.min_tokens = 4;
    let record = alone(&forced);
    assert_eq!(record.tokens(0).iter().position(|&token| token == END), Some(4));
    forced.params.ignore_eos = true;
    assert_eq!(alone(&forced).tokens(0), vec![END; 30]);
}

#[test]
fn a_prompt_can_be_scored_without_an_answer() {
    let prompt: Vec<u32> = (0..40).collect();
    let params = SamplingParams { prompt_logprobs: Some(2), logprobs: Some(0), ..greedy(0) };
    let mut scored = request(&prompt, params.clone());
    scored.choices = (0..2).map(|index| Choice { index, emitted_tokens: Vec::new() }).collect();
    let record = alone(&scored);
    let logprobs = record.prompt_logprobs.unwrap();
    assert_eq!(logprobs.iter().map(|l| l.chosen.token).collect::<Vec<_>>(), prompt[1..]);
    assert_eq!(record.answers.len(), 2);
    assert_eq!(record.done.unwrap(), Usage { prompt_tokens: 40, cached_prompt_tokens: 0, completion_tokens: 0 });
    // What the model says of a prompt's token is what it says of the same token when it samples it.
    let answer = alone(&request(&prompt[..10], SamplingParams { logprobs: Some(2), logit_bias: vec![(10, 100.0)], ..greedy(1) }));
    let EngineEvent::Token(token) = &answer.answers[&0][0] else { panic!("no token") };
    assert_eq!(token.logprobs.as_ref(), Some(&logprobs[9]));
    let single = alone(&request(&[1], params));
    assert_eq!((single.prompt_logprobs, single.done.is_some()), (Some(vec![]), true));
}

/// A client that does not read stops its own request, not the engine, and loses nothing.
#[test]
fn a_client_that_is_behind_pauses_only_itself() {
    let options = EngineOptions { max_batch_size: 1, ..EngineOptions::default() };
    let mut harness = Harness::new(info(4, 24, 64), options);
    let slow_request = request(&[1, 2, 3], greedy(40));
    let mut slow = harness.submit(slow_request.clone(), 3).unwrap();
    for _ in 0..10 {
        harness.step();
    }
    assert!(!harness.step(), "nothing is left to compute");
    // Its seat goes to others.
    let mut other = harness.submit(request(&[4, 5], greedy(10)), 100).unwrap();
    for _ in 0..12 {
        harness.step();
    }
    let mut record = Record::default();
    assert!(record.drain(&mut other, usize::MAX) && record.done.is_some());
    let mut record = Record::default();
    while !record.drain(&mut slow, 1) {
        harness.step();
    }
    assert_eq!(record, alone(&slow_request));
    assert!(harness.core.is_idle());
}

#[test]
fn metrics_follow_the_scheduler() {
    let metrics = Metrics::new();
    let (info, options) = roomy();
    let mut harness = Harness::with_metrics(info, EngineOptions { prefix_caching: true, ..options }, &metrics);
    let mut receivers: Vec<_> = (0..2).map(|_| harness.submit(request(&[1; 40], greedy(4)), 100).unwrap()).collect();
    harness.step();
    harness.step();
    let page = metrics.encode();
    for line in [
        "forge_requests_running{model_name=\"fake\",replica=\"fake/0\",epoch=\"1\"} 2",
        "forge_requests_waiting{model_name=\"fake\",replica=\"fake/0\",epoch=\"1\"} 0",
        "forge_prefix_cache_queries_total{model_name=\"fake\",replica=\"fake/0\",epoch=\"1\"} 80",
        "forge_prefix_cache_hits_total{model_name=\"fake\",replica=\"fake/0\",epoch=\"1\"} 0",
        "forge_queue_duration_seconds_count{model_name=\"fake\",replica=\"fake/0\",epoch=\"1\"} 2",
        "forge_step_rows_sum{model_name=\"fake\",replica=\"fake/0\",epoch=\"1\"} 82.0",
        "forge_kv_cache_usage_ratio{model_name=\"fake\",replica=\"fake/0\",epoch=\"1\"} 0.09375",
    ] {
        assert!(page.contains(line), "{line} not in\n{page}");
    }
    receivers.clear();
}
