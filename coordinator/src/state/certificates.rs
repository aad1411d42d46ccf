//! Certificates that were signed or seen, those that were revoked, and the CAs that are believed.
//!
//! Invariants: what is revoked stays so until the certificate has ended by any clock; nothing that was asked for with it is
//! written down after it; a certificate that was asked for is not forgotten while it is good, but where all holders together
//! have too many; a step of a CA's rotation, or a revocation, that would shut out a member or the last operator is refused
//! with their names unless it is forced; a CA signs only when most coordinators have its key.

use std::collections::{BTreeMap, BTreeSet};

use forge_shared::cluster::Revision;
use forge_shared::cluster::certificate::{CaRecord, CaRotation, CertificateRecord, Holder, Trust};
use forge_shared::cluster::command::CommandError;
use forge_shared::cluster::event::{Change, Kind, Object};
use forge_shared::cluster::node::Role;
use serde::{Deserialize, Serialize};

use super::clock::Clock;
use super::notices::Weight;
use super::shared::Shared;
use super::{ClusterState, Effect, MAX_CERTIFICATES, MAX_HOLDER_CERTIFICATES, MAX_REVOKED, Step, checks};

/// Bytes of a CA's certificate in PEM.
const MAX_CA_BYTES: usize = 16 << 10;
/// Digits of a serial number: 20 bytes.
const MAX_SERIAL: usize = 40;
/// A certificate is forgotten this long after its end, milliseconds: clocks differ.
const GRACE_MS: u64 = 24 * 3_600_000;
/// Clocks of processes that are in order differ by less, seconds.
const CLOCKS_DIFFER_S: u64 = 600;
/// Names in a refusal.
const NAMES_SHOWN: usize = 12;

/// Everything about certificates.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Certificates {
    /// By serial number.
    records: Shared<BTreeMap<String, Kept>>,
    trust: Trust,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Kept {
    record: CertificateRecord,
    /// By the calm count.
    ends_calm_ms: u64,
}

impl Certificates {
    /// Whether there is nothing to write into a snapshot: one that an older build reads.
    pub fn is_empty(&self) -> bool {
        *self == Certificates::default()
    }

    pub fn is_sound(&self) -> bool {
        let revoked = self.records.iter().filter(|(_, kept)| kept.record.revoked_s.is_some()).map(|(serial, _)| serial);
        let cas = self.trust.cas.len();
        self.trust.revoked.len() <= MAX_REVOKED
            && self.records.len() - self.trust.revoked.len().min(self.records.len()) <= MAX_CERTIFICATES
            && self.records.iter().all(|(serial, kept)| *serial == kept.record.serial)
            && revoked.eq(self.trust.revoked.iter())
            && (self.trust.rotation.is_some() == (cas == 2) && cas <= 2)
    }

    pub fn trust(&self) -> &Trust {
        &self.trust
    }

    /// After a backup was restored: the CA is the one in the folder of the coordinator that goes on, which may be newer than
    /// the backup. What was revoked stays so.
    pub fn begin_history(&mut self) {
        self.trust.cas.clear();
        self.trust.rotation = None;
    }

    pub fn records(&self) -> impl Iterator<Item = &CertificateRecord> {
        self.records.values().map(|kept| &kept.record)
    }

    pub fn record(&self, serial: &str) -> Option<&CertificateRecord> {
        self.records.get(serial).map(|kept| &kept.record)
    }

    /// The newest of each holder, of those that `is_meant` and that were not revoked.
    fn newest(&self, is_meant: impl Fn(&CertificateRecord) -> bool) -> BTreeMap<(Role, &str), &CertificateRecord> {
        let mut of_each: BTreeMap<(Role, &str), Vec<&CertificateRecord>> = BTreeMap::new();
        for record in self.records().filter(|record| record.revoked_s.is_none() && is_meant(record)) {
            of_each.entry((record.role, &record.name)).or_default().push(record);
        }
        of_each.into_iter().filter_map(|(holder, records)| Some((holder, CertificateRecord::newest(records)?))).collect()
    }

    /// The newest of each holder that it has shown.
    fn in_use(&self) -> BTreeMap<(Role, &str), &CertificateRecord> {
        self.newest(|record| record.is_used)
    }

    /// Of one holder, those that are good.
    fn standing(&self, role: Role, name: &str, now_s: u64) -> impl Iterator<Item = &CertificateRecord> {
        self.records()
            .filter(move |record| record.role == role && record.name == name && record.revoked_s.is_none() && record.expires_s > now_s)
    }

    /// The one that is forgotten where there is room for no other: one that has ended, or the oldest of whoever has the most.
    fn least_needed(&self, now_s: u64) -> Option<String> {
        let standing = || self.records().filter(|record| record.revoked_s.is_none());
        let ended = standing().filter(|record| record.expires_s <= now_s).min_by_key(|record| record.expires_s);
        let first = ended.or_else(|| {
            let mut counts: BTreeMap<(Role, &str), usize> = BTreeMap::new();
            standing().for_each(|record| *counts.entry((record.role, &record.name)).or_default() += 1);
            let most = counts.values().copied().max();
            let crowd = standing().filter(|record| counts.get(&(record.role, record.name.as_str())).copied() == most);
            crowd.min_by_key(|record| record.written)
        });
        first.map(|record| record.serial.clone())
    }

    fn forget(&mut self, serial: String, step: &mut Step) {
        self.records.remove(&serial);
        step.changes.push(Change::Deleted { kind: Kind::Certificate, name: serial });
    }

    /// Takes out what has ended; whether something revoked was among it.
    fn clear(&mut self, clock: &Clock, step: &mut Step) -> bool {
        let over: Vec<String> =
            self.records.iter().filter(|(_, kept)| clock.calm_ms() >= kept.ends_calm_ms).map(|(serial, _)| serial.clone()).collect();
        let mut was_revoked = false;
        for serial in over {
            self.records.remove(&serial);
            was_revoked |= self.trust.revoked.remove(&serial);
            step.changes.push(Change::Deleted { kind: Kind::Certificate, name: serial });
        }
        was_revoked
    }
}

impl ClusterState {
    /// What every process believes.
    pub fn trust(&self) -> &Trust {
        self.certificates.trust()
    }

    /// A certificate by its serial number.
    pub fn certificate(&self, serial: &str) -> Option<&CertificateRecord> {
        self.certificates.record(serial)
    }

    pub(super) fn record_certificate(
        &mut self,
        record: &CertificateRecord,
        asked_with: Option<&str>,
        step: &mut Step,
    ) -> Result<Effect, CommandError> {
        checks::label("certificate.name", &record.name)?;
        serial("certificate.serial", &record.serial)?;
        checks::hex("certificate.caSha256", &record.ca_sha256, 64)?;
        record.believes.iter().try_for_each(|ca| checks::hex("certificate.believes", ca, 64))?;
        let is_new = record.revoked_s.is_none() && record.written == Revision(0);
        if record.believes.len() > 4 || !is_new || record.expires_s <= record.issued_s {
            return checks::invalid("certificate", "it believes too many CAs, is not new, or ends before it begins".to_owned());
        }
        if let Some(asked_with) = asked_with {
            self.check_asking(record, asked_with)?;
        }
        if let Some(known) = self.certificate(&record.serial) {
            let begins = record.is_used && !known.is_used && known.revoked_s.is_none();
            return Ok(if begins { self.use_certificate(&record.serial, step) } else { Effect::NONE });
        }
        let now_s = self.clock.latest_ms() / 1_000;
        let is_by_hand = asked_with.is_none() && record.believes.is_empty();
        let mut crowding = None;
        if self.certificates.standing(record.role, &record.name, now_s).count() >= MAX_HOLDER_CERTIFICATES {
            if !is_by_hand {
                // Never pushed out by another that was asked for: what is not known cannot be revoked.
                let kind = format!("certificates of {}; `forgectl cluster certs revoke` takes them back", record.holder());
                return Err(CommandError::TooMany { kind, limit: MAX_HOLDER_CERTIFICATES });
            }
            // Whoever has the CA's key makes as many as they like, known or not.
            let standing = self.certificates.standing(record.role, &record.name, now_s);
            crowding = standing.min_by_key(|record| record.written).map(|record| record.serial.clone());
        }
        let life_ms = record.expires_s.saturating_mul(1_000).saturating_sub(self.clock.last_ms());
        let cleared_revoked = self.certificates.clear(&self.clock, step);
        if self.certificates.records.len() - self.trust().revoked.len() >= MAX_CERTIFICATES {
            crowding = crowding.or_else(|| self.certificates.least_needed(now_s));
        }
        if let Some(crowding) = crowding.filter(|serial| self.certificates.records.contains_key(serial)) {
            self.certificates.forget(crowding, step);
        }
        let ends_calm_ms = self.clock.calm_ms().saturating_add(life_ms).saturating_add(GRACE_MS);
        let record = CertificateRecord { written: step.index, ..record.clone() };
        step.changes.push(Change::Put { object: Object::Certificate(Box::new(record.clone())) });
        self.certificates.records.insert(record.serial.clone(), Kept { record, ends_calm_ms });
        if cleared_revoked {
            self.tell_trust(step);
        }
        Ok(Effect::CHANGED)
    }

    /// Refuses what somebody asked for whose own certificate is known no more as good: it may have been revoked since.
    fn check_asking(&self, record: &CertificateRecord, asked_with: &str) -> Result<(), CommandError> {
        let known = self.certificate(asked_with).filter(|known| known.revoked_s.is_none() && known.holder() == record.holder());
        if known.is_some() {
            return Ok(());
        }
        let reason = format!("{} asked with a certificate ({asked_with}) that was revoked or is not known", record.holder());
        Err(CommandError::Stale { reason })
    }

    fn use_certificate(&mut self, serial: &str, step: &mut Step) -> Effect {
        let Some(kept) = self.certificates.records.get_mut(serial) else { return Effect::NONE };
        kept.record.is_used = true;
        step.changes.push(Change::Put { object: Object::Certificate(Box::new(kept.record.clone())) });
        Effect::CHANGED
    }

    pub(super) fn revoke_certificates(
        &mut self,
        serials: &BTreeSet<String>,
        holder: Option<&Holder>,
        force: bool,
        step: &mut Step,
    ) -> Result<Effect, CommandError> {
        if serials.is_empty() && holder.is_none() {
            return checks::invalid("serials", "is empty: name a certificate or a holder".to_owned());
        }
        for name in serials {
            serial("serials", name)?;
            if !self.certificates.records.contains_key(name) {
                return Err(checks::not_found("certificate", name, self.certificates.records.keys().map(String::as_str)));
            }
        }
        let mut meant = serials.clone();
        if let Some(holder) = holder {
            checks::label("holder.name", &holder.name)?;
            let all = || self.certificates.records();
            if !all().any(|record| (record.role, &record.name) == (holder.role, &holder.name)) {
                let known: BTreeSet<String> = all().map(CertificateRecord::holder).collect();
                return Err(checks::not_found("certificate", &holder.to_string(), known.iter().map(String::as_str)));
            }
            // One that ended a moment ago may still be good by somebody's clock.
            let since_s = (self.clock.latest_ms() / 1_000).saturating_sub(CLOCKS_DIFFER_S);
            meant.extend(self.certificates.standing(holder.role, &holder.name, since_s).map(|record| record.serial.clone()));
        }
        let new: BTreeSet<String> = meant.into_iter().filter(|name| !self.trust().revoked.contains(name)).collect();
        if new.is_empty() {
            return Ok(Effect::NONE);
        }
        if self.trust().revoked.len() + new.len() > MAX_REVOKED {
            return Err(CommandError::TooMany { kind: "revoked certificates".into(), limit: MAX_REVOKED });
        }
        if !force {
            self.check_revocation(&new)?;
        }
        let revoked_s = Some(self.clock.latest_ms() / 1_000);
        let mut of_each: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for name in new {
            let Some(kept) = self.certificates.records.get_mut(&name) else { continue };
            kept.record.revoked_s = revoked_s;
            of_each.entry(kept.record.holder()).or_default().push(name.clone());
            step.changes.push(Change::Put { object: Object::Certificate(Box::new(kept.record.clone())) });
            self.certificates.trust.revoked.insert(name);
        }
        for (holder, serials) in of_each {
            let what =
                if let [one] = serials.as_slice() { format!("certificate {one}") } else { format!("{} certificates", serials.len()) };
            let about = format!("certificate/{}", serials.first().map_or("", String::as_str));
            self.notice(step, Weight::Warning, "CertificateRevoked", about, format!("revoked: {what} of {holder}"));
        }
        self.tell_trust(step);
        Ok(Effect::CHANGED)
    }

    /// Refuses what would shut out the last operator, or a coordinator that votes. Who is left is whoever's certificate in
    /// use, and not an older one that still stands, is good afterwards.
    fn check_revocation(&self, new: &BTreeSet<String>) -> Result<(), CommandError> {
        let in_use = self.certificates.in_use();
        let now_s = self.clock.latest_ms() / 1_000;
        let is_left = |record: &CertificateRecord| !new.contains(&record.serial) && record.expires_s > now_s;
        let of = |role: Role| new.iter().filter_map(|name| self.certificate(name)).filter(move |record| record.role == role);
        if of(Role::Admin).next().is_some() && !in_use.iter().any(|((role, _), record)| *role == Role::Admin && is_left(record)) {
            return unsafe_step(
                "no operator would have a certificate left: make another with `forgectl cluster admin` and use it once, or give --force"
                    .into(),
            );
        }
        let is_shut_out = |name: &str| {
            self.members.values().any(|member| member.name == name)
                && !in_use.get(&(Role::Coordinator, name)).is_some_and(|record| is_left(record))
        };
        match of(Role::Coordinator).find(|record| is_shut_out(&record.name)) {
            Some(record) => unsafe_step(format!(
                "the coordinator {} would be shut out and still count as a voter: `forgectl cluster members remove {0}` first, or give \
                 --force",
                record.name
            )),
            None => Ok(()),
        }
    }

    pub(super) fn begin_ca_rotation(&mut self, from: &CaRecord, to: &CaRecord, step: &mut Step) -> Result<Effect, CommandError> {
        for (field, ca) in [("from", from), ("to", to)] {
            checks::hex(field, &ca.sha256, 64)?;
            if ca.certificate_pem.len() > MAX_CA_BYTES || ca.certificate_pem.is_empty() {
                return checks::invalid(field, format!("its certificate has 1 to {MAX_CA_BYTES} bytes"));
            }
        }
        if self.trust().rotation.is_some() {
            return unsafe_step("a CA is rotated already: `forgectl cluster certs rotate-ca` goes on with it".into());
        }
        if from.sha256 == to.sha256 || self.trust().signing().is_some_and(|signing| signing != from) {
            return Err(CommandError::Stale { reason: "another CA signs by now".into() });
        }
        self.certificates.trust.cas = vec![from.clone(), to.clone()];
        self.certificates.trust.rotation = Some(CaRotation::Introduced);
        self.tell_rotation(step, format!("CA {} is introduced beside {}", short(&to.sha256), short(&from.sha256)));
        Ok(Effect::CHANGED)
    }

    pub(super) fn switch_ca(&mut self, to: &str, force: bool, step: &mut Step) -> Result<Effect, CommandError> {
        match self.rotation_to(to)? {
            Some(CaRotation::Introduced) => {}
            Some(CaRotation::Switched) | None => return Ok(Effect::NONE),
        }
        let newest = self.certificates.newest(|_| true);
        let believes = |record: &CertificateRecord| record.believes.iter().any(|ca| ca == to);
        if !force {
            self.check_all("have not said that they believe the new CA", &newest, believes)?;
        }
        // Whoever believes it has its key.
        let has_key = |name: &str| newest.get(&(Role::Coordinator, name)).is_some_and(|record| believes(record));
        let (have, all) = (self.members.values().filter(|member| has_key(&member.name)).count(), self.members.len());
        if have * 2 <= all {
            return unsafe_step(format!(
                "{have} of {all} coordinators have said that they have the new CA's key, and it takes most of them: nobody could sign; \
                 start them and wait, or take the new CA back (`--abandon`)"
            ));
        }
        self.certificates.trust.cas.swap(0, 1);
        self.certificates.trust.rotation = Some(CaRotation::Switched);
        self.tell_rotation(step, format!("CA {} signs from now on", short(to)));
        Ok(Effect::CHANGED)
    }

    pub(super) fn finish_ca_rotation(&mut self, to: &str, force: bool, step: &mut Step) -> Result<Effect, CommandError> {
        match self.rotation_to(to)? {
            Some(CaRotation::Switched) => {}
            Some(CaRotation::Introduced) => return unsafe_step("the old CA still signs: switch first".into()),
            None => return Ok(Effect::NONE),
        }
        if !force {
            self.check_all("do not use a certificate of the new CA yet", &self.certificates.in_use(), |record| record.ca_sha256 == to)?;
        }
        let old = self.certificates.trust.cas.pop();
        self.certificates.trust.rotation = None;
        let message = format!("CA {} is believed no more", old.as_ref().map_or("?", |old| short(&old.sha256)));
        self.tell_rotation(step, message);
        Ok(Effect::CHANGED)
    }

    /// How far this very CA has taken another's place; none where that is done.
    fn rotation_to(&self, to: &str) -> Result<Option<CaRotation>, CommandError> {
        let Trust { cas, rotation, .. } = self.trust();
        let new = match rotation {
            Some(CaRotation::Introduced) => cas.get(1),
            Some(CaRotation::Switched) | None => cas.first(),
        };
        match new {
            Some(new) if new.sha256 == to => Ok(*rotation),
            _ if rotation.is_none() => no_rotation(),
            _ => Err(CommandError::Stale { reason: format!("another CA than {} takes the old one's place", short(to)) }),
        }
    }

    pub(super) fn abandon_ca_rotation(&mut self, step: &mut Step) -> Result<Effect, CommandError> {
        match self.trust().rotation {
            Some(CaRotation::Introduced) => {}
            Some(CaRotation::Switched) => {
                return unsafe_step("the new CA signs already: go on with `forgectl cluster certs rotate-ca`, then rotate again".into());
            }
            None => return no_rotation(),
        }
        let new = self.certificates.trust.cas.pop();
        self.certificates.trust.rotation = None;
        let message = format!("CA {} is not introduced after all", new.as_ref().map_or("?", |new| short(&new.sha256)));
        self.tell_rotation(step, message);
        Ok(Effect::CHANGED)
    }

    /// Holders that would be shut out if `holds` of the certificate that `counts` for them were asked for: members of the
    /// group, nodes that were not removed, and operators.
    fn lagging(&self, counts: &BTreeMap<(Role, &str), &CertificateRecord>, holds: impl Fn(&CertificateRecord) -> bool) -> Vec<String> {
        let now_s = self.clock.latest_ms() / 1_000;
        let members = self.members.values().map(|member| (Role::Coordinator, member.name.as_str()));
        let nodes = self.nodes.values().map(|node| (node.spec.role, node.spec.id.0.as_str()));
        let newest = self.certificates.newest(|record| record.role == Role::Admin);
        let operators = newest.iter().filter(|(_, record)| record.expires_s > now_s).map(|(holder, _)| *holder);
        let all: BTreeSet<(Role, &str)> = members.chain(nodes).chain(operators).collect();
        let lags = |holder: &&(Role, &str)| !counts.get(*holder).is_some_and(|record| holds(record));
        all.iter().filter(lags).map(|(role, name)| format!("{role}/{name}")).collect()
    }

    fn check_all(
        &self,
        what: &str,
        counts: &BTreeMap<(Role, &str), &CertificateRecord>,
        holds: impl Fn(&CertificateRecord) -> bool,
    ) -> Result<(), CommandError> {
        let lagging = self.lagging(counts, holds);
        if lagging.is_empty() {
            return Ok(());
        }
        let more = lagging.len().saturating_sub(NAMES_SHOWN);
        let shown = lagging[..lagging.len() - more].join(", ");
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        unsafe_step(format!(
            "these {what} and would be shut out: {shown}{more}; start them and wait, let operators run any command, remove those that \
             will not come back (`forgectl delete node`, `certs revoke`), or give --force"
        ))
    }

    fn tell_rotation(&mut self, step: &mut Step, message: String) {
        self.tell_trust(step);
        self.notice(step, Weight::Normal, "CaRotation", "cluster/ca".into(), message);
    }

    fn tell_trust(&self, step: &mut Step) {
        step.changes.push(Change::Put { object: Object::Trust(Box::new(self.trust().clone())) });
    }
}

fn unsafe_step<T>(reason: String) -> Result<T, CommandError> {
    Err(CommandError::Unsafe { reason })
}

fn no_rotation<T>() -> Result<T, CommandError> {
    unsafe_step("no CA is rotated: `forgectl cluster certs rotate-ca` begins".into())
}

/// The first digits of a digest, for people.
fn short(sha256: &str) -> &str {
    sha256.get(..12).unwrap_or(sha256)
}

fn serial(field: &str, text: &str) -> Result<(), CommandError> {
    let is_good = (1..=MAX_SERIAL).contains(&text.len()) && !text.starts_with("00");
    if is_good {
        checks::hex(field, text, text.len())
    } else {
        checks::invalid(field, format!("must be 1 to {MAX_SERIAL} lower-case hex digits"))
    }
}

#[cfg(test)]
#[path = "certificates_tests.rs"]
mod tests;
