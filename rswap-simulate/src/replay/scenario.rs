//! What is replayed: demand, pools, and how moves go.

use std::net::{Ipv4Addr, SocketAddr};

use rswap_forecast::ForecastConfig;
use rswap_plan::{MoveKind, PlanConfig};
use rswap_types::bounds::{non_negative, positive, positive_u32, share};
use rswap_types::{Capacity, CpuSet, InstanceName, Pool, PoolKind, PoolState, THIS_HOST};
use serde::{Deserialize, Serialize};

const GIB: f64 = (1u64 << 30) as f64;

/// Why a scenario can't be replayed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScenarioError {
    /// Nothing to sit on.
    #[error("no pool is described: at least one [[pool]] is needed")]
    NoPool,
    /// Core sets are of one host, hosts are others.
    #[error("cores and hosts can't be mixed: pools are either core sets of one host, or hosts or tiers")]
    Mixed,
    /// Two pools of one name.
    #[error("the pool name {0:?} is taken")]
    Name(String),
    /// Nothing to replay.
    #[error("no instance has any demand in these traces")]
    NoDemand,
}

/// What a pool is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shape {
    /// A set of the host's cores: a move takes milliseconds.
    Cores,
    /// A host, or a storage tier: a move sends what the instance has.
    #[default]
    Host,
}

/// One `[[pool]]` of a scenario.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SimPool {
    /// Its name; of several that are alike, the beginning of theirs.
    pub name: String,
    /// What it is made of.
    #[serde(default)]
    pub kind: Shape,
    /// How many of them there are.
    #[serde(default = "one", deserialize_with = "positive_u32")]
    pub count: u32,
    /// Cores, or whatever demand is measured in.
    #[serde(deserialize_with = "positive")]
    pub cores: f64,
    /// Memory, in GiB.
    #[serde(default = "plenty", deserialize_with = "positive")]
    pub memory_gib: f64,
    /// Money per core and hour.
    #[serde(deserialize_with = "non_negative")]
    pub cost_per_core_hour: f64,
    /// Money per GiB and hour.
    #[serde(default, deserialize_with = "non_negative")]
    pub cost_per_gib_hour: f64,
    /// Speed of a core, relative to the reference core.
    #[serde(default = "reference", deserialize_with = "positive")]
    pub performance: f64,
    /// Watts when it is in use and idle.
    #[serde(default, deserialize_with = "non_negative")]
    pub idle_watts: f64,
    /// Watts when it is full.
    #[serde(default, deserialize_with = "non_negative")]
    pub full_watts: f64,
}

fn one() -> u32 {
    1
}

fn reference() -> f64 {
    1.0
}

fn plenty() -> f64 {
    1e6
}

/// How moves go.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MoveModel {
    /// Share of the moves that fail at their end: the instance stays where it was.
    #[serde(deserialize_with = "share")]
    pub failures: f64,
    /// Share of its memory that an instance writes per second.
    #[serde(deserialize_with = "share")]
    pub written_per_s: f64,
    /// Memory of an instance whose trace says nothing of it, in GiB.
    #[serde(deserialize_with = "positive")]
    pub memory_gib: f64,
    /// What decides which moves fail.
    pub seed: u64,
}

impl Default for MoveModel {
    fn default() -> Self {
        Self { failures: 0.01, written_per_s: 0.005, memory_gib: 1.0, seed: 1 }
    }
}

/// One instance's demand.
#[derive(Clone, Debug, PartialEq)]
pub struct Workload {
    /// Whose.
    pub name: InstanceName,
    /// Reference cores per window; NaN where nothing was measured.
    pub demand: Vec<f64>,
    /// Memory, in bytes.
    pub memory_bytes: u64,
}

/// Everything that a replay rests on.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Length of a window, in milliseconds.
    pub window_ms: u64,
    /// The instances.
    pub workloads: Vec<Workload>,
    /// The pools; for core sets, the host that they are of is the first.
    pub pools: Vec<Pool>,
    /// Watts when idle and when full, per pool.
    pub watts: Vec<(f64, f64)>,
    /// Which kind of move there is.
    pub kind: MoveKind,
    /// The planner's configuration.
    pub plan: PlanConfig,
    /// The forecaster's configuration.
    pub forecast: ForecastConfig,
    /// How moves go.
    pub moves: MoveModel,
}

impl Scenario {
    /// Puts one together.
    ///
    /// # Errors
    ///
    /// If there are no pools or no demand, or if pools don't go together.
    pub fn new(
        window_ms: u64,
        workloads: Vec<Workload>,
        described: &[SimPool],
        (plan, forecast, moves): (PlanConfig, ForecastConfig, MoveModel),
    ) -> Result<Self, ScenarioError> {
        let first = described.first().ok_or(ScenarioError::NoPool)?;
        if described.iter().any(|pool| pool.kind != first.kind) {
            return Err(ScenarioError::Mixed);
        }
        if !workloads.iter().any(|workload| workload.demand.iter().any(|demand| *demand > 0.0)) {
            return Err(ScenarioError::NoDemand);
        }
        let (mut pools, mut watts) = (Vec::new(), Vec::new());
        let mut cpus = 0..;
        for one in described {
            for number in 0..one.count {
                let name = if one.count == 1 { one.name.clone() } else { format!("{}-{number}", one.name) };
                if pools.iter().any(|pool: &Pool| pool.name == name) {
                    return Err(ScenarioError::Name(name));
                }
                let kind = match one.kind {
                    Shape::Cores => {
                        let set: CpuSet = cpus.by_ref().take(one.cores.ceil() as usize).collect();
                        PoolKind::Cpu { cpus: set, instance_cores: None, slowdown: Default::default() }
                    }
                    Shape::Host => PoolKind::Host { address: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)) },
                };
                pools.push(Pool {
                    name,
                    kind,
                    capacity: Capacity { cores: one.cores, memory_bytes: (one.memory_gib * GIB) as u64 },
                    used: Capacity::default(),
                    cost_per_core_hour: one.cost_per_core_hour,
                    cost_per_gib_hour: one.cost_per_gib_hour,
                    performance: one.performance,
                    state: PoolState::Ready,
                });
                watts.push((one.idle_watts, one.full_watts));
            }
        }
        let kind = match first.kind {
            Shape::Host => MoveKind::Host,
            Shape::Cores => {
                let cores = pools.iter().map(|pool| pool.capacity.cores).sum();
                let host = Pool {
                    name: THIS_HOST.to_owned(),
                    kind: PoolKind::ThisHost,
                    capacity: Capacity { cores, memory_bytes: u64::MAX >> 1 },
                    ..pools[0].clone()
                };
                pools.insert(0, host);
                watts.insert(0, (0.0, 0.0));
                MoveKind::Cpu
            }
        };
        Ok(Self { window_ms, workloads, pools, watts, kind, plan, forecast, moves })
    }

    /// Windows that it lasts.
    pub fn windows(&self) -> usize {
        self.workloads.iter().map(|workload| workload.demand.len()).max().unwrap_or(0)
    }

    /// Demand of instance number `instance` in a window, if it is there.
    pub fn demand(&self, instance: usize, window: usize) -> Option<f64> {
        self.workloads[instance].demand.get(window).copied().filter(|demand| demand.is_finite())
    }

    /// Numbers of the pools that an instance can sit on.
    pub fn sites(&self) -> std::ops::Range<usize> {
        usize::from(self.kind == MoveKind::Cpu)..self.pools.len()
    }
}
