//! What an agent may, what its threads that serve may, and that instances keep all that they had.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, ensure};
use rswap_agent::privilege;
use rswap_tests::{Fleet, HostOptions, controller::Controller, reason_to_skip, scene::Scene};

/// What stands behind `key` in a status of /proc, for sets of capabilities.
fn set(status: &Path, key: &str) -> anyhow::Result<u64> {
    let text = fs::read_to_string(status).with_context(|| format!("cannot read {}", status.display()))?;
    let line = text.lines().find_map(|line| line.strip_prefix(key)).context("no such line")?;
    Ok(u64::from_str_radix(line.trim_start_matches(':').trim(), 16)?)
}

/// Every privilege that /proc shows of process `pid`.
fn privileges(pid: i32) -> anyhow::Result<BTreeMap<&'static str, u64>> {
    let status = Path::new("/proc").join(pid.to_string()).join("status");
    let keys = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp"];
    keys.into_iter().map(|key| Ok((key, set(&status, key)?))).collect()
}

#[test]
fn the_agent_gives_up_what_it_does_not_need_and_instances_keep_all_of_theirs() -> anyhow::Result<()> {
    if reason_to_skip("the_agent_gives_up_what_it_does_not_need_and_instances_keep_all_of_theirs").is_some() {
        return Ok(());
    }
    let own = privileges(i32::try_from(std::process::id())?)?;
    let kept = privilege::kept().bits() & own["CapPrm"];
    let scene = Scene::set()?;
    for host in [&scene.a, &scene.b] {
        let pid = host.agent_pid().context("no agent")?;
        let agent = privileges(i32::try_from(pid)?)?;
        ensure!(agent["CapPrm"] == kept && agent["CapEff"] == kept, "{agent:x?}, not {kept:x}");
        ensure!(agent["CapInh"] == 0 && agent["CapAmb"] == 0, "{agent:x?}");
        ensure!(
            agent["CapBnd"] == own["CapBnd"] && agent["NoNewPrivs"] == 0,
            "{agent:x?}: instances inherit it"
        );
        let mut serving = 0;
        for task in fs::read_dir(format!("/proc/{pid}/task"))? {
            let task = task?.path();
            if fs::read_to_string(task.join("comm"))?.trim() == "rswap-serves" {
                serving += 1;
                let may = set(&task.join("status"), "CapPrm")?;
                ensure!(may & !2 == 0 && set(&task.join("status"), "NoNewPrivs")? == 1, "it may {may:x}");
            }
        }
        ensure!(serving >= 2, "{serving} threads serve");
    }
    // Of root, which has everything there is, and of somebody who may come to everything by a set-user-ID program.
    scene.run("root", &[], &["sleep", "1000"])?;
    let user = ["setpriv", "--reuid", "3001", "--regid", "3001", "--clear-groups", "sleep", "1000"];
    scene.run("user", &[], &user)?;
    for (name, permitted) in [("root", own["CapPrm"]), ("user", 0)] {
        let started = privileges(scene.a.pids(name)?[0])?;
        ensure!(started["CapPrm"] == permitted && started["CapBnd"] == own["CapBnd"], "{name}: {started:x?}");
        for (from, to) in [(&scene.a, &scene.b), (&scene.b, &scene.a)] {
            scene.moved(name, from, to)?;
            let moved = privileges(to.pids(name)?[0])?;
            ensure!(moved == started, "{name} had {started:x?} and has {moved:x?}");
        }
    }
    Ok(())
}

#[test]
fn an_agent_that_may_not_enough_names_what_is_missing_and_touches_nothing() -> anyhow::Result<()> {
    if reason_to_skip("an_agent_that_may_not_enough_names_what_is_missing_and_touches_nothing").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let mut host = fleet.host("a", &HostOptions::default())?;
    host.kill_agent()?;
    fs::remove_file(host.socket())?;
    let limited = |arguments: &[&str]| -> anyhow::Result<_> {
        let wanted = host.rswap(arguments)?;
        let mut command = Command::new("timeout");
        command
            .args(["20", "setpriv", "--bounding-set", "-sys_ptrace,-kill,-net_broadcast"])
            .arg(wanted.get_program())
            .args(wanted.get_args());
        Ok(command.stdin(Stdio::null()).output()?)
    };
    let refused = limited(&["agent"])?;
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure!(!refused.status.success(), "it started");
    ensure!(said.contains("CAP_SYS_PTRACE is missing") && said.contains("CAP_KILL is missing"), "{said}");
    ensure!(!said.contains("CAP_SYS_ADMIN") && !said.contains("CAP_NET_BROADCAST"), "{said}");
    ensure!(!host.socket().exists(), "it has made its socket");
    let doctor = limited(&["doctor", "--json"])?;
    let features: Vec<serde_json::Value> = serde_json::from_slice(&doctor.stdout)?;
    let of = |name: &str| features.iter().find(|feature| feature["name"] == name).context("no such feature");
    let detail = of("capabilities")?["detail"].to_string();
    ensure!(
        of("capabilities")?["present"] == false && detail.contains("CAP_SYS_PTRACE is missing"),
        "{detail}"
    );
    let some = of("capabilities for some instances")?;
    ensure!(
        some["present"] == false && some["detail"].to_string().contains("all but CAP_NET_BROADCAST"),
        "{some}"
    );
    ensure!(some["cost_of_lack"].to_string().contains("NETLINK_LISTEN_ALL_NSID"), "{some}");
    let detail = of("bounding set of capabilities")?["detail"].to_string();
    ensure!(detail.contains("CAP_SYS_PTRACE"), "{detail}");
    host.start_agent()?;
    host.call(&["health"])?;
    let features: Vec<serde_json::Value> = serde_json::from_str(&host.call(&["doctor", "--json"])?)?;
    let found =
        features.iter().find(|feature| feature["name"] == "capabilities").context("no such feature")?;
    let agent = format!("the agent (pid {})", host.agent_pid().context("no agent")?);
    ensure!(found["present"] == true && found["detail"].to_string().contains(&agent), "{found}");
    Ok(())
}

#[test]
fn a_controller_may_nothing() -> anyhow::Result<()> {
    if reason_to_skip("a_controller_may_nothing").is_some() {
        return Ok(());
    }
    let directory = tempfile::tempdir()?;
    let controller = Controller::start(directory.path(), "")?;
    let pid = i32::try_from(controller.pid().context("no controller")?)?;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let task = task?.file_name().to_string_lossy().parse()?;
        let may = privileges(task)?;
        ensure!(
            ["CapPrm", "CapEff", "CapInh", "CapAmb", "CapBnd"].iter().all(|set| may[set] == 0),
            "{may:x?}"
        );
        ensure!(may["NoNewPrivs"] == 1, "{may:x?}");
    }
    Ok(())
}
