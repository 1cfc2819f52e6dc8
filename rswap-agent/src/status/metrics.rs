//! The board as OpenMetrics text. A registry is built per scrape: the board is the only state, and instances
//! that left must not linger as stale series.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeMetric, MetricEncoder, text},
    metrics::{MetricType, counter::Counter, family::Family, gauge::Gauge},
    registry::{Registry, Unit},
};
use rswap_common::histogram::bounds_of;

use super::{BoardState, Counts, Metric, MigrationState};
use crate::{
    profile::{OffCpuProfile, ProbeState, Profile, RequestCount, histogram::Histogram},
    units::UnixMillis,
};

type FloatGauge = Gauge<f64, AtomicU64>;
type FloatCounter = Counter<f64, AtomicU64>;

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

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfBlock {
    instance: String,
    device: String,
    operation: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct UsedWithin {
    instance: String,
    span_s: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfFaults {
    instance: String,
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfPressure {
    instance: String,
    resource: &'static str,
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfClass {
    instance: String,
    class: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfReason {
    instance: String,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfNeighbour {
    instance: String,
    kind: &'static str,
    neighbour: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfDiskNeighbour {
    instance: String,
    device: String,
    kind: &'static str,
    neighbour: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Unowned {
    device: String,
    kind: &'static str,
}

/// Histograms with a bucket for every power of two from about a microsecond to about a minute, in seconds: the same for all, so that they can be
/// added up.
#[derive(Debug)]
struct Histograms<L> {
    of: Vec<(L, Histogram)>,
    /// Of their unit in a second.
    per_second: f64,
}

impl<L: EncodeLabelSet + fmt::Debug + Send + Sync + 'static> EncodeMetric for Histograms<L> {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), fmt::Error> {
        for (labels, histogram) in &self.of {
            let (buckets, sum) =
                (by_octave(histogram, self.per_second), histogram.sum as f64 / self.per_second);
            let mut of = encoder.encode_family(labels)?;
            of.encode_histogram::<[(&str, &str); 0]>(sum, histogram.count, &buckets, None)?;
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }

    fn is_empty(&self) -> bool {
        self.of.is_empty()
    }
}

/// Powers of two from about a microsecond to about a minute.
const OCTAVES: u32 = 27;

/// The largest value of each power of two in seconds, with how many samples lie in it: below the first, they are in that, and above the last, in the
/// one without an end. Values are whole numbers, so that no sample lies between.
fn by_octave(histogram: &Histogram, per_second: f64) -> Vec<(f64, u64)> {
    let first = (per_second / 1e6).max(1.0).log2() as u32;
    let bound = |octave: u32| ((1u64 << (octave + 1)) - 1) as f64 / per_second;
    let mut buckets: Vec<(f64, u64)> = (first..first + OCTAVES).map(|octave| (bound(octave), 0)).collect();
    buckets.push((f64::INFINITY, 0));
    for &(index, count) in &histogram.buckets {
        // 0 is counted with 1.
        let octave = bounds_of(usize::from(index)).low.max(1).ilog2();
        let place = (octave.saturating_sub(first) as usize).min(buckets.len() - 1);
        buckets[place].1 += count;
    }
    buckets
}

/// What is known of each pressure, some and full, with its labels.
fn waits_for<T>(
    cpu: [T; 2],
    memory: [T; 2],
    io: [T; 2],
) -> impl Iterator<Item = (&'static str, &'static str, T)> {
    [("cpu", cpu), ("memory", memory), ("io", io)]
        .into_iter()
        .flat_map(|(resource, [some, full])| [(resource, "some", some), (resource, "full", full)])
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
    distributions(&mut registry, board);
    counts(&mut registry, board);
    pressures(&mut registry, board);
    memory(&mut registry, board);
    block(&mut registry, board);
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
    // One that nobody wants would look like one that does not work.
    for probe in board.probes.iter().filter(|probe| !matches!(probe.state, ProbeState::Off { .. })) {
        active.get_or_create(&named(&probe.name)).set((probe.state == ProbeState::Active).into());
    }
    registry.register("probe_active", "1 if the probe measures; without those that are switched off", active);

    let (runs, run_time) = (Family::<Named, Counter>::default(), Family::<Named, Counter>::default());
    for program in &board.programs {
        runs.get_or_create(&named(&program.name)).inner().store(program.runs, Relaxed);
        run_time
            .get_or_create(&named(&program.name))
            .inner()
            .store((program.ns_per_run * program.runs as f64) as u64, Relaxed);
    }
    registry.register("bpf_runs", "Runs of an eBPF program, while BPF statistics are on", runs);
    registry.register(
        "bpf_run_time_nanoseconds",
        "Time in an eBPF program, while BPF statistics are on",
        run_time,
    );
    let missed = Family::<Named, Counter>::default();
    for (name, times) in board.programs.iter().filter_map(|of| Some((&of.name, of.missed?))) {
        missed.get_or_create(&named(name)).inner().store(times, Relaxed);
    }
    let help = "Times that an eBPF program did not run, as it was running on that CPU already";
    registry.register("bpf_missed", help, missed);
    let lost = Family::<Named, Counter>::default();
    let of = &board.bookkeeping.lost;
    for (name, times) in [
        ("off_cpu", of.off_cpu),
        ("exact_waits", of.exact_waits),
        ("block_requests", of.block_requests),
        ("tcp_connections", of.tcp_connections),
    ] {
        lost.get_or_create(&named(name)).inner().store(times, Relaxed);
    }
    let help = "What the eBPF programs could not remember, by kind: it is in no profile, or less exact there";
    registry.register("profile_lost", help, lost);
    for (name, help, value) in [
        ("slots_free", "Instances that could still be counted apart", board.bookkeeping.slots_free),
        (
            "tcp_connections_known",
            "TCP connections of instances that the eBPF programs know",
            board.bookkeeping.connections,
        ),
        (
            "disk_users",
            "Cgroups that are no instances and use disks, by device",
            board.bookkeeping.disk_users,
        ),
    ] {
        registry.register(name, help, float(value as f64));
    }
    let known = &board.cgroups;
    for (name, help, value) in [
        ("cgroups_known", "Instances' cgroups that the eBPF programs know", known.known),
        (
            "cgroups_short_lived",
            "Cgroups made in instances' that the programs know by themselves",
            known.children,
        ),
        ("cgroups_unplaced", "Instances' cgroups that are not counted for lack of a place", known.unplaced),
        ("instances_without_slot", "Instances that are counted together", known.instances_without_slot),
    ] {
        registry.register(name, help, float(value as f64));
    }
    let help = "Cgroups made in instances'";
    registry.register("cgroups_made", help, counter(known.children_made));
    let help = "Cgroups made in instances' that were displaced before they had gone";
    registry.register("cgroups_displaced", help, counter(known.children_displaced));
    let (tier_share, dropped) = (Family::<Named, FloatGauge>::default(), Family::<Named, Gauge>::default());
    for of in &board.profile_cost.tiers {
        tier_share.get_or_create(&named(of.tier.name())).set(of.core_share);
        dropped.get_or_create(&named(of.tier.name())).set(of.dropped_until.is_some().into());
    }
    let help = "Share of a core that a tier's eBPF programs took when they were measured last";
    registry.register("profile_tier_core_share", help, tier_share);
    let help = "Share of a core that the eBPF programs in no tier took when they were measured last";
    let untiered = float(board.profile_cost.untiered_share);
    registry.register("profile_untiered_core_share", help, untiered);
    registry.register(
        "profile_tier_dropped",
        "1 if a tier costs more than it may, and is not measured",
        dropped,
    );
    if let Some(ages) = board.memory_ages {
        let help = "Share of a core that looking at the ages of memory takes";
        registry.register("memory_ages_core_share", help, float(ages.used_share));
    }
    if let Some(ages) = board.written_ages {
        let help = "Share of a core that looking at what is written takes";
        registry.register("written_ages_core_share", help, float(ages.used_share));
    }
}

fn instances(registry: &mut Registry, board: &BoardState) {
    let cores = Family::<OfInstance, FloatGauge>::default();
    let on_class = Family::<OfClass, FloatGauge>::default();
    let resident = Family::<OfInstance, FloatGauge>::default();
    let queue_mean = Family::<OfInstance, FloatGauge>::default();
    let need = Family::<Forecast, FloatGauge>::default();
    let [io, io_latency, net_in, net_out, connections, opened, retransmits, migrations] =
        std::array::from_fn(|_| Family::<OfInstance, FloatGauge>::default());
    for (name, view) in &board.instances {
        let of = OfInstance { instance: name.to_string() };
        if let Some(profile) = &view.profile {
            cores.get_or_create(&of).set(profile.cpu.cores);
            resident.get_or_create(&of).set(profile.memory.resident_bytes as f64);
            let set = |family: &Family<OfInstance, FloatGauge>, value: Option<f64>| {
                value.into_iter().for_each(|value| _ = family.get_or_create(&of).set(value));
            };
            for on in &profile.cpu.by_class {
                let labels = OfClass { instance: name.to_string(), class: on.class.clone() };
                let window_ns = profile.window_ms.max(1) as f64 * 1e6;
                on_class.get_or_create(&labels).set(on.ran_ns as f64 / window_ns);
            }
            set(&io, profile.io_bytes_per_s());
            set(&io_latency, profile.io_latency_ns().quantile(0.99).map(|ns| ns as f64 / 1e9));
            set(&net_in, profile.net_bytes_per_s().map(|(bytes, _)| bytes));
            set(&net_out, profile.net_bytes_per_s().map(|(_, bytes)| bytes));
            let tcp = &profile.tcp;
            let per_s = |count: u64| count as f64 * 1e3 / profile.window_ms.max(1) as f64;
            set(&connections, tcp.connections.as_ref().map(|of| of.open as f64));
            set(&opened, tcp.connections.as_ref().map(|of| per_s(of.opened + of.accepted)));
            set(&retransmits, tcp.retransmits.map(per_s));
            set(&migrations, profile.cpu.migrations.map(per_s));
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
    let help = "CPU use in the last window on a pool of cores, where there are several, in cores";
    registry.register("instance_class_cores", help, on_class);
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
        ("instance_tcp_connections", "TCP connections that began while it was profiled, now", connections),
        ("instance_tcp_connections_per_second", "TCP connections begun in the last window", opened),
        ("instance_tcp_retransmits_per_second", "What TCP sent again in the last window", retransmits),
        (
            "instance_core_migrations_per_second",
            "Times that a thread went from one core to another in the last window",
            migrations,
        ),
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

/// Since the instance is shown: Prometheus takes differences, over whatever time.
fn distributions(registry: &mut Registry, board: &BoardState) {
    let [mut waits, mut turns, mut round_trips, mut lives, mut major, mut minor] =
        std::array::from_fn(|_| Vec::new());
    let (mut on_device, mut in_queue, mut off_cpu) = (Vec::new(), Vec::new(), Vec::new());
    for (name, of) in &board.distributions {
        let own = || OfInstance { instance: name.to_string() };
        for (metric, total) in of.totals() {
            let block = |device: &String, operation: crate::profile::Operation| OfBlock {
                instance: name.to_string(),
                device: device.clone(),
                operation: operation.name(),
            };
            match metric {
                Metric::RunQueueNs => waits.push((own(), total)),
                Metric::OnCpuNs => turns.push((own(), total)),
                Metric::OffCpuNs { reason } => {
                    off_cpu.push((OfReason { instance: name.to_string(), reason: reason.name() }, total));
                }
                Metric::TcpRttUs => round_trips.push((own(), total)),
                Metric::TcpLifeUs => lives.push((own(), total)),
                Metric::MajorFaultNs => major.push((own(), total)),
                Metric::MinorFaultNs => minor.push((own(), total)),
                Metric::BlockDeviceNs { device, operation } => {
                    on_device.push((block(device, *operation), total))
                }
                Metric::BlockQueueNs { device, operation } => {
                    in_queue.push((block(device, *operation), total))
                }
            }
        }
    }
    for (name, help, of, per_second) in [
        ("instance_run_queue", "Time from runnable to running", waits, 1e9),
        ("instance_on_cpu", "Time on a CPU between two switches", turns, 1e9),
        (
            "instance_tcp_rtt",
            "Smoothed TCP round trips, one sample per window of each connection over which something went",
            round_trips,
            1e6,
        ),
        ("instance_tcp_life", "How long TCP connections lasted", lives, 1e6),
        ("instance_major_fault", "How long page faults took that waited", major, 1e9),
        ("instance_minor_fault", "How long page faults took that were served from memory", minor, 1e9),
    ] {
        registry.register_with_unit(name, help, Unit::Seconds, Histograms { of, per_second });
    }
    let help = "Time off the CPU until a thread could run again, by reason";
    let off_cpu = Histograms { of: off_cpu, per_second: 1e9 };
    registry.register_with_unit("instance_off_cpu", help, Unit::Seconds, off_cpu);
    for (name, help, of) in [
        ("instance_block_device", "Time of block requests from when the driver was given them", on_device),
        ("instance_block_queue", "Time of block requests until the driver was given them", in_queue),
    ] {
        registry.register_with_unit(name, help, Unit::Seconds, Histograms { of, per_second: 1e9 });
    }
}

/// What was counted since the instance is shown. A series begins as its number is known first.
fn counts(registry: &mut Registry, board: &BoardState) {
    let counted = board.distributions.iter().map(|(name, of)| (name.to_string(), of.counted()));
    let counted: Vec<(String, Counts)> = counted.collect();
    type Number = fn(&Counts) -> Option<u64>;
    let numbers: [(_, _, _, Number); 10] = [
        ("instance_net_in", "Payload received over TCP", Some(Unit::Bytes), |of| of.tcp_bytes_in),
        ("instance_net_out", "Payload sent over TCP", Some(Unit::Bytes), |of| of.tcp_bytes_out),
        ("instance_tcp_retransmits", "Times that TCP sent something again", None, |of| of.tcp_retransmits),
        ("instance_tcp_connections_opened", "TCP connections that it made", None, |of| of.tcp_opened),
        ("instance_tcp_connections_accepted", "TCP connections made to it", None, |of| of.tcp_accepted),
        ("instance_tcp_connections_failed", "TCP connections tried in vain", None, |of| of.tcp_failed),
        ("instance_tcp_connections_closed", "TCP connections that ended", None, |of| of.tcp_closed),
        ("instance_tcp_listen_drops", "TCP connections dropped before they were accepted", None, |of| {
            of.tcp_listen_drops
        }),
        ("instance_core_migrations", "Times that a thread went from one core to another", None, |of| {
            of.core_migrations
        }),
        ("instance_refaults", "Pages fetched again that reclaim had taken", None, |of| of.refaults),
    ];
    for (name, help, unit, number) in numbers {
        let family = Family::<OfInstance, Counter>::default();
        for (instance, of) in &counted {
            let Some(number) = number(of) else { continue };
            let labels = OfInstance { instance: instance.clone() };
            family.get_or_create(&labels).inner().store(number, Relaxed);
        }
        match unit {
            Some(unit) => registry.register_with_unit(name, help, unit, family),
            None => registry.register(name, help, family),
        }
    }
    let cpu = Family::<OfInstance, FloatCounter>::default();
    let pressure = Family::<OfPressure, FloatCounter>::default();
    let faults = Family::<OfFaults, Counter>::default();
    let block = Family::<OfBlock, Counter>::default();
    for (instance, of) in counted {
        let seconds = |us: u64| us as f64 / 1e6;
        if let Some(us) = of.cpu_us {
            cpu.get_or_create(&OfInstance { instance: instance.clone() }).inc_by(seconds(us));
        }
        let waited = waits_for(
            [of.cpu_pressure_some_us, of.cpu_pressure_full_us],
            [of.memory_pressure_some_us, of.memory_pressure_full_us],
            [of.io_pressure_some_us, of.io_pressure_full_us],
        );
        for (resource, kind, us) in waited {
            let Some(us) = us else { continue };
            let labels = OfPressure { instance: instance.clone(), resource, kind };
            pressure.get_or_create(&labels).inc_by(seconds(us));
        }
        for (kind, count) in [("minor", of.minor_faults), ("major", of.major_faults)] {
            let Some(count) = count else { continue };
            let labels = OfFaults { instance: instance.clone(), kind };
            faults.get_or_create(&labels).inner().store(count, Relaxed);
        }
        for of in of.block {
            let labels =
                OfBlock { instance: instance.clone(), device: of.device, operation: of.operation.name() };
            block.get_or_create(&labels).inner().store(of.bytes, Relaxed);
        }
    }
    registry.register_with_unit("instance_cpu", "CPU time", Unit::Seconds, cpu);
    let help = "Time in which a thread (some), or all that had something to do (full), waited for a resource";
    registry.register_with_unit("instance_pressure", help, Unit::Seconds, pressure);
    registry.register("instance_page_faults", "Page faults", faults);
    registry.register_with_unit("instance_block", "Block I/O, by operation", Unit::Bytes, block);
}

/// For how much of the last window something was waited for.
fn pressures(registry: &mut Registry, board: &BoardState) {
    let pressure = Family::<OfPressure, FloatGauge>::default();
    for (name, view) in &board.instances {
        let Some(Profile { cpu, memory, io, .. }) = &view.profile else { continue };
        let waited = waits_for(
            [cpu.pressure_some, cpu.pressure_full],
            [memory.pressure_some, memory.pressure_full],
            [io.pressure_some, io.pressure_full],
        );
        for (resource, kind, share) in waited {
            let Some(share) = share else { continue };
            let labels = OfPressure { instance: name.to_string(), resource, kind };
            pressure.get_or_create(&labels).set(share);
        }
    }
    let help =
        "Share of the last window in which a thread (some), or all that had something to do (full), waited";
    registry.register("instance_pressure_share", help, pressure);
}

/// Memory beside how much of it there is.
fn memory(registry: &mut Registry, board: &BoardState) {
    let [used, written] = std::array::from_fn(|_| Family::<UsedWithin, FloatGauge>::default());
    let faults = Family::<OfFaults, FloatGauge>::default();
    let refaults = Family::<OfInstance, FloatGauge>::default();
    for (name, view) in &board.instances {
        let Some(profile) = &view.profile else { continue };
        let per_s = 1e3 / profile.window_ms.max(1) as f64;
        for (family, ages) in [(&used, &profile.memory.ages), (&written, &profile.memory.written_ages)] {
            for of in ages.iter().flat_map(|ages| &ages.used) {
                let labels = UsedWithin { instance: name.to_string(), span_s: of.span_s };
                family.get_or_create(&labels).set(of.bytes as f64);
            }
        }
        if let Some(seen) = profile.memory.faults {
            for (kind, count) in [("minor", seen.minor), ("major", seen.major)] {
                let labels = OfFaults { instance: name.to_string(), kind };
                faults.get_or_create(&labels).set(count as f64 * per_s);
            }
        }
        if let Some(count) = profile.memory.refaults {
            let of = OfInstance { instance: name.to_string() };
            refaults.get_or_create(&of).set(count as f64 * per_s);
        }
    }
    let help = "Memory that was used at least once within so many seconds";
    registry.register_with_unit("instance_working_set", help, Unit::Bytes, used);
    let help = "Memory of the instance's own that was written at least once within so many seconds";
    registry.register_with_unit("instance_write_set", help, Unit::Bytes, written);
    registry.register("instance_page_faults_per_second", "Page faults in the last window", faults);
    let help = "Pages fetched again in the last window that reclaim had taken";
    registry.register("instance_refaults_per_second", help, refaults);
}

/// Block I/O beside how long it took.
fn block(registry: &mut Registry, board: &BoardState) {
    let [bytes, in_flight] = std::array::from_fn(|_| Family::<OfBlock, FloatGauge>::default());
    let off_cpu = Family::<OfReason, FloatGauge>::default();
    let cpu_taken = Family::<OfNeighbour, FloatGauge>::default();
    let disk_taken = Family::<OfDiskNeighbour, FloatGauge>::default();
    for (name, view) in &board.instances {
        let Some(profile) = &view.profile else { continue };
        let per_s = 1e3 / profile.window_ms.max(1) as f64;
        for block in &profile.block {
            let labels = OfBlock {
                instance: name.to_string(),
                device: block.device.clone(),
                operation: block.operation.name(),
            };
            bytes.get_or_create(&labels).set(block.bytes as f64 * per_s);
            in_flight.get_or_create(&labels).set(block.in_flight);
        }
        for of in &profile.cpu.neighbours {
            let (kind, neighbour) = board.neighbour_names.words(&of.who);
            let labels = OfNeighbour { instance: name.to_string(), kind, neighbour: neighbour.to_owned() };
            // Several may be of one name: the others.
            cpu_taken.get_or_create(&labels).inc_by(of.waited_ns as f64 / 1e9 * per_s);
        }
        for device in &profile.disk_neighbours {
            for of in &device.others {
                let (kind, neighbour) = board.neighbour_names.words(&of.who);
                let (instance, device) = (name.to_string(), device.device.clone());
                let labels = OfDiskNeighbour { instance, device, kind, neighbour: neighbour.to_owned() };
                disk_taken.get_or_create(&labels).inc_by(of.waited_ns as f64 / 1e9 * per_s);
            }
        }
        for (reason, times) in profile.cpu.off_cpu.iter().flat_map(OffCpuProfile::by_reason) {
            let labels = OfReason { instance: name.to_string(), reason: reason.name() };
            off_cpu.get_or_create(&labels).set(times.sum as f64 / 1e9 * per_s);
        }
    }
    registry.register("instance_block_bytes_per_second", "Block I/O in the last window, by operation", bytes);
    registry.register(
        "instance_block_in_flight",
        "Block requests under way on average in the last window",
        in_flight,
    );
    registry.register(
        "instance_off_cpu_threads",
        "Threads off the CPU on average, by reason, of those times that ended in the last window",
        off_cpu,
    );
    registry.register(
        "instance_cpu_taken_by",
        "Cores that the instance waited for while a neighbour ran there, in the last window",
        cpu_taken,
    );
    registry.register(
        "instance_disk_taken_by",
        "The instance's requests that on average waited for a neighbour's in the last window, estimated",
        disk_taken,
    );
    let [requests, bytes] = std::array::from_fn(|_| Family::<Unowned, Counter>::default());
    for of in &board.block.unowned {
        let kinds: [(&str, RequestCount); 3] =
            [("read", of.reads), ("write", of.writes), ("write_back", of.write_back)];
        for (kind, count) in kinds {
            let labels = Unowned { device: of.device.clone(), kind };
            requests.get_or_create(&labels).inner().store(count.requests, Relaxed);
            bytes.get_or_create(&labels).inner().store(count.bytes, Relaxed);
        }
    }
    registry.register("block_unowned_requests", "Block requests of no instance", requests);
    registry.register_with_unit("block_unowned", "Block I/O of no instance", Unit::Bytes, bytes);
    let not_covered = Family::<Named, Gauge>::default();
    for device in &board.block.not_covered {
        not_covered.get_or_create(&named(device)).set(1);
    }
    registry.register("block_not_covered", "A device in use of which nothing is counted", not_covered);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_the_same_powers_of_two_for_all_and_hold_every_sample() {
        let mut histogram = Histogram::default();
        [0, 1, 2, 3, 8, 15, 16, 1 << 26, 1 << 39].iter().for_each(|value| histogram.record(*value));
        let buckets = by_octave(&histogram, 1e6);
        let counts: Vec<u64> = buckets.iter().map(|(_, count)| *count).collect();
        assert_eq!(buckets[..5], [(1e-6, 2), (3e-6, 2), (7e-6, 0), (15e-6, 2), (31e-6, 1)]);
        assert_eq!(buckets[26], (((1u64 << 27) - 1) as f64 / 1e6, 1));
        assert_eq!(buckets[27..], [(f64::INFINITY, 1)]);
        assert_eq!(counts.iter().sum::<u64>(), histogram.count);
        let bounds =
            |of: &Histogram| by_octave(of, 1e9).into_iter().map(|(bound, _)| bound).collect::<Vec<_>>();
        assert_eq!(bounds(&histogram), bounds(&Histogram::default()));
        // In nanoseconds the first one ends at a microsecond, and has all that is less.
        assert_eq!(by_octave(&histogram, 1e9)[0], (1.023e-6, 7));
    }
}
