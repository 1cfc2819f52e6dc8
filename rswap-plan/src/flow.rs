//! Plans for parts of instances that sit somewhere by themselves: volumes on storage pools, and ports on links.
//!
//! What such a pool gives is a flow: requests and bytes per second. Who leaves a pool counts there until it has left, and a new
//! place is taken at once: no decision of a round rests on another one's having been carried out.

mod compare;
mod ledger;
mod need;
mod price;

use std::collections::BTreeMap;

use rswap_forecast::{Quantile, Quantiles};
use rswap_types::{Flow, InstanceName, LatencyPoint, Pool, PoolKind, PoolState, UnixMillis};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub use compare::shortfall_share;
pub(crate) use price::FIXED_S;

use self::{compare::Place, ledger::Ledger};
use crate::{
    Candidate, Decision, Dropped, InstanceView, MoveKind, Outcome, PlanConfig, Planner, StayReason,
    memory::Memory, rules, urgency::Urgency,
};

/// A volume of an instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VolumeView {
    /// Its name.
    pub name: String,
    /// The storage pool that it lies on; `None` = on none that plans know.
    pub pool: Option<String>,
    /// What it takes there, in bytes.
    pub size_bytes: u64,
    /// Its part (0 to 1) of the I/O that is forecast of all volumes of the instance; 1 where it can't be told from the others.
    pub share: f64,
    /// Its I/O in the last window.
    pub now: Flow,
}

/// The port of an instance with an address of its own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PortView {
    /// The link that it is on; `None` = on none that plans know.
    pub pool: Option<String>,
    /// Its traffic in the last window, in the fuller direction.
    pub now: Flow,
}

/// The need that a decision about a volume or a port rests on.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FlowNeed {
    /// Mean of the medians over the horizon.
    pub expected: Flow,
    /// Highest value of `quantile` over the horizon: what a pool must be able to give.
    pub limit: Flow,
    /// Highest value of each quantile over the horizon, in requests per second.
    pub operations: Quantiles,
    /// The same in bytes per second.
    pub bytes: Quantiles,
    /// What has to be put there, in bytes.
    pub size_bytes: u64,
    /// Which quantile.
    pub quantile: Quantile,
}

/// What a pool has for a volume or a port, and what that needs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FlowTerms {
    /// What must be met.
    pub limit: Flow,
    /// What it can have here.
    pub available: Flow,
    /// What has to be put here, in bytes.
    pub size_bytes: u64,
    /// What can still be put here, in bytes; where it is, that is its own place, too.
    pub free_bytes: u64,
    /// What its requests take here, at the load that the pool's disks have with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency: Option<LatencyPoint>,
}

/// One part of an instance that moves by itself.
#[derive(Clone, Copy, Debug)]
struct Lane<'v> {
    view: &'v InstanceView,
    kind: MoveKind,
    /// Of a volume, its name.
    volume: Option<&'v str>,
    pool: Option<&'v str>,
    size_bytes: u64,
    share: f64,
    now: Flow,
}

/// What of an instance a planner remembers moves of: a volume's name, or its port.
pub(crate) fn key(kind: MoveKind, volume: Option<&str>) -> String {
    match (kind, volume) {
        (MoveKind::Storage, Some(volume)) => format!("volume {volume}"),
        _ => "port".to_owned(),
    }
}

/// Whether a move of this kind leaves the instance itself where it is.
pub(crate) fn is_of_a_part(kind: MoveKind) -> bool {
    matches!(kind, MoveKind::Storage | MoveKind::Link)
}

fn lanes(view: &InstanceView) -> Vec<Lane<'_>> {
    let mut lanes = Vec::new();
    if view.movable.contains(&MoveKind::Storage) {
        lanes.extend(view.volumes.iter().map(|volume| Lane {
            view,
            kind: MoveKind::Storage,
            volume: Some(&volume.name),
            pool: volume.pool.as_deref(),
            size_bytes: volume.size_bytes,
            share: volume.share.clamp(0.0, 1.0),
            now: volume.now,
        }));
    }
    if view.movable.contains(&MoveKind::Link) {
        lanes.extend(view.port.iter().map(|port| Lane {
            view,
            kind: MoveKind::Link,
            volume: None,
            pool: port.pool.as_deref(),
            size_bytes: 0,
            share: 1.0,
            now: port.now,
        }));
    }
    lanes
}

/// What one round rests on.
struct Round<'a> {
    now: UnixMillis,
    /// Storage and links.
    pools: Vec<&'a Pool>,
    by_name: BTreeMap<&'a str, usize>,
    config: &'a PlanConfig,
    /// Bytes per second that a copy to it was seen to have, by the pool's name.
    copied: &'a BTreeMap<String, f64>,
}

impl Round<'_> {
    fn is_of_kind(&self, index: usize, kind: MoveKind) -> bool {
        match self.pools[index].kind {
            PoolKind::Storage { .. } => kind == MoveKind::Storage,
            PoolKind::Link { .. } => kind == MoveKind::Link,
            _ => false,
        }
    }

    fn current(&self, lane: &Lane<'_>) -> Option<usize> {
        let index = lane.pool.and_then(|name| self.by_name.get(name).copied())?;
        self.is_of_kind(index, lane.kind).then_some(index)
    }
}

impl Planner {
    /// A move of this kind has begun, of a volume that of this one: until [`Planner::part_moved`] or [`Planner::part_failed`] the
    /// instance is left alone, and the place at the target is kept.
    pub fn part_started(&mut self, instance: &InstanceName, kind: MoveKind, volume: Option<&str>, to: &str) {
        if !is_of_a_part(kind) {
            self.started(instance, to);
            return self.memory.entry(instance.clone()).or_default().departs(kind);
        }
        if let Some(part) = self.parts.get_mut(instance).and_then(|parts| parts.get_mut(&key(kind, volume))) {
            part.departs(kind);
        }
        self.memory.entry(instance.clone()).or_default().part_in_flight =
            Some((key(kind, volume), to.to_owned()));
    }

    /// It is done.
    pub fn part_moved(
        &mut self,
        instance: &InstanceName,
        kind: MoveKind,
        volume: Option<&str>,
        now: UnixMillis,
    ) {
        match is_of_a_part(kind) {
            true => self.part_ended(instance, kind, volume).moved(now),
            false => self.moved(instance, kind, now),
        }
    }

    /// It has failed, and why: the next try of this part waits, twice as long after each failure in a row. Its other parts need not.
    pub fn part_failed(
        &mut self,
        instance: &InstanceName,
        kind: MoveKind,
        volume: Option<&str>,
        error: &str,
        now: UnixMillis,
    ) {
        let memory = if is_of_a_part(kind) {
            let memory = self.part_ended(instance, kind, volume);
            memory.failed(now);
            memory
        } else {
            self.failed(instance, kind, now);
            self.memory.entry(instance.clone()).or_default()
        };
        memory.last_error = Some(error.to_owned());
    }

    fn part_ended(&mut self, instance: &InstanceName, kind: MoveKind, volume: Option<&str>) -> &mut Memory {
        self.memory.entry(instance.clone()).or_default().part_in_flight = None;
        let parts = self.parts.entry(instance.clone()).or_default();
        parts.entry(key(kind, volume)).or_default()
    }

    /// A volume was copied to `pool` at so many bytes per second: moves there are priced by it from now on.
    pub fn copy_measured(&mut self, pool: &str, bytes_per_s: f64) {
        self.link_measured(pool, bytes_per_s);
    }

    /// Decides about every volume and port; an entry per view.
    pub(crate) fn plan_flows(
        &mut self,
        now: UnixMillis,
        views: &[&InstanceView],
        pools: &[Pool],
    ) -> Vec<Vec<Decision>> {
        let pools: Vec<&Pool> = pools.iter().filter(|pool| pool.kind.is_for_flows()).collect();
        if pools.is_empty() {
            return vec![Vec::new(); views.len()];
        }
        let by_name =
            pools.iter().enumerate().rev().map(|(index, pool)| (pool.name.as_str(), index)).collect();
        let (config, copied) = (self.config.clone(), self.links.clone());
        let round = Round { now, pools, by_name, config: &config, copied: &copied };
        let lanes: Vec<(usize, Lane<'_>)> = views
            .iter()
            .enumerate()
            .flat_map(|(of, view)| lanes(view).into_iter().map(move |lane| (of, lane)))
            // Where there is nothing to sit on of a kind, there is nothing to decide.
            .filter(|(_, lane)| (0..round.pools.len()).any(|index| round.is_of_kind(index, lane.kind)))
            .collect();
        let mut ledger = Ledger::new(&round);
        for (number, (_, lane)) in lanes.iter().enumerate() {
            let key = key(lane.kind, lane.volume);
            if let Some(index) = round.current(lane) {
                let parts = self.parts.entry(lane.view.instance.clone()).or_default();
                let part = parts.entry(key.clone()).or_default();
                part.sits(lane.kind, &round.pools[index].name, now);
                part.bytes = lane.size_bytes;
                ledger.takes(number, index, lane, false);
            }
            let going = self.memory(&lane.view.instance).and_then(|memory| memory.part_in_flight.as_ref());
            if let Some((of, to)) = going
                && *of == key
                && let Some(&index) = round.by_name.get(to.as_str())
            {
                ledger.takes(number, index, lane, true);
            }
        }
        let mut decided: Vec<Decision> = lanes
            .iter()
            .enumerate()
            .map(|(n, (_, lane))| self.decide_flow(n, lane, &round, &ledger))
            .collect();
        let mut order: Vec<(usize, Urgency)> = decided
            .iter()
            .enumerate()
            .filter_map(|(n, decision)| Some((n, Urgency::of(std::slice::from_ref(decision))?)))
            .collect();
        order.sort_by(|(_, a), (_, b)| a.order(b));
        let mut changed = false;
        for (n, _) in order {
            let lane = &lanes[n].1;
            if changed {
                decided[n] = self.decide_flow(n, lane, &round, &ledger);
            }
            if let Outcome::Move { to, .. } = &decided[n].outcome
                && let Some(&index) = round.by_name.get(to.as_str())
            {
                ledger.takes(n, index, lane, true);
                changed = true;
            }
        }
        for ((_, lane), decision) in lanes.iter().zip(&decided) {
            let parts = self.parts.get_mut(&lane.view.instance);
            if let Some(part) = parts.and_then(|parts| parts.get_mut(&key(lane.kind, lane.volume))) {
                part.comes(lane.kind, decision.crossing_by);
            }
        }
        let mut of_views = vec![Vec::new(); views.len()];
        for ((of, _), decision) in lanes.iter().zip(decided) {
            of_views[*of].push(decision);
        }
        of_views
    }

    fn decide_flow(
        &self,
        number: usize,
        lane: &Lane<'_>,
        round: &Round<'_>,
        ledger: &Ledger<'_>,
    ) -> Decision {
        let mut decision = Decision::undecided(lane.view, lane.kind, round.now, &self.config);
        decision.volume = lane.volume.map(str::to_owned);
        let need = match need::need(lane, round.config) {
            Ok(need) => need,
            Err(reason) => {
                decision.outcome = Outcome::Stay { reason };
                return decision;
            }
        };
        decision.flow = Some(need);
        let here = round.current(lane);
        let Some(index) = here else {
            decision.outcome = Outcome::Stay { reason: StayReason::OnNoPool };
            return decision;
        };
        let pool = round.pools[index];
        if pool.gives().is_none() && pool.state == PoolState::Ready {
            decision.outcome = Outcome::Stay { reason: StayReason::Unmeasured { pool: pool.name.clone() } };
            return decision;
        }
        let place = Place { index, room: ledger.kept(index, number), coming: None };
        let candidate = compare::candidate(lane, &need, &place, round);
        let forced = candidate.dropped.is_some();
        let (fits, limit) = (place.room.without_others, need.limit);
        let for_others = matches!(candidate.dropped, Some(Dropped::Flow { .. }))
            && limit.operations_per_s <= fits.operations_per_s
            && limit.bytes_per_s <= fits.bytes_per_s;
        decision.current = Some(candidate);
        let unknown = Memory::default();
        let instance = &lane.view.instance;
        let part = self.parts.get(instance).and_then(|parts| parts.get(&key(lane.kind, lane.volume)));
        let part = part.unwrap_or(&unknown);
        let crossing = need::crossing(lane, place.room.available, round.config);
        decision.crosses(crossing, part.coming(lane.kind));
        let others = (0..round.pools.len()).filter(|&to| to != index && round.is_of_kind(to, lane.kind));
        let mut candidates: Vec<Candidate> = others
            .map(|to| {
                let place = Place { index: to, room: ledger.available(to, number), coming: Some(ledger) };
                let mut candidate = compare::candidate(lane, &need, &place, round);
                // What others use may be what the kernel does for this very volume, and come along: it must not walk in circles.
                let left = part.left(lane.kind, &candidate.pool).filter(|_| for_others);
                let left_ms = left.map_or(0, |left| self.return_ms().saturating_sub(round.now.since(left)));
                if left_ms > 0 && candidate.dropped.is_none() {
                    candidate.dropped = Some(Dropped::LeftForOthers { left_ms });
                }
                candidate
            })
            .collect();
        candidates.sort_by(|a, b| {
            let dropped = a.dropped.is_some().cmp(&b.dropped.is_some());
            dropped.then(a.total.total_cmp(&b.total)).then_with(|| a.pool.cmp(&b.pool))
        });
        decision.candidates = candidates;
        let in_flight = self.memory(instance).is_some_and(Memory::is_in_flight);
        decision.outcome = if rules::stays(lane.view) {
            Outcome::Stay { reason: StayReason::ToldToStay }
        } else {
            match self.outcome(round.now, &decision, forced, part, in_flight) {
                // A disk that fails is gone soon: what it failed goes on waiting, and so does what waits for that.
                Outcome::Stay { reason: StayReason::NoPoolFits } => {
                    Outcome::Stay { reason: self.back_off(round.now, part).unwrap_or(StayReason::NoPoolFits) }
                }
                outcome => outcome,
            }
        };
        self.set_start(&mut decision, part);
        decision
    }
}

#[cfg(test)]
mod tests;
