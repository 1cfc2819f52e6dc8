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
use rswap_controller::{
    Address, Controller, Settings, Stores,
    link::{LinkError, call},
    serve_at,
};
use rswap_fleet::{
    HostName, InstanceReport, Report,
    amounts::Sum,
    model::Revision,
    report::{Answer, Envelope, VERSION},
};
use rswap_forecast::{Demand, DemandPoint, Evidence, Kin, Quantiles, Resource};
use rswap_plan::{InstanceView, MoveKind};
use rswap_store::{Store, TIERS};
use rswap_types::{Capacity, InstanceName, Pool, PoolKind, PoolState, THIS_HOST, UnixMillis};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    sync::oneshot,
};

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

/// A controller in this process.
pub struct Running {
    pub address: Address,
    pub stop: Option<oneshot::Sender<()>>,
    pub served: tokio::task::JoinHandle<()>,
}

impl Running {
    pub async fn start(directory: &Path) -> Self {
        Self::start_with(directory, settings()).await
    }

    pub async fn start_with(directory: &Path, settings: Settings) -> Self {
        let address = Address(directory.join("controller.sock"));
        let (stop, stopped) = oneshot::channel::<()>();
        let (controller, at) = (open_with(directory, settings), address.clone());
        let served = tokio::spawn(async move {
            serve_at(controller, &at, None, async { drop(stopped.await) }).await.unwrap();
        });
        let running = Self { address, stop: Some(stop), served };
        answers(&running.address).await;
        running
    }

    pub async fn stop(mut self) {
        self.stop.take().unwrap().send(()).unwrap();
        self.served.await.unwrap();
    }

    /// A POST with these lines in its head: the head of the answer, and what it says.
    pub async fn raw(&self, path: &str, lines: &[&str], body: &str) -> (String, Value) {
        let mut stream = UnixStream::connect(&self.address.0).await.unwrap();
        let lines = lines.iter().map(|line| format!("{line}\r\n")).collect::<String>();
        let length = body.len();
        let text = format!(
            "POST {path} HTTP/1.1\r\n{lines}content-length: {length}\r\nconnection: close\r\n\r\n{body}"
        );
        // What is too long is answered before all of it was read.
        let _ = stream.write_all(text.as_bytes()).await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        let answer = String::from_utf8(answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.to_ascii_lowercase(), serde_json::from_str(body).unwrap())
    }

    pub async fn get(&self, path: &str) -> Value {
        call(&self.address, path, None).await.unwrap()
    }

    pub async fn report(&self, envelope: &Envelope) -> Result<Answer, LinkError> {
        call(&self.address, "/v1/report", Some(serde_json::to_vec(envelope).unwrap())).await
    }
}

pub async fn answers(address: &Address) {
    let since = Instant::now();
    while call::<Value>(address, "/v1/status", None).await.is_err() {
        assert!(since.elapsed() < Duration::from_secs(20), "the controller does not answer");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
