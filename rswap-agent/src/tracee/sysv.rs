//! The SysV objects of an instance's IPC namespace: shared memory, semaphores and message queues, with their ids.
//!
//! The contents of a segment travel as those of other shared memory do ([`super::objects`]), and processes attach it in their
//! stubs.

use std::{
    fs::{self, File},
    io,
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use serde::{Deserialize, Serialize};

use crate::sys::{
    namespace,
    sysv::{self, Access},
};

/// `SHM_DEST`, in a segment's mode: it goes with its last user.
const REMOVED: u32 = 0o1000;
const PERMISSIONS: u32 = 0o777;

/// A segment of shared memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Its id.
    pub id: i32,
    /// Its key; 0 for none.
    pub key: i32,
    /// Its length, in bytes, as it was asked for.
    pub bytes: u64,
    /// Who owns it.
    pub access: Access,
    /// It goes with its last user.
    pub removed: bool,
}

/// What is in an IPC namespace besides segments.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Queues {
    /// Sets of semaphores.
    pub semaphores: Vec<Semaphores>,
    /// Message queues.
    pub messages: Vec<Messages>,
}

/// A set of semaphores.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Semaphores {
    /// Its id.
    pub id: i32,
    /// Its key; 0 for none.
    pub key: i32,
    /// Who owns it.
    pub access: Access,
    /// Their values.
    pub values: Vec<u16>,
}

/// A message queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Messages {
    /// Its id.
    pub id: i32,
    /// Its key; 0 for none.
    pub key: i32,
    /// Who owns it.
    pub access: Access,
    /// What is in it: type and text.
    pub messages: Vec<(i64, Vec<u8>)>,
    /// Bytes that it may hold.
    pub capacity: u64,
}

/// The segments in the IPC namespace of process `pid`; none if that is the host's, which stays here.
pub fn segments(pid: i32) -> io::Result<Vec<Segment>> {
    if !has_own(pid)? {
        return Ok(Vec::new());
    }
    let lines = namespace::inside(pid, &["ipc"], || list("shm"))?;
    let segment = |fields: &Vec<i64>| {
        let mode = *fields.get(2)? as u32;
        Some(Segment {
            key: *fields.first()? as i32,
            id: *fields.get(1)? as i32,
            bytes: *fields.get(3)? as u64,
            access: Access {
                uid: *fields.get(7)? as u32,
                gid: *fields.get(8)? as u32,
                mode: mode & PERMISSIONS,
            },
            removed: mode & REMOVED != 0,
        })
    };
    Ok(lines.iter().filter_map(segment).collect())
}

/// Semaphores and messages in the IPC namespace of process `pid`, whose users stand still.
pub fn queues(pid: i32) -> io::Result<Queues> {
    if !has_own(pid)? {
        return Ok(Queues::default());
    }
    namespace::inside(pid, &["ipc"], || {
        let mut found = Queues::default();
        for fields in list("sem")? {
            let &[key, id, mode, count, uid, gid, ..] = fields.as_slice() else { continue };
            let access = Access { uid: uid as u32, gid: gid as u32, mode: mode as u32 & PERMISSIONS };
            let values = sysv::semaphores(id as i32, count as usize)?;
            found.semaphores.push(Semaphores { id: id as i32, key: key as i32, access, values });
        }
        for fields in list("msg")? {
            let &[key, id, mode, _, _, _, _, uid, gid, ..] = fields.as_slice() else { continue };
            let access = Access { uid: uid as u32, gid: gid as u32, mode: mode as u32 & PERMISSIONS };
            let (messages, capacity) = sysv::messages(id as i32)?;
            found.messages.push(Messages { id: id as i32, key: key as i32, access, messages, capacity });
        }
        Ok(found)
    })
}

/// Whether any semaphores are in the IPC namespace of process `pid`.
pub fn has_semaphores(pid: i32) -> io::Result<bool> {
    Ok(has_own(pid)? && !namespace::inside(pid, &["ipc"], || list("sem"))?.is_empty())
}

/// Whether any POSIX message queue (mq_overview(7)) is in the IPC namespace of process `pid`.
pub fn has_posix_queues(pid: i32) -> io::Result<bool> {
    if !has_own(pid)? {
        return Ok(false);
    }
    namespace::inside(pid, &["ipc"], || {
        // They are listed by a file system, which shows those of who mounts it: here, for this thread alone.
        unshare(CloneFlags::CLONE_NEWNS)?;
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none)?;
        match mount(Some("mqueue"), "/tmp", Some("mqueue"), MsFlags::empty(), none) {
            Err(nix::Error::ENODEV) => Ok(false),
            mounted => {
                mounted?;
                Ok(fs::read_dir("/tmp")?.next().is_some())
            }
        }
    })
}

fn has_own(pid: i32) -> io::Result<bool> {
    Ok(fs::read_link(format!("/proc/{pid}/ns/ipc"))? != fs::read_link("/proc/self/ns/ipc")?)
}

/// The lines of `/proc/sysvipc/KIND`, as numbers; the third is octal.
fn list(kind: &str) -> io::Result<Vec<Vec<i64>>> {
    Ok(parse(&fs::read_to_string(format!("/proc/sysvipc/{kind}"))?))
}

fn parse(text: &str) -> Vec<Vec<i64>> {
    let number = |(at, word): (usize, &str)| i64::from_str_radix(word, if at == 2 { 8 } else { 10 }).ok();
    let line = |line: &str| line.split_whitespace().enumerate().map(number).collect::<Option<Vec<_>>>();
    text.lines().skip(1).filter_map(line).collect()
}

/// Opens the memory of a segment in the IPC namespace of process `pid`.
pub fn open(pid: i32, id: i32) -> io::Result<File> {
    namespace::inside(pid, &["ipc"], || sysv::with_segment(id, file_at))
}

/// Makes a segment in the IPC namespace of process `pid`, and opens its memory.
pub fn make(pid: i32, segment: &Segment) -> io::Result<File> {
    require_own(pid)?;
    namespace::inside(pid, &["ipc"], || {
        sysv::set_next_id("shm", segment.id)?;
        let id = sysv::make_segment(segment.key, segment.bytes, segment.access.mode)?;
        require_id(id, segment.id)?;
        sysv::own_segment(id, segment.access)?;
        sysv::with_segment(id, file_at)
    })
}

/// Makes what was captured, in the IPC namespace of process `pid`.
pub fn make_queues(pid: i32, queues: &Queues) -> io::Result<()> {
    if *queues == Queues::default() {
        return Ok(());
    }
    require_own(pid)?;
    namespace::inside(pid, &["ipc"], || {
        for set in &queues.semaphores {
            sysv::set_next_id("sem", set.id)?;
            require_id(sysv::make_semaphores(set.key, set.access, &set.values)?, set.id)?;
        }
        for queue in &queues.messages {
            sysv::set_next_id("msg", queue.id)?;
            let id = sysv::make_queue(queue.key, queue.access, &queue.messages, queue.capacity)?;
            require_id(id, queue.id)?;
        }
        Ok(())
    })
}

/// Gives a segment to its owner, and lets it go with its last user if the source's does.
pub fn finish(pid: i32, segment: &Segment) -> io::Result<()> {
    require_own(pid)?;
    namespace::inside(pid, &["ipc"], || {
        sysv::own_segment(segment.id, segment.access)?;
        if segment.removed { sysv::remove_segment(segment.id) } else { Ok(()) }
    })
}

/// Removes a segment, or lets it go with its last user.
pub fn remove(pid: i32, id: i32) -> io::Result<()> {
    require_own(pid)?;
    namespace::inside(pid, &["ipc"], || sysv::remove_segment(id))
}

fn require_own(pid: i32) -> io::Result<()> {
    match has_own(pid)? {
        true => Ok(()),
        false => Err(io::Error::other("the instance shares the host's SysV objects")),
    }
}

fn require_id(made: i32, wanted: i32) -> io::Result<()> {
    match made == wanted {
        true => Ok(()),
        false => Err(io::Error::other(format!("a SysV object got id {made}, not {wanted}"))),
    }
}

/// The file of what is mapped at `at` here.
fn file_at(at: u64) -> io::Result<File> {
    let begins = format!("{at:x}-");
    for entry in fs::read_dir("/proc/self/map_files")? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(&begins) {
            return File::options().read(true).write(true).open(entry.path());
        }
    }
    Err(io::Error::other("an attached segment is mapped nowhere"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_kernels_lists_are_understood() {
        let text = "       key      shmid perms                  size  cpid  lpid nattch   uid   gid  cuid  cgid\n\
                    \x2d559038737      32769  1600                  4096  1207  1207      1  1000   100  1000   100\n";
        let [fields] = parse(text).try_into().expect("one line");
        assert_eq!(fields[..4], [-559_038_737, 32769, 0o1600, 4096]);
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in ".{0,200}") {
            parse(&text);
        }
    }
}
