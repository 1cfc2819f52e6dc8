//! Starts a command as an instance: cgroup, namespaces, network, init.

use std::{
    collections::BTreeMap,
    ffi::CString,
    fs::File,
    io::{self, Write},
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
};

use nix::{
    sched::{CpuSet as KernelCpuSet, sched_setaffinity},
    sys::{
        signal::{SigSet, Signal},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

use super::{
    Instance, InstanceError, InstanceName, NetworkIdentity, Origin,
    affinity::Choices,
    cgroup,
    net_tables::with_small_tables,
    network::Port,
    registry::Registry,
    volume::{self, Volume},
};
use crate::{
    pool::CpuSet,
    sys::{clock::Clocks, spawn},
    tracee::{files::Places, mounts::Mounts},
    units::UnixMillis,
    volume::place,
};

/// `rswap run`'s exit status when the instance went on elsewhere: it has no status yet (EX_TEMPFAIL).
pub const MOVED_AWAY: i32 = 75;

/// Where instances of this host live.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Place {
    /// Runtime state.
    pub state_dir: PathBuf,
    /// Directory under the cgroup v2 mount.
    pub cgroup_parent: String,
    /// Bridge for instances with an address of their own.
    pub bridge: Option<String>,
    /// Directories that are one and the same on every host.
    pub shared: Vec<PathBuf>,
    /// Where the volumes of instances are.
    pub volumes: PathBuf,
}

impl Place {
    /// Where the files of `instance` are, which has made `mounts`.
    pub fn places_of(&self, instance: &Instance, mounts: &Mounts) -> Places {
        Places::of(instance, mounts, self.shared.clone())
    }

    /// The directory of a volume of the instance `name`.
    pub fn volume(&self, name: &InstanceName, volume: &Volume) -> PathBuf {
        place::of(&self.volumes, name.as_str(), volume.name.as_str())
    }
}

/// What is to be started.
#[derive(Clone, Debug)]
pub struct LaunchSpec {
    /// Its name.
    pub name: InstanceName,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// The CPU pool and its cores.
    pub pool: Option<(String, CpuSet)>,
    /// A network namespace of its own with this address.
    pub network: Option<NetworkIdentity>,
    /// Its volumes, each with the directory of this host that is mounted there.
    pub volumes: Vec<(Volume, PathBuf)>,
    /// Return when it runs; else wait for its end.
    pub detach: bool,
    /// Where its output goes when detached.
    pub log: Option<PathBuf>,
    /// The command.
    pub command: Vec<String>,
}

/// Starts `spec` and, unless detached, waits for its end. Returns the exit status for `rswap run`.
pub fn run(place: &Place, spec: &LaunchSpec) -> Result<i32, InstanceError> {
    let registry = Registry::open(&place.state_dir)?;
    if registry.get(&spec.name)?.is_some() {
        return Err(InstanceError::Invalid(format!(
            "an instance {} is running: choose another --name",
            spec.name
        )));
    }
    make_volumes(place, spec)?;
    // Left by one of the same name that nobody waited for: it would be taken for word of this one.
    let _ = was_moved(place, &spec.name);
    // Blocked before the start, so that none gets lost between start and wait.
    let forwarded = block_forwarded_signals()?;
    let started = start(place, spec, None)?;
    // What its threads will have is the pool's, not their own choice, whatever becomes of the pool.
    let pool =
        spec.pool.as_ref().map(|(_, cpus)| Choices::new(started.instance.cgroup_id, Some(cpus.clone())));
    let noted = pool.map_or(Ok(()), |choices| registry.put_choices(&spec.name, &choices));
    if let Err(error) = noted.and_then(|()| registry.put(&started.instance)).and_then(|()| started.go()) {
        discard(&started.instance);
        registry.remove(&spec.name)?;
        return Err(error);
    }
    if spec.detach {
        return Ok(0);
    }
    let status = supervise(started.init_pid, &forwarded)?;
    let moved = registry.get(&spec.name)?.is_none() && was_moved(place, &spec.name);
    registry.remove(&spec.name)?;
    // The kernel takes a moment to empty the cgroup; what is left then is the agent's to clear.
    if let Err(error) = cgroup::remove(&started.instance.cgroup) {
        tracing::debug!(%error, "the cgroup stays for now");
    }
    if moved {
        eprintln!("rswap: {} goes on at another host", spec.name);
        return Ok(MOVED_AWAY);
    }
    Ok(status)
}

/// Makes the volumes that are not there yet. Those of an earlier instance of the same name are taken as they are.
fn make_volumes(place: &Place, spec: &LaunchSpec) -> Result<(), InstanceError> {
    let volumes: Vec<Volume> = spec.volumes.iter().map(|(volume, _)| volume.clone()).collect();
    volume::require_sound(&volumes)?;
    if volumes.is_empty() {
        return Ok(());
    }
    place::make(&place.volumes).map_err(|error| InstanceError::Invalid(error.to_string()))?;
    for (_, directory) in &spec.volumes {
        std::fs::create_dir_all(directory)
            .map_err(InstanceError::io(format!("making {}", directory.display())))?;
    }
    Ok(())
}

/// Leaves word that `name` went on elsewhere, for the `rswap run` that waits for it.
pub fn note_moved(state_dir: &Path, name: &InstanceName) -> Result<(), InstanceError> {
    let path = moved_marker(state_dir, name);
    std::fs::write(&path, []).map_err(InstanceError::io(format!("writing {}", path.display())))
}

fn was_moved(place: &Place, name: &InstanceName) -> bool {
    std::fs::remove_file(moved_marker(&place.state_dir, name)).is_ok()
}

fn moved_marker(state_dir: &Path, name: &InstanceName) -> PathBuf {
    state_dir.join("instances").join(format!("{name}.moved"))
}

/// An instance whose init waits for the word to go.
#[derive(Debug)]
pub(super) struct Started {
    pub(super) instance: Instance,
    pub(super) init_pid: i32,
    pub(super) port: Option<Port>,
    go: File,
}

impl Started {
    /// Puts its port on the bridge and lets the init start its work.
    fn go(&self) -> Result<(), InstanceError> {
        if let Some(port) = &self.port {
            port.attach()?;
        }
        self.start_work()
    }

    /// Lets the init start its work, off the network.
    pub(super) fn start_work(&self) -> Result<(), InstanceError> {
        (&self.go).write_all(&[1]).map_err(InstanceError::io("starting the init's work"))
    }
}

/// A process to be made instead of a command, and to be rebuilt.
pub(super) struct Stub<'a> {
    /// Its pid in the instance's namespace.
    pub(super) pid: i32,
    /// Its end of the socket by which it is given descriptors.
    pub(super) link: BorrowedFd<'a>,
    /// By how much its clocks are ahead of the kernel's.
    pub(super) offsets: Option<Clocks>,
}

/// Makes cgroup, namespaces and network; `stub` asks for such a process instead of the command.
pub(super) fn start(
    place: &Place,
    spec: &LaunchSpec,
    stub: Option<&Stub<'_>>,
) -> Result<Started, InstanceError> {
    let bridge = match (&spec.network, &place.bridge) {
        (Some(_), None) => {
            let text = "an instance with an address needs a bridge: set network.bridge in the configuration";
            return Err(InstanceError::Invalid(text.into()));
        }
        (_, bridge) => bridge.clone().unwrap_or_default(),
    };
    let path = cgroup::create(&place.cgroup_parent, spec.name.as_str())?;
    let directory = File::open(&path).map_err(InstanceError::io(format!("opening {}", path.display())))?;
    let (wait, go) =
        nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(InstanceError::io("making a pipe"))?;
    let mut flags = libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWUTS | libc::CLONE_NEWIPC;
    if spec.network.is_some() {
        flags |= libc::CLONE_NEWNET;
    }
    let arguments = init_arguments(spec, stub, std::os::fd::AsRawFd::as_raw_fd(&wait))?;
    let program = own_program()?;
    let mut keep = vec![wait.as_fd()];
    keep.extend(stub.map(|stub| stub.link));
    let spawn = || spawn::spawn_in_namespaces(flags, directory.as_fd(), &program, &arguments, &keep);
    let spawned = if spec.network.is_some() { with_small_tables(spawn)? } else { spawn() };
    let init_pid = spawned.map_err(InstanceError::io("starting the instance's init"))?;
    let mut started = Started {
        instance: Instance {
            name: spec.name.clone(),
            labels: spec.labels.clone(),
            cgroup_id: cgroup::id(&path)?,
            cgroup: path,
            origin: Origin::Run,
            init_pid: Some(init_pid),
            command: spec.command.clone(),
            network: spec.network.clone(),
            volumes: spec.volumes.iter().map(|(volume, _)| volume.clone()).collect(),
            pool: spec.pool.as_ref().map(|(name, _)| name.clone()),
            uplink: None,
            memory: None,
            since: UnixMillis::now(),
        },
        init_pid,
        port: None,
        go: File::from(go),
    };
    if let Err(error) = prepare(&mut started, spec, &bridge) {
        discard(&started.instance);
        return Err(error);
    }
    Ok(started)
}

/// What an init needs before it may start its work.
fn prepare(started: &mut Started, spec: &LaunchSpec, bridge: &str) -> Result<(), InstanceError> {
    if let Some((_, cpus)) = &spec.pool {
        set_affinity(started.init_pid, cpus)?;
    }
    if let Some(identity) = &spec.network {
        let port = Port::new(&spec.name, bridge, identity, started.init_pid);
        port.create()?;
        started.port = Some(port);
    }
    Ok(())
}

/// Removes an instance that did not get to run; what remains is logged, as the first failure matters more.
pub(super) fn discard(instance: &Instance) {
    if let Err(error) = super::arrival::end(instance) {
        tracing::warn!(instance = %instance.name, %error, "an instance that failed to start could not be removed");
    }
}

fn init_arguments(
    spec: &LaunchSpec,
    stub: Option<&Stub<'_>>,
    go: i32,
) -> Result<Vec<CString>, InstanceError> {
    let mut words = vec!["rswap".to_owned(), "__init".to_owned(), format!("--go={go}")];
    if spec.detach {
        words.push("--detach".into());
    }
    if let Some(log) = &spec.log {
        words.push(format!("--log={}", log.display()));
    }
    for (volume, directory) in &spec.volumes {
        words.push(format!("--volume-from={}", directory.display()));
        words.push(format!("--volume-at={}", volume.path.display()));
    }
    match stub {
        Some(Stub { pid, link, offsets }) => {
            words.push(format!("--stub={pid}"));
            words.push(format!("--link={}", std::os::fd::AsRawFd::as_raw_fd(link)));
            if let Some(Clocks { monotonic_ns, boottime_ns }) = offsets {
                words.push(format!("--monotonic-ns={monotonic_ns}"));
                words.push(format!("--boottime-ns={boottime_ns}"));
            }
        }
        None => {
            words.push("--".into());
            words.extend(spec.command.iter().cloned());
        }
    }
    let word =
        |word: String| CString::new(word).map_err(|_| InstanceError::Invalid("a NUL byte in a word".into()));
    words.into_iter().map(word).collect()
}

/// The running program, even if its file was replaced meanwhile.
fn own_program() -> Result<CString, InstanceError> {
    CString::new("/proc/self/exe")
        .map_err(|error| InstanceError::io("naming ourselves")(io::Error::other(error)))
}

fn set_affinity(pid: i32, cpus: &CpuSet) -> Result<(), InstanceError> {
    let mut set = KernelCpuSet::new();
    for cpu in cpus {
        set.set(*cpu).map_err(InstanceError::io(format!("naming cpu {cpu}")))?;
    }
    sched_setaffinity(Pid::from_raw(pid), &set)
        .map_err(InstanceError::io(format!("moving pid {pid} to {cpus:?}")))
}

fn block_forwarded_signals() -> Result<SigSet, InstanceError> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGCHLD] {
        set.add(signal);
    }
    set.thread_block().map_err(InstanceError::io("blocking signals"))?;
    Ok(set)
}

/// Waits for the init's end and passes signals on to the command meanwhile.
fn supervise(init_pid: i32, forwarded: &SigSet) -> Result<i32, InstanceError> {
    loop {
        match waitpid(Pid::from_raw(init_pid), Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, code)) => return Ok(code),
            Ok(WaitStatus::Signaled(_, signal, _)) => return Ok(128 + signal as i32),
            Ok(_) => {}
            Err(error) => return Err(InstanceError::io("waiting for the instance")(error)),
        }
        let signal = forwarded.wait().map_err(InstanceError::io("waiting for a signal"))?;
        // A terminal sends these to the whole foreground group: the command has them already.
        let from_terminal =
            matches!(signal, Signal::SIGINT | Signal::SIGQUIT) && io::IsTerminal::is_terminal(&io::stdin());
        if signal != Signal::SIGCHLD && !from_terminal {
            for child in children(init_pid) {
                // It may have ended just now.
                let _ = nix::sys::signal::kill(Pid::from_raw(child), signal);
            }
        }
    }
}

/// The children of a process of one thread.
pub(super) fn children(pid: i32) -> Vec<i32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().filter_map(|word| word.parse().ok()).collect()
}
