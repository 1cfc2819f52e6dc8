//! One host: a network namespace and an agent in it.

use std::{
    fs::{self, File},
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rswap_agent::{
    control::client::{Client, Target},
    instance::cgroup,
    status::InstanceView,
};
use rswap_trust::Files;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{api::Api, binary, fleet::MIGRATE_PORT, migration::Migration, netns::Netns, sweep, wait_for};

/// An agent that follows one that was killed waits for its guard, and then ends it: 17 seconds beside a disk that hangs.
const START_LIMIT: Duration = Duration::from_secs(30);
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// Lines of the agent's log that a failed test shows.
const LOG_LINES_SHOWN: usize = 40;

/// What a test wants otherwise than the default.
#[derive(Clone, Debug)]
pub struct HostOptions {
    /// `observe` or `act`.
    pub mode: &'static str,
    /// Length of a profile window, in milliseconds.
    pub window_ms: u64,
    /// How long an instance may stand still, in milliseconds.
    pub max_unavailability_ms: u64,
    /// How long a freeze may last before its guard ends it, in milliseconds.
    pub freeze_limit_ms: u64,
    /// Connections of a migration, if not as many as its way is worth.
    pub streams: Option<u8>,
    /// Further sections of the configuration, in TOML: `[plan]`, `[forecast]`, `[[pool]]`.
    pub more: String,
    /// What only this host has: each first path is mounted over the second. The hosts share all other files.
    pub mounts: Vec<(PathBuf, PathBuf)>,
    /// The agent finds the interfaces of its own namespace in /sys, not the machine's.
    pub own_links: bool,
}

impl Default for HostOptions {
    fn default() -> Self {
        Self {
            mode: "observe",
            window_ms: 1000,
            max_unavailability_ms: 100,
            freeze_limit_ms: 15_000,
            streams: None,
            more: String::new(),
            mounts: Vec::new(),
            own_links: false,
        }
    }
}

/// A host with its agent. When it is dropped, the agent is stopped and the instances are killed.
#[derive(Debug)]
pub struct Host {
    name: String,
    address: Ipv4Addr,
    netns: Netns,
    dir: PathBuf,
    cgroup_parent: String,
    mounts: Vec<(PathBuf, PathBuf)>,
    own_links: bool,
    files: Files,
    agent: Option<Child>,
    /// Whether the end of the agent's log is printed at the end.
    pub show_log: bool,
}

impl Host {
    pub(crate) fn start(
        name: &str,
        address: Ipv4Addr,
        netns: Netns,
        dir: &Path,
        files: Files,
        options: &HostOptions,
    ) -> anyhow::Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let cgroup_parent = sweep::own_name(name);
        let mut host = Self {
            name: name.to_owned(),
            address,
            netns,
            dir: dir.to_owned(),
            cgroup_parent,
            mounts: options.mounts.clone(),
            own_links: options.own_links,
            files,
            agent: None,
            show_log: true,
        };
        let configuration = host.configuration(options);
        let path = host.config_path();
        fs::write(&path, configuration).with_context(|| format!("cannot write {}", path.display()))?;
        host.start_agent()?;
        Ok(host)
    }

    fn configuration(&self, options: &HostOptions) -> String {
        // The hosts of a fleet are namespaces of one machine: every file is there on each of them.
        let shared = if options.more.contains("[files]") { "" } else { "[files]\nshared = [\"/\"]\n\n" };
        let Files { ca, certificate, key } = &self.files;
        let tls = if options.more.contains("[tls]") {
            String::new()
        } else {
            format!("[tls]\nca = {ca:?}\ncertificate = {certificate:?}\nkey = {key:?}\n\n")
        };
        let streams = options.streams.map_or_else(String::new, |streams| format!("streams = {streams}\n"));
        format!(
            "[agent]\nhost = {:?}\nstate_dir = {:?}\ncalibrations_dir = {:?}\ncontrol_socket = {:?}\nstatus_address = \"127.0.0.1:7790\"\n\
             mode = {:?}\nwindow_ms = {}\ncgroup_parent = {:?}\n\n\
             [network]\nbridge = \"br0\"\nuplink = \"up0\"\n\n\
             [learnt]\nfile = {:?}\n\n\
             [migrate]\nlisten = \"{}\"\nmax_unavailability_ms = {}\nfreeze_limit_ms = {}\njournal_dir = {:?}\n{streams}\n{tls}{shared}{}",
            self.name,
            self.dir,
            self.dir.join("calibrations"),
            self.socket(),
            options.mode,
            options.window_ms,
            self.cgroup_parent,
            self.learnt_file(),
            self.migrate_address(),
            options.max_unavailability_ms,
            options.freeze_limit_ms,
            self.dir.join("migrations"),
            options.more
        )
    }

    /// Its certificate, its key, and whom it trusts.
    pub fn files(&self) -> &Files {
        &self.files
    }

    fn config_path(&self) -> PathBuf {
        self.dir.join("rswap.toml")
    }

    /// Where its agent keeps what it has learnt.
    pub fn learnt_file(&self) -> PathBuf {
        self.dir.join("learnt")
    }

    fn log_path(&self) -> PathBuf {
        self.dir.join("agent.log")
    }

    /// Its agent's control socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("control.sock")
    }

    /// Its address in the fleet's network.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Where its agent takes migrations.
    pub fn migrate_address(&self) -> String {
        format!("{}:{MIGRATE_PORT}", self.address)
    }

    /// Its network namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// The directory that its instances' cgroups are in.
    pub fn cgroup(&self) -> anyhow::Result<PathBuf> {
        Ok(cgroup::mount_point()?.join(&self.cgroup_parent))
    }

    /// Starts the agent and waits until it answers. It dies with the calling thread.
    pub fn start_agent(&mut self) -> anyhow::Result<()> {
        let log = File::options().create(true).append(true).open(self.log_path())?;
        let mut agent = self
            .agent_command()?
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start the agent")?;
        let answered = wait_for(&format!("the agent of host {}", self.name), START_LIMIT, || {
            if let Some(status) = agent.try_wait()? {
                bail!("the agent of host {} ended: {status}\n{}", self.name, self.log_tail());
            }
            Ok(self.get::<serde_json::Value>("/v1/status").ok())
        });
        self.agent = Some(agent);
        answered.map(drop)
    }

    /// Ends its agent, and starts the next one in this mode: `observe` or `act`.
    pub fn restart_in(&mut self, mode: &str) -> anyhow::Result<()> {
        self.signal_agent(Signal::SIGTERM)?;
        self.wait_for_agent(STOP_LIMIT)?;
        let path = self.config_path();
        let text = fs::read_to_string(&path)?;
        let (before, after) = text.split_once("\nmode = ").context("the configuration has no mode")?;
        let rest = after.split_once('\n').map_or("", |(_, rest)| rest);
        fs::write(&path, format!("{before}\nmode = {mode:?}\n{rest}"))?;
        self.start_agent()
    }

    /// Kills the agent as a crash would. Its instances live on.
    pub fn kill_agent(&mut self) -> anyhow::Result<()> {
        if let Some(mut agent) = self.agent.take() {
            agent.kill().context("cannot kill the agent")?;
            agent.wait().context("cannot wait for the agent")?;
        }
        Ok(())
    }

    /// The same, without waiting for its end, which may be late: a thread of it may wait for a disk. What is returned has to be waited for.
    pub fn strike_agent(&mut self) -> anyhow::Result<Child> {
        let mut agent = self.agent.take().context("no agent runs")?;
        agent.kill().context("cannot kill the agent")?;
        Ok(agent)
    }

    /// The agent's pid: setpriv and nsenter replaced themselves by it.
    pub fn agent_pid(&self) -> Option<u32> {
        self.agent.as_ref().map(Child::id)
    }

    /// Sends its agent a signal.
    pub fn signal_agent(&self, signal: Signal) -> anyhow::Result<()> {
        let pid = self.agent_pid().context("no agent runs")?;
        kill(Pid::from_raw(i32::try_from(pid)?), signal).context("cannot signal the agent")
    }

    /// The processes of instance `name`, without its init, as this machine sees them.
    pub fn pids(&self, name: &str) -> anyhow::Result<Vec<i32>> {
        let text = fs::read_to_string(self.cgroup()?.join(name).join("cgroup.procs"))?;
        let all = text.lines().map(str::parse).collect::<Result<Vec<i32>, _>>()?;
        Ok(all.into_iter().skip(1).collect())
    }

    /// Waits until an agent that was told to stop has ended.
    pub fn wait_for_agent(&mut self, limit: Duration) -> anyhow::Result<()> {
        if let Some(mut agent) = self.agent.take() {
            let ended = wait_for("the agent to end", limit, || Ok(agent.try_wait()?));
            if ended.is_err() {
                self.agent = Some(agent);
            }
            let status = ended?;
            anyhow::ensure!(status.success(), "the agent of host {} ended: {status}", self.name);
        }
        Ok(())
    }

    /// What a person would type for `rswap` on this host, as one line for a shell.
    pub fn command_line(&self) -> anyhow::Result<String> {
        let command = self.rswap(&[])?;
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        Ok(words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" "))
    }

    /// A command that runs on this host and dies with the calling thread.
    pub fn command(&self, program: &Path) -> Command {
        const MOUNT: &str = "for pair; do shift; case $pair in --) break;; esac; \
                             mount --bind \"${pair%%:*}\" \"${pair#*:}\" || exit; done; exec \"$@\"";
        if self.mounts.is_empty() {
            return self.netns.command(program);
        }
        let mut command = self.netns.command(Path::new("unshare"));
        command.args(["--mount", "--propagation", "slave", "sh", "-c", MOUNT, "sh"]);
        command.args(self.mounts.iter().map(|(from, to)| format!("{}:{}", from.display(), to.display())));
        command.arg("--").arg(program);
        command
    }

    fn agent_command(&self) -> anyhow::Result<Command> {
        const OWN_LINKS: &str = "set -e; at=$1; shift; mkdir -p \"$at\"; mount -t sysfs none \"$at\"; \
                                 for net in class/net devices/virtual/net; do mount --bind \"$at/$net\" /sys/$net; done; \
                                 umount --lazy \"$at\"; exec \"$@\"";
        if !self.own_links {
            return self.rswap(&["agent"]);
        }
        let mut command = self.netns.command(Path::new("unshare"));
        command.args(["--mount", "--propagation", "slave", "sh", "-c", OWN_LINKS, "sh"]);
        command.arg(self.dir.join("sys")).arg(binary("rswap")?).arg("--config").arg(self.config_path());
        command.arg("agent");
        Ok(command)
    }

    /// A call of the command line on this host.
    pub fn rswap(&self, arguments: &[&str]) -> anyhow::Result<Command> {
        let mut command = self.command(&binary("rswap")?);
        command.arg("--config").arg(self.config_path()).args(arguments);
        Ok(command)
    }

    /// Calls the command line and returns what it printed; a failure is an error with what it said.
    pub fn call(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self.rswap(arguments)?.stdin(Stdio::null()).output().context("cannot start rswap")?;
        if !output.status.success() {
            bail!(
                "rswap {} on host {}: {}: {}",
                arguments.join(" "),
                self.name,
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Starts `command` as a detached instance; its output goes to a file in the host's directory.
    pub fn run(&self, name: &str, options: &[&str], command: &[&str]) -> anyhow::Result<()> {
        let log = self.dir.join(format!("{name}.log"));
        let log = log.to_string_lossy();
        let head = ["run", "--detach", "--name", name, "--log", &log];
        self.call(&[&head, options, &["--"], command].concat()).map(drop)
    }

    /// Asks the agent, over its control socket.
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let client = Client::new(Target::Socket(self.socket()));
        let answer: Value = runtime.block_on(client.get(path))?;
        Api::agent().check("get", path, 200, "application/json", &answer)?;
        Ok(serde_json::from_value(answer)?)
    }

    /// Whether the agent lists a living instance of this name.
    pub fn has_instance(&self, name: &str) -> anyhow::Result<bool> {
        let instances: Vec<InstanceView> = self.get("/v1/instances")?;
        Ok(instances.iter().any(|view| view.instance.name.as_str() == name))
    }

    /// Waits until the agent lists a living instance of this name: an arrival is listed a moment after its source heard of it.
    pub fn wait_for_instance(&self, name: &str) -> anyhow::Result<()> {
        wait_for(&format!("{name} to be listed at host {}", self.name), START_LIMIT, || {
            Ok(self.has_instance(name)?.then_some(()))
        })
    }

    /// Whether any process is in the cgroups of its instances.
    pub fn has_processes(&self) -> anyhow::Result<bool> {
        Ok(cgroup::is_populated(&self.cgroup()?)?)
    }

    /// What its agent's journals say: a line each, empty when nothing is open.
    pub fn open_journals(&self) -> anyhow::Result<Vec<String>> {
        let mut lines = Vec::new();
        for entry in fs::read_dir(self.dir.join("migrations")).into_iter().flatten() {
            let path = entry?.path();
            let text = fs::read(&path).unwrap_or_default();
            let head = String::from_utf8_lossy(&text[..text.len().min(128)]).trim().to_owned();
            lines.push(format!("{}: {head}", path.file_name().unwrap_or_default().to_string_lossy()));
        }
        Ok(lines)
    }

    /// Starts a migration: to `destination`, the name of a host pool or `address:port`.
    pub fn migrate(&self, instance: &str, destination: &str) -> anyhow::Result<Migration> {
        self.migrate_with(instance, destination, &[])
    }

    /// As [`Self::migrate`], with further options of `rswap migrate`.
    pub fn migrate_with(
        &self,
        instance: &str,
        destination: &str,
        options: &[&str],
    ) -> anyhow::Result<Migration> {
        let command = self.rswap(&[&["migrate", "--json", instance, destination], options].concat())?;
        Migration::start(instance, command)
    }

    /// All that the agent has said.
    pub fn log(&self) -> anyhow::Result<String> {
        let log = fs::read(self.log_path()).context("cannot read the agent's log")?;
        Ok(String::from_utf8_lossy(&log).into_owned())
    }

    /// The end of the agent's log.
    pub fn log_tail(&self) -> String {
        let log = self.log().unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..].join("\n")
    }

    fn stop(&mut self) -> anyhow::Result<()> {
        if let Some(mut agent) = self.agent.take() {
            let pid = Pid::from_raw(i32::try_from(agent.id()).context("a pid that is no pid")?);
            kill(pid, Signal::SIGTERM).context("cannot stop the agent")?;
            let ended = wait_for("the agent to stop", STOP_LIMIT, || Ok(agent.try_wait()?));
            if ended.is_err() {
                agent.kill().context("cannot kill the agent")?;
                agent.wait().context("cannot wait for the agent")?;
                eprintln!("the agent of host {} did not stop by itself", self.name);
            }
        }
        sweep::remove_cgroup(&self.cgroup()?)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // The test runner shows this for tests that fail, and only for those.
        if self.show_log {
            eprintln!("---- the agent of host {} said last:\n{}\n----", self.name, self.log_tail());
        }
        if let Err(error) = self.stop() {
            eprintln!("cannot clean up host {}: {error:#}", self.name);
        }
    }
}
