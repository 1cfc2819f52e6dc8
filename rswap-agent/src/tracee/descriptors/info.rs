//! What `/proc/PID/fd` and `/proc/PID/fdinfo` tell of one descriptor, and which kind it is.

use std::{fs, os::fd::RawFd};

use super::{
    super::{TraceeError, image::DescriptorKind, read_proc},
    Look, epolls, events, files, inotify, pidfds, pipes, socket,
};

/// What `/proc/PID/fd` and `/proc/PID/fdinfo` tell of one descriptor.
pub(super) struct Info {
    pub(super) target: String,
    pub(super) flags: i32,
    pub(super) position: i64,
    pub(super) text: String,
}

/// A kind, or what the descriptor is and what would make it possible to carry it.
pub(super) type Kind = Result<DescriptorKind, (String, &'static str)>;

impl Info {
    /// `None` when the descriptor was closed meanwhile.
    pub(super) fn read(pid: i32, fd: RawFd) -> Result<Option<Self>, TraceeError> {
        let link = format!("/proc/{pid}/fd/{fd}");
        let Ok(target) = fs::read_link(&link) else { return Ok(None) };
        let path = format!("/proc/{pid}/fdinfo/{fd}");
        let text = read_proc(&path)?;
        let bad = || TraceeError::Proc { path: path.clone(), problem: "no flags or position in it".into() };
        let flags = field(&text, "flags:").and_then(|v| i32::from_str_radix(v, 8).ok()).ok_or_else(bad)?;
        let position = field(&text, "pos:").and_then(|v| v.parse().ok()).ok_or_else(bad)?;
        Ok(Some(Self { target: target.to_string_lossy().into_owned(), flags, position, text }))
    }

    /// What it is; with [`Look::contents`], also what waits in it.
    pub(super) fn kind(&self, look: &Look<'_>) -> Result<Kind, TraceeError> {
        Ok(match self.target.as_str() {
            target if target.starts_with('/') => files::describe(self, look)?,
            target if target.starts_with("pipe:") => pipes::describe(self, look)?,
            target if target.starts_with("socket:") => socket::describe(&look.ours()?, look)?,
            "anon_inode:[eventfd]" => events::describe_event(self),
            "anon_inode:[signalfd]" => events::describe_signal(self),
            "anon_inode:[timerfd]" => events::describe_timer(self, look)?,
            "anon_inode:[eventpoll]" => {
                epolls::watched(self, look, look.all)?.map(|watched| DescriptorKind::Epoll { watched })
            }
            "anon_inode:inotify" => {
                inotify::describe(self, look)?.map(|watches| DescriptorKind::Inotify { watches })
            }
            "anon_inode:[pidfd]" => pidfds::describe(self, look),
            target => Err(refused(target)),
        })
    }

    /// A number in base `radix` of fdinfo.
    pub(super) fn number(&self, name: &str, radix: u32) -> Option<u64> {
        field(&self.text, name).and_then(|value| u64::from_str_radix(value, radix).ok())
    }
}

/// Kinds that are known, and can't be carried.
fn refused(target: &str) -> (String, &'static str) {
    let (name, remedy) = match target {
        "anon_inode:[io_uring]" => {
            ("an io_uring", "what the kernel works on for it can't be taken: switch the program to epoll")
        }
        "anon_inode:[fanotify]" => {
            ("a fanotify", "it watches this host's files: let the program use inotify")
        }
        "anon_inode:[userfaultfd]" => (
            "a userfaultfd of the program's own",
            "the kernel takes one for each mapping, and a migration needs that",
        ),
        "anon_inode:[perf_event]" => ("a perf event", "it counts this host's events: close it"),
        target if target.starts_with("anon_inode:bpf") => ("a bpf object", "it is this kernel's: close it"),
        target if target.starts_with("anon_inode:kvm") => {
            ("a virtual machine (KVM)", "its state is in this kernel")
        }
        target if target.starts_with("anon_inode:[landlock") || target.starts_with("anon_inode:landlock") => {
            ("a landlock ruleset", "not carried in this version")
        }
        target
            if target.starts_with("net:[") || target.starts_with("mnt:[") || target.starts_with("pid:[") =>
        {
            ("a namespace", "it is this kernel's: close it")
        }
        _ => return (target.to_owned(), "not carried in this version"),
    };
    (format!("{name} ({target})"), remedy)
}

/// What follows a name in fdinfo.
pub(super) fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
}
