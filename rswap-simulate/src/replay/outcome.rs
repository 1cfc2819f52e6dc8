//! What a replay came to.

use rswap_plan::MovePrice;
use serde::{Deserialize, Serialize};

use super::{Focus, Scenario};

/// What one policy came to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Which policy.
    pub policy: String,
    /// Money, all in all: what was used, the moves, and the violations.
    pub money: f64,
    /// Of it, for cores and memory in use.
    pub money_used: f64,
    /// Of it, for moves: bytes sent, both places paid for, standing still.
    pub money_moves: f64,
    /// Of it, for violations.
    pub money_violations: f64,
    /// Energy, in kWh, where pools have watts.
    pub kwh: Option<f64>,
    /// Share of the instances' windows in which they got less than they demanded.
    pub violations: f64,
    /// Reference core hours that were demanded and not given.
    pub missing_core_hours: f64,
    /// Moves, done, failed or under way at the end.
    pub moves: u64,
    /// Of them, failed.
    pub failed: u64,
    /// Moves back to a pool that was left within the hour before.
    pub ping_pongs: u64,
    /// Money above the oracle's.
    pub regret: f64,
}

/// Sums per window.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Timeline {
    /// Demand of all, in reference cores.
    pub demand: Vec<f32>,
    /// What all got, in reference cores.
    pub served: Vec<f32>,
    /// Money per hour.
    pub money_per_hour: Vec<f32>,
}

/// All policies next to each other.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Length of a window, in milliseconds.
    pub window_ms: u64,
    /// How many.
    pub windows: usize,
    /// Names of the pools.
    pub pools: Vec<String>,
    /// One per policy; the oracle is the last.
    pub rows: Vec<Row>,
    /// In the order of the rows.
    pub timelines: Vec<Timeline>,
    /// Instances that moved most, window by window.
    pub focus: Vec<Focus>,
}

/// Sums while a replay goes on.
pub(super) struct Account {
    pub(super) row: Row,
    timeline: Timeline,
    price_of_missing: f64,
    hours: f64,
    seen: u64,
    violated: u64,
    kwh: f64,
    window: (f64, f64, f64),
}

/// What is less than demanded by so little is rounding.
const ROUNDING: f64 = 1e-9;

impl Account {
    pub(super) fn new(policy: &str, scenario: &Scenario) -> Self {
        Self {
            row: Row { policy: policy.to_owned(), ..Row::default() },
            timeline: Timeline::default(),
            price_of_missing: scenario.plan.violation_cost_per_core_hour,
            hours: scenario.window_ms as f64 / 3_600_000.0,
            seen: 0,
            violated: 0,
            kwh: 0.0,
            window: (0.0, 0.0, 0.0),
        }
    }

    /// A move has ended.
    pub(super) fn moved(&mut self, done: bool) {
        self.row.moves += 1;
        self.row.failed += u64::from(!done);
    }

    /// A move has begun.
    pub(super) fn began(&mut self, price: &MovePrice) {
        self.row.money_moves += price.money;
    }

    /// One instance in one window: what it demanded and got, in reference cores.
    pub(super) fn served(
        &mut self,
        scenario: &Scenario,
        instance: usize,
        at: usize,
        target: Option<usize>,
        (demand, used): (f64, f64),
    ) {
        let gib = scenario.workloads[instance].memory_bytes as f64 / (1u64 << 30) as f64;
        let cost = |pool: usize| {
            let pool = &scenario.pools[pool];
            (used / pool.performance * pool.cost_per_core_hour + gib * pool.cost_per_gib_hour) * self.hours
        };
        // The price of a move that ends before the next window has the target in it; a longer one is paid for here.
        let money = cost(at) + target.map_or(0.0, cost);
        self.row.money_used += money;
        self.seen += 1;
        if used < demand * (1.0 - ROUNDING) {
            self.violated += 1;
            self.row.missing_core_hours += (demand - used) * self.hours;
        }
        self.window = (self.window.0 + demand, self.window.1 + used, self.window.2 + money);
    }

    /// The window ends.
    pub(super) fn window(&mut self, scenario: &Scenario, at: &[usize], used: &[Option<f64>]) {
        let mut load: Vec<Option<f64>> = vec![None; scenario.pools.len()];
        for (&pool, used) in at.iter().zip(used) {
            if let Some(used) = used {
                *load[pool].get_or_insert(0.0) += used / scenario.pools[pool].performance;
            }
        }
        for ((load, pool), (idle, full)) in load.iter().zip(&scenario.pools).zip(&scenario.watts) {
            // Nobody there: it is off.
            if let Some(load) = load {
                let watts = idle + (full - idle) * (load / pool.capacity.cores).min(1.0);
                self.kwh += watts * self.hours / 1000.0;
            }
        }
        self.close();
    }

    /// A window of the oracle's.
    pub(super) fn bound(&mut self, demand: f64, served: f64, money: f64) {
        self.row.money_used += money;
        self.row.missing_core_hours += (demand - served).max(0.0) * self.hours;
        self.window = (demand, served, money);
        self.close();
    }

    fn close(&mut self) {
        let (demand, served, money) = std::mem::take(&mut self.window);
        self.timeline.demand.push(demand as f32);
        self.timeline.served.push(served as f32);
        self.timeline.money_per_hour.push((money / self.hours) as f32);
    }

    pub(super) fn end(mut self, scenario: &Scenario) -> (Row, Timeline) {
        let row = &mut self.row;
        row.violations = if self.seen > 0 { self.violated as f64 / self.seen as f64 } else { 0.0 };
        row.money_violations = row.missing_core_hours * self.price_of_missing;
        row.money = row.money_used + row.money_moves + row.money_violations;
        row.kwh = scenario.watts.iter().any(|(_, full)| *full > 0.0).then_some(self.kwh);
        (self.row, self.timeline)
    }
}
