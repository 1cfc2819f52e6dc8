//! Cgroups below an instance's own migrate, with their limits and who is in which.

use rswap_tests::{
    reason_to_skip,
    scene::{Scene, further},
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
