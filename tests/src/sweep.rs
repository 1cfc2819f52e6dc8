//! Removes what killed tests left behind: namespaces and cgroups that bear the pid of a process that is gone.

use std::{fs, path::Path, process::Command, time::Duration};

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
    for path in entries(Path::new("/run/netns")).filter(|path| owner_is_gone(path)) {
        let name = path.file_name().unwrap_or_default();
        Command::new("ip").args(["netns", "del"]).arg(name).status()?;
    }
    for path in entries(Path::new("/run")).filter(|path| owner_is_gone(path)) {
        crate::swap_device::remove_stale(&path)?;
    }
    Ok(())
}

/// Kills all that is in a cgroup of the harness, and removes it with those below it.
pub fn remove_cgroup(path: &Path) -> anyhow::Result<()> {
    if !path.exists() {
        return Ok(());
    }
    cgroup::kill(path)?;
    remove_tree(path)
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
