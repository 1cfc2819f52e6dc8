//! SysV shared memory, semaphores and message queues: the calls, in whatever IPC namespace the calling thread is.

use std::{fs, io};

/// `MSG_COPY` (include/uapi/linux/msg.h): reads a message by its place, and leaves it there.
const MSG_COPY: i32 = 0o40000;

/// Who owns an object, and who may use it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Access {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permissions.
    pub mode: u32,
}

/// Has the next object of a kind (`shm`, `sem`, `msg`) get this id (CONFIG_CHECKPOINT_RESTORE).
pub fn set_next_id(kind: &str, id: i32) -> io::Result<()> {
    fs::write(format!("/proc/sys/kernel/{kind}_next_id"), id.to_string())
}

/// Makes a segment of shared memory.
pub fn make_segment(key: i32, bytes: u64, mode: u32) -> io::Result<i32> {
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | mode as i32;
    // SAFETY: a plain system call without pointers.
    super::check(unsafe { libc::shmget(key, bytes as usize, flags) }.into()).map(|id| id as i32)
}

/// Sets who owns a segment.
pub fn own_segment(id: i32, access: Access) -> io::Result<()> {
    // SAFETY: the struct is plain numbers, which the kernel fills in and reads.
    unsafe {
        let mut state: libc::shmid_ds = std::mem::zeroed();
        super::check(libc::shmctl(id, libc::IPC_STAT, &mut state).into())?;
        state.shm_perm.uid = access.uid;
        state.shm_perm.gid = access.gid;
        state.shm_perm.mode = access.mode as _;
        super::check(libc::shmctl(id, libc::IPC_SET, &mut state).into()).map(|_| ())
    }
}

/// Marks a segment for removal: it goes with its last user.
pub fn remove_segment(id: i32) -> io::Result<()> {
    // SAFETY: this command takes no pointer.
    super::check(unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) }.into()).map(|_| ())
}

/// Attaches a segment for the time of `work`, which is told where it is.
pub fn with_segment<T>(id: i32, work: impl FnOnce(u64) -> io::Result<T>) -> io::Result<T> {
    // SAFETY: the kernel chooses a free place. Nothing here reads or writes there, and it is free again at the end.
    unsafe {
        let at = libc::shmat(id, std::ptr::null(), 0);
        if at as isize == -1 {
            return Err(io::Error::last_os_error());
        }
        let done = work(at as u64);
        super::check(libc::shmdt(at).into())?;
        done
    }
}

/// The values of a set of `count` semaphores.
pub fn semaphores(id: i32, count: usize) -> io::Result<Vec<u16>> {
    let mut values = vec![0_u16; count];
    // SAFETY: the kernel writes a value for each semaphore, of which the caller knows the number; a set can't grow.
    super::check(unsafe { libc::semctl(id, 0, libc::GETALL, values.as_mut_ptr()) }.into())?;
    Ok(values)
}

/// Makes a set of semaphores with these values.
pub fn make_semaphores(key: i32, access: Access, values: &[u16]) -> io::Result<i32> {
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | access.mode as i32;
    // SAFETY: the array is as long as the set; the struct is plain numbers, which the kernel fills in and reads.
    unsafe {
        let id = super::check(libc::semget(key, values.len() as i32, flags).into())? as i32;
        super::check(libc::semctl(id, 0, libc::SETALL, values.as_ptr()).into())?;
        let mut state: libc::semid_ds = std::mem::zeroed();
        super::check(libc::semctl(id, 0, libc::IPC_STAT, &mut state).into())?;
        state.sem_perm.uid = access.uid;
        state.sem_perm.gid = access.gid;
        super::check(libc::semctl(id, 0, libc::IPC_SET, &mut state).into())?;
        Ok(id)
    }
}

/// A message: its type and its text.
pub type Message = (i64, Vec<u8>);

/// The messages of a queue, and the bytes that the queue may hold.
pub fn messages(id: i32) -> io::Result<(Vec<Message>, u64)> {
    // SAFETY: the struct is plain numbers, which the kernel fills in; the buffer holds a type and as many bytes as the
    // kernel is told, and no message has more than `msg_qbytes` of them.
    unsafe {
        let mut state: libc::msqid_ds = std::mem::zeroed();
        super::check(libc::msgctl(id, libc::IPC_STAT, &mut state).into())?;
        let mut found = Vec::new();
        let longest = state.msg_qbytes as usize;
        let mut buffer = vec![0_u8; 8 + longest];
        for place in 0..state.msg_qnum {
            let flags = MSG_COPY | libc::IPC_NOWAIT;
            let got = libc::msgrcv(id, buffer.as_mut_ptr().cast(), longest, place as libc::c_long, flags);
            let got = super::check(got as libc::c_long)? as usize;
            let kind = i64::from_ne_bytes(buffer[..8].try_into().unwrap_or_default());
            found.push((kind, buffer[8..8 + got].to_vec()));
        }
        Ok((found, state.msg_qbytes))
    }
}

/// Makes a queue with these messages.
pub fn make_queue(key: i32, access: Access, messages: &[Message], capacity: u64) -> io::Result<i32> {
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | access.mode as i32;
    // SAFETY: the struct is plain numbers, which the kernel fills in and reads; the buffer holds a type and the message.
    unsafe {
        let id = super::check(libc::msgget(key, flags).into())? as i32;
        let mut state: libc::msqid_ds = std::mem::zeroed();
        super::check(libc::msgctl(id, libc::IPC_STAT, &mut state).into())?;
        state.msg_perm.uid = access.uid;
        state.msg_perm.gid = access.gid;
        state.msg_qbytes = capacity;
        super::check(libc::msgctl(id, libc::IPC_SET, &mut state).into())?;
        for (kind, text) in messages {
            let buffer = [&kind.to_ne_bytes()[..], text].concat();
            super::check(libc::msgsnd(id, buffer.as_ptr().cast(), text.len(), libc::IPC_NOWAIT).into())?;
        }
        Ok(id)
    }
}
