//! Programs that rswap did not start.

use std::{
    fs,
    path::PathBuf,
    process::{Child, Command},
};

use anyhow::Context;
use rswap_agent::{
    instance::cgroup,
    pool::{CpuSet, cpu_list},
};

use crate::sweep;

/// A cgroup with a program in it that rswap did not start. Both go when it is dropped.
#[derive(Debug)]
pub struct Foreign {
    /// The cgroup.
    pub path: PathBuf,
    child: Child,
}

impl Foreign {
    /// Starts `command`, and puts it there.
    pub fn start(command: &[&str]) -> anyhow::Result<Self> {
        Self::start_at(cgroup::mount_point()?.join(sweep::own_name("foreign")), command)
    }

    fn start_at(path: PathBuf, command: &[&str]) -> anyhow::Result<Self> {
        let (program, arguments) = command.split_first().context("no command")?;
        fs::create_dir(&path)?;
        let child = Command::new(program).args(arguments).spawn()?;
        fs::write(path.join("cgroup.procs"), child.id().to_string())?;
        Ok(Self { path, child })
    }

    /// Ends it, and starts `command` in a new cgroup at the same path.
    pub fn replaced(self, command: &[&str]) -> anyhow::Result<Self> {
        let path = self.path.clone();
        drop(self);
        Self::start_at(path, command)
    }

    /// The processors that it may use.
    pub fn cpus(&self) -> anyhow::Result<CpuSet> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        Ok(cpu_list::parse(line.context("no affinity in the status")?)?)
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Err(error) = sweep::remove_cgroup(&self.path) {
            eprintln!("{error:#}");
        }
    }
}
