//! One round of planning, and the little that must be remembered between rounds.

use std::collections::BTreeMap;

use rswap_forecast::{DemandPoint, Evidence, Resource};
use rswap_types::{InstanceName, Pool, PoolKind, UnixMillis};

use crate::{
    Candidate, Decision, InstanceView, MoveKind, NeedUsed, Outcome, Plan, PlanConfig, StayReason,
    compare::{self, Round},
    ledger::{Ledger, Promise, Seen},
    memory::Memory,
};

/// A move starts so much earlier than its expected duration asks for: estimates err.
const SAFETY: f64 = 1.5;
/// Shortest wait after a failure, in milliseconds.
const MIN_BACK_OFF_MS: u64 = 1_000;

/// Unforced, an instance does not return to a pool within so many cool-downs of leaving it, on whatever way.
const RETURN_COOL_DOWNS: u64 = 10;

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
        self.memory.entry(instance.clone()).or_default().started(to);
    }

    /// A move is done. The cool-down counts for both kinds.
    pub fn moved(&mut self, instance: &InstanceName, _kind: MoveKind, now: UnixMillis) {
        self.memory.entry(instance.clone()).or_default().moved(now);
    }

    /// A move has failed: the next try waits, twice as long after each failure in a row.
    pub fn failed(&mut self, instance: &InstanceName, _kind: MoveKind, now: UnixMillis) {
        self.memory.entry(instance.clone()).or_default().failed(now);
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

    /// Decides about every instance. Who is forced to move chooses first, then who gains most; the decisions are in the
    /// order of the instances' names.
    pub fn plan(&mut self, now: UnixMillis, views: &[InstanceView], pools: &[Pool]) -> Plan {
        let mut views: Vec<&InstanceView> = views.iter().collect();
        views.sort_by(|a, b| a.instance.cmp(&b.instance));
        let by_name: BTreeMap<&str, usize> =
            pools.iter().enumerate().rev().map(|(index, pool)| (pool.name.as_str(), index)).collect();
        let link = |pool: &Pool| self.links.get(&pool.name).copied().unwrap_or(self.config.link_bytes_per_s);
        let round = Round {
            now,
            pools,
            this_host: pools.iter().position(|pool| pool.kind == PoolKind::ThisHost),
            links: pools.iter().map(link).collect(),
            config: &self.config,
            by_name: &by_name,
        };
        for view in &views {
            let memory = self.memory.entry(view.instance.clone()).or_default();
            for &kind in &view.movable {
                if let Some(index) = round.current(view, kind) {
                    memory.sits(kind, &pools[index].name, now);
                }
            }
        }

        let seen: Vec<_> = views
            .iter()
            .map(|view| Seen {
                host: view.host.as_deref(),
                cpu_pool: view.cpu_pool.as_deref(),
                cores: view.cores,
                bytes: view.resident_bytes,
            })
            .collect();
        let mut ledger = Ledger::new(pools, &by_name, self.config.headroom, &seen);
        for view in &views {
            let promise = self.promise(view, &round);
            ledger.sits(&view.instance, view.host.as_deref(), view.cpu_pool.as_deref(), promise);
            if let Some(to) = self.memory.get(&view.instance).and_then(|memory| memory.in_flight.as_deref()) {
                ledger.under_way(&view.instance, to, promise);
            }
        }

        let mut decided: Vec<Vec<Decision>> =
            views.iter().map(|view| self.decide_all(view, &round, &ledger)).collect();
        let mut order: Vec<(usize, Urgency)> = decided
            .iter()
            .enumerate()
            .filter_map(|(index, decisions)| Some((index, Urgency::of(decisions)?)))
            .collect();
        order.sort_by(|(_, a), (_, b)| a.order(b));
        let mut changed = false;
        for (index, _) in order {
            let view = views[index];
            // What was decided before others took their part, or freed it, is decided again.
            if changed {
                decided[index] = self.decide_all(view, &round, &ledger);
            }
            for decision in &decided[index] {
                if let Outcome::Move { to, .. } = &decision.outcome {
                    ledger.moves(&view.instance, to, self.promise(view, &round));
                    changed = true;
                }
            }
        }
        Plan { at: now, decisions: decided.into_iter().flatten().collect() }
    }

    fn decide_all(&self, view: &InstanceView, round: &Round<'_>, ledger: &Ledger<'_>) -> Vec<Decision> {
        let mut decisions: Vec<Decision> = Vec::new();
        for kind in [MoveKind::Cpu, MoveKind::Host].into_iter().filter(|kind| view.movable.contains(kind)) {
            let before = decisions.last().map(|decision| &decision.outcome);
            let decision = self.decide(view, kind, round, ledger, before);
            decisions.push(decision);
        }
        decisions
    }

    /// What an instance counts for against others: its forecast, or what it uses now where that is more or all there is.
    fn promise(&self, view: &InstanceView, round: &Round<'_>) -> Promise {
        let kind = if view.host.is_some() { MoveKind::Host } else { MoveKind::Cpu };
        let speed = round.current(view, kind).map_or(1.0, |index| round.pools[index].performance);
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
        view: &InstanceView,
        kind: MoveKind,
        round: &Round<'_>,
        ledger: &Ledger<'_>,
        cpu_outcome: Option<&Outcome>,
    ) -> Decision {
        let pools = round.pools;
        let mut decision = Decision {
            instance: view.instance.clone(),
            kind,
            at: round.now,
            need: None,
            crossing_in_ms: None,
            current: None,
            candidates: Vec::new(),
            left_out: 0,
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

        let own = ledger.own(&view.instance);
        let here = round.current(view, kind);
        let mut forced = false;
        if let Some(index) = here {
            let (cores, bytes) = ledger.available(index, own);
            let candidate = round.compare(&need, index, (cores, bytes), kind, None).candidate(pools);
            forced = candidate.dropped.is_some();
            decision.crossing_in_ms = self.crossing(view, &pools[index], cores, bytes, kind);
            decision.current = Some(candidate);
        }
        // Where no core set of this host is enough, this host is not, whatever its sum says.
        if kind == MoveKind::Host && cpu_outcome == Some(&(Outcome::Stay { reason: StayReason::NoPoolFits }))
        {
            forced = true;
            decision.crossing_in_ms = decision.crossing_in_ms.or_else(|| {
                let index = round.current(view, MoveKind::Cpu)?;
                let (cores, bytes) = ledger.available(index, own);
                self.crossing(view, &pools[index], cores, bytes, MoveKind::Cpu)
            });
        }

        let others = (0..pools.len())
            .filter(|&index| Some(index) != here && compare::is_candidate(&pools[index], kind));
        (decision.candidates, decision.left_out) = compare::best(others, pools, |index| {
            let busy = ledger.arrivals(index);
            round.compare(&need, index, ledger.available(index, own), kind, Some((view, busy)))
        });

        decision.outcome = if matches!(cpu_outcome, Some(Outcome::Move { .. })) {
            Outcome::Stay { reason: StayReason::OtherMoveFirst }
        } else {
            self.outcome(round.now, &decision, forced)
        };
        decision
    }

    fn outcome(&self, now: UnixMillis, decision: &Decision, forced: bool) -> Outcome {
        let stay = |reason| Outcome::Stay { reason };
        let unknown = Memory::default();
        let memory = self.memory.get(&decision.instance).unwrap_or(&unknown);
        if memory.in_flight.is_some() {
            return stay(StayReason::InFlight);
        }
        let score = decision.current.as_ref().map(|current| current.score);
        if !forced && score.is_some_and(|score| score <= self.config.threshold) {
            return stay(StayReason::UnderThreshold);
        }
        // What forces a move forces it anywhere; what is only cheaper may not lead around in a circle.
        let back_ms = |candidate: &Candidate| {
            let left = memory.left(decision.kind, &candidate.pool)?;
            let wait_ms = self.config.cool_down_ms.saturating_mul(RETURN_COOL_DOWNS);
            Some(wait_ms.saturating_sub(now.since(left))).filter(|left_ms| *left_ms > 0)
        };
        let possible = || decision.candidates.iter().filter(|candidate| candidate.dropped.is_none());
        let best = possible().find(|candidate| forced || back_ms(candidate).is_none());
        let Some(best) = best else {
            if let Some((pool, left_ms)) = possible().find_map(|c| Some((c.pool.clone(), back_ms(c)?))) {
                return stay(StayReason::JustLeft { pool, left_ms });
            }
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

/// How soon a decided move has to be made.
struct Urgency {
    forced: bool,
    crossing_ms: u64,
    gain: f64,
}

impl Urgency {
    /// Of an instance that moves, or that has to and finds no place yet.
    fn of(decisions: &[Decision]) -> Option<Self> {
        let stuck = Outcome::Stay { reason: StayReason::NoPoolFits };
        let decision = decisions.iter().find(|d| matches!(d.outcome, Outcome::Move { .. }));
        let decision = decision.or_else(|| decisions.iter().find(|d| d.outcome == stuck))?;
        let forced = !matches!(decision.outcome, Outcome::Move { forced: false, .. });
        let best = decision.candidates.first().map_or(0.0, |best| best.total);
        Some(Self {
            forced,
            crossing_ms: decision.crossing_in_ms.unwrap_or(u64::MAX),
            gain: decision.current.as_ref().map_or(0.0, |current| current.score - best),
        })
    }

    fn order(&self, other: &Self) -> std::cmp::Ordering {
        let forced = other.forced.cmp(&self.forced);
        let sooner = if self.forced { self.crossing_ms.cmp(&other.crossing_ms) } else { forced };
        forced.then(sooner).then_with(|| other.gain.total_cmp(&self.gain))
    }
}
