//! Cgroups below an instance's own migrate, with their limits and who is in which.

use std::{
    fs,
    path::{Path, PathBuf},
};

use rswap_agent::instance::cgroup;
use rswap_tests::{
    reason_to_skip,
    scene::{Scene, further},
    skip,
};

#[test]
fn cgroups_of_its_own_go_there_and_back() -> anyhow::Result<()> {
    if reason_to_skip("cgroups_of_its_own_go_there_and_back").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    scene.python("cgroups", &[], &[])?;
    let goes_on = |log: &std::path::Path| further(log, "worker", 3).and_then(|()| further(log, "main", 3));
    goes_on(&scene.log)?;
    scene.three_moves("cgroups", goes_on)
}

#[test]
fn a_frozen_cgroup_is_refused() -> anyhow::Result<()> {
    if reason_to_skip("a_frozen_cgroup_is_refused").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    scene.python("cgroups", &[], &[])?;
    further(&scene.log, "main", 1)?;
    let switch = scene.a.cgroup()?.join("cgroups/idle/cgroup.freeze");
    std::fs::write(&switch, "1")?;
    let Err(reason) = scene.a.migrate("cgroups", &scene.b.migrate_address())?.end()? else {
        anyhow::bail!("it was moved");
    };
    anyhow::ensure!(reason.contains("is frozen"), "{reason}");
    std::fs::write(&switch, "0")?;
    further(&scene.log, "main", 3)
}

/// Limits by controllers that a host may have, and how they are read again.
const LIMITS: [(&str, &str); 3] =
    [("hugetlb", "hugetlb.2MB.max=4194304"), ("pids", "pids.max=77"), ("memory", "memory.high=1073741824")];

/// Controllers that are given to the cgroups in a directory, and taken back at the end, but for those that it had.
struct Given {
    directory: PathBuf,
    fresh: Vec<&'static str>,
}

impl Given {
    fn to(directory: &Path, controllers: &[&'static str]) -> anyhow::Result<Self> {
        let path = directory.join("cgroup.subtree_control");
        let before = fs::read_to_string(&path)?;
        let fresh = controllers.iter().filter(|name| !before.split_whitespace().any(|word| word == **name));
        let given = Self { directory: directory.to_owned(), fresh: fresh.copied().collect() };
        given.set('+')?;
        Ok(given)
    }

    fn set(&self, sign: char) -> anyhow::Result<()> {
        let words: Vec<String> = self.fresh.iter().map(|name| format!("{sign}{name}")).collect();
        Ok(fs::write(self.directory.join("cgroup.subtree_control"), words.join(" "))?)
    }
}

impl Drop for Given {
    fn drop(&mut self) {
        if let Err(error) = self.set('-') {
            eprintln!("{:?} stay in {}: {error}", self.fresh, self.directory.display());
        }
    }
}

#[test]
fn limits_of_controllers_go_where_the_controllers_are() -> anyhow::Result<()> {
    const TEST: &str = "limits_of_controllers_go_where_the_controllers_are";
    if reason_to_skip(TEST).is_some() {
        return Ok(());
    }
    let mount = cgroup::mount_point()?;
    let there = fs::read_to_string(mount.join("cgroup.controllers"))?;
    let has = |name: &str| {
        let huge_pages = Path::new("/sys/kernel/mm/hugepages/hugepages-2048kB").exists();
        there.split_whitespace().any(|word| word == name) && (name != "hugetlb" || huge_pages)
    };
    let (controllers, limits): (Vec<_>, Vec<_>) = LIMITS.into_iter().filter(|(name, _)| has(name)).unzip();
    if controllers.is_empty() {
        skip(TEST, "cgroup v2 has none of the controllers hugetlb, pids and memory here");
        return Ok(());
    }
    println!("with {limits:?}");
    // Taken back when the hosts' cgroups are gone.
    let _given = Given::to(&mount, &controllers)?;
    let scene = Scene::set()?;
    let give = |host: &rswap_tests::Host| -> anyhow::Result<()> {
        fs::create_dir_all(host.cgroup()?)?;
        let words: Vec<String> = controllers.iter().map(|name| format!("+{name}")).collect();
        Ok(fs::write(host.cgroup()?.join("cgroup.subtree_control"), words.join(" "))?)
    };
    give(&scene.a)?;
    scene.python("cgroup_limits", &[], &limits)?;
    further(&scene.log, "limits", 2)?;
    // The instances of the other host don't have them yet.
    let Err(reason) = scene.a.migrate("cgroup_limits", &scene.b.migrate_address())?.end()? else {
        anyhow::bail!("it was moved without its limits");
    };
    for name in &controllers {
        let named = reason.contains(&format!("cgroup controller {name}"));
        anyhow::ensure!(named && reason.contains(&format!("echo +{name} >")), "{reason}");
    }
    anyhow::ensure!(!scene.b.has_processes()? && !scene.b.cgroup()?.join("cgroup_limits").exists());
    further(&scene.log, "limits", 2)?;
    give(&scene.b)?;
    scene.three_moves("cgroup_limits", |log| further(log, "limits", 3))
}
