//! One round of planning, and the little that must be remembered between rounds.

use std::collections::{BTreeMap, VecDeque};

use rswap_forecast::Moments;
use rswap_types::{InstanceName, Pool, PoolKind, UnixMillis};

use crate::{
    Candidate, Decision, Dropped, InstanceView, MoveKind, Outcome, Plan, PlanConfig, StayReason,
    compare::Round,
    lead::Durations,
    ledger::{Ledger, Promise, Seen},
    memory::Memory,
    need, order,
    rank::{self, Rank, Ranking},
    rules::{self, Groups},
    urgency::Urgency,
};

/// Shortest wait after a failure, in milliseconds.
const MIN_BACK_OFF_MS: u64 = 1_000;

/// Unforced, an instance does not return to a pool within so many cool-downs of leaving it, on whatever way.
const RETURN_COOL_DOWNS: u64 = 10;

/// How long moves count against a host's budget, in milliseconds.
const HOUR_MS: u64 = 3_600_000;

/// Decides. Time, instances and pools come in; nothing else is looked at.
#[derive(Clone, Debug)]
pub struct Planner {
    pub(crate) config: PlanConfig,
    pub(crate) memory: BTreeMap<InstanceName, Memory>,
    /// What is remembered of parts that move by themselves, by [`crate::flow::key`].
    pub(crate) parts: BTreeMap<InstanceName, BTreeMap<String, Memory>>,
    /// Bytes of memory per second to a host, by the host pool's name, as the last migration there found it.
    pub(crate) links: BTreeMap<String, f64>,
    /// When moves to and from a host ended, by the host pool's name; newest last.
    pub(crate) hours: BTreeMap<String, VecDeque<UnixMillis>>,
    pub(crate) durations: Durations,
    /// Length of a window, in milliseconds.
    pub(crate) window_ms: u64,
    /// [`Planner::brief`].
    brief: bool,
}

impl Planner {
    /// A planner that remembers nothing yet.
    pub fn new(config: PlanConfig) -> Self {
        let (memory, parts, links, hours, durations) = Default::default();
        Self { config, memory, parts, links, hours, durations, window_ms: 0, brief: false }
    }

    /// Of decisions that move nothing, the present pool and the best other one are kept, and how many others were compared: nearly all
    /// instances of a large fleet stay, and the other pools of them all would be most of what a plan takes.
    #[must_use]
    pub fn brief(self) -> Self {
        Self { brief: true, ..self }
    }

    /// A move has begun: until [`Planner::moved`] or [`Planner::failed`] the instance is left alone, and its place at
    /// the target is kept.
    pub fn started(&mut self, instance: &InstanceName, to: &str) {
        self.memory.entry(instance.clone()).or_default().started(to);
    }

    /// A move is done. The cool-down counts for both kinds.
    pub fn moved(&mut self, instance: &InstanceName, kind: MoveKind, now: UnixMillis) {
        self.spend(instance, kind, now);
        self.memory.entry(instance.clone()).or_default().moved(now);
    }

    /// A move has failed: the next try waits, twice as long after each failure in a row.
    pub fn failed(&mut self, instance: &InstanceName, kind: MoveKind, now: UnixMillis) {
        self.spend(instance, kind, now);
        self.memory.entry(instance.clone()).or_default().failed(now);
    }

    /// A move, done or failed, used the budget of both its hosts.
    fn spend(&mut self, instance: &InstanceName, kind: MoveKind, now: UnixMillis) {
        let Some(memory) = self.memory.get(instance).filter(|_| kind == MoveKind::Host) else { return };
        for host in [memory.in_flight.as_deref(), memory.sits_on(kind)].into_iter().flatten() {
            self.hours.entry(host.to_owned()).or_default().push_back(now);
        }
    }

    pub(crate) fn memory(&self, instance: &InstanceName) -> Option<&Memory> {
        self.memory.get(instance)
    }

    /// How long after leaving a pool an instance does not return to it unless it must.
    pub(crate) fn return_ms(&self) -> u64 {
        self.config.cool_down_ms.saturating_mul(RETURN_COOL_DOWNS)
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
        self.parts.remove(instance);
    }

    /// All instances are gone that are not `present`.
    pub fn retain(&mut self, present: impl Fn(&InstanceName) -> bool) {
        self.memory.retain(|name, _| present(name));
        self.parts.retain(|name, _| present(name));
        self.hours.retain(|_, ends| !ends.is_empty());
    }

    /// Decides about every instance. Who is forced to move chooses first, then who gains most; the decisions are in the
    /// order of the instances' names.
    pub fn plan(&mut self, now: UnixMillis, views: &[InstanceView], pools: &[Pool]) -> Plan {
        self.plan_by(rank::best, now, views, pools)
    }

    /// [`Planner::plan`], with the best pools found by `rank`.
    pub(crate) fn plan_by(
        &mut self,
        rank: Rank,
        now: UnixMillis,
        views: &[InstanceView],
        pools: &[Pool],
    ) -> Plan {
        let mut views: Vec<&InstanceView> = views.iter().collect();
        views.sort_by(|a, b| a.instance.cmp(&b.instance));
        let flows = self.plan_flows(now, &views, pools);
        let spots: Vec<Pool>;
        let pools = if pools.iter().any(|pool| pool.kind.is_for_flows()) {
            spots = pools.iter().filter(|pool| !pool.kind.is_for_flows()).cloned().collect();
            &spots
        } else {
            pools
        };
        let by_name: BTreeMap<&str, usize> =
            pools.iter().enumerate().rev().map(|(index, pool)| (pool.name.as_str(), index)).collect();
        let link = |pool: &Pool| self.links.get(&pool.name).copied().unwrap_or(self.config.link_bytes_per_s);
        for ends in self.hours.values_mut() {
            while ends.front().is_some_and(|at| now.since(*at) >= HOUR_MS) {
                ends.pop_front();
            }
        }
        let spent = |pool: &Pool| self.hours.get(&pool.name).map_or(0, |ends| ends.len() as u32);
        let mut round = Round {
            now,
            pools,
            this_host: pools.iter().position(|pool| pool.kind == PoolKind::ThisHost),
            links: pools.iter().map(link).collect(),
            config: &self.config,
            by_name: &by_name,
            last_hour: pools.iter().map(spent).collect(),
            groups: Groups::default(),
            rank,
        };
        for view in &views {
            let memory = self.memory.entry(view.instance.clone()).or_default();
            memory.writes(view.dirty_bytes_per_s);
            let files = view.volumes.iter().map(|volume| volume.size_bytes).fold(0, u64::saturating_add);
            memory.bytes = view.resident_bytes.saturating_add(files);
            if !view.labels.is_empty() {
                let going = memory.in_flight.as_deref().and_then(|to| by_name.get(to).copied());
                let going = going.filter(|&index| pools[index].cpus().is_none());
                if let Some(host) = going.or_else(|| round.current(view, MoveKind::Host)) {
                    round.groups.set(view, host);
                }
            }
            for &kind in &view.movable {
                if let Some(index) = round.current(view, kind) {
                    memory.sits(kind, &pools[index].name, now);
                }
            }
        }

        let seen = views.iter().map(|view| Seen {
            host: view.host.as_deref(),
            cpu_pool: view.cpu_pool.as_deref(),
            cores: view.cores,
            bytes: view.resident_bytes,
        });
        let mut ledger = Ledger::new(pools, &by_name, &self.config, seen);
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
                    if let Some(&host) = by_name.get(to.as_str()).filter(|_| decision.kind == MoveKind::Host)
                    {
                        round.groups.set(view, host);
                    }
                    changed = true;
                }
            }
        }
        self.exchange(&views, &mut decided, &mut round, &mut ledger);
        for decision in decided.iter().flatten() {
            let Some(memory) = self.memory.get_mut(&decision.instance) else { continue };
            memory.comes(decision.kind, decision.crossing_by);
            if decision.kind == MoveKind::Host {
                memory.wanted = if decision.moves() { memory.wanted.or(Some(now)) } else { None };
            }
        }
        drop(ledger);
        let count: usize = decided.iter().chain(&flows).map(Vec::len).sum();
        let mut all = Vec::with_capacity(count);
        for (mut decisions, flows) in decided.into_iter().zip(flows) {
            decisions.extend(flows);
            order::put_in_order(&mut decisions, now, self.window_ms);
            if self.brief {
                decisions.iter_mut().for_each(Decision::abridge);
            }
            all.append(&mut decisions);
        }
        Plan { at: now, decisions: all }
    }

    fn decide_all(&self, view: &InstanceView, round: &Round<'_, '_>, ledger: &Ledger<'_>) -> Vec<Decision> {
        let kinds =
            || [MoveKind::Cpu, MoveKind::Host].into_iter().filter(move |kind| view.movable.contains(kind));
        // A decision is large, and a vector that grows makes room for four.
        let mut decisions: Vec<Decision> = Vec::with_capacity(kinds().count());
        for kind in kinds() {
            let before = decisions.last().map(|decision| &decision.outcome);
            let decision = self.decide(view, kind, round, ledger, before);
            decisions.push(decision);
        }
        decisions
    }

    /// What an instance counts for against others: its forecast, or what it uses now where that is more or all there is.
    pub(crate) fn promise(&self, view: &InstanceView, round: &Round<'_, '_>) -> Promise {
        let kind = if view.host.is_some() { MoveKind::Host } else { MoveKind::Cpu };
        let speed = round.current(view, kind).map_or(1.0, |index| round.pools[index].performance);
        let need = need::need(view, &self.config).ok();
        let now = view.cores * speed;
        let limit = need.map_or(0.0, |need| need.limit_cores).max(now);
        let expected = need.map_or(limit, |need| Moments::of(&need.cores).mean.min(limit));
        Promise {
            expected_cores: expected,
            spread_cores: limit - expected,
            bytes: need.map_or(0, |need| need.limit_bytes).max(view.resident_bytes),
        }
    }

    fn decide(
        &self,
        view: &InstanceView,
        kind: MoveKind,
        round: &Round<'_, '_>,
        ledger: &Ledger<'_>,
        cpu_outcome: Option<&Outcome>,
    ) -> Decision {
        let pools = round.pools;
        let mut decision = Decision::undecided(view, kind, round.now, &self.config);
        let need = match need::need(view, &self.config) {
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
        let mut left_for_others = Vec::new();
        let unknown = Memory::default();
        let memory = self.memory.get(&view.instance).unwrap_or(&unknown);
        let mut crossing = None;
        if let Some(index) = here {
            let room = ledger.kept(index, own);
            let forbidden = round.groups.forbids(view, index, pools, kind);
            let candidate = round.compare(&need, index, room, kind, None).but(forbidden).candidate(pools);
            forced = candidate.dropped.is_some();
            crossing = need::crossing(view, &pools[index], &room, kind, &self.config);
            let short = matches!(candidate.dropped, Some(Dropped::Cores { .. }));
            if short && kind == MoveKind::Cpu && candidate.terms.limit_cores <= room.without_others {
                left_for_others = self.just_left(view, kind, round.now);
            }
            decision.current = Some(candidate);
        }
        // Where no core set of this host is enough, this host is not, whatever its sum says.
        if kind == MoveKind::Host && cpu_outcome == Some(&(Outcome::Stay { reason: StayReason::NoPoolFits }))
        {
            forced = true;
            crossing = crossing.or_else(|| {
                let index = round.current(view, MoveKind::Cpu)?;
                let room = ledger.kept(index, own);
                need::crossing(view, &pools[index], &room, MoveKind::Cpu, &self.config)
            });
        }
        decision.crosses(crossing, memory.coming(kind));

        let from = here.filter(|_| kind == MoveKind::Host);
        let no_leave = from.and_then(|index| round.link_budget(index, ledger.traffic(index)));
        let left_for_others = &left_for_others;
        let ranking =
            Ranking { round, ledger, view, need: &need, kind, own, here, no_leave, left_for_others };
        (decision.candidates, decision.left_out) = (round.rank)(&ranking);

        decision.outcome = if rules::stays(view) {
            Outcome::Stay { reason: StayReason::ToldToStay }
        } else if matches!(cpu_outcome, Some(Outcome::Move { .. })) {
            Outcome::Stay { reason: StayReason::OtherMoveFirst }
        } else {
            self.outcome(round.now, &decision, forced, memory, memory.is_in_flight())
        };
        self.set_start(&mut decision, memory);
        if kind == MoveKind::Host && decision.moves() {
            decision.writing = memory.writing();
            self.time(view, round, &mut decision);
        }
        // Who is stuck may change places with another one yet.
        if self.brief && decision.outcome != (Outcome::Stay { reason: StayReason::NoPoolFits }) {
            decision.abridge();
        }
        decision
    }

    /// That the next try waits, if one has failed a short while ago.
    pub(crate) fn back_off(&self, now: UnixMillis, memory: &Memory) -> Option<StayReason> {
        let failed_at = memory.last_failure?;
        let wait = self.config.cool_down_ms.max(MIN_BACK_OFF_MS) << memory.failures.clamp(1, 7) >> 1;
        let left_ms = wait.saturating_sub(now.since(failed_at));
        let (failures, error) = (memory.failures, memory.last_error.clone());
        (left_ms > 0).then_some(StayReason::BackOff { failures, left_ms, error })
    }

    /// The pools that it left a short while ago, and for how many milliseconds it does not return there unless it must.
    fn just_left(&self, view: &InstanceView, kind: MoveKind, now: UnixMillis) -> Vec<(String, u64)> {
        let Some(memory) = self.memory(&view.instance) else { return Vec::new() };
        let wait = |(pool, at): (&str, UnixMillis)| {
            let left_ms = self.return_ms().saturating_sub(now.since(at));
            (left_ms > 0).then(|| (pool.to_owned(), left_ms))
        };
        memory.all_left(kind).filter_map(wait).collect()
    }

    /// What follows from the numbers, for what has moved and failed as `memory` says; a move begins now ([`Planner::set_start`]).
    pub(crate) fn outcome(
        &self,
        now: UnixMillis,
        decision: &Decision,
        forced: bool,
        memory: &Memory,
        in_flight: bool,
    ) -> Outcome {
        let stay = |reason| Outcome::Stay { reason };
        if in_flight {
            return stay(StayReason::InFlight);
        }
        let score = decision.current.as_ref().map(|current| current.score);
        if !forced && score.is_some_and(|score| score <= self.config.threshold) {
            return stay(StayReason::UnderThreshold);
        }
        // What forces a move forces it anywhere; what is only cheaper may not lead around in a circle.
        let back_ms = |candidate: &Candidate| {
            let left = memory.left(decision.kind, &candidate.pool)?;
            Some(self.return_ms().saturating_sub(now.since(left))).filter(|left_ms| *left_ms > 0)
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
        if let Some(reason) = self.back_off(now, memory) {
            return stay(reason);
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
        Outcome::Move { to: best.pool.clone(), start_by: now, forced }
    }
}
