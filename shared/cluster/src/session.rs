//! `SessionCore`: when a worker or gateway connects to the leader, when it sends a heartbeat, how long its lease holds, and
//! when a worker that nobody hears must stop. A core without I/O: time is an argument.
//!
//! Invariants (property-tested below): the lease is counted from when an acknowledged heartbeat was *sent*, so it ends
//! here no later than at the leader; a node is expired only after its lease ran out and a group that has a leader
//! answered twice, with a try to connect between that began and failed (a leader that is new gives it time for that); a node
//! that nobody answers goes on, and one that serves on in any case is never expired; a connection that took long to come
//! has time for its welcome and the first answer; it never gives up connecting, but when it is refused.

use std::collections::VecDeque;

/// Heartbeats whose answer is still awaited, at most.
const SENT_MAX: usize = 64;
/// Pause before the second try to connect; doubles with every further one, milliseconds.
const BACKOFF_MS: u64 = 100;
/// Longest pause between two tries, milliseconds.
const BACKOFF_MAX_MS: u64 = 2_000;
/// Pause between two questions whether the group lives, milliseconds.
const ASK_EVERY_MS: u64 = 500;
/// Bounds of what a leader may say, milliseconds: a lease of hours would keep a lost node alive.
const LEASE_MS: std::ops::RangeInclusive<u64> = 100..=600_000;
const HEARTBEAT_MS: std::ops::RangeInclusive<u64> = 20..=60_000;

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionInput {
    /// The last `Connect` brought a connection, or none.
    Connected(bool),
    /// The leader took this node in.
    Welcome {
        /// Length of a lease.
        lease_ms: u64,
        /// How often to send a heartbeat.
        heartbeat_ms: u64,
    },
    /// The leader heard a heartbeat.
    Ack {
        /// Which.
        number: u64,
        /// Length of the lease from when it was sent.
        lease_ms: u64,
    },
    /// This node must not go on.
    Refused {
        /// Why.
        reason: String,
    },
    /// The connection ended.
    Closed,
    /// What the coordinators said when they were asked whether the group lives.
    Group {
        /// One that knows a leader answered.
        is_alive: bool,
    },
    /// Time has passed.
    Tick,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionAction {
    /// Connect and say hello; answered by `Connected`.
    Connect,
    /// Let the connection go.
    Disconnect,
    /// Send a heartbeat of this number.
    Heartbeat(u64),
    /// Ask the coordinators for their status; answered by `Group`.
    AskGroup,
    /// The cluster lives without this node: stop serving.
    Expire,
    /// Give up.
    End {
        /// Why.
        reason: String,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Link {
    /// Tried again at this time.
    Waiting {
        at_ms: u64,
    },
    Connecting,
    /// Connected; the welcome has not come.
    Greeting,
    Welcome,
    Ended,
}

/// The try to connect to a group that lives, after which a node expires.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LastTry {
    Due,
    Begun,
    Failed,
}

/// See the module documentation.
#[derive(Debug)]
pub struct SessionCore {
    link: Link,
    attempts: u32,
    heartbeat_ms: u64,
    lease_ms: u64,
    /// When the connection's hello was sent.
    hello_ms: u64,
    next_heartbeat_ms: u64,
    number: u64,
    sent: VecDeque<(u64, u64)>,
    /// End of the lease, if there was one since the last expiry.
    lease_until_ms: Option<u64>,
    /// When a connection over which nothing is heard counts as none.
    silent_ms: u64,
    /// Whether a node that was replaced must stop.
    may_expire: bool,
    asking: bool,
    next_ask_ms: u64,
    /// The group's last answer, since the lease ran out, was that it lives.
    group_lives: bool,
    /// How far the try to connect is that follows such an answer.
    last_try: LastTry,
    /// Spreads nodes that begin together, below 1000.
    jitter: u64,
}

impl SessionCore {
    /// A core that connects at its first tick, of a node that serves on whatever becomes of its lease: it never asks for the
    /// group and never expires. `jitter` differs from node to node.
    pub fn serving_on(jitter: u64) -> Self {
        SessionCore { may_expire: false, ..SessionCore::new(jitter) }
    }

    /// A core that connects at its first tick, of a node that must stop when the cluster lives without it. `jitter` differs
    /// from node to node.
    pub fn new(jitter: u64) -> Self {
        SessionCore {
            may_expire: true,
            link: Link::Waiting { at_ms: 0 },
            attempts: 0,
            heartbeat_ms: 500,
            lease_ms: 3_000,
            hello_ms: 0,
            next_heartbeat_ms: 0,
            number: 0,
            sent: VecDeque::new(),
            lease_until_ms: None,
            silent_ms: 0,
            asking: false,
            next_ask_ms: 0,
            group_lives: false,
            last_try: LastTry::Due,
            jitter: jitter % 1000,
        }
    }

    /// Whether a session holds now.
    pub fn is_welcome(&self) -> bool {
        self.link == Link::Welcome
    }

    /// Milliseconds of the lease that are left; `None` where there is none.
    pub fn lease_left_ms(&self, now_ms: u64) -> Option<u64> {
        self.lease_until_ms.map(|until| until.saturating_sub(now_ms))
    }

    /// When `Tick` is next due, milliseconds.
    pub fn next_tick_ms(&self) -> u64 {
        let link = match self.link {
            Link::Waiting { at_ms } => at_ms,
            Link::Welcome => self.next_heartbeat_ms.min(self.silent_ms),
            Link::Connecting | Link::Ended => u64::MAX,
            Link::Greeting => self.silent_ms,
        };
        match self.lease_until_ms {
            Some(until) if self.link != Link::Welcome && self.may_expire && !self.asking => link.min(until.max(self.next_ask_ms)),
            _ => link,
        }
    }

    /// Takes an input and says what to do, in order. `now_ms` must not go backwards.
    pub fn handle(&mut self, now_ms: u64, input: SessionInput) -> Vec<SessionAction> {
        if self.link == Link::Ended {
            return Vec::new();
        }
        let mut actions = Vec::new();
        match input {
            SessionInput::Connected(true) if self.link == Link::Connecting => {
                self.link = Link::Greeting;
                self.silent_ms = now_ms.saturating_add(self.lease_ms);
            }
            SessionInput::Connected(false) if self.link == Link::Connecting => self.wait(now_ms),
            SessionInput::Connected(_) => {}
            SessionInput::Welcome { lease_ms, heartbeat_ms } if self.link == Link::Greeting => {
                self.link = Link::Welcome;
                self.group_lives = false;
                self.last_try = LastTry::Due;
                self.attempts = 0;
                self.lease_ms = lease_ms.clamp(*LEASE_MS.start(), *LEASE_MS.end());
                self.heartbeat_ms = heartbeat_ms.clamp(*HEARTBEAT_MS.start(), *HEARTBEAT_MS.end());
                self.extend(self.hello_ms, self.lease_ms);
                // The hello may be old, if no leader was there when the try began: there is time for one answer at least.
                self.silent_ms = self.silent_from_lease().max(now_ms.saturating_add(self.lease_ms / 2));
                self.next_heartbeat_ms = now_ms;
            }
            SessionInput::Ack { number, lease_ms } if self.link == Link::Welcome => {
                if let Some(position) = self.sent.iter().position(|(sent, _)| *sent == number) {
                    let (_, sent_ms) = self.sent[position];
                    self.sent.drain(..=position);
                    self.extend(sent_ms, lease_ms.clamp(*LEASE_MS.start(), *LEASE_MS.end()));
                    self.silent_ms = self.silent_from_lease();
                }
            }
            SessionInput::Welcome { .. } | SessionInput::Ack { .. } => {}
            SessionInput::Refused { reason } => {
                self.link = Link::Ended;
                return vec![SessionAction::Disconnect, SessionAction::End { reason }];
            }
            SessionInput::Closed => {
                if matches!(self.link, Link::Greeting | Link::Welcome) {
                    self.wait(now_ms);
                }
            }
            SessionInput::Group { is_alive } => {
                self.asking = false;
                let lost = self.link != Link::Welcome && self.lease_until_ms.is_some_and(|until| until <= now_ms);
                let lives = is_alive && lost && self.may_expire;
                if lives && self.group_lives && self.last_try == LastTry::Failed {
                    self.lease_until_ms = None;
                    self.group_lives = false;
                    actions.push(SessionAction::Expire);
                } else {
                    if !(lives && self.group_lives) {
                        self.last_try = LastTry::Due;
                    }
                    self.group_lives = lives;
                    if lives && self.last_try == LastTry::Due && matches!(self.link, Link::Waiting { .. }) {
                        // Its leader may be a new one that waits for this node.
                        self.link = Link::Waiting { at_ms: now_ms };
                    }
                }
            }
            SessionInput::Tick => {}
        }
        self.advance(now_ms, &mut actions);
        actions
    }

    fn advance(&mut self, now_ms: u64, actions: &mut Vec<SessionAction>) {
        let silent = match self.link {
            // A connection over which nothing is heard for a lease's time is none.
            Link::Welcome | Link::Greeting => self.silent_ms <= now_ms,
            _ => false,
        };
        if silent {
            actions.push(SessionAction::Disconnect);
            self.wait(now_ms);
        }
        if self.link == Link::Welcome && self.next_heartbeat_ms <= now_ms {
            self.number += 1;
            if self.sent.len() == SENT_MAX {
                self.sent.pop_front();
            }
            self.sent.push_back((self.number, now_ms));
            self.next_heartbeat_ms = now_ms.saturating_add(self.heartbeat_ms);
            actions.push(SessionAction::Heartbeat(self.number));
        }
        if matches!(self.link, Link::Waiting { at_ms } if at_ms <= now_ms) {
            self.link = Link::Connecting;
            self.hello_ms = now_ms;
            self.sent.clear();
            if self.group_lives && self.last_try == LastTry::Due {
                self.last_try = LastTry::Begun;
            }
            actions.push(SessionAction::Connect);
        }
        let lost = self.link != Link::Welcome && self.lease_until_ms.is_some_and(|until| until <= now_ms);
        if lost && self.may_expire && !self.asking && self.next_ask_ms <= now_ms {
            self.asking = true;
            self.next_ask_ms = now_ms.saturating_add(ASK_EVERY_MS);
            actions.push(SessionAction::AskGroup);
        }
    }

    fn wait(&mut self, now_ms: u64) {
        let pause_ms = (BACKOFF_MS << self.attempts.min(8)).min(BACKOFF_MAX_MS);
        self.attempts = self.attempts.saturating_add(1);
        if self.group_lives && self.last_try == LastTry::Due {
            // The try that ended began before the group was known to live: the one that counts begins at once.
            self.link = Link::Waiting { at_ms: now_ms };
            return;
        }
        if self.last_try == LastTry::Begun {
            self.last_try = LastTry::Failed;
        }
        // Up to a quarter less, so that nodes that lost one leader do not come to the next at once.
        self.link = Link::Waiting { at_ms: now_ms.saturating_add(pause_ms - pause_ms * self.jitter / 4000) };
    }

    fn silent_from_lease(&self) -> u64 {
        self.lease_until_ms.unwrap_or(0)
    }

    fn extend(&mut self, from_ms: u64, lease_ms: u64) {
        let until = from_ms.saturating_add(lease_ms);
        self.lease_until_ms = Some(self.lease_until_ms.map_or(until, |old| old.max(until)));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::SessionAction::{AskGroup, Connect, Disconnect, End, Expire, Heartbeat};
    use super::*;

    const WELCOME: SessionInput = SessionInput::Welcome { lease_ms: 3_000, heartbeat_ms: 500 };

    fn welcome() -> SessionCore {
        let mut core = SessionCore::new(0);
        assert_eq!(core.handle(0, SessionInput::Tick), [Connect]);
        assert_eq!(core.handle(5, SessionInput::Connected(true)), []);
        assert_eq!(core.handle(10, WELCOME), [Heartbeat(1)]);
        core
    }

    #[test]
    fn the_lease_counts_from_when_the_heartbeat_was_sent() {
        let mut core = welcome();
        assert_eq!(core.lease_left_ms(10), Some(2_990));
        assert_eq!(core.handle(510, SessionInput::Tick), [Heartbeat(2)]);
        core.handle(900, SessionInput::Ack { number: 2, lease_ms: 3_000 });
        assert_eq!(core.lease_left_ms(900), Some(2_610));
        // An answer that comes late, or that was never asked for, gives nothing.
        core.handle(901, SessionInput::Ack { number: 1, lease_ms: 60_000 });
        core.handle(902, SessionInput::Ack { number: 77, lease_ms: 60_000 });
        assert_eq!(core.lease_left_ms(900), Some(2_610));
    }

    /// Found by the simulator: the search was counted as the connection's silence, and what was found was let go at once.
    #[test]
    fn a_connection_that_was_long_looked_for_is_kept() {
        let mut core = SessionCore::new(0);
        assert_eq!(core.handle(0, SessionInput::Tick), [Connect]);
        assert_eq!(core.handle(5_000, SessionInput::Connected(true)), []);
        assert_eq!(core.handle(5_005, WELCOME), [Heartbeat(1)]);
        assert_eq!(core.lease_left_ms(5_005), Some(0), "the lease still counts from before the hello");
        assert!(core.next_tick_ms() > 5_005, "it would turn without a pause");
        assert_eq!(core.handle(5_006, SessionInput::Tick), []);
        core.handle(5_010, SessionInput::Ack { number: 1, lease_ms: 3_000 });
        assert_eq!(core.lease_left_ms(5_010), Some(2_995));
        // One that says nothing is let go all the same.
        let mut core = SessionCore::new(0);
        core.handle(0, SessionInput::Tick);
        core.handle(5_000, SessionInput::Connected(true));
        core.handle(5_005, WELCOME);
        assert!(!core.handle(6_504, SessionInput::Tick).contains(&Disconnect));
        assert!(core.handle(6_505, SessionInput::Tick).contains(&Disconnect));
    }

    #[test]
    fn a_lost_leader_is_looked_for_with_growing_pauses() {
        let mut core = welcome();
        assert_eq!(core.handle(20, SessionInput::Closed), []);
        assert_eq!(core.next_tick_ms(), 120);
        assert_eq!(core.handle(120, SessionInput::Tick), [Connect]);
        assert_eq!(core.handle(130, SessionInput::Connected(false)), []);
        assert_eq!(core.next_tick_ms(), 330);
    }

    #[test]
    fn a_silent_connection_is_let_go_and_a_living_group_ends_the_node() {
        let mut core = welcome();
        let mut actions = Vec::new();
        for now_ms in (20..=3_000).step_by(10) {
            actions = core.handle(now_ms, SessionInput::Tick);
            if actions.contains(&Disconnect) {
                break;
            }
        }
        assert_eq!(actions, [Disconnect, AskGroup]);
        assert_eq!(core.handle(3_050, SessionInput::Group { is_alive: false }), []);
        // Nobody answers: it goes on, and asks again.
        assert_eq!(core.handle(3_100, SessionInput::Tick), [Connect]);
        assert_eq!(core.handle(3_500, SessionInput::Tick), [AskGroup]);
        // A group that lives may have a new leader: it is looked for before the node gives up.
        assert_eq!(core.handle(3_600, SessionInput::Group { is_alive: true }), []);
        // The try under way began before that was known, and does not count.
        assert_eq!(core.handle(3_610, SessionInput::Connected(false)), [Connect]);
        assert_eq!(core.handle(4_000, SessionInput::Tick), [AskGroup]);
        assert_eq!(core.handle(4_005, SessionInput::Group { is_alive: true }), []);
        assert_eq!(core.handle(4_010, SessionInput::Connected(false)), []);
        assert_eq!(core.handle(4_500, SessionInput::Tick), [Connect, AskGroup]);
        assert_eq!(core.handle(4_510, SessionInput::Group { is_alive: true }), [Expire]);
        assert_eq!(core.handle(5_000, SessionInput::Tick), []);
        // Taken in again, it has a lease again.
        assert_eq!(core.handle(5_100, SessionInput::Connected(true)), []);
        assert_eq!(core.handle(5_150, WELCOME), [Heartbeat(7)]);
    }

    /// All coordinators were away for longer than a lease; the try to connect began before the new leader was there.
    #[test]
    fn a_connection_that_took_longer_than_a_lease_is_kept() {
        let mut core = welcome();
        core.handle(20, SessionInput::Closed);
        assert_eq!(core.handle(120, SessionInput::Tick), [Connect]);
        assert_eq!(core.handle(3_000, SessionInput::Tick), [AskGroup]);
        assert_eq!(core.handle(3_700, SessionInput::Group { is_alive: true }), [AskGroup]);
        assert_eq!(core.handle(3_720, SessionInput::Group { is_alive: true }), [], "the try under way is waited for");
        assert_eq!(core.handle(3_730, SessionInput::Connected(true)), []);
        assert_eq!(core.handle(3_740, SessionInput::Group { is_alive: true }), []);
        assert_eq!(core.handle(3_800, WELCOME), [Heartbeat(2)]);
        assert_eq!(core.lease_left_ms(3_800), Some(0), "of a hello that old, no lease is left");
        core.handle(3_850, SessionInput::Ack { number: 2, lease_ms: 3_000 });
        assert_eq!(core.lease_left_ms(3_850), Some(2_950));
        assert_eq!(core.handle(4_300, SessionInput::Tick), [Heartbeat(3)]);
    }

    #[test]
    fn a_node_that_serves_on_looks_for_a_leader_and_asks_nobody_else() {
        let mut core = SessionCore::serving_on(0);
        assert_eq!(core.handle(0, SessionInput::Tick), [Connect]);
        assert_eq!(core.handle(5, SessionInput::Connected(true)), []);
        assert_eq!(core.handle(10, WELCOME), [Heartbeat(1)]);
        assert_eq!(core.handle(20, SessionInput::Closed), []);
        let mut now_ms = 20;
        let mut connects = 0;
        while now_ms < 60_000 {
            assert!(core.next_tick_ms() > now_ms, "it would turn without a pause at {now_ms}");
            now_ms = core.next_tick_ms().min(now_ms + 1_000);
            let mut actions = core.handle(now_ms, SessionInput::Tick);
            if actions == [Connect] {
                connects += 1;
                actions = core.handle(now_ms, SessionInput::Connected(false));
            }
            assert_eq!(actions, []);
        }
        assert!((25..100).contains(&connects), "{connects} tries in a minute");
        assert_eq!(core.handle(now_ms, SessionInput::Group { is_alive: true }), []);
    }

    #[test]
    fn a_group_that_lives_is_connected_to_at_once_and_a_welcome_in_time_keeps_the_node() {
        let mut core = welcome();
        core.handle(20, SessionInput::Closed);
        // Tries fail and the pauses between them have grown.
        let mut now_ms = 20;
        while now_ms < 3_000 {
            now_ms = core.next_tick_ms();
            if core.handle(now_ms, SessionInput::Tick).contains(&Connect) {
                core.handle(now_ms, SessionInput::Connected(false));
            }
        }
        assert_eq!(core.handle(now_ms + 1, SessionInput::Group { is_alive: true }), [Connect]);
        core.handle(now_ms + 2, SessionInput::Connected(true));
        assert_eq!(core.handle(now_ms + 3, WELCOME), [Heartbeat(2)]);
        // What was answered before counts no more.
        assert_eq!(core.handle(now_ms + 4, SessionInput::Group { is_alive: true }), []);
    }

    #[test]
    fn a_refused_node_ends() {
        let mut core = welcome();
        let end = End { reason: "a newer incarnation lives".into() };
        assert_eq!(core.handle(20, SessionInput::Refused { reason: "a newer incarnation lives".into() }), [Disconnect, end]);
        assert_eq!(core.handle(9_000, SessionInput::Tick), []);
    }

    #[derive(Debug, Clone)]
    enum Move {
        Wait(u64),
        Connect(bool),
        Welcome,
        AckLast,
        Close,
        Group(bool),
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]
        #[test]
        fn leases_and_expiry_are_as_promised(moves in proptest::collection::vec(prop_oneof![
            4 => (0u64..1500).prop_map(Move::Wait),
            2 => any::<bool>().prop_map(Move::Connect),
            2 => Just(Move::Welcome),
            3 => Just(Move::AckLast),
            1 => Just(Move::Close),
            1 => any::<bool>().prop_map(Move::Group),
        ], 1..80), jitter in 0u64..1000) {
            let mut core = SessionCore::new(jitter);
            let (mut now_ms, mut last, mut hello_ms) = (0, None, 0);
            // The node was told that the group lives, and then a try to connect began and failed.
            let (mut told, mut tried, mut failed) = (false, false, false);
            // What the leader would grant at most.
            let mut granted_until = 0;
            for step in moves {
                let (input, alive) = match step {
                    Move::Wait(ms) => { now_ms += ms; (SessionInput::Tick, false) }
                    Move::Connect(is_connected) => (SessionInput::Connected(is_connected), false),
                    Move::Welcome => {
                        if core.link == Link::Greeting { granted_until = granted_until.max(hello_ms + 3_000); }
                        (WELCOME, false)
                    }
                    Move::AckLast => match last {
                        // What is said over a closed connection is not heard, and grants nothing here.
                        Some((number, _)) if !core.is_welcome() => (SessionInput::Ack { number, lease_ms: 3_000 }, false),
                        Some((number, sent_ms)) => {
                            granted_until = granted_until.max(sent_ms + 3_000);
                            (SessionInput::Ack { number, lease_ms: 3_000 }, false)
                        }
                        None => continue,
                    },
                    Move::Close => (SessionInput::Closed, false),
                    Move::Group(is_alive) => (SessionInput::Group { is_alive }, is_alive),
                };
                let (was_welcome, was_connecting) = (core.is_welcome(), core.link == Link::Connecting);
                let was_told = told;
                told |= alive;
                failed |= tried && (input == SessionInput::Connected(false) && was_connecting || input == SessionInput::Closed);
                for action in core.handle(now_ms, input) {
                    match action {
                        Heartbeat(number) => last = Some((number, now_ms)),
                        Connect => { hello_ms = now_ms; last = None; tried |= told; }
                        Expire => {
                            prop_assert!(alive && !was_welcome && granted_until <= now_ms);
                            prop_assert!(was_told && tried && failed, "it had no time to connect");
                            (told, tried, failed) = (false, false, false);
                        }
                        AskGroup => prop_assert!(granted_until <= now_ms),
                        End { .. } => prop_assert!(false, "nobody refused it"),
                        Disconnect => failed |= tried,
                    }
                }
                prop_assert!(core.lease_until_ms.is_none_or(|until| until <= granted_until));
                prop_assert!(core.link == Link::Connecting || core.next_tick_ms() < u64::MAX, "it would sleep for ever");
            }
        }
    }
}
