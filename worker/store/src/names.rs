//! Names from outside, made safe for the file system: file names inside a model, and model names
//! as the name of one file.

use crate::digest::Digest;

/// Longest file name within a model, in bytes.
const MAX_PATH_BYTES: usize = 512;
/// Longest escaped model name, in bytes; most file systems allow 255 for one name.
const MAX_ESCAPED_BYTES: usize = 180;

/// Accepts a relative path of plain parts, `/` between them, that stays below its folder on every
/// platform; the error continues the sentence "'path' …".
pub(crate) fn check_relative_path(path: &str) -> Result<(), String> {
    if path.is_empty() || path.len() > MAX_PATH_BYTES {
        return Err(format!("must be 1 to {MAX_PATH_BYTES} bytes long"));
    }
    if path.chars().any(|letter| letter.is_control() || matches!(letter, '\\' | ':')) {
        return Err("has a control character, a backslash or a colon".into());
    }
    if path.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
        return Err("would leave the model's folder".into());
    }
    Ok(())
}

/// A model name as one portable file name without extension. Distinct names give distinct results
/// (up to letter case on file systems that ignore it).
pub(crate) fn escape_model_name(name: &str) -> String {
    let mut escaped = String::with_capacity(name.len());
    for byte in name.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => escaped.push(byte as char),
            b'.' if !escaped.is_empty() => escaped.push('.'),
            _ => escaped.push_str(&format!("%{byte:02X}")),
        }
    }
    if escaped.len() <= MAX_ESCAPED_BYTES {
        return escaped;
    }
    // The tail of a long name is what differs least often; the digest keeps it distinct.
    escaped.truncate(MAX_ESCAPED_BYTES - 72);
    format!("{escaped}%sha256-{}", Digest::of(name.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn paths_that_escape_are_refused() {
        for bad in ["", "/a", "a/", "a//b", "..", "a/../b", "./a", "a\\b", "C:a", "a\0b", "a\nb", &"a".repeat(513)] {
            assert!(check_relative_path(bad).is_err(), "{bad:?}");
        }
        for good in ["config.json", "onnx/model.safetensors", "a..b", ".gitattributes"] {
            assert!(check_relative_path(good).is_ok(), "{good:?}");
        }
    }

    proptest! {
        #[test]
        fn escaped_names_are_plain_and_short(name in "\\PC{0,300}") {
            let escaped = escape_model_name(&name);
            prop_assert!(escaped.len() <= MAX_ESCAPED_BYTES);
            prop_assert!(!escaped.starts_with('.'));
            prop_assert!(escaped.bytes().all(|byte| byte.is_ascii_alphanumeric()
                || b"-_.%".contains(&byte)));
        }

        #[test]
        fn distinct_names_stay_distinct(left in "[a-z:/.%@]{0,220}", right in "[a-z:/.%@]{0,220}") {
            prop_assert_eq!(left == right, escape_model_name(&left) == escape_model_name(&right));
        }
    }
}
