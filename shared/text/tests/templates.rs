//! Chat templates against `transformers` (`tests/fixtures/text/templates.json`), and within bounds.

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use common::{fixture, fixture_path};
use forge_text::{ChatRender, ChatTemplate, ContentFormat, TemplateLimits, TextError};
use serde_json::{Value, json};

fn special_tokens() -> BTreeMap<String, String> {
    serde_json::from_value(fixture("templates.json")["special_tokens"].clone()).unwrap()
}

fn template(name: &str) -> ChatTemplate {
    let path = fixture_path(&format!("templates/{name}.jinja"));
    ChatTemplate::new(&std::fs::read_to_string(path).unwrap(), special_tokens()).unwrap()
}

fn compile(source: &str) -> ChatTemplate {
    ChatTemplate::new(source, special_tokens()).unwrap()
}

fn render(source: &str, messages: &[Value]) -> Result<String, TextError> {
    compile(source).render(&ChatRender { messages, ..ChatRender::default() })
}

fn render_case(template: &ChatTemplate, case: &Value, now: i64) -> Result<String, TextError> {
    let flag = |name: &str| case[name].as_bool().unwrap_or(false);
    template.render(&ChatRender {
        messages: case["messages"].as_array().unwrap(),
        tools: case["tools"].as_array().map(Vec::as_slice),
        documents: None,
        add_generation_prompt: flag("add_generation_prompt"),
        continue_final_message: flag("continue_final_message"),
        now_unix_seconds: now,
        variables: case["variables"].as_object(),
    })
}

/// Whether some message's content is of the kind that this template is not given as it stands.
fn is_converted(template: &ChatTemplate, case: &Value) -> bool {
    let mut contents = case["messages"].as_array().unwrap().iter().map(|m| &m["content"]);
    match template.content_format() {
        ContentFormat::String => contents.any(Value::is_array),
        ContentFormat::Parts => contents.any(Value::is_string),
        ContentFormat::Both => false,
    }
}

#[test]
fn prompts_are_those_of_transformers() {
    let golden = fixture("templates.json");
    let now = golden["now"].as_i64().unwrap();
    let mut compared = 0;
    for (name, results) in golden["results"].as_object().unwrap() {
        let template = template(name);
        for (case, expected) in golden["cases"].as_array().unwrap().iter().zip(results.as_array().unwrap()) {
            if is_converted(&template, case) {
                continue;
            }
            compared += 1;
            let rendered = render_case(&template, case, now);
            match expected["error"].as_str() {
                None => assert_eq!(rendered.as_deref(), Ok(expected["text"].as_str().unwrap()), "{name}: {case}"),
                Some("TemplateError") => {
                    let message = expected["message"].as_str().unwrap().to_string();
                    assert_eq!(rendered, Err(TextError::TemplateRaised(message)), "{name}: {case}");
                }
                Some(error) => {
                    let ours = rendered.expect_err(&format!("{name}: {error}: {case}"));
                    assert!(ours.is_request_error(), "{ours}");
                }
            }
        }
    }
    assert!(compared > 150, "{compared} renderings compared");
}

/// Every corner of the language that templates use, in snippets: expressions.txt.
#[test]
fn expressions_mean_what_they_mean_in_jinja2() {
    let golden = fixture("expressions.json");
    let now = golden["now"].as_i64().unwrap();
    let results = golden["results"].as_array().unwrap();
    for expected in results {
        let source = expected["source"].as_str().unwrap();
        let rendered = ChatTemplate::new(source, special_tokens()).and_then(|template| render_case(&template, &golden["case"], now));
        match expected["error"].as_str() {
            None => assert_eq!(rendered.as_deref(), Ok(expected["text"].as_str().unwrap()), "{source}"),
            Some("TemplateError") => {
                let message = expected["message"].as_str().unwrap().to_string();
                assert_eq!(rendered, Err(TextError::TemplateRaised(message)), "{source}");
            }
            Some(error) => assert!(rendered.is_err(), "{source}: {error}, here {rendered:?}"),
        }
    }
    assert!(results.len() > 60);
}

#[test]
fn the_content_format_is_found_and_content_brought_into_it() {
    for (name, format) in [
        ("smollm2", ContentFormat::String),
        ("chatml", ContentFormat::String),
        ("header_ids", ContentFormat::String),
        ("inst", ContentFormat::String),
        ("think", ContentFormat::String),
        ("turns", ContentFormat::Both),
        ("parts", ContentFormat::Parts),
    ] {
        assert_eq!(template(name).content_format(), format, "{name}");
    }
    let parts = [json!({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]})];
    assert_eq!(render("{{ messages[0].content }}", &parts).unwrap(), "a\nb");
    let string = [json!({"role": "user", "content": "a"})];
    let source = "{% for p in messages[0].content %}{{ p.type }}:{{ p.text }}{% endfor %}";
    assert_eq!(render(source, &string).unwrap(), "text:a");
}

#[test]
fn messages_of_the_wrong_shape_are_refused_by_name() {
    for (message, field) in [
        (json!("hi"), "messages[0]"),
        (json!({"role": "user", "content": 3}), "messages[0].content"),
        (json!({"role": "user", "content": [{"type": "image_url"}]}), "messages[0].content[0].type"),
        (json!({"role": "user", "content": [{}]}), "messages[0].content[0].type"),
        (json!({"role": "user", "content": ["a"]}), "messages[0].content[0].type"),
        (json!({"role": "user", "content": [{"type": "text", "text": 1}]}), "messages[0].content[0].text"),
    ] {
        match render("{{ messages[0].content }}", &[message]) {
            Err(TextError::InvalidRequest { field: found, .. }) => assert_eq!(found, field),
            other => panic!("{field}: {other:?}"),
        }
    }
}

#[test]
fn reserved_variables_are_refused() {
    let variables = json!({"messages": []});
    let error = compile("{{ messages }}").render(&ChatRender { variables: variables.as_object(), ..ChatRender::default() }).unwrap_err();
    assert!(error.to_string().contains("chat_template_kwargs.messages"), "{error}");
}

#[test]
fn continuing_needs_a_message_that_the_template_keeps() {
    let request = |messages| ChatRender { messages, continue_final_message: true, ..ChatRender::default() };
    let messages = [json!({"role": "assistant", "content": "1, 2"})];
    let kept = compile("{{ messages[0].content }}<end>");
    assert_eq!(kept.render(&request(&messages)).unwrap(), "1, 2");
    assert!(kept.render(&request(&[])).is_err());
    let without_text = [json!({"role": "assistant"})];
    assert!(kept.render(&request(&without_text)).is_err());
    assert!(compile("nothing").render(&request(&messages)).is_err());
    let both = ChatRender { add_generation_prompt: true, ..request(&messages) };
    assert!(kept.render(&both).is_err());
}

#[test]
fn line_ends_of_the_template_are_newlines() {
    assert_eq!(render("a\r\n{% if true %}\r\nb\rc{% endif %}\r\n", &[]).unwrap(), "a\nb\nc");
}

#[test]
fn the_clock_is_an_argument() {
    let template = compile("{{ strftime_now('%Y-%m-%d %H:%M') }}");
    let at = |now_unix_seconds| template.render(&ChatRender { now_unix_seconds, ..ChatRender::default() });
    assert_eq!(at(0).unwrap(), "1970-01-01 00:00");
    assert_eq!(at(1_753_000_000).unwrap(), "2025-07-20 08:26");
    assert!(at(i64::MAX).is_err());
}

#[test]
fn broken_templates_are_refused_when_compiled() {
    for source in ["{{", "{% if %}", "{% for x in %}", "{% endfor %}", "{{ x | no_such_filter }}"] {
        let compiled = ChatTemplate::new(source, BTreeMap::new());
        let failed = match compiled {
            Err(error) => matches!(error, TextError::TemplateInvalid(_)),
            Ok(template) => template.render(&ChatRender::default()).is_err(),
        };
        assert!(failed, "{source}");
    }
    let large = "x".repeat((1 << 20) + 1);
    assert!(matches!(ChatTemplate::new(&large, BTreeMap::new()), Err(TextError::TemplateInvalid(_))));
}

#[test]
fn templates_cannot_run_away() {
    let limits =
        TemplateLimits { fuel: 100_000, recursion: 50, output_bytes: 1 << 16, memory_bytes: 64 << 20, time: Duration::from_secs(20) };
    let ended_by = |source: &str, limits: TemplateLimits| match compile(source).with_limits(limits).render(&ChatRender::default()) {
        Err(TextError::TemplateLimit(limit)) => limit,
        other => panic!("{source}: {other:?}"),
    };
    let loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}{% endfor %}";
    assert_eq!(ended_by(loops, limits), "100000 instructions");
    let output = "{% for a in range(9999) %}{{ 'x' * 1000 }}{% endfor %}";
    assert_eq!(ended_by(output, limits), "65536 bytes of output");
    let recursion = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}";
    assert_eq!(ended_by(recursion, limits), "50 nested calls");
    let wide = compile("{{ 'x' | indent(1000000000) }}{{ 'x'.center(1000000000) }}").render(&ChatRender::default());
    assert!(wide.unwrap_err().to_string().contains("1000000000"));
    let time = TemplateLimits { time: Duration::ZERO, ..limits };
    assert_eq!(ended_by("{{ 'x' }}", time), "time");
    for source in [
        "{% set x = 'x'.strip() %}",
        "{% if messages == tools %}{% endif %}",
        "{% if 1 in messages %}{% endif %}",
        "{% for x in [1] %}{% endfor %}",
    ] {
        assert_eq!(ended_by(source, time), "time", "{source}");
    }
    let compare = "{% set n = 'x' %}{% set x = n * 16000000 %}{% set y = n * 16000000 %}{% for i in range(99999) %}{% if x == y %}{% endif %}{% endfor %}";
    let soon = TemplateLimits { time: Duration::from_millis(300), ..TemplateLimits::default() };
    let began = std::time::Instant::now();
    assert_eq!(ended_by(compare, soon), "time");
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
}

#[test]
fn templates_reach_no_files_and_no_other_templates() {
    for source in ["{% include 'a' %}", "{% extends '/etc/passwd' %}", "{% import 'a' as a %}", "{{ open('/etc/passwd') }}"] {
        let result = ChatTemplate::new(source, BTreeMap::new()).and_then(|template| template.render(&ChatRender::default()));
        assert!(result.is_err(), "{source}: {result:?}");
    }
}

#[test]
fn json_nested_deep_is_refused_or_rendered() {
    let mut value = json!("x");
    for _ in 0..120 {
        value = json!([value]);
    }
    let messages = [json!({"role": "user", "content": "a", "extra": value})];
    let text = render("{{ messages[0].extra | tojson }}", &messages).unwrap();
    assert_eq!(text.matches('[').count(), 120);
}

/// Templates that make much of little. Each is ended before it makes a value larger than the limit.
#[test]
fn templates_cannot_take_all_memory() {
    let memory_bytes = 1 << 20;
    let limits = TemplateLimits { memory_bytes, time: Duration::from_secs(20), ..TemplateLimits::default() };
    let double = |step: &str| format!("{{% set ns = namespace(x='ab' * 8, l=[1, 2]) %}}{{% for i in range(60) %}}{step}{{% endfor %}}");
    let mut sources = vec![
        double("{% set ns.x = ns.x ~ ns.x %}"),
        double("{% set ns.x = ns.x + ns.x %}"),
        double("{% set ns.x = ns.x * 2 %}"),
        double("{% set ns.x = [ns.x, ns.x] | join %}"),
        double("{% set ns.x = ''.join([ns.x, ns.x]) %}"),
        double("{% set ns.x = ns.x | replace('a', ns.x) %}"),
        double("{% set ns.x = ns.x.replace('a', ns.x) %}"),
        double("{% set ns.x = '{0}{0}'.format(ns.x) %}"),
        double("{% set ns.x = '%s%s' | format(ns.x, ns.x) %}"),
        double("{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
        double("{% set ns.x = [ns.x, ns.x] | tojson %}"),
        double("{% set ns.x = [ns.x, ns.x] | string %}"),
        double("{% set ns.l = ns.l + ns.l %}"),
        double("{% set ns.l = ns.l * 2 %}"),
        double("{% set ns.l = ns.l | chain(ns.l) %}"),
        double("{% set ns.l = (ns.l + ns.l)[1:] %}"),
        double("{% set ns.l = [ns.l, ns.l] %}") + "{{ ns.l }}",
        double("{% set ns.l = [ns.l, ns.l] %}") + "{% set x = ns.l ~ '' %}",
        double("{% set ns.l = [ns.l, ns.l] %}") + "{% set x = ns.l | upper %}",
        double("{% set ns.l = [ns.l, ns.l] %}") + "{% set x = ns.l | tojson %}",
        double("{% set ns.l = [ns.l, ns.l] %}") + "{% set x = ns.l in 'abc' %}",
        "{% macro f(x, n) %}{% if n %}{{ f(x ~ x, n - 1) }}{% endif %}{{ x }}{% endmacro %}{% set y = f('ab', 15) %}".to_string(),
        "{% set y %}{% for i in range(99999) %}0123456789012345678901234567890123456789{% endfor %}{% endset %}".to_string(),
        "{% set y = [[1] | batch(n, 0)] %}".replace('n', "1000000000"),
        "{% set y = [1] | slice(1000000000) %}".to_string(),
        "{% set y = '%1000000000d' | format(1) %}".to_string(),
        "{% set y = '{:1000000000}'.format(1) %}".to_string(),
        "{% set y = '{:{}}'.format(1, 1000000000) %}".to_string(),
    ];
    let shared = "{% set x = 'x' * 100000 %}{% set l = [x] * 1000 %}";
    for step in ["l | sort", "l | unique | list", "l | min", "l == l", "l in [l]", "l < l"] {
        sources.push(format!("{shared}{{% set y = {step} %}}"));
    }
    for factor in ["n * 1000000000", "1000000000 * n", "[n] * 90000000", "(n, n) * 40000000"] {
        sources.push(format!("{{% set n = 'x' %}}{{% set y = {factor} %}}"));
    }
    sources.push("{% set t = 'a\n' * 10000 %}{% for i in range(2) %}{% set y = t | indent(9999) %}{% endfor %}".to_string());
    for source in sources {
        let rendered = compile(&source).with_limits(limits).render(&ChatRender::default());
        assert_eq!(rendered, Err(TextError::TemplateLimit(format!("{memory_bytes} bytes of memory"))), "{source}");
    }
}

/// The engine computes constants while it compiles.
#[test]
fn constants_cannot_take_all_memory() {
    for constant in ["'x' * 90000000", "90000000 * ('x' ~ 'y')", "[1, 2] * (10 ** 7)", "'x' * 9999 * 9999", "['x' * 90000000] | length"] {
        let compiled = ChatTemplate::new(&format!("{{% set y = {constant} %}}"), BTreeMap::new());
        assert!(matches!(&compiled, Err(TextError::TemplateInvalid(reason)) if reason.contains("constants")), "{constant}: {compiled:?}");
    }
    let copies = "{% set y = 'x' * 900000 %}".repeat(100);
    assert!(matches!(ChatTemplate::new(&copies, BTreeMap::new()), Err(TextError::TemplateInvalid(_))));
    assert_eq!(render("{{ '-' * 80 }}", &[]).unwrap(), "-".repeat(80));
}

/// Chains that the engine follows by recursion: refused before they are parsed.
#[test]
fn long_chains_are_refused_when_compiled() {
    let chain = |step: &str| format!("{{{{ x{} }}}}", step.repeat(50_000));
    let mut sources: Vec<String> =
        ["|list", "|batch(1)", "+1", ".a", "~1", "**1", "()", " and x", " is defined", " if 1 else 1"].map(chain).into();
    sources.push(format!("{{{{ {}1 }}}}", "not ".repeat(50_000)));
    sources.push(format!("{{% if a %}}{}{{% endif %}}", "{% elif a %}".repeat(50_000)));
    sources.push(format!("{}{}", "{% if a %}".repeat(30_000), "{% endif %}".repeat(30_000)));
    sources.push(format!("{{{{ {}1{} }}}}", "[".repeat(900), "]".repeat(900)));
    for source in sources {
        let compiled = ChatTemplate::new(&source, BTreeMap::new());
        assert!(matches!(&compiled, Err(TextError::TemplateInvalid(_))), "{}: {compiled:?}", &source[..60]);
    }
    let longest = format!("{{% if x %}}{}{{% endif %}}{{{{ 1{} }}}}", "{% elif x %}".repeat(400), "+1".repeat(900));
    assert_eq!(render(&longest, &[]).unwrap(), "901");
}

/// Values in each other are freed and printed by recursion.
#[test]
fn values_cannot_be_nested_without_end() {
    let deep = "200 lists or maps in each other";
    let carried =
        |step: &str| format!("{{% set ns = namespace(x=[]) %}}{{% for i in range(99999) %}}{{% set ns.x = {step} %}}{{% endfor %}}done");
    for source in
        [carried("[ns.x]"), carried("(ns.x,)"), carried("{'a': ns.x}"), carried("[ns.x] | list"), "{% set x = [x] %}".repeat(60_000)]
    {
        let ended = render(&source, &[]);
        assert_eq!(ended, Err(TextError::TemplateLimit(deep.to_string())), "{}", &source[..60.min(source.len())]);
    }
    for circle in ["{% set ns.x = ns %}", "{% set ns.x = [ns] %}", "{% set l = [ns] %}{% set ns.x = {'a': l} %}"] {
        let ended = render(&format!("{{% set ns = namespace(x=[]) %}}{circle}{{{{ ns }}}}"), &[]).unwrap_err();
        assert!(ended.to_string().contains("a namespace cannot be put into a namespace"), "{circle}: {ended}");
    }
    // What grows without being deep, and what is deep within reason, stays.
    let long = "{% set ns = namespace(x=[]) %}{% for i in range(1000) %}{% set ns.x = ns.x + [i] %}{% endfor %}{{ ns.x | length }}";
    assert_eq!(render(long, &[]).unwrap(), "1000");
    let far = "{% set ns = namespace(x=[]) %}{% for i in range(100) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | string | length }}";
    assert_eq!(render(far, &[]).unwrap(), "202");
    // Concatenations and views of views are no nesting: their own bounds end them.
    for step in ["ns.x + [1]", "ns.x | chain([1])", "ns.x | batch(1)", "ns.x | map('list')", "ns.x | reverse", "ns.x[0:]", "ns.x | select"]
    {
        let soon = TemplateLimits { time: Duration::from_millis(300), ..TemplateLimits::default() };
        let ended = compile(&carried(step)).with_limits(soon).render(&ChatRender::default());
        assert!(matches!(&ended, Ok(_) | Err(TextError::TemplateLimit(_))), "{step}: {ended:?}");
    }
}
