//! How a changed service goes over from its old replicas to new ones: `spec.rollout`, with Kubernetes' words.
//!
//! What it is not: it replaces nothing; the leader's controller does, within these bounds.
//!
//! Invariant: of any strategy and any number of replicas at least one of the two bounds is above 0, so that every rollout
//! can go on.

use serde::{Deserialize, Serialize};

/// A number of replicas, or a share of those wished, in percent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Portion {
    /// Replicas.
    Count(u32),
    /// Percent of the wished replicas, 0 to 100.
    Percent(u32),
}

impl Portion {
    fn is_zero(self) -> bool {
        matches!(self, Portion::Count(0) | Portion::Percent(0))
    }

    /// Of so many replicas, rounded down.
    fn floor_of(self, replicas: u32) -> u32 {
        match self {
            Portion::Count(count) => count,
            Portion::Percent(percent) => (u64::from(replicas) * u64::from(percent) / 100) as u32,
        }
    }

    /// Of so many replicas, rounded up.
    fn ceil_of(self, replicas: u32) -> u32 {
        match self {
            Portion::Count(count) => count,
            Portion::Percent(percent) => (u64::from(replicas) * u64::from(percent)).div_ceil(100) as u32,
        }
    }
}

impl std::str::FromStr for Portion {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let wrong = || format!("{text:?} is neither a number of replicas, such as 1, nor a percentage, such as 25%");
        match text.strip_suffix('%') {
            Some(percent) => {
                let percent = percent.trim().parse().ok().filter(|percent| *percent <= 100);
                percent.map(Portion::Percent).ok_or_else(wrong)
            }
            None => text.parse().map(Portion::Count).map_err(|_| wrong()),
        }
    }
}

impl std::fmt::Display for Portion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Portion::Count(count) => write!(f, "{count}"),
            Portion::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

impl Serialize for Portion {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Portion::Count(count) => serializer.serialize_u32(*count),
            Portion::Percent(_) => serializer.collect_str(self),
        }
    }
}

impl<'de> Deserialize<'de> for Portion {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Raw {
            Number(u32),
            Text(String),
        }
        match Raw::deserialize(deserializer)? {
            Raw::Number(count) => Ok(Portion::Count(count)),
            Raw::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

/// How replicas are replaced when the wish changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct RolloutSpec {
    /// Replicas that may be missing at a time because they made room for their successors. A percentage is rounded down.
    pub max_unavailable: Portion,
    /// Successors that may be loading at a time beside those they replace. A percentage is rounded up.
    pub max_surge: Portion,
    /// Time without progress after which a rollout is said to be stuck, seconds. It goes on being tried.
    pub progress_deadline_s: u64,
}

impl Default for RolloutSpec {
    fn default() -> Self {
        RolloutSpec { max_unavailable: Portion::Count(1), max_surge: Portion::Count(1), progress_deadline_s: 600 }
    }
}

impl RolloutSpec {
    /// Whether it says nothing; then it is left out of documents.
    pub fn is_default(&self) -> bool {
        *self == RolloutSpec::default()
    }

    /// Replicas of so many that may be missing at a time. One, where neither bound would let anything move.
    pub fn unavailable(&self, replicas: u32) -> u32 {
        match self.max_unavailable.floor_of(replicas) {
            0 if self.surge(replicas) == 0 => 1,
            count => count.min(replicas),
        }
    }

    /// Successors of so many replicas that may be loading at a time beside those they replace.
    pub fn surge(&self, replicas: u32) -> u32 {
        self.max_surge.ceil_of(replicas).min(replicas)
    }

    /// Which key is wrong, and what it may be.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        if self.max_unavailable.is_zero() && self.max_surge.is_zero() {
            return Err(("spec.rollout", "maxUnavailable and maxSurge are both 0: one must be at least 1, or nothing could move".into()));
        }
        if !(1..=86_400).contains(&self.progress_deadline_s) {
            let reason = format!("must be between 1 and 86400, got {}", self.progress_deadline_s);
            return Err(("spec.rollout.progressDeadlineS", reason));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn portions_are_numbers_or_percentages() {
        for (text, portion) in [("0", Portion::Count(0)), (" 3 ", Portion::Count(3)), ("25%", Portion::Percent(25))] {
            assert_eq!(text.parse(), Ok(portion), "{text}");
        }
        for text in ["", "%", "-1", "101%", "1.5", "half"] {
            assert!(text.parse::<Portion>().is_err(), "{text}");
        }
        let spec: RolloutSpec = serde_json::from_str(r#"{"maxUnavailable":"50%","maxSurge":2}"#).expect("as Kubernetes writes it");
        assert_eq!((spec.unavailable(3), spec.surge(3)), (1, 2));
        assert_eq!(serde_json::to_string(&spec).expect("plain"), r#"{"maxUnavailable":"50%","maxSurge":2,"progressDeadlineS":600}"#);
    }

    #[test]
    fn percentages_round_as_in_kubernetes() {
        let spec = RolloutSpec { max_unavailable: Portion::Percent(25), max_surge: Portion::Percent(25), ..Default::default() };
        assert_eq!((spec.unavailable(1), spec.surge(1)), (0, 1));
        assert_eq!((spec.unavailable(10), spec.surge(10)), (2, 3));
        // Where both come to nothing, one may be missing.
        let spec = RolloutSpec { max_unavailable: Portion::Percent(25), max_surge: Portion::Count(0), ..Default::default() };
        assert_eq!((spec.unavailable(2), spec.surge(2)), (1, 0));
    }

    #[test]
    fn a_strategy_that_lets_nothing_move_is_refused() {
        let spec = RolloutSpec { max_unavailable: Portion::Count(0), max_surge: Portion::Percent(0), ..Default::default() };
        assert_eq!(spec.check().map_err(|(field, _)| field), Err("spec.rollout"));
        let spec = RolloutSpec { progress_deadline_s: 0, ..Default::default() };
        assert_eq!(spec.check().map_err(|(field, _)| field), Err("spec.rollout.progressDeadlineS"));
    }

    fn portion() -> impl Strategy<Value = Portion> {
        prop_oneof![(0u32..2_000).prop_map(Portion::Count), (0u32..=100).prop_map(Portion::Percent)]
    }

    proptest! {
        #[test]
        fn every_strategy_that_is_taken_lets_something_move(max_unavailable in portion(), max_surge in portion(), replicas in 1u32..1_025) {
            let spec = RolloutSpec { max_unavailable, max_surge, ..Default::default() };
            prop_assume!(spec.check().is_ok());
            prop_assert!(spec.unavailable(replicas) + spec.surge(replicas) > 0);
            prop_assert!(spec.unavailable(replicas) <= replicas && spec.surge(replicas) <= replicas);
            prop_assert_eq!(max_surge.to_string().parse(), Ok(max_surge));
        }
    }
}
