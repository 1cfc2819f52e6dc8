//! What of an instance can't be carried to another host, found without touching it.

use std::{
    fs,
    io::{self, Read as _},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use super::{
    TraceeError, advice,
    capture::{OTHER_EXIT_SIGNAL, Status, link},
    cgroups,
    descriptors::{self, Around},
    files::{self, Place, Places},
    image::{Descriptor, DescriptorKind, SocketState},
    layout::{self, Mapping},
    mounts,
    needs::{self, Case},
    remote::Remote,
    sysv, tables, tree,
};
use crate::{
    instance::{
        Instance,
        network::settings::{self, Settings},
    },
    profile::doctor,
    sys::process::{Common, has_in_common},
};

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// The migration is refused.
    Refused,
    /// It goes ahead, and this is lost.
    Lost,
}

/// One thing that isn't carried.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Which process, in the agent's PID namespace.
    pub pid: i32,
    /// What: a descriptor, a mapping, an attribute.
    pub item: String,
    /// Why not, and what would make it possible.
    pub reason: String,
    /// How much it matters.
    pub severity: Severity,
}

/// Looks at an instance that changes all the time, before what was found is taken as it is.
const LOOKS: usize = 5;
/// Between two looks.
const NAP: Duration = Duration::from_millis(2);

/// Everything of `instance` that a migration does not carry; nothing with [`Severity::Refused`] means that
/// it can migrate.
///
/// The program goes on meanwhile, and may close and remove what is being looked at: what stands against a migration has to
/// be found twice in a row.
pub fn check(instance: &Instance, places: &Places) -> Result<Vec<Finding>, TraceeError> {
    let mut before: Option<Vec<Finding>> = None;
    for _ in 1..LOOKS {
        let found = look(instance, places)?;
        let refused = found.iter().filter(|finding| finding.severity == Severity::Refused);
        let refused: Vec<Finding> = refused.cloned().collect();
        if refused.is_empty() || before.as_ref() == Some(&refused) {
            return Ok(found);
        }
        before = Some(refused);
        std::thread::sleep(NAP);
    }
    look(instance, places)
}

fn look(instance: &Instance, places: &Places) -> Result<Vec<Finding>, TraceeError> {
    let mut findings = Findings { pid: 0, init: instance.init_pid, list: Vec::new() };
    if instance.init_pid.is_none() {
        findings.refuse(
            "no PID namespace of its own",
            "start it with `rswap run`: an adopted instance stays here",
        );
    }
    let listed = tree::listed(instance)?;
    if listed.is_empty() {
        findings.refuse("no process", "it has ended");
    }
    let case = Case { own_address: instance.network.is_some(), ..Case::default() };
    for (item, reason) in needs::lacking(&doctor::migration_features(), case) {
        findings.refuse(&item, &reason);
    }
    whole_tree(&mut findings, instance, &listed)?;
    let around = Around::of(&listed);
    let mut open: Vec<(i32, Vec<Descriptor>)> = Vec::new();
    for &pid in &listed {
        findings.pid = pid;
        match process(&mut findings, &around, places) {
            Ok(tables) => open.extend(tables),
            Err(_) if tree::has_ended(pid) => {}
            Err(error) => return Err(error),
        }
    }
    let lists: Vec<_> = open.iter().map(|(pid, list)| (*pid, list.as_slice())).collect();
    for (pid, refused) in descriptors::connected_outside(&lists, false) {
        findings.pid = pid;
        findings.refuse(&format!("descriptor {}: {}", refused.fd, refused.what), refused.remedy);
    }
    for (pid, refused) in files::left_behind(&lists, places) {
        findings.pid = pid;
        findings.refuse(&format!("descriptor {}: {}", refused.fd, refused.what), refused.remedy);
    }
    findings.pid = listed.first().copied().unwrap_or_default();
    for path in files::logs(&lists, places) {
        let reason = "what was written stays on this host, and a new file is begun at the other one";
        findings.add(&format!("the log {path}"), reason, Severity::Lost);
    }
    Ok(findings.list)
}

/// What the processes are to each other.
fn whole_tree(findings: &mut Findings, instance: &Instance, listed: &[i32]) -> Result<(), TraceeError> {
    if let Ok(Some(what)) = cgroups::obstacle(&instance.cgroup) {
        findings.refuse("a cgroup of its own making", &what);
    }
    if instance.init_pid.is_none() {
        return Ok(());
    }
    if let (Some(init), Some(identity)) = (instance.init_pid, &instance.network) {
        let changes = Settings::of(init, identity).and_then(|settings| settings.changes());
        let failed = TraceeError::call("comparing the network namespace", init);
        let changes = changes.map_err(|error| failed(io::Error::other(error)))?;
        for item in &changes.others {
            findings.refuse(&format!("network namespace: {item}"), settings::REMEDY);
        }
    }
    if instance.init_pid.is_some_and(|init| sysv::has_posix_queues(init).unwrap_or(false)) {
        findings
            .refuse("POSIX message queues", "they aren't carried in this version: remove them (mq_unlink)");
    }
    let survey = mounts::survey(instance)?;
    for refused in &survey.refused {
        findings.refuse(&refused.item(), refused.reason);
    }
    for &pid in listed.iter().filter(|_| !survey.mounts.is_empty()) {
        let Some(init) = instance.init_pid else { continue };
        let covered = match layout::read_mappings(pid) {
            Err(_) if tree::has_ended(pid) => continue,
            mappings => mounts::covered(init, pid, &mappings?, &survey.mounts),
        };
        findings.pid = pid;
        for item in covered.or_else(|error| if tree::has_ended(pid) { Ok(Vec::new()) } else { Err(error) })? {
            findings.refuse(&item, mounts::HIDDEN);
        }
    }
    let members = tree::members(instance)?;
    for &pid in listed.iter().filter(|&&pid| members.iter().all(|member| member.pid != pid)) {
        // One that was made since the walk is no stranger.
        if fs::metadata(format!("/proc/{pid}")).is_ok()
            && tree::members(instance)?.iter().all(|m| m.pid != pid)
        {
            findings.pid = pid;
            findings.refuse("a process from outside", "it was put into the instance's cgroup: take it out");
        }
    }
    for (pid, reason) in tree::obstacles(&members) {
        findings.pid = pid;
        findings.refuse(&reason, "not carried in this version: restart what left it behind");
    }
    let living: Vec<_> = members.into_iter().filter(|member| member.node.status.is_none()).collect();
    for (pid, item) in tables::obstacles(&living)? {
        findings.pid = pid;
        findings.refuse(&item, tables::REMEDY);
    }
    Ok(())
}

/// Refuses an instance that can't migrate, with everything that stands against it.
pub fn require(instance: &Instance, places: &Places) -> Result<(), TraceeError> {
    let findings = check(instance, places)?;
    let refused: Vec<String> = findings
        .iter()
        .filter(|finding| finding.severity == Severity::Refused)
        .map(|finding| format!("pid {}: {}: {}", finding.pid, finding.item, finding.reason))
        .collect();
    if refused.is_empty() {
        return Ok(());
    }
    let text = format!("{} can't migrate: {}", instance.name, refused.join("; "));
    Err(TraceeError::Unsupported(text))
}

struct Findings {
    pid: i32,
    /// The instance's init.
    init: Option<i32>,
    list: Vec<Finding>,
}

impl Findings {
    fn refuse(&mut self, item: &str, reason: &str) {
        self.add(item, reason, Severity::Refused);
    }

    fn add(&mut self, item: &str, reason: &str, severity: Severity) {
        let (item, reason) = (item.to_owned(), reason.to_owned());
        self.list.push(Finding { pid: self.pid, item, reason, severity });
    }
}

/// Looks at one process, and returns its tables of descriptors with who has each.
fn process(
    findings: &mut Findings,
    around: &Around,
    places: &Places,
) -> Result<Vec<(i32, Vec<Descriptor>)>, TraceeError> {
    let pid = findings.pid;
    if tree::has_lost_its_leader(pid) {
        findings.refuse(
            "a first thread that has ended while others go on",
            "not carried in this version: restart it",
        );
        return Ok(Vec::new());
    }
    let (own, init) = (Some(std::process::id() as i32), findings.init);
    let status = Status::read(pid)?;
    if status.number("TracerPid:").unwrap_or(0) != 0 {
        findings.refuse("a debugger", "it is traced: detach the tracer");
    }
    if status.radix("SigIgn:", 16).unwrap_or(0) >> (libc::SIGTRAP - 1) & 1 == 1 {
        let reason = "the kernel forgets that SIGTRAP is ignored when a process is looked into: let it have its default";
        findings.refuse("SIGTRAP ignored", reason);
    }
    if status.number("Seccomp:").unwrap_or(0) != 0 && !can_suspend_seccomp() {
        let reason = "it can't be lifted for a moment: run the agent without seccomp, on a kernel with \
                      CONFIG_CHECKPOINT_RESTORE";
        findings.refuse("seccomp", reason);
    }
    if !status.text("x86_Thread_features:").is_empty() {
        findings.refuse("a shadow stack", "it isn't carried in this version: start the program without it");
    }
    if !matches!(status.text("untag_mask:"), "" | "0xffffffffffffffff") {
        let reason = "not carried in this version: start the program without it";
        findings.refuse("addresses with tags (ARCH_ENABLE_TAGGED_ADDR)", reason);
    }
    if tree::exit_signal(pid)? != libc::SIGCHLD && !tree::has_ended(pid) {
        findings.refuse(OTHER_EXIT_SIGNAL, "not carried in this version: let it be made by fork(2)");
    }
    if is_32_bit(pid) {
        findings.refuse("a 32-bit program", "not carried: run its 64-bit build");
    } else if let Err(error) = way_back(pid) {
        findings.refuse("no way back from a call", &error.to_string());
    }
    if link(pid, "exe")?.ends_with(" (deleted)") {
        findings.refuse("a deleted program file", "restart it: its program was replaced on disk");
    }
    for (namespace, of, as_its) in [
        ("user", own, "user"),
        ("cgroup", own, "cgroup"),
        ("uts", init, "uts"),
        ("ipc", init, "ipc"),
        ("net", init, "net"),
        ("mnt", init, "mnt"),
        ("pid", init, "pid"),
        // An instance that has arrived has one that its init is not in.
        ("time", init, "time_for_children"),
    ] {
        let name = format!("ns/{namespace}");
        // An instance that was adopted has no init, and is refused for that.
        if of.is_some_and(|of| {
            link(of, &format!("ns/{as_its}"))
                .is_ok_and(|its| link(pid, &name).is_ok_and(|theirs| its != theirs))
        }) {
            findings.refuse(&format!("a {namespace} namespace of its own"), "not carried in this version");
        }
    }
    // An init has one thread and undoes nothing: its list is none.
    if init.is_some_and(|init| {
        sysv::has_semaphores(init).unwrap_or(false)
            && !has_in_common(pid, init, Common::SemaphoreUndo).unwrap_or(true)
    }) {
        let reason = "what the end of a process takes back (SEM_UNDO) can't be read: end those that use the semaphores";
        findings.refuse("SysV semaphores with a list of undo operations, or several threads", reason);
    }
    memory(findings, places)?;
    let mut open = Vec::new();
    for holder in tables::holders(pid, Common::Descriptors)? {
        let (descriptors, refused) = descriptors::describe(holder, around, false)?;
        for refused in refused {
            findings.refuse(&format!("descriptor {}: {}", refused.fd, refused.what), refused.remedy);
        }
        open.push((holder, descriptors));
    }
    for descriptor in open.iter().flat_map(|(_, descriptors)| descriptors) {
        if let DescriptorKind::Socket(socket) = &descriptor.kind
            && socket.state == SocketState::Disconnected
        {
            let item = format!("descriptor {}: a TCP connection", descriptor.numbers[0].0);
            let reason = "its address is the host's, which stays here: the peer is told, and connects again; start the \
                          instance with --net to keep its connections";
            findings.add(&item, reason, Severity::Lost);
        }
    }
    Ok(open)
}

/// Whether a thread of it would survive an agent that is killed in a call made in it.
fn way_back(pid: i32) -> Result<(), TraceeError> {
    const LOOKS: usize = 3;
    const NAP: Duration = Duration::from_millis(10);
    // The program is mapped bit by bit, and each bit may have to come from a slow disk.
    const LONGEST_EXECVE: Duration = Duration::from_secs(5);
    let started = Instant::now();
    for look in 1.. {
        match Remote::prepare(pid) {
            Err(_) if tree::has_ended(pid) => break,
            Err(error) => {
                let is_beginning = tree::is_in_execve(pid) && started.elapsed() < LONGEST_EXECVE;
                if look >= LOOKS && !is_beginning {
                    return Err(error);
                }
            }
            Ok(_) => break,
        }
        std::thread::sleep(NAP);
    }
    Ok(())
}

/// Whether the program's file is an ELF file of the class for 32 bits (`EI_CLASS`, elf(5)).
fn is_32_bit(pid: i32) -> bool {
    const BEGINNING: &[u8] = b"\x7fELF\x01";
    let mut read = [0; BEGINNING.len()];
    let file = fs::File::open(format!("/proc/{pid}/exe"));
    file.and_then(|mut file| file.read_exact(&mut read)).is_ok_and(|()| read == BEGINNING)
}

/// Whether `PTRACE_O_SUSPEND_SECCOMP` is there for us. The kernel has it together with this file.
fn can_suspend_seccomp() -> bool {
    let own = Status::read(std::process::id() as i32);
    own.is_ok_and(|status| status.number("Seccomp:") == Some(0)) && fs::metadata("/proc/self/timers").is_ok()
}

fn memory(findings: &mut Findings, places: &Places) -> Result<(), TraceeError> {
    if let Some(policy) = advice::memory_policy(findings.pid) {
        let reason =
            "where memory is to come from isn't carried: let the kernel choose (numactl, set_mempolicy)";
        findings.refuse(&format!("memory policy {policy}"), reason);
    }
    let mappings = layout::read_mappings(findings.pid)?;
    let may_be_huge = |mapping: &Mapping| mapping.is_huge() || mapping.is_shared_memory();
    if mappings.iter().any(may_be_huge) {
        for what in advice::unusual_huge_pages(findings.pid, &mappings)? {
            findings.refuse(what, "not carried: use huge pages of 2 MiB, of mmap or memfd_create");
        }
    }
    // A process may have a root of its own, in which the file has another path, or none.
    let root = findings.init.unwrap_or(findings.pid);
    for mapping in mappings {
        let item = format!("mapping {:#x}-{:#x} {}", mapping.start, mapping.end, mapping.name);
        if mapping.is_kernels_own() {
            continue;
        }
        if mapping.is_sysv() && mapping.offset != 0 {
            findings.refuse(&item, "only whole SysV segments are carried: part of this one was unmapped");
        } else if let Some((what, remedy)) = mapping.obstacle() {
            findings.refuse(&format!("{item}: {what}"), remedy);
        } else if mapping.is_object() {
            // Goes along as a whole.
        } else if mapping.shared
            && !mapping.is_read_only_file()
            && places.find(&mapping.name) != Place::Volume
        {
            findings.refuse(&item, "a file that is written through a mapping stays here: put it into a volume (rswap run --volume NAME:PATH)");
        } else if mapping.is_file() && fs::metadata(format!("/proc/{root}/root{}", mapping.name)).is_err() {
            findings.refuse(&item, "its file can't be read under this path");
        }
    }
    Ok(())
}
