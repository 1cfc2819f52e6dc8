//! Reports of made-up hosts, and a controller with a store of its own.

#![allow(
    clippy::unwrap_used,
    dead_code,
    missing_docs,
    unreachable_pub,
    reason = "a test that can't go on is to fail; each uses a part of this"
)]

use std::{
    collections::BTreeMap,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use rswap_audit::Audit;
use rswap_controller::{Address, Controller, Settings, Stores, link::call};
use rswap_fleet::{
    HostName, InstanceReport, Report,
    amounts::Sum,
    model::Revision,
    report::{Envelope, VERSION},
};
use rswap_forecast::{Demand, DemandPoint, Evidence, Kin, Quantiles, Resource};
use rswap_plan::{InstanceView, MoveKind};
use rswap_store::{Store, TIERS};
use rswap_types::{Capacity, InstanceName, Pool, PoolKind, PoolState, THIS_HOST, UnixMillis};
use serde_json::Value;

pub const LEADS: (u64, [u64; 2]) = (1_000, [2_000, 10_000]);

pub fn host(name: &str) -> HostName {
    name.parse().unwrap()
}

pub fn name(name: &str) -> InstanceName {
    name.parse().unwrap()
}

pub fn settings() -> Settings {
    let (plan, limits) = Default::default();
    Settings { acts: true, interval_ms: 1_000, plan_every_ms: 100, plan, limits }
}

pub fn whole(state: PoolState) -> Pool {
    Pool {
        name: THIS_HOST.to_owned(),
        kind: PoolKind::ThisHost,
        capacity: Capacity { cores: 8.0, memory_bytes: 64 << 30 },
        used: Capacity::default(),
        cost_per_core_hour: 0.04,
        cost_per_gib_hour: 0.005,
        performance: 1.0,
        state,
    }
}

pub fn instance(local: &str) -> InstanceReport {
    let need = Quantiles { p50: 1.0, p90: 1.0, p95: 1.0, p99: 1.0 };
    let evidence = Evidence::Enough { seen: 100, p95_coverage: 0.95 };
    let point = DemandPoint { resource: Resource::Cpu, horizon_ms: 30_000, need, evidence };
    let sum = Sum { count: 10, sum: 5_000_000, most: 500_000 };
    InstanceReport {
        view: InstanceView {
            instance: name(local),
            host: None,
            cpu_pool: None,
            demand: Demand { instance: name(local), at: UnixMillis(0), points: vec![point] },
            cores: 1.0,
            resident_bytes: 1 << 20,
            dirty_bytes_per_s: None,
            movable: vec![MoveKind::Host],
            labels: BTreeMap::new(),
            volumes: Vec::new(),
            port: None,
        },
        kin: Kin { class: "web".to_owned(), identity: local.to_owned() },
        used: BTreeMap::from([(Resource::Cpu, sum)]),
    }
}

pub fn report(of: &str, number: u8, instances: Vec<InstanceReport>) -> Report {
    Report {
        version: VERSION,
        host: host(of),
        epoch: 1,
        sequence: 1,
        at: UnixMillis::now(),
        acts: true,
        address: Some(([10, 0, 0, number], 7791).into()),
        running: None,
        pools: vec![whole(PoolState::Ready)],
        instances,
        gone: BTreeMap::new(),
        links: Vec::new(),
        outcomes: Vec::new(),
        dropped: 0,
    }
}

pub fn envelope(reports: Vec<Report>) -> Envelope {
    Envelope { reports, lessons: Vec::new(), knows: Revision::default(), leads: (LEADS.0, LEADS.1.to_vec()) }
}

pub fn open(directory: &Path) -> Arc<Controller> {
    open_with(directory, settings())
}

pub fn open_with(directory: &Path, settings: Settings) -> Arc<Controller> {
    let store = Store::open(&directory.join("store"), &TIERS).unwrap();
    let audit = Audit::open(directory.join("audit.jsonl"), 1 << 20).unwrap();
    Controller::new(Stores::from(store), settings, audit).unwrap()
}

pub async fn answers(address: &Address) {
    let since = Instant::now();
    while call::<Value>(address, "/v1/status", None).await.is_err() {
        assert!(since.elapsed() < Duration::from_secs(20), "the controller does not answer");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
