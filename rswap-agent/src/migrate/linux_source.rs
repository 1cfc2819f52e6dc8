//! A running Linux process as the source of a migration.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};

use super::traits::{PAGE_SIZE, PageRange, SourceTask, TaskError, Written};
use crate::{
    instance::Instance,
    sys::mem::{self, RemoteAddr},
    tracee::{
        TraceeError, capture, check,
        layout::{self, Layout, Mapping},
        settle::Settling,
        stopped::StoppedProcess,
        tcp::Held,
        tracker::{Span, Tracker},
    },
};

/// How long connections that can't be carried may take to come to their end, the instance running: a round trip to a
/// far peer.
const SETTLING_LIMIT: Duration = Duration::from_millis(250);

/// What the destination must have, so that the instance can go on there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Requirements {
    /// The instance as the source knows it.
    pub instance: Instance,
    /// The process's id in the instance's PID namespace.
    pub inner_pid: i32,
    /// The kernel's own mappings, to be laid out alike.
    pub kernel_mappings: Vec<Mapping>,
    /// What must be the same on both hosts.
    pub host: HostTraits,
    /// Digest of each file that is mapped, by path.
    pub files: BTreeMap<String, u128>,
    /// Resident memory, in bytes: there must be room for it.
    pub resident_bytes: u64,
}

/// What must be the same on both hosts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostTraits {
    /// Kernel release: the vDSO and the meaning of the image come with it.
    pub kernel: String,
    /// Processor features, as the kernel lists them.
    pub cpu_features: Vec<String>,
    /// The running kernel's identity: CLOCK_MONOTONIC counts from its start.
    pub boot_id: String,
}

impl HostTraits {
    /// This host's.
    pub fn here() -> Result<Self, std::io::Error> {
        let features = procfs_flags(&std::fs::read_to_string("/proc/cpuinfo")?);
        Ok(Self {
            kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            cpu_features: features,
            boot_id: std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned(),
        })
    }
}

fn procfs_flags(cpuinfo: &str) -> Vec<String> {
    let line = cpuinfo.lines().find(|line| line.starts_with("flags"));
    let words = line.and_then(|line| line.split_once(':')).map(|(_, words)| words).unwrap_or_default();
    words.split_whitespace().map(str::to_owned).collect()
}

/// The digest by which files are compared between hosts.
pub fn file_digest(path: &str) -> std::io::Result<u128> {
    std::fs::read(path).map(|contents| xxhash_rust::xxh3::xxh3_128(&contents))
}

/// How the network is taken from the instance during the freeze, and given back if the move fails.
pub trait Uplink {
    /// Nothing reaches the instance any more, and nothing leaves it.
    fn detach(&mut self) -> Result<(), TaskError>;
    /// As before.
    fn attach(&mut self) -> Result<(), TaskError>;
    /// What came for the instance since `detach` goes to where it is now. What fails of it is lost, as it can be on any
    /// network.
    fn pass_on(&mut self);
}

/// An instance of one process, as the engine sees it.
pub struct LinuxSource<U> {
    instance: Instance,
    uplink: U,
    pid: i32,
    tracker: Option<Tracker>,
    settling: Option<Settling>,
    stopped: Option<StoppedProcess>,
    held: Held,
    detached: bool,
    mappings: Vec<Mapping>,
    /// Ends the instance for good; given by the room that started it.
    end: Box<dyn FnMut() -> Result<(), TaskError>>,
}

impl<U: Uplink> LinuxSource<U> {
    /// Prepares to move `instance`; nothing is touched yet. `end` is called once, after the commit.
    ///
    /// # Errors
    /// What of the instance can't be carried, item by item.
    pub fn new(
        instance: Instance,
        uplink: U,
        end: Box<dyn FnMut() -> Result<(), TaskError>>,
    ) -> Result<Self, TaskError> {
        check::require(&instance)?;
        let pid = check::processes(&instance)?.first().copied().unwrap_or_default();
        let (tracker, settling, stopped, mappings) = (None, None, None, Vec::new());
        let held = Held::default();
        Ok(Self { instance, uplink, pid, tracker, settling, stopped, held, detached: false, mappings, end })
    }

    fn space_layout(&self) -> Result<Layout, TraceeError> {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.pid))
            .map_err(TraceeError::proc("status"))?;
        let huge_pages_off = text.lines().any(|line| line.split_whitespace().eq(["THP_enabled:", "0"]));
        Ok(Layout { mappings: self.mappings.clone(), huge_pages_off })
    }
}

/// An instance that is committed to the destination, but not known to run there, must not run here when
/// this thread ends and its tracees are let go.
impl<U> Drop for LinuxSource<U> {
    fn drop(&mut self) {
        if self.stopped.is_some() {
            let file = self.instance.cgroup.join("cgroup.freeze");
            if let Err(error) = std::fs::write(&file, "1") {
                tracing::error!(path = %file.display(), %error, "an instance in doubt could not be kept frozen");
            }
        }
    }
}

fn ranges(spans: Vec<Span>) -> Vec<PageRange> {
    let page = PAGE_SIZE as u64;
    let range = |span: Span| PageRange { space: 0, start: span.start, pages: (span.end - span.start) / page };
    spans.into_iter().map(range).collect()
}

impl<U: Uplink> SourceTask for LinuxSource<U> {
    fn requirements(&mut self) -> Result<Vec<u8>, TaskError> {
        let mappings = layout::read_mappings(self.pid)?;
        let (kernel_mappings, own): (Vec<_>, Vec<_>) =
            mappings.into_iter().partition(Mapping::is_kernels_own);
        let mut files = BTreeMap::new();
        for mapping in own.iter().filter(|mapping| mapping.is_file()) {
            if !files.contains_key(&mapping.name) {
                files.insert(mapping.name.clone(), file_digest(&mapping.name)?);
            }
        }
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid))?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        let inner_pid = field("NSpid:").last().and_then(|word| word.parse().ok()).unwrap_or(self.pid);
        let resident_kib: u64 = field("VmRSS:").first().and_then(|word| word.parse().ok()).unwrap_or(0);
        let requirements = Requirements {
            instance: self.instance.clone(),
            inner_pid,
            kernel_mappings,
            host: HostTraits::here()?,
            files,
            resident_bytes: resident_kib * 1024,
        };
        Ok(postcard::to_stdvec(&requirements)?)
    }

    fn start_tracking(&mut self) -> Result<(), TaskError> {
        self.tracker = Some(Tracker::start(self.pid)?);
        Ok(())
    }

    fn layout(&mut self) -> Result<Vec<u8>, TaskError> {
        Ok(postcard::to_stdvec(&self.space_layout()?)?)
    }

    fn written(&mut self) -> Result<Written, TaskError> {
        let tracker = self.tracker.as_mut().ok_or("writes are not tracked yet")?;
        let written = tracker.take_written()?;
        self.mappings = written.mappings;
        Ok(Written { populated: ranges(written.populated), dropped: ranges(written.dropped) })
    }

    fn read(&mut self, _space: u32, addr: u64, buf: &mut [u8]) -> Result<usize, TaskError> {
        let got = mem::read(self.pid, RemoteAddr(addr), buf)?;
        let got = got - got % PAGE_SIZE;
        if got > 0 {
            return Ok(got);
        }
        // Memory that the program itself may not read is read all the same.
        match mem::ForcedMemory::open(self.pid)?.read_exact(RemoteAddr(addr), &mut buf[..PAGE_SIZE]) {
            Ok(()) => Ok(PAGE_SIZE),
            Err(_) => Ok(0),
        }
    }

    fn settle(&mut self) -> Result<(), TaskError> {
        let settling = self.settling.insert(Settling::begin(self.pid)?);
        let left = settling.wait(SETTLING_LIMIT)?;
        tracing::debug!(?left, "connections settled");
        Ok(())
    }

    fn freeze(&mut self) -> Result<(), TaskError> {
        self.stopped = Some(StoppedProcess::stop(self.pid)?);
        self.detached = true;
        self.uplink.detach()?;
        Ok(self.settling.as_ref().map_or(Ok(()), Settling::require)?)
    }

    fn snapshot(&mut self) -> Result<Vec<u8>, TaskError> {
        let stopped = self.stopped.as_ref().ok_or("the instance is not frozen")?;
        let mut image = capture::capture(stopped, self.mappings.clone())?;
        image.layout = self.space_layout()?;
        self.held.take(self.pid, &image.descriptors)?;
        self.held.read(self.pid, &mut image.descriptors)?;
        Ok(postcard::to_stdvec(&image)?)
    }

    fn thaw(&mut self) -> Result<(), TaskError> {
        self.tracker = None;
        // The port first: a connection that goes on asks its peer at once what it has.
        let attached = if std::mem::take(&mut self.detached) { self.uplink.attach() } else { Ok(()) };
        self.held.release();
        self.settling = None;
        self.stopped = None;
        self.uplink.pass_on();
        attached
    }

    fn destroy(&mut self) -> Result<(), TaskError> {
        self.uplink.pass_on();
        // Killed before it is let go: not one instruction of the source runs after the commit.
        (self.end)()?;
        // In repair mode to the end: the destination has the connections, and their peers hear nothing of this.
        self.held = Held::default();
        self.tracker = None;
        self.stopped = None;
        Ok(())
    }
}
