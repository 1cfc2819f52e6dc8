//! What is in an instance's IPC and UTS namespaces migrates: SysV shared memory, semaphores, messages, and host names.

use rswap_tests::{
    reason_to_skip,
    scene::{Scene, further},
};

#[test]
fn sysv_objects_and_the_host_name_go_there_and_back() -> anyhow::Result<()> {
    if reason_to_skip("sysv_objects_and_the_host_name_go_there_and_back").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    let before = std::fs::read_to_string("/proc/sys/kernel/hostname")?;
    scene.python("ipc", &[], &[])?;
    let goes_on = |log: &std::path::Path| further(log, "checked", 5);
    goes_on(&scene.log)?;
    scene.three_moves("ipc", goes_on)?;
    let after = std::fs::read_to_string("/proc/sys/kernel/hostname")?;
    anyhow::ensure!(before == after, "the host's own name has become {after}");
    Ok(())
}

#[test]
fn what_is_not_carried_is_refused_by_name() -> anyhow::Result<()> {
    if reason_to_skip("what_is_not_carried_is_refused_by_name").is_some() {
        return Ok(());
    }
    for (kind, wanted) in [("undo", "undo operations"), ("queue", "POSIX message queues")] {
        let scene = Scene::set()?;
        scene.python("ipc", &[], &[kind])?;
        further(&scene.log, "checked", 1)?;
        let Err(reason) = scene.a.migrate("ipc", &scene.b.migrate_address())?.end()? else {
            anyhow::bail!("it was moved");
        };
        anyhow::ensure!(reason.contains(wanted), "{reason}");
        further(&scene.log, "checked", 2)?;
    }
    Ok(())
}
