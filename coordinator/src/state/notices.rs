//! What happened, in words, for `forgectl get events`: a bounded ring.
//!
//! Invariant: numbers grow by one; the oldest go when there are too many.

use std::collections::VecDeque;

use forge_shared::cluster::event::{Change, Notice, Object};
use serde::{Deserialize, Serialize};

use super::{ClusterState, MAX_NOTICES, MAX_REASON_BYTES, Step, checks};

/// The ring.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Notices {
    last_number: u64,
    ring: VecDeque<Notice>,
}

impl Notices {
    pub fn iter(&self) -> impl Iterator<Item = &Notice> {
        self.ring.iter()
    }

    pub fn is_sound(&self) -> bool {
        self.ring.len() <= MAX_NOTICES && self.ring.iter().all(|notice| notice.number <= self.last_number)
    }
}

/// How much an operator should care.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Weight {
    Normal,
    Warning,
}

impl ClusterState {
    pub(super) fn notice(&mut self, step: &mut Step, weight: Weight, reason: &str, about: String, message: String) {
        self.notices.last_number += 1;
        let notice = Notice {
            number: self.notices.last_number,
            revision: step.index,
            at_ms: self.clock.latest_ms(),
            is_warning: weight == Weight::Warning,
            reason: reason.to_owned(),
            about,
            message: checks::cut(&message, MAX_REASON_BYTES),
        };
        step.changes.push(Change::Put { object: Object::Notice(notice.clone()) });
        self.notices.ring.push_back(notice);
        while self.notices.ring.len() > MAX_NOTICES {
            self.notices.ring.pop_front();
        }
    }
}
