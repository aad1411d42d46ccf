use super::*;
use proptest::prelude::*;

fn source(version: Option<&str>) -> PackageSource {
    PackageSource { name: "llm-tiny".into(), version: version.map(Into::into) }
}

fn listed(filename: &str, yanked: bool) -> Listed {
    Listed { filename: filename.into(), url: filename.into(), sha256: None, size_bytes: None, yanked }
}

fn chosen(files: &[Listed], version: Option<&str>) -> Result<String, String> {
    choose(files, &source(version)).map(|(_, file)| file.filename.clone())
}

#[test]
fn the_newest_version_that_stands_is_chosen() {
    let files = [
        listed("llm_tiny-0.9-py3-none-any.whl", false),
        listed("llm_tiny-0.10-cp311-cp311-linux_x86_64.whl", false),
        listed("llm_tiny-0.10-py3-none-any.whl", false),
        listed("llm_tiny-0.11-py3-none-any.whl", true),
        listed("llm_tiny-1.0rc1-py3-none-any.whl", false),
        listed("llm_tiny-9.0.tar.gz", false),
        listed("other-9.0-py3-none-any.whl", false),
    ];
    assert_eq!(chosen(&files, None).unwrap(), "llm_tiny-0.10-py3-none-any.whl");
    assert_eq!(chosen(&files, Some("0.11")).unwrap(), "llm_tiny-0.11-py3-none-any.whl");
    assert_eq!(chosen(&files, Some("1.0.RC1")).unwrap(), "llm_tiny-1.0rc1-py3-none-any.whl");
    assert!(chosen(&files, Some("3")).unwrap_err().contains("no wheel of version 3; there are 0.9, 0.10"));
    assert!(chosen(&files[3..4], None).unwrap_err().contains("withdrawn"));
    assert!(chosen(&files[5..], None).unwrap_err().contains("no wheel"));
    assert_eq!(chosen(&files[4..5], None).unwrap(), "llm_tiny-1.0rc1-py3-none-any.whl");
}

#[test]
fn json_and_html_tell_the_same() {
    let digest = Digest::of(b"x");
    let json = format!(
        r#"{{"meta":{{"api-version":"1.1"}},"name":"llm-tiny","files":[
            {{"filename":"a-1-py3-none-any.whl","url":"../../f/a.whl","hashes":{{"sha256":"{digest}"}},"yanked":false}},
            {{"filename":"a-2-py3-none-any.whl","url":"b.whl","hashes":{{}},"yanked":"broken"}}]}}"#
    );
    let html = format!(
        "<!DOCTYPE html><html><body><h1>Links</h1>\n<a href=\"../../f/a.whl#sha256={digest}\" \
         data-requires-python=\"&gt;=3.9\">a-1-py3-none-any.whl</a><br/>\n\
         <A data-yanked='broken > bad' HREF='b.whl'>a-2-py3-none-any.whl</A>\n<a name=x>no link</a></body>"
    );
    let from_json = parse_json(json.as_bytes()).unwrap();
    assert_eq!(from_json, parse_html(&html));
    assert_eq!(from_json[0].sha256, Some(digest));
    assert_eq!(from_json[0].url, "../../f/a.whl");
    assert!(!from_json[0].yanked && from_json[1].yanked);
}

proptest! {
    #[test]
    fn any_page_is_read_without_failing(page in "(<a |href=|\"|'|>|#sha256=|é| |x|&amp;|</a>){0,40}") {
        let _ = parse_html(&page);
    }
}
