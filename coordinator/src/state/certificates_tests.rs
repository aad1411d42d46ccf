//! What the state knows and refuses about certificates.

use forge_shared::cluster::command::{Command, CommandError, MemberRecord};

use super::*;
use crate::state::test_support::World;

const OLD: &str = "aa";
const NEW: &str = "bb";

fn ca(digits: &str) -> CaRecord {
    CaRecord { sha256: digits.repeat(32), certificate_pem: format!("-- {digits} --\n") }
}

/// As one that was signed and that nobody has shown.
fn signed(world: &World, role: Role, name: &str, serial: &str, ca: &str, believes: &[&str]) -> CertificateRecord {
    let issued_s = world.now_ms / 1_000;
    CertificateRecord {
        serial: serial.into(),
        role,
        name: name.into(),
        issued_s,
        expires_s: issued_s + 90 * 24 * 3600,
        ca_sha256: ca.repeat(32),
        believes: believes.iter().map(|ca| ca.repeat(32)).collect(),
        is_used: false,
        written: Revision(0),
        revoked_s: None,
    }
}

fn command(certificate: CertificateRecord, asked_with: Option<&str>) -> Command {
    Command::RecordCertificate { certificate: Box::new(certificate), asked_with: asked_with.map(str::to_owned) }
}

/// One that is in use.
fn record(world: &World, role: Role, name: &str, serial: &str, ca: &str, believes: &[&str]) -> Command {
    command(CertificateRecord { is_used: true, ..signed(world, role, name, serial, ca, believes) }, None)
}

fn switch(force: bool) -> Command {
    Command::SwitchCa { to: NEW.repeat(32), force }
}

fn finish(force: bool) -> Command {
    Command::FinishCaRotation { to: NEW.repeat(32), force }
}

fn revoke_all(role: Role, name: &str) -> Command {
    let holder = Some(Holder { role, name: name.into() });
    Command::RevokeCertificates { serials: BTreeSet::new(), holder, force: false }
}

fn revoked(world: &World) -> Vec<&str> {
    world.state.trust().revoked.iter().map(String::as_str).collect()
}

fn put(world: &mut World, role: Role, name: &str, serial: &str, ca: &str, believes: &[&str]) {
    let command = record(world, role, name, serial, ca, believes);
    world.run(command).expect("taken");
}

fn revoke(serials: &[&str], force: bool) -> Command {
    Command::RevokeCertificates { serials: serials.iter().map(|serial| (*serial).to_owned()).collect(), holder: None, force }
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
    // What was replaced is in nobody's hands any more, though it is still good.
    put(&mut world, Role::Admin, "root", "13", OLD, &[OLD]);
    put(&mut world, Role::Coordinator, "c1", "12", OLD, &[OLD]);
    assert!(reason(world.run(revoke(&["13"], false))).contains("no operator"));
    assert!(reason(world.run(revoke(&["12"], false))).contains("members remove c1"));
    // Nor is what was signed, and never came.
    for (role, name, serial) in [(Role::Admin, "root", "23"), (Role::Coordinator, "c1", "22")] {
        let never = command(signed(&world, role, name, serial, OLD, &[OLD]), None);
        world.run(never).expect("taken");
    }
    assert!(reason(world.run(revoke(&["13"], false))).contains("no operator"));
    assert!(reason(world.run(revoke(&["12"], false))).contains("members remove c1"));
    put(&mut world, Role::Admin, "other", "04", OLD, &[OLD]);
    put(&mut world, Role::Coordinator, "c1", "06", OLD, &[OLD]);
    world.run(revoke(&["13", "12"], false)).expect("others are left");
    assert!(reason(world.run(revoke_all(Role::Coordinator, "c1"))).contains("members remove c1"));
    world.run(revoke_all(Role::Admin, "root")).expect("another is left");
    assert!(reason(world.run(revoke(&["04"], false))).contains("no operator"));
    world.run(revoke(&["04", "06"], true)).expect("forced");
}

#[test]
fn nothing_survives_the_revocation_of_a_holder() {
    let mut world = world();
    let renewed = command(signed(&world, Role::Worker, "w1", "11", OLD, &[OLD]), Some("01"));
    world.run(renewed).expect("taken");
    world.run(revoke_all(Role::Worker, "w1")).expect("taken");
    assert_eq!(revoked(&world), ["01", "11"], "the one that came in between too");
    assert!(!world.run(revoke_all(Role::Worker, "w1")).expect("again").changed);
    assert!(matches!(world.run(revoke_all(Role::Worker, "w9")), Err(CommandError::NotFound { .. })));
    // Signed before, and written down after.
    for asked_with in ["01", "11", "99"] {
        let late = command(signed(&world, Role::Worker, "w1", "21", OLD, &[OLD]), Some(asked_with));
        assert!(matches!(world.run(late), Err(CommandError::Stale { .. })), "{asked_with}");
    }
    assert!(world.state.certificate("21").is_none());
    let anothers = command(signed(&world, Role::Worker, "w1", "21", OLD, &[OLD]), Some("03"));
    assert!(matches!(world.run(anothers), Err(CommandError::Stale { .. })));
    // Who joins anew has another one.
    let joined = command(signed(&world, Role::Worker, "w1", "31", OLD, &[OLD]), None);
    world.run(joined).expect("taken");
    assert_eq!(ClusterState::decode(&world.state.encode()).expect("whole"), world.state);
}

#[test]
fn a_flood_of_renewals_pushes_nobody_out_and_can_be_revoked() {
    let mut world = world();
    let serial = |number: usize| format!("a{number:04x}");
    for number in 1..MAX_HOLDER_CERTIFICATES {
        let more = command(signed(&world, Role::Worker, "w1", &serial(number), OLD, &[]), Some("01"));
        world.run(more).expect("taken");
    }
    let more = command(signed(&world, Role::Worker, "w1", "bb", OLD, &[]), Some("01"));
    let refused = world.run(more.clone()).expect_err("too many").to_string();
    assert!(refused.contains("worker/w1") && refused.contains("certs revoke"), "{refused}");
    assert!(["01", "02", "03"].iter().all(|serial| world.state.certificate(serial).is_some()));
    // One that was made with the CA's key is seen: the oldest makes room.
    put(&mut world, Role::Worker, "w1", "cc", OLD, &[]);
    assert!(world.state.certificate("01").is_none());
    world.run(revoke_all(Role::Worker, "w1")).expect("taken");
    assert_eq!(revoked(&world).len(), MAX_HOLDER_CERTIFICATES);
    // What was revoked takes nobody's room, and what has ended neither.
    put(&mut world, Role::Worker, "w1", "dd", OLD, &[OLD]);
    for number in 0..MAX_HOLDER_CERTIFICATES {
        let short = CertificateRecord { expires_s: world.now_ms / 1_000 + 30, ..signed(&world, Role::Worker, "w1", "-", OLD, &[OLD]) };
        let short = CertificateRecord { serial: format!("c{number:04x}"), ..short };
        world.run(command(short, Some("dd"))).expect("the one before has ended");
        world.now_ms += 31_000;
    }
}

#[test]
fn where_all_together_have_too_many_whoever_has_the_most_makes_room() {
    let mut world = world();
    let is_first = |world: &World, serial: &str| {
        assert_eq!(world.state.certificates.least_needed(world.now_ms / 1_000).as_deref(), Some(serial));
    };
    put(&mut world, Role::Worker, "w2", "11", OLD, &[OLD]);
    put(&mut world, Role::Worker, "w2", "12", OLD, &[OLD]);
    is_first(&world, "11");
    world.run(revoke(&["11"], false)).expect("taken");
    put(&mut world, Role::Worker, "w3", "13", OLD, &[OLD]);
    put(&mut world, Role::Worker, "w3", "14", OLD, &[OLD]);
    is_first(&world, "13");
    let ended = CertificateRecord { expires_s: world.now_ms / 1_000 + 30, ..signed(&world, Role::Worker, "w4", "15", OLD, &[OLD]) };
    world.run(command(ended, None)).expect("taken");
    world.now_ms += 60_000;
    put(&mut world, Role::Worker, "w5", "16", OLD, &[OLD]);
    is_first(&world, "15");
}

#[test]
fn a_ca_takes_anothers_place_step_by_step_and_names_who_lags() {
    let mut world = world();
    let begin = Command::BeginCaRotation { from: ca(OLD), to: ca(NEW) };
    assert!(reason(world.run(switch(false))).contains("no CA is rotated"));
    world.run(begin.clone()).expect("begun");
    assert!(reason(world.run(begin)).contains("already"));
    assert_eq!(world.state.trust().cas.iter().map(|ca| &ca.sha256[..2]).collect::<Vec<_>>(), [OLD, NEW]);

    let refused = reason(world.run(switch(false)));
    assert!(["worker/w1", "coordinator/c1", "admin/root"].iter().all(|name| refused.contains(name)), "{refused}");
    for (role, name, serial) in [(Role::Worker, "w1", "11"), (Role::Coordinator, "c1", "12")] {
        put(&mut world, role, name, serial, OLD, &[OLD, NEW]);
    }
    assert!(reason(world.run(switch(false))).contains("shut out: admin/root;"));
    put(&mut world, Role::Admin, "root", "13", OLD, &[OLD, NEW]);
    // Made by hand and seen only after its holder asked for another with it, all in one second: the other is the newer.
    put(&mut world, Role::Worker, "w1", "14", OLD, &[]);
    assert!(reason(world.run(finish(false))).contains("switch first"));
    world.run(switch(false)).expect("all believe it");
    assert!(!world.run(switch(false)).expect("again").changed);
    assert!(reason(world.run(Command::AbandonCaRotation)).contains("signs already"));

    // Seen late: an old certificate of a connection that stands. The newest decides.
    world.now_ms += 10_000;
    for (role, name, serial) in [(Role::Worker, "w1", "21"), (Role::Coordinator, "c1", "22")] {
        put(&mut world, role, name, serial, NEW, &[OLD, NEW]);
    }
    assert!(reason(world.run(finish(false))).contains("admin/root"));
    // Signed, and never used: its answer was lost, or a disk was full.
    let lost = command(signed(&world, Role::Admin, "root", "23", NEW, &[OLD, NEW]), Some("13"));
    world.run(lost).expect("taken");
    assert!(reason(world.run(finish(false))).contains("shut out: admin/root;"));
    world.run(finish(true)).expect("forced");
    assert!(!world.run(finish(false)).expect("again").changed && !world.run(switch(false)).expect("done").changed);
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

#[test]
fn whoever_has_shown_the_new_certificate_has_followed() {
    let mut world = world();
    world.run(Command::BeginCaRotation { from: ca(OLD), to: ca(NEW) }).expect("begun");
    let holders = [(Role::Worker, "w1", "01"), (Role::Coordinator, "c1", "02"), (Role::Admin, "root", "03")];
    for (round, ca, step) in [("1", OLD, switch(false)), ("2", NEW, finish(false))] {
        for (role, name, serial) in holders {
            let renewed = signed(&world, role, name, &format!("{round}{serial}"), ca, &[OLD, NEW]);
            world.run(command(renewed, Some(serial))).expect("taken");
        }
        if round == "2" {
            assert!(reason(world.run(step.clone())).contains("worker/w1"), "nobody has shown it");
            for (role, name, serial) in holders {
                // As it is seen: by its number alone.
                put(&mut world, role, name, &format!("{round}{serial}"), NEW, &[]);
            }
        }
        world.run(step).expect("all have followed");
    }
    assert!(world.state.certificate("201").is_some_and(|known| known.is_used && known.believes.len() == 2));
    assert!(world.state.certificate("101").is_some_and(|known| !known.is_used));
}

#[test]
fn clocks_of_those_who_sign_hold_no_rotation_up() {
    let mut world = world();
    world.run(Command::BeginCaRotation { from: ca(OLD), to: ca(NEW) }).expect("begun");
    // Signed by a leader that was an hour ahead, and then by one whose clock is right.
    for (role, name, serial) in [(Role::Worker, "w1", "11"), (Role::Coordinator, "c1", "12"), (Role::Admin, "root", "13")] {
        let ahead = signed(&world, role, name, serial, OLD, &[OLD]);
        let ahead = CertificateRecord { issued_s: ahead.issued_s + 3600, is_used: true, ..ahead };
        world.run(command(ahead, None)).expect("taken");
        put(&mut world, role, name, &format!("2{serial}"), OLD, &[OLD, NEW]);
    }
    world.run(switch(false)).expect("all have said it since");
}

#[test]
fn a_ca_signs_only_when_most_coordinators_have_its_key() {
    let mut world = world();
    for (id, name) in [(2, "c2"), (3, "c3")] {
        world.run(Command::PutMember { member: MemberRecord::new(id, name, "c:7000", Default::default()) }).expect("new");
    }
    world.run(Command::BeginCaRotation { from: ca(OLD), to: ca(NEW) }).expect("begun");
    assert!(reason(world.run(switch(true))).contains("0 of 3 coordinators"));
    put(&mut world, Role::Coordinator, "c1", "12", OLD, &[OLD, NEW]);
    assert!(reason(world.run(switch(true))).contains("1 of 3 coordinators"));
    put(&mut world, Role::Coordinator, "c2", "22", OLD, &[OLD, NEW]);
    world.run(switch(true)).expect("two can sign");
}

#[test]
fn a_step_is_of_one_ca_alone() {
    let mut world = world();
    world.run(Command::BeginCaRotation { from: ca(OLD), to: ca(NEW) }).expect("begun");
    world.run(Command::AbandonCaRotation).expect("taken back");
    assert!(reason(world.run(finish(true))).contains("no CA is rotated"));
    world.run(Command::BeginCaRotation { from: ca(OLD), to: ca("cc") }).expect("another");
    put(&mut world, Role::Coordinator, "c1", "12", OLD, &[OLD, "cc"]);
    for step in [switch(true), finish(true)] {
        assert!(matches!(world.run(step), Err(CommandError::Stale { .. })), "meant for the one that was taken back");
    }
    world.run(Command::SwitchCa { to: "cc".repeat(32), force: true }).expect("this one");
}
