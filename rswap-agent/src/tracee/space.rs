//! The address space of a process that is being built: a stub with the right pid, emptied of everything
//! but the kernel's own mappings, into which mappings and contents come while the source still runs.

use std::{collections::BTreeMap, os::fd::RawFd};

use super::{
    TraceeError,
    batch::{Arg, Batch},
    files::{Place, Places},
    layout::{self, Change, Layout, Mapping, ProcessLayout},
    link::{Link, STUB_END},
    objects::BuiltObject,
    remote::{Remote, STUB_SCRATCH_BYTES},
    tree,
};
use crate::sys::{
    mem::{self, ForcedMemory, PAGE_SIZE, RemoteAddr},
    process::{self, Common},
    ptrace::{self, Stop},
    spawn::CloneArgs,
};

/// Lowest address that a process may map (`vm.mmap_min_addr`'s default): programs leave what follows free.
const LOWEST: u64 = 0x1_0000;
/// Where the kernel's own mappings wait while they change places: a stub has nothing else there.
const DETOUR: u64 = 0x1000_0000;

/// A process under construction. It is killed when the thread that took it ends before it was released.
#[derive(Debug)]
pub struct Space {
    pid: i32,
    pub(super) remote: Remote,
    memory: ForcedMemory,
    layout: Layout,
    kernel_mappings: Vec<Mapping>,
    scratch: u64,
}

/// The shared memory that stubs map, and the way to hand it to them.
pub struct SharedMemory<'a> {
    /// The way.
    pub link: &'a Link,
    /// By the inode at the source.
    pub objects: &'a BTreeMap<u64, BuiltObject>,
    /// Where the instance's files are: those that go along may be mapped for writing.
    pub places: &'a Places,
}

impl SharedMemory<'_> {
    fn give(&mut self, remote: &mut Remote, mapping: &Mapping) -> Result<i32, TraceeError> {
        let missing =
            || TraceeError::Unsupported(format!("the layout has no shared memory {}", mapping.inode));
        let object = self.objects.get(&mapping.inode).ok_or_else(missing)?;
        self.link.give(remote, STUB_END, &object.file)
    }
}

impl Space {
    /// Makes process `pid` die with this thread from now on; it goes on waiting.
    pub fn hold(pid: i32) -> Result<(), TraceeError> {
        ptrace::seize_stub(pid).map_err(TraceeError::call("PTRACE_SEIZE", pid))
    }

    /// Lets go of it, for another thread of ours to [take it up](Self::take_up): it waits. If the agent is killed in between, it
    /// goes on waiting, and is removed with its cgroup.
    pub fn hand_over(&mut self) -> Result<(), TraceeError> {
        self.remote.set_call(libc::SYS_pause, [0; 6])?;
        ptrace::detach(self.pid, 0).map_err(TraceeError::call("PTRACE_DETACH", self.pid))
    }

    /// Takes it over from the thread that has [handed it over](Self::hand_over).
    pub fn take_up(&mut self) -> Result<(), TraceeError> {
        Self::hold(self.pid)?;
        ptrace::interrupt(self.pid).map_err(TraceeError::call("PTRACE_INTERRUPT", self.pid))?;
        match ptrace::wait_stop(self.pid).map_err(TraceeError::call("waiting for the stop", self.pid))? {
            Stop::Gone => Err(TraceeError::Gone(self.pid)),
            _ => Ok(()),
        }
    }

    /// Takes over process `pid` (as the agent sees it), which is [held](Self::hold) and waits in pause(2), empties it and moves the
    /// kernel's own mappings to where the source has them.
    pub fn take(pid: i32, kernel_mappings: &[Mapping]) -> Result<Self, TraceeError> {
        let call = TraceeError::call;
        ptrace::interrupt(pid).map_err(call("PTRACE_INTERRUPT", pid))?;
        if ptrace::wait_stop(pid).map_err(call("waiting for the stop", pid))? == Stop::Gone {
            return Err(TraceeError::Gone(pid));
        }
        let mut remote = Remote::stub(pid)?;
        remote.keep_changes();
        let rseq = ptrace::rseq_configuration(pid).map_err(call("PTRACE_GET_RSEQ_CONFIGURATION", pid))?;
        if rseq.address != 0 {
            const UNREGISTER: u64 = 1;
            let args = [rseq.address, rseq.size.into(), UNREGISTER, rseq.signature.into(), 0, 0];
            remote.call("rseq", libc::SYS_rseq, args)?;
        }
        let end = STUB_END as u64;
        remote.call("close_range", libc::SYS_close_range, [0, end - 1, 0, 0, 0, 0])?;
        remote.call("close_range", libc::SYS_close_range, [end + 1, u32::MAX.into(), 0, 0, 0, 0])?;
        Self::of(pid, remote, kernel_mappings)
    }

    /// Makes system calls in it.
    pub fn remote(&mut self) -> &mut Remote {
        &mut self.remote
    }

    /// Makes a child of this process, or of its parent (`beside`), with pid `inner` in the instance's namespace, and
    /// takes it over. It has those tables in common with this process. Without `kernel_mappings` those stay where they are.
    pub fn make_child(
        &mut self,
        inner: i32,
        beside: bool,
        in_common: &[Common],
        kernel_mappings: Option<&[Mapping]>,
    ) -> Result<Self, TraceeError> {
        const TID_OFFSET: u64 = 96;
        let tid_at = self.remote.put(TID_OFFSET, &inner.to_ne_bytes())?;
        let (flags, exit_signal) = match beside {
            // It gets the signal of its sibling, and may not ask for another.
            true => (libc::CLONE_PARENT as u64, 0),
            false => (0, libc::SIGCHLD as u64),
        };
        let flags = in_common.iter().fold(flags, |flags, what| {
            flags
                | match what {
                    Common::Descriptors => libc::CLONE_FILES as u64,
                    Common::Directories => libc::CLONE_FS as u64,
                    Common::Memory | Common::SemaphoreUndo => 0,
                }
        });
        let args = CloneArgs { flags, exit_signal, set_tid: tid_at, set_tid_size: 1, ..CloneArgs::default() };
        let bytes = args.to_bytes();
        let at = self.remote.put(0, &bytes)?;
        self.remote.call("clone3", libc::SYS_clone3, [at, bytes.len() as u64, 0, 0, 0, 0])?;
        let parent = match beside {
            true => tree::parent(self.pid)?,
            false => self.pid,
        };
        let pid = tree::child_with(parent, inner)?.ok_or(TraceeError::Gone(self.pid))?;
        if ptrace::wait_stop(pid).map_err(TraceeError::call("waiting for a new process", pid))? == Stop::Gone
        {
            return Err(TraceeError::Gone(pid));
        }
        let remote = self.remote.for_process(pid)?;
        Self::of(pid, remote, kernel_mappings.unwrap_or(&self.kernel_mappings))
    }

    /// Empties a process that has nothing to keep.
    fn of(pid: i32, mut remote: Remote, kernel_mappings: &[Mapping]) -> Result<Self, TraceeError> {
        for mapping in layout::read_mappings(pid)?.iter().filter(|mapping| !mapping.is_kernels_own()) {
            remote.call("munmap", libc::SYS_munmap, [mapping.start, mapping.len(), 0, 0, 0, 0])?;
        }
        move_kernel_mappings(&mut remote, kernel_mappings)?;
        remote.map_scratch(LOWEST)?;
        let memory = ForcedMemory::open(pid).map_err(TraceeError::call("opening the memory", pid))?;
        let kernel_mappings = kernel_mappings.to_vec();
        Ok(Self { pid, remote, memory, layout: Layout::default(), kernel_mappings, scratch: LOWEST })
    }

    /// Starts a session of its own, as its process has.
    pub fn start_session(&mut self) -> Result<(), TraceeError> {
        self.remote.call("setsid", libc::SYS_setsid, [0; 6]).map(drop)
    }

    /// Has a table no longer in common with anybody: it becomes a copy.
    pub fn leave(&mut self, what: Common) -> Result<(), TraceeError> {
        let flag = if what == Common::Descriptors { libc::CLONE_FILES } else { libc::CLONE_FS };
        self.remote.call("unshare", libc::SYS_unshare, [flag as u64, 0, 0, 0, 0, 0]).map(drop)
    }

    /// Puts it into a process group.
    pub fn join_group(&mut self, group: i32) -> Result<(), TraceeError> {
        self.remote.call("setpgid", libc::SYS_setpgid, [0, group as u64, 0, 0, 0, 0]).map(drop)
    }

    /// Ends it: its process has ended at the source.
    pub fn end(self) -> Result<(), TraceeError> {
        let pidfd = process::pidfd_open(self.pid).map_err(TraceeError::call("pidfd_open", self.pid))?;
        process::pidfd_send_signal(&pidfd, libc::SIGKILL).map_err(TraceeError::call("ending", self.pid))?;
        while ptrace::wait_stop(self.pid).map_err(TraceeError::call("waiting for the end", self.pid))?
            != Stop::Gone
        {}
        Ok(())
    }

    /// Ends it with `status` (as wait(2) has it), for its parent to find.
    pub fn end_with(mut self, status: i32) -> Result<(), TraceeError> {
        let signal = status & 0x7f;
        if signal != 0 {
            return self.end_by(signal);
        }
        let code = (status >> 8 & 0xff) as u64;
        match self.remote.call("exit_group", libc::SYS_exit_group, [code, 0, 0, 0, 0, 0]) {
            Err(TraceeError::Gone(_)) => Ok(()),
            Err(error) => Err(error),
            Ok(_) => Err(TraceeError::Unsupported(format!("process {} does not end", self.pid))),
        }
    }

    fn end_by(self, signal: i32) -> Result<(), TraceeError> {
        let pid = self.pid;
        let call = TraceeError::call;
        ptrace::set_signal_mask(pid, 0).map_err(call("PTRACE_SETSIGMASK", pid))?;
        let pidfd = process::pidfd_open(pid).map_err(call("pidfd_open", pid))?;
        process::pidfd_send_signal(&pidfd, signal).map_err(call("ending", pid))?;
        let mut deliver = 0;
        loop {
            match ptrace::resume(pid, deliver) {
                // SIGKILL does not wait for it to go on.
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                resumed => resumed.map_err(call("PTRACE_CONT", pid))?,
            }
            match ptrace::wait_stop(pid).map_err(call("waiting for the end", pid))? {
                Stop::Gone => return Ok(()),
                Stop::Signal(signal) => deliver = signal,
                Stop::Call | Stop::Event | Stop::Group(_) | Stop::Other => deliver = 0,
            }
        }
    }

    /// Stops it as its program was stopped, by `signal`; it makes calls for us all the same.
    pub fn stop_by(&mut self, signal: i32) -> Result<(), TraceeError> {
        let pid = self.pid;
        let call = TraceeError::call;
        // The kernel takes the other stop signals from a group that nobody controls.
        for signal in [signal, libc::SIGSTOP] {
            let pidfd = process::pidfd_open(pid).map_err(call("pidfd_open", pid))?;
            process::pidfd_send_signal(&pidfd, libc::SIGSTOP).map_err(call("stopping", pid))?;
            // If it went on, it would only do this.
            self.remote.set_call(libc::SYS_getpid, [0; 6])?;
            let mut deliver = 0;
            loop {
                ptrace::single_step_with(pid, deliver).map_err(call("PTRACE_SINGLESTEP", pid))?;
                match ptrace::wait_stop(pid).map_err(call("waiting for the stop", pid))? {
                    Stop::Gone => return Err(TraceeError::Gone(pid)),
                    Stop::Group(_) => return Ok(()),
                    Stop::Signal(libc::SIGSTOP) => deliver = signal,
                    Stop::Signal(libc::SIGTRAP) => break,
                    Stop::Signal(_) | Stop::Call | Stop::Event | Stop::Other => deliver = 0,
                }
            }
        }
        Err(TraceeError::Unsupported(format!("process {pid} could not be stopped again")))
    }

    /// Takes note that a child has stopped.
    pub fn read_stop(&mut self, inner: i32) -> Result<(), TraceeError> {
        let options = (libc::WSTOPPED | libc::WNOHANG | libc::__WALL) as u64;
        let args = [libc::P_PID as u64, inner as u64, 0, options, 0, 0];
        self.remote.call("waitid", libc::SYS_waitid, args).map(drop)
    }

    /// Collects a child that has ended.
    pub fn reap(&mut self, inner: i32) -> Result<(), TraceeError> {
        let options = (libc::WNOHANG | libc::__WALL) as u64;
        self.remote.call("wait4", libc::SYS_wait4, [inner as u64, 0, options, 0, 0, 0]).map(drop)
    }

    /// Takes away the signals that building the tree has sent to it.
    pub fn drop_signals(&mut self) -> Result<(), TraceeError> {
        let at = self.remote.put(0, &[[0xff; 8], [0; 8], [0; 8]].concat())?;
        loop {
            // The set; no siginfo; no time to wait; the set's size.
            let args = [at, 0, at + 8, 8, 0, 0];
            match self.remote.call("rt_sigtimedwait", libc::SYS_rt_sigtimedwait, args) {
                Ok(_) => {}
                Err(TraceeError::Remote { source, .. }) if source.raw_os_error() == Some(libc::EAGAIN) => {
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Its pid, as the agent sees it.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Brings the mappings to those of `wanted`; what stays the same keeps its contents.
    pub fn apply(
        &mut self,
        wanted: &ProcessLayout,
        shared: &mut SharedMemory<'_>,
    ) -> Result<(), TraceeError> {
        let layout = &wanted.layout;
        if wanted.kernel_mappings != self.kernel_mappings {
            // It executes another program now: nothing of the old one stays.
            for Mapping { start, end, .. } in std::mem::take(&mut self.layout.mappings) {
                self.remote.call("munmap", libc::SYS_munmap, [start, end - start, 0, 0, 0, 0])?;
            }
            self.remote.unmap_scratch()?;
            move_kernel_mappings(&mut self.remote, &wanted.kernel_mappings)?;
            self.kernel_mappings.clone_from(&wanted.kernel_mappings);
            self.remote.map_scratch(LOWEST)?;
            self.scratch = LOWEST;
        }
        if layout.huge_pages_off != self.layout.huge_pages_off {
            let args = [libc::PR_SET_THP_DISABLE as u64, layout.huge_pages_off.into(), 0, 0, 0, 0];
            self.remote.call("prctl", libc::SYS_prctl, args)?;
        }
        self.make_way(layout)?;
        let mut batch = self.remote.batch();
        for change in layout::changes(&self.layout.mappings, &layout.mappings) {
            match change {
                Change::Unmap { start, end } => {
                    batch.call("munmap", libc::SYS_munmap, &[start.into(), (end - start).into()])?;
                }
                Change::Protect { start, end, protection } => {
                    let args = [start.into(), (end - start).into(), protection.into()];
                    batch.call("mprotect", libc::SYS_mprotect, &args)?;
                }
                Change::Map(mapping) if mapping.is_sysv() => attach(&mut batch, &mapping, shared)?,
                Change::Map(mapping) if mapping.is_object() => {
                    batch.run()?;
                    let file = shared.give(&mut self.remote, &mapping)?;
                    batch = self.remote.batch();
                    map(&mut batch, &mapping, Some(file), shared.places)?;
                }
                Change::Map(mapping) => map(&mut batch, &mapping, None, shared.places)?,
            }
        }
        batch.run()?;
        self.layout = layout.clone();
        Ok(())
    }

    /// Moves the scratch memory away if the new layout wants its place.
    fn make_way(&mut self, layout: &Layout) -> Result<(), TraceeError> {
        let taken = |at: u64| {
            let lies = |mapping: &Mapping| mapping.start < at + STUB_SCRATCH_BYTES && at < mapping.end;
            layout.mappings.iter().chain(&self.layout.mappings).any(lies)
        };
        if taken(self.scratch) {
            let mut free = LOWEST;
            while taken(free) {
                free += PAGE_SIZE;
            }
            self.remote.unmap_scratch()?;
            self.remote.map_scratch(free)?;
            self.scratch = free;
        }
        Ok(())
    }

    /// Writes into a mapping, whatever its protection.
    pub fn write(&self, at: u64, data: &[u8]) -> Result<(), TraceeError> {
        // The quick way refuses read-only mappings.
        if mem::write(self.pid, RemoteAddr(at), data).is_ok() {
            return Ok(());
        }
        self.memory.write(RemoteAddr(at), data).map_err(TraceeError::call("writing memory", self.pid))
    }

    /// Reads from a mapping, whatever its protection.
    pub fn read(&self, at: u64, buf: &mut [u8]) -> Result<(), TraceeError> {
        if mem::read_exact(self.pid, RemoteAddr(at), buf).is_ok() {
            return Ok(());
        }
        self.memory.read_exact(RemoteAddr(at), buf).map_err(TraceeError::call("reading memory", self.pid))
    }

    /// Writes runs of pages into mappings, whatever their protection.
    pub fn write_runs(&self, runs: &[(u64, &[u8])]) -> Result<(), TraceeError> {
        let pieces: Vec<_> = runs.iter().map(|(at, data)| (RemoteAddr(*at), *data)).collect();
        match mem::write_pieces(self.pid, &pieces) {
            Ok(()) => Ok(()),
            Err(_) => runs.iter().try_for_each(|(at, data)| self.write(*at, data)),
        }
    }

    /// Reads runs of pages from mappings, whatever their protection.
    pub fn read_runs(&self, runs: &mut [(u64, &mut [u8])]) -> Result<(), TraceeError> {
        let bytes: usize = runs.iter().map(|(_, buf)| buf.len()).sum();
        let mut pieces: Vec<_> = runs.iter_mut().map(|(at, buf)| (RemoteAddr(*at), &mut **buf)).collect();
        match mem::read_pieces(self.pid, &mut pieces) {
            Ok(got) if got == bytes => Ok(()),
            _ => runs.iter_mut().try_for_each(|(at, buf)| self.read(*at, buf)),
        }
    }

    /// Drops the private contents of the mapped part of `start..end`.
    pub fn discard(&mut self, start: u64, end: u64) -> Result<(), TraceeError> {
        let inside: Vec<(u64, u64)> = self
            .layout
            .mappings
            .iter()
            .filter(|mapping| mapping.start < end && start < mapping.end)
            .map(|mapping| (mapping.start.max(start), mapping.end.min(end)))
            .collect();
        for (start, end) in inside {
            let args = [start, end - start, libc::MADV_DONTNEED as u64, 0, 0, 0];
            self.remote.call("madvise", libc::SYS_madvise, args)?;
        }
        Ok(())
    }
}

/// Maps what is neither SysV memory nor, without its descriptor `object`, other shared memory.
fn map(
    batch: &mut Batch<'_>,
    mapping: &Mapping,
    object: Option<RawFd>,
    places: &Places,
) -> Result<(), TraceeError> {
    let sharing = if mapping.shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
    let in_volume = places.find(&mapping.name) == Place::Volume;
    if mapping.shared && object.is_none() && !mapping.is_read_only_file() && !in_volume {
        let text = format!("shared memory at {:#x} {} isn't carried", mapping.start, mapping.name);
        return Err(TraceeError::Unsupported(text));
    }
    let mut flags = sharing | libc::MAP_FIXED_NOREPLACE;
    let mut file = Arg::from(-1);
    if let Some(object) = object {
        file = object.into();
    } else if mapping.is_file() {
        let mut name = mapping.name.as_bytes().to_vec();
        name.push(0);
        // What is mapped shared may be made writable later.
        let writable = mapping.shared && in_volume && !places.is_read_only(&mapping.name);
        let access = if writable { libc::O_RDWR } else { libc::O_RDONLY };
        let args = [libc::AT_FDCWD.into(), Arg::Data(&name), (access | libc::O_CLOEXEC).into()];
        file = Arg::ResultOf(batch.call("openat", libc::SYS_openat, &args)?);
    } else {
        flags |= libc::MAP_ANONYMOUS;
        if mapping.is_huge() {
            flags |= libc::MAP_HUGETLB;
        }
        if mapping.name == "[stack]" {
            flags |= libc::MAP_GROWSDOWN;
        }
        if mapping.protection == libc::PROT_NONE {
            flags |= libc::MAP_NORESERVE;
        }
    }
    let offset = if mapping.is_file() { mapping.offset } else { 0 };
    let (start, length) = (mapping.start.into(), mapping.len().into());
    let args = [start, length, mapping.protection.into(), flags.into(), file, offset.into()];
    batch.call("mmap", libc::SYS_mmap, &args)?;
    if mapping.is_file() {
        batch.call("close", libc::SYS_close, &[file])?;
    }
    Ok(())
}

/// Attaches SysV shared memory, which the kernel counts by who attaches it.
fn attach(batch: &mut Batch<'_>, mapping: &Mapping, shared: &SharedMemory<'_>) -> Result<(), TraceeError> {
    let segment = shared.objects.get(&mapping.inode).and_then(|object| object.object.segment);
    let bytes = segment.map_or(0, |segment| segment.bytes.next_multiple_of(PAGE_SIZE));
    let Some(segment) = segment.filter(|_| mapping.offset == 0 && mapping.len() == bytes) else {
        let text = format!("SysV shared memory at {:#x} is not mapped as a whole", mapping.start);
        return Err(TraceeError::Unsupported(text));
    };
    let mut flags = 0;
    if mapping.protection & libc::PROT_WRITE == 0 {
        flags |= libc::SHM_RDONLY;
    }
    if mapping.protection & libc::PROT_EXEC != 0 {
        flags |= libc::SHM_EXEC;
    }
    batch.call("shmat", libc::SYS_shmat, &[segment.id.into(), mapping.start.into(), flags.into()])?;
    if mapping.protection & libc::PROT_READ == 0 {
        let args = [mapping.start.into(), mapping.len().into(), mapping.protection.into()];
        batch.call("mprotect", libc::SYS_mprotect, &args)?;
    }
    Ok(())
}

/// Moves vDSO and vvar to the source's addresses. Their contents are the kernel's build, which the offer
/// has compared.
fn move_kernel_mappings(remote: &mut Remote, wanted: &[Mapping]) -> Result<(), TraceeError> {
    let pid = remote.tid();
    let mut here: Vec<Mapping> = layout::read_mappings(pid)?;
    here.retain(|mapping| mapping.is_kernels_own() && mapping.name != "[vsyscall]");
    let wanted: Vec<&Mapping> = wanted.iter().filter(|mapping| mapping.name != "[vsyscall]").collect();
    let alike = here.len() == wanted.len()
        && here.iter().zip(&wanted).all(|(here, there)| here.name == there.name && here.len() == there.len());
    if !alike {
        let text =
            "the kernel's own mappings (vDSO) differ between the hosts: use the same kernel build".into();
        return Err(TraceeError::Unsupported(text));
    }
    if here.iter().zip(&wanted).all(|(from, to)| from.start == to.start) {
        return Ok(());
    }
    // Moving over one that is still to be moved would destroy it: then all make a detour.
    let overlap = wanted.iter().any(|to| here.iter().any(|from| to.start < from.end && from.start < to.end));
    if overlap {
        let taken: Vec<(u64, u64)> =
            here.iter().chain(wanted.iter().copied()).map(|mapping| (mapping.start, mapping.end)).collect();
        let mut free = DETOUR;
        for from in &mut here {
            while taken.iter().any(|(start, end)| free < *end && *start < free + from.len()) {
                free += from.len();
            }
            let to = Mapping { start: free, end: free + from.len(), ..from.clone() };
            move_mapping(remote, from, to.start)?;
            free = to.end;
            *from = to;
        }
    }
    for (from, to) in here.iter().zip(&wanted) {
        move_mapping(remote, from, to.start)?;
    }
    Ok(())
}

fn move_mapping(remote: &mut Remote, from: &Mapping, to: u64) -> Result<(), TraceeError> {
    let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
    remote.call("mremap", libc::SYS_mremap, [from.start, from.len(), from.len(), flags, to, 0])?;
    if from.name == "[vdso]" {
        remote.vdso_moved(from.start, to);
    }
    Ok(())
}
