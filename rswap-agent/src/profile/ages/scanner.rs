//! Looks at instances' memory when it is time to, in a thread of its own: no window waits for that.

use std::{
    collections::BTreeMap,
    fs, io, mem,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::{AgesCost, Budget, Count, Cycle, PageAges, writes, writes::Armed};
use crate::{
    instance::InstanceName,
    profile::{
        ProbeState, cgroup,
        doctor::{Feature, Finding, migration_features},
        sources::{Host, Source},
    },
    sys::clock::thread_cpu_time,
    units::UnixMillis,
};

/// What takes marks away.
const CLEAR_ALL: &str = "1";
/// Where there is nothing to do, it is looked after so long whether there is.
const IDLE: Duration = Duration::from_secs(1);
/// A look may wait for the kernel without an end, and so may it to close what notes writes. Who ends the scanner waits so long for both.
const END_LIMIT: Duration = Duration::from_secs(2);
/// How often it is looked after whether the thread has ended.
const END_POLL: Duration = Duration::from_millis(2);

/// The thread, until it is dropped. What it has to close after its looks is an `H`.
pub(in crate::profile) struct Scanner<H: Send + 'static = Armed> {
    shared: Arc<Shared<H>>,
    thread: Option<JoinHandle<()>>,
}

struct Shared<H> {
    state: Mutex<State<H>>,
    changed: Condvar,
}

struct State<H> {
    /// The one that is looked at.
    busy: Option<InstanceName>,
    instances: BTreeMap<InstanceName, Instance<H>>,
    closing: Closing<H>,
    cost: AgesCost,
    stopping: bool,
}

/// What is let go of, and of which instance: nothing of it is left here while a thread closes it.
struct Closing<H>(Vec<(InstanceName, Vec<H>)>);

struct Instance<H> {
    cgroup: PathBuf,
    cycle: Cycle,
    /// Its pages are being read by somebody else than itself, which marks them; or he notes writes himself.
    disturbed: bool,
    /// What notes writes, where those are looked at.
    armed: Vec<H>,
}

/// What is looked at, and by which means.
#[derive(Clone, Copy, Debug)]
pub(in crate::profile) enum Means {
    /// What is used: the processor's marks. Processes that could map nothing for longer than the limit are left out.
    Marks { lock_limit: Duration },
    /// What is written, of a sample of about so many bytes of an instance.
    Writes { sample_bytes: u64 },
}

/// Whether the kernel lets the processor's marks be taken away, and counted.
pub(in crate::profile) fn marks(proc: &Path) -> Finding {
    for file in ["clear_refs", "smaps_rollup"] {
        let path = proc.join("self").join(file);
        fs::metadata(&path).map_err(|error| format!("this kernel has no {} ({error})", path.display()))?;
    }
    Ok("clear_refs and smaps_rollup".to_owned())
}

/// Whether the kernel notes writes, and lets them be counted.
pub(in crate::profile) fn noted_writes() -> Finding {
    let is_needed = |of: &Feature| NEEDED_FOR_WRITES.contains(&of.name.as_str());
    match migration_features().into_iter().find(|of| is_needed(of) && !of.present) {
        Some(lacks) => Err(format!("{}: {}", lacks.name, lacks.detail)),
        None => Ok(NEEDED_FOR_WRITES.join("; ")),
    }
}

impl Means {
    fn source(self) -> Source {
        match self {
            Self::Marks { .. } => Source::Ages,
            Self::Writes { .. } => Source::WrittenAges,
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
        let source = means.source();
        source.find(&Host::this()).map_err(|missing| source.unavailable(&missing))?;
        let look = move |cgroup: &Path, cycle: &mut Cycle, armed: &mut Vec<Armed>, began: Instant| {
            means.look(cgroup, cycle, armed, began)
        };
        Self::spawn(name, budget_share, look).map_err(|missing| source.unavailable(&missing))
    }
}

impl<H: Send + 'static> Scanner<H> {
    /// Starts the thread. `look` looks at an instance, and answers what other threads took of a core for it.
    fn spawn(
        name: &str,
        budget_share: f64,
        look: impl FnMut(&Path, &mut Cycle, &mut Vec<H>, Instant) -> Duration + Send + 'static,
    ) -> Result<Self, String> {
        let shared = Arc::new(Shared::<H>::default());
        let of_thread = shared.clone();
        let run = move || of_thread.run(budget_share, look);
        let thread = thread::Builder::new().name(name.to_owned()).spawn(run);
        Ok(Self { shared, thread: Some(thread.map_err(|error| format!("start a thread: {error}"))?) })
    }

    /// From now on this one, too.
    pub(in crate::profile) fn track(&self, name: &InstanceName, cgroup: &Path) {
        let (cycle, disturbed, armed) = Default::default();
        let instance = Instance { cgroup: cgroup.to_owned(), cycle, disturbed, armed };
        let mut state = self.shared.lock();
        if let Some(before) = state.instances.insert(name.clone(), instance) {
            state.closing.add(name, before.armed);
        }
        self.shared.changed.notify_all();
        self.shared.close(state);
    }

    /// No longer this one.
    pub(in crate::profile) fn untrack(&self, name: &InstanceName) {
        let mut state = self.shared.lock();
        if let Some(before) = state.instances.remove(name) {
            state.closing.add(name, before.armed);
        }
        self.shared.close(state);
    }

    /// Leaves those alone whose pages are read by others: that marks them all.
    pub(in crate::profile) fn disturbed(&self, is_disturbed: impl Fn(&InstanceName) -> bool) {
        let mut state = self.shared.lock();
        let State { instances, closing, .. } = &mut *state;
        for (name, instance) in instances {
            instance.disturbed = is_disturbed(name);
            if instance.disturbed {
                closing.add(name, instance.forget());
            }
        }
        self.shared.close(state);
    }

    /// Begins nothing with one any more, until [`Self::disturbed`] says otherwise. It may be looked at still, and what noted its writes be open.
    pub(in crate::profile) fn disturb(&self, name: &InstanceName) {
        let mut state = self.shared.lock();
        let State { instances, closing, .. } = &mut *state;
        if let Some(instance) = instances.get_mut(name) {
            instance.disturbed = true;
            closing.add(name, instance.forget());
        }
        self.shared.close(state);
    }

    /// The same, and waits until it is not looked at any more, and what noted its writes is closed; `false` if that is not so at the deadline.
    pub(in crate::profile) fn leave_alone(&self, name: &InstanceName, deadline: Instant) -> bool {
        self.disturb(name);
        let left = deadline.saturating_duration_since(Instant::now());
        let is_held = |state: &mut State<H>| state.is_held(name);
        let waited = self.shared.changed.wait_timeout_while(self.shared.lock(), left, is_held);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        !state.is_held(name)
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

impl<H> Instance<H> {
    /// Begins anew with it, and answers what is to be closed: not by who has the state locked.
    #[must_use]
    fn forget(&mut self) -> Vec<H> {
        self.cycle = Cycle::default();
        mem::take(&mut self.armed)
    }
}

impl<H> Closing<H> {
    fn add(&mut self, name: &InstanceName, armed: Vec<H>) {
        if !armed.is_empty() {
            self.0.push((name.clone(), armed));
        }
    }

    fn names(&self) -> impl Iterator<Item = &InstanceName> {
        self.0.iter().map(|(name, _)| name)
    }

    fn has(&self, name: &InstanceName) -> bool {
        self.names().any(|of| of == name)
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Those that no thread closes yet.
    fn waiting(&self) -> usize {
        self.0.iter().filter(|(_, armed)| !armed.is_empty()).count()
    }

    /// One of those, for who closes it and says so by [`Self::closed`].
    fn take(&mut self) -> Option<(InstanceName, Vec<H>)> {
        let (name, armed) = self.0.iter_mut().find(|(_, armed)| !armed.is_empty())?;
        Some((name.clone(), mem::take(armed)))
    }

    fn closed(&mut self, name: &InstanceName) {
        // Where several are closed of the same instance, one is as good as the other.
        if let Some(at) = self.0.iter().position(|(of, armed)| of == name && armed.is_empty()) {
            self.0.swap_remove(at);
        }
    }
}

impl<H> State<H> {
    /// Whether anything is in the way of others who stop it or note its writes.
    fn is_held(&self, name: &InstanceName) -> bool {
        self.busy.as_ref() == Some(name) || self.closing.has(name)
    }
}

impl<H: Send + 'static> Drop for Scanner<H> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.stopping = true;
        // Not left to the thread, which may be at a look that does not end.
        for (name, of) in mem::take(&mut state.instances) {
            state.closing.add(&name, of.armed);
        }
        self.shared.changed.notify_all();
        self.shared.close(state);
        let thread = self.thread.take();
        let has_ended = || thread.as_ref().is_none_or(JoinHandle::is_finished);
        // It ends after the look that it is at, and that may wait for a lock which somebody has who waits for a disk.
        let deadline = Instant::now() + END_LIMIT;
        while !(has_ended() && self.shared.lock().closing.is_empty()) {
            if Instant::now() >= deadline {
                let state = self.shared.lock();
                let busy = state.busy.clone();
                let closing: Vec<InstanceName> = state.closing.names().cloned().collect();
                drop(state);
                // They have what they need, and end by themselves if the kernel lets them go on.
                if let Some(instance) = busy {
                    let name = thread.as_ref().and_then(|thread| thread.thread().name()).unwrap_or_default();
                    tracing::warn!(%instance, name, "a look at memory does not end: its thread is left behind");
                }
                for instance in closing {
                    tracing::warn!(%instance, "what notes its writes does not close: a thread is left behind");
                }
                return;
            }
            thread::sleep(END_POLL);
        }
        // One that has panicked has nothing to say here.
        drop(thread.map(JoinHandle::join));
    }
}

// Not derived: that would ask it of `H` as well.
impl<H> Default for Shared<H> {
    fn default() -> Self {
        let state = State {
            busy: None,
            instances: BTreeMap::new(),
            closing: Closing(Vec::new()),
            cost: AgesCost::default(),
            stopping: false,
        };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }
}

impl<H: Send + 'static> Shared<H> {
    fn lock(&self) -> MutexGuard<'_, State<H>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Unlocks the state, and closes what waits for that, of each instance in a thread of its own: the kernel may wait for a process's lock there without
    /// an end, and neither a window nor another instance must wait for that.
    fn close(self: &Arc<Self>, state: MutexGuard<'_, State<H>>) {
        let waiting = state.closing.waiting();
        drop(state);
        // A thread that was started for one of them may not have taken it yet. Then one of these finds nothing to do.
        for _ in 0..waiting {
            let shared = self.clone();
            let thread = thread::Builder::new().name("ages-closing".to_owned());
            if let Err(error) = thread.spawn(move || shared.close_next()) {
                tracing::warn!(%error, "no thread to close what notes writes: the next window tries again");
                return;
            }
        }
    }

    /// Closes what waits for that of one instance; `false` if there is none.
    fn close_next(&self) -> bool {
        let Some((name, armed)) = self.lock().closing.take() else { return false };
        drop(armed);
        self.lock().closing.closed(&name);
        self.changed.notify_all();
        true
    }

    fn run(
        self: &Arc<Self>,
        budget_share: f64,
        mut look: impl FnMut(&Path, &mut Cycle, &mut Vec<H>, Instant) -> Duration,
    ) {
        let (began, mut budget) = (Instant::now(), Budget::new(budget_share));
        let (cpu_before, mut elsewhere) = (thread_cpu_time(), Duration::ZERO);
        let mut state = self.lock();
        state.cost.budget_share = budget_share;
        while !state.stopping {
            let now = began.elapsed();
            // Of what is not closed yet, writes can't be noted anew.
            let next = state.instances.iter().filter(|(name, of)| !of.disturbed && !state.closing.has(name));
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
            let mut armed = mem::take(&mut of.armed);
            state.busy = Some(name.clone());
            drop(state);
            elsewhere += look(&cgroup, &mut cycle, &mut armed, began);
            let spent = thread_cpu_time().saturating_sub(cpu_before) + elsewhere;
            budget.spend(spent.saturating_sub(budget.spent));
            state = self.lock();
            if let Some(of) = state.instances.get_mut(&name).filter(|of| !of.disturbed && of.cgroup == cgroup)
            {
                of.cycle = cycle;
                of.armed = mem::take(&mut armed);
            }
            // In the same moment, so that nobody who waits is told between them.
            state.closing.add(&name, armed);
            state.busy = None;
            self.changed.notify_all();
            state.cost.looks += 1;
            state.cost.used_share = spent.as_secs_f64() / began.elapsed().as_secs_f64().max(1e-3);
            self.close(state);
            state = self.lock();
        }
        drop(state);
        // For these there was no thread to be had.
        while self.close_next() {}
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
    use std::sync::{
        atomic::{AtomicBool, Ordering},
        mpsc,
    };

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    /// Stands for what notes writes: to close it takes until the test lets go of the other end.
    struct Held {
        closes: mpsc::Receiver<()>,
        is_closed: Arc<AtomicBool>,
    }

    impl Drop for Held {
        fn drop(&mut self) {
            _ = self.closes.recv();
            self.is_closed.store(true, Ordering::SeqCst);
        }
    }

    fn held() -> (Held, mpsc::Sender<()>, Arc<AtomicBool>) {
        let (lets_go, closes) = mpsc::channel();
        let is_closed = Arc::new(AtomicBool::new(false));
        (Held { closes, is_closed: is_closed.clone() }, lets_go, is_closed)
    }

    fn is_set(flag: &AtomicBool) -> bool {
        flag.load(Ordering::SeqCst)
    }

    fn one_and_other() -> (InstanceName, InstanceName) {
        ("one".parse().unwrap(), "other".parse().unwrap())
    }

    /// Where [`one_and_other`] are.
    const ONE_AND_OTHER: [&str; 2] = ["/one", "/other"];

    /// One that has got these by its first looks at [`one_and_other`].
    fn holding(held: [Held; 2]) -> Scanner<Held> {
        let cgroups = ONE_AND_OTHER.map(PathBuf::from);
        let mut held: BTreeMap<PathBuf, Held> = cgroups.into_iter().zip(held).collect();
        let look = move |cgroup: &Path, cycle: &mut Cycle, armed: &mut Vec<Held>, began: Instant| {
            armed.extend(held.remove(cgroup));
            cycle.was_cleared(began.elapsed());
            Duration::ZERO
        };
        let scanner: Scanner<Held> = Scanner::spawn("a-test", 1.0, look).unwrap();
        let (one, other) = one_and_other();
        for (name, cgroup) in [&one, &other].into_iter().zip(ONE_AND_OTHER) {
            scanner.track(name, Path::new(cgroup));
            until("it is held", || {
                scanner.shared.lock().instances.get(name).is_some_and(|of| !of.armed.is_empty())
            });
        }
        scanner
    }

    fn until(what: &str, mut is_so: impl FnMut() -> bool) {
        let deadline = Instant::now() + LONG;
        while !is_so() {
            assert!(Instant::now() < deadline, "never: {what}");
            thread::sleep(END_POLL);
        }
    }

    /// What a window does must not wait.
    fn in_a_window(scanner: &Arc<Scanner<Held>>, work: impl FnOnce(&Scanner<Held>) + Send + 'static) {
        let (scanner, (tell, told)) = (scanner.clone(), mpsc::channel());
        thread::spawn(move || {
            work(&scanner);
            drop(scanner);
            _ = tell.send(());
        });
        told.recv_timeout(LONG).expect("a window waits for a close");
    }

    /// Whether one has been looked at since it was forgotten.
    fn was_looked_at(scanner: &Scanner<Held>, name: &InstanceName) -> bool {
        scanner.shared.lock().instances.get(name).is_some_and(|of| of.cycle.cleared.is_some())
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(20)
    }

    #[test]
    fn a_close_that_hangs_is_waited_for_only_by_who_needs_it_done() {
        type Way = fn(&Scanner<Held>, &InstanceName);
        let ways: [Way; 4] = [
            |scanner, _| scanner.disturbed(|_| true),
            |scanner, name| scanner.disturb(name),
            |scanner, name| scanner.untrack(name),
            |scanner, name| scanner.track(name, Path::new("/elsewhere")),
        ];
        for way in ways {
            let (one, other) = one_and_other();
            let (hangs, lets_go, is_closed) = held();
            let (at_once, others, is_other_closed) = held();
            drop(others);
            let scanner = Arc::new(holding([hangs, at_once]));
            let name = one.clone();
            in_a_window(&scanner, move |scanner| way(scanner, &name));
            assert!(!scanner.leave_alone(&one, soon()));
            assert!(scanner.leave_alone(&other, Instant::now() + LONG));
            assert!(is_set(&is_other_closed) && !is_set(&is_closed));
            drop(lets_go);
            assert!(scanner.leave_alone(&one, Instant::now() + LONG));
            assert!(is_set(&is_closed));
        }
    }

    #[test]
    fn nothing_is_begun_with_one_before_what_noted_its_writes_is_closed() {
        let (one, other) = one_and_other();
        let (hangs, lets_go, _) = held();
        let (at_once, others, _) = held();
        drop(others);
        let scanner = Arc::new(holding([hangs, at_once]));
        in_a_window(&scanner, |scanner| scanner.disturbed(|_| true));
        in_a_window(&scanner, |scanner| scanner.disturbed(|_| false));
        // Of two that wait, the first by name is looked at first.
        until("the other is looked at", || was_looked_at(&scanner, &other));
        assert!(!was_looked_at(&scanner, &one));
        drop(lets_go);
        until("it is looked at again", || was_looked_at(&scanner, &one));
    }

    #[test]
    fn what_a_look_leaves_to_be_closed_holds_up_no_other_look() {
        let (one, other) = one_and_other();
        let (hangs, lets_go, _) = held();
        let ((tell, told), (go_on, may_go_on)) = (mpsc::channel(), mpsc::channel::<()>());
        let mut hangs = Some(hangs);
        let look = move |_: &Path, cycle: &mut Cycle, armed: &mut Vec<Held>, began: Instant| {
            if let Some(hangs) = hangs.take() {
                armed.push(hangs);
                // The test may have failed already, and listen no more.
                _ = tell.send(());
                _ = may_go_on.recv();
            }
            cycle.was_cleared(began.elapsed());
            Duration::ZERO
        };
        let scanner: Arc<Scanner<Held>> = Arc::new(Scanner::spawn("a-test", 1.0, look).unwrap());
        scanner.track(&one, Path::new(ONE_AND_OTHER[0]));
        told.recv_timeout(LONG).unwrap();
        scanner.track(&other, Path::new(ONE_AND_OTHER[1]));
        let name = one.clone();
        in_a_window(&scanner, move |scanner| scanner.disturb(&name));
        assert!(!scanner.leave_alone(&one, soon()), "it is looked at");
        drop(go_on);
        until("the other is looked at", || was_looked_at(&scanner, &other));
        assert!(!scanner.leave_alone(&one, soon()), "what was left is open");
        drop(lets_go);
        assert!(scanner.leave_alone(&one, Instant::now() + LONG));
    }

    #[test]
    fn the_end_waits_for_what_is_closed_and_what_hangs_keeps_nothing_else_open() {
        for hangs in [false, true] {
            let (slow, lets_go, is_closed) = held();
            let (at_once, others, is_other_closed) = held();
            drop(others);
            let scanner = holding([slow, at_once]);
            let release = thread::spawn(move || {
                if !hangs {
                    thread::sleep(Duration::from_millis(50));
                    drop(lets_go);
                    return None;
                }
                Some(lets_go)
            });
            let began = Instant::now();
            drop(scanner);
            let took = began.elapsed();
            assert_eq!((is_set(&is_closed), is_set(&is_other_closed)), (!hangs, true), "after {took:?}");
            if hangs {
                assert!(took >= END_LIMIT && took < LONG, "{took:?}");
            }
            // It is closed as soon as it can be.
            drop(release.join().unwrap());
            until("it is closed", || is_set(&is_closed));
        }
    }

    #[test]
    fn the_end_waits_for_a_look_and_leaves_one_behind_that_does_not_end() {
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
            let scanner: Scanner = Scanner::spawn("a-test", 1.0, look).unwrap();
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
            until("the thread ends", || Arc::strong_count(&shared) == 1);
            assert!(shared.lock().instances.is_empty());
        }
    }

    #[test]
    fn a_look_that_does_not_end_is_not_waited_for_without_end() {
        let scanner: Scanner = Scanner { shared: Arc::default(), thread: None };
        let (busy, other): (InstanceName, InstanceName) = ("busy".parse().unwrap(), "other".parse().unwrap());
        scanner.shared.lock().busy = Some(busy.clone());
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
