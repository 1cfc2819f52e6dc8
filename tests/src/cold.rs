//! A host whose pools are its memory and a swap device of its own, and a Redis on it, most of whose data nobody asks for.

use std::{fs, net::Ipv4Addr, time::Duration};

use anyhow::{Context, ensure};
use rswap_agent::{
    config::MemoryConfig,
    control::SwapDone,
    pool::{Inventory, LocalKind},
    status::InstanceView,
    swap::memory::{InSwap, MemoryReport},
};

use crate::{
    Fleet, Host, HostOptions,
    client::{DataSet, REDIS},
    swap_device::SwapDevice,
    wait_for,
};

/// Where Redis is.
pub const SERVER: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 10);
const LIMIT: Duration = Duration::from_secs(40);

/// What a scene is made of.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Of the swap device.
    pub swap_bytes: u64,
    /// Of Redis's data.
    pub data_bytes: u64,
    /// `[memory]`.
    pub memory: MemoryConfig,
}

impl Default for Plan {
    fn default() -> Self {
        let memory = MemoryConfig {
            look_every_ms: 100,
            cold_after_s: 2,
            pressure_limit: 0.2,
            out_mib_per_s: 512.0,
            cpu_share: 0.5,
        };
        Self { swap_bytes: 512 << 20, data_bytes: 100 << 20, memory }
    }
}

/// The scene. Dropped in this order: the instance uses the device.
#[derive(Debug)]
pub struct ColdScene {
    /// The host.
    pub host: Host,
    /// What Redis holds.
    pub set: DataSet,
    /// The network.
    pub fleet: Fleet,
    /// The device, the pool `zram`.
    pub device: SwapDevice,
}

impl ColdScene {
    /// Starts the host, and a Redis with data. The kernel uses the device, with priority 100.
    pub fn set(plan: &Plan) -> anyhow::Result<Self> {
        let device = SwapDevice::make(plan.swap_bytes)?;
        device.on(100)?;
        let mut fleet = Fleet::new()?;
        let host = fleet.host("a", &options(plan, &device))?;
        host.run("redis", &["--net", &format!("{SERVER}/24")], REDIS)?;
        host.wait_for_instance("redis")?;
        let set = DataSet::load(&fleet.client, SERVER, plan.data_bytes)?;
        Ok(Self { host, set, fleet, device })
    }

    /// Moves Redis to a pool.
    pub fn swap(&self, pool: &str) -> anyhow::Result<MemoryReport> {
        let done: SwapDone = serde_json::from_str(&self.host.call(&["swap", "redis", pool, "--json"])?)?;
        let report: MemoryReport = serde_json::from_value(done.detail)?;
        println!("{pool}: {report:?}");
        Ok(report)
    }

    /// Why Redis isn't moved to a pool.
    pub fn refused(&self, pool: &str) -> anyhow::Result<String> {
        let said = self.host.call(&["swap", "redis", pool]).err().context("it was moved")?.to_string();
        println!("{said}");
        Ok(said)
    }

    /// The pool that is this machine's memory.
    pub fn memory_pool(&self) -> anyhow::Result<String> {
        let found: Inventory = serde_json::from_str(&self.host.call(&["pools", "--json"])?)?;
        let memory = found.pools.into_iter().find(|pool| matches!(pool.kind, LocalKind::Memory { .. }));
        Ok(memory.context("no memory")?.name)
    }

    /// What of Redis is in swap, in bytes.
    pub fn swapped(&self) -> anyhow::Result<u64> {
        Ok(self.status("VmSwap:")? << 10)
    }

    /// What of Redis is in memory, in bytes.
    pub fn resident(&self) -> anyhow::Result<u64> {
        Ok(self.status("VmRSS:")? << 10)
    }

    fn status(&self, what: &str) -> anyhow::Result<u64> {
        let text = fs::read_to_string(format!("/proc/{}/status", self.pid()?))?;
        let kib = text.lines().find_map(|line| line.strip_prefix(what)?.trim().strip_suffix(" kB"));
        Ok(kib.with_context(|| format!("no {what}"))?.parse()?)
    }

    /// Redis's major faults so far.
    pub fn faults(&self) -> anyhow::Result<u64> {
        let text = fs::read_to_string(format!("/proc/{}/stat", self.pid()?))?;
        let rest = text.rsplit_once(')').context("no name")?.1;
        Ok(rest.split_whitespace().nth(9).context("no faults")?.parse()?)
    }

    /// Redis, as this machine sees it.
    pub fn pid(&self) -> anyhow::Result<i32> {
        self.host.pids("redis")?.first().copied().context("no process")
    }

    /// What the agent says of Redis.
    pub fn shown(&self) -> anyhow::Result<Option<InSwap>> {
        let views: Vec<InstanceView> = self.host.get("/v1/profiles")?;
        Ok(views
            .into_iter()
            .find(|view| view.instance.name.as_str() == "redis")
            .and_then(|view| view.in_swap))
    }

    /// Waits until the agent says something of Redis that `fits`.
    pub fn wait_for_word(&self, what: &str, fits: impl Fn(&InSwap) -> bool) -> anyhow::Result<InSwap> {
        let mut last = None;
        let found = wait_for(what, LIMIT, || {
            last = self.shown()?;
            Ok(last.clone().filter(&fits))
        });
        found.with_context(|| format!("it said last {last:?}"))
    }

    /// Every value is as it was written.
    pub fn check(&self) -> anyhow::Result<()> {
        let wrong = self.set.wrong_keys(&self.fleet.client)?;
        ensure!(wrong == 0, "{wrong} keys are wrong");
        Ok(())
    }
}

/// What of a process is in huge pages, and what in swap, in bytes.
pub fn huge_and_swapped(pid: i32) -> anyhow::Result<(u64, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let kib = |what| text.lines().find_map(|line| line.strip_prefix(what)?.trim().strip_suffix(" kB"));
    let bytes = |what| anyhow::Ok(kib(what).context("not in smaps_rollup")?.trim().parse::<u64>()? << 10);
    Ok((bytes("AnonHugePages:")?, bytes("Swap:")?))
}

/// Of a host on which the device is the pool `zram`.
pub fn options(plan: &Plan, device: &SwapDevice) -> HostOptions {
    let MemoryConfig { look_every_ms, cold_after_s, pressure_limit, out_mib_per_s, cpu_share } = &plan.memory;
    let more = format!(
        "[pools]\nlook_every_ms = 100\n\n\
         [memory]\nlook_every_ms = {look_every_ms}\ncold_after_s = {cold_after_s}\npressure_limit = {pressure_limit:?}\n\
         out_mib_per_s = {out_mib_per_s:?}\ncpu_share = {cpu_share:?}\n\n\
         [[pool]]\nname = \"zram\"\nswap = {:?}\n\n",
        device.path(),
    );
    HostOptions { more, window_ms: 200, ..HostOptions::default() }
}
