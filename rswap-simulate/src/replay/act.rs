//! The production forecast and the production planner.

use std::collections::BTreeMap;

use rswap_forecast::{Forecaster, Observation, Quantile, Resource, Usage};
use rswap_plan::{InstanceView, Outcome, PlanConfig, Planner};
use rswap_types::{InstanceName, UnixMillis};

use super::{Focus, Forecast, MoveMark, Policy, Scenario, Start, View, run::view_of};

/// Instances that are kept window by window.
const KEPT: usize = 12;

/// What an agent in mode `act` does.
pub struct Act {
    name: String,
    forecaster: Forecaster,
    planner: Planner,
    instances: BTreeMap<InstanceName, usize>,
    pools: BTreeMap<String, usize>,
    focus: Vec<Focus>,
}

impl Act {
    /// With the scenario's configuration, and another quantile of the need that must be met.
    pub fn new(scenario: &Scenario, quantile: Quantile) -> Self {
        let config = PlanConfig { quantile, ..scenario.plan.clone() };
        let percent = match quantile {
            Quantile::P50 => 50,
            Quantile::P90 => 90,
            Quantile::P95 => 95,
            Quantile::P99 => 99,
        };
        let names = scenario.workloads.iter().map(|workload| workload.name.clone());
        let focus = scenario.workloads.iter().map(|workload| Focus::new(workload.name.to_string()));
        Self {
            name: format!("act p{percent}"),
            forecaster: Forecaster::new(scenario.forecast.clone(), scenario.window_ms),
            planner: Planner::new(config).with_windows(scenario.window_ms),
            instances: names.enumerate().map(|(number, name)| (name, number)).collect(),
            pools: scenario
                .pools
                .iter()
                .enumerate()
                .map(|(number, pool)| (pool.name.clone(), number))
                .collect(),
            focus: focus.collect(),
        }
    }

    /// The instances that moved most, window by window.
    pub fn into_focus(self) -> Vec<Focus> {
        let mut focus = self.focus;
        focus.sort_by_key(|one| std::cmp::Reverse(one.moves.len()));
        focus.truncate(KEPT);
        focus
    }
}

impl Policy for Act {
    fn name(&self) -> &str {
        &self.name
    }

    fn decide(&mut self, view: &View<'_>) -> Vec<Start> {
        let View { scenario, now, .. } = *view;
        let mut pools = scenario.pools.clone();
        let mut views = Vec::new();
        for (instance, &used) in view.used.iter().enumerate() {
            let Some(used) = used else { continue };
            let (workload, at) = (&scenario.workloads[instance], view.at[instance]);
            self.forecaster.observe(&Observation {
                instance: &workload.name,
                at: now,
                usage: Usage {
                    reference_cores: used,
                    memory_bytes: workload.memory_bytes as f64,
                    ..Usage::default()
                },
            });
            let cores = used / pools[at].performance;
            pools[at].used.cores += cores;
            pools[at].used.memory_bytes += workload.memory_bytes;
            if let Some(demand) = self.forecaster.demand(&workload.name, now) {
                let of = |horizon: usize| {
                    let cpu = demand.points.iter().filter(|point| point.resource == Resource::Cpu);
                    cpu.take(horizon + 1).last().map(|point| point.need)
                };
                self.focus[instance].seen(
                    view.window,
                    scenario.demand(instance, view.window),
                    used,
                    at,
                    of(0),
                );
                views.push(InstanceView { demand, cores, ..view_of(scenario, instance, at) });
            }
        }
        if scenario.sites().start == 1 {
            pools[0].used.cores = pools[1..].iter().map(|pool| pool.used.cores).sum();
        }
        let plan = self.planner.plan(now, &views, &pools);
        // As the agent does: what would be late if it waited for the next window begins now.
        let next = UnixMillis(now.0 + scenario.window_ms);
        let mut starts = Vec::new();
        for decision in &plan.decisions {
            let Outcome::Move { to, start_by, forced } = &decision.outcome else { continue };
            if *start_by > next {
                continue;
            }
            let (instance, to) = (self.instances[&decision.instance], self.pools[to]);
            self.planner.started(&decision.instance, &scenario.pools[to].name);
            self.focus[instance].moves.push(MoveMark {
                window: view.window,
                to,
                forced: *forced,
                done: None,
            });
            starts.push(Start { instance, to, forced: *forced });
        }
        starts
    }

    fn ended(&mut self, instance: usize, done: bool, view: &View<'_>) {
        let name = &view.scenario.workloads[instance].name;
        match done {
            true => self.planner.moved(name, view.scenario.kind, view.now),
            false => self.planner.failed(name, view.scenario.kind, view.now),
        }
        if let Some(mark) = self.focus[instance].moves.last_mut() {
            mark.done = Some(done);
        }
    }
}

impl Focus {
    fn new(instance: String) -> Self {
        Self { instance, ..Self::default() }
    }

    fn seen(
        &mut self,
        window: usize,
        demand: Option<f64>,
        used: f64,
        pool: usize,
        next: Option<rswap_forecast::Quantiles>,
    ) {
        self.windows.push(window);
        self.demand.push(demand.unwrap_or(f64::NAN) as f32);
        self.used.push(used as f32);
        self.pool.push(pool);
        self.forecast.push(next.map(|need| Forecast {
            p50: need.p50 as f32,
            p95: need.p95 as f32,
            p99: need.p99 as f32,
        }));
    }
}
