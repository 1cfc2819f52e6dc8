//! The address space of a process that is being built: a stub with the right pid, emptied of everything
//! but the kernel's own mappings, into which mappings and contents come while the source still runs.

use super::{
    TraceeError,
    layout::{self, Change, Layout, Mapping},
    remote::Remote,
};
use crate::sys::{
    mem::{self, ForcedMemory, PAGE_SIZE, RemoteAddr},
    ptrace::{self, Stop},
};

/// Lowest address that a process may map (`vm.mmap_min_addr`'s default): programs leave what follows free.
const LOWEST: u64 = 0x1_0000;

/// A process under construction. It is killed when the thread that took it ends before it was released.
#[derive(Debug)]
pub struct Space {
    pid: i32,
    pub(super) remote: Remote,
    memory: ForcedMemory,
    layout: Layout,
    scratch: u64,
}

impl Space {
    /// Takes over process `pid` (as the agent sees it), which waits in pause(2), empties it and moves the
    /// kernel's own mappings to where the source has them.
    pub fn take(pid: i32, kernel_mappings: &[Mapping]) -> Result<Self, TraceeError> {
        let call = TraceeError::call;
        ptrace::seize(pid, true, true).map_err(call("PTRACE_SEIZE", pid))?;
        ptrace::interrupt(pid).map_err(call("PTRACE_INTERRUPT", pid))?;
        if ptrace::wait_stop(pid).map_err(call("waiting for the stop", pid))? == Stop::Gone {
            return Err(TraceeError::Gone(pid));
        }
        let mut remote = Remote::new(pid)?;
        remote.keep_changes();
        let rseq = ptrace::rseq_configuration(pid).map_err(call("PTRACE_GET_RSEQ_CONFIGURATION", pid))?;
        if rseq.address != 0 {
            const UNREGISTER: u64 = 1;
            let args = [rseq.address, rseq.size.into(), UNREGISTER, rseq.signature.into(), 0, 0];
            remote.call("rseq", libc::SYS_rseq, args)?;
        }
        remote.call("close_range", libc::SYS_close_range, [0, u32::MAX.into(), 0, 0, 0, 0])?;
        for mapping in layout::read_mappings(pid)?.iter().filter(|mapping| !mapping.is_kernels_own()) {
            remote.call("munmap", libc::SYS_munmap, [mapping.start, mapping.len(), 0, 0, 0, 0])?;
        }
        move_kernel_mappings(&mut remote, kernel_mappings)?;
        remote.map_scratch(Some(LOWEST))?;
        let memory = ForcedMemory::open(pid).map_err(call("opening the memory", pid))?;
        Ok(Self { pid, remote, memory, layout: Layout::default(), scratch: LOWEST })
    }

    /// Its pid, as the agent sees it.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Brings the mappings to `layout`; what stays the same keeps its contents.
    pub fn apply(&mut self, layout: &Layout) -> Result<(), TraceeError> {
        if layout.huge_pages_off != self.layout.huge_pages_off {
            let args = [libc::PR_SET_THP_DISABLE as u64, layout.huge_pages_off.into(), 0, 0, 0, 0];
            self.remote.call("prctl", libc::SYS_prctl, args)?;
        }
        self.make_way(layout)?;
        for change in layout::changes(&self.layout.mappings, &layout.mappings) {
            match change {
                Change::Unmap { start, end } => {
                    self.remote.call("munmap", libc::SYS_munmap, [start, end - start, 0, 0, 0, 0])?;
                }
                Change::Protect { start, end, protection } => {
                    let args = [start, end - start, protection as u64, 0, 0, 0];
                    self.remote.call("mprotect", libc::SYS_mprotect, args)?;
                }
                Change::Map(mapping) => self.map(&mapping)?,
            }
        }
        self.layout = layout.clone();
        Ok(())
    }

    /// Moves the scratch page away if the new layout wants its place.
    fn make_way(&mut self, layout: &Layout) -> Result<(), TraceeError> {
        let taken = |at: u64| {
            let lies = |mapping: &Mapping| mapping.start < at + PAGE_SIZE && at < mapping.end;
            layout.mappings.iter().chain(&self.layout.mappings).any(lies)
        };
        if taken(self.scratch) {
            let mut free = LOWEST;
            while taken(free) {
                free += PAGE_SIZE;
            }
            self.remote.unmap_scratch()?;
            self.remote.map_scratch(Some(free))?;
            self.scratch = free;
        }
        Ok(())
    }

    fn map(&mut self, mapping: &Mapping) -> Result<(), TraceeError> {
        let sharing = if mapping.shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
        if mapping.shared && !mapping.is_read_only_file() {
            let text = format!("shared memory at {:#x} {} isn't carried", mapping.start, mapping.name);
            return Err(TraceeError::Unsupported(text));
        }
        let mut flags = sharing | libc::MAP_FIXED_NOREPLACE;
        let mut file = !0_u64;
        if mapping.is_file() {
            let mut name = mapping.name.as_bytes().to_vec();
            name.push(0);
            let at = self.remote.put(0, &name)?;
            let flags = (libc::O_RDONLY | libc::O_CLOEXEC) as u64;
            file =
                self.remote.call("openat", libc::SYS_openat, [libc::AT_FDCWD as u64, at, flags, 0, 0, 0])?;
        } else {
            flags |= libc::MAP_ANONYMOUS;
            if mapping.name == "[stack]" {
                flags |= libc::MAP_GROWSDOWN;
            }
            if mapping.protection == libc::PROT_NONE {
                flags |= libc::MAP_NORESERVE;
            }
        }
        let (start, protection) = (mapping.start, mapping.protection as u64);
        let args = [start, mapping.len(), protection, flags as u64, file, mapping.offset];
        self.remote.call("mmap", libc::SYS_mmap, args)?;
        if mapping.is_file() {
            self.remote.call("close", libc::SYS_close, [file, 0, 0, 0, 0, 0])?;
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
    // Moving over one that is still to be moved would destroy it.
    let overlap = wanted.iter().any(|to| here.iter().any(|from| to.start < from.end && from.start < to.end));
    let in_place = here.iter().zip(&wanted).all(|(from, to)| from.start == to.start);
    if overlap && !in_place {
        return Err(TraceeError::Unsupported(
            "the vDSO of the new process lies in the way: try again".into(),
        ));
    }
    for (from, to) in here.iter().zip(&wanted).filter(|(from, to)| from.start != to.start) {
        let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
        remote.call("mremap", libc::SYS_mremap, [from.start, from.len(), from.len(), flags, to.start, 0])?;
        if from.name == "[vdso]" {
            remote.vdso_moved(from.start, to.start);
        }
    }
    Ok(())
}
