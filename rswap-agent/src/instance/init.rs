//! The first process of an instance's PID namespace: it starts the command (or waits for one to be
//! rebuilt), adopts orphans, reaps, and ends with the command's status.
//!
//! It does not migrate: each host gives an arriving instance one of its own.

use std::{
    ffi::CString,
    fs::{File, OpenOptions},
    io::{self, Read},
    os::{fd::RawFd, unix::ffi::OsStrExt},
    path::PathBuf,
};

use nix::{
    mount::{MsFlags, mount},
    sys::{
        signal::SigSet,
        wait::{WaitStatus, wait},
    },
    unistd,
};

use super::{InstanceError, volume};
use crate::{
    sys::{
        clock::Clocks,
        spawn::{self, Forked},
    },
    tracee::link::STUB_END,
};

/// What the init is to do.
#[derive(Clone, Debug)]
pub struct InitOptions {
    /// A pipe: the network is ready when a byte comes.
    pub go: RawFd,
    /// A session of its own, with input and output on /dev/null (or `log`).
    pub detach: bool,
    /// Where output goes when detached.
    pub log: Option<PathBuf>,
    /// Directories of the host, and where they are mounted.
    pub volumes: Vec<(PathBuf, PathBuf)>,
    /// What is started.
    pub work: Work,
}

/// What an init starts.
#[derive(Clone, Debug)]
pub enum Work {
    /// A command.
    Command(Vec<String>),
    /// A process that waits to be rebuilt.
    Stub {
        /// Its pid.
        pid: i32,
        /// Its end of the socket by which it is given descriptors.
        link: RawFd,
        /// By how much its clocks are ahead of the kernel's.
        offsets: Option<Clocks>,
    },
}

/// Runs as pid 1 of a new PID namespace; returns the exit status to end with.
pub fn run(options: InitOptions) -> Result<i32, InstanceError> {
    let io = InstanceError::io::<nix::Error>;
    // `rswap run` has some blocked; a plain command starts with none.
    SigSet::empty().thread_set_mask().map_err(io("unblocking signals"))?;
    let none: Option<&str> = None;
    // Mounts made on the host later appear here, but not the other way round.
    mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none)
        .map_err(io("making / a slave mount"))?;
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none).map_err(io("mounting /proc"))?;
    for (from, at) in &options.volumes {
        volume::mount_at(from, at)?;
    }
    if options.detach {
        unistd::setsid().map_err(InstanceError::io("starting a session"))?;
        own_terminals()?;
        redirect(options.log.as_deref())?;
    }
    wait_for_go(options.go)?;
    if options.detach {
        // A detached instance must not hold on to what its starter happened to have open.
        let mut first = 3;
        if let Work::Stub { link, .. } = options.work {
            spawn::duplicate_as(link, STUB_END).map_err(InstanceError::io("keeping the stub's link"))?;
            first = STUB_END as u32 + 1;
        }
        spawn::close_from(first);
    }
    let main = match &options.work {
        Work::Command(command) => start(command)?,
        Work::Stub { pid, offsets, .. } => {
            offsets
                .map_or(Ok(()), Clocks::make_namespace)
                .map_err(InstanceError::io("making a time namespace (CONFIG_TIME_NS, CAP_SYS_TIME)"))?;
            match spawn::fork(Some(*pid)).map_err(InstanceError::io("making the stub"))? {
                Forked::Child => spawn::pause_for_ever(),
                Forked::Parent(pid) => {
                    spawn::close_from(STUB_END as u32);
                    pid
                }
            }
        }
    };
    loop {
        match wait() {
            Ok(WaitStatus::Exited(pid, code)) if pid.as_raw() == main => return Ok(code),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid.as_raw() == main => {
                return Ok(128 + signal as i32);
            }
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(InstanceError::io("waiting for the command")(error)),
        }
    }
}

/// Gives the instance pseudo-terminals of its own: those that its programs make have the same numbers wherever it goes. What
/// isn't detached keeps the host's, which its starter's terminal is one of.
fn own_terminals() -> Result<(), InstanceError> {
    let data = Some("newinstance,ptmxmode=0666,mode=0620,gid=5");
    if !std::path::Path::new("/dev/pts").is_dir() {
        return Ok(());
    }
    mount(Some("devpts"), "/dev/pts", Some("devpts"), MsFlags::empty(), data)
        .map_err(InstanceError::io("mounting a devpts of the instance's own"))
}

fn wait_for_go(go: RawFd) -> Result<(), InstanceError> {
    let mut pipe = File::from(spawn::inherited_descriptor(go));
    let mut byte = [0];
    pipe.read_exact(&mut byte).map_err(InstanceError::io("waiting for the network (rswap has given up)"))
}

fn redirect(log: Option<&std::path::Path>) -> Result<(), InstanceError> {
    let null = File::options().read(true).write(true).open("/dev/null");
    let null = null.map_err(InstanceError::io("opening /dev/null"))?;
    unistd::dup2_stdin(&null).map_err(InstanceError::io("redirecting the input"))?;
    let output = match log {
        Some(path) => OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .map_err(InstanceError::io(format!("opening the log {}", path.display())))?,
        None => null,
    };
    unistd::dup2_stdout(&output).map_err(InstanceError::io("redirecting the output"))?;
    unistd::dup2_stderr(&output).map_err(InstanceError::io("redirecting the errors"))
}

fn start(command: &[String]) -> Result<i32, InstanceError> {
    let text = |word: &String| {
        CString::new(std::ffi::OsStr::new(word).as_bytes())
            .map_err(|error| InstanceError::io("a command with a NUL byte")(io::Error::other(error)))
    };
    let words = command.iter().map(text).collect::<Result<Vec<_>, _>>()?;
    let program = words.first().ok_or_else(|| InstanceError::Invalid("no command".into()))?;
    match spawn::fork(None).map_err(InstanceError::io("starting the command"))? {
        Forked::Parent(pid) => Ok(pid),
        Forked::Child => {
            // The runtime ignores SIGPIPE; a plain command starts with the default.
            let default = nix::sys::signal::SigHandler::SigDfl;
            let failed = spawn::set_handler(nix::sys::signal::Signal::SIGPIPE, default)
                .and_then(|()| unistd::execvp(program, &words).map(|_| ()));
            let error = failed.err().unwrap_or(nix::Error::EINVAL);
            eprintln!("rswap: {}: {}", command[0], error.desc());
            // As a shell has it: 127 when there is no such command, 126 when it can't be executed.
            std::process::exit(if error == nix::Error::ENOENT { 127 } else { 126 })
        }
    }
}
