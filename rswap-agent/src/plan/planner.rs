//! One round of planning, and the little that must be remembered between rounds.

use std::collections::BTreeMap;

use super::{
    Candidate, Decision, Dropped, InstanceView, MoveKind, NeedUsed, Outcome, Plan, StayReason,
    ledger::{Ledger, Promise},
    price, score,
};
use crate::{
    config::PlanConfig,
    forecast::{DemandPoint, Evidence, Resource},
    instance::InstanceName,
    pool::{Pool, PoolKind, PoolState},
    units::UnixMillis,
};

/// A move starts so much earlier than its expected duration asks for: estimates err.
const SAFETY: f64 = 1.5;
/// Shortest wait after a failure, in milliseconds.
const MIN_BACK_OFF_MS: u64 = 1_000;

/// What the planner remembers of an instance.
#[derive(Clone, Debug, Default)]
struct Memory {
    last_move: Option<UnixMillis>,
    last_failure: Option<UnixMillis>,
    failures: u32,
    in_flight: Option<String>,
}

/// Decides. Time, instances and pools come in; nothing else is looked at.
#[derive(Clone, Debug)]
pub struct Planner {
    config: PlanConfig,
    memory: BTreeMap<InstanceName, Memory>,
    /// Bytes of memory per second to a host, by the host pool's name, as the last migration there found it.
    links: BTreeMap<String, f64>,
}

impl Planner {
    /// A planner that remembers nothing yet.
    pub fn new(config: PlanConfig) -> Self {
        Self { config, memory: BTreeMap::new(), links: BTreeMap::new() }
    }

    /// A move has begun: until [`Planner::moved`] or [`Planner::failed`] the instance is left alone, and its place at
    /// the target is kept.
    pub fn started(&mut self, instance: &InstanceName, to: &str) {
        self.memory.entry(instance.clone()).or_default().in_flight = Some(to.to_owned());
    }

    /// A move is done. The cool-down counts for both kinds.
    pub fn moved(&mut self, instance: &InstanceName, _kind: MoveKind, now: UnixMillis) {
        let memory = Memory { last_move: Some(now), ..Memory::default() };
        self.memory.insert(instance.clone(), memory);
    }

    /// A move has failed: the next try waits, twice as long after each failure in a row.
    pub fn failed(&mut self, instance: &InstanceName, _kind: MoveKind, now: UnixMillis) {
        let memory = self.memory.entry(instance.clone()).or_default();
        memory.in_flight = None;
        memory.failures = memory.failures.saturating_add(1);
        memory.last_failure = Some(now);
    }

    /// A migration to `host` transferred so many bytes of memory per second: moves there are priced by it from now on.
    pub fn link_measured(&mut self, host: &str, bytes_per_s: f64) {
        if bytes_per_s.is_finite() && bytes_per_s > 0.0 {
            self.links.insert(host.to_owned(), bytes_per_s);
        }
    }

    /// The instance is gone.
    pub fn forget(&mut self, instance: &InstanceName) {
        self.memory.remove(instance);
    }

    /// Decides about every instance, in the order of their names.
    pub fn plan(&mut self, now: UnixMillis, views: &[InstanceView], pools: &[Pool]) -> Plan {
        let mut views: Vec<&InstanceView> = views.iter().collect();
        views.sort_by(|a, b| a.instance.cmp(&b.instance));

        let seen: Vec<_> =
            views.iter().map(|view| (view.cpu_pool.as_deref(), view.cores, view.resident_bytes)).collect();
        let mut ledger = Ledger::new(pools, self.config.headroom, &seen);
        for view in &views {
            let promise = self.promise(view, pools);
            ledger.sits(&view.instance, view.cpu_pool.as_deref(), promise);
            if let Some(to) = self.memory.get(&view.instance).and_then(|memory| memory.in_flight.as_deref()) {
                ledger.under_way(&view.instance, to, promise);
            }
        }

        let mut decisions = Vec::new();
        for view in views {
            let mut cpu_outcome = None;
            for kind in [MoveKind::Cpu, MoveKind::Host].into_iter().filter(|kind| view.movable.contains(kind))
            {
                let decision = self.decide(now, view, kind, pools, &ledger, cpu_outcome.as_ref());
                if let Outcome::Move { to, .. } = &decision.outcome {
                    ledger.moves(&view.instance, to, self.promise(view, pools));
                }
                cpu_outcome = Some(decision.outcome.clone());
                decisions.push(decision);
            }
        }
        Plan { at: now, decisions }
    }

    /// What an instance counts for against others: its forecast, or what it uses now where that is more or all there is.
    fn promise(&self, view: &InstanceView, pools: &[Pool]) -> Promise {
        let speed = current(view, MoveKind::Cpu, pools).map_or(1.0, |index| pools[index].performance);
        let need = self.need(view).ok();
        Promise {
            reference_cores: need.map_or(0.0, |need| need.limit_cores).max(view.cores * speed),
            bytes: need.map_or(0, |need| need.limit_bytes).max(view.resident_bytes),
        }
    }

    fn points<'v>(
        &self,
        view: &'v InstanceView,
        resource: Resource,
    ) -> impl Iterator<Item = &'v DemandPoint> {
        let horizon_ms = self.config.horizon_ms;
        view.demand.points.iter().filter(move |p| p.resource == resource && p.horizon_ms <= horizon_ms)
    }

    /// (mean of medians, highest limit) of the points that can be believed.
    fn used(&self, view: &InstanceView, resource: Resource) -> Result<(f64, f64), StayReason> {
        let (mut sum, mut limit, mut count) = (0.0, 0.0f64, 0u32);
        let mut nearest = StayReason::TooLittleSeen { seen: 0, needed: 1 };
        for point in self.points(view, resource) {
            match point.evidence {
                Evidence::Enough { .. } => {
                    sum += point.need.p50.max(0.0);
                    limit = limit.max(point.need.at(self.config.quantile));
                    count += 1;
                }
                Evidence::TooLittle { seen, needed } => nearest = StayReason::TooLittleSeen { seen, needed },
            }
        }
        if count == 0 { Err(nearest) } else { Ok((sum / f64::from(count), limit)) }
    }

    fn need(&self, view: &InstanceView) -> Result<NeedUsed, StayReason> {
        let (expected_cores, limit_cores) = self.used(view, Resource::Cpu)?;
        // Memory in use now is a fair forecast of memory until there is a better one.
        let resident = view.resident_bytes as f64;
        let (expected_bytes, limit_bytes) = self.used(view, Resource::Memory).unwrap_or((resident, resident));
        Ok(NeedUsed {
            expected_cores,
            limit_cores,
            expected_bytes: expected_bytes as u64,
            limit_bytes: limit_bytes as u64,
            quantile: self.config.quantile,
        })
    }

    fn decide(
        &self,
        now: UnixMillis,
        view: &InstanceView,
        kind: MoveKind,
        pools: &[Pool],
        ledger: &Ledger<'_>,
        cpu_outcome: Option<&Outcome>,
    ) -> Decision {
        let mut decision = Decision {
            instance: view.instance.clone(),
            kind,
            at: now,
            need: None,
            crossing_in_ms: None,
            current: None,
            candidates: Vec::new(),
            threshold: self.config.threshold,
            hysteresis: self.config.hysteresis,
            outcome: Outcome::Stay { reason: StayReason::NoPoolFits },
        };
        let need = match self.need(view) {
            Ok(need) => need,
            Err(reason) => {
                decision.outcome = Outcome::Stay { reason };
                return decision;
            }
        };
        decision.need = Some(need);

        let here = current(view, kind, pools);
        let mut forced = false;
        if let Some(index) = here {
            let (cores, bytes) = ledger.available(index, &view.instance);
            let candidate = self.candidate(&need, &pools[index], (cores, bytes), kind, None);
            forced = candidate.dropped.is_some();
            decision.crossing_in_ms = self.crossing(view, &pools[index], cores, bytes, kind);
            decision.current = Some(candidate);
        }
        // Where no core set of this host is enough, this host is not, whatever its sum says.
        if kind == MoveKind::Host && cpu_outcome == Some(&(Outcome::Stay { reason: StayReason::NoPoolFits }))
        {
            forced = true;
            decision.crossing_in_ms = decision.crossing_in_ms.or_else(|| {
                let index = current(view, MoveKind::Cpu, pools)?;
                let (cores, bytes) = ledger.available(index, &view.instance);
                self.crossing(view, &pools[index], cores, bytes, MoveKind::Cpu)
            });
        }

        decision.candidates = (0..pools.len())
            .filter(|&index| Some(index) != here && is_candidate(&pools[index], kind))
            .map(|index| {
                let room = ledger.available(index, &view.instance);
                self.candidate(&need, &pools[index], room, kind, Some(view))
            })
            .collect();
        decision.candidates.sort_by(|a, b| {
            let order = a.dropped.is_some().cmp(&b.dropped.is_some()).then(a.total.total_cmp(&b.total));
            order.then_with(|| a.pool.cmp(&b.pool))
        });

        decision.outcome = if matches!(cpu_outcome, Some(Outcome::Move { .. })) {
            Outcome::Stay { reason: StayReason::OtherMoveFirst }
        } else {
            self.outcome(now, &decision, forced)
        };
        decision
    }

    fn outcome(&self, now: UnixMillis, decision: &Decision, forced: bool) -> Outcome {
        let stay = |reason| Outcome::Stay { reason };
        let memory = self.memory.get(&decision.instance).cloned().unwrap_or_default();
        if memory.in_flight.is_some() {
            return stay(StayReason::InFlight);
        }
        let score = decision.current.as_ref().map(|current| current.score);
        if !forced && score.is_some_and(|score| score <= self.config.threshold) {
            return stay(StayReason::UnderThreshold);
        }
        let best = decision.candidates.iter().find(|candidate| candidate.dropped.is_none());
        let Some(best) = best else {
            let reason = StayReason::NothingBetter { best_gain: None, hysteresis: self.config.hysteresis };
            return stay(if forced { StayReason::NoPoolFits } else { reason });
        };
        if let Some(failed_at) = memory.last_failure {
            let wait = self.config.cool_down_ms.max(MIN_BACK_OFF_MS) << memory.failures.clamp(1, 7) >> 1;
            let left_ms = wait.saturating_sub(now.since(failed_at));
            if left_ms > 0 {
                return stay(StayReason::BackOff { failures: memory.failures, left_ms });
            }
        }
        if !forced {
            let gain = score.map_or(0.0, |score| score - best.total);
            if gain <= self.config.hysteresis {
                let reason =
                    StayReason::NothingBetter { best_gain: Some(gain), hysteresis: self.config.hysteresis };
                return stay(reason);
            }
            if let Some(moved_at) = memory.last_move {
                let left_ms = self.config.cool_down_ms.saturating_sub(now.since(moved_at));
                if left_ms > 0 {
                    return stay(StayReason::CoolDown { left_ms });
                }
            }
        }
        let takes_ms = best.move_price.map_or(0.0, |price| price.seconds * 1000.0 * SAFETY) as u64;
        let wait_ms = match decision.crossing_in_ms {
            Some(crossing_ms) if forced => crossing_ms.saturating_sub(takes_ms),
            _ => 0,
        };
        Outcome::Move { to: best.pool.clone(), start_by: UnixMillis(now.0.saturating_add(wait_ms)), forced }
    }

    /// Scores one pool; `moving` is who would have to move there, `None` for the pool that it sits on.
    fn candidate(
        &self,
        need: &NeedUsed,
        pool: &Pool,
        (cores, bytes): (f64, u64),
        kind: MoveKind,
        moving: Option<&InstanceView>,
    ) -> Candidate {
        let terms = score::terms(need, pool, cores, self.config.weight);
        let link = self.links.get(&pool.name).copied().unwrap_or(self.config.link_bytes_per_s);
        let moved = moving.map(|view| price::price(kind, view, terms.cost_per_hour, link, &self.config));
        let (move_price, hopeless) = moved.map_or((None, None), |(price, dropped)| (Some(price), dropped));
        let horizon_hours = self.config.horizon_ms as f64 / 3_600_000.0;
        let dropped = match &pool.state {
            PoolState::Unavailable { reason } => Some(Dropped::Unavailable { reason: reason.clone() }),
            PoolState::Ready if terms.limit_cores > cores => {
                Some(Dropped::Cores { needed: terms.limit_cores, available: cores })
            }
            PoolState::Ready if kind == MoveKind::Host && need.limit_bytes > bytes => {
                Some(Dropped::Memory { needed_bytes: need.limit_bytes, available_bytes: bytes })
            }
            PoolState::Ready => hopeless,
        };
        Candidate {
            pool: pool.name.clone(),
            score: terms.score(),
            terms,
            move_price,
            total: terms.score() + move_price.map_or(0.0, |price| price.money / horizon_hours),
            dropped,
        }
    }

    /// When the need first exceeds what the pool can give: between two horizons, along the line through both.
    fn crossing(
        &self,
        view: &InstanceView,
        pool: &Pool,
        cores: f64,
        bytes: u64,
        kind: MoveKind,
    ) -> Option<u64> {
        let speed = pool.performance.max(1e-6);
        let first = |resource, now: f64, limit: f64| {
            let mut points: Vec<_> = self
                .points(view, resource)
                .filter(|point| matches!(point.evidence, Evidence::Enough { .. }))
                .map(|point| (point.horizon_ms as f64, point.need.at(self.config.quantile)))
                .collect();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            let (mut at, mut value) = (0.0, now);
            for (next_at, next) in points {
                if next > limit {
                    let share = if value < limit { (limit - value) / (next - value) } else { 0.0 };
                    return Some((at + (next_at - at) * share) as u64);
                }
                (at, value) = (next_at, next);
            }
            None
        };
        let cpu = first(Resource::Cpu, view.cores * speed, cores * speed);
        let memory = match kind {
            MoveKind::Host => first(Resource::Memory, view.resident_bytes as f64, bytes as f64),
            MoveKind::Cpu => None,
        };
        cpu.into_iter().chain(memory).min()
    }
}

fn is_candidate(pool: &Pool, kind: MoveKind) -> bool {
    match kind {
        MoveKind::Cpu => matches!(pool.kind, PoolKind::Cpu { .. }),
        MoveKind::Host => matches!(pool.kind, PoolKind::Host { .. }),
    }
}

/// Number of the pool that the instance sits on. One that may use every core sits on the host as a whole.
fn current(view: &InstanceView, kind: MoveKind, pools: &[Pool]) -> Option<usize> {
    let own = match kind {
        MoveKind::Cpu => view.cpu_pool.as_deref().and_then(|name| {
            pools.iter().position(|pool| pool.name == name && matches!(pool.kind, PoolKind::Cpu { .. }))
        }),
        MoveKind::Host => None,
    };
    own.or_else(|| pools.iter().position(|pool| pool.kind == PoolKind::ThisHost))
}
