//! An instance that arrives by migration: everything around the process, before and after the commit.

use std::{
    os::fd::AsFd,
    path::PathBuf,
    time::{Duration, Instant},
};

use nix::{sys::wait::waitpid, unistd::Pid};

use super::{
    Instance, InstanceError, cgroup,
    launch::{self, LaunchSpec, Place, Started, Stub},
    network::{self, Port},
    registry::Registry,
    volume,
};
use crate::{
    sys::clock::Clocks,
    tracee::{link::Link, mounts::Memory},
    volume::{VolumeError, built::BuiltVolume, memory::Tmpfs, place},
};

/// How long the init may take to make the stub.
const STUB_TIMEOUT: Duration = Duration::from_secs(5);

/// A cgroup, namespaces, an init and, once it has begun, a stub, off the network.
#[derive(Debug)]
pub struct Arrival {
    started: Started,
    /// The stub's pid, as the agent sees it; 0 before [`Arrival::begin`].
    pub stub_pid: i32,
    /// The way to give it descriptors.
    pub link: Link,
    /// Its volumes, each with its place.
    pub volumes: Vec<(BuiltVolume, PathBuf)>,
    /// Its file systems in memory.
    pub memories: Vec<BuiltVolume>,
    registry: Registry,
}

impl Arrival {
    /// Makes room for `instance`, whose main process has pid `inner_pid` in its namespace, and clocks that are ahead
    /// of this kernel's by `offsets`, and for its file systems in memory. The init waits, and ends if this process does.
    pub fn receive(
        place: &Place,
        instance: &Instance,
        memories: &[Memory],
        inner_pid: i32,
        offsets: Option<Clocks>,
    ) -> Result<Self, InstanceError> {
        let registry = Registry::open(&place.state_dir)?;
        volume::require_sound(&instance.volumes)?;
        let mut volumes = Vec::new();
        let mut mounted = Vec::new();
        let invalid = |error: VolumeError| InstanceError::Invalid(error.to_string());
        for volume in &instance.volumes {
            let directory = place::arriving(&place.volumes).map_err(invalid)?;
            let built = BuiltVolume::make(&directory).map_err(invalid)?;
            mounted.push((volume.clone(), built.root()));
            volumes.push((built, place.volume(&instance.name, volume)));
        }
        let make = |memory: &Memory| {
            let made = Tmpfs::make(&memory.source, &memory.options, memory.read_only);
            let made =
                made.map_err(InstanceError::io(format!("making a tmpfs with {:?}", memory.options)))?;
            BuiltVolume::make_in(made).map_err(invalid)
        };
        let memories = memories.iter().map(make).collect::<Result<_, InstanceError>>()?;
        let spec = LaunchSpec {
            name: instance.name.clone(),
            labels: instance.labels.clone(),
            pool: None,
            network: instance.network.clone(),
            volumes: mounted,
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
        Ok(Self { started, stub_pid: 0, link, volumes, memories, registry })
    }

    /// The instance as it will be here.
    pub fn instance(&self) -> &Instance {
        &self.started.instance
    }

    /// Lets the init make the stub: from here on something is left if this process ends.
    pub fn begin(&mut self) -> Result<(), InstanceError> {
        self.started.start_work()?;
        self.stub_pid = wait_for_stub(self.started.init_pid)?;
        Ok(())
    }

    /// Connects it to the bridge and tells the neighbours.
    pub fn attach(&self) -> Result<(), InstanceError> {
        self.started.port.as_ref().map_or(Ok(()), Port::attach)
    }

    /// Whether all that mounts are to show is there.
    pub fn is_filled(&self) -> bool {
        self.volumes.iter().map(|(volume, _)| volume).chain(&self.memories).all(BuiltVolume::is_complete)
    }

    /// Where its volumes are while they are built, and where they go.
    pub fn volume_moves(&self) -> Vec<(PathBuf, PathBuf)> {
        self.volumes.iter().map(|(volume, place)| (volume.root(), place.clone())).collect()
    }

    /// Enters the running instance in the registry.
    pub fn keep(&self, instance: &Instance) -> Result<(), InstanceError> {
        self.registry.put(instance)
    }

    /// Removes all of it.
    pub fn forget(self) -> Result<(), InstanceError> {
        end(&self.started.instance)
    }
}

/// What stands against taking in `instance` here, found by looking only: on what, and why.
pub fn objections(place: &Place, instance: &Instance) -> Result<Vec<(String, &'static str)>, InstanceError> {
    let mut found = Vec::new();
    let name = &instance.name;
    let cgroup = cgroup::mount_point()?.join(&place.cgroup_parent).join(name.as_str());
    if Registry::open(&place.state_dir)?.get(name)?.is_some() {
        found.push((name.to_string(), "an instance of this name is running on this host already"));
    } else if cgroup::is_populated(&cgroup)? {
        found.push((cgroup.display().to_string(), "this cgroup has processes on this host already"));
    }
    if instance.network.is_some() && place.bridge.is_none() {
        let reason = "the instance has an address, and this host no bridge: set network.bridge here";
        found.push(("network".to_owned(), reason));
    }
    let wants_ipv6 = instance.network.as_ref().is_some_and(|network| network.ipv6.is_some());
    if wants_ipv6 && !std::path::Path::new("/proc/sys/net/ipv6").exists() {
        let reason = "the instance has an IPv6 address, and this host's kernel has no IPv6";
        found.push(("network".to_owned(), reason));
    }
    for volume in &instance.volumes {
        let directory = place.volume(name, volume);
        if directory.exists() {
            let reason =
                "a volume of this instance is on this host already: look whether it is needed, and remove it";
            found.push((directory.display().to_string(), reason));
        }
    }
    Ok(found)
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
