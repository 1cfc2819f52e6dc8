//! Which scenarios run beside each other, and which alone.

use std::{
    sync::{Mutex, PoisonError},
    thread,
};

/// The scenarios, by how their names begin, that may run beside another one: they wait for programs and peers for most of their time,
/// what they assert doesn't depend on how fast those are, and they mount nothing. All others run alone: they measure the machine, load it until it
/// has no more to give, or mount disks, which instances of another scenario would find among their own mounts, and be refused for. Nor may it be one
/// that waits for plans: in these counts what others take of the CPUs.
const BESIDE_OTHERS: &[&str] = &[
    "check_host",
    "controller_links",
    "deploy",
    "failure_matrix_",
    "hostile_",
    "killed_surgeon",
    "links",
    "migrate_",
    "privileges",
    "program_",
    "recover",
    "refused",
    "run_and_adopt",
    "soak",
    "swap_uplink",
];

/// Those of them that mount disks.
const ALONE_ALL_THE_SAME: &[&str] = &["migrate_volumes"];

/// As many run at a time: each uses a core for less than half of its time.
const AT_ONCE: usize = 2;

/// Whether a scenario may run beside another one.
pub(super) fn may_run_beside(name: &str) -> bool {
    BESIDE_OTHERS.iter().any(|begins| name.starts_with(begins)) && !ALONE_ALL_THE_SAME.contains(&name)
}

/// Has `work` done on each of `items`, at most [`AT_ONCE`] at a time; results are in the order of the items.
///
/// # Errors
/// The first one of `work`; what was begun is ended before.
pub(super) fn side_by_side<T: Sync, R: Send>(
    items: &[T],
    work: impl Fn(&T) -> anyhow::Result<R> + Sync,
) -> anyhow::Result<Vec<R>> {
    let next = Mutex::new(items.iter().enumerate());
    let done = Mutex::new(Vec::new());
    let take = || next.lock().unwrap_or_else(PoisonError::into_inner).next();
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some((at, item)) = take() {
                    let result = work(item);
                    done.lock().unwrap_or_else(PoisonError::into_inner).push((at, result));
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_by_key(|(at, _)| *at);
    done.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn each_item_is_worked_on_once_and_no_more_than_two_at_a_time() {
        let (running, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let items: Vec<usize> = (0..20).collect();
        let results = side_by_side(&items, |item| {
            most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            thread::sleep(std::time::Duration::from_millis(2));
            running.fetch_sub(1, Ordering::SeqCst);
            Ok(item * 2)
        });
        assert_eq!(results.expect("none fails"), items.iter().map(|item| item * 2).collect::<Vec<_>>());
        assert!((1..=AT_ONCE).contains(&most.into_inner()));
        let failed = side_by_side(&items, |item| if *item == 7 { anyhow::bail!("seven") } else { Ok(()) });
        assert_eq!(failed.expect_err("one fails").to_string(), "seven");
    }

    #[test]
    fn what_measures_or_mounts_runs_alone() {
        let alone = ["plan_cores", "profile_sched", "pools", "forecast", "demo", "swap_memory", "top"];
        for alone in alone.into_iter().chain(["swap_volume_failures", "migrate_volumes", "controller_roll"]) {
            assert!(!may_run_beside(alone), "{alone}");
        }
        assert!(may_run_beside("migrate_redis") && may_run_beside("controller_links"));
    }
}
