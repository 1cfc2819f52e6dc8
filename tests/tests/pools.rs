//! What `rswap pools` says of this machine, next to what the machine says by itself; a file system that fills up, goes, and comes
//! back; and what `rswap calibrate` measures, next to what fio measures.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::Context;
use nix::sys::stat::{major, minor, stat};
use rswap_agent::pool::{Inventory, LocalKind, LocalPool};
use rswap_tests::{Fleet, Host, HostOptions, loop_device::LoopDevice, reason_to_skip, skip, wait_for};

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

    // What the zones have: MemTotal in /proc/meminfo was seen to be 5 % more than that of all nodes together.
    let zones = fs::read_to_string("/proc/zoneinfo")?;
    let managed =
        zones.lines().filter_map(|line| line.trim().strip_prefix("managed ")?.trim().parse::<u64>().ok());
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)?.context("no page size")?;
    let total = managed.sum::<u64>() as f64 * page as f64;
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

/// What was measured, by name.
fn measure(pool: &LocalPool, what: &str) -> Option<f64> {
    pool.performance.iter().find(|measure| measure.what == what).map(|measure| measure.known.value)
}

/// The median of the latency of direct reads of 4 KiB at random places, in microseconds, as fio sees it.
fn fio_read_latency_us(directory: &Path) -> anyhow::Result<f64> {
    let output = Command::new("fio")
        .args(["--name=look", "--rw=randread", "--bs=4k", "--size=4m", "--direct=1", "--ioengine=psync"])
        .args(["--runtime=1", "--time_based", "--output-format=json", "--unlink=1"])
        .arg(format!("--directory={}", directory.display()))
        .output()?;
    anyhow::ensure!(output.status.success(), "fio: {}", String::from_utf8_lossy(&output.stderr));
    let said: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let ns = said["jobs"][0]["read"]["clat_ns"]["percentile"]["50.000000"].as_f64();
    Ok(ns.context("fio says no median")? / 1e3)
}

#[test]
fn calibrate_measures_and_leaves_nothing() -> anyhow::Result<()> {
    const NAME: &str = "calibrate_measures_and_leaves_nothing";
    if reason_to_skip(NAME).is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let scratch = tempfile::Builder::new().prefix("rswt").tempdir()?;
    let disk = LoopDevice::create(scratch.path(), 96 << 20)?;
    let at = disk.mount_point();
    let more = format!("[pools]\nlook_every_ms = 200\n\n[[pool]]\nname = \"data\"\nstorage = {at:?}\n");
    let mut host = fleet.host("a", &HostOptions { more, ..HostOptions::default() })?;
    let before = fs::read_dir(at)?.count();
    let free_before = nix::sys::statvfs::statvfs(at)?.blocks_free();

    host.call(&["calibrate", "data", "--yes"])?;
    host.call(&["calibrate", "cores", "--yes", "--json"])?;
    // `memory` where the kernel knows no nodes.
    let first =
        inventory(&host)?.pools.into_iter().find(|pool| matches!(pool.kind, LocalKind::Memory { .. }));
    let memory = first.context("no memory is found")?.name;
    host.call(&["calibrate", &memory, "--yes"])?;
    assert_eq!(fs::read_dir(at)?.count(), before, "no file is left");
    assert_eq!(nix::sys::statvfs::statvfs(at)?.blocks_free(), free_before, "and none without a name");

    let found = wait_for("the agent to use what was measured", LIMIT, || {
        let found = inventory(&host)?;
        let seen = |name: &str, what: &str| found.pool(name).and_then(|pool| measure(pool, what)).is_some();
        let all =
            seen("data", "read_iops") && seen("cores", "operations_per_s") && seen(&memory, "latency_ns");
        Ok(all.then_some(found))
    })?;
    let value =
        |name: &str, what: &str| found.pool(name).and_then(|pool| measure(pool, what)).unwrap_or(f64::NAN);
    let operations = value("cores", "operations_per_s");
    assert!((1e7..1e10).contains(&operations), "{operations} operations per second");
    let latency_ns = value(&memory, "latency_ns");
    assert!((5.0..10_000.0).contains(&latency_ns), "{latency_ns} ns");
    let read = value(&memory, "read_bytes_per_s");
    assert!((2e8..1e12).contains(&read), "{read} bytes per second");

    // A loop device is as fast as the page cache under it: only the order of magnitude is the same every time.
    let p50_us = value("data", "read_latency_p50_us");
    if Command::new("fio").arg("--version").stdout(Stdio::null()).status().is_ok() {
        let fio_us = fio_read_latency_us(at)?;
        println!("read latency, median: calibrate {p50_us:.1} us, fio {fio_us:.1} us");
        assert!(p50_us < fio_us * 10.0 && fio_us < p50_us * 10.0, "{p50_us} us, fio {fio_us} us");
    } else {
        skip(NAME, "fio is not installed: its numbers were not compared");
    }
    host.show_log = false;
    Ok(())
}

#[test]
fn calibrate_refuses_what_it_must_not_load() -> anyhow::Result<()> {
    if reason_to_skip("calibrate_refuses_what_it_must_not_load").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let more =
        "[[pool]]\nname = \"one\"\ncpus = \"0\"\n\n[[pool]]\nname = \"lost\"\nstorage = \"/nonexistent\"\n";
    let mut host = fleet.host("a", &HostOptions { more: more.to_owned(), ..HostOptions::default() })?;
    let refused = |arguments: &[&str]| host.call(arguments).unwrap_err().to_string();

    let mut load = Command::new("taskset")
        .args(["-c", "0", "timeout", "20", "sh", "-c", "while :; do :; done"])
        .spawn()?;
    let busy = refused(&["calibrate", "one"]);
    // SIGTERM: timeout passes it on.
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(load.id().cast_signed()),
        nix::sys::signal::Signal::SIGTERM,
    )?;
    load.wait()?;
    assert!(busy.contains("% busy") && busy.contains("--yes"), "{busy}");

    let lost = refused(&["calibrate", "lost", "--yes"]);
    assert!(lost.contains("it is gone"), "{lost}");
    let unknown = refused(&["calibrate", "none"]);
    assert!(unknown.contains("there is no pool \"none\"") && unknown.contains("lost"), "{unknown}");
    // The agent's view of interfaces is of /sys, which stays the machine's: ask for one that is there.
    let link = inventory(&host)?.pools.into_iter().find(|pool| matches!(pool.kind, LocalKind::Link { .. }));
    if let Some(link) = link {
        let alone = refused(&["calibrate", &link.name, "--yes"]);
        assert!(alone.contains("to a peer only"), "{alone}");
        let own = format!("{}:9", host.address());
        let itself = refused(&["calibrate", &link.name, "--yes", "--peer", &own]);
        assert!(itself.contains("is this host"), "{itself}");
    }
    host.show_log = false;
    Ok(())
}
