//! docs/api.md is rendered from the tables that drive the code. To write it anew after changing a table:
//! `FORGE_WRITE_DOCS=1 cargo test -p forge-gateway --test docs`.

use std::fmt::Write;
use std::path::PathBuf;

use forge_gateway::RequestLimits;
use forge_gateway::request::fields::{ENDPOINTS, Endpoint, Rule};

fn table(endpoint: &Endpoint) -> String {
    let mut text = String::from("| field | | |\n|---|---|---|\n");
    let order = |rule: &Rule| match rule {
        Rule::Honoured(_) => 0,
        Rule::Only { .. } => 1,
        Rule::Refused(_) => 2,
    };
    let mut fields = endpoint.fields();
    fields.sort_by_key(|field| order(&field.rule));
    for field in fields {
        let (word, meaning) = match field.rule {
            Rule::Honoured(meaning) => ("honoured", meaning.to_owned()),
            Rule::Only { values, why, .. } => ("limited", format!("Only {values}: {why}.")),
            Rule::Refused(why) => ("refused", format!("{}{}.", why[..1].to_uppercase(), &why[1..])),
        };
        writeln!(text, "| `{}` | {word} | {meaning} |", field.name).expect("a string takes all");
    }
    text
}

#[test]
fn api_reference_is_what_the_tables_say() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/api.md");
    let text = std::fs::read_to_string(&path).expect("docs/api.md is there");
    let mut expected = text.clone();
    for endpoint in ENDPOINTS {
        let (begin, end) = (format!("<!-- fields of {} -->\n", endpoint.route), "<!-- end -->");
        let start = expected.find(&begin).unwrap_or_else(|| panic!("docs/api.md lacks {begin}")) + begin.len();
        let stop = start + expected[start..].find(end).expect("a table has its end mark");
        expected.replace_range(start..stop, &table(endpoint));
    }
    if std::env::var_os("FORGE_WRITE_DOCS").is_some() {
        std::fs::write(&path, &expected).expect("docs/api.md can be written");
        return;
    }
    assert!(text == expected, "docs/api.md differs from the tables; see the head of this test for how to write it anew");
}

#[test]
fn documented_limits_are_the_defaults() {
    let limits = RequestLimits::default();
    assert_eq!((limits.choices, limits.messages, limits.prompts), (128, 2048, 128), "the field tables name these numbers");
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/api.md");
    let text = std::fs::read_to_string(path).expect("docs/api.md is there");
    assert_eq!(limits.body_bytes, 8 << 20);
    assert!(text.contains("8 MiB") && text.contains("1,048,576 JSON values"));
    assert_eq!(limits.json_values, 1 << 20);
    assert_eq!(limits.idempotency_keys, 10_000);
    assert!(text.contains("the last 10,000 |"));
}
