//! The processes of an instance: who is whose child, in which session and group.
//!
//! The tree is walked from the instance's init, not read from the cgroup: zombies are in no cgroup's list.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use serde::{Deserialize, Serialize};

use super::{TraceeError, capture::Status, cgroups, read_proc};
use crate::{
    instance::Instance,
    sys::process::{Common, has_in_common},
};

/// The pid of the instance's init in its namespace.
pub const INIT: i32 = 1;

/// One process's place among the others. All pids are those of the instance's own PID namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Its pid.
    pub pid: i32,
    /// Its parent's; [`INIT`] for the main process and for orphans.
    pub parent: i32,
    /// Its session's; 0 for one outside of the namespace.
    pub session: i32,
    /// Its process group's; 0 for one outside of the namespace.
    pub group: i32,
    /// A zombie's status, as wait(2) has it; `None` while it lives.
    pub status: Option<i32>,
}

/// A process of an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its pid as the agent sees it.
    pub pid: i32,
    /// Its place.
    pub node: Node,
}

/// The processes of `instance` without its init, parents before their children, zombies included. Consistent only
/// while all of them are stopped.
pub fn members(instance: &Instance) -> Result<Vec<Member>, TraceeError> {
    let Some(init) = instance.init_pid else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    let mut next = vec![(init, INIT)];
    let mut seen = BTreeSet::from([init]);
    while let Some((parent, inner_parent)) = next.pop() {
        for pid in children(parent)? {
            if !seen.insert(pid) {
                continue;
            }
            // One that ended and was reaped meanwhile is no member.
            let Ok(node) = read(pid, inner_parent) else { continue };
            next.push((pid, node.pid));
            found.push(Member { pid, node });
        }
    }
    // The order of the walk depends on the kernel's lists; that of the pids does not, and parents stay first.
    Ok(parents_first(found))
}

/// Whether it still runs in its parent's memory, between vfork(2) and execve(2): it has none of its own, and the parent,
/// which can't be stopped before that is over, comes first.
pub fn lends_memory(member: &Member, members: &[Member]) -> bool {
    let parent = members.iter().find(|other| other.node.pid == member.node.parent);
    parent.is_some_and(|parent| has_in_common(member.pid, parent.pid, Common::Memory).unwrap_or(false))
}

/// The living processes of an adopted or started instance, from its cgroup: for what needs no tree.
pub fn listed(instance: &Instance) -> Result<Vec<i32>, TraceeError> {
    let mut pids = Vec::new();
    let below = cgroups::below(&instance.cgroup).unwrap_or_default();
    for cgroup in std::iter::once(&instance.cgroup).chain(&below) {
        match read_proc(&cgroup.join("cgroup.procs").to_string_lossy()) {
            // It was removed since the directories were listed.
            Err(_) if !cgroup.exists() && *cgroup != instance.cgroup => {}
            text => pids.extend(text?.lines().filter_map(|line| line.parse::<i32>().ok())),
        }
    }
    pids.retain(|pid| Some(*pid) != instance.init_pid);
    Ok(pids)
}

fn parents_first(mut members: Vec<Member>) -> Vec<Member> {
    members.sort_by_key(|member| member.node.pid);
    let mut ordered: Vec<Member> = Vec::with_capacity(members.len());
    let mut placed = BTreeSet::from([INIT]);
    while !members.is_empty() {
        let (ready, rest): (Vec<_>, Vec<_>) =
            members.into_iter().partition(|member| placed.contains(&member.node.parent));
        if ready.is_empty() {
            // Children of one that ended during the walk: the next walk finds them elsewhere.
            break;
        }
        placed.extend(ready.iter().map(|member| member.node.pid));
        ordered.extend(ready);
        members = rest;
    }
    ordered
}

/// The children of every thread of `pid`; none if it is gone.
pub(super) fn children(pid: i32) -> Result<Vec<i32>, TraceeError> {
    let mut found = Vec::new();
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return Ok(found) };
    for task in tasks.flatten() {
        let text = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        found.extend(text.split_whitespace().filter_map(|word| word.parse::<i32>().ok()));
    }
    Ok(found)
}

/// The child of `parent` that has pid `inner` in the instance's namespace; both others are as the agent sees them.
pub fn child_with(parent: i32, inner: i32) -> Result<Option<i32>, TraceeError> {
    for pid in children(parent)? {
        if Status::read(pid).is_ok_and(|status| status.last_number("NSpid:") == Some(inner)) {
            return Ok(Some(pid));
        }
    }
    Ok(None)
}

/// The parent of `pid`, as the agent sees it.
pub fn parent(pid: i32) -> Result<i32, TraceeError> {
    let wrong =
        || TraceeError::Proc { path: format!("/proc/{pid}/status"), problem: "no parent in it".into() };
    Status::read(pid)?.last_number("PPid:").ok_or_else(wrong)
}

/// The process group that `pid` is in, as it is numbered in its own PID namespace.
pub fn group(pid: i32) -> Result<i32, TraceeError> {
    let wrong =
        || TraceeError::Proc { path: format!("/proc/{pid}/status"), problem: "no group in it".into() };
    Status::read(pid)?.last_number("NSpgid:").ok_or_else(wrong)
}

/// The session that `pid` is in, as it is numbered in its own PID namespace.
pub fn session(pid: i32) -> Result<i32, TraceeError> {
    let wrong =
        || TraceeError::Proc { path: format!("/proc/{pid}/status"), problem: "no session in it".into() };
    Status::read(pid)?.last_number("NSsid:").ok_or_else(wrong)
}

fn read(pid: i32, parent: i32) -> Result<Node, TraceeError> {
    let status = Status::read(pid)?;
    let wrong = || TraceeError::Proc { path: format!("/proc/{pid}/status"), problem: "no pids in it".into() };
    let inner = |name: &str| status.last_number(name).ok_or_else(wrong);
    // A first thread that ends before the others looks like a zombie, too.
    let zombie = status.text("State:").starts_with('Z') && !has_further_threads(&status);
    Ok(Node {
        pid: inner("NSpid:")?,
        parent,
        session: inner("NSsid:")?,
        group: inner("NSpgid:")?,
        status: if zombie { Some(exit_status(pid)?) } else { None },
    })
}

fn has_further_threads(status: &Status) -> bool {
    status.number("Threads:").unwrap_or(0) > 1
}

/// Whether its first thread has ended, and others go on.
pub fn has_lost_its_leader(pid: i32) -> bool {
    Status::read(pid)
        .is_ok_and(|status| status.text("State:").starts_with('Z') && has_further_threads(&status))
        && !has_ended(pid)
}

/// Whether the process has ended meanwhile: every thread has given up the memory, or is gone.
pub fn has_ended(pid: i32) -> bool {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return true };
    threads.flatten().all(|thread| {
        // A thread gives up the memory first, and becomes a zombie a little later.
        fs::read_to_string(thread.path().join("maps")).map_or(true, |maps| maps.is_empty())
    })
}

/// Whether the process is about to become another program: its memory is the new one's, and incomplete.
pub fn is_in_execve(pid: i32) -> bool {
    let call = fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
    let number = call.split(' ').next().and_then(|number| number.parse().ok());
    number.is_some_and(|number: i64| number == libc::SYS_execve || number == libc::SYS_execveat)
}

/// Whether a thread has ended, though its process may go on.
pub fn has_thread_ended(tid: i32) -> bool {
    Status::read(tid).map_or(true, |status| status.text("State:").starts_with(['Z', 'X']))
}

/// The thread that traces `pid`, if any.
pub fn tracer(pid: i32) -> Option<i32> {
    let status = Status::read(pid).ok()?;
    status.text("TracerPid:").trim().parse().ok().filter(|tracer| *tracer != 0)
}

/// How it ended.
fn exit_status(pid: i32) -> Result<i32, TraceeError> {
    stat_field(pid, 52)
}

/// By which signal its parent will be told of its end; only clone(2) can choose another than SIGCHLD, and execve(2) takes that back.
pub fn exit_signal(pid: i32) -> Result<i32, TraceeError> {
    stat_field(pid, 38)
}

/// A field of `/proc/PID/stat` behind the name (proc_pid_stat(5)).
fn stat_field(pid: i32, number: usize) -> Result<i32, TraceeError> {
    let path = format!("/proc/{pid}/stat");
    let text = read_proc(&path)?;
    let after_name = text.rsplit_once(')').map(|(_, rest)| rest).unwrap_or_default();
    let value = after_name.split_whitespace().nth(number - 3).and_then(|word| word.parse().ok());
    value.ok_or(TraceeError::Proc { path, problem: format!("no field {number} in it") })
}

/// The groups among `nodes` whose leaders have ended, each with its session.
pub fn groups_without_leader(nodes: &[Node]) -> BTreeMap<i32, i32> {
    let has_left = |group: i32| group != 0 && group != INIT && nodes.iter().all(|node| node.pid != group);
    nodes.iter().filter(|node| has_left(node.group)).map(|node| (node.group, node.session)).collect()
}

/// Why the tree can't be built again: (pid, reason).
pub fn obstacles(members: &[Member]) -> Vec<(i32, String)> {
    let mut found = Vec::new();
    let main = members.iter().find(|member| member.node.parent == INIT).map(|member| member.node.session);
    for Member { pid, node } in members {
        let parent = members.iter().find(|other| other.node.pid == node.parent);
        let inherited = parent.map(|parent| parent.node.session).or(main);
        // An orphan has it from a parent that has ended.
        let orphan = node.parent == INIT && ![0, INIT].contains(&node.session) && node.status.is_none();
        if node.session != node.pid && Some(node.session) != inherited && !orphan {
            found.push((*pid, format!("session {}, which its parent is not in", node.session)));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(pid: i32, parent: i32, session: i32, group: i32) -> Member {
        Member { pid: pid + 1000, node: Node { pid, parent, session, group, status: None } }
    }

    #[test]
    fn parents_come_first_and_what_hangs_in_the_air_is_left_out() {
        let shuffled = vec![member(7, 9, 2, 2), member(9, 2, 2, 2), member(2, 1, 2, 2), member(5, 77, 2, 2)];
        let pids: Vec<i32> = parents_first(shuffled).iter().map(|member| member.node.pid).collect();
        assert_eq!(pids, [2, 9, 7]);
    }

    #[test]
    fn a_strange_session_and_a_group_without_its_leader_are_found() {
        let orphans = [member(2, 1, 1, 1), member(5, 1, 4, 4), member(6, 5, 4, 4)];
        assert_eq!(obstacles(&orphans), []);
        let fine = [member(2, 1, 1, 1), member(3, 2, 3, 3), member(4, 3, 3, 4), member(5, 4, 3, 4)];
        assert_eq!(obstacles(&fine), []);
        let strange = [member(2, 1, 1, 1), member(3, 2, 9, 1), member(4, 2, 1, 8)];
        let found = obstacles(&strange);
        assert_eq!(found.iter().map(|(pid, _)| *pid).collect::<Vec<_>>(), [1003]);
        let nodes = |members: &[Member]| members.iter().map(|member| member.node).collect::<Vec<_>>();
        assert_eq!(groups_without_leader(&nodes(&fine)), BTreeMap::new());
        assert_eq!(groups_without_leader(&nodes(&strange)), BTreeMap::from([(8, 1)]));
    }
}
