//! Some hosts and a client, joined by a switch.

use std::{
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, ensure};
use rswap_trust::Files;

use crate::{
    binary,
    host::{Host, HostOptions},
    netns::{Netns, cable},
    sweep,
};

/// The hosts' agents take migrations here.
pub const MIGRATE_PORT: u16 = 7791;

/// Where the client is.
pub const CLIENT: &str = "10.88.0.100";

/// A network with a client in it; hosts are added with [`Fleet::host`].
#[derive(Debug)]
pub struct Fleet {
    /// Where the clients of the instances are.
    pub client: Netns,
    switch: Netns,
    scratch: tempfile::TempDir,
    hosts: u8,
}

impl Fleet {
    /// Makes switch and client.
    pub fn new() -> anyhow::Result<Self> {
        sweep::stale()?;
        let scratch = tempfile::Builder::new().prefix("rswt").tempdir().context("cannot make a directory")?;
        let switch = Netns::create(sweep::own_name("sw"))?;
        switch.ip(&["link", "add", "sw0", "type", "bridge"])?;
        switch.ip(&["link", "set", "sw0", "up"])?;
        let client = Netns::create(sweep::own_name("client"))?;
        cable((&client, "eth0"), (&switch, "client"))?;
        switch.ip(&["link", "set", "client", "master", "sw0"])?;
        client.ip(&["addr", "add", &format!("{CLIENT}/24"), "dev", "eth0"])?;
        let fleet = Self { client, switch, scratch, hosts: 0 };
        let authority = fleet.authority();
        pki(&["init", &authority.to_string_lossy()])?;
        Ok(fleet)
    }

    /// Adds a host and starts its agent. The first one is 10.88.0.1, the next 10.88.0.2.
    pub fn host(&mut self, name: &str, options: &HostOptions) -> anyhow::Result<Host> {
        let (netns, address) = self.plug(name)?;
        let files = self.issue(name, &[])?;
        Host::start(name, address, netns, &self.scratch.path().join(name), files, options)
    }

    /// The network of a further host, and its address there.
    pub(crate) fn plug(&mut self, name: &str) -> anyhow::Result<(Netns, Ipv4Addr)> {
        self.hosts += 1;
        let address = Ipv4Addr::new(10, 88, 0, self.hosts);
        let netns = Netns::create(sweep::own_name(name))?;
        // Without an address of its own a bridge takes its lowest port's: every instance that comes or goes could change
        // it, and the other hosts would send to an address that nobody has.
        let mac = format!("02:72:00:00:00:{:02x}", self.hosts);
        netns.ip(&["link", "add", "br0", "address", &mac, "type", "bridge"])?;
        netns.ip(&["link", "set", "br0", "up"])?;
        let port = format!("host{}", self.hosts);
        cable((&netns, "up0"), (&self.switch, &port))?;
        self.switch.ip(&["link", "set", &port, "master", "sw0"])?;
        netns.ip(&["link", "set", "up0", "master", "br0"])?;
        netns.ip(&["addr", "add", &format!("{address}/24"), "dev", "br0"])?;
        Ok((netns, address))
    }

    /// Gives `host` a further bridge, `br1`, with an uplink of its own to the switch.
    pub fn second_uplink(&self, host: &Host) -> anyhow::Result<()> {
        let (netns, number) = (host.netns(), host.address().octets()[3]);
        let mac = format!("02:72:00:00:01:{number:02x}");
        netns.ip(&["link", "add", "br1", "address", &mac, "type", "bridge"])?;
        netns.ip(&["link", "set", "br1", "up"])?;
        let port = format!("second{number}");
        cable((netns, "up1"), (&self.switch, &port))?;
        self.switch.ip(&["link", "set", &port, "master", "sw0"])?;
        netns.ip(&["link", "set", "up1", "master", "br1"])
    }

    /// Runs `ip` or another tool of iproute2 at the switch.
    pub fn at_switch(&self, tool: &str, arguments: &[&str]) -> anyhow::Result<()> {
        let output = self.switch.command(tool.as_ref()).args(arguments).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        anyhow::ensure!(output.status.success(), "{tool} {}: {}", arguments.join(" "), said.trim());
        Ok(())
    }

    /// Where its certificates come from.
    pub fn authority(&self) -> PathBuf {
        self.scratch.path().join("authority")
    }

    /// Issues a certificate for `name`; an agent's, unless the options say otherwise.
    pub fn issue(&self, name: &str, options: &[&str]) -> anyhow::Result<Files> {
        let (authority, to) = (self.authority(), self.scratch.path().join("tls").join(name));
        let words = ["issue", &authority.to_string_lossy(), name, "--again", "--to", &to.to_string_lossy()];
        pki(&[&words, options].concat())?;
        Ok(files_in(&to))
    }

    /// A directory that goes with the fleet.
    pub fn scratch(&self) -> &std::path::Path {
        self.scratch.path()
    }
}

/// What `rswap pki issue` has put into a directory.
pub fn files_in(directory: &Path) -> Files {
    let file = |name: &str| directory.join(name);
    Files { ca: file("ca.pem"), certificate: file("certificate.pem"), key: file("key.pem") }
}

/// Calls `rswap pki`.
pub fn pki(arguments: &[&str]) -> anyhow::Result<()> {
    let mut command = Command::new(binary("rswap")?);
    let output =
        command.arg("pki").args(arguments).stdin(Stdio::null()).output().context("cannot start rswap")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "rswap pki {}: {}", arguments.join(" "), said.trim());
    Ok(())
}
