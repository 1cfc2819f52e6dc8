//! A program that is no instance, and takes all of a core that it can get.

use std::{
    fs,
    process::{Child, Command},
    time::Duration,
};

use anyhow::Context;

use crate::wait_for;

/// How much a process and its session count, from -20 (much) to 19. With autogroups (`sched(7)`) a nice value counts within a session
/// only, so that the session gets the same. It has to be the one that it will stay in.
pub fn set_nice(pid: u32, nice: i32) -> anyhow::Result<()> {
    let set = Command::new("renice").args(["-n", &nice.to_string(), "-p", &pid.to_string()]).output();
    let set = set.context("start renice")?;
    anyhow::ensure!(set.status.success(), "renice: {}", String::from_utf8_lossy(&set.stderr));
    let autogroup = format!("/proc/{pid}/autogroup");
    if fs::exists(&autogroup)? {
        fs::write(&autogroup, nice.to_string()).with_context(|| format!("write {autogroup}"))?;
    }
    Ok(())
}

/// It ends when it is dropped.
#[derive(Debug)]
pub struct Hog(Child);

impl Hog {
    /// One on this CPU, in a session of its own, as programs are that nobody started from here; see [`set_nice`].
    pub fn start(cpu: usize, nice: i32) -> anyhow::Result<Self> {
        let loops = ["taskset", "-c", &cpu.to_string(), "sh", "-c", "while :; do :; done"];
        let child =
            Command::new("setsid").args(loops).spawn().context("start a program that takes a core")?;
        let hog = Self(child);
        let pid = hog.0.id();
        let session = || {
            let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            text.rsplit_once(')')?.1.split_ascii_whitespace().nth(3)?.parse::<u32>().ok()
        };
        wait_for("a session of its own", Duration::from_secs(5), || {
            Ok((session() == Some(pid)).then_some(()))
        })?;
        set_nice(pid, nice)?;
        Ok(hog)
    }

    /// One that leaves no usual program anything of this CPU (`SCHED_FIFO`). Not for long: after a second the kernel gives them a share. It ends by
    /// itself soon after.
    pub fn before_all(cpu: usize) -> anyhow::Result<Self> {
        const FIFO: &str = "1";
        let loops =
            ["-c", &cpu.to_string(), "chrt", "--fifo", "1", "sh", "-c", "ulimit -t 5; while :; do :; done"];
        let hog =
            Self(Command::new("taskset").args(loops).spawn().context("start a program that takes a core")?);
        let stat = format!("/proc/{}/stat", hog.0.id());
        wait_for("a program that runs before all others", Duration::from_secs(5), || {
            let text = fs::read_to_string(&stat)?;
            let policy = text.rsplit_once(')').and_then(|(_, rest)| rest.split_ascii_whitespace().nth(38));
            Ok((text.contains("(sh)") && policy == Some(FIFO)).then_some(()))
        })?;
        Ok(hog)
    }
}

/// Whether [`Hog::before_all`] is permitted: in a group of processes that has no share of real time it is not (`CONFIG_RT_GROUP_SCHED`).
pub fn may_run_before_all() -> anyhow::Result<bool> {
    let tried = Command::new("chrt").args(["--fifo", "1", "true"]).env("LC_ALL", "C").output();
    let tried = tried.context("start chrt")?;
    let said = String::from_utf8_lossy(&tried.stderr);
    anyhow::ensure!(tried.status.success() || said.contains("not permitted"), "chrt: {said}");
    Ok(tried.status.success())
}

/// Has all threads of a process, and what they start from here on, run on these CPUs (`0`, `0-3`).
pub fn run_on(cpus: &str, pid: u32) -> anyhow::Result<()> {
    let set = Command::new("taskset").args(["-a", "-c", "-p", cpus, &pid.to_string()]).output();
    let set = set.context("start taskset")?;
    anyhow::ensure!(set.status.success(), "taskset: {}", String::from_utf8_lossy(&set.stderr));
    Ok(())
}

impl Drop for Hog {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
