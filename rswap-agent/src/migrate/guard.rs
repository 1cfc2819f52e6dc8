//! The freeze's watchdog: a small process of its own that lets the instance go on when the agent can't.
//!
//! ```text
//! agent                         word            guard
//!   about to freeze             Idle -> Frozen    counts the time
//!   thawed                      Frozen -> Idle
//!   about to journal the commit Frozen -> Sealed  leaves the instance alone
//!   gone, or too slow           Frozen -> Taken   thaws the instance
//! ```
//!
//! Agent and guard change the word by compare-and-swap, so that either the commit is written or the instance is
//! thawed. An agent that was stopped and wakes up later finds `Taken` and can't commit. When the agent is gone after
//! `Sealed`, its journal says whether it came to write the commit ([`rules::guard`]).
//!
//! The guard is in a session and a cgroup of its own, so that it outlives whatever ends the agent. What it does is what
//! the next agent would do at its start ([`recovery::thaw`]), only at once.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd, RawFd},
        unix::process::CommandExt,
    },
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    fcntl::OFlag,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd,
};
use serde::{Deserialize, Serialize};

use super::{
    TaskError, journal, recovery,
    rules::{self, SourceState},
};
use crate::{
    instance::{Instance, cgroup, launch::Place},
    swap::storage,
    sys::{process, shared_word::SharedWord, spawn},
    tracee::tree,
};

/// How long the guard may take to be ready.
const READY_LIMIT: Duration = Duration::from_secs(10);
/// How often the guard looks at the word.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// The cgroup of the guards, beside the instances': no instance's name begins like this.
const CGROUP: &str = ".guard";

pub use rules::Guarded;

/// What a guard has to know.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    place: Place,
    instance: Instance,
    /// The source's journal.
    journal: PathBuf,
    /// Longest freeze, in milliseconds.
    limit_ms: u64,
    /// It is a volume that moves: what this record tells of has to be brought to its end first.
    #[serde(default)]
    storage: Option<PathBuf>,
}

/// A guard that watches over one migration; the agent's side. It goes when this is dropped.
#[derive(Debug)]
pub struct Guard {
    word: SharedWord,
    child: Child,
    /// Closed by the agent's end, whatever it is.
    life: Option<OwnedFd>,
}

impl Guard {
    /// Starts a guard over the freeze of `instance`, which may last `limit`. Returns when it watches.
    pub fn start(
        place: &Place,
        instance: &Instance,
        journal: PathBuf,
        limit: Duration,
    ) -> Result<Self, TaskError> {
        let limit_ms = limit.as_millis() as u64;
        Self::start_with(&Order {
            place: place.clone(),
            instance: instance.clone(),
            journal,
            limit_ms,
            storage: None,
        })
    }

    /// The same, over the move of a volume, of which `record` tells.
    pub fn start_for_volume(
        place: &Place,
        instance: &Instance,
        record: PathBuf,
        limit: Duration,
    ) -> Result<Self, TaskError> {
        // Nothing is committed by a journal: which copy counts is found by the recovery.
        let (journal, limit_ms) = (record.with_extension("none"), limit.as_millis() as u64);
        let (place, instance) = (place.clone(), instance.clone());
        Self::start_with(&Order { place, instance, journal, limit_ms, storage: Some(record) })
    }

    fn start_with(order: &Order) -> Result<Self, TaskError> {
        let word = SharedWord::create("rswap freeze")?;
        let (watched, life) = unistd::pipe2(OFlag::O_CLOEXEC)?;
        let mut child = Command::new("/proc/self/exe");
        child.arg0("rswap").arg("__guard");
        let [word_fd, life_fd] = [word.descriptor().as_raw_fd(), watched.as_raw_fd()];
        child.args([format!("--word={word_fd}"), format!("--life={life_fd}")]);
        child.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = process::spawn_with_descriptors(&mut child, vec![word_fd, life_fd])?;
        let given = child.stdin.take().ok_or("a guard without input")?;
        let ready = child.stdout.take().ok_or("a guard without output")?;
        let guard = Self { word, child, life: Some(life) };
        serde_json::to_writer(given, order)?;
        guard.wait_until_ready(ready)?;
        Ok(guard)
    }

    fn wait_until_ready(&self, mut ready: impl Read + AsFd) -> Result<(), TaskError> {
        let came =
            poll(&mut [PollFd::new(ready.as_fd(), PollFlags::POLLIN)], READY_LIMIT.as_millis() as u16)?;
        let mut byte = [0];
        if came == 0 || ready.read(&mut byte)? == 0 {
            return Err("the guard of the freeze did not start: nothing was frozen".into());
        }
        Ok(())
    }

    fn change(&self, from: Guarded, to: Guarded) -> Result<(), TaskError> {
        self.word.change(from as u32, to as u32).map_err(|found| {
            let text = match Guarded::from_number(found) {
                Some(Guarded::Taken) => {
                    "the freeze took too long, and its guard has let the instance go on".to_owned()
                }
                other => format!("the guard's word is {other:?} where {from:?} was due"),
            };
            text.into()
        })
    }

    /// From here on the guard undoes what was done to the instance if this process ends or takes too long.
    ///
    /// # Errors
    /// The guard is gone: the instance must not be frozen.
    pub fn arm(&self) -> Result<(), TaskError> {
        if tree::has_ended(self.child.id() as i32) {
            return Err("the guard of the freeze has ended: nothing was frozen; try again".into());
        }
        self.change(Guarded::Idle, Guarded::Frozen)
    }

    /// Nothing is done to the instance for the moment.
    ///
    /// # Errors
    /// It took too long.
    pub fn rest(&self) -> Result<(), TaskError> {
        self.change(Guarded::Frozen, Guarded::Idle)
    }

    /// From here on the commit may be journalled, and the guard leaves the instance alone.
    ///
    /// # Errors
    /// It was too late: the instance goes on.
    pub fn seal(&self) -> Result<(), TaskError> {
        self.change(Guarded::Frozen, Guarded::Sealed)
    }

    /// The instance goes on, or is gone: there is nothing to be watched over.
    pub fn disarm(&self) {
        for from in [Guarded::Frozen, Guarded::Sealed] {
            // Whoever has taken it meanwhile thaws it, too.
            let _ = self.word.change(from as u32, Guarded::Idle as u32);
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.life = None;
        if let Err(error) = self.child.wait() {
            tracing::warn!(%error, "a guard was not waited for");
        }
    }
}

/// Runs as the guard: `word` and `life` are descriptors that the agent handed down, the order comes on standard input.
pub fn run(word: RawFd, life: RawFd) -> Result<(), TaskError> {
    let [word, life] = [word, life].map(spawn::inherited_descriptor);
    let word = SharedWord::map(File::from(word))?;
    let order: Order = serde_json::from_reader(io::stdin().lock())?;
    detach(&order.place);
    let agent = unistd::getppid().as_raw();
    let agent = (agent, process::pidfd_open(agent)?);
    io::stdout().write_all(b"!")?;
    io::stdout().flush()?;
    let mut frozen_since = None;
    loop {
        let gone = poll_for_end(&life)?;
        let now = Instant::now();
        let state = Guarded::from_number(word.get()).ok_or("the shared word is none of ours")?;
        frozen_since = (state == Guarded::Frozen).then(|| frozen_since.unwrap_or(now));
        let limit = Duration::from_millis(order.limit_ms);
        let too_long = frozen_since.is_some_and(|since| now - since > limit);
        let journal = || {
            let entry = journal::read::<SourceState>(&order.journal);
            // Without one there is nothing that could be committed; one that can't be read must be taken for the worst.
            match entry {
                Ok(entry) => Some(entry.state),
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                Err(_) => Some(SourceState::Committed),
            }
        };
        match rules::guard(state, gone, too_long, journal) {
            rules::GuardAction::Watch => {}
            rules::GuardAction::Leave => return Ok(()),
            rules::GuardAction::Take => {
                if word.change(state as u32, Guarded::Taken as u32).is_ok() {
                    match &order.storage {
                        Some(record) => take_volume(&order.instance, record, &agent, gone)?,
                        None => take(&order, (!gone).then_some(&agent))?,
                    }
                    return Ok(());
                }
            }
        }
    }
}

/// The standard error output may be gone, as the agent is: nobody may stand still for that.
fn say(words: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "rswap: {words}");
}

/// Lets the instance go on.
fn take(order: &Order, living_agent: Option<&(i32, OwnedFd)>) -> Result<(), TaskError> {
    let Order { place, instance, .. } = order;
    if let Some((pid, pidfd)) = living_agent
        && is_traced_by(instance, *pid)
    {
        // It holds threads by ptrace, which only its end takes from it; they must not run before their sockets can.
        say(format_args!("{} is frozen for too long: ending the agent {pid}, which holds it", instance.name));
        cgroup::freeze(&instance.cgroup, true)?;
        process::pidfd_send_signal(pidfd, libc::SIGKILL)?;
        let mut end = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        poll(&mut end, READY_LIMIT.as_millis() as u16)?;
    }
    say(format_args!("the agent can't let {} go on: its guard does", instance.name));
    recovery::thaw(place, instance)
}

/// Brings the move of a volume to its end. Nobody else may be at it: an agent that is too slow is ended.
fn take_volume(
    instance: &Instance,
    record: &std::path::Path,
    (pid, pidfd): &(i32, OwnedFd),
    gone: bool,
) -> Result<(), TaskError> {
    if !gone {
        say(format_args!("{} is frozen for too long: ending the agent {pid}", instance.name));
        process::pidfd_send_signal(pidfd, libc::SIGKILL)?;
    }
    // Its descriptors go before it lets go of what it traces.
    let mut end = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    let ends = |end: &mut [PollFd<'_>]| poll(end, READY_LIMIT.as_millis() as u16).map(|ready| ready > 0);
    let mut has_ended = ends(&mut end)?;
    if gone && !has_ended {
        // It has let go of its guard in the middle of a move, and lives: what it does now nobody knows.
        say(format_args!("the agent {pid} has given {} up while it is frozen: ending it", instance.name));
        process::pidfd_send_signal(pidfd, libc::SIGKILL)?;
        has_ended = ends(&mut end)?;
    }
    if !has_ended {
        say(format_args!(
            "the agent {pid} does not end, a disk does not answer it: {} stands still",
            instance.name
        ));
        // Until then a volume has two masters.
        loop {
            match poll(&mut end, PollTimeout::NONE) {
                Err(nix::errno::Errno::EINTR) => {}
                Ok(_) => break,
                Err(error) => return Err(error.into()),
            }
        }
    }
    say(format_args!("the agent can't bring a volume of {} to its end: its guard does", instance.name));
    Ok(storage::recover(record)?)
}

impl storage::Watch for Guard {
    fn arm(&self) -> Result<(), String> {
        Guard::arm(self).map_err(|error| error.to_string())
    }

    fn disarm(&self) {
        Guard::disarm(self);
    }
}

fn is_traced_by(instance: &Instance, agent: i32) -> bool {
    let is_its_thread = |tid: i32| std::path::Path::new(&format!("/proc/{agent}/task/{tid}")).exists();
    tree::listed(instance).unwrap_or_default().into_iter().filter_map(tree::tracer).any(is_its_thread)
}

/// Waits a moment for the agent's end.
fn poll_for_end(life: &OwnedFd) -> io::Result<bool> {
    let mut watched = [PollFd::new(life.as_fd(), PollFlags::POLLIN)];
    match poll(&mut watched, LOOK_EVERY.as_millis() as u16) {
        Ok(0) | Err(nix::errno::Errno::EINTR) => Ok(false),
        // The agent never writes: it is the end.
        Ok(_) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// Ends the guards that an agent has left behind: what they were about to do, this agent does.
pub fn end_all(place: &Place) {
    let Ok(path) = cgroup_of(place) else { return };
    if let Err(error) = cgroup::kill(&path).and_then(|()| cgroup::remove(&path))
        && path.exists()
    {
        tracing::error!(%error, "a guard of an earlier agent can't be ended");
    }
}

fn cgroup_of(place: &Place) -> Result<PathBuf, TaskError> {
    Ok(cgroup::mount_point()?.join(&place.cgroup_parent).join(CGROUP))
}

/// Out of whatever might end with the agent. What fails only makes the guard easier to kill.
fn detach(place: &Place) {
    let _ = unistd::setsid();
    let moved = cgroup_of(place).map_err(io::Error::other).and_then(|path| {
        fs::create_dir_all(&path)?;
        fs::write(path.join("cgroup.procs"), "0")
    });
    if let Err(error) = moved {
        say(format_args!("a guard stays in the agent's cgroup: {error}"));
    }
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
}
