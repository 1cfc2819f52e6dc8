//! Who outside of an instance has what its processes have open.

use std::{collections::BTreeSet, fs};

use super::super::capture::link;

/// Which of `targets` (what links in `/proc/PID/fd` say) a process has open that is not in the PID namespace of process
/// `inside`.
pub(super) fn held(targets: &BTreeSet<String>, inside: i32) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    if targets.is_empty() {
        return found;
    }
    let own = std::process::id() as i32;
    let namespace = link(inside, "ns/pid").ok();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        // This agent may have duplicates of what it looks at.
        if pid == own || link(pid, "ns/pid").ok() == namespace {
            continue;
        }
        for entry in fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten() {
            let target = fs::read_link(entry.path()).unwrap_or_default().to_string_lossy().into_owned();
            if targets.contains(&target) {
                found.insert(target);
            }
        }
    }
    found
}
