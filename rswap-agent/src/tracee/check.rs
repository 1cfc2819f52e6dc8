//! What of an instance can't be carried to another host, found without touching it.

use std::fs;

use serde::{Deserialize, Serialize};

use super::{
    TraceeError,
    capture::{Status, link},
    descriptors,
    files::{self, Place, Places},
    image::{Descriptor, DescriptorKind, SocketState},
    layout, read_proc, tree,
    unix::Peers,
};
use crate::{
    instance::Instance,
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

/// Everything of `instance` that a migration does not carry; nothing with [`Severity::Refused`] means that
/// it can migrate.
pub fn check(instance: &Instance, places: &Places) -> Result<Vec<Finding>, TraceeError> {
    let mut findings = Findings { pid: 0, list: Vec::new() };
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
    whole_tree(&mut findings, instance, &listed)?;
    let peers = Peers::of_process(listed.first().copied().unwrap_or_default());
    let mut open = Vec::new();
    for &pid in &listed {
        findings.pid = pid;
        match process(&mut findings, &peers, places) {
            Ok(descriptors) => open.push((pid, descriptors)),
            Err(_) if tree::has_ended(pid) => {}
            Err(error) => return Err(error),
        }
    }
    let lists: Vec<_> = open.iter().map(|(pid, list)| (*pid, list.as_slice())).collect();
    for (pid, refused) in descriptors::connected_outside(&lists) {
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
    let below = fs::read_dir(&instance.cgroup).into_iter().flatten().flatten();
    for entry in below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        let item = format!("a cgroup of its own making, {}", entry.file_name().to_string_lossy());
        findings.refuse(&item, "cgroups below the instance's aren't carried in this version");
    }
    if instance.init_pid.is_none() {
        return Ok(());
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
    let living: Vec<i32> = members.iter().filter(|m| m.node.status.is_none()).map(|m| m.pid).collect();
    for (at, &pid) in living.iter().enumerate() {
        for &other in &living[..at] {
            // Memory in common with its parent has every process for a moment, between vfork and execve.
            for what in [Common::Descriptors, Common::Directories] {
                // One that has ended meanwhile has nothing in common with anybody.
                if has_in_common(pid, other, what).unwrap_or(false) {
                    findings.pid = pid;
                    let item = format!("{what:?} in common with process {other}").to_lowercase();
                    findings.refuse(
                        &item,
                        "what clone(2) shares between processes isn't carried in this version",
                    );
                }
            }
        }
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

/// Looks at one process, and returns its descriptors.
fn process(findings: &mut Findings, peers: &Peers, places: &Places) -> Result<Vec<Descriptor>, TraceeError> {
    let pid = findings.pid;
    if tree::has_lost_its_leader(pid) {
        findings.refuse(
            "a first thread that has ended while others go on",
            "not carried in this version: restart it",
        );
        return Ok(Vec::new());
    }
    let status = Status::read(pid)?;
    if status.number("TracerPid:").unwrap_or(0) != 0 {
        findings.refuse("a debugger", "it is traced: detach the tracer");
    }
    if status.text("State:").starts_with('T') {
        findings.refuse("stopped by a signal", "not carried in this version: let it go on (SIGCONT) first");
    }
    if status.number("Seccomp:").unwrap_or(0) != 0 {
        findings.refuse("a seccomp filter", "filters aren't carried in this version");
    }
    if status.number("VmLck:").unwrap_or(0) != 0 {
        findings.refuse("locked memory", "mlock isn't carried in this version");
    }
    if status.credentials().capabilities[4] != 0 {
        findings.refuse("ambient capabilities", "they aren't carried in this version");
    }
    if !read_proc(&format!("/proc/{pid}/timers"))?.is_empty() {
        findings.refuse("POSIX timers", "timer_create isn't carried in this version");
    }
    if link(pid, "root")? != "/" {
        findings.refuse("a root directory of its own", "chroot isn't carried in this version");
    }
    if link(pid, "exe")?.ends_with(" (deleted)") {
        findings.refuse("a deleted program file", "restart it: its program was replaced on disk");
    }
    for namespace in ["user", "uts", "ipc", "cgroup"] {
        let theirs = link(pid, &format!("ns/{namespace}"))?;
        if theirs != link(std::process::id() as i32, &format!("ns/{namespace}"))? {
            findings.refuse(&format!("a {namespace} namespace of its own"), "not carried in this version");
        }
    }
    memory(findings, places)?;
    let (open, refused) = descriptors::describe(pid, peers, false)?;
    for refused in refused {
        findings.refuse(&format!("descriptor {}: {}", refused.fd, refused.what), refused.remedy);
    }
    for descriptor in &open {
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

fn memory(findings: &mut Findings, places: &Places) -> Result<(), TraceeError> {
    for mapping in layout::read_mappings(findings.pid)? {
        let item = format!("mapping {:#x}-{:#x} {}", mapping.start, mapping.end, mapping.name);
        if mapping.is_kernels_own() {
            continue;
        }
        if mapping.is_shared_memory() && mapping.name.starts_with("/SYSV") {
            findings.refuse(&item, "SysV shared memory isn't carried in this version");
        } else if mapping.is_shared_memory() {
            // Whole objects are carried.
        } else if mapping.shared && !mapping.is_read_only_file() && places.of(&mapping.name) != Place::Volume
        {
            findings.refuse(&item, "a file that is written through a mapping stays here: put it into a volume (rswap run --volume NAME:PATH)");
        } else if mapping.is_file() && mapping.name.ends_with(" (deleted)") {
            findings.refuse(&item, "its file was deleted: restart the program");
        } else if mapping.is_file()
            && fs::metadata(format!("/proc/{}/root{}", findings.pid, mapping.name)).is_err()
        {
            findings.refuse(&item, "its file can't be read under this path");
        }
    }
    Ok(())
}
