//! What real programs do with disk and network is forecast, like CPU and memory; what was learnt outlives the agent, and goes from one
//! instance to the next of its class.

use std::{fs, io::Write as _, path::Path, time::Duration};

use nix::sys::signal::Signal;
use rswap_agent::{
    forecast::{DemandPoint, Evidence, Kin, Resource},
    status::InstanceView,
};
use rswap_tests::{Fleet, Host, HostOptions, foreign::Foreign, reason_to_skip, wait_for};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(60);
const FORECAST: &str = "[forecast]\nhorizons_ms = [1000, 2000]\nmin_seen = 20\n";
const IDLE: &[&str] = &["sh", "-c", "while :; do sleep 0.1; done"];

fn options(window_ms: u64, more: &str) -> HostOptions {
    HostOptions { window_ms, more: format!("{FORECAST}{more}"), ..HostOptions::default() }
}

fn view(host: &Host, name: &str) -> anyhow::Result<Option<InstanceView>> {
    let views: Vec<InstanceView> = host.get("/v1/profiles")?;
    Ok(views.into_iter().find(|view| view.instance.name.as_str() == name))
}

fn points(host: &Host, name: &str, resource: Resource) -> anyhow::Result<Vec<DemandPoint>> {
    let demand = view(host, name)?.and_then(|view| view.demand);
    Ok(demand.into_iter().flat_map(|d| d.points).filter(|point| point.resource == resource).collect())
}

fn is_calibrated(points: &[DemandPoint]) -> bool {
    !points.is_empty() && points.iter().all(|point| matches!(point.evidence, Evidence::Enough { .. }))
}

/// Waits until forecasts of a resource may be rested on.
fn calibrated(host: &Host, name: &str, resource: Resource) -> anyhow::Result<Vec<DemandPoint>> {
    wait_for(&format!("a calibrated forecast of {name}'s {}", resource.name()), LIMIT, || {
        Ok(Some(points(host, name, resource)?).filter(|points| is_calibrated(points)))
    })
}

fn kin(host: &Host, name: &str) -> anyhow::Result<Kin> {
    wait_for(&format!("the class of {name}"), LIMIT, || Ok(view(host, name)?.and_then(|view| view.kin)))
}

/// Ends an instance at once.
fn end(host: &Host, name: &str) -> anyhow::Result<()> {
    Ok(fs::write(host.cgroup()?.join(name).join("cgroup.kill"), "1")?)
}

#[test]
fn known_rates_of_disk_and_network_are_forecast_and_recorded() -> anyhow::Result<()> {
    if reason_to_skip("known_rates_of_disk_and_network_are_forecast_and_recorded").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    // Not in /tmp, which may be in memory.
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let file = directory.path().join("data");
    let mut data = fs::File::create(&file)?;
    for block in 0..16u8 {
        data.write_all(&vec![block + 1; 1 << 20])?;
    }
    data.sync_all()?;
    let recorded = fleet.scratch().join("recorded");
    let more = format!("[record]\ndirectory = {recorded:?}\nevery_s = 2\n");
    let host = fleet.host("a", &options(500, &more))?;
    let status: Value = host.get("/v1/status")?;
    let probes = status["probes"].as_array().cloned().unwrap_or_default();
    let needed =
        ["sched_switch", "block_rq_complete", "block_io_start", "inet_sock_set_state", "tcp_connections"];
    let counts =
        |name: &&str| probes.iter().any(|probe| probe["name"] == *name && probe["state"] == "active");
    if !needed.iter().all(counts) {
        let reason = "not every eBPF probe counts here that it needs";
        rswap_tests::skip("known_rates_of_disk_and_network_are_forecast_and_recorded", reason);
        return Ok(());
    }
    let program = concat!(env!("CARGO_MANIFEST_DIR"), "/programs/steady.py");
    host.run("server", &[], &["python3", program, "serve", "7000"])?;
    host.run("worker", &[], &["python3", program, "work", "7000", &file.to_string_lossy()])?;

    // 50 times a second 16 x 4096 bytes read, 10 x 100 sent, 10 x 400 received.
    let (read, sent, received) = (50.0 * 16.0 * 4096.0, 50.0 * 10.0 * 100.0, 50.0 * 10.0 * 400.0);
    for (name, resource, rate) in [
        ("worker", Resource::Io, read),
        ("worker", Resource::NetOut, sent),
        ("worker", Resource::NetIn, received),
        ("server", Resource::NetOut, received),
        ("server", Resource::NetIn, sent),
    ] {
        for point in calibrated(&host, name, resource)? {
            // A machine that is busy with other things is late at times.
            let off = point.need.p50 / rate - 1.0;
            assert!(off.abs() < 0.2, "{name}: {point:?} of {rate}");
            assert!(point.need.p95 >= point.need.p50, "{point:?}");
        }
    }
    let latency = calibrated(&host, "worker", Resource::IoLatency)?;
    let profile = view(&host, "worker")?.and_then(|view| view.profile).expect("it has a window");
    let requests = profile.io_latency_ns();
    let (least, most) = (requests.quantile(0.0), requests.quantile(1.0));
    eprintln!("latency: {latency:?}, {least:?} to {most:?} ns in the last window");
    assert!(
        latency.iter().all(|point| point.need.p50 >= least.expect("it read") as f64 / 2.0),
        "{latency:?}"
    );
    // Who does no I/O has a forecast of none, and no latency.
    assert!(points(&host, "server", Resource::IoLatency)?.is_empty());
    assert!(points(&host, "server", Resource::Io)?.iter().all(|point| point.need.p95 < read / 10.0));
    assert!(points(&host, "worker", Resource::Written)?.is_empty(), "nobody tracks its writes");

    // The same for people, for Prometheus, and for the simulator.
    let shown = host.call(&["forecast", "show", "worker"])?;
    for word in ["net_in_bytes_per_s", "io_latency_ns", "class python3"] {
        assert!(shown.contains(word), "{word}: {shown}");
    }
    assert!(host.call(&["ps"])?.contains("NET OUT/S"));
    let scrape = ["-s", "http://127.0.0.1:7790/metrics"];
    let metrics = host.command(Path::new("curl")).args(scrape).output()?;
    let metrics = String::from_utf8_lossy(&metrics.stdout).into_owned();
    let need = "rswap_instance_need{instance=\"worker\",resource=\"net_out_bytes_per_s\",horizon_ms=\"1000\"";
    assert!(metrics.contains(need), "{metrics}");
    assert!(metrics.contains("rswap_instance_io_latency_p99_seconds{instance=\"worker\"}"), "{metrics}");

    let rows = fs::read_to_string(recorded.join("worker.csv"))?;
    let heads: Vec<&str> = rows.lines().next().unwrap_or_default().split(',').collect();
    let last: Vec<&str> = rows.lines().last().unwrap_or_default().split(',').collect();
    let field =
        |name: &str| heads.iter().position(|head| *head == name).and_then(|at| last[at].parse::<f64>().ok());
    for (column, rate) in
        [("io_bytes_per_s", read), ("net_out_bytes_per_s", sent), ("net_in_bytes_per_s", received)]
    {
        let value = field(column).unwrap_or(0.0);
        assert!((value / rate - 1.0).abs() < 0.3, "{column}: {value} of {rate}\n{rows}");
    }
    assert!(field("io_latency_ns").is_some() && last[2].starts_with("python3"), "{rows}");
    let pools = directory.path().join("pools.toml");
    fs::write(
        &pools,
        "[[pool]]\nname = \"link\"\nkind = \"host\"\ncores = 125\ncost_per_core_hour = 0.001\n",
    )?;
    let simulated = host.call(&[
        "simulate",
        "--traces",
        &recorded.to_string_lossy(),
        "--pools",
        &pools.to_string_lossy(),
        "--column",
        "net_out_bytes_per_s",
        "--scale",
        "0.000001",
    ])?;
    assert!(simulated.contains("act p95"), "{simulated}");
    Ok(())
}

#[test]
fn a_new_agent_goes_on_with_what_the_last_one_knew() -> anyhow::Result<()> {
    if reason_to_skip("a_new_agent_goes_on_with_what_the_last_one_knew").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let mut host = fleet.host("a", &options(200, ""))?;
    let seen = |points: &[DemandPoint]| {
        let seen = points.iter().map(|point| match point.evidence {
            Evidence::TooLittle { seen, .. } | Evidence::Enough { seen, .. } => seen,
        });
        seen.min().unwrap_or(0)
    };
    let first = |host: &Host| {
        wait_for("the first forecast of the new agent", LIMIT, || {
            Ok(Some(points(host, "web", Resource::Cpu)?).filter(|points| !points.is_empty()))
        })
    };
    host.run("web", &[], IDLE)?;
    host.run("short", &[], IDLE)?;
    calibrated(&host, "web", Resource::Cpu)?;
    // A series teaches others after 48 windows.
    let before = wait_for("so many outcomes that it teaches", LIMIT, || {
        Ok(Some(seen(&points(&host, "web", Resource::Cpu)?)).filter(|seen| *seen >= 48))
    })?;

    // One that is told to stop writes down what it knows.
    host.signal_agent(Signal::SIGTERM)?;
    host.wait_for_agent(LIMIT)?;
    assert!(host.learnt_file().exists());
    end(&host, "short")?;
    host.start_agent()?;
    let after = first(&host)?;
    assert!(is_calibrated(&after) && seen(&after) >= before, "{before} before, then {after:?}");
    let exported = host.call(&["forecast", "export"])?;
    assert!(exported.contains("\"web sh -c"), "what runs has taught too: {exported}");

    // What can't be used is set aside, and the agent runs.
    host.kill_agent()?;
    let mut bytes = fs::read(host.learnt_file())?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0xff;
    fs::write(host.learnt_file(), &bytes)?;
    host.start_agent()?;
    let anew = first(&host)?;
    assert!(!is_calibrated(&anew), "{anew:?}");
    assert!(host.log()?.contains("is set aside"), "{}", host.log_tail());
    assert_eq!(fs::read(host.learnt_file().with_extension("aside"))?, bytes);
    Ok(())
}

#[test]
fn a_killed_agent_loses_no_more_than_since_the_last_save() -> anyhow::Result<()> {
    if reason_to_skip("a_killed_agent_loses_no_more_than_since_the_last_save").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let mut host = fleet.host("a", &options(200, ""))?;
    // The harness writes the section: only its last key differs.
    let config = host.learnt_file().with_file_name("rswap.toml");
    let text = fs::read_to_string(&config)?;
    fs::write(&config, text.replace("[learnt]\n", "[learnt]\nsave_every_s = 1\n"))?;
    host.kill_agent()?;
    host.start_agent()?;
    host.run("web", &[], IDLE)?;
    calibrated(&host, "web", Resource::Cpu)?;
    std::thread::sleep(Duration::from_millis(1500));
    host.kill_agent()?;
    host.start_agent()?;
    let after = wait_for("the first forecast of the new agent", LIMIT, || {
        Ok(Some(points(&host, "web", Resource::Cpu)?).filter(|points| !points.is_empty()))
    })?;
    assert!(is_calibrated(&after), "{after:?}");
    Ok(())
}

/// Waits for so many seconds, then holds 96 MiB and is busy half of the time.
const SERVES: &str = "import sys, time
time.sleep(float(sys.argv[1]))
held = b'x' * (96 << 20)
while True:
    until = time.monotonic() + 0.05
    while time.monotonic() < until: pass
    time.sleep(0.05)
";

#[test]
fn the_first_band_of_a_newcomer_holds_what_its_class_uses_though_half_of_it_idles() -> anyhow::Result<()> {
    let name = "the_first_band_of_a_newcomer_holds_what_its_class_uses_though_half_of_it_idles";
    if reason_to_skip(name).is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let host = fleet.host("a", &options(400, ""))?;
    let of_class: &[&str] = &["--label", "app=shop"];
    for busy in ["busy-1", "busy-2"] {
        host.run(busy, of_class, &["python3", "-c", SERVES, "0"])?;
    }
    for idle in ["idle-1", "idle-2"] {
        host.run(idle, of_class, IDLE)?;
    }
    // A series teaches others after 48 windows.
    let all_teach = || -> anyhow::Result<Option<()>> {
        for name in ["busy-1", "busy-2", "idle-1", "idle-2"] {
            let cpu = points(&host, name, Resource::Cpu)?;
            let teaches =
                cpu.iter().all(|point| matches!(point.evidence, Evidence::Enough { seen, .. } if seen >= 48));
            if cpu.is_empty() || !teaches {
                return Ok(None);
            }
        }
        Ok(Some(()))
    };
    wait_for("a class that can teach", LIMIT, all_teach)?;
    let usual = |resource| -> anyhow::Result<f64> {
        Ok(points(&host, "busy-1", resource)?.first().map_or(0.0, |point| point.need.p50))
    };
    let (memory, cores) = (usual(Resource::Memory)?, usual(Resource::Cpu)?);
    assert!(memory > f64::from(96 << 20) && cores > 0.1, "{memory} bytes, {cores} cores");

    // One that begins with nothing, like those that idle, and without a class one that does the same.
    host.run("new", of_class, &["python3", "-c", SERVES, "6"])?;
    host.run("stranger", &["--label", "app=other"], &["python3", "-c", SERVES, "600"])?;
    let first = |name: &str| {
        wait_for(&format!("the first forecast of {name}"), LIMIT, || {
            let (memory, cpu) = (points(&host, name, Resource::Memory)?, points(&host, name, Resource::Cpu)?);
            Ok(Some((memory, cpu)).filter(|(memory, cpu)| !memory.is_empty() && !cpu.is_empty()))
        })
    };
    let (bytes, cpu) = first("new")?;
    let (strange_bytes, _) = first("stranger")?;
    for point in bytes.iter().chain(&cpu) {
        let used = if point.resource == Resource::Memory { memory } else { cores };
        assert!(matches!(point.evidence, Evidence::TooLittle { .. }), "no plan rests on it: {point:?}");
        let band = 0.7 * used..2.0 * used;
        assert!(band.contains(&point.need.p99), "{point:?}: its like use {used}");
    }
    // What does not know the class knows nothing of it.
    assert!(strange_bytes.iter().all(|point| point.need.p99 < memory / 2.0), "{strange_bytes:?}");
    // And what it then uses is in that band.
    let then = wait_for("what it uses", LIMIT, || {
        let used = points(&host, "new", Resource::Memory)?.first().map_or(0.0, |point| point.need.p50);
        Ok(Some(used).filter(|used| *used > f64::from(96 << 20)))
    })?;
    assert!(bytes.iter().all(|point| then <= 1.4 * point.need.p99), "{bytes:?}, then {then}");
    Ok(())
}

#[test]
fn the_class_is_the_label_or_the_program_and_goes_along() -> anyhow::Result<()> {
    if reason_to_skip("the_class_is_the_label_or_the_program_and_goes_along").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let (a, b) = (fleet.host("a", &options(200, ""))?, fleet.host("b", &options(200, ""))?);
    a.run("plain", &[], &["sleep", "600"])?;
    a.run("front", &["--label", "app=shop", "--label", "tier=1"], &["sleep", "600"])?;
    let foreign = Foreign::start(&["sleep", "600"])?;
    a.call(&["adopt", &foreign.path.to_string_lossy(), "--name", "taken"])?;
    let (plain, front) = (kin(&a, "plain")?, kin(&a, "front")?);
    assert_eq!((plain.class.as_str(), plain.identity.as_str()), ("sleep uid 0", "plain sleep 600"));
    assert_eq!(front.class, "app=shop");
    assert_eq!(
        kin(&a, "taken")?,
        Kin { class: "sleep uid 0".to_owned(), identity: "taken sleep".to_owned() }
    );
    for (name, kin_here) in [("plain", plain), ("front", front)] {
        a.migrate(name, &b.migrate_address())?.end()?.map_err(anyhow::Error::msg)?;
        b.wait_for_instance(name)?;
        assert_eq!(kin(&b, name)?, kin_here);
    }
    Ok(())
}
