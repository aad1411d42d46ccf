use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::rollout::{Portion, RolloutSpec};
use crate::spec::{ByteSize, GatewaySpec, KvCacheDtype, Layout, LoadMode};

const HEAD: &str = "apiVersion: forge/v1\nkind: ModelService\n";

fn yaml(spec: &str) -> Result<ModelService, ConfigError> {
    let file = parse_document(&format!("{HEAD}spec:\n{spec}"), Format::Yaml, "a.yaml")?;
    Layers { file: Some(file), default_model: "m".into(), ..Default::default() }.resolve()
}

fn message(result: Result<ModelService, ConfigError>) -> String {
    let error = result.expect_err("refused");
    [error.to_string(), error.help().unwrap_or_default()].join(" | ")
}

/// Dotted paths of all leaves; a list is a leaf.
fn leaves(value: &Value, path: &str, into: &mut Vec<String>) {
    match value {
        Value::Object(group) => {
            for (name, value) in group {
                leaves(value, &format!("{path}.{name}"), into);
            }
        }
        _ => into.push(path.trim_start_matches('.').to_owned()),
    }
}

#[test]
fn what_was_found_of_a_service_is_accepted_beside_the_wish_and_not_read() {
    let text = "apiVersion: forge/v1\nkind: ModelService\nspec: {model: a}\nstatus: {spec: {model: b}, anything: [1]}\n";
    let document = parse_document(text, Format::Yaml, "a.yaml").expect("accepted");
    let settings: Vec<_> = document.settings.iter().map(|setting| (setting.key().path, setting.value().clone())).collect();
    assert_eq!(settings, [("model", json!("a"))]);
}

#[test]
fn the_table_has_the_keys_of_the_specification() {
    let mut in_spec = Vec::new();
    leaves(&default_values(""), "", &mut in_spec);
    in_spec.sort();
    let mut in_table: Vec<String> = KEYS.iter().map(|key| key.path.to_owned()).collect();
    in_table.sort();
    assert_eq!(in_table, in_spec);
    let mut variables: Vec<String> = KEYS.iter().map(Key::variable).collect();
    variables.sort();
    variables.dedup();
    assert_eq!(variables.len(), KEYS.len(), "two keys share a variable");
}

#[test]
fn absent_keys_are_those_that_are_optional() {
    let defaults = default_values("");
    for key in KEYS {
        let value = defaults.pointer(&format!("/{}", key.path.replace('.', "/"))).expect("in the table");
        assert_eq!(value.is_null(), key.optional, "{}", key.path);
        assert_eq!(key.check(value).as_ref(), Ok(value), "the default of {} passes its own check", key.path);
    }
}

#[test]
fn names_of_flags_and_variables_follow_from_the_path() {
    let key = Key::by_path("gateway.metricsPort").expect("a key");
    assert_eq!((key.flag().as_str(), key.variable().as_str()), ("metrics-port", "FORGE_METRICS_PORT"));
    assert_eq!(Key::by_path("layout.tensor").map(Key::variable).as_deref(), Some("FORGE_LAYOUT_TENSOR"));
    for name in ["gateway.metricsPort", "gateway.metrics-port", "metrics_port", "metricsPort", "spec.gateway.metricsPort"] {
        assert_eq!(Key::by_name(name), Some(key), "{name}");
    }
}

#[test]
fn yaml_traps_are_read_as_meant_or_refused() {
    let read = |spec: &str| yaml(spec).map(|service| service.spec);
    // `no` and `off` are texts in YAML 1.2 and booleans in 1.1: only one meaning fits the key.
    for (text, expected) in [("no", false), ("off", false), ("No", false), ("yes", true), ("\"true\"", true), ("true", true)] {
        assert_eq!(read(&format!("  prefixCache: {text}")).map(|spec| spec.prefix_cache), Ok(expected), "{text}");
    }
    assert_eq!(read("  modelName: no").map(|spec| spec.model_name), Ok(Some("no".into())));
    // Floats in exponent form count where they are whole.
    assert_eq!(read("  maxModelLen: 4e3").map(|spec| spec.max_model_len), Ok(Some(4000)));
    assert_eq!(read("  kvMemory: 2e9").map(|spec| spec.kv_memory), Ok(Some(ByteSize(2_000_000_000))));
    assert_eq!(read("  kvMemory: 2GiB").map(|spec| spec.kv_memory), Ok(Some(ByteSize(2 << 30))));
    assert_eq!(read("  maxModelLen: ~").map(|spec| spec.max_model_len), Ok(None));
    for (spec, expected) in [
        ("  maxModelLen: 1e-5", "spec.maxModelLen: expected a whole number, 0 or more, such as 4, found 0.00001"),
        ("  replicas: two", "spec.replicas: expected a whole number, 0 or more, such as 4, found the text \"two\""),
        ("  replicas: -1", "spec.replicas: expected a whole number, 0 or more, such as 4, found -1"),
        ("  maxModelLen: 0100", "the text \"0100\""),
        ("  maxModelLen: 1_000", "the text \"1_000\""),
        ("  maxModelLen: -1", "found -1"),
        ("  maxModelLen: .inf", "not a number"),
        ("  maxModelLen: 99999999999999999999", "larger than any number"),
        ("  modelName: 123", "put it in quotes: \"123\""),
        ("  modelName: true", "put it in quotes"),
        ("  prefixCache: 2", "expected true or false, found 2"),
        ("  prefixCache: maybe", "the text \"maybe\""),
        ("  gateway:\n    port: 70000", "spec.gateway.port: expected a whole number from 0 to 65535, found 70000"),
        ("  gateway:\n    port: 8000\n    port: 8001", "`port` is written twice"),
        ("  gateway: 5", "spec.gateway: expected a group"),
        ("  kvCacheDtype: f8", "expected one of f32, f16, bf16, int8, found the text \"f8\""),
        ("  kvMemory: 2parsecs", "unknown unit"),
        ("  maxModelLength: 5", "unknown key `maxModelLength` | did you mean `maxModelLen`?"),
        ("  port: 5", "unknown key `port` | did you mean `gateway.port`?"),
        ("  gateway:\n    metrcsPort: 5", "`gateway.metrcsPort` | did you mean `gateway.metricsPort`?"),
        ("  <<: {model: a}", "unknown key `<<`"),
        ("  model: [a]", "expected text, found a list"),
        ("  maxStepTokens: 1", "spec.maxStepTokens"),
    ] {
        let found = message(yaml(spec));
        assert!(found.contains(expected), "{spec}: {found}");
    }
}

#[test]
fn documents_that_are_no_service_are_refused() {
    for (text, format, expected) in [
        ("", Format::Yaml, "holds no keys"),
        ("[1]", Format::Json, "holds no keys"),
        ("{", Format::Json, "not valid JSON"),
        ("a = = 1", Format::Toml, "not valid TOML"),
        ("a: [", Format::Yaml, "not valid YAML"),
        ("a: 1\n---\nb: 1", Format::Yaml, "not valid YAML"),
        ("kind: ModelService", Format::Yaml, "apiVersion: is missing; write `apiVersion: forge/v1`"),
        ("{\"apiVersion\":\"forge/v2\",\"kind\":\"ModelService\"}", Format::Json, "found \"forge/v2\""),
        ("apiVersion: forge/v1\nkind: TrainJob", Format::Yaml, "found \"TrainJob\""),
        ("apiVersion: forge/v1\nkind: Worker\nname: w1", Format::Yaml, "configuration of a worker, for `forge-worker --config a`"),
        ("apiVersion: forge/v1\nkind: ModelService\nmodel: x", Format::Yaml, "unknown key `model`"),
        ("apiVersion: forge/v1\nkind: ModelService\nmetadata: {name: 5}", Format::Yaml, "metadata.name: 5 is not a name"),
        ("apiVersion: forge/v1\nkind: ModelService\nmetadata: {label: x}", Format::Yaml, "`metadata.label`"),
        ("{\"kind\":1,\"kind\":2}", Format::Json, "`kind` is written twice"),
    ] {
        let error = parse_document(text, format, "a").expect_err(text);
        assert!(error.to_string().contains(expected), "{text}: {error}");
    }
    let long = "#".repeat((1 << 20) + 1);
    assert!(parse_document(&long, Format::Yaml, "a").is_err_and(|error| error.to_string().contains("bytes long")));
}

#[test]
fn formats_are_told_apart() {
    for (name, text, expected) in [
        ("a.yml", "{}", Format::Yaml),
        ("a.JSON", "", Format::Json),
        ("a.toml", "a: 1", Format::Toml),
        ("a", "\n# c\n{\"a\":1}", Format::Json),
        ("a", "[spec]\nmodel = 'x'", Format::Toml),
        ("a", "apiVersion = 'forge/v1'", Format::Toml),
        ("-", "apiVersion: forge/v1", Format::Yaml),
        ("a", "model: x=y", Format::Yaml),
        ("a", "", Format::Yaml),
    ] {
        assert_eq!(Format::detect(name, text), expected, "{name} {text:?}");
    }
}

#[test]
fn variables_are_typed_and_unknown_ones_refused() {
    let read = |pairs: &[(&str, &str)]| {
        let pairs = pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let environment = from_environment(pairs)?;
        Layers { environment, default_model: "m".into(), ..Default::default() }.resolve()
    };
    let spec = read(&[
        ("FORGE_MAX_MODEL_LEN", "512"),
        ("FORGE_PORT", "9"),
        ("FORGE_PREFIX_CACHE", "off"),
        ("FORGE_CORS_ORIGINS", "http://a, http://b"),
        ("FORGE_HOME", "/x"),
        ("FORGE_TEST_ANYTHING", "1"),
        ("FORGE_HOST", ""),
        ("PATH", "/bin"),
    ])
    .expect("all known")
    .spec;
    assert_eq!((spec.max_model_len, spec.gateway.port, spec.prefix_cache), (Some(512), 9, false));
    assert_eq!(spec.gateway.cors_origins, ["http://a", "http://b"]);
    assert_eq!(spec.gateway.host, "127.0.0.1");
    assert_eq!(
        message(read(&[("FORGE_MAX_MODEL_LENGTH", "1")])),
        "environment: unknown variable `FORGE_MAX_MODEL_LENGTH` | did you mean `FORGE_MAX_MODEL_LEN`?"
    );
    assert!(message(read(&[("FORGE_PORT", "http")])).contains("FORGE_PORT: expected a whole number"));
}

#[test]
fn assignments_are_typed_and_unknown_ones_refused() {
    let read = |texts: &[&str]| {
        let assignments = texts.iter().map(|text| Setting::assignment(text)).collect::<Result<_, _>>()?;
        Layers { assignments, default_model: "m".into(), ..Default::default() }.resolve()
    };
    let spec = read(&["gateway.port=1", "gateway.port=2", "kv-memory=1GiB", "modelName=a=b", "max-model-len=null"]);
    let spec = spec.expect("all known").spec;
    assert_eq!((spec.gateway.port, spec.kv_memory, spec.max_model_len), (2, Some(ByteSize(1 << 30)), None));
    assert_eq!(spec.model_name.as_deref(), Some("a=b"));
    assert!(message(read(&["port"])).contains("write key=value"));
    assert_eq!(message(read(&["gateway.prt=1"])), "--set: unknown key `gateway.prt` | did you mean `gateway.port`?");
    assert!(message(read(&["zzzz=1"])).contains("docs/configuration.md"));
    assert!(message(read(&["blockSize=null"])).contains("expected a whole number"));
}

/// Texts that look like something else in one of the formats.
fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        prop::sample::select(vec![
            "no",
            "On",
            "y",
            "null",
            "~",
            "1e5",
            "1e-5",
            "0x10",
            "010",
            "1_000",
            "12:30:45",
            ".inf",
            "true",
            "- a",
            "a: b",
            "#x",
            "'",
            "\"",
            "a\nb",
            " a ",
            "{a}",
            "[a]",
            "&a",
            "*a",
            "!a",
            "%a",
            "@a",
            "`",
            "2001-01-01",
            "=",
            "<<",
            "?",
            "é\u{1F600}",
        ])
        .prop_map(str::to_owned),
        "[a-z0-9:/._ -]{1,20}",
    ]
}

fn count() -> impl Strategy<Value = usize> {
    1usize..1000
}

fn service() -> impl Strategy<Value = ModelService> {
    let engine = (
        text(),
        prop::option::of(text()),
        prop::option::of(count()),
        prop::sample::select(vec![KvCacheDtype::F32, KvCacheDtype::F16, KvCacheDtype::Bf16, KvCacheDtype::Int8]),
        prop::option::of((0u64..1 << 59).prop_map(ByteSize)),
        (count(), count(), 1000usize..2000, count()),
        (any::<bool>(), any::<bool>()),
        prop::option::of(count()),
        prop::sample::select(vec![LoadMode::Mmap, LoadMode::Eager]),
        (1u32..9, 1usize..9, 1usize..9, 1usize..9),
        prop::option::of(text()),
    );
    let overrides = (prop::option::of(text()), prop::option::of(text()), prop::option::of(any::<u32>()));
    let gateway = (
        (text(), any::<u16>(), text(), any::<u16>(), any::<bool>()),
        prop::collection::vec(text(), 0..3),
        (0u64..1 << 59).prop_map(ByteSize),
        (0u64..100_000, 0u64..100_000, any::<u32>()),
    );
    let portion = || prop_oneof![(0u32..100).prop_map(Portion::Count), (0u32..=100).prop_map(Portion::Percent)];
    let rollout = (portion(), portion(), 1u64..1000).prop_map(|(max_unavailable, max_surge, progress_deadline_s)| RolloutSpec {
        max_unavailable,
        max_surge,
        progress_deadline_s,
    });
    let rollout = rollout.prop_filter("it lets something move", |rollout| rollout.check().is_ok());
    (text(), engine, overrides, gateway, rollout).prop_map(|(name, engine, overrides, gateway, rollout)| {
        let (host, port, metrics_host, metrics_port, insecure) = gateway.0;
        let (block_size, max_batch_size, max_step_tokens, max_waiting) = engine.5;
        let spec = ModelServiceSpec {
            model: engine.0,
            model_name: engine.1,
            arch: overrides.0,
            rope_scaling: overrides.1,
            sliding_window: overrides.2,
            max_model_len: engine.2,
            kv_cache_dtype: engine.3,
            kv_memory: engine.4,
            block_size,
            max_batch_size,
            max_step_tokens,
            max_waiting,
            prefix_cache: engine.6.0,
            check_weights: engine.6.1,
            threads: engine.7,
            load: engine.8,
            replicas: engine.9.0,
            layout: Layout { tensor: engine.9.1, pipeline: engine.9.2, expert: engine.9.3 },
            rollout,
            chat_template: engine.10,
            gateway: GatewaySpec {
                host,
                port,
                metrics_host,
                metrics_port,
                insecure,
                cors_origins: gateway.1,
                max_body: gateway.2,
                request_timeout_s: gateway.3.0,
                drain_timeout_s: gateway.3.1,
                max_choices: gateway.3.2,
            },
        };
        ModelService::new(&name, spec)
    })
}

fn settings_of(service: &ModelService) -> Vec<Setting> {
    parse_document(&json!(service).to_string(), Format::Json, "a").expect("own document").settings
}

proptest! {
    #[test]
    fn a_rendered_service_reads_back_unchanged(service in service()) {
        for format in [Format::Yaml, Format::Toml, Format::Json] {
            let text = render(&service, format).expect("plain data");
            let file = parse_document(&text, format, "a").map_err(|error| TestCaseError::fail(format!("{error}\n{text}")))?;
            let layers = Layers { file: Some(file), default_model: "other".into(), ..Default::default() };
            let resolved = layers.resolve();
            prop_assert_eq!(resolved.as_ref(), Ok(&service), "{}", text);
        }
    }

    #[test]
    fn the_highest_layer_that_names_a_key_wins(
        services in prop::collection::vec(service(), 4),
        masks in prop::collection::vec(any::<u64>(), 4),
    ) {
        let layer = |index: usize| -> Vec<Setting> {
            let all = settings_of(&services[index]);
            all.into_iter().enumerate().filter(|(bit, _)| masks[index] >> bit & 1 == 1).map(|(_, setting)| setting).collect()
        };
        let layers = Layers {
            file: Some(Document { name: None, settings: layer(0) }),
            environment: layer(1),
            flags: layer(2),
            assignments: layer(3),
            default_model: "m".into(),
        };
        // Ranges between keys may be broken by the mixture; what is wanted here is where each value came from.
        let Ok(resolved) = layers.resolve() else { return Ok(()) };
        let rollout = json!(resolved.spec.rollout);
        let mut resolved = json!(resolved.spec);
        resolved["rollout"] = rollout;
        let defaults = default_values("m");
        for key in KEYS {
            let pointer = format!("/{}", key.path.replace('.', "/"));
            let highest = (0..4).rev().find_map(|index| layer(index).into_iter().find(|setting| setting.key == key));
            let expected = highest.map(|setting| setting.value).or(defaults.pointer(&pointer).cloned());
            prop_assert_eq!(resolved.pointer(&pointer), expected.as_ref(), "{}", key.path);
        }
    }

    #[test]
    fn no_text_makes_the_parsers_panic(text in "\\PC{0,200}") {
        for format in [Format::Yaml, Format::Toml, Format::Json] {
            // Only the absence of a panic matters here: random text is no service.
            drop(parse_document(&text, format, "a"));
        }
        drop(Setting::assignment(&text));
    }
}
