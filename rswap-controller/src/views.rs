//! Answers that are put together for a route.

use std::{collections::BTreeMap, net::SocketAddr, ops::Bound};

use rswap_fleet::{
    HostName, Order, Running,
    amounts::{self, Sum},
    inventory::Placed,
    sequence::Received,
};
use rswap_forecast::{Demand, Kin, Part, Resource};
use rswap_store::{Member, StoreError};
use rswap_types::{InstanceName, Pool, UnixMillis};
use serde::Serialize;
use utoipa::ToSchema;

use crate::{
    server::Controller,
    state::{Counts, Ended, State},
    told::AT_ONCE,
};

/// How the controller is.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Status {
    /// The controller's version.
    version: &'static str,
    /// Counts up at each of its starts.
    life: u64,
    /// `observe` or `act`.
    mode: &'static str,
    /// Now.
    at: UnixMillis,
    /// For how long it has been running, in milliseconds.
    uptime_ms: u64,
    /// How often agents report, in milliseconds.
    interval_ms: u64,
    /// Hosts that belong to the fleet.
    members: usize,
    /// Those of them that have reported.
    hosts: usize,
    /// Those of them that have not been heard for three intervals.
    hosts_away: usize,
    /// Instances that run in the fleet.
    instances: usize,
    /// What a host reports while another's last report still has it.
    unclear: Vec<Unclear>,
    /// Orders that wait for an outcome.
    orders_waiting: usize,
    /// What was counted since its start.
    counts: Counts,
}

/// An instance of which it is not clear where it runs.
#[derive(Debug, Serialize, ToSchema)]
struct Unclear {
    /// Who reports it, too.
    host: HostName,
    /// Its name there.
    local: InstanceName,
    /// Its name in the fleet.
    instance: InstanceName,
}

impl Status {
    pub(crate) fn of(controller: &Controller, state: &State, now: UnixMillis) -> Self {
        let interval_ms = controller.settings.interval_ms;
        let away =
            state.inventory.hosts().keys().filter(|host| state.inventory.is_away(host, interval_ms, now));
        let unclear = state.inventory.unclear().map(|(host, local, instance)| Unclear {
            host: host.clone(),
            local: local.clone(),
            instance: instance.clone(),
        });
        Self {
            version: env!("CARGO_PKG_VERSION"),
            life: controller.life,
            mode: if controller.settings.acts { "act" } else { "observe" },
            at: now,
            uptime_ms: now.since(controller.started),
            interval_ms,
            members: state.members.len(),
            hosts: state.inventory.hosts().len(),
            hosts_away: away.count(),
            instances: state.inventory.count(),
            unclear: unclear.collect(),
            orders_waiting: state.book.waiting().count(),
            counts: state.counts,
        }
    }
}

/// A host of the fleet. What it has not said yet is `null`.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct HostView {
    /// Its name.
    host: HostName,
    /// When it first reported.
    joined: UnixMillis,
    /// Whether it is to be left by all instances, and entered by none.
    drained: bool,
    /// Whether it has not been heard for three intervals, or since the controller's start.
    away: bool,
    /// When it was last heard, by the controller's clock.
    heard: Option<UnixMillis>,
    /// Whether its agent carries out what it is told.
    acts: Option<bool>,
    /// Where it takes migrations.
    #[schema(value_type = Option<String>)]
    address: Option<SocketAddr>,
    /// How many instances run there.
    instances: usize,
    /// Which agent it is, and in which run of the kernel.
    running: Option<Running>,
    /// Its own pools.
    pools: Option<Vec<Pool>>,
    /// The pool that stands for it as a whole.
    whole: Option<Pool>,
    /// Bytes per second that migrations from here to other addresses had.
    #[schema(value_type = Option<BTreeMap<String, f64>>)]
    links: Option<BTreeMap<SocketAddr, f64>>,
    /// Of its reports.
    reports: Reports,
}

/// How many reports of a host there were.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct Reports {
    /// Reports that were taken.
    taken: u64,
    /// Reports that never came: a full spool had dropped them.
    skipped: u64,
    /// Reports that had been taken before.
    repeated: u64,
}

impl From<&Received> for Reports {
    fn from(received: &Received) -> Self {
        Self { taken: received.taken, skipped: received.skipped, repeated: received.repeated }
    }
}

impl HostView {
    /// All members, by name; a few at a time, so that no report waits for all of them.
    pub(crate) fn all(controller: &Controller, now: UnixMillis) -> Result<Vec<Self>, StoreError> {
        let interval_ms = controller.settings.interval_ms;
        let mut all: Vec<Self> = Vec::new();
        loop {
            let part: Vec<Self> = controller.with_state(|state| {
                let from = all.last().map_or(Bound::Unbounded, |last| Bound::Excluded(&last.host));
                let part = state.members.range::<HostName, _>((from, Bound::Unbounded)).take(AT_ONCE);
                part.map(|(name, member)| Self::of(name, member, state, interval_ms, now)).collect()
            });
            if part.is_empty() {
                return Ok(all);
            }
            for mut host in part {
                host.reports = (&controller.stores.history.received(&host.host)?).into();
                all.push(host);
            }
        }
    }

    fn of(name: &HostName, member: &Member, state: &State, interval_ms: u64, now: UnixMillis) -> Self {
        let known = state.inventory.hosts().get(name);
        Self {
            host: name.clone(),
            joined: member.joined,
            drained: member.drained,
            away: state.inventory.is_away(name, interval_ms, now),
            heard: known.map(|host| host.heard),
            acts: known.map(|host| host.acts),
            address: known.and_then(|host| host.address),
            instances: known.map_or(0, |host| host.instances.len()),
            running: known.and_then(|host| host.running.clone()),
            pools: known.map(|host| host.pools.clone()),
            whole: known.and_then(|host| host.whole().cloned()),
            links: known.map(|host| host.links.clone()),
            reports: Reports::default(),
        }
    }
}

/// An instance of the fleet. What is not known of it, since its host has not said it, is `null`.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = FleetInstance)]
pub(crate) struct InstanceView {
    /// Its name in the fleet.
    pub(crate) instance: InstanceName,
    /// Where it runs.
    host: HostName,
    /// Its name there.
    local: InstanceName,
    /// Since when it runs there.
    since: Option<UnixMillis>,
    /// Whom it learns from, and whom it teaches.
    kin: Option<Kin>,
    /// Free `key=value` pairs of the user's.
    labels: Option<BTreeMap<String, String>>,
    /// Cores in use, of the pool it sits on.
    cores: Option<f64>,
    /// Memory in use, in bytes.
    resident_bytes: Option<u64>,
    /// Its last forecast, CPU in reference cores.
    demand: Option<Demand>,
}

impl InstanceView {
    pub(crate) fn of(name: &InstanceName, placed: &Placed, state: &State) -> Self {
        let report = state.inventory.report(placed);
        Self {
            instance: name.clone(),
            host: placed.host.clone(),
            local: placed.local.clone(),
            since: state.owners.get(name).map(|owner| owner.since),
            kin: report.map(|report| report.kin.clone()),
            labels: report.map(|_| state.inventory.labels(placed).cloned().unwrap_or_default()),
            cores: report.map(|report| report.view.cores),
            resident_bytes: report.map(|report| report.view.resident_bytes),
            demand: report.map(|report| report.view.demand.clone()),
        }
    }
}

/// What hosts are told to do.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Orders {
    /// Those that wait for an outcome.
    pub(crate) waiting: Vec<Order>,
    /// The last ones that have ended, the latest last.
    pub(crate) ended: Vec<Ended>,
}

/// Of how much something is known.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct KnownPart {
    /// Of what.
    pub(crate) part: Part,
    /// How many hosts have taught it.
    pub(crate) hosts: usize,
    /// From how many series of instances, those that know less in part.
    pub(crate) series: f64,
}

/// What an instance used over a report, a minute or an hour.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = HistoryRow)]
pub(crate) struct Row {
    /// When that ended.
    pub(crate) at: UnixMillis,
    /// On which host.
    pub(crate) host: HostName,
    /// Per resource; what is not known is left out.
    pub(crate) used: BTreeMap<Resource, Amounts>,
}

/// What was used of a resource, in the unit that is in its name: cores for `cpu`, bytes for `memory`.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Amounts {
    /// Windows in which it was known.
    windows: u64,
    /// The mean per window; nothing where there was none.
    mean: Option<f64>,
    /// The highest of them.
    most: f64,
}

impl Amounts {
    pub(crate) fn of(resource: Resource, sum: &Sum) -> Self {
        let most = sum.most as f64 / amounts::unit(resource);
        Self { windows: sum.count, mean: sum.mean(resource), most }
    }
}
