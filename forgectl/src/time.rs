//! Moments as people and programs read them.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Serialize, Serializer};

/// Seconds since 1970 UTC; as data, an RFC 3339 text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Utc(pub u64);

impl Utc {
    /// This moment.
    pub fn now() -> Self {
        Utc(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs()))
    }
}

impl std::fmt::Display for Utc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match i64::try_from(self.0).ok().and_then(|seconds| jiff::Timestamp::from_second(seconds).ok()) {
            Some(moment) => write!(f, "{moment}"),
            // A moment beyond the calendar: a damaged record, shown as it is.
            None => write!(f, "{} s", self.0),
        }
    }
}

impl Serialize for Utc {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// How long ago a moment was, roughly.
pub fn ago(moment: Utc) -> String {
    let seconds = Utc::now().0.saturating_sub(moment.0);
    let (count, unit) = match seconds {
        0..60 => return "just now".into(),
        60..3_600 => (seconds / 60, "minute"),
        3_600..86_400 => (seconds / 3_600, "hour"),
        _ => (seconds / 86_400, "day"),
    };
    format!("{count} {unit}{} ago", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_read_well() {
        assert_eq!(Utc(0).to_string(), "1970-01-01T00:00:00Z");
        assert_eq!(Utc(u64::MAX).to_string(), format!("{} s", u64::MAX));
        let now = Utc::now().0;
        assert_eq!(ago(Utc(now)), "just now");
        assert_eq!(ago(Utc(now - 60)), "1 minute ago");
        assert_eq!(ago(Utc(now - 3 * 86_400)), "3 days ago");
    }
}
