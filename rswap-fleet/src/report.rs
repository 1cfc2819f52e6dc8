//! What an agent says about its host.

use std::{collections::BTreeMap, net::SocketAddr};

use rswap_forecast::{Demand, DemandPoint, Kin, Lessons, Part, Resource, Usage};
use rswap_plan::InstanceView;
use rswap_types::{InstanceName, Pool, PoolKind, UnixMillis};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{HostName, Order, OrderOutcome, amounts::Sum, model::Revision};

/// Version of [`Report`] and [`Envelope`].
pub const VERSION: u32 = 1;
/// Instances in one report at most.
pub const MOST_INSTANCES: usize = 10_000;
/// Pools in one report at most.
pub const MOST_POOLS: usize = 1_000;
/// Reports in one envelope at most.
pub const MOST_REPORTS: usize = 1_000;
/// Bytes of a version, or of a boot id, at most.
pub const MOST_VERSION_BYTES: usize = 200;

/// What is taken of a host: more than any has, unless a controller is told otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the body of a call.
    pub body_bytes: usize,
    /// Instances in one report.
    pub instances: usize,
    /// Measured links in one report.
    pub links: usize,
    /// Parts of lessons in one envelope.
    pub lessons: usize,
    /// Reports in a second, over time.
    pub reports_per_s: u32,
    /// Reports that may come at once, of what was saved by reporting less often.
    pub reports_at_once: u32,
}

impl Default for Limits {
    fn default() -> Self {
        // Reports that were kept while the controller was away come many at once.
        let (reports_per_s, reports_at_once) = (20, 1_000);
        let (body_bytes, instances, links, lessons) = (32 << 20, MOST_INSTANCES, 1_000, 64);
        Self { body_bytes, instances, links, lessons, reports_per_s, reports_at_once }
    }
}

/// What a host did since its last report, and how it is now. It is kept until the controller has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Report {
    /// [`VERSION`].
    pub version: u32,
    /// Whose.
    pub host: HostName,
    /// Which spool the sequence counts in: drawn at random when one begins.
    pub epoch: u64,
    /// Counts up by one from report to report, from 1.
    pub sequence: u64,
    /// When it was made, by the host's clock.
    pub at: UnixMillis,
    /// Whether the agent carries plans and orders out (`agent.mode`).
    pub acts: bool,
    /// Where it takes migrations; `None`: nowhere that others could reach.
    #[schema(value_type = Option<String>)]
    pub address: Option<SocketAddr>,
    /// What runs there; `None`: an agent that doesn't say.
    #[serde(default)]
    pub running: Option<Running>,
    /// The host's own pools, as plans see them; other hosts are not in it.
    pub pools: Vec<Pool>,
    /// What runs there.
    pub instances: Vec<InstanceReport>,
    /// What those used since the last report that are gone from there.
    #[serde(default)]
    pub gone: BTreeMap<InstanceName, BTreeMap<Resource, Sum>>,
    /// Migrations that ended since the last report, as measurements of links.
    #[serde(default)]
    pub links: Vec<LinkMeasured>,
    /// What became of orders since the last report.
    #[serde(default)]
    pub outcomes: Vec<OrderOutcome>,
    /// Reports that had to be dropped unsent so far, in this epoch: the spool is bounded.
    #[serde(default)]
    pub dropped: u64,
}

/// Which agent it is, and in which run of its host's kernel: another one says that somebody has worked on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Running {
    /// The agent's version.
    pub version: String,
    /// The kernel's boot id.
    pub boot: String,
}

/// One instance of a report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct InstanceReport {
    /// How plans see it: its present use, and its forecast of what plans of a fleet look at.
    pub view: InstanceView,
    /// Whom it learns from, and whom it teaches.
    pub kin: Kin,
    /// What it used since the last report, per resource.
    pub used: BTreeMap<Resource, Sum>,
}

/// What a migration found of a link.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LinkMeasured {
    /// To where.
    #[schema(value_type = String)]
    pub to: SocketAddr,
    /// Bytes of memory per second.
    pub bytes_per_s: f64,
}

/// What is sent: reports, the oldest first, and what is not kept, only current.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Envelope {
    /// The reports, in the order of their sequence.
    pub reports: Vec<Report>,
    /// What this host's instances have taught, of parts that changed.
    #[serde(default)]
    pub lessons: Vec<(Part, Lessons)>,
    /// Up to where the agent knows what the others taught.
    #[serde(default)]
    pub knows: Revision,
    /// The windows and horizons, in milliseconds, that it can use lessons for.
    pub leads: (u64, Vec<u64>),
}

/// What the controller answers when all of an [`Envelope`] is stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Answer {
    /// Up to here, all reports of the epoch are stored.
    pub stored: u64,
    /// What others have taught since what the agent knows.
    #[serde(default)]
    pub lessons: Vec<(Part, Lessons)>,
    /// The agent knows this when it has taken them in.
    #[serde(default)]
    pub knows: Revision,
    /// What to do.
    #[serde(default)]
    pub orders: Vec<Order>,
    /// Whether the controller places instances: then the agent leaves that to it.
    #[serde(default)]
    pub places: bool,
}

/// Why a report can't be taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReportError {
    /// Another release.
    #[error("the report has version {0}, this release knows {VERSION}")]
    Version(u32),
    /// More than any host has.
    #[error("the report has {0} {1}, at most {2} are taken")]
    Many(usize, &'static str, usize),
    /// It is a number that can't be.
    #[error("the report's {0} is none")]
    Number(&'static str),
    /// Two that are to differ are the same.
    #[error("the report has two {0} of one name")]
    Twice(&'static str),
    /// Somebody else's.
    #[error("the report is of host {0}, and comes from {1}")]
    Foreign(HostName, String),
}

impl Report {
    /// Whether it can be taken as it is: it came from elsewhere.
    ///
    /// # Errors
    ///
    /// If it is of another version, has too much in it, names something twice, or a number in it is none.
    pub fn check(&self, limits: &Limits) -> Result<(), ReportError> {
        if self.version != VERSION {
            return Err(ReportError::Version(self.version));
        }
        if self.sequence == 0 {
            return Err(ReportError::Number("sequence"));
        }
        let many = |count: usize, what, most| match count > most {
            true => Err(ReportError::Many(count, what, most)),
            false => Ok(()),
        };
        many(self.instances.len(), "instances", limits.instances)?;
        // Those that ended between two reports.
        many(self.gone.len(), "instances that are gone", limits.instances)?;
        many(self.pools.len(), "pools", MOST_POOLS)?;
        many(self.links.len(), "links", limits.links)?;
        many(self.outcomes.len(), "outcomes", limits.instances)?;
        if let Some(Running { version, boot }) = &self.running {
            many(version.len().max(boot.len()), "bytes of a version", MOST_VERSION_BYTES)?;
        }
        let twice = |names: Vec<&str>, what| {
            let distinct: std::collections::BTreeSet<_> = names.iter().collect();
            if distinct.len() < names.len() { Err(ReportError::Twice(what)) } else { Ok(()) }
        };
        twice(self.pools.iter().map(|pool| pool.name.as_str()).collect(), "pools")?;
        twice(self.instances.iter().map(|one| one.view.instance.as_str()).collect(), "instances")?;
        let amount = |number: f64| number.is_finite() && number >= 0.0;
        for pool in &self.pools {
            let numbers =
                [pool.capacity.cores, pool.used.cores, pool.cost_per_core_hour, pool.cost_per_gib_hour];
            let speed = amount(pool.performance) && pool.performance > 0.0;
            if !(speed && numbers.into_iter().all(amount)) {
                return Err(ReportError::Number("pool"));
            }
        }
        for InstanceReport { view, .. } in &self.instances {
            let need = |point: &DemandPoint| {
                let need = point.need;
                [need.p50, need.p90, need.p95, need.p99].into_iter().all(f64::is_finite)
            };
            let dirty = view.dirty_bytes_per_s.is_none_or(amount);
            if !amount(view.cores) || !dirty || !view.demand.points.iter().all(need) {
                return Err(ReportError::Number("instance"));
            }
        }
        match self.links.iter().all(|link| amount(link.bytes_per_s)) {
            true => Ok(()),
            false => Err(ReportError::Number("link")),
        }
    }
}

/// What plans of a fleet look at, of a view and a forecast: volumes, ports, and the needs that only plans of a host know are left
/// out, as they would be most of a report.
pub fn view_for_fleet(view: &InstanceView) -> InstanceView {
    let looked_at = |point: &&DemandPoint| matches!(point.resource, Resource::Cpu | Resource::Memory);
    let points = view.demand.points.iter().filter(looked_at).cloned().collect();
    InstanceView {
        demand: Demand { points, ..view.demand.clone() },
        volumes: Vec::new(),
        port: None,
        ..view.clone()
    }
}

/// The pools of a report: the host's own.
pub fn pools_for_fleet(pools: &[Pool]) -> Vec<Pool> {
    pools.iter().filter(|pool| !matches!(pool.kind, PoolKind::Host { .. })).cloned().collect()
}

/// What instances used since the last report.
#[derive(Clone, Debug, Default)]
pub struct Used(BTreeMap<InstanceName, BTreeMap<Resource, Sum>>);

impl Used {
    /// Takes in a window.
    pub fn window(&mut self, instance: &InstanceName, usage: &Usage) {
        let of = self.0.entry(instance.clone()).or_default();
        for resource in Resource::ALL {
            if let Some(amount) = usage.of(resource) {
                of.entry(resource).or_default().add(resource, amount);
            }
        }
    }

    /// Takes out what an instance used; nothing is left of it.
    pub fn take(&mut self, instance: &InstanceName) -> BTreeMap<Resource, Sum> {
        self.0.remove(instance).unwrap_or_default()
    }

    /// Takes out what those used that are left: they went since the last report.
    pub fn take_rest(&mut self) -> BTreeMap<InstanceName, BTreeMap<Resource, Sum>> {
        std::mem::take(&mut self.0)
    }
}
