//! What `rswap pools` says of this machine, next to what the machine says by itself; and a file system that fills up, goes, and comes back.

use std::{fs, path::Path, time::Duration};

use anyhow::Context;
use nix::sys::stat::{major, minor, stat};
use rswap_agent::pool::{Inventory, LocalKind, LocalPool};
use rswap_tests::{Fleet, Host, HostOptions, loop_device::LoopDevice, reason_to_skip, wait_for};

const LIMIT: Duration = Duration::from_secs(20);

fn inventory(host: &Host) -> anyhow::Result<Inventory> {
    Ok(serde_json::from_str(&host.call(&["pools", "--json"])?)?)
}

fn capacity(pool: &LocalPool) -> f64 {
    pool.capacity.as_ref().map_or(0.0, |capacity| capacity.value)
}

#[test]
fn pools_are_those_of_the_machine() -> anyhow::Result<()> {
    if reason_to_skip("pools_are_those_of_the_machine").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let mut host = fleet.host("a", &HostOptions::default())?;
    let found = inventory(&host)?;

    // By the number that stat gives the root directory.
    let number = stat("/")?.st_dev;
    let number = format!("{}:{}", major(number), minor(number));
    let is_root = |pool: &&LocalPool| match &pool.kind {
        LocalKind::Storage { mount_points, .. } => mount_points.iter().any(|at| at == Path::new("/")),
        _ => false,
    };
    let root = found.pools.iter().find(is_root).context("the root file system is missing")?;
    let LocalKind::Storage { devices, .. } = &root.kind else { unreachable!("by is_root") };
    let device = found.devices.iter().find(|device| Some(&device.name) == devices.first());
    assert_eq!(device.and_then(|device| device.number.as_deref()), Some(number.as_str()));
    let room = nix::sys::statvfs::statvfs("/")?;
    assert_eq!(capacity(root), (room.blocks() * room.fragment_size()) as f64);

    let listed = fs::read_to_string("/proc/cpuinfo")?;
    let mut listed: Vec<usize> = listed
        .lines()
        .filter_map(|line| line.strip_prefix("processor")?.split_once(':')?.1.trim().parse().ok())
        .collect();
    let mut cpus: Vec<usize> =
        found.pools.iter().filter_map(|pool| pool.kind.cpus()).flatten().copied().collect();
    cpus.sort_unstable();
    listed.sort_unstable();
    assert_eq!(cpus, listed, "every online CPU once");

    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:")).context("no MemTotal")?;
    let total: f64 = total.trim().trim_end_matches(" kB").parse::<f64>()? * 1024.0;
    let memory = found.pools.iter().filter(|pool| matches!(pool.kind, LocalKind::Memory { .. }));
    let memory: f64 = memory.map(capacity).sum();
    assert!((memory / total - 1.0).abs() < 0.02, "{memory} of {total} bytes");

    let sources = host.call(&["pools", "--sources"])?;
    assert!(
        sources.contains("/sys/devices/system/cpu/online") && sources.contains("statvfs(/)"),
        "{sources}"
    );
    let table = host.call(&["pools"])?;
    assert!(table.contains("this-host") && table.contains(&root.name), "{table}");
    host.show_log = false;
    Ok(())
}

#[test]
fn a_file_system_fills_up_goes_and_comes_back() -> anyhow::Result<()> {
    if reason_to_skip("a_file_system_fills_up_goes_and_comes_back").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let scratch = tempfile::Builder::new().prefix("rswt").tempdir()?;
    let disk = LoopDevice::create(scratch.path(), 48 << 20)?;
    let at = disk.mount_point();
    let more = format!(
        "[pools]\nlook_every_ms = 200\nfull_below_share = 0.1\n\n\
         [[pool]]\nname = \"data\"\nstorage = {at:?}\ncost_per_gib_hour = 0.001\n"
    );
    let mut host = fleet.host("a", &HostOptions { more, ..HostOptions::default() })?;
    let wait_until = |word: &str| {
        wait_for(&format!("the pool to be {word}"), LIMIT, || {
            let found = inventory(&host)?;
            let data = found.pool("data").context("the pool is missing")?.clone();
            Ok((data.state.word() == word).then_some(data))
        })
    };
    let data = wait_until("online")?;
    let LocalKind::Storage { devices, fs_type, .. } = &data.kind else { anyhow::bail!("{data:?}") };
    assert_eq!((fs_type.as_str(), format!("/dev/{}", devices[0]).as_str()), ("ext4", disk.device()));
    assert_eq!(data.cost_per_hour.map(|cost| cost.value), Some(0.001));

    // Until nothing more fits.
    let big = at.join("big");
    let filled = std::io::copy(&mut std::io::repeat(1), &mut fs::File::create(&big)?);
    assert_eq!(filled.unwrap_err().raw_os_error(), Some(nix::libc::ENOSPC));
    let full = wait_until("full")?;
    let size = capacity(&full);
    assert!(full.free.is_some_and(|free| free.value < size * 0.1));
    fs::remove_file(&big)?;
    wait_until("online")?;

    disk.unmount()?;
    let gone = wait_until("gone")?;
    assert!(gone.state.reason().is_some_and(|reason| reason.contains("is mounted at")), "{gone:?}");
    disk.mount()?;
    wait_until("online")?;
    host.show_log = false;
    Ok(())
}
