//! What of an instance can't be carried to another host, found without touching it.

use std::fs;

use serde::{Deserialize, Serialize};

use super::{
    TraceeError,
    capture::{Status, link},
    descriptors,
    image::{DescriptorKind, SocketState},
    layout, read_proc,
};
use crate::instance::Instance;

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

/// The processes of an instance, without the init that rswap gave it.
pub fn processes(instance: &Instance) -> Result<Vec<i32>, TraceeError> {
    let text = read_proc(&instance.cgroup.join("cgroup.procs").to_string_lossy())?;
    let pids = text.lines().filter_map(|line| line.parse().ok());
    Ok(pids.filter(|pid| Some(*pid) != instance.init_pid).collect())
}

/// Everything of `instance` that a migration does not carry; nothing with [`Severity::Refused`] means that
/// it can migrate.
pub fn check(instance: &Instance) -> Result<Vec<Finding>, TraceeError> {
    let mut findings = Findings { pid: 0, list: Vec::new() };
    if instance.init_pid.is_none() {
        findings.refuse(
            "no PID namespace of its own",
            "start it with `rswap run`: an adopted instance stays here",
        );
    }
    let pids = processes(instance)?;
    match pids.as_slice() {
        [] => findings.refuse("no process", "it has ended"),
        [_] => {}
        more => {
            let item = format!("{} processes: {more:?}", more.len());
            findings.refuse(&item, "only instances of one process are carried in this version");
        }
    }
    for pid in pids {
        findings.pid = pid;
        process(&mut findings)?;
    }
    Ok(findings.list)
}

/// Refuses an instance that can't migrate, with everything that stands against it.
pub fn require(instance: &Instance) -> Result<(), TraceeError> {
    let findings = check(instance)?;
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

fn process(findings: &mut Findings) -> Result<(), TraceeError> {
    let pid = findings.pid;
    let status = Status::read(pid)?;
    if status.number("TracerPid:").unwrap_or(0) != 0 {
        findings.refuse("a debugger", "it is traced: detach the tracer");
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
    for namespace in ["user", "uts", "ipc", "cgroup", "time"] {
        let theirs = link(pid, &format!("ns/{namespace}"))?;
        if theirs != link(std::process::id() as i32, &format!("ns/{namespace}"))? {
            findings.refuse(&format!("a {namespace} namespace of its own"), "not carried in this version");
        }
    }
    memory(findings)?;
    let (open, refused) = descriptors::describe(pid)?;
    for refused in refused {
        findings.refuse(&format!("descriptor {}: {}", refused.fd, refused.what), refused.remedy);
    }
    for descriptor in open {
        if let DescriptorKind::Socket(socket) = &descriptor.kind
            && socket.state == SocketState::Disconnected
        {
            let item = format!("descriptor {}: a TCP connection", descriptor.numbers[0].0);
            let reason = "its address is the host's, which stays here: the peer is told, and connects again; start the \
                          instance with --net to keep its connections";
            findings.add(&item, reason, Severity::Lost);
        }
    }
    Ok(())
}

fn memory(findings: &mut Findings) -> Result<(), TraceeError> {
    for mapping in layout::read_mappings(findings.pid)? {
        let item = format!("mapping {:#x}-{:#x} {}", mapping.start, mapping.end, mapping.name);
        if mapping.is_kernels_own() {
            continue;
        }
        if mapping.shared && !mapping.is_read_only_file() {
            findings.refuse(&item, "shared memory isn't carried in this version");
        } else if mapping.is_file() && mapping.name.ends_with(" (deleted)") {
            findings.refuse(&item, "its file was deleted: restart the program");
        } else if mapping.is_file() && fs::metadata(&mapping.name).is_err() {
            findings.refuse(&item, "its file can't be read under this path");
        }
    }
    Ok(())
}
