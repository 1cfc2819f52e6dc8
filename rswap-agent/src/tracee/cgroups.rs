//! The cgroups that an instance has made below its own, with their limits and who is in which.
//!
//! What a process has been charged for stays with the cgroup that it is made in, the instance's: Linux moves no charge.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::tree::{INIT, Member};

const SUBTREE: &str = "cgroup.subtree_control";
const FREEZE: &str = "cgroup.freeze";
/// Files that are written to have something done, or to be told of something.
const ACTIONS: [&str; 5] = ["cgroup.procs", "cgroup.threads", "cgroup.kill", "memory.reclaim", "memory.peak"];
/// More than any program has made: the image comes from another host.
const MOST: usize = 10_000;

/// The cgroups below an instance's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subtree {
    /// Parents before their children.
    pub groups: Vec<Group>,
    /// Processes that are in one of them: the pid in the instance's PID namespace, and the path.
    pub members: Vec<(i32, String)>,
    /// `cgroup.subtree_control` of the instance's own cgroup.
    pub controllers: String,
}

/// One cgroup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// Its path below the instance's cgroup.
    pub path: String,
    /// Its files that can be set, with what they say.
    pub values: Vec<(String, String)>,
}

impl Subtree {
    /// What is below `top`, in which `members` and their init are.
    pub fn read(top: &Path, init: i32, members: &[Member]) -> io::Result<Self> {
        let mut found = Self { controllers: read_trimmed(&top.join(SUBTREE))?, ..Self::default() };
        for path in below(top)? {
            let name = path.strip_prefix(top).unwrap_or(&path).to_string_lossy().into_owned();
            found.groups.push(Group { path: name, values: values(&path)? });
        }
        if found.groups.is_empty() {
            return Ok(Self::default());
        }
        for group in &found.groups {
            let pids = fs::read_to_string(top.join(&group.path).join("cgroup.procs"))?;
            for pid in pids.lines().filter_map(|line| line.parse::<i32>().ok()) {
                let member = members.iter().find(|member| member.pid == pid).map(|member| member.node.pid);
                let inner = if pid == init { Some(INIT) } else { member };
                found.members.extend(inner.map(|inner| (inner, group.path.clone())));
            }
        }
        Ok(found)
    }

    /// Makes all of it below `top`; `pid_of` gives the pid here of a process of the instance.
    ///
    /// # Errors
    /// What can't be set here, by its file.
    pub fn make(&self, top: &Path, pid_of: impl Fn(i32) -> Option<i32>) -> io::Result<()> {
        let inside = |path: &str| {
            let plain = |part: std::path::Component<'_>| matches!(part, std::path::Component::Normal(_));
            !path.is_empty() && Path::new(path).components().all(plain)
        };
        let names = |group: &Group| group.values.iter().all(|(name, _)| inside(name) && !name.contains('/'));
        if self.groups.len() > MOST || !self.groups.iter().all(|group| inside(&group.path) && names(group)) {
            return Err(io::Error::other("the image has cgroups that no instance can have made"));
        }
        for group in &self.groups {
            fs::create_dir(top.join(&group.path))?;
        }
        for (pid, path) in &self.members {
            let pid = pid_of(*pid).ok_or_else(|| io::Error::other(format!("there is no process {pid}")))?;
            write(&top.join(path).join("cgroup.procs"), &pid.to_string())?;
        }
        set(&top.join(SUBTREE), &self.controllers)?;
        // A controller has its files below only when it was switched on above.
        for group in &self.groups {
            for (name, value) in &group.values {
                set(&top.join(&group.path).join(name), value)?;
            }
        }
        Ok(())
    }
}

/// The controllers by which the cgroups below `top` have limits: the destination's must have them, too.
pub fn controllers(top: &Path) -> io::Result<Vec<String>> {
    if below(top)?.is_empty() {
        return Ok(Vec::new());
    }
    Ok(read_trimmed(&top.join(SUBTREE))?.split_whitespace().map(str::to_owned).collect())
}

/// Which of the controllers `wanted` an instance's cgroup in `parent` would lack, each with why, and what to do. `mount` is
/// where the hierarchy is mounted.
pub fn lacking(mount: &Path, parent: &Path, wanted: &[String]) -> Vec<(String, String)> {
    // Who can't be read gives none: it may not be there yet.
    let words = |path: &Path| fs::read_to_string(path).unwrap_or_default();
    explain(wanted, &words(&mount.join("cgroup.controllers")), &words(&parent.join(SUBTREE)), parent)
}

/// As [`lacking`]: `there` are the controllers of this host, `given` those that cgroups in `parent` have.
fn explain(wanted: &[String], there: &str, given: &str, parent: &Path) -> Vec<(String, String)> {
    let has = |words: &str, name: &str| words.split_whitespace().any(|word| word == name);
    let missing = wanted.iter().filter(|name| !has(given, name));
    let reason = |name: &String| {
        match has(there, name) {
        true => format!(
            "the instance's own cgroups have limits by it, and instances have it not here: echo +{name} > {SUBTREE} of {} \
             and of the cgroups above it",
            parent.display()
        ),
        false => "the instance's own cgroups have limits by it, and this host's cgroup v2 hasn't got it: cgroup v1 has it, or \
                  the kernel none (cgroup_no_v1=all on its command line)"
            .to_owned(),
    }
    };
    missing.map(|name| (format!("cgroup controller {name}"), reason(name))).collect()
}

/// Why what is below `top` can't be carried.
pub fn obstacle(top: &Path) -> io::Result<Option<String>> {
    for path in below(top)? {
        let kind = read_trimmed(&path.join("cgroup.type"))?;
        if kind != "domain" {
            let text =
                format!("{} is of type {kind}: only cgroups of whole processes are carried", path.display());
            return Ok(Some(text));
        }
        // What is frozen makes no calls for us.
        if read_trimmed(&path.join(FREEZE))? == "1" {
            return Ok(Some(format!("{} is frozen: let it go on first", path.display())));
        }
    }
    Ok(None)
}

/// The directories below `top`, parents first.
pub fn below(top: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut next = vec![top.to_owned()];
    while let Some(path) = next.pop() {
        let mut children = Vec::new();
        for entry in fs::read_dir(&path)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                children.push(entry.path());
            }
        }
        children.sort();
        found.extend(children.iter().cloned());
        next.extend(children);
    }
    found.sort();
    Ok(found)
}

/// What can be set in a cgroup. A file that can't be read now (a setting that makes no sense there) says nothing.
fn values(group: &Path) -> io::Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(group)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let metadata = entry.metadata()?;
        let settable = metadata.is_file() && metadata.permissions().mode() & 0o600 == 0o600;
        // Who writes to a file of pressure asks to be told.
        if settable
            && !ACTIONS.contains(&name.as_str())
            && (!name.ends_with(".pressure") || name == "cgroup.pressure")
        {
            found.extend(read_trimmed(&entry.path()).ok().map(|value| (name, value)));
        }
    }
    found.sort();
    Ok(found)
}

/// Brings a file to `wanted`, line by line, if it says something else.
fn set(path: &Path, wanted: &str) -> io::Result<()> {
    let here = read_trimmed(path)?;
    if here == wanted {
        return Ok(());
    }
    if path.ends_with(SUBTREE) {
        let words: Vec<String> = wanted.split_whitespace().map(|word| format!("+{word}")).collect();
        return write(path, &words.join(" "));
    }
    wanted.lines().try_for_each(|line| write(path, line))
}

fn write(path: &Path, value: &str) -> io::Result<()> {
    let explain = |error| io::Error::other(format!("writing {value:?} to {}: {error}", path.display()));
    fs::write(path, value).map_err(explain)
}

fn read_trimmed(path: &Path) -> io::Result<String> {
    fs::read_to_string(path).map(|text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_controller_that_is_not_there_is_named_with_what_to_do() {
        let wanted = ["hugetlb", "pids", "memory"].map(str::to_owned);
        let found = explain(&wanted, "cpu hugetlb pids", "cpu pids", Path::new("/cgroups/rswap"));
        let items: Vec<&str> = found.iter().map(|(item, _)| item.as_str()).collect();
        assert_eq!(items, ["cgroup controller hugetlb", "cgroup controller memory"]);
        assert!(found[0].1.contains("echo +hugetlb > cgroup.subtree_control of /cgroups/rswap"), "{found:?}");
        assert!(found[1].1.contains("cgroup_no_v1=all"), "{found:?}");
        assert_eq!(explain(&[], "", "", Path::new("/")), []);
        assert_eq!(explain(&wanted, "cpu", "pids memory hugetlb", Path::new("/")), []);
    }
}
