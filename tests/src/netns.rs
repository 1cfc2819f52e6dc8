//! Network namespaces and the cables between them, through iproute2.

use std::{
    fs::File,
    os::fd::AsFd,
    path::PathBuf,
    process::Command,
    thread::{self, JoinHandle},
};

use anyhow::{Context, bail};
use nix::sched::{CloneFlags, setns};

/// A named network namespace, removed when dropped.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Makes it, with its loopback up.
    pub fn create(name: String) -> anyhow::Result<Self> {
        ip(&["netns", "add", &name])?;
        let made = Self { name };
        made.ip(&["link", "set", "lo", "up"])?;
        Ok(made)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it can be opened.
    pub fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// Runs `ip` in it.
    pub fn ip(&self, arguments: &[&str]) -> anyhow::Result<()> {
        ip(&[&["-n", &self.name], arguments].concat())
    }

    /// A command that runs in it and dies with the calling thread. The mounts stay as they are: `ip netns
    /// exec` would put another /sys over the cgroups.
    pub fn command(&self, program: &std::path::Path) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "nsenter"]);
        command.arg(format!("--net={}", self.path().display())).arg("--").arg(program);
        command
    }

    /// Runs `work` on a thread of its own that lives in the namespace.
    pub fn spawn<T: Send + 'static>(
        &self,
        name: &str,
        work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
    ) -> anyhow::Result<JoinHandle<anyhow::Result<T>>> {
        let path = self.path();
        let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        let enter_and_work = move || {
            setns(file.as_fd(), CloneFlags::CLONE_NEWNET)
                .with_context(|| format!("cannot enter {}", path.display()))?;
            work()
        };
        thread::Builder::new().name(name.to_owned()).spawn(enter_and_work).context("cannot start a thread")
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if let Err(error) = ip(&["netns", "del", &self.name]) {
            eprintln!("{error:#}");
        }
    }
}

/// Lays a cable between two namespaces; both ends are up afterwards.
pub fn cable(left: (&Netns, &str), right: (&Netns, &str)) -> anyhow::Result<()> {
    let ((left, left_name), (right, right_name)) = (left, right);
    let peer = ["peer", "name", right_name, "netns", right.name()];
    left.ip(&[&["link", "add", left_name, "type", "veth"], peer.as_slice()].concat())?;
    left.ip(&["link", "set", left_name, "up"])?;
    right.ip(&["link", "set", right_name, "up"])
}

fn ip(arguments: &[&str]) -> anyhow::Result<()> {
    let output = Command::new("ip").args(arguments).output().context("cannot start ip (package iproute2)")?;
    if !output.status.success() {
        bail!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
