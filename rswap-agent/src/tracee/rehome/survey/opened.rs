//! Descriptors that are open on a directory.

use std::{
    fs,
    os::{fd::RawFd, unix::fs::MetadataExt},
    path::Path,
};

use super::{
    super::{Description, Member, Nameless, Target},
    Look,
};
use crate::{
    sys::process::same_description_of,
    tracee::{TraceeError, descriptors, read_proc},
};

/// Bytes of a deleted file that are copied in the freeze.
const NAMELESS_LIMIT: u64 = 64 << 20;

impl Look<'_> {
    /// Takes in a descriptor, if it is of the directory.
    pub(super) fn descriptor(&mut self, pid: i32, fd: RawFd, link: &Path) -> Result<(), TraceeError> {
        let Ok(text) = read_proc(&format!("/proc/{pid}/fdinfo/{fd}")) else { return Ok(()) };
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let item = || format!("descriptor {fd} ({})", link.display());
        let name = link.to_string_lossy();
        if name.starts_with("socket:") && field("scm_fds:").is_some_and(|count| count != "0") {
            self.refuse(pid, item(), "descriptors wait in its queue: try again when they are read");
        }
        if name == "anon_inode:inotify" && self.watches(&text) {
            self.refuse(
                pid,
                item(),
                "it watches files of the volume (inotify): not re-homed in this version",
            );
        }
        if name == "anon_inode:[fanotify]" {
            self.refuse(pid, item(), "a fanotify can't be re-homed: let the program use inotify");
        }
        if !name.starts_with('/') {
            return Ok(());
        }
        let place = format!("/proc/{pid}/fd/{fd}");
        let Ok(metadata) = fs::metadata(&place) else { return Ok(()) };
        if field("mnt_id:").and_then(|id| id.parse().ok()) != Some(self.mount) {
            if metadata.dev() == self.device && self.inodes.contains_key(&metadata.ino()) {
                self.refuse(
                    pid,
                    item(),
                    "a file of the volume, opened by another way: open it by the volume",
                );
            }
            return Ok(());
        }
        let flags = field("flags:").and_then(|flags| i32::from_str_radix(flags, 8).ok());
        let position: Option<i64> = field("pos:").and_then(|position| position.parse().ok());
        let (Some(flags), Some(position)) = (flags, position) else { return Ok(()) };
        let locks = match descriptors::of_fdinfo(&text) {
            Ok(locks) => locks,
            Err((what, reason)) => {
                self.refuse(pid, format!("descriptor {fd}: {what}"), reason);
                return Ok(());
            }
        };
        if !(metadata.is_file() || metadata.is_dir()) {
            self.refuse(pid, item(), "of a volume only files and directories are re-homed: close it");
            return Ok(());
        }
        if flags & libc::O_ASYNC != 0 {
            self.refuse(pid, item(), "it sends signals (O_ASYNC): not re-homed in this version");
        }
        if metadata.is_dir() && position != 0 {
            self.refuse(pid, item(), "the directory is being read: try again when it is read");
            return Ok(());
        }
        let Some(target) = self.target(pid, link, &place, &metadata, &item())? else { return Ok(()) };
        let (own, of_process): (Vec<_>, Vec<_>) =
            locks.into_iter().partition(|lock| lock.kind != descriptors::LockKind::Process);
        let member = Member { pid, fd, close_on_exec: flags & libc::O_CLOEXEC != 0, locks: of_process };
        let flags = flags & !libc::O_CLOEXEC;
        for one in &mut self.plan.descriptions {
            if (&one.target, one.flags, one.position) != (&target, flags, position) {
                continue;
            }
            let Some(first) = one.members.first() else { continue };
            match same_description_of(first.pid, first.fd, pid, fd) {
                Ok(true) => {
                    one.members.push(member);
                    return Ok(());
                }
                Ok(false) => {}
                // One of them is gone meanwhile.
                Err(error) if error.raw_os_error() == Some(libc::EBADF) => {}
                Err(error) => return Err(TraceeError::call("kcmp", pid)(error)),
            }
        }
        let members = vec![member];
        self.plan.descriptions.push(Description { target, flags, position, locks: own, members });
        Ok(())
    }

    /// What `place` is open on; `None`, and refused, if nobody can tell.
    pub(super) fn target(
        &mut self,
        pid: i32,
        link: &Path,
        place: &str,
        metadata: &fs::Metadata,
        item: &str,
    ) -> Result<Option<Target>, TraceeError> {
        if metadata.nlink() == 0 {
            if !metadata.is_file() {
                self.refuse(pid, item, "the directory was removed: close it");
                return Ok(None);
            }
            if metadata.len() > NAMELESS_LIMIT {
                self.refuse(
                    pid,
                    item,
                    "the file was deleted, and is longer than the 64 MiB that are copied of such",
                );
                return Ok(None);
            }
            let inode = (metadata.dev(), metadata.ino());
            let access = (metadata.mode() & 0o7777, metadata.uid(), metadata.gid());
            let known = self.plan.nameless.iter().position(|known| known.inode == inode);
            let number = known.unwrap_or_else(|| {
                self.plan.nameless.push(Nameless { inode, access });
                self.plan.nameless.len() - 1
            });
            return Ok(Some(Target::Nameless(number)));
        }
        match self.named(link, Some(place)) {
            Some(name) => Ok(Some(Target::Name(name))),
            None => {
                self.refuse(pid, item, "its name in the volume is not found: try again");
                Ok(None)
            }
        }
    }

    /// Whether an inotify watches something in the volume.
    fn watches(&self, text: &str) -> bool {
        text.lines().filter(|line| line.starts_with("inotify ")).any(|line| {
            let number = |name: &str| {
                let word = line.split_whitespace().find_map(|word| word.strip_prefix(name))?;
                u64::from_str_radix(word, 16).ok()
            };
            number("sdev:") == Some(self.kernel_device)
                && number("ino:").is_some_and(|ino| self.inodes.contains_key(&ino))
        })
    }
}
