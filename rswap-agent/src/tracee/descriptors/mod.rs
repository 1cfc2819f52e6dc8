//! Open files: what they are, and how they are made again. A file per kind; each tells how it's described at the source
//! and made at the destination.

mod around;
mod deleted;
mod epolls;
mod events;
mod fifos;
mod files;
mod info;
mod inotify;
mod locks;
mod outside;
mod pidfds;
mod pipes;
mod restore;
mod sharing;
mod signals;
mod socket;

use std::{
    fs,
    os::fd::{OwnedFd, RawFd},
};

use self::info::Info;
pub use self::{
    around::{Around, IN_FLIGHT},
    deleted::{Nameless, Origin},
    epolls::Watched,
    fifos::Fifo,
    files::Place,
    inotify::Watch,
    locks::{Lock, LockKind, give_up, of_fdinfo, set_here},
    restore::{Finals, Restorer, Surroundings},
    sharing::{connected_outside, share},
    signals::SignalTarget,
};
use super::{
    TraceeError,
    image::{Descriptor, DescriptorKind},
    tcp,
};
use crate::sys::process;

/// Looks at one descriptor of a program that runs, and opens and closes it all the time, before what fails is an error.
const LOOKS: u32 = 5;

/// An open descriptor that can't be carried.
#[derive(Clone, Debug)]
pub struct Refused {
    /// Which.
    pub fd: RawFd,
    /// What it is.
    pub what: String,
    /// What would make it possible.
    pub remedy: &'static str,
}

/// All open files of process `pid`, and those that can't be carried. Touches nothing; the answer is only
/// consistent when the process is stopped. With `contents`, what waits in pipes and sockets is read as well.
pub fn describe(
    pid: i32,
    around: &Around,
    contents: bool,
) -> Result<(Vec<Descriptor>, Vec<Refused>), TraceeError> {
    let pidfd = process::pidfd_open(pid).map_err(TraceeError::call("pidfd_open", pid))?;
    let mut found = Found::default();
    let mut in_flight = around.next_in_flight();
    let all = list(pid)?;
    for &fd in &all {
        let mut looks = 0;
        loop {
            looks += 1;
            match found.add(&Look { pidfd: &pidfd, pid, fd, all: &all, around, contents }, pid, fd) {
                // A program that runs may have closed it, or ended, since the list was made,
                Err(_) if fs::symlink_metadata(format!("/proc/{pid}/fd/{fd}")).is_err() => break,
                // or have opened something else under its number in the middle of the look.
                Err(_) if !contents && looks < LOOKS => {}
                added => break added?,
            }
        }
        // In the queues of those there may be others.
        while in_flight < around.next_in_flight() {
            found.add_in_flight(around, pid, in_flight)?;
            in_flight += 1;
        }
    }
    found.finish();
    Ok((found.descriptors, found.refused))
}

/// What was found so far among the descriptors of one process.
#[derive(Default)]
struct Found {
    descriptors: Vec<Descriptor>,
    /// What the link of each says. Descriptors of one description say the same, and asking the kernel about every pair
    /// of thousands would take longer than everything else.
    targets: Vec<String>,
    refused: Vec<Refused>,
}

impl Found {
    /// Adds a descriptor that waits in a queue, under the number that stands for it.
    fn add_in_flight(&mut self, around: &Around, pid: i32, number: RawFd) -> Result<(), TraceeError> {
        let (ours, fd) = around.location(pid, number);
        let pidfd = process::pidfd_open(ours).map_err(TraceeError::call("pidfd_open", ours))?;
        self.add(&Look { pidfd: &pidfd, pid: ours, fd, all: &[], around, contents: true }, pid, number)
    }

    /// Refuses those that only a process can have.
    fn finish(&mut self) {
        for descriptor in &mut self.descriptors {
            descriptor.numbers.sort_unstable();
            let fd = descriptor.numbers[0].0;
            let what = match &descriptor.kind {
                _ if fd < around::IN_FLIGHT => continue,
                DescriptorKind::Epoll { .. } => "an epoll",
                _ if !descriptor.locks.is_empty() => "a locked file",
                _ if tcp::connection(descriptor).is_some() => "a TCP connection",
                _ => continue,
            };
            let what = format!("{what} in the queue of a unix socket");
            self.refused.push(Refused { fd, what, remedy: "try again when the program has read it" });
        }
    }

    /// Adds the descriptor that is looked at, as `number` of process `holder`.
    fn add(&mut self, look: &Look<'_>, holder: i32, number: RawFd) -> Result<(), TraceeError> {
        let Look { pid, fd, .. } = *look;
        let Some(info) = Info::read(pid, fd)? else { return Ok(()) };
        let close_on_exec = info.flags & libc::O_CLOEXEC != 0;
        let flags = info.flags & !libc::O_CLOEXEC;
        if let Some(same) = self.shared_with(look, holder, &info.target)? {
            same.numbers.push((number, close_on_exec));
            return Ok(());
        }
        let locks = match locks::parse(&info.text) {
            Ok(locks) => locks,
            Err((what, remedy)) => {
                self.refused.push(Refused { fd: number, what, remedy });
                return Ok(());
            }
        };
        for (_, file) in locks.iter().filter(|_| look.contents) {
            if locks::is_waited_for(file)? {
                let (what, remedy) = ("a lock that a process outside waits for".into(), "try again later");
                self.refused.push(Refused { fd: number, what, remedy });
            }
        }
        match info.kind(look)? {
            Ok(kind) => {
                let signals = match flags & libc::O_PATH {
                    0 => signals::describe(&look.ours()?, pid)?,
                    _ => None,
                };
                let numbers = vec![(number, close_on_exec)];
                let locks = locks.into_iter().map(|(lock, _)| lock).collect();
                self.descriptors.push(Descriptor { numbers, flags, signals, locks, kind });
                self.targets.push(info.target);
            }
            Err((what, remedy)) => self.refused.push(Refused { fd: number, what, remedy }),
        }
        Ok(())
    }
}

impl Found {
    /// The description among those of process `holder` that the one that is looked at is.
    fn shared_with(
        &mut self,
        look: &Look<'_>,
        holder: i32,
        target: &str,
    ) -> Result<Option<&mut Descriptor>, TraceeError> {
        let alike = self.descriptors.iter_mut().zip(&self.targets).filter(|(_, its)| *its == target);
        for (descriptor, _) in alike {
            let (pid, first) = look.around.location(holder, descriptor.numbers[0].0);
            let same = process::same_description_of(pid, first, look.pid, look.fd);
            if same.map_err(TraceeError::call("kcmp", pid))? {
                return Ok(Some(descriptor));
            }
        }
        Ok(None)
    }
}

/// Where and how to look at one descriptor.
struct Look<'a> {
    pidfd: &'a OwnedFd,
    pid: i32,
    fd: RawFd,
    /// All descriptors of the process.
    all: &'a [RawFd],
    around: &'a Around,
    contents: bool,
}

impl Look<'_> {
    /// Our duplicate of it.
    fn ours(&self) -> Result<OwnedFd, TraceeError> {
        process::pidfd_getfd(self.pidfd, self.fd).map_err(TraceeError::call("pidfd_getfd", self.pid))
    }
}

/// The descriptor numbers of `pid`, ascending.
fn list(pid: i32) -> Result<Vec<RawFd>, TraceeError> {
    let path = format!("/proc/{pid}/fd");
    let mut numbers = Vec::new();
    for entry in fs::read_dir(&path).map_err(TraceeError::proc(path.as_str()))? {
        let entry = entry.map_err(TraceeError::proc(path.as_str()))?;
        numbers.extend(entry.file_name().to_str().and_then(|name| name.parse::<RawFd>().ok()));
    }
    numbers.sort_unstable();
    Ok(numbers)
}
