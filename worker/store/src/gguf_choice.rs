//! Which one of several GGUF files to take. Pure; looks at names only, what is inside is for the
//! loader to judge.

/// Quantizations by name, the preferred first, each with the spellings found in names. First the one most people take;
/// then by how close to the original a file is that is still small.
const PREFERENCE: [(&str, &[&str]); 22] = [
    ("Q4_K_M", &["q4_k_m"]),
    ("Q8_0", &["q8_0"]),
    ("Q6_K", &["q6_k"]),
    ("Q5_K_M", &["q5_k_m"]),
    ("Q5_K_S", &["q5_k_s"]),
    ("Q5_1", &["q5_1"]),
    ("Q5_0", &["q5_0"]),
    ("Q4_K_S", &["q4_k_s"]),
    ("Q4_K", &["q4_k"]),
    ("Q4_1", &["q4_1"]),
    ("Q4_0", &["q4_0"]),
    ("IQ4_NL", &["iq4_nl"]),
    ("IQ4_XS", &["iq4_xs"]),
    ("MXFP4", &["mxfp4"]),
    ("Q3_K_L", &["q3_k_l"]),
    ("Q3_K_M", &["q3_k_m"]),
    ("Q3_K_S", &["q3_k_s"]),
    ("Q2_K", &["q2_k"]),
    ("Q2_K_S", &["q2_k_s"]),
    ("BF16", &["bf16"]),
    ("F16", &["f16", "fp16"]),
    ("F32", &["f32", "fp32"]),
];

/// The choice, and a sentence about it where there was one to make.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct GgufChoice {
    /// Index into the names.
    pub(crate) index: usize,
    pub(crate) note: Option<String>,
}

/// Chooses among the `.gguf` names of a repository or package.
///
/// With a filter: the file of exactly that name, else the one file of that quantization, else the
/// one whose name contains it. Without: the only file, else by preference. The error continues the
/// sentence "… has no usable weights: …".
pub(crate) fn choose_gguf(names: &[&str], filter: Option<&str>) -> Result<GgufChoice, String> {
    let usable: Vec<usize> = (0..names.len()).filter(|&index| is_model(names[index])).collect();
    if usable.is_empty() {
        return Err("there is no GGUF file".into());
    }
    let index = match filter {
        Some(filter) => by_filter(names, &usable, filter)?,
        None if usable.len() == 1 => usable[0],
        None => return by_preference(names, &usable),
    };
    if is_split(names[index]) {
        return Err(format!("'{}' is one part of a split GGUF; choose one that is whole", names[index]));
    }
    Ok(GgufChoice { index, note: None })
}

fn by_filter(names: &[&str], usable: &[usize], filter: &str) -> Result<usize, String> {
    let wanted = filter.to_ascii_lowercase();
    let exact = |name: &str| {
        let name = name.to_ascii_lowercase();
        name == wanted || base_name(&name) == wanted
    };
    let tests: [&dyn Fn(&str) -> bool; 3] =
        [&exact, &|name| has_quantization(name, &wanted), &|name| name.to_ascii_lowercase().contains(&wanted)];
    for test in tests {
        let found: Vec<usize> = usable.iter().copied().filter(|&index| test(names[index])).collect();
        match found[..] {
            [] => {}
            [one] => return Ok(one),
            _ => return Err(format!("'{filter}' fits several files: {}", list(names, &found))),
        }
    }
    Err(format!("no file fits '{filter}'; there are {}", list(names, usable)))
}

fn by_preference(names: &[&str], usable: &[usize]) -> Result<GgufChoice, String> {
    for (quantization, spellings) in PREFERENCE {
        let found = usable
            .iter()
            .copied()
            .find(|&index| !is_split(names[index]) && spellings.iter().any(|one| has_quantization(names[index], one)));
        if let Some(index) = found {
            let note =
                format!("chose {} ({quantization}) among {} GGUF files; name another after a colon", base_name(names[index]), usable.len());
            return Ok(GgufChoice { index, note: Some(note) });
        }
    }
    let loadable: Vec<&str> = PREFERENCE.iter().map(|(name, _)| *name).collect();
    Err(format!("none of its files is named as {}; there are {}", loadable.join(", "), list(names, usable)))
}

/// Whether a name has the quantization as a part of its own, as in `m-Q4_1.gguf` or `m_q4_1.gguf`.
fn has_quantization(name: &str, quantization: &str) -> bool {
    let name = base_name(name).to_ascii_lowercase();
    let stem = name.strip_suffix(".gguf").unwrap_or(&name);
    stem.split(['-', '.']).any(|part| part == quantization || part.strip_suffix(quantization).is_some_and(|before| before.ends_with('_')))
}

/// Projectors and importance matrices are GGUF files too, but no models.
fn is_model(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    name.ends_with(".gguf") && !name.contains("mmproj") && !name.contains("imatrix")
}

/// Whether a name is that of one part of a split GGUF, as in `m-00001-of-00002.gguf`.
pub(crate) fn is_split(name: &str) -> bool {
    let stem = name.strip_suffix(".gguf").unwrap_or(name);
    let mut parts = stem.rsplit('-');
    let number = |part: Option<&str>| part.is_some_and(|part| part.len() == 5 && part.bytes().all(|byte| byte.is_ascii_digit()));
    number(parts.next()) && parts.next() == Some("of") && number(parts.next())
}

fn base_name(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

fn list(names: &[&str], indices: &[usize]) -> String {
    let shown: Vec<&str> = indices.iter().take(12).map(|&index| base_name(names[index])).collect();
    let more = indices.len().saturating_sub(shown.len());
    if more > 0 { format!("{} and {more} more", shown.join(", ")) } else { shown.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPO: [&str; 7] = [
        "mmproj-F16.gguf",
        "M-1.5b.IQ4_XS.gguf",
        "M-1.5b.Q4_K_M.gguf",
        "M-1.5b.Q4_0.gguf",
        "M-1.5b.Q4_1.gguf",
        "sub/M-1.5b-BF16.gguf",
        "M-1.5b.Q8_0-00001-of-00002.gguf",
    ];

    fn chosen(filter: Option<&str>) -> Result<&'static str, String> {
        choose_gguf(&REPO, filter).map(|choice| REPO[choice.index])
    }

    #[test]
    fn the_filter_is_a_file_a_quantization_or_a_part() {
        assert_eq!(chosen(Some("m-1.5b.q4_1.gguf")).unwrap(), REPO[4]);
        assert_eq!(chosen(Some("Q4_0")).unwrap(), REPO[3]);
        assert_eq!(chosen(Some("Q4_K_M")).unwrap(), REPO[2]);
        assert_eq!(chosen(Some("IQ4")).unwrap(), REPO[1]);
        assert!(chosen(Some("Q4")).unwrap_err().contains("several files: M-1.5b.IQ4_XS.gguf"));
        assert!(chosen(Some("Q5_0")).unwrap_err().contains("no file fits 'Q5_0'; there are"));
        assert!(chosen(Some("Q8_0-00001-of-00002")).unwrap_err().contains("split"));
    }

    #[test]
    fn without_a_filter_the_preference_decides_and_says_so() {
        let choice = choose_gguf(&REPO, None).unwrap();
        assert_eq!(REPO[choice.index], "M-1.5b.Q4_K_M.gguf");
        assert!(choice.note.unwrap().contains("chose M-1.5b.Q4_K_M.gguf (Q4_K_M) among 6"));
        assert_eq!(choose_gguf(&["only.Q2_K.gguf"], None).unwrap().index, 0);
        let names = ["a-iq2_xxs.gguf", "a-iq1_s.gguf"];
        assert!(choose_gguf(&names, None).unwrap_err().contains("Q4_K_M, Q8_0"));
        assert!(choose_gguf(&["config.json"], None).is_err());
        let names = ["qwen-fp16.gguf", "qwen-q4_k_m.gguf"];
        assert_eq!(choose_gguf(&names, None).unwrap().index, 1);
    }
}
