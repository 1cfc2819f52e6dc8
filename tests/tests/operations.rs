//! `docs/operations.md`, word for word: its commands are carried out in their order, each where the page says, on three fresh hosts
//! with a systemd and an sshd of their own and at a desk that reaches them by ssh; they have to answer what the page says, and what
//! it promises has to be so.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use rswap_agent::config::Config;
use rswap_controller::link::{self, Secure};
use rswap_tests::{
    Fleet, binary,
    controller::PORT,
    fleet::files_in,
    guide::{Guide, Step, missing},
    machine::{self, Machine},
    wait_for,
};
use rswap_trust::Credentials;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(60);
/// How long the page may have somebody wait for an answer.
const UNTIL_LIMIT: Duration = Duration::from_secs(90);
const HOSTS: [&str; 3] = ["alpha", "beta", "gamma"];
const DESK: &str = "desk";
/// Where the desk's own files are, in the fleet's directory.
const CLONE: &str = "clone";

fn page() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/operations.md")
}

fn guide() -> anyhow::Result<Guide> {
    let page = fs::read_to_string(page()).context("cannot read docs/operations.md")?;
    let guide = Guide::parse(&page, &[&HOSTS as &[&str], &[DESK]].concat()).context("docs/operations.md")?;
    guide.check()?;
    Ok(guide)
}

/// The hosts, the desk, and what was seen there that has to be so later on, too.
struct Site {
    // Dropped in this order: the hosts live in the fleet's network.
    machines: Vec<Machine>,
    fleet: Fleet,
    seen: BTreeMap<&'static str, String>,
    count: u64,
}

impl Site {
    fn new() -> anyhow::Result<Self> {
        let mut fleet = Fleet::new()?;
        let clone = fleet.scratch().join(CLONE);
        fs::create_dir_all(clone.join("target/release"))?;
        // What the first commands of the page build; without what only a debugger reads, for it is copied about, into memory.
        let mut strip = Command::new("strip");
        strip.arg("-o").arg(clone.join("target/release/rswap")).arg(binary("rswap")?);
        ensure!(strip.status().context("cannot start strip (package binutils)")?.success(), "strip failed");
        // What the alias `cargo xtask` starts (.cargo/config.toml), without cargo, which would build it once more.
        let cargo = fleet.scratch().join("bin/cargo");
        fs::create_dir_all(fleet.scratch().join("bin"))?;
        let xtask = binary("xtask")?;
        fs::write(
            &cargo,
            format!("#!/bin/sh\n[ \"$1\" = xtask ] || exit 1\nshift\nexec {} \"$@\"\n", xtask.display()),
        )?;
        fs::set_permissions(&cargo, fs::Permissions::from_mode(0o755))?;
        fs::write(fleet.scratch().join("hosts"), "127.0.0.1 localhost\n")?;
        let machines = HOSTS.map(|name| Machine::boot(&mut fleet, name));
        let machines = machines.into_iter().collect::<anyhow::Result<Vec<_>>>()?;
        // The page's addresses are these.
        for (number, machine) in (1..).zip(&machines) {
            ensure!(machine.address().octets() == [10, 88, 0, number], "{machine:?}");
        }
        Ok(Self { machines, fleet, seen: BTreeMap::new(), count: 0 })
    }

    fn host(&self, name: &str) -> anyhow::Result<&Machine> {
        self.machines.iter().find(|machine| machine.name() == name).with_context(|| format!("no host {name}"))
    }

    fn sh(&self, host: &str, script: &str) -> anyhow::Result<String> {
        self.host(host)?.sh(&self.fleet, script)
    }

    fn clone_of_desk(&self) -> PathBuf {
        self.fleet.scratch().join(CLONE)
    }

    /// A shell in the clone at the desk: with the fleet's network, names and ssh as a person has set them up there. What it leaves
    /// in the background ends with it.
    fn at_desk(&self, script: &str) -> Command {
        let scratch = self.fleet.scratch();
        let set_up = "mount --bind \"$1\" /etc/hosts; mount --bind \"$2\" /etc/ssh/ssh_config; cd \"$3\"; exec sh -eu -c \"$4\"";
        let mut command = self.fleet.client.command(Path::new("unshare"));
        command.args(["--pid", "--fork", "--kill-child", "--mount", "sh", "-euc", set_up, "sh"]);
        command
            .arg(scratch.join("hosts"))
            .arg(Machine::ssh_config(&self.fleet))
            .arg(scratch.join(CLONE))
            .arg(script);
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}", scratch.join("bin").display())).stdin(Stdio::null());
        command
    }

    /// What is said where a step is carried out, once.
    fn say(&self, place: &str, script: &str) -> anyhow::Result<Result<String, String>> {
        let mut command = match place {
            DESK => self.at_desk(script),
            host => {
                let script = format!("sh -eu -c '{}'", script.replace('\'', r"'\''"));
                self.host(host)?.ssh(&self.fleet, &[&script])
            }
        };
        let Output { status, stdout, stderr } = command.output().context("cannot start it")?;
        let [said, problem] = [&stdout, &stderr].map(|text| String::from_utf8_lossy(text).into_owned());
        Ok(if status.success() { Ok(said) } else { Err(format!("{status}\n{said}{problem}")) })
    }

    fn carry_out(&self, step: &Step) -> anyhow::Result<()> {
        for place in &step.places {
            let since = Instant::now();
            loop {
                let wrong = match self.say(place, &step.script)? {
                    Ok(said) => match missing(&step.expected, &said) {
                        None => break,
                        Some(line) => format!("{line:?} is not in what it says:\n{said}"),
                    },
                    Err(error) => format!("it fails: {error}"),
                };
                if !step.until || since.elapsed() > UNTIL_LIMIT {
                    let text = &step.script;
                    bail!("docs/operations.md:{}: on {place}:\n{text}{wrong}", step.line);
                }
                std::thread::sleep(Duration::from_millis(500));
            }
            println!("{:5.1} s  line {} on {place}", since.elapsed().as_secs_f64(), step.line);
        }
        Ok(())
    }

    /// Where the program of the page runs, and how far it has counted: at one host, and no less far than before.
    fn count(&mut self) -> anyhow::Result<String> {
        let mut found = Vec::new();
        for name in HOSTS {
            let said = self.sh(name, "cat /proc/[0-9]*/comm 2>/dev/null | grep '^at [0-9]' || true")?;
            for count in said.lines().filter_map(|line| line.strip_prefix("at ")) {
                found.push((name.to_owned(), count.parse::<u64>()?));
            }
        }
        let [(host, count)] = &found[..] else { bail!("it does not run at one host: {found:?}") };
        ensure!(*count >= self.count, "it had counted to {}, and is at {count} on {host}", self.count);
        self.count = *count;
        Ok(host.clone())
    }

    /// The same, and that it counts on.
    fn counts_on(&mut self) -> anyhow::Result<String> {
        let host = self.count()?;
        let before = self.count;
        wait_for("the program to count on", LIMIT, || {
            let now = self.count()?;
            ensure!(now == host, "it has moved from {host} to {now}, and nobody wanted it");
            Ok((self.count > before).then_some(()))
        })?;
        Ok(host)
    }

    fn status(&self) -> anyhow::Result<Value> {
        Ok(serde_json::from_str(&self.sh("alpha", "rswap fleet status --json")?)?)
    }

    fn of_host<'a>(status: &'a Value, name: &str) -> anyhow::Result<&'a Value> {
        let hosts = status["hosts"].as_array().context("no hosts")?;
        hosts.iter().find(|host| host["host"] == name).with_context(|| format!("no host {name}"))
    }

    /// Every one of these is heard of by the controller from now on, too.
    fn report_on(&self, hosts: &[&str]) -> anyhow::Result<()> {
        let taken = || -> anyhow::Result<Vec<u64>> {
            let status = self.status()?;
            let of = |host: &&str| {
                Self::of_host(&status, host)?["reports"]["taken"].as_u64().context("no count of reports")
            };
            hosts.iter().map(of).collect()
        };
        let before = taken()?;
        wait_for(&format!("reports of {}", hosts.join(", ")), LIMIT, || {
            let more = taken()?.into_iter().zip(&before).all(|(now, before)| now > before + 1);
            Ok(more.then_some(()))
        })
    }

    /// What systemd has started of each host's agent.
    fn pids(&self) -> anyhow::Result<String> {
        let pid = |name: &&str| self.sh(name, "systemctl show --property=MainPID --value rswap");
        Ok(HOSTS.iter().map(pid).collect::<anyhow::Result<Vec<_>>>()?.join(" "))
    }

    /// What the controller says to somebody with this certificate.
    fn call(&self, identity: &str, path: &str) -> anyhow::Result<Result<Value, String>> {
        let own = Arc::new(Credentials::open(files_in(&self.fleet.scratch().join(identity)))?);
        let to = Secure { host: "10.88.0.1".to_owned(), port: PORT, name: "controller".parse()?, own };
        let path = path.to_owned();
        let call = self.fleet.client.spawn("call", move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let said = runtime.block_on(link::call::<Value>(&to, &path, None));
            Ok(said.map_err(|error| format!("{:#}", anyhow::Error::from(error))))
        })?;
        call.join().map_err(|_| anyhow::anyhow!("the call panicked"))?
    }

    /// Keeps what was issued to `name` as it is now.
    fn keep(&self, name: &str) -> anyhow::Result<()> {
        let to = self.fleet.scratch().join(format!("kept-{name}"));
        fs::create_dir(&to)?;
        for file in ["ca.pem", "certificate.pem", "key.pem"] {
            fs::copy(self.clone_of_desk().join("fleet/pki/issued").join(name).join(file), to.join(file))?;
        }
        Ok(())
    }

    /// Whether what the page promises of a step is so. `false`: it promises nothing that its answer does not show.
    fn promised(&mut self, step: &Step) -> anyhow::Result<bool> {
        let clone = self.clone_of_desk();
        match (step.heading.as_str(), step.number) {
            ("3. Certificates", 0) => {
                for name in ["alpha", "beta", "gamma", "controller", "alice"] {
                    let key = clone.join("fleet/pki/issued").join(name).join("key.pem");
                    let mode = fs::metadata(&key)?.permissions().mode() & 0o777;
                    ensure!(mode == 0o600, "{}: {mode:o}", key.display());
                }
            }
            ("4. Configuration", 1) => {
                for name in HOSTS {
                    let path = clone.join("fleet/config").join(name).with_extension("toml");
                    let config = Config::load(Some(&path))?;
                    ensure!(config.agent.host == name && config.fleet.listen.is_some() == (name == "alpha"));
                }
            }
            ("5. Installation", 0) => {
                for (host, unit, is) in [
                    ("alpha", "rswap-controller", true),
                    ("beta", "rswap-controller", false),
                    ("alpha", "rswap", true),
                    ("beta", "rswap", true),
                    ("gamma", "rswap", true),
                ] {
                    let active = self.sh(host, &format!("systemctl is-active {unit}")).is_ok();
                    ensure!(active == is, "{unit} on {host}");
                }
            }
            ("6. Is it there?", 1) => self.report_on(&HOSTS)?,
            ("7. Work", 0) => ensure!(self.counts_on()? == "alpha"),
            ("7. Work", 2) => ensure!(self.counts_on()? == "beta"),
            ("8. Emptying a host", 1) => ensure!(self.counts_on()? != "beta"),
            ("8. Emptying a host", 3) => {
                let _ = self.seen.insert("pids", self.pids()?);
            }
            ("Certificates", 0) => {
                let issued = fs::read_to_string(clone.join("fleet/pki/issued/beta/certificate.pem"))?;
                let there = self.sh("beta", "cat /etc/rswap/tls/certificate.pem")?;
                ensure!(there == issued.trim(), "it has another certificate");
                self.report_on(&["beta"])?;
                self.keep("alice")?;
                let looked = self.call("kept-alice", "/v1/hosts")?;
                ensure!(looked.is_ok(), "{looked:?}");
            }
            ("Certificates", 1 | 2) => {
                self.report_on(&HOSTS)?;
                self.counts_on()?;
            }
            ("Certificates", 4) => {
                self.report_on(&HOSTS)?;
                // What the old key has signed is worth nothing, and nobody was started anew for it.
                let looked = self.call("kept-alice", "/v1/hosts")?;
                ensure!(looked.is_err(), "the old key is trusted");
                ensure!(Some(&self.pids()?) == self.seen.get("pids"), "an agent was started anew");
                self.counts_on()?;
            }
            ("Keeping a copy of what it knows", 0) => {
                let joined = Self::joined(&self.status()?)?;
                let _ = self.seen.insert("joined", joined);
                // It is lost, and a controller begins with nothing.
                self.sh("alpha", "systemctl stop rswap-controller && rm /var/lib/rswap/fleet && systemctl start rswap-controller")?;
                let before = self.seen.get("joined").cloned().unwrap_or_default();
                wait_for("all to join anew", LIMIT, || {
                    let joined = self.status().and_then(|status| Self::joined(&status));
                    Ok(joined.is_ok_and(|joined| joined != before).then_some(()))
                })?;
            }
            ("Keeping a copy of what it knows", 2) => {
                let joined = Self::joined(&self.status()?)?;
                ensure!(Some(&joined) == self.seen.get("joined"), "it does not know since when: {joined}");
                self.report_on(&HOSTS)?;
                self.counts_on()?;
            }
            ("Rolling maintenance", 1) => ensure!(self.counts_on()? != "alpha"),
            ("Rolling maintenance", 3) => ensure!(self.counts_on()? != "beta"),
            ("Rolling maintenance", 7) => {
                let status = self.status()?;
                ensure!(status["roll"]["over"] == true, "{}", status["roll"]);
                ensure!(Some(&self.pids()?) == self.seen.get("pids"), "an agent was started anew");
                let _ = self.seen.insert("release", self.sh("beta", "readlink /opt/rswap/current")?);
                self.counts_on()?;
            }
            ("Deploying", 0) => {
                ensure!(Some(&self.pids()?) == self.seen.get("pids"), "a dry run has touched them");
            }
            ("Deploying", 1) => {
                let release = self.sh("beta", "readlink /opt/rswap/current")?;
                ensure!(Some(&release) != self.seen.get("release"), "it is the same release");
                self.sh("beta", "grep -q recorded /etc/rswap/rswap.toml")?;
                self.report_on(&HOSTS)?;
                self.counts_on()?;
                self.keep("gamma")?;
            }
            ("Taking a host out of the fleet", 1) => ensure!(self.counts_on()? != "gamma"),
            ("Taking a host out of the fleet", 2) => {
                self.sh("gamma", "! pgrep -x rswap && ! [ -e /opt/rswap ] && ! [ -e /etc/rswap ]")?;
                let refused = self.call("kept-gamma", "/v1/hosts")?.err().unwrap_or_default();
                ensure!(refused.contains("may not look"), "it is none of the fleet already: {refused}");
            }
            ("Taking a host out of the fleet", 5) => {
                let status = self.status()?;
                ensure!(Self::of_host(&status, "gamma").is_err(), "gamma is listed: {status}");
                let refused = self.call("kept-gamma", "/v1/hosts")?.err().unwrap_or_default();
                ensure!(refused.contains("its role or its name is not allowed there"), "{refused}");
                self.report_on(&["alpha", "beta"])?;
                self.counts_on()?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Since when each host is a member.
    fn joined(status: &Value) -> anyhow::Result<String> {
        let joined = |name: &&str| Ok(format!("{name} {}", Self::of_host(status, name)?["joined"]));
        Ok(HOSTS.iter().map(joined).collect::<anyhow::Result<Vec<_>>>()?.join(", "))
    }
}

#[test]
fn what_the_page_has_an_operator_do_works_word_for_word() -> anyhow::Result<()> {
    let guide = guide()?;
    if machine::reason_to_skip("what_the_page_has_an_operator_do_works_word_for_word").is_some() {
        return Ok(());
    }
    let (done, left): (Vec<_>, Vec<_>) = guide.steps.iter().partition(|step| step.carried_out);
    let mut site = Site::new()?;
    let mut promises = 0;
    for step in &done {
        site.carry_out(step)?;
        let promised = site.promised(step);
        promises += usize::from(promised.with_context(|| format!("after docs/operations.md:{}", step.line))?);
    }
    println!("{} blocks were carried out, after {promises} of them more was looked at", done.len());
    for Step { line, script, .. } in &left {
        println!("not carried out: docs/operations.md:{line}:\n{script}");
    }
    // None of the above is passed over because the page has other headings now, and few commands are not tried.
    ensure!(promises == 22, "{promises} promises were looked at");
    ensure!(left.len() == 1, "{} blocks of commands are not carried out", left.len());
    Ok(())
}

#[test]
fn every_piece_of_configuration_of_the_page_is_one() -> anyhow::Result<()> {
    let guide = guide()?;
    for (line, text) in &guide.configurations {
        Config::parse(text, &page()).with_context(|| format!("the configuration after line {line}"))?;
    }
    ensure!(guide.configurations.len() == 2, "{} pieces of configuration", guide.configurations.len());
    Ok(())
}
