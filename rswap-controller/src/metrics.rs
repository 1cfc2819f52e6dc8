//! The controller's state as OpenMetrics text. A registry is built per scrape, as an agent does it: hosts that left must not linger.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::{Registry, Unit},
};
use rswap_fleet::{Action, HostName, inventory::Host, orders::OrderResult};
use rswap_store::Member;
use rswap_types::{PoolState, UnixMillis};

use crate::{
    server::Controller,
    state::{Counts, Ended, State},
};

type FloatGauge = Gauge<f64, AtomicU64>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfHost {
    host: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfOrder {
    action: &'static str,
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfStage {
    stage: &'static str,
}

/// Orders that ended since the controller's start, by what was ordered and what came of it.
#[derive(Debug, Default)]
pub(crate) struct OrderCounts(Family<OfOrder, Counter>);

impl OrderCounts {
    /// Another one has ended.
    pub(crate) fn count(&self, ended: &Ended) {
        let action = match ended.order.action {
            Action::Drain { .. } => "drain",
            Action::Migrate { .. } => "migrate",
        };
        let result = match ended.outcome.as_ref().map(|outcome| &outcome.result) {
            Some(OrderResult::Done) => "done",
            Some(OrderResult::Failed { .. }) => "failed",
            Some(OrderResult::Refused { .. }) => "refused",
            None => "expired",
        };
        self.0.get_or_create(&OfOrder { action, result }).inc();
    }
}

fn counter(value: u64) -> Counter {
    let counter: Counter = Counter::default();
    counter.inner().store(value, Relaxed);
    counter
}

fn gauge(value: f64) -> FloatGauge {
    let gauge = FloatGauge::default();
    gauge.set(value);
    gauge
}

/// What is told of the state, so that nobody waits while it is put into words.
pub(crate) struct Seen {
    counts: Counts,
    orders: Family<OfOrder, Counter>,
    orders_waiting: usize,
    instances: usize,
    members: Vec<SeenMember>,
    stages: Vec<&'static str>,
}

struct SeenMember {
    name: HostName,
    away: bool,
    drained: bool,
    host: Option<Arc<Host>>,
}

impl Seen {
    pub(crate) fn of(controller: &Controller, state: &State, now: UnixMillis) -> Self {
        let member = |(name, member): (&HostName, &Member)| SeenMember {
            name: name.clone(),
            away: state.inventory.is_away(name, controller.settings.interval_ms, now),
            drained: member.drained,
            host: state.inventory.hosts().get(name).cloned(),
        };
        let stages = state.roll.iter().flat_map(|roll| roll.stages());
        Self {
            counts: state.counts,
            orders: state.order_counts.0.clone(),
            orders_waiting: state.book.waiting().count(),
            instances: state.inventory.count(),
            members: state.members.iter().map(member).collect(),
            stages: stages.map(|(_, stage)| stage.name()).collect(),
        }
    }
}

/// All of it.
pub(crate) fn encode(controller: &Controller, seen: &Seen, now: UnixMillis) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("rswap_controller");
    let uptime_s = now.since(controller.started) as f64 / 1e3;
    registry.register_with_unit(
        "uptime",
        "Time since the controller's start",
        Unit::Seconds,
        gauge(uptime_s),
    );
    let counts = seen.counts;
    registry.register("reports", "Reports taken", counter(counts.reports_taken));
    registry.register(
        "reports_refused",
        "Reports of a host by the certificate of another",
        counter(counts.reports_foreign),
    );
    registry.register(
        "reports_hasty",
        "Calls of hosts that report more often than fleet.limits lets them",
        counter(counts.reports_hasty),
    );
    registry.register("lessons", "Parts of lessons taken", counter(counts.lessons_taken));
    registry.register(
        "lessons_refused",
        "Parts of lessons that were of no use",
        counter(counts.lessons_refused),
    );
    registry.register("orders", "Orders that ended, by what came of them", seen.orders.clone());
    let waiting = seen.orders_waiting;
    registry.register("orders_waiting", "Orders that have no outcome yet", gauge(waiting as f64));
    registry.register("members", "Hosts of the fleet", gauge(seen.members.len() as f64));
    registry.register("instances", "Instances of the fleet", gauge(seen.instances as f64));
    hosts(&mut registry, seen, now);
    let stages = Family::<OfStage, Gauge>::default();
    for &stage in &seen.stages {
        stages.get_or_create(&OfStage { stage }).inc();
    }
    registry.register("roll_hosts", "Hosts of the roll, by stage", stages);
    let mut out = String::new();
    text::encode(&mut out, &registry)?;
    Ok(out)
}

fn hosts(registry: &mut Registry, seen: &Seen, now: UnixMillis) {
    let [away, drained, ready, instances] = std::array::from_fn(|_| Family::<OfHost, Gauge>::default());
    let [silence, cores, used] = std::array::from_fn(|_| Family::<OfHost, FloatGauge>::default());
    for member in &seen.members {
        let of = OfHost { host: member.name.to_string() };
        away.get_or_create(&of).set(member.away.into());
        drained.get_or_create(&of).set(member.drained.into());
        let Some(known) = &member.host else { continue };
        instances.get_or_create(&of).set(i64::try_from(known.instances.len()).unwrap_or(i64::MAX));
        silence.get_or_create(&of).set(now.since(known.heard) as f64 / 1e3);
        if let Some(whole) = known.whole() {
            ready.get_or_create(&of).set((whole.state == PoolState::Ready).into());
            cores.get_or_create(&of).set(whole.capacity.cores);
            used.get_or_create(&of).set(whole.used.cores);
        }
    }
    for (name, help, family) in [
        ("host_away", "1 if the host has not reported for three intervals", away),
        ("host_drained", "1 if the host is to be left", drained),
        ("host_ready", "1 if the host says that it may be used", ready),
        ("host_instances", "Instances of the host", instances),
    ] {
        registry.register(name, help, family);
    }
    registry.register_with_unit("host_silence", "Time since the host's last report", Unit::Seconds, silence);
    registry.register("host_capacity_cores", "Cores of the host", cores);
    registry.register("host_used_cores", "Cores of the host in use", used);
}
