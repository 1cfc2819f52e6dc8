//! The fleet's plan: hosts are its pools, and the planner is that of a host.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    net::SocketAddr,
    sync::Arc,
};

use rswap_forecast::Demand;
use rswap_plan::{Decision, InstanceView, MoveKind, Outcome, Plan, PlanConfig, Planner, rules};
use rswap_types::{InstanceName, Pool, PoolKind, PoolState, UnixMillis};

use crate::{
    Action, HostName, Inventory, Order, OrderOutcome,
    inventory::Host,
    orders::{Book, OrderResult},
};

/// A migration's order may be begun within so long, in milliseconds: after that, it rests on an old plan.
pub const BEGIN_WITHIN_MS: u64 = 2 * 60_000;
/// A migration that was ordered longer ago, and of which nobody has said what became of it, counts as failed, in milliseconds.
pub const MOVES_WITHIN_MS: u64 = 30 * 60_000;

/// What a round looks at: of each host its last report, which is not copied, since everybody waits while this is made.
#[derive(Clone, Debug)]
pub struct Scene {
    at: UnixMillis,
    hosts: Vec<Seen>,
}

#[derive(Clone, Debug)]
struct Seen {
    name: HostName,
    host: Arc<Host>,
    /// Names in the fleet, by the names there.
    names: Arc<BTreeMap<InstanceName, InstanceName>>,
    drained: bool,
    away: bool,
}

impl Scene {
    /// What runs, by names in the fleet, without what is on hosts that are away; and the hosts, as pools. Each host's report is let go when
    /// it was looked at: until the plan is made, its host has reported anew, and both would be in memory.
    fn into_plan(self) -> (Vec<InstanceView>, Vec<Pool>) {
        let most: usize = self.hosts.iter().filter(|seen| !seen.away).map(|seen| seen.names.len()).sum();
        let (mut views, mut pools) = (Vec::with_capacity(most), Vec::with_capacity(self.hosts.len()));
        for seen in self.hosts {
            pools.extend(pool(&seen.name, &seen.host, seen.drained, seen.away));
            if !seen.away {
                views.extend(seen.views());
            }
        }
        (views, pools)
    }
}

impl Seen {
    fn views(&self) -> impl Iterator<Item = InstanceView> {
        // What has no name yet may be one that has: it is in no plan.
        self.names.iter().filter_map(|(local, name)| {
            let view = &self.host.instances.get(local)?.view;
            // Others would be looked up for each host that it could move to, and found to ask nothing.
            let labels = self.host.labels.get(local).into_iter().flat_map(|labels| labels.iter());
            let labels = labels.filter(|(label, _)| rules::is_rule(label));
            Some(InstanceView {
                instance: name.clone(),
                host: Some(self.name.to_string()),
                cpu_pool: None,
                demand: Demand { instance: name.clone(), ..view.demand.clone() },
                cores: view.cores,
                resident_bytes: view.resident_bytes,
                dirty_bytes_per_s: view.dirty_bytes_per_s,
                movable: view.movable.iter().copied().filter(|kind| *kind == MoveKind::Host).collect(),
                labels: labels.map(|(label, value)| (label.clone(), value.clone())).collect(),
                volumes: view.volumes.clone(),
                port: view.port.clone(),
            })
        })
    }
}

/// Plans a fleet, and gives the orders.
#[derive(Clone, Debug)]
pub struct FleetPlanner {
    planner: Planner,
    interval_ms: u64,
    /// What was ordered and has not ended, by the name in the fleet.
    moving: BTreeMap<InstanceName, Moving>,
    /// Hosts that were to be left when the last round was looked at.
    drained: BTreeSet<HostName>,
}

#[derive(Clone, Debug)]
struct Moving {
    from: HostName,
    to: HostName,
    /// Its name there.
    local: InstanceName,
    until: UnixMillis,
    /// When it was heard that it is done.
    done: Option<UnixMillis>,
}

impl FleetPlanner {
    /// Reports come every `interval_ms` milliseconds.
    pub fn new(config: PlanConfig, interval_ms: u64) -> Self {
        let planner = Planner::new(config).with_windows(interval_ms).brief();
        Self { planner, interval_ms, moving: BTreeMap::new(), drained: BTreeSet::new() }
    }

    /// One round. Hosts that are `drained` are to be left.
    pub fn plan(&mut self, fleet: &Inventory, drained: &BTreeSet<HostName>, now: UnixMillis) -> Plan {
        let scene = self.look(fleet, drained, now);
        self.decide(scene)
    }

    /// The first half of a round: all that it looks at, so that the fleet may go on while it is decided. Of each host little is done: the
    /// fleet waits.
    pub fn look(&mut self, fleet: &Inventory, drained: &BTreeSet<HostName>, now: UnixMillis) -> Scene {
        self.follow(fleet, now);
        self.drained.clone_from(drained);
        let hosts = fleet.hosts().iter().map(|(name, host)| Seen {
            name: name.clone(),
            host: host.clone(),
            names: fleet.names(name),
            drained: drained.contains(name),
            away: fleet.is_away(name, self.interval_ms, now),
        });
        Scene { at: now, hosts: hosts.collect() }
    }

    /// The second half. Of a decision that moves nothing, the present host and the best other one are kept.
    pub fn decide(&mut self, scene: Scene) -> Plan {
        self.measure_links(&scene);
        self.forget_others(&scene);
        let at = scene.at;
        let (views, pools) = scene.into_plan();
        self.planner.plan(at, &views, &pools)
    }

    /// What is known of instances that no host has any more, for as long as the inventory remembers one, or whose host was taken out of the fleet, is of no use.
    fn forget_others(&mut self, scene: &Scene) {
        let present: HashSet<&InstanceName> =
            scene.hosts.iter().flat_map(|seen| seen.names.values()).collect();
        let moving = &self.moving;
        self.planner.retain(|name| present.contains(name) || moving.contains_key(name));
    }

    fn measure_links(&mut self, scene: &Scene) {
        let by_address: BTreeMap<_, _> =
            scene.hosts.iter().filter_map(|seen| Some((seen.host.address?, &seen.name))).collect();
        for (address, bytes_per_s) in scene.hosts.iter().flat_map(|seen| &seen.host.links) {
            if let Some(name) = by_address.get(address) {
                self.planner.link_measured(name.as_str(), *bytes_per_s);
            }
        }
    }

    /// Gives the orders for what a plan decided and would be late if it waited for the round after the next. `drained` are the hosts that
    /// are to be left now: of those of which something else was wanted when the plan was begun, the next one decides.
    pub fn order(
        &mut self,
        plan: &Plan,
        fleet: &Inventory,
        drained: &BTreeSet<HostName>,
        book: &mut Book,
        now: UnixMillis,
    ) {
        self.order_moves(&moves(plan), fleet, drained, book, now);
    }

    /// [`FleetPlanner::order`] for the [`moves`] of a plan, so that nobody waits while they are looked for.
    pub fn order_moves(
        &mut self,
        moves: &[&Decision],
        fleet: &Inventory,
        drained: &BTreeSet<HostName>,
        book: &mut Book,
        now: UnixMillis,
    ) {
        let other_wish: BTreeSet<HostName> = self.drained.symmetric_difference(drained).cloned().collect();
        let soon = UnixMillis(now.0.saturating_add(2 * self.interval_ms));
        let possible = |decision: &Decision| {
            let Outcome::Move { to, start_by, .. } = &decision.outcome else { return None };
            let (to, placed) = (to.parse::<HostName>().ok()?, fleet.placed(&decision.instance)?);
            // It may have gone elsewhere since it was looked at, and a host may have become silent.
            let was_there =
                decision.current.as_ref().is_none_or(|current| current.pool == placed.host.as_str());
            let is_wanted = [&to, &placed.host]
                .into_iter()
                .all(|host| !other_wish.contains(host) && !fleet.is_away(host, self.interval_ms, now));
            let address = fleet.hosts().get(&to)?.address?;
            let acts = fleet.hosts().get(&placed.host).is_some_and(|host| host.acts);
            let fits = was_there && is_wanted && acts && to != placed.host && !drained.contains(&to);
            (fits && *start_by <= soon).then_some((to, address))
        };
        let possible: BTreeMap<&InstanceName, (HostName, SocketAddr)> =
            moves.iter().filter_map(|decision| Some((&decision.instance, possible(decision)?))).collect();
        for decision in moves {
            let Some((to, address)) = possible.get(&decision.instance) else { continue };
            // Where two change places, one alone would find no room.
            if decision.exchange.as_ref().is_some_and(|with| !possible.contains_key(with)) {
                continue;
            }
            let Some(placed) = fleet.placed(&decision.instance) else { continue };
            let (to, address) = (to.clone(), *address);
            self.planner.started(&decision.instance, to.as_str());
            let until = UnixMillis(now.0.saturating_add(MOVES_WITHIN_MS));
            let (from, local) = (placed.host.clone(), placed.local.clone());
            let moving = Moving { from, to: to.clone(), local, until, done: None };
            let action = Action::Migrate { instance: placed.local.clone(), to, address };
            book.give(&placed.host, action, BEGIN_WITHIN_MS, now);
            self.moving.insert(decision.instance.clone(), moving);
        }
    }

    /// Takes in what became of an order; `None` if nobody began it in time.
    pub fn ended(&mut self, order: &Order, outcome: Option<&OrderOutcome>, now: UnixMillis) {
        let Action::Migrate { instance, .. } = &order.action else { return };
        let is_it = |moving: &Moving| moving.from == order.host && moving.local == *instance;
        // What is done is seen where it is then.
        if outcome.is_some_and(|outcome| outcome.result == OrderResult::Done) {
            self.moving
                .values_mut()
                .filter(|moving| is_it(moving))
                .for_each(|moving| moving.done = Some(now));
            return;
        }
        let name = self.moving.iter().find(|(_, moving)| is_it(moving)).map(|(name, _)| name.clone());
        if let Some(name) = name {
            self.moving.remove(&name);
            self.planner.failed(&name, MoveKind::Host, now);
        }
    }

    /// Who has arrived, and who should have long ago.
    fn follow(&mut self, fleet: &Inventory, now: UnixMillis) {
        let planner = &mut self.planner;
        self.moving.retain(|name, moving| {
            if fleet.placed(name).is_some_and(|placed| placed.host != moving.from) {
                planner.moved(name, MoveKind::Host, now);
                false
            } else if moving.until < now {
                planner.failed(name, MoveKind::Host, now);
                false
            } else {
                true
            }
        });
    }

    /// How many migrations go to each host of which its last report may not say what became of them.
    pub fn coming(&self, fleet: &Inventory) -> BTreeMap<HostName, usize> {
        let mut coming = BTreeMap::new();
        for Moving { to, done, .. } in self.moving.values() {
            let told = |at| fleet.hosts().get(to).is_some_and(|host| host.heard > at);
            if !done.is_some_and(told) {
                *coming.entry(to.clone()).or_default() += 1;
            }
        }
        coming
    }

    /// What is on its way: the name in the fleet, and from where.
    pub fn moving(&self) -> impl Iterator<Item = (&InstanceName, &HostName)> {
        self.moving.iter().map(|(name, moving)| (name, &moving.from))
    }
}

/// The decisions of a plan that something goes to another host.
pub fn moves(plan: &Plan) -> Vec<&Decision> {
    plan.decisions.iter().filter(|decision| decision.kind == MoveKind::Host && decision.moves()).collect()
}

/// A host as a pool of the fleet's plan; `None` if it has not said what it has.
pub fn pool(name: &HostName, host: &Host, drained: bool, away: bool) -> Option<Pool> {
    let whole = host.whole()?;
    let state = match &whole.state {
        _ if away => PoolState::Unavailable { reason: "it does not report".to_owned() },
        PoolState::Ready if drained => PoolState::Draining,
        state => state.clone(),
    };
    // Where nobody can go, those who are there may stay.
    let kind = host.address.map_or(PoolKind::ThisHost, |address| PoolKind::Host { address });
    Some(Pool { name: name.to_string(), kind, state, ..whole.clone() })
}
