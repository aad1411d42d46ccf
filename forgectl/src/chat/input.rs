//! Messages of several lines: between `"""` and `"""`, or with a backslash at each line's end.

/// The mark around a message of several lines.
const FENCE: &str = "\"\"\"";

/// Whether what was typed is a whole message, so that Enter sends it.
pub fn is_complete(text: &str) -> bool {
    match text.trim_start().strip_prefix(FENCE) {
        Some(rest) => rest.contains(FENCE),
        None => !text.ends_with('\\'),
    }
}

/// The message in what was typed: without the marks of several lines.
pub fn message(text: &str) -> String {
    if let Some(rest) = text.trim_start().strip_prefix(FENCE) {
        let (inside, after) = rest.split_once(FENCE).unwrap_or((rest, ""));
        let inside = inside.strip_prefix('\n').unwrap_or(inside);
        return format!("{inside}{after}").trim_end().to_owned();
    }
    text.replace("\\\n", "\n").trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fence_or_a_backslash_holds_the_message_open() {
        for (text, complete) in [
            ("hello", true),
            ("", true),
            ("a \\", false),
            ("a \\\nb", true),
            ("\"\"\"", false),
            ("\"\"\"a\nb", false),
            ("\"\"\"a\nb\"\"\"", true),
            ("say \"\"\"", true),
        ] {
            assert_eq!(is_complete(text), complete, "{text:?}");
        }
    }

    #[test]
    fn marks_are_taken_out_and_lines_kept() {
        for (text, expected) in
            [(" hello ", "hello"), ("a\\\nb\\\nc", "a\nb\nc"), ("\"\"\"\na\n  b\n\"\"\"", "a\n  b"), ("\"\"\"one\"\"\" more", "one more")]
        {
            assert_eq!(message(text), expected, "{text:?}");
        }
    }
}
