//! Everything comes back from the wire as it was, and nothing else is taken.

use std::time::Duration;

use forge_proto::engine as wire;
use forge_shared::generate::{
    AdmitError, Choice, EngineEvent, FinishReason, GenerateRequest, InvalidParam, Logprobs, SamplingParams, TenantSalt, TokenEvent,
    TokenLogprob, Usage,
};
use forge_shared::ids::{Epoch, ReplicaId, RequestId, ServiceName};
use forge_shared::link::{DefaultSampling, EngineStatus, ModelCard};
use proptest::option::of;
use proptest::prelude::*;

use super::reply::{self, EngineReply, ReplicaCard};
use super::request::{self, Submission};
use super::{WireError, fuzz};

fn number() -> impl Strategy<Value = f32> {
    -1e30f32..1e30
}

fn tokens() -> impl Strategy<Value = Vec<u32>> {
    prop::collection::vec(any::<u32>(), 0..20)
}

prop_compose! {
    fn params()(
        numbers in prop::array::uniform6(number()),
        counts in any::<(u32, u32, u32)>(),
        logit_bias in prop::collection::vec((any::<u32>(), number()), 0..5),
        stop in prop::collection::vec(".{1,20}", 0..4),
        stop_token_ids in tokens(),
        flags in any::<(bool, bool)>(),
        logprobs in of(any::<u32>()),
        prompt_logprobs in of(any::<u32>()),
    ) -> SamplingParams {
        let [temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty] = numbers;
        let (top_k, max_tokens, min_tokens) = counts;
        let (ignore_eos, skip_special_tokens) = flags;
        SamplingParams {
            temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, logit_bias, max_tokens,
            min_tokens, stop, stop_token_ids, ignore_eos, skip_special_tokens, logprobs, prompt_logprobs,
        }
    }
}

prop_compose! {
    fn submission()(
        service in "[a-z][a-z0-9.-]{0,20}",
        index in any::<u32>(),
        epoch in any::<u64>(),
        id in ".{0,40}",
        tenant in prop::collection::vec(any::<u8>(), 0..40),
        prompt in prop::collection::vec(any::<u32>(), 1..50),
        emitted in prop::collection::vec(tokens(), 1..4),
        seed in any::<u64>(),
        params in params(),
        priority in any::<i32>(),
        timeout_ms in 0u64..600_000,
    ) -> Submission {
        let choices = emitted.into_iter().zip(0..).map(|(emitted_tokens, index)| Choice { index, emitted_tokens }).collect();
        Submission {
            replica: ReplicaId { service: ServiceName(service), index },
            epoch: Epoch(epoch),
            request: GenerateRequest {
                id: RequestId(id), tenant: TenantSalt(tenant.into()), prompt_tokens: prompt.into(), choices, seed, params, priority,
            },
            timeout: Duration::from_millis(timeout_ms),
        }
    }
}

fn logprobs() -> impl Strategy<Value = Logprobs> {
    let one = || {
        (any::<u32>(), prop_oneof![number().boxed(), Just(f32::NEG_INFINITY).boxed()])
            .prop_map(|(token, logprob)| TokenLogprob { token, logprob })
    };
    (one(), prop::collection::vec(one(), 0..4)).prop_map(|(chosen, top)| Logprobs { chosen, top })
}

fn refusal() -> impl Strategy<Value = AdmitError> {
    let count = || 0usize..1 << 40;
    prop_oneof![
        (count(), count()).prop_map(|(prompt_tokens, max_model_len)| AdmitError::PromptTooLong { prompt_tokens, max_model_len }),
        (count(), count()).prop_map(|(needed_blocks, total_blocks)| AdmitError::NeverFits { needed_blocks, total_blocks }),
        (any::<u32>(), count()).prop_map(|(token, vocab_size)| AdmitError::UnknownToken { token, vocab_size }),
        (".{0,20}", ".{0,20}").prop_map(|(expected, actual)| AdmitError::Invalid(InvalidParam { field: "top_p", expected, actual })),
        (count(), any::<u32>()).prop_map(|(waiting, retry_after_s)| AdmitError::Overloaded { waiting, retry_after_s }),
        ".{0,40}".prop_map(|reason| AdmitError::Unavailable { reason }),
    ]
}

fn finish() -> impl Strategy<Value = FinishReason> {
    prop_oneof![
        Just(FinishReason::EndOfText),
        any::<u32>().prop_map(FinishReason::StopToken),
        ".{0,9}".prop_map(FinishReason::StopString),
        Just(FinishReason::Length),
    ]
}

fn event() -> impl Strategy<Value = EngineEvent> {
    prop_oneof![
        prop::collection::vec(logprobs(), 0..4).prop_map(EngineEvent::PromptLogprobs),
        (any::<(u32, u32, u32)>(), ".{0,20}", of(logprobs())).prop_map(|((choice, position, token), text, logprobs)| {
            EngineEvent::Token(TokenEvent { choice, position, token, text, logprobs })
        }),
        (any::<u32>(), finish(), ".{0,20}").prop_map(|(choice, reason, text)| EngineEvent::Finished { choice, reason, text }),
        any::<(u32, u32, u32)>().prop_map(|(prompt_tokens, cached_prompt_tokens, completion_tokens)| {
            EngineEvent::Done(Usage { prompt_tokens, cached_prompt_tokens, completion_tokens })
        }),
        (".{0,20}", any::<bool>()).prop_map(|(reason, retryable)| EngineEvent::Failed { reason, retryable }),
    ]
}

fn engine_reply() -> impl Strategy<Value = EngineReply> {
    prop_oneof![
        "[a-z0-9]{0,20}".prop_map(|numerics_id| EngineReply::Admitted { numerics_id }),
        refusal().prop_map(EngineReply::Refused),
        event().prop_map(EngineReply::Event),
    ]
}

prop_compose! {
    fn card()(
        names in prop::collection::vec("[a-z]{1,9}", 1..4),
        sizes in (0usize..1 << 40, 0usize..1 << 40, 0usize..1 << 30),
        words in ("[a-z0-9]{0,9}", "[a-f0-9]{64}"),
        created_s in any::<u64>(),
        sampling in (of(number()), of(any::<u32>()), of(number()), of(number()), of(number())),
    ) -> ReplicaCard {
        let (max_model_len, vocab_size, block_size) = sizes;
        let (temperature, top_k, top_p, min_p, repetition_penalty) = sampling;
        let default_sampling = DefaultSampling { temperature, top_k, top_p, min_p, repetition_penalty };
        let (name, unlisted_names) = (names[0].clone(), names[1..].to_vec());
        let card = ModelCard { name, names, unlisted_names, max_model_len, vocab_size, numerics_id: words.0, created_s, default_sampling };
        ReplicaCard { card: card.into(), text_digest: words.1, block_size }
    }
}

proptest! {
    #[test]
    fn requests_come_back(submission in submission()) {
        prop_assert_eq!(request::from_wire(request::to_wire(&submission)), Ok(submission));
    }

    #[test]
    fn replies_come_back(reply in engine_reply()) {
        prop_assert_eq!(reply::reply_from_wire(reply::reply_to_wire(&reply)), Ok(reply));
    }

    #[test]
    fn cards_come_back(card in card()) {
        prop_assert_eq!(reply::card_from_wire(reply::card_to_wire(&card)), Ok(card));
    }

    #[test]
    fn statuses_come_back(ready: bool, reason in ".{0,20}", counts in prop::array::uniform4(0usize..1 << 40), restarts: u32) {
        let [running, waiting, kv_blocks_used, kv_blocks_total] = counts;
        let status = EngineStatus { ready, reason, running, waiting, kv_blocks_used, kv_blocks_total, restarts };
        prop_assert_eq!(reply::status_from_wire(reply::status_to_wire(&status)), Ok(status));
    }

    #[test]
    fn any_bytes_are_taken_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = (fuzz::submit_request(&bytes), fuzz::engine_reply(&bytes), fuzz::replica_update(&bytes));
    }
}

fn good() -> wire::SubmitRequest {
    let request = GenerateRequest {
        id: RequestId("r".into()),
        tenant: TenantSalt::anonymous(),
        prompt_tokens: vec![1].into(),
        choices: vec![Choice { index: 0, emitted_tokens: Vec::new() }],
        seed: 1,
        params: SamplingParams::default(),
        priority: 0,
    };
    let replica = ReplicaId { service: "m".into(), index: 0 };
    request::to_wire(&Submission { replica, epoch: Epoch(1), request, timeout: Duration::from_secs(1) })
}

#[test]
fn bad_requests_are_refused_by_field() {
    type Damage = fn(&mut wire::SubmitRequest);
    let cases: [(&str, Damage); 11] = [
        ("replica is missing", |message| message.replica = None),
        ("not service/index", |message| message.replica.as_mut().unwrap().replica = "m".into()),
        ("not service/index", |message| message.replica.as_mut().unwrap().replica = "m/-1".into()),
        ("prompt_tokens is missing", |message| message.prompt_tokens.clear()),
        ("choices is missing", |message| message.choices.clear()),
        ("index 0 is there twice", |message| message.choices.push(wire::Choice::default())),
        ("params is missing", |message| message.params = None),
        ("temperature: NaN", |message| message.params.as_mut().unwrap().temperature = f32::NAN),
        ("logit_bias: inf", |message| {
            message.params.as_mut().unwrap().logit_bias.push(wire::LogitBias { token: 1, bias: f32::INFINITY });
        }),
        ("id: 300, at most 256", |message| message.id = "x".repeat(300)),
        ("choices: 2000, at most 1024", |message| message.choices = vec![wire::Choice::default(); 2000]),
    ];
    for (words, damage) in cases {
        let mut message = good();
        damage(&mut message);
        let error = request::from_wire(message).unwrap_err().to_string();
        assert!(error.contains(words), "{words}: {error}");
    }
}

#[test]
fn what_a_newer_version_sends_is_not_taken_for_something_else() {
    let empty = wire::EngineEvent { event: None };
    assert_eq!(reply::reply_from_wire(empty), Err(WireError::Missing { field: "event" }));
    let refused = wire::engine_event::Event::Refused(wire::Refused { reason: None });
    assert!(reply::reply_from_wire(wire::EngineEvent { event: Some(refused) }).is_err());
    let finished = wire::engine_event::Event::Finished(wire::Finished::default());
    assert!(reply::reply_from_wire(wire::EngineEvent { event: Some(finished) }).is_err());
    let status = wire::Status { running: u64::MAX, ..Default::default() };
    assert!(reply::status_from_wire(status).unwrap_err().to_string().contains("running"));
}

/// The seeds of the fuzz targets are messages that are taken. `FORGE_TEST_WRITE_SEEDS=1` writes them anew.
#[test]
fn seeds_are_taken() {
    use prost::Message;
    type Target = fn(&[u8]) -> Result<(), WireError>;
    let mut long = good();
    long.prompt_tokens = (0..200).collect();
    let mut replayed = good();
    replayed.choices = (0..3).map(|index| wire::Choice { index, emitted_tokens: vec![5, 6] }).collect();
    let logprobs = Logprobs { chosen: TokenLogprob { token: 1, logprob: -0.5 }, top: vec![TokenLogprob { token: 1, logprob: -0.5 }] };
    let token = TokenEvent { choice: 0, position: 1, token: 7, text: " hi".into(), logprobs: Some(logprobs.clone()) };
    let finished = EngineEvent::Finished { choice: 0, reason: FinishReason::StopString("x".into()), text: "y".into() };
    let full = AdmitError::Overloaded { waiting: 3, retry_after_s: 1 };
    let replies = |replies: &[EngineReply]| wire::EngineReply { events: replies.iter().map(reply::reply_to_wire).collect() };
    let card = ReplicaCard {
        card: ModelCard {
            name: "m".into(),
            names: vec!["m".into(), "alias".into()],
            unlisted_names: Vec::new(),
            max_model_len: 4096,
            vocab_size: 32_000,
            numerics_id: "n1".into(),
            created_s: 1,
            default_sampling: DefaultSampling { temperature: Some(0.7), ..Default::default() },
        }
        .into(),
        text_digest: "ab".repeat(32),
        block_size: 16,
    };
    let status = Some(reply::status_to_wire(&EngineStatus { ready: true, running: 2, ..Default::default() }));
    let update = |card, blocks_stored| wire::ReplicaUpdate { card, status: status.clone(), blocks_stored, ..Default::default() };
    let targets: [(&str, Target, [Vec<u8>; 3]); 3] = [
        ("submit_request", fuzz::submit_request, [good(), long, replayed].map(|message| message.encode_to_vec())),
        (
            "engine_reply",
            fuzz::engine_reply,
            [
                replies(&[EngineReply::Admitted { numerics_id: "n1".into() }, EngineReply::Event(EngineEvent::Token(token))]),
                replies(&[EngineReply::Refused(full)]),
                replies(&[EngineReply::Event(EngineEvent::PromptLogprobs(vec![logprobs])), EngineReply::Event(finished)]),
            ]
            .map(|message| message.encode_to_vec()),
        ),
        (
            "replica_update",
            fuzz::replica_update,
            [update(Some(reply::card_to_wire(&card)), vec![1, 2]), update(None, Vec::new()), update(None, vec![u64::MAX])]
                .map(|message| message.encode_to_vec()),
        ),
    ];
    let seeds = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds");
    let is_writing = std::env::var_os("FORGE_TEST_WRITE_SEEDS").is_some();
    for (target, run, messages) in targets {
        let folder = seeds.join(target);
        for (number, message) in messages.iter().enumerate() {
            let file = folder.join(format!("{number}.bin"));
            if is_writing {
                std::fs::create_dir_all(&folder).unwrap();
                std::fs::write(&file, message).unwrap();
            }
            assert_eq!(run(&std::fs::read(&file).unwrap()), Ok(()), "{}", file.display());
        }
    }
}
