//! The replay itself.

#![allow(clippy::needless_range_loop, reason = "an instance's number leads into several arrays")]

use rswap_forecast::ForecastConfig;
use rswap_plan::{InstanceView, MoveKind, MovePrice, PlanConfig};
use rswap_types::{Pool, UnixMillis};

use super::{
    Report, Scenario, Shape,
    outcome::{Account, Row, Timeline},
};

/// Windows within which a move back to a pool counts as a ping-pong: an hour of five-minute windows.
pub(super) const BACK_WITHIN: usize = 12;

/// What a policy is shown at the end of a window.
pub struct View<'a> {
    /// What is replayed.
    pub scenario: &'a Scenario,
    /// Number of the window that has ended.
    pub window: usize,
    /// When it ended.
    pub now: UnixMillis,
    /// The pool that each instance sits on.
    pub at: &'a [usize],
    /// What each used in the window, in reference cores; `None` for who wasn't there.
    pub used: &'a [Option<f64>],
    /// Where each is on its way to.
    pub going: &'a [Option<usize>],
}

/// A move that a policy begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// Which instance.
    pub instance: usize,
    /// To which pool.
    pub to: usize,
    /// Whether its need forced it.
    pub forced: bool,
}

/// Decides which moves begin.
pub trait Policy {
    /// What it is called.
    fn name(&self) -> &str;
    /// The moves that begin now.
    fn decide(&mut self, view: &View<'_>) -> Vec<Start>;
    /// A move has ended, well or badly.
    fn ended(&mut self, instance: usize, done: bool, view: &View<'_>);
}

/// Where everything is put at first: by its peak, the biggest first, on the fastest pool that has room for all peaks on it; where
/// none has, on the one with most room. That is what is done where nothing can be moved later.
#[derive(Clone, Debug)]
pub struct Placement(pub Vec<usize>);

impl Placement {
    /// Of a scenario.
    pub fn by_peak(scenario: &Scenario) -> Self {
        let peaks: Vec<f64> = scenario
            .workloads
            .iter()
            .map(|workload| workload.demand.iter().copied().filter(|d| d.is_finite()).fold(0.0, f64::max))
            .collect();
        let mut free: Vec<f64> =
            scenario.pools.iter().map(|pool| pool.capacity.cores * pool.performance).collect();
        let mut order: Vec<usize> = (0..peaks.len()).collect();
        order.sort_by(|&a, &b| peaks[b].total_cmp(&peaks[a]));
        let mut at = vec![0; peaks.len()];
        for instance in order {
            let peak = peaks[instance];
            let fits = scenario.sites().filter(|&site| free[site] >= peak);
            // Of those that are equally fast the fullest, so that few are in use.
            let rank = |site: usize| (scenario.pools[site].performance, -free[site]);
            let best =
                fits.max_by(|&a, &b| rank(a).partial_cmp(&rank(b)).unwrap_or(std::cmp::Ordering::Equal));
            let site = best.or_else(|| scenario.sites().max_by(|&a, &b| free[a].total_cmp(&free[b])));
            at[instance] = site.unwrap_or_default();
            free[at[instance]] -= peak;
        }
        Self(at)
    }
}

/// A move that is under way.
#[derive(Clone, Copy, Debug)]
struct UnderWay {
    to: usize,
    ends: usize,
    price: MovePrice,
}

/// Replays the scenario with each policy, from the same first placement.
pub fn simulate(scenario: &Scenario, first: &Placement, policies: &mut [&mut dyn Policy]) -> Report {
    let (bound, bound_timeline) = oracle(scenario);
    let mut report = Report {
        window_ms: scenario.window_ms,
        windows: scenario.windows(),
        pools: scenario.pools.iter().map(|pool| pool.name.clone()).collect(),
        ..Report::default()
    };
    for policy in policies {
        let (mut row, timeline) = replay(scenario, first, *policy);
        row.regret = row.money - bound.money;
        report.rows.push(row);
        report.timelines.push(timeline);
    }
    report.rows.push(bound);
    report.timelines.push(bound_timeline);
    report
}

fn replay(scenario: &Scenario, first: &Placement, policy: &mut dyn Policy) -> (Row, Timeline) {
    let count = scenario.workloads.len();
    let mut at = first.0.clone();
    let mut moving: Vec<Option<UnderWay>> = vec![None; count];
    let mut left: Vec<Vec<(usize, usize)>> = vec![Vec::new(); count];
    let mut account = Account::new(policy.name(), scenario);
    let mut used: Vec<Option<f64>> = vec![None; count];
    for window in 0..scenario.windows() {
        let now = UnixMillis((window as u64 + 1) * scenario.window_ms);
        for instance in 0..count {
            let Some(under_way) = moving[instance].filter(|under_way| under_way.ends <= window) else {
                continue;
            };
            moving[instance] = None;
            let done = unit(scenario.moves.seed, instance as u64, window as u64) >= scenario.moves.failures;
            account.moved(done);
            if done {
                let from = std::mem::replace(&mut at[instance], under_way.to);
                let back = left[instance].iter().rev().find(|(pool, _)| *pool == under_way.to);
                account.row.ping_pongs +=
                    u64::from(back.is_some_and(|(_, when)| window - when <= BACK_WITHIN));
                left[instance].push((from, window));
            }
            let going: Vec<Option<usize>> = moving.iter().map(|m| m.map(|m| m.to)).collect();
            let began = UnixMillis(window as u64 * scenario.window_ms);
            let view = View { scenario, window, now: began, at: &at, used: &used, going: &going };
            policy.ended(instance, done, &view);
        }
        let mut wanted = vec![0.0; scenario.pools.len()];
        for (instance, &pool) in at.iter().enumerate() {
            wanted[pool] += scenario.demand(instance, window).unwrap_or(0.0);
        }
        for instance in 0..count {
            used[instance] = scenario.demand(instance, window).map(|demand| {
                let pool = &scenario.pools[at[instance]];
                let has = pool.capacity.cores * pool.performance;
                demand * (has / wanted[at[instance]]).min(1.0)
            });
            if let (Some(demand), Some(used)) = (scenario.demand(instance, window), used[instance]) {
                let target = moving[instance].map(|under_way| under_way.to);
                account.served(scenario, instance, at[instance], target, (demand, used));
            }
        }
        account.window(scenario, &at, &used);

        let going: Vec<Option<usize>> = moving.iter().map(|m| m.map(|m| m.to)).collect();
        let view = View { scenario, window, now, at: &at, used: &used, going: &going };
        for Start { instance, to, .. } in policy.decide(&view) {
            if moving[instance].is_some() || to == at[instance] {
                continue;
            }
            let price = price(scenario, instance, used[instance].unwrap_or(0.0), to);
            let windows = (price.seconds * 1000.0 / scenario.window_ms as f64 + 0.5) as usize;
            account.began(&price);
            moving[instance] = Some(UnderWay { to, ends: window + 1 + windows, price });
        }
    }
    // What is still under way has been paid for, and has not arrived.
    account.row.moves +=
        moving.iter().flatten().filter(|under_way| under_way.price.seconds >= 0.0).count() as u64;
    account.end(scenario)
}

/// What a move takes, as the planner reckons it.
fn price(scenario: &Scenario, instance: usize, used: f64, to: usize) -> MovePrice {
    let view = InstanceView { cores: used, ..view_of(scenario, instance, to) };
    let pool = &scenario.pools[to];
    let per_hour = used / pool.performance * pool.cost_per_core_hour;
    rswap_plan::price_of_move(scenario.kind, &view, per_hour, scenario.plan.link_bytes_per_s, &scenario.plan)
}

/// An instance as the planner sees it, without forecast and use.
pub(super) fn view_of(scenario: &Scenario, instance: usize, at: usize) -> InstanceView {
    let workload = &scenario.workloads[instance];
    let pool = Some(scenario.pools[at].name.clone());
    let (host, cpu_pool) = if scenario.kind == MoveKind::Host { (pool, None) } else { (None, pool) };
    InstanceView {
        instance: workload.name.clone(),
        host,
        cpu_pool,
        demand: rswap_forecast::Demand {
            instance: workload.name.clone(),
            at: UnixMillis(0),
            points: Vec::new(),
        },
        cores: 0.0,
        resident_bytes: workload.memory_bytes,
        dirty_bytes_per_s: Some(workload.memory_bytes as f64 * scenario.moves.written_per_s),
        movable: vec![scenario.kind],
        labels: Default::default(),
        volumes: Vec::new(),
        port: None,
    }
}

/// What the demand costs where it is cheapest at every moment: all of it, spread at will, without moves.
fn oracle(scenario: &Scenario) -> (Row, Timeline) {
    let mut sites: Vec<&Pool> = scenario.pools[scenario.sites()].iter().collect();
    let per_unit = |pool: &Pool| pool.cost_per_core_hour / pool.performance;
    sites.sort_by(|a, b| per_unit(a).total_cmp(&per_unit(b)));
    let cheapest_gib = sites.iter().map(|pool| pool.cost_per_gib_hour).fold(f64::MAX, f64::min);
    let mut account = Account::new("oracle", scenario);
    let hours = scenario.window_ms as f64 / 3_600_000.0;
    for window in 0..scenario.windows() {
        let (mut demand, mut gib) = (0.0, 0.0);
        for instance in 0..scenario.workloads.len() {
            if let Some(one) = scenario.demand(instance, window) {
                demand += one;
                gib += scenario.workloads[instance].memory_bytes as f64 / (1u64 << 30) as f64;
            }
        }
        let mut left = demand;
        let mut money = gib * cheapest_gib * hours;
        for pool in &sites {
            let takes = left.min(pool.capacity.cores * pool.performance);
            money += takes * per_unit(pool) * hours;
            left -= takes;
        }
        account.bound(demand, demand - left, money);
    }
    let (mut row, timeline) = account.end(scenario);
    // Which pools are on is not asked of it.
    row.kwh = None;
    (row, timeline)
}

/// A number from 0 to 1 that the arguments alone decide: SplitMix64.
fn unit(seed: u64, instance: u64, window: u64) -> f64 {
    let mut z =
        seed ^ instance.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ window.wrapping_mul(0xd1b5_4a32_d192_ed03);
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

/// The planner's configuration for replays: as far ahead as moves of this kind need, in windows of this length. A core set is left as
/// quickly as it is entered; a host is chosen for an hour.
pub fn plan_for(kind: Shape, window_ms: u64) -> PlanConfig {
    let (horizon_ms, cool_down_ms) = match kind {
        Shape::Cores => (2 * window_ms, window_ms),
        Shape::Host => (12 * window_ms, 3 * window_ms),
    };
    PlanConfig {
        horizon_ms,
        cool_down_ms,
        hysteresis: 0.0005,
        weight: 0.0,
        correlation: 0.2,
        ..PlanConfig::default()
    }
}

/// The forecaster's configuration for replays: one, two, six and twelve windows ahead, believed after two hours of five-minute
/// windows.
pub fn forecast_for(window_ms: u64) -> ForecastConfig {
    ForecastConfig { horizons_ms: [1, 2, 6, 12].map(|windows| windows * window_ms).into(), min_seen: 24 }
}
