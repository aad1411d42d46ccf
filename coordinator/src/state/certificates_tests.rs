//! What the state knows and refuses about certificates.

use forge_shared::cluster::command::{Command, CommandError, MemberRecord};

use super::*;
use crate::state::test_support::World;

const OLD: &str = "aa";
const NEW: &str = "bb";

fn ca(digits: &str) -> CaRecord {
    CaRecord { sha256: digits.repeat(32), certificate_pem: format!("-- {digits} --\n") }
}

fn record(world: &World, role: Role, name: &str, serial: &str, ca: &str, believes: &[&str]) -> Command {
    let issued_s = world.now_ms / 1_000;
    let certificate = CertificateRecord {
        serial: serial.into(),
        role,
        name: name.into(),
        issued_s,
        expires_s: issued_s + 90 * 24 * 3600,
        ca_sha256: ca.repeat(32),
        believes: believes.iter().map(|ca| ca.repeat(32)).collect(),
        revoked_s: None,
    };
    Command::RecordCertificate { certificate: Box::new(certificate) }
}

fn put(world: &mut World, role: Role, name: &str, serial: &str, ca: &str, believes: &[&str]) {
    let command = record(world, role, name, serial, ca, believes);
    world.run(command).expect("taken");
}

fn revoke(serials: &[&str], force: bool) -> Command {
    Command::RevokeCertificates { serials: serials.iter().map(|serial| (*serial).to_owned()).collect(), force }
}

fn reason(refused: Result<forge_shared::cluster::command::Applied, CommandError>) -> String {
    match refused.expect_err("refused") {
        CommandError::Unsafe { reason } => reason,
        other => panic!("{other:?}"),
    }
}

/// One of each role.
fn world() -> World {
    let mut world = World::new();
    world.join("w1", 1, &[64]).expect("joins");
    world.run(Command::PutMember { member: MemberRecord::new(1, "c1", "c:7000", Default::default()) }).expect("new");
    for (role, name, serial) in [(Role::Worker, "w1", "01"), (Role::Coordinator, "c1", "02"), (Role::Admin, "root", "03")] {
        put(&mut world, role, name, serial, OLD, &[OLD]);
    }
    world
}

#[test]
fn revoked_ones_are_told_to_everybody_and_stay() {
    let mut world = world();
    assert!(world.run(revoke(&["01"], false)).expect("taken").changed);
    let told = world.changes.iter().find_map(|change| match change {
        Change::Put { object: Object::Trust(trust) } => Some(trust.revoked.clone()),
        _ => None,
    });
    assert_eq!(told, Some(BTreeSet::from(["01".to_owned()])));
    assert!(!world.run(revoke(&["01"], false)).expect("again").changed);
    assert!(matches!(world.run(revoke(&["09"], false)), Err(CommandError::NotFound { .. })));
    // Seen again, or by the clock of a leader that is a year ahead: it stays revoked.
    let again = record(&world, Role::Worker, "w1", "01", OLD, &[]);
    assert!(!world.run(again).expect("known").changed);
    world.now_ms += 365 * 24 * 3_600_000;
    put(&mut world, Role::Worker, "w1", "05", OLD, &[OLD]);
    assert!(world.state.trust().revoked.contains("01"));
    assert_eq!(ClusterState::decode(&world.state.encode()).expect("whole"), world.state);
}

#[test]
fn the_last_operator_and_a_voter_are_not_shut_out_unless_it_is_forced() {
    let mut world = world();
    assert!(reason(world.run(revoke(&["03"], false))).contains("no operator"));
    assert!(reason(world.run(revoke(&["02"], false))).contains("members remove c1"));
    put(&mut world, Role::Admin, "other", "04", OLD, &[OLD]);
    put(&mut world, Role::Coordinator, "c1", "06", OLD, &[OLD]);
    world.run(revoke(&["03", "02"], false)).expect("others are left");
    assert!(reason(world.run(revoke(&["04"], false))).contains("no operator"));
    world.run(revoke(&["04", "06"], true)).expect("forced");
}

#[test]
fn a_ca_takes_anothers_place_step_by_step_and_names_who_lags() {
    let mut world = world();
    let begin = Command::BeginCaRotation { from: ca(OLD), to: ca(NEW) };
    assert!(reason(world.run(Command::SwitchCa { force: false })).contains("no CA is rotated"));
    world.run(begin.clone()).expect("begun");
    assert!(reason(world.run(begin)).contains("already"));
    assert_eq!(world.state.trust().cas.iter().map(|ca| &ca.sha256[..2]).collect::<Vec<_>>(), [OLD, NEW]);

    let refused = reason(world.run(Command::SwitchCa { force: false }));
    assert!(["worker/w1", "coordinator/c1", "admin/root"].iter().all(|name| refused.contains(name)), "{refused}");
    for (role, name, serial) in [(Role::Worker, "w1", "11"), (Role::Coordinator, "c1", "12")] {
        put(&mut world, role, name, serial, OLD, &[OLD, NEW]);
    }
    assert!(reason(world.run(Command::SwitchCa { force: false })).contains("shut out: admin/root;"));
    put(&mut world, Role::Admin, "root", "13", OLD, &[OLD, NEW]);
    // Made by hand and seen only after its holder asked for another with it, all in one second: the other is the newer.
    put(&mut world, Role::Worker, "w1", "14", OLD, &[]);
    assert!(reason(world.run(Command::FinishCaRotation { force: false })).contains("switch first"));
    world.run(Command::SwitchCa { force: false }).expect("all believe it");
    assert!(!world.run(Command::SwitchCa { force: false }).expect("again").changed);
    assert!(reason(world.run(Command::AbandonCaRotation)).contains("signs already"));

    // Seen late: an old certificate of a connection that stands. The newest decides.
    world.now_ms += 10_000;
    for (role, name, serial) in [(Role::Worker, "w1", "21"), (Role::Coordinator, "c1", "22")] {
        put(&mut world, role, name, serial, NEW, &[OLD, NEW]);
    }
    assert!(reason(world.run(Command::FinishCaRotation { force: false })).contains("admin/root"));
    world.run(Command::FinishCaRotation { force: true }).expect("forced");
    let trust = world.state.trust();
    assert!(trust.rotation.is_none() && trust.cas == [ca(NEW)]);
    assert_eq!(ClusterState::decode(&world.state.encode()).expect("whole"), world.state);
    let other = Command::BeginCaRotation { from: ca(OLD), to: ca("cc") };
    assert!(matches!(world.run(other), Err(CommandError::Stale { .. })), "the old one signs no more");
}

#[test]
fn a_ca_that_was_only_introduced_can_be_taken_back() {
    let mut world = world();
    world.run(Command::BeginCaRotation { from: ca(OLD), to: ca(NEW) }).expect("begun");
    world.run(Command::AbandonCaRotation).expect("taken back");
    assert!(world.state.trust().rotation.is_none() && world.state.trust().cas == [ca(OLD)]);
    world.run(Command::BeginCaRotation { from: ca(OLD), to: ca("cc") }).expect("another");
}
