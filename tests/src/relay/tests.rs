use std::net::Ipv4Addr;

use proptest::prelude::*;

use super::{Command, Relay, Rule};

const HOSTS: u8 = 3;

fn relay(seed: u64) -> Relay {
    Relay::new((0..HOSTS).map(address).collect(), seed)
}

fn address(host: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 0, 1 + host)
}

/// An IPv4 packet to a host, of any length from 24 bytes, with a number in it.
fn packet(to: u8, number: u32, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length.max(24)];
    bytes[0] = 0x45;
    bytes[16..20].copy_from_slice(&address(to).octets());
    bytes[20..24].copy_from_slice(&number.to_be_bytes());
    bytes
}

fn number(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[20..24].try_into().expect("24 bytes at least"))
}

/// Everything that leaves, with its time.
fn drain(relay: &mut Relay) -> Vec<(u64, usize, u32)> {
    let mut left = Vec::new();
    while let Some(at_us) = relay.next_us() {
        while let Some((to, bytes)) = relay.due(at_us) {
            left.push((at_us, to, number(&bytes)));
        }
    }
    left
}

fn begin(relay: &mut Relay, line: &str) {
    let hosts = ["a", "b", "c"].map(str::to_owned);
    Command::parse(line, &hosts).and_then(|command| command.apply(relay)).expect("a right line");
}

#[test]
fn without_faults_packets_pass_at_once() {
    let mut relay = relay(1);
    for at in 0..100 {
        relay.take(u64::from(at), 0, packet(1, at, 100));
        assert_eq!(relay.due(u64::from(at)), Some((1, packet(1, at, 100))));
    }
    assert_eq!(relay.counts().carried, 100);
}

#[test]
fn what_is_for_nobody_is_counted() {
    let mut relay = relay(1);
    relay.take(0, 0, packet(9, 0, 100));
    relay.take(0, 0, vec![0x60; 60]);
    relay.take(0, 0, vec![]);
    assert_eq!((relay.next_us(), relay.counts().unroutable), (None, 3));
}

#[test]
fn a_cut_of_one_direction_leaves_the_other() {
    let mut relay = relay(1);
    begin(&mut relay, "fault cut a * loss=1");
    relay.take(0, 0, packet(1, 1, 100));
    relay.take(0, 1, packet(0, 2, 100));
    relay.take(0, 1, packet(2, 3, 100));
    assert_eq!(drain(&mut relay), [(0, 0, 2), (0, 2, 3)]);
    begin(&mut relay, "heal cut");
    relay.take(5, 0, packet(1, 4, 100));
    assert_eq!(drain(&mut relay), [(5, 1, 4)]);
}

#[test]
fn loss_is_as_often_as_is_said() {
    let mut relay = relay(7);
    begin(&mut relay, "fault some a b loss=0.3");
    for at in 0..10_000 {
        relay.take(0, 0, packet(1, at, 24));
    }
    let lost = relay.counts().lost;
    assert!((2_800..3_200).contains(&lost), "{lost} of 10000 lost");
}

#[test]
fn faults_add_up_and_heal_by_name() {
    let mut relay = relay(1);
    begin(&mut relay, "fault near a * delay_ms=10");
    begin(&mut relay, "fault far * b delay_ms=30");
    relay.take(0, 0, packet(1, 1, 100));
    assert_eq!(relay.next_us(), Some(40_000));
    drain(&mut relay);
    begin(&mut relay, "heal near");
    relay.take(100_000, 0, packet(1, 2, 100));
    assert_eq!(relay.next_us(), Some(130_000));
    assert!(!relay.heal("near"));
}

#[test]
fn reordering_overtakes_what_is_held() {
    let mut relay = relay(3);
    begin(&mut relay, "fault mixed a b delay_ms=20 reorder=0.5");
    for at in 0..100 {
        relay.take(u64::from(at) * 1000, 0, packet(1, at, 100));
    }
    let order: Vec<u32> = drain(&mut relay).iter().map(|(_, _, number)| *number).collect();
    assert!(!order.is_sorted());
    assert_eq!(order.len(), 100);
    assert!((30..70).contains(&relay.counts().reordered), "{:?}", relay.counts());
}

#[test]
fn a_rate_spaces_packets_and_loses_what_would_wait_too_long() {
    let mut relay = relay(1);
    begin(&mut relay, "fault slow a b rate_kbps=80");
    for at in 0..100 {
        relay.take(0, 0, packet(1, at, 1000));
    }
    let left = drain(&mut relay);
    // 10,000 bytes a second: a packet of 1,000 bytes takes 100 ms.
    assert_eq!(left.iter().map(|(at_us, ..)| *at_us).collect::<Vec<_>>(), [100_000, 200_000, 300_000, 400_000, 500_000, 600_000]);
    assert_eq!(relay.counts().overflowed, 94);
}

#[test]
fn duplicates_arrive_twice() {
    let mut relay = relay(1);
    begin(&mut relay, "fault twice * * duplicate=1");
    relay.take(0, 0, packet(1, 5, 100));
    assert_eq!(drain(&mut relay), [(0, 1, 5), (0, 1, 5)]);
}

#[test]
fn wrong_lines_say_what_is_wrong() {
    let hosts = ["a", "b"].map(str::to_owned);
    for (line, says) in [
        ("", "expected `fault"),
        ("fault x a", "expected `fault"),
        ("fault x a b", "at least one"),
        ("fault x a z loss=1", "no host \"z\"; there are a, b"),
        ("fault x a b loss=2", "share from 0 to 1"),
        ("fault x a b loss=-1", "0 or more"),
        ("fault x a b loss=NaN", "0 or more"),
        ("fault x a b loss", "KEY=VALUE"),
        ("fault x a b speed=1", "no setting \"speed\""),
        ("fault x a b reorder=0.5", "needs delay_ms"),
        ("fault x a b delay_ms=60001", "at most 60000"),
        ("fault * a b loss=1", "not called *"),
        ("fault x a b rate_kbps=0", "rate_kbps is 1"),
        ("heal", "expected `fault"),
    ] {
        let error = Command::parse(line, &hosts).expect_err(line).to_string();
        assert!(error.contains(says), "{line}: {error}");
    }
    let mut relay = relay(1);
    assert!(Command::Heal(Some("none".into())).apply(&mut relay).is_err());
    assert!(Command::Counts.apply(&mut relay).expect("JSON").starts_with("{\"carried\":0"));
}

fn rules() -> impl Strategy<Value = Rule> {
    let share = prop_oneof![Just(0.0), 0.0..=1.0];
    (share, 0u64..50_000, 0u64..50_000, 0u64..200_000).prop_map(|(loss, delay_us, jitter_us, rate)| Rule {
        loss,
        delay_us,
        jitter_us,
        rate_bytes: (rate > 1000).then_some(rate),
        ..Rule::default()
    })
}

proptest! {
    /// Whatever faults come and go, no packet is invented, none leaves before it came, and without `reorder` each pair's order
    /// is kept; every packet is carried or counted as gone.
    #[test]
    fn order_is_kept_and_nothing_is_made_up(
        seed: u64,
        steps in prop::collection::vec((0u64..5_000, 0..HOSTS, 0..HOSTS, 24usize..1500, prop::option::of((0usize..4, rules()))), 1..200),
    ) {
        let mut relay = relay(seed);
        let (mut now_us, mut came) = (0, Vec::new());
        for (number, (after_us, from, to, length, fault)) in steps.into_iter().enumerate() {
            now_us += after_us;
            if let Some((name, rule)) = fault
                && !relay.heal(&name.to_string())
            {
                relay.begin(&name.to_string(), (name % 2 == 0).then_some(name / 2), None, rule);
            }
            relay.take(now_us, usize::from(from), packet(to, number as u32, length));
            came.push((now_us, from, to));
        }
        let taken = came.len() as u64;
        let mut newest = std::collections::HashMap::new();
        for (at_us, to, number) in drain(&mut relay) {
            let (came_us, from, meant) = came[number as usize];
            prop_assert!(at_us >= came_us);
            prop_assert_eq!(to, usize::from(meant));
            let before = newest.insert((from, to), number);
            prop_assert!(before.is_none_or(|before| before < number), "{before:?} left before {number}");
        }
        let counts = relay.counts();
        prop_assert_eq!(counts.carried + counts.lost + counts.overflowed, taken);
    }

    #[test]
    fn any_line_is_a_command_or_an_error(line in ".{0,60}") {
        let _ = Command::parse(&line, &["a".to_owned()]);
    }
}
