//! Measures one round of planning a fleet: `cargo xtask bench plan`.
//!
//! Hosts of four kinds, each full to two thirds of its cores at the limit need; every tenth instance needs more than its host will have.

use std::time::Duration;

use anyhow::Context;
use comfy_table::{Table, presets};
use nix::time::{ClockId, clock_gettime};
use rswap_agent::{
    config::PlanConfig,
    forecast::{Demand, DemandPoint, Evidence, Quantiles, Resource},
    instance::InstanceName,
    plan::{InstanceView, MoveKind, Outcome, Planner},
    pool::{Capacity, Pool, PoolKind, PoolState},
    units::UnixMillis,
};
use serde_json::json;

/// (instances, hosts).
const SIZES: [(usize, usize); 5] =
    [(1_250, 1_000), (2_500, 1_000), (5_000, 1_000), (10_000, 1_000), (20_000, 1_000)];
/// Cores, money per core and hour, speed.
const KINDS: [(f64, f64, f64); 4] =
    [(16.0, 0.03, 0.7), (32.0, 0.04, 1.0), (48.0, 0.05, 1.1), (64.0, 0.06, 1.3)];
/// The first round finds nothing remembered; those after it are what a fleet does all day.
const ROUNDS: u64 = 3;
const RESULT: &str = "target/rswap/bench-plan.json";

fn main() -> anyhow::Result<()> {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_BORDERS_ONLY);
    table.set_header(["instances", "hosts", "a round", "per instance", "growth", "moves", "forced"]);
    let mut rows = Vec::new();
    let mut before: Option<(usize, f64)> = None;
    for (instances, hosts) in SIZES {
        let (pools, views) = fleet(instances, hosts)?;
        let mut planner = Planner::new(PlanConfig::default());
        let (mut longest, mut moves, mut forced) = (Duration::ZERO, 0, 0);
        for round in 0..ROUNDS {
            let began = processor_time()?;
            let plan = planner.plan(UnixMillis(round * 60_000), &views, &pools);
            longest = longest.max(processor_time()? - began);
            let of = |wanted: bool| {
                let moves = plan.decisions.iter().filter(|d| match d.outcome {
                    Outcome::Move { forced, .. } => forced || !wanted,
                    Outcome::Stay { .. } => false,
                });
                moves.count()
            };
            (moves, forced) = (of(false), of(true));
        }
        let seconds = longest.as_secs_f64();
        // The power of the number of instances that the time grew with: 1 is in proportion.
        let growth =
            before.map(|(fewer, took)| (seconds / took).ln() / (instances as f64 / fewer as f64).ln());
        before = Some((instances, seconds));
        table.add_row([
            instances.to_string(),
            hosts.to_string(),
            format!("{:.0} ms", seconds * 1e3),
            format!("{:.0} us", seconds * 1e6 / instances as f64),
            growth.map_or("-".into(), |power| format!("n^{power:.2}")),
            moves.to_string(),
            forced.to_string(),
        ]);
        rows.push(json!({
            "instances": instances, "hosts": hosts, "kinds": KINDS.len(), "seconds": seconds, "growth": growth,
            "moves": moves, "forced": forced,
        }));
    }
    println!("{table}\n==> the longest of {ROUNDS} rounds, in processor time of one core");
    std::fs::create_dir_all("target/rswap").context("cannot make target/rswap")?;
    std::fs::write(RESULT, serde_json::to_vec_pretty(&json!({ "rows": rows }))?)
        .with_context(|| format!("cannot write {RESULT}"))?;
    println!("==> all of it is in {RESULT}");
    Ok(())
}

fn processor_time() -> anyhow::Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).context("cannot read the processor time")?.into())
}

fn fleet(instances: usize, hosts: usize) -> anyhow::Result<(Vec<Pool>, Vec<InstanceView>)> {
    let mut random = 1u64;
    let mut unit = move || {
        // Xorshift: the same fleet every time.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random >> 11) as f64 / (1u64 << 53) as f64
    };
    let per_host = instances as f64 / hosts as f64;
    let mut pools = Vec::new();
    for host in 0..hosts {
        let (cores, cost, performance) = KINDS[host % KINDS.len()];
        pools.push(Pool {
            name: format!("host-{host:04}"),
            kind: PoolKind::Host { address: "10.0.0.1:7791".parse()? },
            capacity: Capacity { cores, memory_bytes: 256 << 30 },
            used: Capacity::default(),
            cost_per_core_hour: cost * (0.9 + 0.2 * unit()),
            cost_per_gib_hour: 0.004,
            performance,
            state: PoolState::Ready,
        });
    }
    let mut views = Vec::new();
    for number in 0..instances {
        let host = &mut pools[number % hosts];
        let share = host.capacity.cores * host.performance / per_host.max(1.0);
        let now = share * (0.2 + 0.3 * unit());
        let later = if number % 10 == 0 { now * 4.0 } else { now * (0.9 + 0.4 * unit()) };
        let instance: InstanceName = format!("instance-{number:05}").parse().context("a name was refused")?;
        let point = |horizon_ms, need: f64| DemandPoint {
            resource: Resource::Cpu,
            horizon_ms,
            need: Quantiles { p50: need, p90: need * 1.2, p95: need * 1.3, p99: need * 1.5 },
            evidence: Evidence::Enough { seen: 1000, p95_coverage: 0.95 },
        };
        let resident_bytes = 1 << 30;
        host.used.cores += now / host.performance;
        host.used.memory_bytes += resident_bytes;
        views.push(InstanceView {
            demand: Demand {
                instance: InstanceName::clone(&instance),
                at: UnixMillis(0),
                points: vec![point(15_000, now), point(60_000, later)],
            },
            instance,
            host: Some(host.name.clone()),
            cpu_pool: None,
            cores: now / host.performance,
            resident_bytes,
            dirty_bytes_per_s: Some(1e6),
            movable: vec![MoveKind::Host],
            labels: Default::default(),
            volumes: Vec::new(),
            port: None,
        });
    }
    Ok((pools, views))
}
