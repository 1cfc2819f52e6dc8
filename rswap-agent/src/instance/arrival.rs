//! An instance that arrives by migration: everything around the process, before and after the commit.

use std::{
    os::fd::AsFd,
    time::{Duration, Instant},
};

use nix::{sys::wait::waitpid, unistd::Pid};

use super::{
    Instance, InstanceError, cgroup,
    launch::{self, LaunchSpec, Place, Stub},
    network::{self, Port},
    registry::Registry,
};
use crate::{sys::clock::Clocks, tracee::link::Link};

/// How long the init may take to make the stub.
const STUB_TIMEOUT: Duration = Duration::from_secs(5);

/// A cgroup, namespaces, an init and a stub, off the network.
#[derive(Debug)]
pub struct Arrival {
    /// The instance as it will be here.
    pub instance: Instance,
    /// The stub's pid, as the agent sees it.
    pub stub_pid: i32,
    /// The way to give it descriptors.
    pub link: Link,
    port: Option<Port>,
    registry: Registry,
}

impl Arrival {
    /// Makes room for `instance`, whose main process has pid `inner_pid` in its namespace, and clocks that are ahead
    /// of this kernel's by `offsets`.
    pub fn receive(
        place: &Place,
        instance: &Instance,
        inner_pid: i32,
        offsets: Option<Clocks>,
    ) -> Result<Self, InstanceError> {
        let registry = Registry::open(&place.state_dir)?;
        if registry.get(&instance.name)?.is_some() {
            let text = format!("an instance {} is running on this host already", instance.name);
            return Err(InstanceError::Invalid(text));
        }
        let spec = LaunchSpec {
            name: instance.name.clone(),
            labels: instance.labels.clone(),
            pool: None,
            network: instance.network.clone(),
            detach: true,
            log: None,
            command: instance.command.clone(),
        };
        let (link, theirs) = Link::new().map_err(InstanceError::io("making a stub's link"))?;
        let stub = Stub { pid: inner_pid, link: theirs.as_fd(), offsets };
        let started = launch::start(place, &spec, Some(&stub))?;
        let init = started.init_pid;
        // The init is this process's child, and outlives the move: somebody has to collect its status.
        std::thread::spawn(move || waitpid(Pid::from_raw(init), None));
        let stub_pid = started.start_work().and_then(|()| wait_for_stub(init)).inspect_err(|_| {
            launch::discard(&started.instance);
        })?;
        Ok(Self { instance: started.instance, stub_pid, link, port: started.port, registry })
    }

    /// Connects it to the bridge and tells the neighbours.
    pub fn attach(&self) -> Result<(), InstanceError> {
        self.port.as_ref().map_or(Ok(()), Port::attach)
    }

    /// Enters the running instance in the registry.
    pub fn keep(&self, instance: &Instance) -> Result<(), InstanceError> {
        self.registry.put(instance)
    }

    /// Removes all of it.
    pub fn forget(self) -> Result<(), InstanceError> {
        end(&self.instance)
    }
}

/// Kills an instance, and removes its port and its cgroup.
pub fn end(instance: &Instance) -> Result<(), InstanceError> {
    cgroup::kill(&instance.cgroup)?;
    if instance.network.is_some() {
        network::remove_port(&instance.name)?;
    }
    cgroup::remove(&instance.cgroup)
}

fn wait_for_stub(init_pid: i32) -> Result<i32, InstanceError> {
    let deadline = Instant::now() + STUB_TIMEOUT;
    loop {
        if let Some(stub) = launch::children(init_pid).first() {
            return Ok(*stub);
        }
        if Instant::now() > deadline || !std::path::Path::new(&format!("/proc/{init_pid}")).exists() {
            let text = "the new namespace's init made no process with the instance's pid: is the pid taken?";
            return Err(InstanceError::Invalid(text.into()));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
