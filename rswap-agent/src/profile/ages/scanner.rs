//! Looks at instances' memory when it is time to, in a thread of its own: no window waits for that.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::{AgesCost, Budget, Count, Cycle, PageAges, writes, writes::Armed};
use crate::{
    instance::InstanceName,
    profile::{ProbeState, cgroup, doctor::migration_features},
    sys::clock::thread_cpu_time,
    units::UnixMillis,
};

/// What takes marks away.
const CLEAR_ALL: &str = "1";
/// Where there is nothing to do, it is looked after so long whether there is.
const IDLE: Duration = Duration::from_secs(1);
/// A look may wait for the kernel without an end. Who ends the scanner waits so long for it.
const END_LIMIT: Duration = Duration::from_secs(2);
/// How often it is looked after whether the thread has ended.
const END_POLL: Duration = Duration::from_millis(2);

/// The thread, until it is dropped.
pub(in crate::profile) struct Scanner {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// The one that is looked at.
    busy: Option<InstanceName>,
    instances: BTreeMap<InstanceName, Instance>,
    cost: AgesCost,
    stopping: bool,
}

struct Instance {
    cgroup: PathBuf,
    cycle: Cycle,
    /// Its pages are being read by somebody else than itself, which marks them; or he notes writes himself.
    disturbed: bool,
    /// What notes writes, where those are looked at.
    armed: Vec<Armed>,
}

/// What is looked at, and by which means.
#[derive(Clone, Copy, Debug)]
pub(in crate::profile) enum Means {
    /// What is used: the processor's marks. Processes that could map nothing for longer than the limit are left out.
    Marks { lock_limit: Duration },
    /// What is written, of a sample of about so many bytes of an instance.
    Writes { sample_bytes: u64 },
}

impl Means {
    /// Why it can't be had.
    fn missing(self) -> Option<String> {
        match self {
            Self::Marks { .. } => ["clear_refs", "smaps_rollup"].into_iter().find_map(|file| {
                let path = format!("/proc/self/{file}");
                fs::metadata(&path).err().map(|error| format!("this kernel has no {path}: {error}"))
            }),
            Self::Writes { .. } => {
                let lacks = migration_features().into_iter().filter(|of| !of.present);
                lacks
                    .filter(|of| NEEDED_FOR_WRITES.contains(&of.name.as_str()))
                    .map(|of| format!("{}: {}", of.name, of.detail))
                    .next()
            }
        }
    }

    /// Looks at an instance, and answers what other threads took of a core for it.
    fn look(self, cgroup: &Path, cycle: &mut Cycle, armed: &mut Vec<Armed>, began: Instant) -> Duration {
        match self {
            Self::Marks { lock_limit } => {
                look(cgroup, cycle, began, lock_limit);
                Duration::ZERO
            }
            Self::Writes { sample_bytes } => writes::look(cgroup, cycle, armed, began, sample_bytes),
        }
    }
}

const NEEDED_FOR_WRITES: [&str; 2] = ["PAGEMAP_SCAN", "userfaultfd, asynchronous write protection"];

impl Scanner {
    /// Starts it, or says why there is none.
    pub(in crate::profile) fn start(budget_share: f64, means: Means) -> Result<Self, ProbeState> {
        let (setting, name) = match means {
            Means::Marks { .. } => ("memory_budget", "ages"),
            Means::Writes { .. } => ("written_budget", "written-ages"),
        };
        if budget_share <= 0.0 {
            return Err(ProbeState::Off { reason: format!("profile.{setting} is 0") });
        }
        if let Some(reason) = means.missing() {
            return Err(ProbeState::Unavailable { reason });
        }
        let look = move |cgroup: &Path, cycle: &mut Cycle, armed: &mut Vec<Armed>, began: Instant| {
            means.look(cgroup, cycle, armed, began)
        };
        Self::spawn(name, budget_share, look).map_err(|reason| ProbeState::Unavailable { reason })
    }

    /// Starts the thread. `look` looks at an instance, and answers what other threads took of a core for it.
    fn spawn(
        name: &str,
        budget_share: f64,
        look: impl FnMut(&Path, &mut Cycle, &mut Vec<Armed>, Instant) -> Duration + Send + 'static,
    ) -> Result<Self, String> {
        let shared = Arc::new(Shared::default());
        let of_thread = shared.clone();
        let run = move || of_thread.run(budget_share, look);
        let thread = thread::Builder::new().name(name.to_owned()).spawn(run);
        Ok(Self { shared, thread: Some(thread.map_err(|error| format!("start a thread: {error}"))?) })
    }

    /// From now on this one, too.
    pub(in crate::profile) fn track(&self, name: &InstanceName, cgroup: &Path) {
        let (cycle, disturbed, armed) = Default::default();
        let instance = Instance { cgroup: cgroup.to_owned(), cycle, disturbed, armed };
        self.shared.lock().instances.insert(name.clone(), instance);
        self.shared.changed.notify_all();
    }

    /// No longer this one.
    pub(in crate::profile) fn untrack(&self, name: &InstanceName) {
        self.shared.lock().instances.remove(name);
    }

    /// Leaves those alone whose pages are read by others: that marks them all.
    pub(in crate::profile) fn disturbed(&self, is_disturbed: impl Fn(&InstanceName) -> bool) {
        for (name, instance) in &mut self.shared.lock().instances {
            instance.disturbed = is_disturbed(name);
            if instance.disturbed {
                instance.forget();
            }
        }
    }

    /// Begins nothing with one any more, until [`Self::disturbed`] says otherwise. It may be looked at still.
    pub(in crate::profile) fn disturb(&self, name: &InstanceName) {
        if let Some(instance) = self.shared.lock().instances.get_mut(name) {
            instance.disturbed = true;
            instance.forget();
        }
    }

    /// The same, and waits until it is not looked at any more; `false` if it still is at the deadline.
    pub(in crate::profile) fn leave_alone(&self, name: &InstanceName, deadline: Instant) -> bool {
        self.disturb(name);
        let left = deadline.saturating_duration_since(Instant::now());
        let is_looked_at = |state: &mut State| state.busy.as_ref() == Some(name);
        let waited = self.shared.changed.wait_timeout_while(self.shared.lock(), left, is_looked_at);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.busy.as_ref() != Some(name)
    }

    /// What is known of one.
    pub(in crate::profile) fn ages(&self, name: &InstanceName) -> Option<PageAges> {
        self.shared.lock().instances.get(name)?.cycle.ages()
    }

    /// What it costs.
    pub(in crate::profile) fn cost(&self) -> AgesCost {
        self.shared.lock().cost
    }
}

impl Instance {
    fn forget(&mut self) {
        self.cycle = Cycle::default();
        self.armed.clear();
    }
}

impl Drop for Scanner {
    fn drop(&mut self) {
        self.shared.lock().stopping = true;
        self.shared.changed.notify_all();
        let Some(thread) = self.thread.take() else { return };
        // It ends after the look that it is at, and that may wait for a lock which somebody has who waits for a disk.
        let deadline = Instant::now() + END_LIMIT;
        while !thread.is_finished() {
            if Instant::now() >= deadline {
                let name = thread.thread().name().unwrap_or_default();
                let instance = self.shared.lock().busy.as_ref().map(ToString::to_string).unwrap_or_default();
                // It has what it needs, and ends by itself if the kernel lets it go on.
                tracing::warn!(%instance, name, "a look at memory does not end: its thread is left behind");
                return;
            }
            thread::sleep(END_POLL);
        }
        // One that has panicked has nothing to say here.
        drop(thread.join());
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(
        &self,
        budget_share: f64,
        mut look: impl FnMut(&Path, &mut Cycle, &mut Vec<Armed>, Instant) -> Duration,
    ) {
        let (began, mut budget) = (Instant::now(), Budget::new(budget_share));
        let (cpu_before, mut elsewhere) = (thread_cpu_time(), Duration::ZERO);
        let mut state = self.lock();
        state.cost.budget_share = budget_share;
        while !state.stopping {
            let now = began.elapsed();
            let next = state.instances.iter().filter(|(_, of)| !of.disturbed);
            let next =
                next.min_by_key(|(_, of)| of.cycle.due()).map(|(name, of)| (name.clone(), of.cycle.due()));
            let due = next.as_ref().map_or(IDLE, |(_, due)| due.saturating_sub(now).min(IDLE));
            let wait = due.max(budget.pause(now));
            if let Some((_, due)) = &next {
                let overdue = if due.is_zero() { Duration::ZERO } else { now.saturating_sub(*due) };
                state.cost.behind_ms = overdue.as_millis() as u64;
            }
            let Some((name, _)) = next.filter(|_| wait.is_zero()) else {
                let waited = self.changed.wait_timeout(state, wait.min(IDLE));
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
                continue;
            };
            let Some(of) = state.instances.get_mut(&name) else { continue };
            let (cgroup, mut cycle) = (of.cgroup.clone(), of.cycle.clone());
            let mut armed = std::mem::take(&mut of.armed);
            state.busy = Some(name.clone());
            drop(state);
            elsewhere += look(&cgroup, &mut cycle, &mut armed, began);
            let spent = thread_cpu_time().saturating_sub(cpu_before) + elsewhere;
            budget.spend(spent.saturating_sub(budget.spent));
            state = self.lock();
            if let Some(of) = state.instances.get_mut(&name).filter(|of| !of.disturbed && of.cgroup == cgroup)
            {
                of.cycle = cycle;
                of.armed = std::mem::take(&mut armed);
            }
            if !armed.is_empty() {
                // Before anybody is told who waits for that; and the kernel may wait for a process's lock here, while others need the state.
                drop(state);
                armed.clear();
                state = self.lock();
            }
            state.busy = None;
            self.changed.notify_all();
            state.cost.looks += 1;
            state.cost.used_share = spent.as_secs_f64() / began.elapsed().as_secs_f64().max(1e-3);
        }
        // Here and not where the last one lets go of the state: that is who ends the scanner, and it may take as long as a look.
        let left = std::mem::take(&mut state.instances);
        drop(state);
        drop(left);
    }
}

/// One look at an instance: counts what is marked, and takes the marks away where it is time to.
fn look(cgroup: &Path, cycle: &mut Cycle, began: Instant, lock_limit: Duration) {
    // Of a cgroup that has gone there is nothing to count; who tracks it will say so.
    let pids = cgroup::pids(cgroup).unwrap_or_default();
    let (mut count, mut small) = (Count::default(), Vec::new());
    for pid in pids {
        let before = Instant::now();
        // One that has ended has no memory.
        let Ok(of) = rollup(pid) else { continue };
        count.resident_bytes += of.resident_bytes;
        // Taking marks away takes as long as counting them, and meanwhile the process can't map anything.
        if before.elapsed() > lock_limit {
            count.left_out_bytes += of.resident_bytes;
        } else {
            count.used_bytes += of.used_bytes;
            small.push(pid);
        }
    }
    if cycle.count(began.elapsed(), UnixMillis::now(), count) {
        for pid in small {
            if let Err(error) = fs::write(format!("/proc/{pid}/clear_refs"), CLEAR_ALL) {
                tracing::debug!(pid, %error, "its page ages are not measured");
            }
        }
        cycle.was_cleared(began.elapsed());
    }
}

/// Memory of a process, and what of it is marked.
fn rollup(pid: i32) -> io::Result<Count> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    parse(&text).ok_or_else(|| io::Error::other("no Rss or no Referenced"))
}

fn parse(text: &str) -> Option<Count> {
    let field = |name| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
    };
    Some(Count { used_bytes: field("Referenced:")?, resident_bytes: field("Rss:")?, left_out_bytes: 0 })
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn the_end_waits_for_a_look_and_leaves_one_behind_that_does_not_end() {
        const LONG: Duration = Duration::from_secs(20);
        let name: InstanceName = "one".parse().unwrap();
        for hangs in [false, true] {
            let (tell, told) = mpsc::channel();
            let (go_on, may_go_on) = mpsc::channel::<()>();
            let look = move |_: &Path, _: &mut Cycle, _: &mut Vec<Armed>, _: Instant| {
                // The test may have failed already, and listen no more.
                _ = tell.send(());
                _ = may_go_on.recv();
                Duration::ZERO
            };
            let scanner = Scanner::spawn("a-test", 1.0, look).unwrap();
            scanner.track(&name, Path::new("/nowhere"));
            told.recv_timeout(LONG).unwrap();
            let shared = scanner.shared.clone();
            let release = thread::spawn(move || {
                if !hangs {
                    thread::sleep(Duration::from_millis(50));
                    drop(go_on);
                    return None;
                }
                Some(go_on)
            });
            let began = Instant::now();
            drop(scanner);
            let took = began.elapsed();
            // The thread has the state as long as it is there.
            let is_there = Arc::strong_count(&shared) > 1;
            assert_eq!(is_there, hangs, "after {took:?}");
            if hangs {
                assert!(took >= END_LIMIT && took < LONG, "{took:?}");
            }
            // It ends by itself as soon as it can.
            drop(release.join().unwrap());
            let deadline = Instant::now() + LONG;
            while Arc::strong_count(&shared) > 1 {
                assert!(Instant::now() < deadline, "the thread does not end");
                thread::sleep(END_POLL);
            }
            assert!(shared.lock().instances.is_empty());
        }
    }

    #[test]
    fn a_look_that_does_not_end_is_not_waited_for_without_end() {
        let scanner = Scanner { shared: Arc::default(), thread: None };
        let (busy, other): (InstanceName, InstanceName) = ("busy".parse().unwrap(), "other".parse().unwrap());
        scanner.shared.lock().busy = Some(busy.clone());
        let soon = || Instant::now() + Duration::from_millis(20);
        assert!(!scanner.leave_alone(&busy, soon()));
        assert!(scanner.leave_alone(&other, soon()));
        scanner.shared.lock().busy = None;
        assert!(scanner.leave_alone(&busy, Instant::now()));
    }

    #[test]
    fn marked_memory_is_read_from_the_kernels_summary() {
        let text = "55d0-7fff ---p 00000000 00:00 0   [rollup]\nRss:      884 kB\nPss:  385 kB\nReferenced:      12 kB\n";
        let count = Count { used_bytes: 12 << 10, resident_bytes: 884 << 10, left_out_bytes: 0 };
        assert_eq!(parse(text), Some(count));
        assert_eq!(parse("Rss: 884 kB\n"), None);
    }
}
