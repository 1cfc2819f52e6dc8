//! A host as it is deployed to: a real systemd as process 1, a real sshd, files of its own. It shares the machine's kernel, and
//! has PID, mount, network, cgroup, UTS and IPC namespaces of its own (`tests/machine/boot.sh`).

use std::{
    fs::{self, File},
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use anyhow::{Context, ensure};
use rswap_agent::instance::cgroup;

use crate::{Fleet, netns::Netns, sweep, wait_for};

const BOOT_LIMIT: Duration = Duration::from_secs(30);

/// Why there can be none here.
pub fn reason_to_skip(test: &str) -> Option<&'static str> {
    let needed = ["/lib/systemd/systemd", "/usr/sbin/sshd", "/usr/bin/ssh-keygen"];
    let missing = needed.iter().any(|path| !Path::new(path).exists());
    let reason = "it needs systemd, openssh-server and openssh-client: `cargo xtask setup` installs them";
    crate::reason_to_skip(test).or_else(|| {
        missing.then(|| {
            crate::skip(test, reason);
            reason
        })
    })
}

/// A host. It is gone, with all that ran there, when this is dropped.
#[derive(Debug)]
pub struct Machine {
    name: String,
    address: Ipv4Addr,
    netns: Netns,
    directory: PathBuf,
    cgroup: PathBuf,
    first: Option<Child>,
}

impl Machine {
    /// Boots one in the fleet's network, and waits until it can be logged in to: `ssh -F CONFIG NAME`.
    pub fn boot(fleet: &mut Fleet, name: &str) -> anyhow::Result<Self> {
        let (netns, address) = fleet.plug(name)?;
        let directory = fleet.scratch().join(format!("machine-{name}"));
        let group = cgroup::mount_point()?.join(sweep::own_name(name));
        fs::create_dir_all(&directory)?;
        fs::create_dir_all(&group)?;
        let mut machine =
            Self { name: name.to_owned(), address, netns, directory, cgroup: group, first: None };
        machine.make_keys(fleet)?;
        machine.start()?;
        let up = wait_for(&format!("{name} to be logged in to"), BOOT_LIMIT, || {
            let asked = machine.ssh(fleet, &["systemctl is-active host.target"]).output()?;
            Ok((String::from_utf8_lossy(&asked.stdout).trim() == "active").then_some(()))
        });
        up.with_context(|| machine.console())?;
        Ok(machine)
    }

    /// The configuration of ssh that has all hosts of the fleet.
    pub fn ssh_config(fleet: &Fleet) -> PathBuf {
        fleet.scratch().join("ssh_config")
    }

    /// A key pair for the host and one for whoever logs in, and the client's configuration.
    fn make_keys(&self, fleet: &Fleet) -> anyhow::Result<()> {
        let keys = self.directory.with_extension("keys");
        fs::create_dir_all(&keys)?;
        let user = fleet.scratch().join("ssh_key");
        for path in [&user, &keys.join("host_key")] {
            if path.exists() {
                continue;
            }
            let mut command = Command::new("ssh-keygen");
            command.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(path).stdin(Stdio::null());
            ensure!(command.status().context("cannot start ssh-keygen")?.success(), "ssh-keygen failed");
        }
        fs::copy(user.with_extension("pub"), keys.join("authorized_keys"))?;
        let public = fs::read_to_string(keys.join("host_key.pub"))?;
        let known = fleet.scratch().join("known_hosts");
        let append = |path: &Path, text: String| {
            let before = fs::read_to_string(path).unwrap_or_default();
            fs::write(path, before + &text)
        };
        append(&known, format!("{} {public}", self.address))?;
        append(
            &Self::ssh_config(fleet),
            format!(
                "Host {}\n  HostName {}\n  User root\n  IdentityFile {}\n  IdentitiesOnly yes\n  UserKnownHostsFile {}\n  \
                 StrictHostKeyChecking yes\n  LogLevel ERROR\n\n",
                self.name,
                self.address,
                user.display(),
                known.display()
            ),
        )?;
        Ok(())
    }

    fn start(&mut self) -> anyhow::Result<()> {
        let boot = Path::new(env!("CARGO_MANIFEST_DIR")).join("machine");
        // Into its cgroup first: it becomes the root of the one that the host sees.
        let enter = "echo $$ >\"$1/cgroup.procs\"; shift; exec unshare --pid --fork --kill-child --mount --cgroup --uts --ipc \"$@\"";
        let mut command = self.netns.command(Path::new("sh"));
        command.args(["-ec", enter, "sh"]).arg(&self.cgroup).arg(boot.join("boot.sh"));
        command.arg(&self.directory).arg(&self.name).arg(&boot);
        let console = File::create(self.directory.with_extension("console"))?;
        command.stdin(Stdio::null()).stdout(console.try_clone()?).stderr(console);
        self.first = Some(command.spawn().context("cannot start unshare (package util-linux)")?);
        Ok(())
    }

    /// What it has said while it booted.
    pub fn console(&self) -> String {
        fs::read_to_string(self.directory.with_extension("console")).unwrap_or_default()
    }

    /// Its name: what ssh calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its address in the fleet's network.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// A command over ssh, from the fleet's client.
    pub fn ssh(&self, fleet: &Fleet, words: &[&str]) -> Command {
        let mut command = fleet.client.command(Path::new("ssh"));
        command.arg("-F").arg(Self::ssh_config(fleet)).args(["-o", "BatchMode=yes", &self.name]).args(words);
        command.stdin(Stdio::null());
        command
    }

    /// What a shell there says to `script`; a failure is an error.
    pub fn sh(&self, fleet: &Fleet, script: &str) -> anyhow::Result<String> {
        let output: Output = self.ssh(fleet, &[script]).output().context("cannot start ssh")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{script:?} on {}: {}: {}", self.name, output.status, said.trim());
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // All of its processes are in there: those that its process 1 would take with it, and whoever entered it.
        if let Err(error) = sweep::remove_cgroup(&self.cgroup) {
            eprintln!("cannot clean up {}: {error:#}", self.name);
        }
        if let Some(mut first) = self.first.take() {
            // It ends with its child, which has been killed.
            drop(first.kill());
            drop(first.wait());
        }
    }
}
