//! `cargo xtask deploy` to hosts with a real systemd and a real sshd: first installation, the same once more, an upgrade under
//! running instances, a host that doesn't take it.

use std::{
    fs::{self, File},
    io::Write as _,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, ensure};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use rswap_tests::{
    Fleet, binary,
    fleet::{MIGRATE_PORT, pki},
    machine::{self, Machine},
    wait_for,
};

const LIMIT: Duration = Duration::from_secs(60);

/// Counts in memory, and holds 64 MiB that it goes on writing to.
const WORK: &str = "import os, time
held, count = bytearray(os.urandom(64 << 20)), 0
while True:
    held[count * 4096 % len(held)] = count % 251 + 1
    count += 1
    if count % 20000 == 0: time.sleep(0.01)";

/// A fleet with what is deployed to it.
struct Site {
    fleet: Fleet,
    config: PathBuf,
    binary: PathBuf,
}

/// How a deployment ended.
struct Deployed {
    success: bool,
    said: String,
}

impl Site {
    fn new() -> anyhow::Result<Self> {
        let fleet = Fleet::new()?;
        let config = fleet.scratch().join("config");
        fs::create_dir(&config)?;
        // Without what only a debugger reads: it is copied about, into memory.
        let small = fleet.scratch().join("rswap");
        let mut strip = Command::new("strip");
        strip.arg("-o").arg(&small).arg(binary("rswap")?);
        ensure!(strip.status().context("cannot start strip (package binutils)")?.success(), "strip failed");
        Ok(Self { fleet, config, binary: small })
    }

    /// A host, its certificate and its configuration.
    fn machine(&mut self, name: &str) -> anyhow::Result<Machine> {
        let machine = Machine::boot(&mut self.fleet, name)?;
        pki(&["issue", &self.fleet.authority().to_string_lossy(), name])?;
        self.configure(&machine, &format!("{}:{MIGRATE_PORT}", machine.address()))?;
        Ok(machine)
    }

    fn configure(&self, machine: &Machine, listen: &str) -> anyhow::Result<()> {
        let tls =
            ["ca", "certificate", "key"].map(|file| format!("{file} = \"/etc/rswap/tls/{file}.pem\"\n"));
        let text = format!(
            "[agent]\nhost = {:?}\nwindow_ms = 200\n\n[tls]\n{}\n[migrate]\nlisten = {listen:?}\nmax_unavailability_ms = 10000\n",
            machine.name(),
            tls.concat()
        );
        fs::write(self.config.join(format!("{}.toml", machine.name())), text)?;
        Ok(())
    }

    /// Another version of the program: the same, and a byte that nobody reads.
    fn next_version(&self) -> anyhow::Result<()> {
        File::options().append(true).open(&self.binary)?.write_all(b"\n")?;
        Ok(())
    }

    /// The command that deploys, without certificates.
    fn bare_deployment(&self, to: &[&Machine], options: &[&str]) -> anyhow::Result<Command> {
        // Modes are the deployment's to set, whatever the umask is.
        let mut command = self.fleet.client.command(Path::new("sh"));
        command.args(["-c", "umask 077; exec \"$@\"", "sh"]).arg(binary("xtask")?);
        command.arg("deploy").args(to.iter().map(|machine| format!("root@{}", machine.name())));
        command.arg("--config").arg(&self.config);
        command.arg("--binary").arg(&self.binary).arg("--ssh-config").arg(Machine::ssh_config(&self.fleet));
        command.args(options);
        Ok(command)
    }

    fn deployment(&self, to: &[&Machine], options: &[&str]) -> anyhow::Result<Command> {
        let mut command = self.bare_deployment(to, options)?;
        command.arg("--pki").arg(self.fleet.authority());
        Ok(command)
    }

    /// A deployment that is cut off, with its ssh, as soon as `script` succeeds on the machine.
    fn cut_off(&self, machine: &Machine, options: &[&str], script: &str) -> anyhow::Result<()> {
        let log = self.fleet.scratch().join("cut-off.log");
        let mut command = self.deployment(&[machine], options)?;
        command
            .stdin(Stdio::null())
            .stdout(File::create(&log)?)
            .stderr(File::options().append(true).open(&log)?);
        let mut deploying = command.process_group(0).spawn().context("cannot start xtask")?;
        let seen =
            wait_for(&format!("{script:?}"), LIMIT, || Ok(self.sh(machine, script).is_ok().then_some(())));
        let ended = deploying.try_wait()?;
        let group = Pid::from_raw(i32::try_from(deploying.id())?);
        let killed = killpg(group, Signal::SIGKILL);
        deploying.wait()?;
        println!("cut off: {}", fs::read_to_string(&log)?);
        seen?;
        killed.context("cannot kill the deployment")?;
        ensure!(ended.is_none(), "it has ended before: {ended:?}");
        Ok(())
    }

    fn deploy(&self, to: &[&Machine], options: &[&str]) -> anyhow::Result<Deployed> {
        Self::run(self.deployment(to, options)?)
    }

    fn run(mut command: Command) -> anyhow::Result<Deployed> {
        let output = command.stdin(Stdio::null()).output().context("cannot start xtask")?;
        let said = [&*output.stdout, &*output.stderr].map(String::from_utf8_lossy).concat();
        println!("{said}");
        Ok(Deployed { success: output.status.success(), said })
    }

    fn deployed(&self, to: &[&Machine]) -> anyhow::Result<String> {
        let Deployed { success, said } = self.deploy(to, &[])?;
        ensure!(success, "not deployed");
        Ok(said)
    }

    fn sh(&self, machine: &Machine, script: &str) -> anyhow::Result<String> {
        machine.sh(&self.fleet, script)
    }

    /// The agent's pid and binary, as systemd and /proc have it.
    fn agent(&self, machine: &Machine) -> anyhow::Result<(String, String)> {
        let pid = self.sh(machine, "systemctl show --property=MainPID --value rswap")?;
        let exe = self.sh(machine, &format!("readlink /proc/{pid}/exe"))?;
        Ok((pid, exe))
    }

    fn current(&self, machine: &Machine) -> anyhow::Result<String> {
        self.sh(machine, "readlink /opt/rswap/current")
    }

    /// Starts an instance that works, and waits until it is watched.
    fn start_work(&self, machine: &Machine) -> anyhow::Result<()> {
        let text = format!("rswap run --detach --name work -- python3 -c '{WORK}'");
        self.sh(machine, &text)?;
        self.wait_until_watched(machine)
    }

    fn wait_until_watched(&self, machine: &Machine) -> anyhow::Result<()> {
        wait_for("the instance to be watched", LIMIT, || Ok(self.watched(machine)?.then_some(())))
    }

    /// Whether its agent lists it with a window in which it has worked.
    fn watched(&self, machine: &Machine) -> anyhow::Result<bool> {
        let views: serde_json::Value = serde_json::from_str(&self.sh(machine, "rswap ps --json")?)?;
        let of = |view: &&serde_json::Value| view["name"] == "work";
        let view = views.as_array().context("no list")?.iter().find(of);
        Ok(view.and_then(|view| view["profile"]["cpu"]["cores"].as_f64()).is_some_and(|cores| cores > 0.0))
    }

    /// Pid, start and processor time of the instance's main process there, if it has one.
    fn work(&self, machine: &Machine) -> anyhow::Result<Option<(String, String, u64)>> {
        let script = "for pid in $(tail -n +2 /sys/fs/cgroup/rswap/work/cgroup.procs 2>/dev/null); do cat /proc/$pid/stat; done";
        let text = self.sh(machine, script)?;
        let Some(line) = text.lines().next() else { return Ok(None) };
        ensure!(text.lines().count() == 1, "{text}");
        let words: Vec<&str> = line.split(' ').collect();
        let (user, system): (u64, u64) = (words[13].parse()?, words[14].parse()?);
        Ok(Some((words[0].to_owned(), words[21].to_owned(), user + system)))
    }

    /// It is the same process, and it has worked on.
    fn works_on(&self, machine: &Machine, before: &(String, String, u64)) -> anyhow::Result<()> {
        wait_for("the instance to work on", LIMIT, || {
            let now = self.work(machine)?.context("the instance is gone")?;
            ensure!((&now.0, &now.1) == (&before.0, &before.1), "it was {before:?} and is {now:?}");
            Ok((now.2 > before.2).then_some(()))
        })
    }
}

fn skipped(test: &str) -> bool {
    machine::reason_to_skip(test).is_some()
}

#[test]
fn instances_run_on_while_their_agent_is_installed_exchanged_and_left_alone() -> anyhow::Result<()> {
    if skipped("instances_run_on_while_their_agent_is_installed_exchanged_and_left_alone") {
        return Ok(());
    }
    let mut site = Site::new()?;
    let (a, b) = (site.machine("a")?, site.machine("b")?);
    let Deployed { success, said } = site.deploy(&[&a, &b], &["--dry-run"])?;
    ensure!(success && said.matches("(dry run: not done)").count() == 8, "four steps for each host");
    for machine in [&a, &b] {
        site.sh(
            machine,
            "! [ -e /opt/rswap ] && ! [ -e /etc/systemd/system/rswap.service ] && ! [ -e /etc/rswap ]",
        )?;
    }

    site.deployed(&[&a, &b])?;
    let first = site.current(&a)?;
    let agent = site.agent(&a)?;
    ensure!(agent.1 == format!("/opt/rswap/{first}/rswap"), "{agent:?}");
    ensure!(site.sh(&a, "systemctl is-enabled rswap")? == "enabled");
    // Whatever umask either side has.
    for (path, mode) in [
        ("tls/key.pem", "600"),
        ("tls", "755"),
        ("tls/ca.pem", "644"),
        ("rswap.toml", "644"),
        ("rswap", "755"),
    ] {
        let is = site.sh(&a, &format!("stat -Lc %U:%a /opt/rswap/{first}/{path}"))?;
        ensure!(is == format!("root:{mode}"), "{path}: {is}");
    }
    ensure!(
        site.sh(&a, "stat -Lc %a /etc/rswap")? == "755" && site.sh(&a, "stat -Lc %a /opt/rswap")? == "755"
    );
    site.start_work(&a)?;
    let work = site.work(&a)?.context("it does not run")?;

    let said = site.deployed(&[&a, &b])?;
    ensure!(said.matches("nothing to do").count() == 2, "the same once more");
    ensure!(site.agent(&a)? == agent, "the agent was started anew for nothing");
    // That it runs is not all: it has to be in order, too, and stays as it is where it is not.
    site.sh(&a, &format!("kill -STOP {}", agent.0))?;
    let Deployed { success, said } = site.deploy(&[&a, &b], &["--within", "2"])?;
    site.sh(&a, &format!("kill -CONT {}", agent.0))?;
    ensure!(!success && said.contains("it stays as it is") && !said.contains("nothing to do"), "{said}");
    ensure!(said.contains("not touched: root@b") && site.agent(&a)? == agent, "it was touched");

    // Nor is it the release if somebody has changed a file of it: also what runs, and works, is brought back to what was sent.
    site.sh(&a, &format!("echo '[plan]' >>/opt/rswap/{first}/rswap.toml"))?;
    let Deployed { success, said } = site.deploy(&[&a], &["--dry-run"])?;
    ensure!(success && said.contains("its files are not those that were sent") && said.contains("copying"));
    let said = site.deployed(&[&a, &b])?;
    ensure!(said.matches("nothing to do").count() == 1, "host a was as it should be");
    site.sh(&a, &format!("cd /opt/rswap/{first} && sha256sum --check --quiet SHA256SUMS"))?;
    ensure!(site.current(&a)? == first && site.agent(&a)?.0 != agent.0, "what was sent does not run");
    site.works_on(&a, &work)?;

    site.next_version()?;
    site.deployed(&[&a, &b])?;
    let second = site.current(&a)?;
    ensure!(second != first && site.sh(&a, "readlink /opt/rswap/previous")? == first);
    ensure!(site.agent(&a)?.1 == format!("/opt/rswap/{second}/rswap"));
    site.works_on(&a, &work)?;
    site.wait_until_watched(&a)?;
    site.sh(&a, "systemctl daemon-reexec")?;
    site.works_on(&a, &work)?;

    // A new start in the middle of a migration, which takes some seconds at this rate: whatever comes of it, there is one copy,
    // and it works.
    site.sh(&a, "tc qdisc replace dev up0 root tbf rate 100mbit burst 64k latency 400ms")?;
    let to = format!("{}:{MIGRATE_PORT}", b.address());
    let log = site.fleet.scratch().join("migrate.log");
    let mut migration = a.ssh(&site.fleet, &["rswap", "migrate", "work", &to]);
    let mut migration =
        migration.stdout(File::create(&log)?).stderr(File::options().append(true).open(&log)?).spawn()?;
    wait_for("the migration to begin", LIMIT, || {
        Ok(site.sh(&a, "rswap health --json")?.contains("\"migrations_running\": 1").then_some(()))
    })?;
    ensure!(migration.try_wait()?.is_none(), "it has ended before the agent was told to");
    site.sh(&a, "systemctl restart rswap")?;
    migration.wait()?;
    site.sh(&a, "tc qdisc del dev up0 root")?;
    println!("the migration said: {}", fs::read_to_string(&log)?);
    let (here, there) = wait_for("one copy to be left, and watched", LIMIT, || {
        let copies = (site.work(&a)?, site.work(&b)?);
        Ok((copies.0.is_some() != copies.1.is_some()).then_some(copies))
    })?;
    let at = if here.is_some() { &a } else { &b };
    println!("it runs on {}", at.name());
    site.works_on(at, &here.or(there).context("no copy")?)?;
    site.wait_until_watched(at)?;
    for machine in [&a, &b] {
        site.sh(machine, "rswap health")?;
    }

    // A third version: the first is not kept. The host runs the controller from now on.
    site.next_version()?;
    ensure!(site.deploy(&[&a], &["--controller", "a"])?.success, "not deployed");
    let pid = site.sh(&a, "systemctl show --property=MainPID --value rswap-controller")?;
    let status = site.sh(&a, &format!("cat /proc/{pid}/status"))?;
    for line in ["CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"] {
        ensure!(status.contains(line), "{line} is not in {status}");
    }
    let asked =
        site.sh(&a, "curl --silent --unix-socket /run/rswap/controller.sock http://rswap/v1/status")?;
    ensure!(asked.contains("\"life\""), "{asked}");
    ensure!(site.sh(&a, "stat -c %U:%a /var/lib/rswap/fleet")? == "root:600");
    ensure!(site.sh(&a, "ls -d /opt/rswap/*-* | wc -l")? == "2");
    site.sh(&a, &format!("[ $(readlink /opt/rswap/previous) = {second} ] && ! [ -e /opt/rswap/{first} ]"))?;

    // It doesn't stop being the controller's host by an option that somebody forgot.
    let third = site.current(&a)?;
    let Deployed { success, said } = site.deploy(&[&a], &[])?;
    ensure!(
        !success && said.contains("it runs the fleet's controller") && said.contains("--drop-controller")
    );
    ensure!(site.sh(&a, "systemctl is-active rswap-controller")? == "active" && site.current(&a)? == third);
    // One that goes back has to have its controller back, too: here that can't start any more.
    site.sh(
        &a,
        "systemctl stop rswap-controller && mv /var/lib/rswap/fleet /root && mkdir /var/lib/rswap/fleet",
    )?;
    site.configure(&a, "192.0.2.1:7791")?;
    let Deployed { success, said } = site.deploy(&[&a], &["--controller", "a", "--within", "4"])?;
    ensure!(!success && said.contains("ROLL BACK FAILED"), "it says that all is as before");
    ensure!(said.contains(&format!("the controller of {third} does not")), "it does not say what is amiss");
    site.sh(&a, "rmdir /var/lib/rswap/fleet && mv /root/fleet /var/lib/rswap")?;
    site.configure(&a, &format!("{}:{MIGRATE_PORT}", a.address()))?;
    ensure!(site.deploy(&[&a], &["--controller", "a"])?.success && site.current(&a)? == third);
    ensure!(site.deploy(&[&a], &["--drop-controller"])?.success, "not deployed");
    site.sh(
        &a,
        "! [ -e /etc/systemd/system/rswap-controller.service ] && ! systemctl is-active rswap-controller",
    )?;
    Ok(())
}

#[test]
fn a_host_that_does_not_take_it_goes_back_and_no_further_one_is_touched() -> anyhow::Result<()> {
    if skipped("a_host_that_does_not_take_it_goes_back_and_no_further_one_is_touched") {
        return Ok(());
    }
    let mut site = Site::new()?;
    let (a, b) = (site.machine("a")?, site.machine("b")?);
    site.deployed(&[&a])?;
    site.start_work(&a)?;
    let (first, work) = (site.current(&a)?, site.work(&a)?.context("it does not run")?);
    let untouched = |site: &Site| site.sh(&b, "! [ -e /opt/rswap ] && ! [ -e /etc/rswap ]");

    // What the binary itself finds wrong is found before anything is switched.
    let agent = site.agent(&a)?;
    fs::write(site.config.join("a.toml"), "[agent]\nhots = \"a\"\n")?;
    let Deployed { success, said } = site.deploy(&[&a, &b], &[])?;
    ensure!(!success && said.contains("rswap.toml:2: agent.hots") && said.contains("nothing was switched"));
    ensure!(said.contains("not touched: root@b") && site.agent(&a)? == agent && site.current(&a)? == first);
    untouched(&site)?;

    // What only shows when it runs: it listens at an address that the host doesn't have.
    site.next_version()?;
    site.configure(&a, "192.0.2.1:7791")?;
    let Deployed { success, said } = site.deploy(&[&a, &b], &["--within", "3"])?;
    ensure!(!success && said.contains(&format!("rolled back: {first} runs there again")), "not rolled back");
    ensure!(said.contains("migrate.listen") && said.contains("not touched: root@b"), "it does not say why");
    ensure!(site.current(&a)? == first && site.agent(&a)?.1 == format!("/opt/rswap/{first}/rswap"));
    site.works_on(&a, &work)?;
    site.wait_until_watched(&a)?;
    untouched(&site)?;

    // The same where nothing was before: nothing is left that would run.
    site.configure(&b, "192.0.2.1:7791")?;
    let Deployed { success, said } = site.deploy(&[&b], &["--within", "3"])?;
    ensure!(!success && said.contains("rolled back: no agent runs there"), "not rolled back");
    site.sh(
        &b,
        "! [ -e /etc/systemd/system/rswap.service ] && ! [ -e /etc/rswap/rswap.toml ] && ! pgrep -x rswap",
    )?;

    // Certificates that somebody has brought by hand are in nobody's way but those of others.
    site.sh(&b, "mkdir -p /etc/rswap/tls && echo mine >/etc/rswap/tls/key.pem")?;
    let Deployed { success, said } = site.deploy(&[&b], &[])?;
    ensure!(!success && said.contains("/etc/rswap/tls is there, and was not made by a deployment"));
    let Deployed { success, said } = Site::run(site.bare_deployment(&[&b], &["--dry-run"])?)?;
    ensure!(success && said.contains("copying 4 files"), "in the way of one that brings none");
    site.sh(&b, "[ $(cat /etc/rswap/tls/key.pem) = mine ] && rm -r /etc/rswap/tls")?;
    // A link of somebody else that leads nowhere is somebody's, too.
    site.sh(&b, "ln -s /nowhere /etc/rswap/tls")?;
    let Deployed { success, said } = site.deploy(&[&b], &[])?;
    ensure!(!success && said.contains("/etc/rswap/tls is there"));
    site.sh(&b, "[ $(readlink /etc/rswap/tls) = /nowhere ] && rm /etc/rswap/tls")?;

    // A configuration that somebody has made there by hand is not overwritten.
    site.sh(&b, "mkdir -p /etc/rswap && echo '[agent]' >/etc/rswap/rswap.toml")?;
    let Deployed { success, said } = site.deploy(&[&b], &[])?;
    ensure!(!success && said.contains("/etc/rswap/rswap.toml is there, and was not made by a deployment"));
    ensure!(site.sh(&b, "cat /etc/rswap/rswap.toml")? == "[agent]");
    site.sh(&b, "rm /etc/rswap/rswap.toml")?;

    for machine in [&a, &b] {
        site.configure(machine, &format!("{}:{MIGRATE_PORT}", machine.address()))?;
    }
    site.deployed(&[&a, &b])?;
    site.works_on(&a, &work)?;
    ensure!(site.current(&a)? != first && Path::new(&site.agent(&b)?.1).starts_with("/opt/rswap"));
    Ok(())
}

#[test]
fn a_deployment_that_is_cut_off_is_found_and_what_worked_before_is_never_lost() -> anyhow::Result<()> {
    if skipped("a_deployment_that_is_cut_off_is_found_and_what_worked_before_is_never_lost") {
        return Ok(());
    }
    let mut site = Site::new()?;
    let a = site.machine("a")?;
    let good = |site: &Site| site.sh(&a, "readlink /opt/rswap/good");
    let listen = format!("{}:{MIGRATE_PORT}", a.address());
    // In the middle of the first copy, when the key is there already: nothing runs there, and no key is left.
    let shape = |words: &str| -> anyhow::Result<()> {
        let status = site.fleet.client.command(Path::new("tc")).args(words.split(' ')).status()?;
        ensure!(status.success(), "tc {words}");
        Ok(())
    };
    shape("qdisc replace dev eth0 root tbf rate 20mbit burst 64k latency 400ms")?;
    site.cut_off(
        &a,
        &[],
        "[ -s /opt/rswap/.incoming/tls/key.pem ] && [ $(stat -c %a /opt/rswap/.incoming) = 700 ] && [ -s /opt/rswap/.incoming/rswap ]",
    )?;
    shape("qdisc del dev eth0 root")?;
    wait_for("what came of it to be gone", LIMIT, || {
        Ok(site.sh(&a, "! [ -e /opt/rswap/.incoming ]").is_ok().then_some(()))
    })?;
    ensure!(site.sh(&a, "find /tmp /var/tmp /opt -xdev -name '*.pem' | wc -l")? == "0", "a key is left");
    site.sh(&a, "! [ -e /opt/rswap/current ] && ! [ -e /etc/systemd/system/rswap.service ]")?;
    site.deployed(&[&a])?;
    let first = site.current(&a)?;
    ensure!(good(&site)? == first);
    site.start_work(&a)?;
    let work = site.work(&a)?.context("it does not run")?;

    // After the switch to one that does not work: the one before is what is gone back to, also the second time.
    site.next_version()?;
    site.configure(&a, "192.0.2.1:7791")?;
    for _ in 0..2 {
        let switched = format!(
            "[ $(readlink /opt/rswap/current) != {first} ] && [ $(systemctl show --property=NRestarts --value rswap) -gt 0 ]"
        );
        site.cut_off(&a, &["--within", "120"], &switched)?;
        ensure!(site.current(&a)? != first && good(&site)? == first);
    }
    let Deployed { success, said } = site.deploy(&[&a], &["--within", "3"])?;
    ensure!(!success && said.contains(&format!("was cut off; {first} was last in order")), "it is not seen");
    ensure!(said.contains(&format!("rolled back: {first} runs there again")), "not rolled back");
    ensure!(site.current(&a)? == first && good(&site)? == first);
    ensure!(site.agent(&a)?.1 == format!("/opt/rswap/{first}/rswap"));
    site.works_on(&a, &work)?;

    // One that works, and was not yet found to: it is looked at, and only then counts as done.
    site.configure(&a, &listen)?;
    let watched = format!("[ $(readlink /opt/rswap/current) != {first} ] && rswap health");
    site.cut_off(&a, &[], &watched)?;
    let second = site.current(&a)?;
    ensure!(second != first);
    if good(&site)? == first {
        let said = site.deployed(&[&a])?;
        ensure!(said.contains("was cut off") && said.contains("is in order: nothing to do"), "{said}");
    }
    ensure!(good(&site)? == second && site.sh(&a, "readlink /opt/rswap/previous")? == first);
    site.works_on(&a, &work)?;
    site.wait_until_watched(&a)
}
