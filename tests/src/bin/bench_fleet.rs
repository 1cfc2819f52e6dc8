//! Measures a controller: `cargo xtask bench fleet`.
//!
//! Agents that are only their reports, each at its own moment of the interval, hand in what real ones hand in: instances with forecasts that
//! may be rested on, what they used, and what they taught. The controller is `rswap controller` on one core; the agents are on another.

use std::{
    collections::BTreeMap,
    fs,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Context;
use clap::Parser;
use comfy_table::{Table, presets};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use rswap_agent::{
    forecast::{
        Demand, DemandPoint, Evidence, ForecastConfig, Forecaster, Kin, Lessons, Observation, Part,
        Quantiles, Resource, Usage,
    },
    plan::{InstanceView, MoveKind},
    pool::{Capacity, Pool, PoolKind, PoolState, THIS_HOST},
    units::UnixMillis,
};
use rswap_controller::link;
use rswap_fleet::{
    InstanceReport, Report,
    amounts::Sum,
    model::Revision,
    report::{Answer, Envelope, VERSION},
};
use rswap_tests::{
    bench::process::{cpu_time, status_kib},
    controller::Controller,
};
use serde_json::{Value, json};

const RESULT: &str = "target/rswap/bench-fleet.json";
const CONTROLLER_CORE: usize = 0;
const AGENTS_CORE: usize = 1;
const CLASSES: usize = 20;
/// Classes that run on one host.
const CLASSES_PER_HOST: usize = 5;
const WINDOW_MS: u64 = 1_000;
const HORIZONS_MS: [u64; 3] = [5_000, 15_000, 60_000];

#[derive(Debug, Parser)]
struct Arguments {
    /// How many agents report
    #[arg(long, default_value_t = 2_000)]
    agents: usize,
    /// How many instances each has
    #[arg(long, default_value_t = 50)]
    instances: usize,
    /// How often each reports, in milliseconds
    #[arg(long, default_value_t = 10_000)]
    every_ms: u64,
    /// How long is measured, in seconds, after a first interval that is not
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// How often the controller plans, in milliseconds
    #[arg(long, default_value_t = 30_000)]
    plan_every_ms: u64,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    fs::create_dir_all("target/rswap").context("cannot make target/rswap")?;
    // On a disk: what is measured is mostly how fast it is.
    let directory = tempfile::tempdir_in("target/rswap").context("cannot make a directory")?;
    let keys =
        format!("report_every_ms = {}\nplan_every_ms = {}\n", arguments.every_ms, arguments.plan_every_ms);
    let mut controller = Controller::start(directory.path(), &keys)?;
    controller.restart_on(&["taskset", "--cpu-list", &CONTROLLER_CORE.to_string()])?;
    let mut own = CpuSet::new();
    own.set(AGENTS_CORE).context("no second core")?;
    sched_setaffinity(Pid::from_raw(0), &own).context("cannot leave the controller its core")?;
    let lessons: Arc<Vec<Lessons>> = Arc::new((0..CLASSES).map(taught).collect());
    let measured = Arc::new(Mutex::new(Measured::default()));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let pid = controller.pid().context("no controller")?;
    let warm = Duration::from_millis(arguments.every_ms);
    let (mut before, mut cpu, mut took) = (Duration::ZERO, Duration::ZERO, Duration::ZERO);
    runtime.block_on(async {
        let start = Instant::now();
        let end = start + warm + Duration::from_secs(arguments.seconds);
        let mut agents = tokio::task::JoinSet::new();
        for number in 0..arguments.agents {
            let agent = Agent {
                number,
                instances: arguments.instances,
                connect: controller.address(),
                lessons: lessons.clone(),
                measured: measured.clone(),
            };
            let offset = warm.mul_f64(number as f64 / arguments.agents as f64);
            agents.spawn(agent.run(start + offset, warm, start + warm, end));
        }
        tokio::time::sleep_until((start + warm).into()).await;
        (before, took) = (cpu_time(pid)?, Duration::ZERO);
        let began = Instant::now();
        tokio::time::sleep_until(end.into()).await;
        (cpu, took) = (cpu_time(pid)?.saturating_sub(before), began.elapsed());
        while let Some(ended) = agents.join_next().await {
            ended.context("an agent panicked")?;
        }
        anyhow::Ok(())
    })?;
    let hosts: Vec<Value> = controller.get("/v1/hosts")?;
    let taken: u64 = hosts.iter().filter_map(|host| host["reports"]["taken"].as_u64()).sum();
    let mut measured = measured.lock().unwrap_or_else(PoisonError::into_inner);
    measured.times.sort();
    let at = |share: f64| {
        let index =
            ((measured.times.len() as f64 * share) as usize).min(measured.times.len().saturating_sub(1));
        measured.times.get(index).map_or(0.0, |time| time.as_secs_f64() * 1e3)
    };
    let rss_mb = status_kib(pid, "VmHWM:")? as f64 / 1024.0;
    let store_mb = fs::metadata(directory.path().join("fleet"))?.len() as f64 / f64::from(1 << 20);
    let result = json!({
        "agents": arguments.agents,
        "instances": arguments.agents * arguments.instances,
        "report_every_ms": arguments.every_ms,
        "seconds": took.as_secs_f64(),
        "reports": measured.acknowledged,
        "report_bytes": measured.bytes / measured.acknowledged.max(1),
        "report_p50_ms": at(0.5),
        "report_p99_ms": at(0.99),
        "report_max_ms": at(1.0),
        "core_pct": 100.0 * cpu.as_secs_f64() / took.as_secs_f64(),
        "rss_mb": rss_mb,
        "store_mb": store_mb,
        "failed_calls": measured.failed,
        "lost_reports": measured.acknowledged.saturating_sub(taken),
    });
    let mut table = Table::new();
    table.load_preset(presets::UTF8_BORDERS_ONLY);
    for (name, value) in result.as_object().into_iter().flatten() {
        table.add_row([name.clone(), value.to_string()]);
    }
    println!("{table}");
    fs::write(RESULT, serde_json::to_vec_pretty(&result)?)
        .with_context(|| format!("cannot write {RESULT}"))?;
    println!("==> all of it is in {RESULT}");
    anyhow::ensure!(
        taken >= measured.acknowledged,
        "reports were lost: {} of {}",
        taken,
        measured.acknowledged
    );
    Ok(())
}

#[derive(Default)]
struct Measured {
    times: Vec<Duration>,
    acknowledged: u64,
    failed: u64,
    bytes: u64,
}

struct Agent {
    number: usize,
    instances: usize,
    connect: rswap_controller::Address,
    lessons: Arc<Vec<Lessons>>,
    measured: Arc<Mutex<Measured>>,
}

impl Agent {
    async fn run(self, first: Instant, every: Duration, from: Instant, end: Instant) {
        let (mut next, mut sequence, mut knows) = (first, 1u64, Revision::default());
        while next < end {
            tokio::time::sleep_until(next.into()).await;
            let lessons = if sequence == 1 { self.taught() } else { Vec::new() };
            let envelope = Envelope {
                reports: vec![self.report(sequence)],
                lessons,
                knows,
                leads: (WINDOW_MS, HORIZONS_MS.to_vec()),
            };
            let Ok(body) = serde_json::to_vec(&envelope) else { return };
            let bytes = body.len() as u64;
            let began = Instant::now();
            let answer = link::call::<Answer>(&self.connect, "/v1/report", Some(body)).await;
            let took = began.elapsed();
            let mut measured = self.measured.lock().unwrap_or_else(PoisonError::into_inner);
            match answer {
                Ok(answer) => {
                    (sequence, knows) = (sequence + 1, answer.knows);
                    measured.acknowledged += 1;
                    measured.bytes += bytes;
                    if began >= from {
                        measured.times.push(took);
                    }
                }
                // Sent again with the next one's turn, under its number.
                Err(_) => measured.failed += 1,
            }
            next += every;
        }
    }

    fn class(&self, instance: usize) -> usize {
        (self.number + instance % CLASSES_PER_HOST) % CLASSES
    }

    fn taught(&self) -> Vec<(Part, Lessons)> {
        let classes = (0..CLASSES_PER_HOST).map(|instance| self.class(instance));
        classes
            .map(|class| {
                let part = Part::Class(format!("app=class-{class}"));
                let lessons = self.lessons[class].part(&part);
                (part, lessons)
            })
            .collect()
    }

    fn report(&self, sequence: u64) -> Report {
        let instances: Vec<_> =
            (0..self.instances).map(|instance| self.instance(instance, sequence)).collect();
        let used = Capacity {
            cores: instances.iter().map(|one| one.view.cores).sum(),
            memory_bytes: instances.iter().map(|one| one.view.resident_bytes).sum(),
        };
        let whole = Pool {
            name: THIS_HOST.to_owned(),
            kind: PoolKind::ThisHost,
            capacity: Capacity { cores: 64.0, memory_bytes: 256 << 30 },
            used,
            cost_per_core_hour: 0.03 + 0.0001 * (self.number % 200) as f64,
            cost_per_gib_hour: 0.004,
            performance: 1.0,
            state: PoolState::Ready,
        };
        let address = ([10, (self.number >> 16) as u8, (self.number >> 8) as u8, self.number as u8], 7791);
        Report {
            version: VERSION,
            host: format!("host-{:05}", self.number).parse().expect("a host's name"),
            epoch: 1,
            sequence,
            at: UnixMillis::now(),
            acts: false,
            address: Some(address.into()),
            running: None,
            pools: vec![whole],
            instances,
            gone: BTreeMap::new(),
            links: Vec::new(),
            outcomes: Vec::new(),
            dropped: 0,
        }
    }

    fn instance(&self, number: usize, sequence: u64) -> InstanceReport {
        // Up and down, each at its own pace.
        let phase = (self.number * 31 + number * 7) as f64 + sequence as f64 / 3.0;
        let cores = 0.5 + 0.3 * phase.sin();
        let name = format!("instance-{:05}-{number:02}", self.number);
        let bytes = (1u64 << 30) as f64;
        let point = |resource, horizon_ms, value: f64| DemandPoint {
            resource,
            horizon_ms,
            need: Quantiles { p50: value, p90: value * 1.2, p95: value * 1.3, p99: value * 1.5 },
            evidence: Evidence::Enough { seen: 1_000, p95_coverage: 0.95 },
        };
        let points = HORIZONS_MS.iter().flat_map(|&horizon_ms| {
            [point(Resource::Cpu, horizon_ms, cores), point(Resource::Memory, horizon_ms, bytes)]
        });
        let points = points.collect();
        let sums = [
            (Resource::Cpu, cores),
            (Resource::Memory, bytes),
            (Resource::Io, cores * 1e6),
            (Resource::IoLatency, 2e5),
            (Resource::NetIn, cores * 1e5),
            (Resource::NetOut, cores * 2e5),
        ];
        let used = sums.into_iter().map(|(resource, amount)| {
            let mut sum = Sum::default();
            (0..10).for_each(|_| sum.add(resource, amount));
            (resource, sum)
        });
        let instance: rswap_agent::instance::InstanceName = name.parse().expect("an instance's name");
        InstanceReport {
            view: InstanceView {
                instance: instance.clone(),
                host: None,
                cpu_pool: None,
                demand: Demand { instance, at: UnixMillis::now(), points },
                cores,
                resident_bytes: 1 << 30,
                dirty_bytes_per_s: None,
                movable: vec![MoveKind::Cpu, MoveKind::Host],
                labels: BTreeMap::from([("app".to_owned(), format!("class-{}", self.class(number)))]),
                volumes: Vec::new(),
                port: None,
            },
            kin: Kin { class: format!("app=class-{}", self.class(number)), identity: name },
            used: used.collect(),
        }
    }
}

/// What an instance of a class has taught.
fn taught(class: usize) -> Lessons {
    let config = ForecastConfig { horizons_ms: HORIZONS_MS.to_vec(), ..ForecastConfig::default() };
    let mut forecaster = Forecaster::new(config, WINDOW_MS);
    let name: rswap_agent::instance::InstanceName = "teacher".parse().expect("an instance's name");
    forecaster.introduce(
        &name,
        Kin { class: format!("app=class-{class}"), identity: "teacher".to_owned() },
        1,
    );
    for window in 1..=300u64 {
        let busy = (window as f64 / (5.0 + class as f64)).sin().abs();
        let usage = Usage {
            reference_cores: busy,
            memory_bytes: 1e9,
            io_bytes_per_s: Some(busy * 1e6),
            io_latency_ns: Some(2e5),
            net_in_bytes_per_s: Some(busy * 1e5),
            net_out_bytes_per_s: Some(busy * 2e5),
            ..Usage::default()
        };
        forecaster.observe(&Observation { instance: &name, at: UnixMillis(window * WINDOW_MS), usage });
    }
    forecaster.lessons()
}
