//! An instance that stands still, and the tasks that make calls for it.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use super::StorageError;
use crate::{
    instance::{Instance, cgroup},
    tracee::{
        TraceeError,
        hand::{self, Hand, Task},
        leftovers,
        rehome::{Plan, apply::Hands},
        stopped::StoppedProcess,
        tree,
    },
};

/// Passes over the tree before processes that are made faster than they can be stopped are given up.
const MAX_PASSES: usize = 100;
/// How often [`Readiness`] is renewed.
const READY_EVERY: Duration = Duration::from_millis(3);
/// The cgroup of the tasks, beside the instances': no instance's name begins like this.
const CGROUP: &str = ".hands";

/// Every process of an instance, held by this thread.
pub(super) struct Stopped(Vec<StoppedProcess>);

impl Stopped {
    /// Stops all, none missed: the tree is walked until a walk finds no new one.
    pub(super) fn all(instance: &Instance) -> Result<Self, TraceeError> {
        let mut stopped: Vec<StoppedProcess> = Vec::new();
        for _ in 0..MAX_PASSES {
            let members = tree::members(instance)?;
            let living = members
                .iter()
                .filter(|member| member.node.status.is_none() && !tree::lends_memory(member, &members));
            let fresh: Vec<i32> = living
                .map(|member| member.pid)
                .filter(|pid| stopped.iter().all(|process| process.pid() != *pid))
                .collect();
            if fresh.is_empty() {
                return Ok(Self(stopped));
            }
            for pid in fresh {
                match StoppedProcess::stop(pid) {
                    Err(TraceeError::Gone(_)) => {}
                    process => stopped.push(process?),
                }
            }
        }
        let text = format!("{} makes processes faster than they can be stopped", instance.name);
        Err(TraceeError::Unsupported(text))
    }

    pub(super) fn pids(&self) -> Vec<i32> {
        self.0.iter().map(StoppedProcess::pid).collect()
    }

    /// Makes the tasks that `plan` needs, tells `note` of them, and then has the instance held by its cgroup instead of this
    /// thread. After an error it goes on, unless `stays`.
    pub(super) fn hand_over(
        self,
        instance: &Instance,
        plan: &Plan,
        stays: bool,
        note: impl FnOnce(Vec<Task>) -> Result<(), StorageError>,
    ) -> Result<Hands, StorageError> {
        let made = self.make_hands(instance, plan).and_then(|hands| {
            note(hands.values().map(Hand::task).collect())?;
            Ok(hands)
        });
        if stays || made.is_ok() {
            cgroup::freeze(&instance.cgroup, true)?;
        }
        // Let go by ptrace, and held by the cgroup: no thread runs in between.
        drop(self);
        made
    }

    fn make_hands(&self, instance: &Instance, plan: &Plan) -> Result<Hands, StorageError> {
        let directory = prepare(instance)?;
        let concerned = plan.processes();
        let mut hands = Hands::new();
        for process in self.0.iter().filter(|process| concerned.contains(&process.pid())) {
            hands.insert(process.pid(), Hand::make(process, &directory)?);
        }
        Ok(hands)
    }
}

/// Keeps the kernel ready to move a task to another cgroup, until it is dropped: the first move after a while waits for all
/// processors to take note (12 ms here), and each that follows soon does not (0.1 ms).
pub(super) struct Readiness {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Readiness {
    /// Waits for the first one: nothing need stand still meanwhile.
    pub(super) fn begin() -> Self {
        if let Some(own) = own_cgroup() {
            let _ = fs::write(own.join("cgroup.procs"), "0");
        }
        let over = Arc::new(AtomicBool::new(false));
        let is_over = over.clone();
        let thread = thread::spawn(move || {
            let Some(own) = own_cgroup() else { return };
            while !is_over.load(Ordering::Acquire) {
                // To where it is: nothing changes. What fails only leaves the freeze longer.
                let _ = fs::write(own.join("cgroup.procs"), "0");
                thread::sleep(READY_EVERY);
            }
        });
        Self { over, thread: Some(thread) }
    }
}

impl Drop for Readiness {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The cgroup v2 that this process is in.
fn own_cgroup() -> Option<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(cgroup::mount_point().ok()?.join(path)).filter(|path| path.is_dir())
}

/// Makes the cgroup of the tasks.
pub(super) fn prepare(instance: &Instance) -> Result<PathBuf, StorageError> {
    let directory = hands_cgroup(&instance.cgroup);
    fs::create_dir_all(&directory).map_err(StorageError::io(format!("making {}", directory.display())))?;
    Ok(directory)
}

/// Removes what an agent that was killed has left in the programs. What fails is left to the next one.
pub(super) fn clean(instance: &Instance) {
    // Somebody is at it, or has left it standing: no call can be made in it.
    if cgroup::is_frozen(&instance.cgroup) {
        return;
    }
    let pids = tree::listed(instance).unwrap_or_default();
    // A thread that is still to make the call in which the agent was killed would make a task behind our back.
    for pid in &pids {
        if let Err(error) = leftovers::wait_until_back(*pid)
            && !tree::has_ended(*pid)
        {
            tracing::warn!(pid, %error, "a thread may still be in a call that an earlier agent had it make");
        }
    }
    // Before the memory goes that a task has its way out in.
    bury(pids.iter().copied());
    for pid in pids {
        if let Err(error) = leftovers::remove(pid)
            && !tree::has_ended(pid)
        {
            tracing::warn!(pid, %error, "what an earlier agent has left is still there");
        }
    }
}

fn hands_cgroup(instance: &Path) -> PathBuf {
    instance.parent().unwrap_or(instance).join(CGROUP)
}

/// Lets the instance go on. What its tasks have left is still to be taken away ([`bury`]).
pub(super) fn let_go(instance: &Instance, hands: Hands) -> Result<(), StorageError> {
    drop(hands);
    cgroup::freeze(&instance.cgroup, false)?;
    // Another swap may use it.
    let _ = fs::remove_dir(hands_cgroup(&instance.cgroup));
    Ok(())
}

/// Takes away what is left of tasks that have ended.
pub(super) fn bury(processes: impl IntoIterator<Item = i32>) {
    for pid in processes {
        if let Err(error) = hand::bury(pid)
            && !tree::has_ended(pid)
        {
            tracing::warn!(pid, %error, "a task of ours that has ended is left in a list of children");
        }
    }
}
