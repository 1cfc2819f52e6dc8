//! Binding a unix socket under a name that is still the source's, where both hosts have the same file system.
//!
//! A socket keeps the name that it was bound to as it was written, and its file is made where that name leads. So a socket is
//! bound by a thread whose root directory is an empty one beside the file: name and file are right, and the file is put
//! into its place, over the one that may be there, when the source is committed.

use std::{
    fs, io,
    os::{
        fd::OwnedFd,
        unix::{
            ffi::OsStrExt,
            fs::{FileTypeExt, MetadataExt, PermissionsExt},
            net::{UnixDatagram, UnixStream},
        },
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

use nix::sched::{CloneFlags, unshare};

use super::{SocketFile, address};
use crate::sys::socket;

/// Tells the directories of one agent apart.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// A socket's file that waits to be put into its place.
#[derive(Debug)]
pub(crate) struct Binding {
    /// The empty directory.
    root: PathBuf,
    /// The file in it.
    file: PathBuf,
    /// Where it goes; `None` when its name was deleted.
    place: Option<PathBuf>,
    /// Permissions, user and group that it has there.
    access: (u32, u32, u32),
}

impl Binding {
    /// Binds `ours` to `name`. `root`: that of the instance, as the agent sees it. A name without a file needs no more.
    pub(super) fn bind(
        ours: &OwnedFd,
        name: &[u8],
        file: Option<&SocketFile>,
        root: &str,
        same_kernel: bool,
    ) -> io::Result<Option<Self>> {
        if name.first().is_none_or(|byte| *byte == 0) {
            return match name.is_empty() {
                true => Ok(None),
                false => socket::bind(ours, &address(name)).map(|()| None),
            };
        }
        let place = file.map(|file| PathBuf::from(format!("{root}{}", file.path)));
        if let (Some(file), Some(place)) = (file, &place) {
            require_free(place, file, same_kernel)?;
        }
        let beside = match &place {
            Some(place) => place.parent().unwrap_or(Path::new("/")).to_owned(),
            None => PathBuf::from(format!("{root}/tmp")),
        };
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let empty = beside.join(format!(".rswap-{}-{number}", std::process::id()));
        let written =
            Path::new(std::ffi::OsStr::from_bytes(name.split(|b| *b == 0).next().unwrap_or_default()));
        let inner = written.strip_prefix("/").unwrap_or(written);
        if inner.components().any(|part| part == std::path::Component::ParentDir) {
            return Err(io::Error::other(format!("the name {} has .. in it", written.display())));
        }
        let access = file.map_or((0o755, 0, 0), |file| file.access);
        let binding = Self { file: empty.join(inner), root: empty, place, access };
        fs::create_dir_all(binding.file.parent().unwrap_or(&binding.root))?;
        bind_below(ours, name, &binding.root)?;
        // Whoever was connected may have given up what it needed for that.
        fs::set_permissions(&binding.file, fs::Permissions::from_mode(0o777))?;
        Ok(Some(binding))
    }

    /// The file, by which others connect until it is in its place.
    pub(super) fn file(&self) -> &Path {
        &self.file
    }

    /// Puts the file into its place.
    pub(crate) fn settle(self) -> io::Result<()> {
        let Some(place) = &self.place else { return Ok(()) };
        let (mode, uid, gid) = self.access;
        std::os::unix::fs::chown(&self.file, Some(uid), Some(gid))?;
        fs::set_permissions(&self.file, fs::Permissions::from_mode(mode))?;
        fs::rename(&self.file, place)
    }
}

impl Drop for Binding {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.root) {
            tracing::warn!(path = %self.root.display(), %error, "a directory for a socket's name stays");
        }
    }
}

fn bind_below(ours: &OwnedFd, name: &[u8], root: &Path) -> io::Result<()> {
    let (ours, root, address) = (ours.try_clone()?, root.to_owned(), address(name));
    let work = move || {
        // Root and working directory of this thread alone, which ends with it.
        unshare(CloneFlags::CLONE_FS)?;
        std::env::set_current_dir(&root)?;
        nix::unistd::chroot(".")?;
        socket::bind(&ours, &address)
    };
    thread::spawn(work).join().unwrap_or_else(|_| Err(io::Error::other("the binding thread panicked")))
}

/// What is at the place must be the source's own file, or what a socket has left that is gone.
fn require_free(place: &Path, file: &SocketFile, same_kernel: bool) -> io::Result<()> {
    let Ok(metadata) = fs::symlink_metadata(place) else { return Ok(()) };
    if same_kernel && (metadata.dev(), metadata.ino()) == file.inode {
        return Ok(());
    }
    let is_left = metadata.file_type().is_socket()
        && UnixStream::connect(place).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
        && UnixDatagram::unbound()?
            .connect(place)
            .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
    match is_left {
        true => Ok(()),
        false => Err(io::Error::other(format!("{} is somebody else's at the destination", file.path))),
    }
}
