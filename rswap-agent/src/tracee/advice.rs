//! What a program has asked of parts of its memory: madvise(2), mlock(2), mseal(2), and pages that guard.

use std::{
    collections::{BTreeMap, BTreeSet},
    num::NonZero,
    ops::Range,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, Receiver, Sender},
    },
    thread::{self, JoinHandle},
};

use serde::{Deserialize, Serialize};

use super::{
    TraceeError,
    capture::Status,
    layout::{self, Mapping},
    read_proc,
    remote::Remote,
};
use crate::sys::pagemap::{Pagemap, Query, category};

/// What mmap(2) gives for `MAP_HUGETLB` alone on x86-64, as it is set up usually.
pub const USUAL_HUGE_PAGE: u64 = 2 << 20;

const MADV_GUARD_INSTALL: i32 = 102;
/// `MLOCK_ONFAULT`, and `MCL_ONFAULT` for all that is mapped later.
const MLOCK_ONFAULT: u64 = 1;
const MCL_FUTURE: u64 = 2;
const MCL_ONFAULT: u64 = 4;
const SYS_MSEAL: libc::c_long = 462;

/// Flags of `/proc/PID/smaps` and the advice that sets each (proc_pid_smaps(5), fs/proc/task_mmu.c).
const ADVICE: [(&str, i32); 8] = [
    ("sr", libc::MADV_SEQUENTIAL),
    ("rr", libc::MADV_RANDOM),
    ("dc", libc::MADV_DONTFORK),
    ("dd", libc::MADV_DONTDUMP),
    ("wf", libc::MADV_WIPEONFORK),
    ("mg", libc::MADV_MERGEABLE),
    ("hg", libc::MADV_HUGEPAGE),
    ("nh", libc::MADV_NOHUGEPAGE),
];
const LOCKED: &str = "lo";
const LOCKED_ON_FAULT: &str = "lf";
const SEALED: &str = "sl";
const GROWS_DOWN: &str = "gd";
/// There may be guard pages (Linux 6.19 and kernels that have it from there).
const MAY_GUARD: &str = "gu";

/// What is asked of the memory of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Advice {
    /// Of which part, and what; what nothing is asked of is not there.
    pub parts: Vec<Part>,
    /// Pages that nobody may touch (`MADV_GUARD_INSTALL`).
    pub guards: Vec<Range<u64>>,
    /// `mlockall(MCL_FUTURE)`, with its flags; 0 without.
    pub locks_later: u64,
}

/// Part of an address space.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
    /// `MADV_*`.
    pub advice: Vec<i32>,
    /// It is locked: `MLOCK_*`.
    pub locked: Option<u64>,
    /// Its mappings may not be changed any more.
    pub sealed: bool,
    /// Its protection key (pkeys(7)) with its protection; the key 0 is everybody's.
    pub key: Option<(i32, i32)>,
}

/// Whether `advice` (`MADV_*`) is one of those that are carried: others do things.
pub(super) fn is_carried(advice: i32) -> bool {
    ADVICE.iter().any(|(_, known)| *known == advice)
}

/// What is asked of the memory of process `pid`, which stands still, but for [`Advice::locks_later`].
fn read(pid: i32) -> Result<Advice, TraceeError> {
    let smaps = read_proc(&format!("/proc/{pid}/smaps"))?;
    let areas = parse(&smaps);
    if let Some(at) = grows_by_itself(&areas) {
        let text = format!(
            "process {pid}: memory at {at:#x} grows by itself (MAP_GROWSDOWN), or is a part of a stack"
        );
        return Err(TraceeError::Unsupported(format!("{text} that mprotect(2) has cut off: map it without")));
    }
    Ok(Advice { parts: parts(&areas), guards: guards(pid, &areas)?, locks_later: 0 })
}

/// Where memory besides the stack grows by itself: neither `/proc/PID/maps` tells it, nor can it be asked for afterwards.
fn grows_by_itself(areas: &[Area<'_>]) -> Option<u64> {
    areas.iter().find(|area| area.has(GROWS_DOWN) && !area.stack).map(|area| area.start)
}

/// Completes what was read of the process behind `leader`: what is mapped later shows in what is mapped now.
pub fn complete(leader: &mut Remote, mut advice: Advice) -> Result<Advice, TraceeError> {
    if advice.parts.iter().any(|part| part.locked.is_some()) {
        let fresh = leader.scratch_at();
        let smaps = read_proc(&format!("/proc/{}/smaps", leader.tid()))?;
        let areas = parse(&smaps);
        let of_fresh = areas.iter().find(|area| area.start <= fresh && fresh < area.end);
        advice.locks_later = of_fresh.map_or(0, |area| match (area.has(LOCKED), area.has(LOCKED_ON_FAULT)) {
            (true, true) => MCL_FUTURE | MCL_ONFAULT,
            (true, false) => MCL_FUTURE,
            (false, _) => 0,
        });
    }
    Ok(advice)
}

/// Reads what is asked of the memory of processes beside whatever else is done: `/proc/PID/smaps` takes the kernel longer than
/// all other files of `/proc` together, and longer still for more memory.
#[derive(Debug)]
pub struct Reader {
    pids: Sender<i32>,
    workers: Vec<JoinHandle<Vec<Answer>>>,
}

/// What is asked of the memory of a process, or why it could not be read.
type Answer = (i32, Result<Advice, TraceeError>);

impl Reader {
    /// With a thread for each processor but the one that goes on with other things.
    pub fn start() -> Self {
        let (pids, asked) = mpsc::channel();
        let asked = Arc::new(Mutex::new(asked));
        let next = |asked: &Mutex<Receiver<i32>>| asked.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let number = thread::available_parallelism().map_or(1, NonZero::get).saturating_sub(1).max(1);
        let workers = (0..number).map(|_| {
            let asked = Arc::clone(&asked);
            thread::spawn(move || {
                let mut found = Vec::new();
                while let Ok(pid) = next(&asked) {
                    found.push((pid, read(pid)));
                }
                found
            })
        });
        Self { pids, workers: workers.collect() }
    }

    /// Has that of a process read, by its pid, when every thread of it stands still.
    pub fn asker(&self) -> impl Fn(i32) + Send + Sync + use<> {
        let pids = self.pids.clone();
        move |pid| {
            // If the threads have all panicked there is none, which is found at the end.
            let _ = pids.send(pid);
        }
    }

    /// All that was asked for, by pid. Waits until nobody can ask any more.
    pub fn finish(self) -> BTreeMap<i32, Result<Advice, TraceeError>> {
        drop(self.pids);
        self.workers.into_iter().flat_map(|worker| worker.join().unwrap_or_default()).collect()
    }
}

/// The guard pages; none on a kernel that has no such thing (before Linux 6.13; before 6.15 they can't be seen).
fn guards(pid: i32, areas: &[Area<'_>]) -> Result<Vec<Range<u64>>, TraceeError> {
    let tells = areas.iter().any(|area| area.has(MAY_GUARD));
    let mut may_have = areas.iter().filter(|area| !area.kernels_own && (!tells || area.has(MAY_GUARD)));
    let Some(first) = may_have.next() else { return Ok(Vec::new()) };
    let end = may_have.next_back().unwrap_or(first).end;
    let mut pagemap = Pagemap::open(pid).map_err(TraceeError::call("opening the page map", pid))?;
    let mut regions = Vec::new();
    let query = Query { all_of: category::GUARD, report: category::GUARD, ..Query::default() };
    // One scan: a call for each of hundreds of mappings takes longer than passing over what lies between them.
    match pagemap.scan(first.start, end, query, &mut regions) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(Vec::new()),
        scanned => scanned.map_err(TraceeError::call("PAGEMAP_SCAN for guard pages", pid))?,
    }
    Ok(regions.into_iter().map(|region| region.start..region.end).collect())
}

/// Asks the same of the memory of a stub, whose contents are complete.
pub fn restore(leader: &mut Remote, advice: &Advice) -> Result<(), TraceeError> {
    restore_keys(leader, advice)?;
    let mut batch = leader.batch();
    for part in &advice.parts {
        for &what in &part.advice {
            let args = [part.start.into(), (part.end - part.start).into(), what.into()];
            batch.call("madvise", libc::SYS_madvise, &args)?;
        }
    }
    // Not possible any more where memory is locked.
    for Range { start, end } in &advice.guards {
        let args = [(*start).into(), (end - start).into(), MADV_GUARD_INSTALL.into()];
        batch.call("madvise(MADV_GUARD_INSTALL)", libc::SYS_madvise, &args)?;
    }
    batch.run()?;
    for part in &advice.parts {
        part.locked.map_or(Ok(()), |flags| lock(leader, part, flags))?;
    }
    for part in advice.parts.iter().filter(|part| part.sealed) {
        leader.call("mseal", SYS_MSEAL, [part.start, part.end - part.start, 0, 0, 0, 0])?;
    }
    match advice.locks_later {
        0 => Ok(()),
        flags => leader.call("mlockall", libc::SYS_mlockall, [flags, 0, 0, 0, 0, 0]).map(drop),
    }
}

fn lock(leader: &mut Remote, part: &Part, flags: u64) -> Result<(), TraceeError> {
    let len = part.end - part.start;
    let before = locked_kib(leader.tid())?;
    match leader.call("mlock2", libc::SYS_mlock2, [part.start, len, flags, 0, 0, 0]) {
        // It is locked, but not all of it can be there: nobody may touch it.
        Err(TraceeError::Remote { source, .. })
            if source.raw_os_error() == Some(libc::ENOMEM)
                && locked_kib(leader.tid())? == before + len / 1024 =>
        {
            Ok(())
        }
        locked => locked.map(drop),
    }
}

fn locked_kib(pid: i32) -> Result<u64, TraceeError> {
    Ok(Status::read(pid)?.number("VmLck:").unwrap_or(0))
}

/// Gives parts their protection keys. What the threads may do with those comes with the rest of their registers.
fn restore_keys(leader: &mut Remote, advice: &Advice) -> Result<(), TraceeError> {
    let wanted: BTreeSet<i32> = advice.parts.iter().filter_map(|part| Some(part.key?.0)).collect();
    let Some(last) = wanted.last() else { return Ok(()) };
    let mut unwanted = Vec::new();
    loop {
        // The kernel gives the lowest one that is free.
        let key = leader.call("pkey_alloc", libc::SYS_pkey_alloc, [0; 6])? as i32;
        if !wanted.contains(&key) {
            unwanted.push(key);
        }
        if key >= *last {
            break;
        }
    }
    for part in &advice.parts {
        let Some((key, protection)) = part.key else { continue };
        let args = [part.start, part.end - part.start, protection as u64, key as u64, 0, 0];
        leader.call("pkey_mprotect", libc::SYS_pkey_mprotect, args)?;
    }
    for key in unwanted {
        leader.call("pkey_free", libc::SYS_pkey_free, [key as u64, 0, 0, 0, 0, 0])?;
    }
    Ok(())
}

/// What huge pages process `pid`, whose mappings these are, has, of those that are set aside, that can't be made again.
pub fn unusual_huge_pages(pid: i32, mappings: &[Mapping]) -> Result<Vec<&'static str>, TraceeError> {
    let smaps = read_proc(&format!("/proc/{pid}/smaps"))?;
    let areas = parse(&smaps);
    let huge: Vec<_> = areas.iter().filter(|area| area.page_kib > 4).collect();
    let mut found = Vec::new();
    if huge.iter().any(|area| area.page_kib * 1024 != USUAL_HUGE_PAGE) {
        found.push("huge pages of another size than 2 MiB");
    }
    let mut segments = mappings.iter().filter(|mapping| mapping.is_sysv());
    if segments.any(|segment| huge.iter().any(|area| area.start == segment.start)) {
        found.push("a SysV segment in huge pages");
    }
    Ok(found)
}

/// Where memory of process `pid` is to come from, if that isn't left to the kernel (set_mempolicy(2)).
pub fn memory_policy(pid: i32) -> Option<String> {
    // Without NUMA there is no such file.
    let maps = std::fs::read_to_string(format!("/proc/{pid}/numa_maps")).ok()?;
    maps.lines()
        .filter_map(|line| line.split(' ').nth(1))
        .find(|policy| *policy != "default")
        .map(str::to_owned)
}

/// A mapping as `/proc/PID/smaps` tells it.
struct Area<'a> {
    start: u64,
    end: u64,
    kernels_own: bool,
    stack: bool,
    flags: &'a str,
    protection: i32,
    key: i32,
    page_kib: u64,
}

impl Area<'_> {
    fn has(&self, flag: &str) -> bool {
        self.flags.split_whitespace().any(|word| word == flag)
    }

    fn part(&self) -> Part {
        let advice = ADVICE.iter().filter(|(flag, _)| self.has(flag)).map(|(_, advice)| *advice).collect();
        let on_fault = if self.has(LOCKED_ON_FAULT) { MLOCK_ONFAULT } else { 0 };
        Part {
            start: self.start,
            end: self.end,
            advice,
            locked: self.has(LOCKED).then_some(on_fault),
            sealed: self.has(SEALED),
            key: (self.key != 0).then_some((self.key, self.protection)),
        }
    }
}

fn parts(areas: &[Area<'_>]) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    // What may only be executed gets a key from the kernel itself, which gives it to nothing else, and gives one again at the
    // destination (execute_only_pkey() of arch/x86/mm/pkeys.c); it can't be asked for.
    let has_others = |key| areas.iter().any(|area| area.key == key && area.protection != libc::PROT_EXEC);
    for area in areas.iter().filter(|area| !area.kernels_own) {
        let mut part = area.part();
        if area.protection == libc::PROT_EXEC && !has_others(area.key) {
            part.key = None;
        }
        let alike = |last: &&mut Part| {
            last.end == part.start
                && (&last.advice, last.locked, last.sealed, last.key)
                    == (&part.advice, part.locked, part.sealed, part.key)
        };
        match parts.last_mut().filter(alike) {
            Some(last) => last.end = part.end,
            None => parts.push(part),
        }
    }
    parts
        .retain(|part| !part.advice.is_empty() || part.locked.is_some() || part.sealed || part.key.is_some());
    parts
}

fn parse(smaps: &str) -> Vec<Area<'_>> {
    let mut areas: Vec<Area<'_>> = Vec::new();
    for line in smaps.lines() {
        // Two dozen lines follow each first one, and few are of interest.
        if line.starts_with(|first: char| first.is_ascii_uppercase()) {
            let Some(area) = areas.last_mut() else { continue };
            let number =
                |value: &str| value.split_whitespace().next().and_then(|word| word.parse::<u64>().ok());
            if let Some(value) = line.strip_prefix("VmFlags:") {
                area.flags = value;
            } else if let Some(value) = line.strip_prefix("ProtectionKey:") {
                area.key = number(value).unwrap_or(0) as i32;
            } else if let Some(value) = line.strip_prefix("KernelPageSize:") {
                area.page_kib = number(value).unwrap_or(0);
            }
            continue;
        }
        areas.extend(parse_head(line));
    }
    areas
}

/// The first line of a mapping, which is as in `/proc/PID/maps`.
fn parse_head(line: &str) -> Option<Area<'_>> {
    let mapping = layout::parse_line(line)?;
    Some(Area {
        start: mapping.start,
        end: mapping.end,
        kernels_own: mapping.is_kernels_own(),
        stack: mapping.name == "[stack]",
        flags: "",
        protection: mapping.protection,
        key: 0,
        page_kib: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SMAPS: &str = "\
55d0a0000000-55d0a0001000 rw-p 00000000 00:00 0                          [heap]
Size:                  4 kB
VmFlags: rd wr mr mw me ac
7f0000000000-7f0000002000 rw-p 00000000 00:00 0
VmFlags: rd wr mr mw me dc lo lf ac
7f0000002000-7f0000003000 ---p 00000000 00:00 0
VmFlags: mr mw me dc lo lf ac
7f0000003000-7f0000004000 rw-p 00000000 00:00 0
ProtectionKey:         2
VmFlags: rd wr mr mw me hg sl
7f0000005000-7f0000006000 --xp 00000000 00:00 0
ProtectionKey:         1
VmFlags: ex mr mw me
7f0000007000-7f0000008000 --xp 00000000 00:00 0
ProtectionKey:         2
VmFlags: ex mr mw me
7ffc00000000-7ffc00002000 r-xp 00000000 00:00 0                          [vdso]
VmFlags: rd ex mr mw me de
";

    #[test]
    fn neighbours_of_which_the_same_is_asked_are_one_part() {
        let found = parts(&parse(SMAPS));
        // What the kernel itself gave a key to, as it may only be executed, needs nothing.
        assert_eq!(found.len(), 3, "{found:?}");
        assert_eq!((found[0].start, found[0].end), (0x7f00_0000_0000, 0x7f00_0000_3000));
        assert_eq!(
            (&found[0].advice[..], found[0].locked),
            (&[libc::MADV_DONTFORK][..], Some(MLOCK_ONFAULT))
        );
        assert_eq!((&found[1].advice[..], found[1].sealed), (&[libc::MADV_HUGEPAGE][..], true));
        assert_eq!(found[1].key, Some((2, libc::PROT_READ | libc::PROT_WRITE)));
        assert_eq!((found[2].start, found[2].key), (0x7f00_0000_7000, Some((2, libc::PROT_EXEC))));
    }

    #[test]
    fn only_the_stack_may_grow_by_itself() {
        let smaps = "7f0000000000-7f0000002000 rw-p 00000000 00:00 0\nVmFlags: rd wr mr mw me gd ac\n\
                     7ffc00000000-7ffc00002000 rw-p 00000000 00:00 0          [stack]\nVmFlags: rd wr mr gd ac\n";
        assert_eq!(grows_by_itself(&parse(smaps)), Some(0x7f00_0000_0000));
        assert_eq!(grows_by_itself(&parse(&smaps.replacen(" gd", "", 1))), None);
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in ".{0,200}") {
            parts(&parse(&text));
        }
    }
}
