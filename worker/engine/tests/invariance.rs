//! P2: a request's tokens, text and log-probabilities are those it has when it runs alone, whatever else happens.

mod common;

use common::*;
use forge_engine::EngineOptions;
use forge_shared::generate::*;
use proptest::prelude::*;

/// When and how a client comes, reads and goes.
#[derive(Debug, Clone)]
struct Client {
    request: GenerateRequest,
    arrives_at: u32,
    leaves_at: Option<u32>,
    /// Events it reads per step.
    reads: usize,
    capacity: usize,
}

#[derive(Debug, Clone)]
struct Machine {
    block_size: usize,
    /// Beyond what the largest request needs.
    extra_blocks: usize,
    max_step_rows: usize,
    max_batch_size: usize,
    max_chunk_rows: usize,
    prefix_caching: bool,
    /// Steps under way at once.
    depth: usize,
}

fn params() -> impl Strategy<Value = SamplingParams> {
    let shape = (1u32..24, 0u32..4, any::<bool>(), prop::option::of(0u32..4), prop::option::weighted(0.2, 0u32..3));
    let sampling = (0usize..6, any::<bool>(), any::<bool>());
    (shape, sampling).prop_map(|((max_tokens, min_tokens, ignore_eos, logprobs, prompt_logprobs), (kind, stops, penalties))| {
        let mut params = SamplingParams {
            temperature: if kind == 0 { 0.0 } else { 1.0 },
            max_tokens,
            min_tokens: min_tokens.min(max_tokens),
            ignore_eos,
            logprobs,
            prompt_logprobs,
            ..SamplingParams::default()
        };
        match kind {
            2 => params.top_k = 5,
            3 => params.top_p = 0.7,
            4 => params.min_p = 0.1,
            _ => {}
        }
        if stops {
            params.stop = vec!["a".into(), "xé".into()];
            params.stop_token_ids = vec![40];
        }
        if penalties {
            params.repetition_penalty = 1.3;
            params.frequency_penalty = 0.4;
            params.presence_penalty = -0.2;
            params.logit_bias = vec![(3, 2.0), (END, -1.0)];
        }
        params
    })
}

fn client() -> impl Strategy<Value = Client> {
    let prompt = (0u32..3, 1usize..60, prop::collection::vec(0u32..60, 0..6));
    let when = (0u32..30, prop::option::weighted(0.2, 0u32..25), prop_oneof![Just(usize::MAX), 0usize..4], 1usize..40);
    let about = (1usize..5, -1i32..2, any::<u64>(), 0u8..2);
    (prompt, params(), when, about).prop_map(
        |((family, shared, own), params, (arrives_at, stays, reads, capacity), (n, priority, seed, tenant))| {
            let mut prompt: Vec<u32> = (0..shared as u32).map(|i| (i * 7 + family * 11) % 60).collect();
            prompt.extend(own);
            let mut request = request(&prompt, params);
            request.choices = (0..n as u32).map(|index| Choice { index: index * 3, emitted_tokens: Vec::new() }).collect();
            request.priority = priority;
            request.seed = seed;
            request.tenant = TenantSalt(vec![tenant].into());
            // A client that reads nothing at all is only one that leaves.
            let leaves_at = stays.map(|stays| arrives_at + stays).or((reads == 0).then_some(arrives_at + 20));
            Client { request, arrives_at, leaves_at, reads, capacity }
        },
    )
}

fn machine() -> impl Strategy<Value = Machine> {
    let sizes = (prop_oneof![Just(1usize), Just(4), Just(7), Just(16)], 0usize..12, 6usize..80, 1usize..7);
    (sizes, prop_oneof![Just(1usize), Just(7), Just(64)], any::<bool>(), 1usize..4).prop_map(
        |((block_size, extra_blocks, max_step_rows, max_batch_size), max_chunk_rows, prefix_caching, depth)| Machine {
            block_size,
            extra_blocks,
            max_step_rows,
            max_batch_size,
            max_chunk_rows,
            prefix_caching,
            depth,
        },
    )
}

fn harness(machine: &Machine, clients: &[Client]) -> Harness {
    let longest = |client: &Client| (client.request.prompt_tokens.len() + client.request.params.max_tokens as usize - 1).min(95);
    let needed = clients.iter().map(longest).max().unwrap_or(1).div_ceil(machine.block_size);
    let options = EngineOptions {
        max_batch_size: machine.max_batch_size,
        max_chunk_rows: machine.max_chunk_rows,
        prefix_caching: machine.prefix_caching,
        ..EngineOptions::default()
    };
    Harness::new(info(machine.block_size, needed + machine.extra_blocks, machine.max_step_rows), options).with_depth(machine.depth)
}

/// Plays the clients against one engine and compares each with itself alone.
fn play(machine: &Machine, clients: &[Client]) -> Result<(), TestCaseError> {
    let mut harness = harness(machine, clients);
    let mut open: Vec<Option<tokio::sync::mpsc::Receiver<EngineEvent>>> = clients.iter().map(|_| None).collect();
    let mut records = vec![Record::default(); clients.len()];
    let mut ended = vec![false; clients.len()];
    for step in 0.. {
        prop_assert!(step < 30_000, "starvation: {} of {} ended", ended.iter().filter(|&&e| e).count(), ended.len());
        for (index, client) in clients.iter().enumerate() {
            if step == client.arrives_at {
                open[index] = Some(harness.submit(client.request.clone(), client.capacity).unwrap());
            }
            if client.leaves_at == Some(step) {
                open[index] = None;
                ended[index] = true;
            }
            if let Some(receiver) = &mut open[index]
                && records[index].drain(receiver, client.reads)
            {
                open[index] = None;
                ended[index] = true;
            }
        }
        if ended.iter().all(|&ended| ended) {
            break;
        }
        harness.step();
    }
    // Those who left may still be under way.
    for _ in 0..=machine.depth {
        harness.step();
    }
    prop_assert!(harness.core.is_idle() && harness.core.scheduler().is_empty());
    prop_assert_eq!(harness.core.scheduler().blocks().used(), 0);
    for (client, record) in clients.iter().zip(&records) {
        let expected = alone(&client.request);
        if client.leaves_at.is_none() || record.done.is_some() {
            prop_assert_eq!(record, &expected);
        } else {
            prop_assert!(record.failed.is_none());
            for (choice, events) in &record.answers {
                prop_assert_eq!(events.as_slice(), &expected.answers[choice][..events.len()]);
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, max_shrink_iters: 2000, ..ProptestConfig::default() })]
    #[test]
    fn any_company_gives_the_answers_of_being_alone(machine in machine(), clients in prop::collection::vec(client(), 1..9)) {
        play(&machine, &clients)?;
    }

    /// Cut anywhere, another engine that gets the emitted tokens goes on with the same events.
    #[test]
    fn a_replay_goes_on_exactly_where_it_was_cut(
        machine in machine(), client in client(), cuts in prop::collection::vec(any::<prop::sample::Index>(), 4)
    ) {
        let expected = alone(&client.request);
        let mut resumed = client.request.clone();
        let mut rest = expected.clone();
        for (choice, cut) in resumed.choices.iter_mut().zip(cuts) {
            let events = rest.answers.get_mut(&choice.index).unwrap();
            let tokens = events.len() - 1;
            let cut = cut.index(tokens + 1);
            choice.emitted_tokens = expected.tokens(choice.index)[..cut].to_vec();
            events.drain(..cut);
        }
        if resumed.choices.iter().any(|choice| !choice.emitted_tokens.is_empty()) {
            rest.prompt_logprobs = None;
        }
        let record = harness(&machine, std::slice::from_ref(&client)).complete(resumed);
        prop_assert_eq!(record, rest);
    }
}

/// The list, on one prompt: alone, among 33, in chunks of 1, 7 and 64, preempted, with the prefix cached.
#[test]
fn batch_chunks_preemption_and_cache_change_nothing() {
    let prompt: Vec<u32> = (0..50).map(|i| i * 13 % 60).collect();
    let params = SamplingParams { max_tokens: 30, ignore_eos: true, logprobs: Some(3), ..SamplingParams::default() };
    let request = request(&prompt, params);
    let expected = alone(&request);
    assert_eq!(expected.tokens(0).len(), 30);
    for max_chunk_rows in [1, 7, 64] {
        for (kv_blocks, company) in [(2000, 0), (2000, 32), (26, 3)] {
            let options = EngineOptions { max_batch_size: 33, max_chunk_rows, ..EngineOptions::default() };
            let mut harness = Harness::new(info(4, kv_blocks, 64), options);
            let mut receivers: Vec<_> =
                (0..company).map(|i| harness.submit(common::request(&prompt[..10 + i], greedy(40)), 1000).unwrap()).collect();
            for round in 0..2 {
                let mut receiver = harness.submit(request.clone(), 1000).unwrap();
                harness.run();
                let mut record = Record::default();
                record.drain(&mut receiver, usize::MAX);
                assert_eq!(record, expected, "chunk {max_chunk_rows}, {kv_blocks} blocks, {company} others, round {round}");
            }
            let counts = harness.core.scheduler().counts();
            assert!(counts.prefix_hits > 0);
            assert_eq!(counts.preemptions > 0, kv_blocks == 26, "{kv_blocks} blocks: {counts:?}");
            receivers.clear();
        }
    }
}

/// Every place to cut one answer, text that is held back and a stop string included.
#[test]
fn a_replay_from_every_token_goes_on() {
    let mut request =
        request(&[5, 6, 7], SamplingParams { max_tokens: 40, ignore_eos: true, logprobs: Some(1), ..SamplingParams::default() });
    let text = alone(&request).text(0);
    let stop: String = text.chars().skip(text.chars().count() - 4).take(3).collect();
    request.params.stop = vec![stop.clone()];
    let whole = alone(&request);
    assert_eq!(whole.finish_reason(0), FinishReason::StopString(stop));
    let tokens = whole.tokens(0);
    for cut in 0..=tokens.len() {
        let mut resumed = request.clone();
        resumed.choices[0].emitted_tokens = tokens[..cut].to_vec();
        let record = alone(&resumed);
        assert_eq!(record.answers[&0], whole.answers[&0][cut..], "cut at {cut}");
        assert_eq!(record.done, whole.done);
    }
}
