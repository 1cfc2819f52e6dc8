//! FIFOs: pipes with a name.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fs::{self, File},
    os::{
        fd::{AsFd, OwnedFd, RawFd},
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
};

use serde::{Deserialize, Serialize};

use super::{
    super::{TraceeError, image::DescriptorKind, remote::Remote},
    Look, files,
    info::{Info, Kind},
    pipes,
};
use crate::sys::socket;

/// One end of a FIFO, or both.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fifo {
    /// Its name.
    pub path: String,
    /// Its inode at the source.
    pub inode: u64,
    /// `F_GETPIPE_SZ`, in bytes.
    pub capacity: i32,
    /// What is queued in it (only at one of its read ends).
    pub queued: Vec<u8>,
}

/// A descriptor whose path is a FIFO's.
pub(super) fn describe(info: &Info, look: &Look<'_>, inode: u64) -> Result<Kind, TraceeError> {
    let ours = look.ours()?;
    let (capacity, queued) = pipes::contents(&ours, info.flags, look)?;
    Ok(Ok(DescriptorKind::Fifo(Fifo { path: info.target.clone(), inode, capacity, queued })))
}

/// The FIFOs opened so far, by the source's inode: both ends of each, so that no end waits for the other.
#[derive(Default)]
pub(super) struct Fifos(BTreeMap<u64, OwnedFd>);

impl Fifos {
    /// Opens `fifo` in the stub, and puts what is queued into it.
    pub(super) fn open(
        &mut self,
        remote: &mut Remote,
        fifo: &Fifo,
        flags: i32,
    ) -> Result<RawFd, TraceeError> {
        let pid = remote.tid();
        let failed = |what| move |error| TraceeError::call(what, pid)(error);
        let both = match self.0.entry(fifo.inode) {
            Entry::Occupied(both) => both.into_mut(),
            Entry::Vacant(missing) => missing.insert(open_both(pid, fifo)?),
        };
        let here = socket::peek_pipe(both, pipes::LIMIT).map_err(failed("reading a FIFO"))?;
        // Where both hosts have the same FIFO under the same kernel, its contents are there already.
        if here.is_empty() && !fifo.queued.is_empty() {
            pipes::fill(both.as_fd(), &fifo.queued)?;
        } else if !here.is_empty() && !fifo.queued.is_empty() && here != fifo.queued {
            let text = format!("the FIFO {} is in use at the destination", fifo.path);
            return Err(TraceeError::Unsupported(text));
        }
        files::open_path(remote, &fifo.path, flags)
    }
}

/// Opens a FIFO of the instance for reading and writing, which waits for nobody.
fn open_both(pid: i32, fifo: &Fifo) -> Result<OwnedFd, TraceeError> {
    let failed = |what| move |error| TraceeError::call(what, pid)(error);
    let path = format!("/proc/{pid}/root{}", fifo.path);
    let is_fifo = fs::metadata(&path).is_ok_and(|metadata| metadata.file_type().is_fifo());
    if !is_fifo {
        let text = format!("{} is no FIFO at the destination: make it there, too", fifo.path);
        return Err(TraceeError::Unsupported(text));
    }
    let both = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&path)
        .map_err(failed("opening a FIFO"))?;
    nix::fcntl::fcntl(&both, nix::fcntl::FcntlArg::F_SETPIPE_SZ(fifo.capacity))
        .map_err(|error| failed("F_SETPIPE_SZ")(error.into()))?;
    Ok(both.into())
}
