//! Removes what killed tests left behind: namespaces and cgroups that bear the pid of a process that is gone.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use rswap_agent::instance::cgroup;

/// What everything of the harness is called: this, the pid of its process, and what it is.
pub const PREFIX: &str = "rswt";

/// The name of a thing of this process.
pub fn own_name(what: &str) -> String {
    format!("{PREFIX}{}-{what}", std::process::id())
}

/// Removes what processes left that are gone.
pub fn stale() -> anyhow::Result<()> {
    for path in entries(&cgroup::mount_point()?).filter(|path| owner_is_gone(path)) {
        remove_cgroup(&path)?;
    }
    for path in legacy_cpu()?.iter().flat_map(|mount| entries(mount)).filter(|path| owner_is_gone(path)) {
        remove_tree(&path)?;
    }
    for path in entries(Path::new("/run/netns")).filter(|path| owner_is_gone(path)) {
        let name = path.file_name().unwrap_or_default();
        Command::new("ip").args(["netns", "del"]).arg(name).status()?;
    }
    for path in entries(Path::new("/run")).filter(|path| owner_is_gone(path)) {
        crate::swap_device::remove_stale(&path)?;
    }
    Ok(())
}

/// Kills all that is in a cgroup of the harness, and removes it with those below it; also the one of v1's cpu controller that an
/// agent made for it.
pub fn remove_cgroup(path: &Path) -> anyhow::Result<()> {
    if path.exists() {
        cgroup::kill(path)?;
        remove_tree(path)?;
    }
    let prefix = format!("{}.", path.file_name().unwrap_or_default().to_string_lossy());
    let is_of_it =
        |found: &PathBuf| found.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix));
    for legacy in legacy_cpu()?.iter().flat_map(|mount| entries(mount)).filter(is_of_it) {
        remove_tree(&legacy)?;
    }
    Ok(())
}

/// Where v1's cpu controller is mounted, on hosts that have it there.
pub fn legacy_cpu() -> anyhow::Result<Option<PathBuf>> {
    let mounts = fs::read_to_string("/proc/mounts")?;
    let cpu = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>()).find(|words| {
        matches!(words[..], [_, _, "cgroup", options, ..] if options.split(',').any(|one| one == "cpu"))
    });
    Ok(cpu.map(|words| PathBuf::from(words[1])))
}

fn remove_tree(path: &Path) -> anyhow::Result<()> {
    for below in entries(path).filter(|below| below.is_dir()) {
        remove_tree(&below)?;
    }
    // A cgroup stays busy for a moment after its last process was reaped.
    crate::wait_for(&format!("{} to be free", path.display()), Duration::from_secs(5), || {
        Ok(cgroup::remove(path).ok())
    })
}

fn entries(directory: &Path) -> impl Iterator<Item = std::path::PathBuf> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path())
}

fn owner_is_gone(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    owner(&name).is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists())
}

fn owner(name: &str) -> Option<u32> {
    name.strip_prefix(PREFIX)?.split_once('-')?.0.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_the_harness_have_an_owner() {
        assert_eq!(owner("rswt123-a"), Some(123));
        assert_eq!(owner(&own_name("sw")), Some(std::process::id()));
        for foreign in ["rswap", "rswt", "rswt12", "rswtx-1", "12-rswt", "system.slice"] {
            assert_eq!(owner(foreign), None, "{foreign}");
        }
    }
}
