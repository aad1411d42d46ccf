//! `forgectl cluster certs`: who has which certificate, taking one back, and changing the CA.
//!
//! Invariant: a change of the CA is in the cluster's state, not here: the command drives it, and goes on where it, or another
//! one, stopped.

use std::collections::BTreeSet;
use std::time::Duration;

use forge_cluster::api::ClusterApi;
use forge_cluster::client::RemoteCluster;
use forge_shared::cluster::certificate::{CertificateRecord, Holder, Trust};
use forge_shared::cluster::command::Command;
use forge_shared::cluster::event::{Kind, Object};

use super::connect::{LEARN_TIMEOUT, TIMEOUT, request_id, with_cluster};
use crate::cli::cluster::CertsCommand;
use crate::failure::{Failure, Result};
use crate::output::{Column, OutputFormat, column, print_list, print_text, wide};
use crate::time::Utc;

/// Digits of a serial number that are shown and enough to name it.
const SHORT_SERIAL: usize = 12;
const SHORTEST_SERIAL: usize = 6;
/// A renewal may take this long after it is due before it counts as overdue, of the certificate's life.
const OVERDUE_PART: u64 = 30;

/// `forgectl cluster certs`.
///
/// # Errors
/// A name that means none or several, a change that the cluster refuses, no leader.
pub fn certs(command: &CertsCommand) -> Result<()> {
    match command {
        CertsCommand::List { all, list, server } => with_cluster(server, |cluster| async move {
            let certificates = read_certificates(&cluster, TIMEOUT).await?;
            show(&certificates, *all, list.output)
        }),
        CertsCommand::Revoke { target, force, server } => with_cluster(server, |cluster| async move {
            let certificates = read_certificates(&cluster, TIMEOUT).await?;
            let (serials, holder) = match meant(&certificates, target)? {
                Meant::One(record) => (BTreeSet::from([record.serial.clone()]), None),
                Meant::All(holder) => (BTreeSet::new(), Some(holder)),
            };
            let whose = match &holder {
                // All that it has when the command is applied: it may ask for another one now.
                Some(holder) => format!("all certificates of {holder}"),
                None => format!("certificate {}", serials.first().cloned().unwrap_or_default()),
            };
            let command = Command::RevokeCertificates { serials, holder, force: *force };
            let applied = cluster.execute(request_id(), command, TIMEOUT).await?;
            if !applied.changed {
                return Err(Failure::new(format!("{target} was revoked before")));
            }
            print_text(&format!(
                "revoked {whose}; connections are cut within seconds, and its holder can come back by a join token alone\n"
            ))
        }),
        CertsCommand::RotateCa(args) => super::rotate::rotate(args),
    }
}

async fn read_certificates(cluster: &RemoteCluster, timeout: Duration) -> Result<Vec<CertificateRecord>> {
    let listing = cluster.read(Kind::Certificate, None, timeout).await?;
    let records = listing.objects.into_iter().filter_map(|object| match object {
        Object::Certificate(record) => Some(*record),
        _ => None,
    });
    let mut records: Vec<CertificateRecord> = records.collect();
    records.sort_by(|a, b| (a.role, &a.name, a.issued_s, &a.serial).cmp(&(b.role, &b.name, b.issued_s, &b.serial)));
    Ok(records)
}

/// Where a certificate stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    Good,
    /// Past two thirds of its life and more, and nothing newer is known: the renewal fails.
    Overdue,
    /// Its holder has a newer one.
    Replaced,
    Expired,
    Revoked,
}

impl Standing {
    fn of(record: &CertificateRecord, all: &[CertificateRecord], now_s: u64) -> Standing {
        let standing = || all.iter().filter(|other| other.holder() == record.holder() && other.revoked_s.is_none());
        let is_replaced = || CertificateRecord::newest(standing()).is_some_and(|newest| newest.serial != record.serial);
        let life_s = record.expires_s.saturating_sub(record.issued_s);
        match record {
            _ if record.revoked_s.is_some() => Standing::Revoked,
            _ if record.expires_s <= now_s => Standing::Expired,
            _ if is_replaced() => Standing::Replaced,
            _ if now_s > record.renew_at_s() + life_s / OVERDUE_PART => Standing::Overdue,
            _ => Standing::Good,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Standing::Good => "good",
            Standing::Overdue => "renewal overdue",
            Standing::Replaced => "replaced",
            Standing::Expired => "expired",
            Standing::Revoked => "revoked",
        }
    }
}

const COLUMNS: [Column; 8] =
    [column("NAME"), column("ROLE"), column("SERIAL"), column("ISSUED"), column("EXPIRES"), column("STATE"), wide("REVOKED"), wide("CA")];

fn show(certificates: &[CertificateRecord], all: bool, output: OutputFormat) -> Result<()> {
    let now_s = Utc::now().0;
    let standing = |record: &CertificateRecord| Standing::of(record, certificates, now_s);
    let is_shown = |record: &&CertificateRecord| all || !matches!(standing(record), Standing::Replaced | Standing::Expired);
    let shown: Vec<&CertificateRecord> = certificates.iter().filter(is_shown).collect();
    print_list(output, &shown, &COLUMNS, |record| {
        let digits = if output == OutputFormat::Wide { record.serial.len() } else { SHORT_SERIAL };
        vec![
            record.name.clone(),
            record.role.to_string(),
            record.serial.chars().take(digits).collect(),
            Utc(record.issued_s).to_string(),
            Utc(record.expires_s).to_string(),
            standing(record).word().into(),
            record.revoked_s.map_or("-".into(), |moment| Utc(moment).to_string()),
            record.ca_sha256.chars().take(SHORT_SERIAL).collect(),
        ]
    })
}

/// The certificates that are meant.
#[derive(Debug, PartialEq)]
enum Meant<'a> {
    /// By its serial number or the beginning of it.
    One(&'a CertificateRecord),
    /// All that a holder has, by `NAME` or `ROLE/NAME`.
    All(Holder),
}

fn meant<'a>(all: &'a [CertificateRecord], target: &str) -> Result<Meant<'a>> {
    let by_name = all.iter().filter(|record| record.name == target || record.holder() == target);
    let mut holders: BTreeSet<Holder> = by_name.map(|record| Holder { role: record.role, name: record.name.clone() }).collect();
    if holders.len() > 1 {
        let holders: Vec<String> = holders.iter().map(Holder::to_string).collect();
        return Err(Failure::usage(format!("{target:?} means several: {}", holders.join(", "))).help("write ROLE/NAME"));
    }
    if let Some(holder) = holders.pop_first() {
        return Ok(Meant::All(holder));
    }
    let digits = target.to_ascii_lowercase().replace(':', "");
    let by_serial: Vec<&CertificateRecord> =
        all.iter().filter(|record| digits.len() >= SHORTEST_SERIAL && record.serial.starts_with(&digits)).collect();
    match by_serial.as_slice() {
        [one] => Ok(Meant::One(one)),
        [] => Err(Failure::usage(format!("no certificate has the name or serial number {target:?}"))
            .help("`forgectl cluster certs list --all` shows them; one that was never used is not known: `certs rotate-ca` ends it")),
        several => Err(Failure::usage(format!("{} serial numbers begin with {target:?}", several.len())).help("write more digits")),
    }
}

/// What `cluster status` says of certificates, a line each.
pub(super) async fn summary(cluster: &RemoteCluster) -> Result<Vec<String>> {
    let (certificates, trust) = (read_certificates(cluster, LEARN_TIMEOUT).await?, read_trust(cluster, LEARN_TIMEOUT).await?);
    let now_s = Utc::now().0;
    let with = |wanted: Standing| {
        let found = certificates.iter().filter(|record| Standing::of(record, &certificates, now_s) == wanted);
        found.map(CertificateRecord::holder).collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>()
    };
    let mut lines = vec![format!("certificates: {} good", with(Standing::Good).len())];
    let overdue = with(Standing::Overdue);
    if !overdue.is_empty() {
        lines.push(format!("! renewal overdue: {} (see their logs; `forgectl cluster certs list`)", overdue.join(", ")));
    }
    if trust.rotation.is_some() {
        lines.push("! the CA is being rotated: `forgectl cluster certs rotate-ca` goes on with it".into());
    }
    Ok(lines)
}

pub(super) async fn read_trust(cluster: &RemoteCluster, timeout: Duration) -> Result<Trust> {
    let listing = cluster.read(Kind::Trust, None, timeout).await?;
    Ok(listing
        .objects
        .into_iter()
        .find_map(|object| if let Object::Trust(trust) = object { Some(*trust) } else { None })
        .unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use forge_shared::cluster::Revision;
    use forge_shared::cluster::node::Role;

    use super::*;

    fn record(role: Role, name: &str, serial: &str, issued_s: u64) -> CertificateRecord {
        CertificateRecord {
            serial: serial.into(),
            role,
            name: name.into(),
            issued_s,
            expires_s: issued_s + 900,
            ca_sha256: "0".repeat(64),
            believes: Vec::new(),
            is_used: true,
            written: Revision::default(),
            revoked_s: None,
        }
    }

    #[test]
    fn a_certificate_is_named_by_holder_or_by_the_beginning_of_its_number() {
        let all = [
            record(Role::Worker, "a", "aabbccdd01", 0),
            record(Role::Worker, "a", "aabbccdd02", 600),
            record(Role::Gateway, "a", "aabbccdd03", 0),
            record(Role::Gateway, "b", "eeff00112233", 0),
        ];
        let of = |role, name: &str| Meant::All(Holder { role, name: name.into() });
        assert_eq!(meant(&all, "worker/a").expect("one holder"), of(Role::Worker, "a"));
        assert_eq!(meant(&all, "b").expect("one holder"), of(Role::Gateway, "b"));
        assert_eq!(meant(&all, "EE:FF:00:11").expect("as openssl writes it"), Meant::One(&all[3]));
        for (target, word) in [("a", "several"), ("aabbcc", "begin with"), ("eeff0", "no certificate"), ("c", "no certificate")] {
            assert!(meant(&all, target).expect_err("not one").to_string().contains(word), "{target}");
        }
    }

    #[test]
    fn what_was_not_renewed_in_time_stands_out() {
        let all = [record(Role::Worker, "a", "01", 0), record(Role::Worker, "a", "02", 600), record(Role::Worker, "b", "03", 0)];
        let at = |now_s| all.iter().map(|record| Standing::of(record, &all, now_s)).collect::<Vec<_>>();
        assert_eq!(at(610), [Standing::Replaced, Standing::Good, Standing::Good], "b has a little time");
        assert_eq!(at(700), [Standing::Replaced, Standing::Good, Standing::Overdue]);
        assert_eq!(at(1_000), [Standing::Expired, Standing::Good, Standing::Expired]);
        let revoked = CertificateRecord { revoked_s: Some(5), ..record(Role::Worker, "a", "02", 600) };
        let all = [record(Role::Worker, "a", "01", 0), revoked];
        assert_eq!(Standing::of(&all[0], &all, 610), Standing::Good, "a revoked one replaces nothing");
        // Signed by a leader whose clock is behind: the log's order counts.
        let asked = |serial, issued_s, written| CertificateRecord {
            believes: vec!["0".repeat(64)],
            written: Revision(written),
            ..record(Role::Worker, "a", serial, issued_s)
        };
        let all = [asked("01", 600, 7), asked("02", 300, 8)];
        assert_eq!(Standing::of(&all[0], &all, 610), Standing::Replaced);
        assert_eq!(Standing::of(&all[1], &all, 610), Standing::Good);
    }
}
