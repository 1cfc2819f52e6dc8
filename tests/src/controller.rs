//! A controller of a fleet: a process of its own, reached over a unix socket, which all network namespaces share, and over the network
//! if it has a certificate.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    os::unix::{net::UnixStream, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::Context;
use rswap_controller::{Address, link};
use rswap_trust::Files;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{Fleet, Host, api::Api, binary, fleet::CLIENT, wait_for};

const START_LIMIT: Duration = Duration::from_secs(20);

/// The process. It is killed when this is dropped.
#[derive(Debug)]
pub struct Controller {
    directory: PathBuf,
    child: Option<Child>,
    /// The command that starts it, if it is not its own.
    by: Vec<String>,
}

/// Where a controller listens on the network.
pub const PORT: u16 = 7792;

impl Controller {
    /// Starts one in `directory`, and waits until it answers; `fleet` are further keys of `[fleet]`, and sections after it.
    pub fn start(directory: &Path, fleet: &str) -> anyhow::Result<Self> {
        Self::start_by(directory, fleet, Vec::new())
    }

    /// Starts one at the fleet's client, 10.88.0.100, that agents reach over the network; `files` are its certificate, `tls` further
    /// keys of `[fleet.tls]`, `more` further sections.
    pub fn start_at(
        network: &Fleet,
        fleet: &str,
        files: &Files,
        tls: &str,
        more: &str,
    ) -> anyhow::Result<Self> {
        let Files { ca, certificate, key } = files;
        let fleet = format!(
            "listen = \"{CLIENT}:{PORT}\"\n{fleet}\n[fleet.tls]\nca = {ca:?}\ncertificate = {certificate:?}\nkey = {key:?}\n{tls}\n{more}"
        );
        let at = format!("--net={}", network.client.path().display());
        let by = ["nsenter", &at, "--"].map(str::to_owned).to_vec();
        Self::start_by(&network.scratch().join("controller"), &fleet, by)
    }

    fn start_by(directory: &Path, fleet: &str, by: Vec<String>) -> anyhow::Result<Self> {
        fs::create_dir_all(directory)?;
        let mut controller = Self { directory: directory.to_owned(), child: None, by };
        let (socket, file) = (controller.address().0, directory.join("fleet"));
        let text = format!("[fleet]\nsocket = {socket:?}\nfile = {file:?}\n{fleet}");
        fs::write(controller.config(), text)?;
        controller.restart()?;
        Ok(controller)
    }

    /// Its configuration.
    pub fn config(&self) -> PathBuf {
        self.directory.join("controller.toml")
    }

    /// Where it is.
    pub fn address(&self) -> Address {
        Address(self.directory.join("controller.sock"))
    }

    /// The section of an agent's configuration that makes it a member; `spool` is a directory of that agent.
    pub fn member(&self, spool: &Path, report_every_ms: u64) -> String {
        let address = self.address().to_string();
        format!(
            "[controller]\naddress = {address:?}\nspool = {spool:?}\nreport_every_ms = {report_every_ms}\n\n"
        )
    }

    /// The section of an agent's configuration that makes it a member over the network.
    pub fn far_member(spool: &Path, report_every_ms: u64) -> String {
        format!(
            "[controller]\naddress = \"{CLIENT}:{PORT}\"\ncertificate_name = \"controller\"\nspool = {spool:?}\n\
             report_every_ms = {report_every_ms}\n\n"
        )
    }

    /// What `rswap fleet` says over the network to who has the certificate in `identity`, at `host`.
    pub fn answer_to(host: &Host, identity: &Path, words: &[&str]) -> anyhow::Result<String> {
        let (address, identity) = (format!("{CLIENT}:{PORT}"), identity.to_string_lossy());
        let head =
            ["fleet", "--controller", &address, "--certificate-name", "controller", "--identity", &identity];
        host.call(&[&head, words].concat())
    }

    /// On which host it has the instance.
    pub fn host_of(&self, name: &str) -> anyhow::Result<Option<String>> {
        let all: Vec<Value> = self.get("/v1/instances")?;
        let found = all.iter().find(|one| one["instance"] == name);
        Ok(found.and_then(|one| one["host"].as_str()).map(str::to_owned))
    }

    /// Starts it again, on what it has kept.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        let by = self.by.clone();
        self.restart_on(&by.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// The same, started by another command: `taskset -c 0`.
    pub fn restart_on(&mut self, by: &[&str]) -> anyhow::Result<()> {
        self.kill()?;
        let log = File::options().create(true).append(true).open(self.directory.join("controller.log"))?;
        let rswap = binary("rswap")?;
        let mut words = by.iter().map(|word| PathBuf::from(*word)).chain([rswap]);
        let mut command = Command::new(words.next().context("no program")?);
        command.args(words).arg("--config").arg(self.config()).arg("controller");
        command.process_group(0).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut child = command.spawn().context("cannot start the controller")?;
        let answered = wait_for("the controller", START_LIMIT, || {
            if let Some(status) = child.try_wait()? {
                anyhow::bail!("the controller ended: {status}\n{}", self.log()?);
            }
            Ok(self.get::<Value>("/v1/status").ok())
        });
        self.child = Some(child);
        answered.map(drop)
    }

    /// Kills it as a crash would.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill().context("cannot kill the controller")?;
            child.wait().context("cannot wait for the controller")?;
        }
        Ok(())
    }

    /// Its pid.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// What it has said.
    pub fn log(&self) -> anyhow::Result<String> {
        Ok(fs::read_to_string(self.directory.join("controller.log"))?)
    }

    /// Asks it.
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        self.call(path, None)
    }

    /// Asks it for a text.
    pub fn text(&self, path: &str) -> anyhow::Result<String> {
        let mut stream = UnixStream::connect(self.address().0)?;
        write!(stream, "GET {path} HTTP/1.1\r\nhost: rswap\r\nconnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        anyhow::ensure!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        Ok(answer)
    }

    /// Tells it what is wanted.
    pub fn post<T: DeserializeOwned>(&self, path: &str, body: &Value) -> anyhow::Result<T> {
        self.call(path, Some(serde_json::to_vec(body)?))
    }

    fn call<T: DeserializeOwned>(&self, path: &str, body: Option<Vec<u8>>) -> anyhow::Result<T> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let method = if body.is_some() { "post" } else { "get" };
        let answer: Value = runtime.block_on(link::call(&self.address(), path, body))?;
        Api::controller().check(method, path, 200, "application/json", &answer)?;
        Ok(serde_json::from_value(answer)?)
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            eprintln!("{error:#}");
        }
        if std::thread::panicking() {
            eprintln!("the controller said:\n{}", self.log().unwrap_or_default());
        }
    }
}
