//! Service-level objectives, and lengths of time as they are written: `ttft:200ms,itl:50ms`.

use std::time::Duration;

use serde::Serialize;

use super::record::Record;

/// What a request must keep to count for goodput. Seconds.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Objectives {
    /// Time to the first token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttft_s: Option<f64>,
    /// Mean time between chunks of the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub itl_s: Option<f64>,
    /// Time per token after the first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tpot_s: Option<f64>,
    /// Whole time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub e2e_s: Option<f64>,
}

impl Objectives {
    /// Whether a request that succeeded keeps all of them. One without a value for a limit keeps it.
    pub fn kept_by(&self, record: &Record) -> bool {
        let within = |value: Option<f64>, limit: Option<f64>| limit.is_none_or(|limit| value.is_none_or(|value| value <= limit));
        within(record.ttft_s, self.ttft_s)
            && within(record.mean_gap_s(), self.itl_s)
            && within(record.tpot_s(), self.tpot_s)
            && within(Some(record.e2e_s), self.e2e_s)
    }
}

/// Parses `ttft:200ms,itl:50ms,tpot:0.05s,e2e:2s`.
pub fn parse_objectives(text: &str) -> Result<Objectives, String> {
    let mut objectives = Objectives::default();
    for part in text.split(',') {
        let (name, value) = part.split_once(':').ok_or_else(|| format!("{part:?} is no objective; write for example ttft:200ms"))?;
        if value.ends_with(|letter: char| letter.is_ascii_digit()) {
            return Err(format!("{part:?} has no unit of time; write for example ttft:200ms or e2e:2s"));
        }
        let seconds = parse_duration(value)?.as_secs_f64();
        let slot = match name.trim() {
            "ttft" => &mut objectives.ttft_s,
            "itl" => &mut objectives.itl_s,
            "tpot" => &mut objectives.tpot_s,
            "e2e" | "e2el" => &mut objectives.e2e_s,
            other => return Err(format!("{other:?} is no objective; there are ttft, itl, tpot and e2e")),
        };
        if slot.replace(seconds).is_some() {
            return Err(format!("{name} is given twice"));
        }
    }
    Ok(objectives)
}

/// Parses `200ms`, `1.5s`, `2m`; a bare number is seconds.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let text = text.trim();
    let split = text.find(|letter: char| !letter.is_ascii_digit() && letter != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "" | "s" => 1.0,
        "m" => 60.0,
        other => return Err(format!("{other:?} is no unit of time; use us, ms, s or m")),
    };
    let seconds = number.parse::<f64>().map_err(|_| format!("{text:?} is no time; write for example 200ms"))? * factor;
    Duration::try_from_secs_f64(seconds).ok().filter(|time| !time.is_zero()).ok_or_else(|| format!("{text:?} must be more than 0"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objectives_are_read_and_kept() {
        let objectives = parse_objectives("ttft:200ms,itl:50ms,e2e:2s").expect("valid");
        assert_eq!(objectives, Objectives { ttft_s: Some(0.2), itl_s: Some(0.05), tpot_s: None, e2e_s: Some(2.0) });
        let record = Record { ttft_s: Some(0.1), gaps_s: vec![0.04, 0.06], e2e_s: 0.2, output_tokens: 3, ..Record::default() };
        assert!(objectives.kept_by(&record));
        assert!(!objectives.kept_by(&Record { ttft_s: Some(0.21), ..record.clone() }));
        assert!(!objectives.kept_by(&Record { gaps_s: vec![0.04, 0.07], ..record.clone() }));
        assert!(!objectives.kept_by(&Record { e2e_s: 2.1, ..record }));
        for text in ["ttft", "ttft:200", "ttft:x", "ttft:0ms", "speed:1s", "ttft:1h", "ttft:1s,ttft:2s", ""] {
            assert!(parse_objectives(text).is_err(), "{text}");
        }
    }
}
