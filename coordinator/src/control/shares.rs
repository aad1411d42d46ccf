//! Shares of API keys' budgets, lent by the leader to live gateways by demand.
//!
//! What it is not: nothing of it is in the log. A gateway keeps its last share while no leader answers, and says in every
//! heartbeat what it holds, so a new leader learns what was lent before it lends.
//!
//! Invariant: what live gateways hold, and what is on its way to them, is together no more than the budget, as far as the
//! budget itself was not lowered meanwhile. A gateway that is cut off keeps its last share after the others got it: the
//! cluster may admit that one share too much for each gateway that is cut off, and no more.
//!
//! How: a gateway is lent more only out of what nobody holds. A grant counts as held from when it is sent; the next to the
//! same gateway waits until the first is confirmed; a smaller one frees its difference when the gateway says it holds it.

use std::collections::{BTreeMap, BTreeSet};

use forge_shared::cluster::command::ApiKeyRecord;
use forge_shared::cluster::node::{NodePhase, Role};
use forge_shared::cluster::session::{KeyShare, KeyUsage};
use forge_shared::ids::NodeId;

use crate::state::{ClusterState, MAX_KEYS};

/// Of an equal part, what a gateway is lent without any demand: a quarter.
const FLOOR_DIVISOR: u64 = 4;
/// A share moves only by more than this part of it, so that noise sends nothing.
const HYSTERESIS_DIVISOR: u64 = 8;
/// How much of the old demand stays with each heartbeat: 7 of 8.
const DEMAND_KEPT: (u64, u64) = (7, 8);
/// Demand is counted in this part of a request, so that what decays does not vanish at once.
const DEMAND_UNIT: u64 = 1_024;
/// Longest id of a key, bytes.
const MAX_KEY_ID: usize = 64;

/// What one gateway holds of one key's two budgets.
#[derive(Debug, Clone, Copy, Default)]
struct Held {
    /// By its last heartbeat.
    held: [u64; 2],
    /// On its way.
    sent: Option<[u64; 2]>,
    demand: u64,
}

impl Held {
    /// The most it may hold now.
    fn most(&self, budget: usize) -> u64 {
        self.held[budget].max(self.sent.map_or(0, |sent| sent[budget]))
    }
}

/// Shares of all keys and gateways.
#[derive(Debug, Clone, Default)]
pub struct ShareTable {
    /// Gateways that have said what they hold, in this leader's time; by key.
    gateways: BTreeMap<NodeId, BTreeMap<String, Held>>,
}

impl ShareTable {
    /// An empty table, as a new leader begins with.
    pub fn new() -> Self {
        ShareTable::default()
    }

    /// A gateway began a session: what was on its way to it never came, or is held and will be reported.
    pub fn begin(&mut self, gateway: &NodeId) {
        self.gateways.remove(gateway);
    }

    /// A heartbeat came: what the gateway used, and holds. Keys that it does not name it holds nothing of.
    pub fn heard(&mut self, gateway: &NodeId, usage: &[KeyUsage]) {
        let known = self.gateways.entry(gateway.clone()).or_default();
        let named: BTreeMap<&str, &KeyUsage> = usage.iter().map(|usage| (usage.key_id.as_str(), usage)).collect();
        for (key, held) in known.iter_mut() {
            if !named.contains_key(key.as_str()) {
                held.held = [0; 2];
                held.confirm();
                held.decay(0);
            }
        }
        for (key, usage) in named {
            // No key has such an id, and no cluster so many: a gateway that names them takes no more memory than others.
            if key.len() > MAX_KEY_ID || known.len() >= MAX_KEYS && !known.contains_key(key) {
                continue;
            }
            let held = known.entry(key.to_owned()).or_default();
            held.held = [usage.held_rpm, usage.held_tpm].map(|share| u64::from(share.unwrap_or(0)));
            held.confirm();
            held.decay(usage.requests.saturating_add(usage.refused));
        }
        known.retain(|_, held| held.held != [0; 2] || held.sent.is_some() || held.demand > 0);
    }

    /// New shares for a gateway: those that differ from what it holds. To be sent once, in the answer to a heartbeat.
    ///
    /// Empty until every live gateway has said what it holds, or has lost its lease.
    pub fn grant(&mut self, state: &ClusterState, gateway: &NodeId) -> Vec<KeyShare> {
        let live: BTreeSet<&NodeId> = state
            .nodes()
            .values()
            .filter(|node| node.spec.role == Role::Gateway && node.phase == NodePhase::Ready)
            .map(|node| &node.spec.id)
            .collect();
        self.gateways.retain(|id, _| live.contains(id));
        if !live.contains(gateway) || live.iter().any(|id| !self.gateways.contains_key(*id)) {
            return Vec::new();
        }
        let limited = state.keys().values().filter(|key| key.revoked_s.is_none() && (key.rpm.is_some() || key.tpm.is_some()));
        let limited: Vec<&ApiKeyRecord> = limited.collect();
        let grants = limited.into_iter().filter_map(|key| self.grant_key(key, gateway));
        grants.collect()
    }

    fn grant_key(&mut self, key: &ApiKeyRecord, gateway: &NodeId) -> Option<KeyShare> {
        let own = self.gateways.get(gateway)?.get(&key.id).copied().unwrap_or_default();
        if own.sent.is_some() {
            return None;
        }
        let budgets = [key.rpm, key.tpm];
        let mut share = [0; 2];
        for (at, budget) in budgets.iter().enumerate() {
            let Some(budget) = budget.map(u64::from) else { continue };
            let others = self.gateways.iter().filter(|(id, _)| *id != gateway);
            let lent: u64 = others.map(|(_, keys)| keys.get(&key.id).map_or(0, |held| held.most(at))).sum();
            let aim = self.aim(&key.id, gateway, budget);
            let given = aim.min(budget.saturating_sub(lent));
            let moved = given.abs_diff(own.held[at]);
            // Small moves are noise, but one to or from nothing, or above the budget, never is.
            let matters = moved > own.held[at] / HYSTERESIS_DIVISOR || (own.held[at] == 0) != (given == 0);
            let is_above = own.held[at].saturating_add(lent) > budget;
            share[at] = if (matters || is_above) && moved > 0 { given } else { own.held[at] };
        }
        if share == own.held {
            return None;
        }
        let held = self.gateways.get_mut(gateway)?.entry(key.id.clone()).or_default();
        held.sent = Some(share);
        let part = |at: usize| budgets[at].map(|_| u32::try_from(share[at]).unwrap_or(u32::MAX));
        Some(KeyShare { key_id: key.id.clone(), rpm: part(0), tpm: part(1) })
    }

    /// The share a gateway should have: a floor, and of the rest a part like its part of the demand. All aims together are
    /// the budget at most.
    fn aim(&self, key: &str, gateway: &NodeId, budget: u64) -> u64 {
        let count = self.gateways.len().max(1) as u64;
        let demand = |keys: &BTreeMap<String, Held>| keys.get(key).map_or(0, |held| held.demand);
        let total: u128 = self.gateways.values().map(|keys| u128::from(demand(keys))).sum();
        if total == 0 {
            // Nobody asks: equal parts, and the odd ones to the first.
            let place = self.gateways.keys().position(|id| id == gateway).unwrap_or(0) as u64;
            return budget / count + u64::from(place < budget % count);
        }
        // A share of nothing refuses everything: as long as there is one for each, nobody is left without.
        let floor = (budget / count / FLOOR_DIVISOR).max(u64::from(budget >= count));
        let rest = budget - floor * count;
        let own = self.gateways.get(gateway).map_or(0, demand);
        let part = u128::from(rest) * u128::from(own) / total;
        let mut aim = floor + u64::try_from(part).unwrap_or(0);
        // What rounding leaves goes to the hungriest, of equals the first.
        let hungriest = self.gateways.iter().max_by(|a, b| demand(a.1).cmp(&demand(b.1)).then(b.0.cmp(a.0))).map(|(id, _)| id);
        if hungriest == Some(gateway) {
            let given: u128 = self.gateways.values().map(|keys| u128::from(rest) * u128::from(demand(keys)) / total).sum();
            aim += rest - u64::try_from(given).unwrap_or(rest);
        }
        aim
    }
}

impl Held {
    fn confirm(&mut self) {
        if self.sent == Some(self.held) {
            self.sent = None;
        }
    }

    fn decay(&mut self, requests: u64) {
        let (kept, of) = DEMAND_KEPT;
        self.demand = self.demand / of * kept;
        self.demand = self.demand.saturating_add(requests.min(u64::MAX / DEMAND_UNIT / 2) * DEMAND_UNIT).min(u64::MAX / 2);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use forge_shared::cluster::command::Command;
    use proptest::prelude::*;

    use super::*;
    use crate::state::test_support::{World, gateway};

    const BUDGET: u32 = 1_000;

    fn world(gateways: usize) -> World {
        let mut world = World::new();
        for number in 0..gateways {
            world.run(Command::JoinNode { spec: Box::new(gateway(&format!("g{number}"), 1)) }).expect("joins");
        }
        let key = ApiKeyRecord {
            id: "k".into(),
            name: "team".into(),
            created_s: 0,
            revoked_s: None,
            rpm: Some(BUDGET),
            tpm: None,
            salt: "0".repeat(32),
            hash: "0".repeat(64),
        };
        world.run(Command::PutKey { key: Box::new(key) }).expect("kept");
        world
    }

    #[test]
    fn a_gateway_that_names_what_are_no_keys_takes_no_more_memory() {
        let mut table = ShareTable::new();
        let gateway = NodeId::from("g1");
        let used = |key_id: String| KeyUsage { key_id, requests: 1 << 40, tokens: 0, refused: 0, held_rpm: Some(1), held_tpm: None };
        for beat in 0..4 {
            let usage: Vec<_> = (0..MAX_KEYS).map(|number| used(format!("{}", beat * MAX_KEYS + number))).collect();
            table.heard(&gateway, &usage);
        }
        table.heard(&gateway, &[used("x".repeat(1_000))]);
        let kept = &table.gateways[&gateway];
        assert!(kept.len() <= MAX_KEYS && kept.keys().all(|key| key.len() <= MAX_KEY_ID), "{} keys", kept.len());
    }

    /// A gateway as far as shares go: what it holds, and grants on their way to it.
    #[derive(Debug, Clone, Default)]
    struct Gateway {
        held: Option<KeyShare>,
        coming: VecDeque<Vec<KeyShare>>,
        is_cut_off: bool,
    }

    impl Gateway {
        fn rpm(&self) -> u64 {
            self.held.as_ref().and_then(|share| share.rpm).map_or(0, u64::from)
        }

        fn usage(&self, requests: u64) -> Vec<KeyUsage> {
            let (held_rpm, held_tpm) = self.held.as_ref().map_or((None, None), |share| (share.rpm, share.tpm));
            if self.held.is_none() && requests == 0 {
                return Vec::new();
            }
            vec![KeyUsage { key_id: "k".into(), requests, tokens: 0, refused: 0, held_rpm, held_tpm }]
        }

        fn receive(&mut self) {
            if let Some(share) = self.coming.pop_front().and_then(|shares| shares.into_iter().next()) {
                self.held = Some(share);
            }
        }
    }

    fn id(number: usize) -> NodeId {
        NodeId(format!("g{number}"))
    }

    fn beat(table: &mut ShareTable, world: &World, gateways: &mut [Gateway], number: usize, requests: u64) {
        table.heard(&id(number), &gateways[number].usage(requests));
        let shares = table.grant(&world.state, &id(number));
        if !shares.is_empty() {
            gateways[number].coming.push_back(shares);
        }
    }

    #[test]
    fn shares_follow_demand_and_leave_a_floor() {
        let world = world(3);
        let mut table = ShareTable::new();
        let mut gateways = vec![Gateway::default(); 3];
        let round = |table: &mut ShareTable, gateways: &mut Vec<Gateway>, requests: [u64; 3]| {
            for number in 0..3 {
                beat(table, &world, gateways, number, requests[number]);
                gateways[number].receive();
            }
        };
        (0..5).for_each(|_| round(&mut table, &mut gateways, [0, 0, 0]));
        let held: Vec<u64> = gateways.iter().map(Gateway::rpm).collect();
        assert_eq!(held, [334, 333, 333]);
        (0..50).for_each(|_| round(&mut table, &mut gateways, [50, 0, 0]));
        let held: Vec<u64> = gateways.iter().map(Gateway::rpm).collect();
        assert!(held[0] >= 800 && held[1] >= 83 && held[2] >= 83 && held.iter().sum::<u64>() <= 1_000, "{held:?}");
    }

    #[test]
    fn a_small_budget_leaves_no_gateway_without_a_share() {
        let mut world = world(3);
        let small = ApiKeyRecord { rpm: Some(3), ..world.state.keys()["team"].clone() };
        world.run(Command::RevokeKey { name: "team".into() }).expect("revoked");
        world.run(Command::PutKey { key: Box::new(ApiKeyRecord { name: "small".into(), id: "s".into(), ..small }) }).expect("kept");
        let mut table = ShareTable::new();
        let mut held = [0u32; 3];
        for round in 0..50 {
            for (number, held) in held.iter_mut().enumerate() {
                let requests = if number == 0 && round > 5 { 50 } else { 0 };
                let held_rpm = (*held > 0).then_some(*held);
                let usage = KeyUsage { key_id: "s".into(), requests, tokens: 0, refused: 0, held_rpm, held_tpm: None };
                table.heard(&id(number), &[usage]);
                for share in table.grant(&world.state, &id(number)) {
                    *held = share.rpm.unwrap_or(0);
                }
            }
        }
        assert_eq!(held, [1, 1, 1]);
    }

    #[test]
    fn a_new_leader_lends_nothing_before_all_have_spoken() {
        let world = world(2);
        let mut table = ShareTable::new();
        let mut gateways = vec![
            Gateway { held: Some(KeyShare { key_id: "k".into(), rpm: Some(900), tpm: None }), ..Default::default() },
            Gateway::default(),
        ];
        beat(&mut table, &world, &mut gateways, 1, 10);
        assert!(gateways[1].coming.is_empty());
        beat(&mut table, &world, &mut gateways, 0, 10);
        beat(&mut table, &world, &mut gateways, 1, 10);
        gateways[1].receive();
        assert!(gateways[1].rpm() <= 100);
    }

    #[derive(Debug, Clone)]
    enum Action {
        Beat { gateway: usize, requests: u64 },
        Receive { gateway: usize },
        NewSession { gateway: usize },
        NewLeader,
        CutOff { gateway: usize },
    }

    fn action() -> impl Strategy<Value = Action> {
        let gateway = 0usize..4;
        prop_oneof![
            8 => (gateway.clone(), 0u64..50).prop_map(|(gateway, requests)| Action::Beat { gateway, requests }),
            6 => gateway.clone().prop_map(|gateway| Action::Receive { gateway }),
            1 => gateway.clone().prop_map(|gateway| Action::NewSession { gateway }),
            1 => Just(Action::NewLeader),
            1 => gateway.prop_map(|gateway| Action::CutOff { gateway }),
        ]
    }

    proptest! {
        /// Whatever is delayed, lost or begun anew: live gateways hold the budget at most, and each one that is cut off its
        /// last share on top.
        #[test]
        fn at_most_one_share_is_admitted_too_much(actions in proptest::collection::vec(action(), 1..200)) {
            let mut world = world(4);
            let mut table = ShareTable::new();
            let mut gateways = vec![Gateway::default(); 4];
            for action in actions {
                match action {
                    Action::Beat { gateway, requests } if !gateways[gateway].is_cut_off => {
                        beat(&mut table, &world, &mut gateways, gateway, requests);
                    }
                    Action::Receive { gateway } => gateways[gateway].receive(),
                    // Sessions end with the leader; what was on its way is lost with them.
                    Action::NewSession { gateway } => {
                        gateways[gateway].coming.clear();
                        table.begin(&id(gateway));
                    }
                    Action::NewLeader => {
                        table = ShareTable::new();
                        gateways.iter_mut().for_each(|gateway| gateway.coming.clear());
                    }
                    Action::CutOff { gateway } if !gateways[gateway].is_cut_off => {
                        gateways[gateway].is_cut_off = true;
                        gateways[gateway].coming.clear();
                        world.lose(&format!("g{gateway}"), 1).expect("its lease ran out");
                    }
                    Action::Beat { .. } | Action::CutOff { .. } => {}
                }
                let live: u64 = gateways.iter().filter(|gateway| !gateway.is_cut_off).map(Gateway::rpm).sum();
                prop_assert!(live <= u64::from(BUDGET), "{live}");
            }
        }
    }
}
