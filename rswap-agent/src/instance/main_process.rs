//! The process that an instance is there for.

use std::{fs, path::Path};

use super::{Instance, launch};

/// What the main process of an instance runs, and as whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MainProcess {
    /// File name of its program.
    pub image: String,
    /// Its effective user id, as this host sees it.
    pub uid: u32,
}

impl MainProcess {
    /// That of a running instance: the first child of its init, or, of one that was adopted, the process with the lowest id.
    /// `None` if there is none now.
    pub fn of(instance: &Instance) -> Option<Self> {
        let pid = match instance.init_pid {
            Some(init) => *launch::children(init).first()?,
            None => lowest(&instance.cgroup, 0)?,
        };
        let program = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
        let image = program.file_name()?.to_string_lossy().trim_end_matches(" (deleted)").to_owned();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
        Some(Self { image, uid: uids.split_whitespace().nth(1)?.parse().ok()? })
    }
}

/// The lowest process id in a cgroup or below it.
fn lowest(cgroup: &Path, depth: u32) -> Option<i32> {
    let text = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    let own = text.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid > 0).min();
    if own.is_some() || depth == 16 {
        return own;
    }
    let entries = fs::read_dir(cgroup).ok()?.flatten();
    let below = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    below.filter_map(|entry| lowest(&entry.path(), depth + 1)).min()
}
