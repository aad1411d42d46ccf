//! Certificates that were signed or seen, those that were revoked, and the CAs that are believed.
//!
//! Invariants: what is revoked stays so until the certificate has ended by any clock; a step of a CA's rotation, or a
//! revocation, that would shut out a member or the last operator is refused with their names unless it is forced.

use std::collections::{BTreeMap, BTreeSet};

use forge_shared::cluster::Revision;
use forge_shared::cluster::certificate::{CaRecord, CaRotation, CertificateRecord, Trust};
use forge_shared::cluster::command::CommandError;
use forge_shared::cluster::event::{Change, Kind, Object};
use forge_shared::cluster::node::Role;
use serde::{Deserialize, Serialize};

use super::clock::Clock;
use super::notices::Weight;
use super::shared::Shared;
use super::{ClusterState, Effect, MAX_CERTIFICATES, MAX_REVOKED, Step, checks};

/// Bytes of a CA's certificate in PEM.
const MAX_CA_BYTES: usize = 16 << 10;
/// Digits of a serial number: 20 bytes.
const MAX_SERIAL: usize = 40;
/// A certificate is forgotten this long after its end, milliseconds: clocks differ.
const GRACE_MS: u64 = 24 * 3_600_000;
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
    /// When it was written down: of two of one second and kind, the later is the newer.
    at: Revision,
    /// By the calm count.
    ends_calm_ms: u64,
}

impl Kept {
    /// Orders a holder's certificates by age. A second is coarse, and one made by hand is written down when it is seen: it may
    /// stand behind the one that its holder asked for with it.
    fn newness(&self) -> (u64, bool, Revision) {
        (self.record.issued_s, !self.record.believes.is_empty(), self.at)
    }
}

impl Certificates {
    /// Whether there is nothing to write into a snapshot: one that an older build reads.
    pub fn is_empty(&self) -> bool {
        *self == Certificates::default()
    }

    pub fn is_sound(&self) -> bool {
        let revoked = self.records.iter().filter(|(_, kept)| kept.record.revoked_s.is_some()).map(|(serial, _)| serial);
        let cas = self.trust.cas.len();
        self.records.len() <= MAX_CERTIFICATES
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

    /// The newest of each holder that is not revoked and that `without` does not name.
    fn newest(&self, without: &BTreeSet<&str>) -> BTreeMap<(Role, &str), &CertificateRecord> {
        let mut newest: BTreeMap<(Role, &str), &Kept> = BTreeMap::new();
        let standing = self.records.values().filter(|kept| kept.record.revoked_s.is_none());
        for kept in standing.filter(|kept| !without.contains(kept.record.serial.as_str())) {
            let known = newest.entry((kept.record.role, &kept.record.name)).or_insert(kept);
            if kept.newness() > known.newness() {
                *known = kept;
            }
        }
        newest.into_iter().map(|(holder, kept)| (holder, &kept.record)).collect()
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

    pub(super) fn record_certificate(&mut self, record: &CertificateRecord, step: &mut Step) -> Result<Effect, CommandError> {
        checks::label("certificate.name", &record.name)?;
        serial("certificate.serial", &record.serial)?;
        checks::hex("certificate.caSha256", &record.ca_sha256, 64)?;
        record.believes.iter().try_for_each(|ca| checks::hex("certificate.believes", ca, 64))?;
        if record.believes.len() > 4 || record.revoked_s.is_some() || record.expires_s <= record.issued_s {
            return checks::invalid("certificate", "it believes too many CAs, is revoked already, or ends before it begins".to_owned());
        }
        if self.certificates.records.contains_key(&record.serial) {
            return Ok(Effect::NONE);
        }
        let life_ms = record.expires_s.saturating_mul(1_000).saturating_sub(self.clock.last_ms());
        let cleared_revoked = self.certificates.clear(&self.clock, step);
        if self.certificates.records.len() >= MAX_CERTIFICATES {
            let ending = self.certificates.records.values().filter(|kept| kept.record.revoked_s.is_none());
            let first = ending.min_by_key(|kept| kept.record.expires_s).map(|kept| kept.record.serial.clone());
            if let Some(first) = first {
                self.certificates.records.remove(&first);
                step.changes.push(Change::Deleted { kind: Kind::Certificate, name: first });
            }
        }
        let ends_calm_ms = self.clock.calm_ms().saturating_add(life_ms).saturating_add(GRACE_MS);
        let kept = Kept { record: record.clone(), at: step.index, ends_calm_ms };
        self.certificates.records.insert(record.serial.clone(), kept);
        step.changes.push(Change::Put { object: Object::Certificate(Box::new(record.clone())) });
        if cleared_revoked {
            self.tell_trust(step);
        }
        Ok(Effect::CHANGED)
    }

    pub(super) fn revoke_certificates(&mut self, serials: &BTreeSet<String>, force: bool, step: &mut Step) -> Result<Effect, CommandError> {
        if serials.is_empty() {
            return checks::invalid("serials", "is empty: name a certificate".to_owned());
        }
        for name in serials {
            serial("serials", name)?;
            if !self.certificates.records.contains_key(name) {
                return Err(checks::not_found("certificate", name, self.certificates.records.keys().map(String::as_str)));
            }
        }
        let new: Vec<&String> = serials.iter().filter(|name| !self.trust().revoked.contains(*name)).collect();
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
        for name in new {
            let Some(kept) = self.certificates.records.get_mut(name) else { continue };
            kept.record.revoked_s = revoked_s;
            let record = kept.record.clone();
            self.certificates.trust.revoked.insert(name.clone());
            let message = format!("certificate {name} of {} was revoked", record.holder());
            step.changes.push(Change::Put { object: Object::Certificate(Box::new(record.clone())) });
            self.notice(step, Weight::Warning, "CertificateRevoked", format!("certificate/{name}"), message);
        }
        self.tell_trust(step);
        Ok(Effect::CHANGED)
    }

    /// Refuses what would shut out the last operator, or a coordinator that votes.
    fn check_revocation(&self, new: &[&String]) -> Result<(), CommandError> {
        let without: BTreeSet<&str> = new.iter().map(|name| name.as_str()).collect();
        let left = self.certificates.newest(&without);
        let now_s = self.clock.latest_ms() / 1_000;
        let of = |role: Role| new.iter().filter_map(|name| self.certificate(name)).filter(move |record| record.role == role);
        if of(Role::Admin).next().is_some() && !left.iter().any(|((role, _), record)| *role == Role::Admin && record.expires_s > now_s) {
            return unsafe_step(
                "no operator would have a certificate left: make another with `forgectl cluster admin` and use it once, or give --force"
                    .into(),
            );
        }
        let is_shut_out =
            |name: &str| self.members.values().any(|member| member.name == name) && !left.contains_key(&(Role::Coordinator, name));
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

    pub(super) fn switch_ca(&mut self, force: bool, step: &mut Step) -> Result<Effect, CommandError> {
        match self.trust().rotation {
            Some(CaRotation::Introduced) => {}
            Some(CaRotation::Switched) => return Ok(Effect::NONE),
            None => return no_rotation(),
        }
        if !force {
            let new = self.trust().cas[1].sha256.clone();
            self.check_all("have not said that they believe the new CA", |record| record.believes.contains(&new))?;
        }
        self.certificates.trust.cas.swap(0, 1);
        self.certificates.trust.rotation = Some(CaRotation::Switched);
        let message = format!("CA {} signs from now on", short(&self.trust().cas[0].sha256));
        self.tell_rotation(step, message);
        Ok(Effect::CHANGED)
    }

    pub(super) fn finish_ca_rotation(&mut self, force: bool, step: &mut Step) -> Result<Effect, CommandError> {
        match self.trust().rotation {
            Some(CaRotation::Switched) => {}
            Some(CaRotation::Introduced) => return unsafe_step("the old CA still signs: switch first".into()),
            None => return no_rotation(),
        }
        if !force {
            let new = self.trust().cas[0].sha256.clone();
            self.check_all("have no certificate of the new CA yet", |record| record.ca_sha256 == new)?;
        }
        let old = self.certificates.trust.cas.pop();
        self.certificates.trust.rotation = None;
        let message = format!("CA {} is believed no more", old.as_ref().map_or("?", |old| short(&old.sha256)));
        self.tell_rotation(step, message);
        Ok(Effect::CHANGED)
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

    /// Holders that would be shut out if what `holds` of their newest certificate were asked for: members of the group, nodes
    /// that were not removed, and operators.
    pub fn lagging(&self, holds: impl Fn(&CertificateRecord) -> bool) -> Vec<String> {
        let newest = self.certificates.newest(&BTreeSet::new());
        let now_s = self.clock.latest_ms() / 1_000;
        let members = self.members.values().map(|member| (Role::Coordinator, member.name.as_str()));
        let nodes = self.nodes.values().map(|node| (node.spec.role, node.spec.id.0.as_str()));
        let operators =
            newest.iter().filter(|((role, _), record)| *role == Role::Admin && record.expires_s > now_s).map(|(holder, _)| *holder);
        let all: BTreeSet<(Role, &str)> = members.chain(nodes).chain(operators).collect();
        let lags = |holder: &&(Role, &str)| !newest.get(*holder).is_some_and(|record| holds(record));
        all.iter().filter(lags).map(|(role, name)| format!("{role}/{name}")).collect()
    }

    fn check_all(&self, what: &str, holds: impl Fn(&CertificateRecord) -> bool) -> Result<(), CommandError> {
        let lagging = self.lagging(holds);
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
