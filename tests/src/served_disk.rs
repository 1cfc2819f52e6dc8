//! A disk that is as slow, as broken or as much gone as a test wants, and at the moment that it wants: a file in a file system of this
//! process (FUSE), for a loop device.
//!
//! ```text
//! file system -> loop device -> the file `disk` -> /dev/fuse -> one thread of this process -> memory
//! ```
//!
//! The kernel caches nothing of the file, so every request of the file system above (contents, journal, flush) comes here and is
//! served after the one before, as by a disk with one arm. The thread needs nothing but memory: it can't wait for the disk that it is.

use std::{
    ffi::OsStr,
    fs::{self, File},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{FileExt, MetadataExt},
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant, UNIX_EPOCH},
};

use anyhow::Context;
use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite,
    Request, Session, SessionACL, WriteFlags,
};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::memfd::{MFdFlags, memfd_create},
};

/// The file's name and number.
const NAME: &str = "disk";
const NUMBER: INodeNo = INodeNo(2);
/// How long the kernel may take what it knows of names and lengths for granted: they don't change.
const KNOWN_FOR: Duration = Duration::from_secs(3600);
/// Where the kernel lists connections of FUSE, by the device number of the file system.
const CONNECTIONS: &str = "/sys/fs/fuse/connections";
/// After this long without any request, a disk that should be unused is cut off.
const END_LIMIT: Duration = Duration::from_secs(5);

/// How slow it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Speed {
    /// What every request takes, a flush as well.
    pub per_request: Duration,
    /// What contents take in addition, if anything.
    pub bytes_per_s: Option<u64>,
}

impl Speed {
    /// One whose requests take so long, whatever their length.
    pub fn of(per_request: Duration) -> Self {
        Self { per_request, bytes_per_s: None }
    }

    fn service_time(&self, bytes: usize) -> Duration {
        let contents = self.bytes_per_s.map(|rate| bytes as f64 / rate.max(1) as f64);
        self.per_request + Duration::from_secs_f64(contents.unwrap_or(0.0))
    }
}

/// What the thread looks at for each request.
#[derive(Debug, Default)]
struct State {
    speed: Speed,
    /// Requests that were served or failed.
    requests: u64,
    /// From which request on all fail, reads, writes and flushes alike.
    fails_from: Option<u64>,
}

/// Serves one file.
#[derive(Debug)]
struct Server {
    memory: File,
    bytes: u64,
    state: Arc<Mutex<State>>,
}

/// The disk. Dropped, it is as fast as it can be until nobody uses it any more, and cut off if that takes long.
#[derive(Debug)]
pub struct ServedDisk {
    state: Arc<Mutex<State>>,
    session: BackgroundSession,
    /// The file system's device number: the name of its connection.
    connection: u64,
    image: PathBuf,
}

impl ServedDisk {
    /// Serves one of `bytes` zeros, in the directory `at`, which is made. It is as fast as memory.
    pub fn serve(at: &Path, bytes: u64) -> anyhow::Result<Self> {
        fs::create_dir(at).with_context(|| format!("cannot make {}", at.display()))?;
        let memory = File::from(memfd_create(c"disk", MFdFlags::MFD_CLOEXEC)?);
        memory.set_len(bytes)?;
        let state = Arc::new(Mutex::new(State::default()));
        let server = Server { memory, bytes, state: state.clone() };
        let kernel = File::options().read(true).write(true).open("/dev/fuse").context("opening /dev/fuse")?;
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", kernel.as_raw_fd());
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("rswap-tests"), at, Some("fuse"), flags, Some(options.as_str()))
            .context("mounting a file system of this process")?;
        let session = Session::from_fd(server, OwnedFd::from(kernel), SessionACL::Owner, Config::default())
            .and_then(Session::spawn)
            .inspect_err(|_| umount2(at, MntFlags::MNT_DETACH).unwrap_or_default())
            .context("serving a file system")?;
        let device = fs::metadata(at).context("the file system does not answer")?.dev();
        Ok(Self { state, session, connection: nix::sys::stat::minor(device), image: at.join(NAME) })
    }

    /// The file, until it is [hidden](Self::hide).
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// Takes the file system out of the directory tree: whoever has the file open keeps it, and no mount namespace that is made from here on has
    /// it.
    pub fn hide(&self) -> anyhow::Result<()> {
        let at = self.image.parent().context("no directory")?;
        umount2(at, MntFlags::MNT_DETACH).with_context(|| format!("unmounting {}", at.display()))
    }

    /// From here on it is so slow. A request that is being served is not hurried.
    pub fn set_speed(&self, speed: Speed) {
        self.change(|state| state.speed = speed);
    }

    /// Requests so far: reads, writes and flushes.
    pub fn requests(&self) -> u64 {
        self.change(|state| state.requests)
    }

    /// After so many further requests every one fails (EIO).
    pub fn fail_after(&self, requests: u64) {
        self.change(|state| state.fails_from = Some(state.requests + requests));
    }

    /// It is pulled out: whoever waits for it is told so, and everyone who comes later.
    pub fn vanish(&self) -> anyhow::Result<()> {
        let abort = Path::new(CONNECTIONS).join(self.connection.to_string()).join("abort");
        if !abort.exists() {
            mount(Some("fusectl"), CONNECTIONS, Some("fusectl"), MsFlags::empty(), None::<&str>)
                .context("mounting the kernel's list of file systems of processes")?;
        }
        fs::write(&abort, "1").with_context(|| format!("writing {}", abort.display()))
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for ServedDisk {
    fn drop(&mut self) {
        self.set_speed(Speed::default());
        // It may be hidden already.
        let _ = self.hide();
        let began = Instant::now();
        while !self.session.guard.is_finished() {
            if began.elapsed() > END_LIMIT {
                eprintln!("a disk is still in use, and is cut off");
                if let Err(error) = self.vanish() {
                    eprintln!("cannot clean up: {error:#}");
                }
                return;
            }
            thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Server {
    /// Takes the time that a request of so many bytes takes, and says whether it succeeds.
    fn request(&self, bytes: usize) -> Result<(), Errno> {
        let (takes, fails) = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.requests += 1;
            let fails = state.fails_from.is_some_and(|from| state.requests > from);
            (state.speed.service_time(bytes), fails)
        };
        if !takes.is_zero() {
            thread::sleep(takes);
        }
        if fails { Err(Errno::EIO) } else { Ok(()) }
    }

    fn attributes(&self, inode: INodeNo) -> Result<FileAttr, Errno> {
        let (kind, size) = match inode {
            INodeNo::ROOT => (FileType::Directory, 0),
            NUMBER => (FileType::RegularFile, self.bytes),
            _ => return Err(Errno::ENOENT),
        };
        let perm = if kind == FileType::Directory { 0o700 } else { 0o600 };
        Ok(FileAttr {
            ino: inode,
            size,
            blocks: size / 512,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }
}

impl Filesystem for Server {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.attributes(NUMBER) {
            Ok(attributes) if name == NAME => reply.entry(&KNOWN_FOR, &attributes, Generation(0)),
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(inode) {
            Ok(attributes) => reply.attr(&KNOWN_FOR, &attributes),
            Err(error) => reply.error(error),
        }
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // Nothing of it is cached.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let end = self.bytes.min(offset.saturating_add(size.into()));
        let mut contents = vec![0; end.saturating_sub(offset) as usize];
        let read = self
            .request(contents.len())
            .and_then(|()| self.memory.read_exact_at(&mut contents, offset).map_err(Errno::from));
        match read {
            Ok(()) => reply.data(&contents),
            Err(error) => reply.error(error),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        contents: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let inside = offset.checked_add(contents.len() as u64).is_some_and(|end| end <= self.bytes);
        let written = self.request(contents.len()).and_then(|()| match inside {
            true => self.memory.write_all_at(contents, offset).map_err(Errno::from),
            false => Err(Errno::ENOSPC),
        });
        match written {
            Ok(()) => reply.written(contents.len() as u32),
            Err(error) => reply.error(error),
        }
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        match self.request(0) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_takes_what_the_disk_takes_and_what_its_contents_take() {
        let speed = Speed { per_request: Duration::from_millis(8), bytes_per_s: Some(1 << 20) };
        assert_eq!(speed.service_time(0), Duration::from_millis(8));
        assert_eq!(speed.service_time(1 << 19), Duration::from_millis(508));
        assert_eq!(Speed::of(Duration::from_millis(3)).service_time(1 << 30), Duration::from_millis(3));
        assert_eq!(Speed::default().service_time(1 << 30), Duration::ZERO);
    }

    #[test]
    fn requests_fail_from_the_one_that_was_named() {
        let state = Arc::new(Mutex::new(State { fails_from: Some(2), ..State::default() }));
        let memory = tempfile::tempfile().expect("make");
        let server = Server { memory, bytes: 0, state };
        let succeeded: Vec<bool> = (0..4).map(|_| server.request(0).is_ok()).collect();
        assert_eq!(succeeded, [true, true, false, false]);
    }
}
