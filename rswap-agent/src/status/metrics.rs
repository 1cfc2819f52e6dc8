//! The board as OpenMetrics text. A registry is built per scrape: the board is the only state, and instances
//! that left must not linger as stale series.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::{Registry, Unit},
};

use super::{BoardState, MigrationState};
use crate::{profile::ProbeState, units::UnixMillis};

type FloatGauge = Gauge<f64, AtomicU64>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Named {
    name: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfInstance {
    instance: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Forecast {
    instance: String,
    resource: String,
    horizon_ms: u64,
    quantile: &'static str,
}

fn named(name: &str) -> Named {
    Named { name: name.to_owned() }
}

fn counter(value: u64) -> Counter {
    let counter: Counter = Counter::default();
    counter.inner().store(value, Relaxed);
    counter
}

/// The board as OpenMetrics text.
pub(super) fn encode(board: &BoardState, now: UnixMillis) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("rswap");
    agent(&mut registry, board, now);
    instances(&mut registry, board);
    pools(&mut registry, board);
    let mut out = String::new();
    text::encode(&mut out, &registry)?;
    Ok(out)
}

fn agent(registry: &mut Registry, board: &BoardState, now: UnixMillis) {
    let float = |value: f64| {
        let gauge = FloatGauge::default();
        gauge.set(value);
        gauge
    };
    let uptime_s = now.since(board.started) as f64 / 1e3;
    registry.register_with_unit("uptime", "Time since the agent's start", Unit::Seconds, float(uptime_s));
    let work_s = board.last_window_work_us as f64 / 1e6;
    registry.register_with_unit(
        "window_work",
        "The agent's work for the last window",
        Unit::Seconds,
        float(work_s),
    );
    registry.register("windows", "Windows sampled", counter(board.windows));
    registry.register("core_swaps", "Core swaps carried out", counter(board.swaps_done));
    registry.register("core_swap_failures", "Core swaps that failed", counter(board.swaps_failed));
    registry.register("migrations", "Migrations away completed", counter(board.migrations_done));
    registry.register("migration_failures", "Migrations away rolled back", counter(board.migrations_failed));
    let running =
        board.migrations.iter().filter(|m| matches!(m.state, MigrationState::Running { .. })).count();
    registry.register("migrations_running", "Migrations on their way", float(running as f64));

    let active = Family::<Named, Gauge>::default();
    for probe in &board.probes {
        active.get_or_create(&named(&probe.name)).set((probe.state == ProbeState::Active).into());
    }
    registry.register("probe_active", "1 if the probe measures", active);

    let (runs, run_time) = (Family::<Named, Counter>::default(), Family::<Named, Counter>::default());
    for program in &board.programs {
        runs.get_or_create(&named(&program.name)).inner().store(program.runs, Relaxed);
        run_time
            .get_or_create(&named(&program.name))
            .inner()
            .store((program.ns_per_run * program.runs as f64) as u64, Relaxed);
    }
    registry.register("bpf_runs", "Runs of an eBPF program", runs);
    registry.register(
        "bpf_run_time_nanoseconds",
        "Time in an eBPF program, while BPF statistics are on",
        run_time,
    );
}

fn instances(registry: &mut Registry, board: &BoardState) {
    let cores = Family::<OfInstance, FloatGauge>::default();
    let resident = Family::<OfInstance, FloatGauge>::default();
    let queue_mean = Family::<OfInstance, FloatGauge>::default();
    let need = Family::<Forecast, FloatGauge>::default();
    let [io, io_latency, net_in, net_out] =
        std::array::from_fn(|_| Family::<OfInstance, FloatGauge>::default());
    for (name, view) in &board.instances {
        let of = OfInstance { instance: name.to_string() };
        if let Some(profile) = &view.profile {
            cores.get_or_create(&of).set(profile.cpu.cores);
            resident.get_or_create(&of).set(profile.memory.resident_bytes as f64);
            let set = |family: &Family<OfInstance, FloatGauge>, value: Option<f64>| {
                value.into_iter().for_each(|value| _ = family.get_or_create(&of).set(value));
            };
            set(&io, profile.io_bytes_per_s());
            set(&io_latency, profile.io_latency_ns().quantile(0.99).map(|ns| ns as f64 / 1e9));
            set(&net_in, profile.net_bytes_per_s().map(|(bytes, _)| bytes));
            set(&net_out, profile.net_bytes_per_s().map(|(_, bytes)| bytes));
            let queue = &profile.cpu.run_queue_ns;
            if queue.count > 0 {
                queue_mean.get_or_create(&of).set(queue.sum as f64 / queue.count as f64 / 1e9);
            }
        }
        for point in view.demand.iter().flat_map(|demand| &demand.points) {
            let quantiles = [
                ("0.5", point.need.p50),
                ("0.9", point.need.p90),
                ("0.95", point.need.p95),
                ("0.99", point.need.p99),
            ];
            for (quantile, value) in quantiles {
                let labels = Forecast {
                    instance: name.to_string(),
                    resource: point.resource.name().to_owned(),
                    horizon_ms: point.horizon_ms,
                    quantile,
                };
                need.get_or_create(&labels).set(value);
            }
        }
    }
    registry.register("instance_cores", "CPU use in the last window, in cores", cores);
    registry.register_with_unit("instance_resident", "Resident memory", Unit::Bytes, resident);
    registry.register_with_unit(
        "instance_run_queue_mean",
        "Mean time from runnable to running in the last window",
        Unit::Seconds,
        queue_mean,
    );
    for (name, help, family) in [
        ("instance_io_bytes_per_second", "Block I/O in the last window, both ways", io),
        ("instance_net_in_bytes_per_second", "TCP bytes received in the last window", net_in),
        ("instance_net_out_bytes_per_second", "TCP bytes sent in the last window", net_out),
    ] {
        registry.register(name, help, family);
    }
    registry.register_with_unit(
        "instance_io_latency_p99",
        "What 99 in 100 block requests of the last window did not exceed",
        Unit::Seconds,
        io_latency,
    );
    registry.register(
        "instance_need",
        "Forecast need, in the unit that the resource's name says: cpu in reference cores, memory in bytes",
        need,
    );
}

fn pools(registry: &mut Registry, board: &BoardState) {
    let capacity = Family::<Named, FloatGauge>::default();
    let used = Family::<Named, FloatGauge>::default();
    for pool in board.pools.iter().filter(|pool| !pool.kind.is_for_flows()) {
        capacity.get_or_create(&named(&pool.name)).set(pool.capacity.cores);
        used.get_or_create(&named(&pool.name)).set(pool.used.cores);
    }
    registry.register("pool_capacity_cores", "Cores of a pool", capacity);
    registry.register("pool_used_cores", "Cores of a pool in use", used);
}
