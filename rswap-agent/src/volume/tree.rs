//! What is in a volume: every name below its root with its kind and attributes, found without following any link.

use std::{
    collections::BTreeMap,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, StatxFlags};
use serde::{Deserialize, Serialize};

use super::VolumeError;

/// Names in a volume at most: the walk in the freeze takes some microseconds for each.
pub const NAMES: usize = 4 << 20;
/// Directories below each other at most.
pub const DEPTH: usize = 256;
/// Bytes of a path at most (`PATH_MAX`).
pub const PATH_BYTES: usize = 4096;
/// Bytes of one name's extended attributes at most, names included.
pub const XATTR_BYTES: usize = 256 << 10;

/// Below the volume's root, without a leading slash; empty for the root itself.
pub type Name = Vec<u8>;

/// What a name stands for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file. Names with the same number are links to one file.
    File {
        /// The inode number at the source.
        inode: u64,
    },
    /// A symbolic link.
    Symlink {
        /// Where it points; it is never followed.
        target: Vec<u8>,
    },
    /// A FIFO.
    Fifo,
    /// The name of a unix socket.
    Socket,
    /// A character device without state, one of [`DEVICES`].
    Device {
        /// Which kind.
        major: u32,
        /// Which one.
        minor: u32,
    },
}

/// Character devices that are the same everywhere: null, zero, full, random, urandom, tty and ptmx.
pub const DEVICES: [(u32, u32); 7] = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2)];

/// Extended attributes: names and values.
pub type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// A point in time: seconds and nanoseconds since 1970.
pub type Time = (i64, u32);

/// What `stat` tells of a name besides its kind, and its extended attributes (with POSIX ACLs and capabilities).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attributes {
    /// Permissions with set-id and sticky bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last read; not compared, since reading a copy changes it.
    pub accessed: Time,
    /// Last written.
    pub modified: Time,
    /// Extended attributes in the order of their names.
    pub xattrs: Xattrs,
}

/// One name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// What it stands for.
    pub kind: Kind,
    /// Its attributes.
    pub attributes: Attributes,
    /// When anything of its inode changed last (`ctime`): of a file, a changed block or attribute changes it.
    pub changed: Time,
    /// Length in bytes.
    pub size: u64,
    /// Bytes that it takes on the disk.
    pub allocated: u64,
    /// Inode number here.
    pub inode: u64,
}

/// Everything below a root, parents before what is in them (by the order of the names).
pub type Tree = BTreeMap<Name, Found>;

/// Opens what `path` names below `root`. No link is followed, and no way leads out.
pub fn open_below(root: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let path = if path.is_empty() { b"." } else { path };
    let resolve = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    loop {
        match rustix::fs::openat2(root, path, flags, Mode::empty(), resolve) {
            // Somebody renamed something on the way at this very moment.
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            opened => return opened,
        }
    }
}

/// Walks everything below `root`. Attributes of names that did not change since `before` are taken from there. What goes
/// while the walk is made is left out.
pub fn scan(root: BorrowedFd<'_>, before: &Tree) -> Result<Tree, VolumeError> {
    let mut walk = Walk { root, before, found: Tree::new(), device: (0, 0) };
    let top = rustix::fs::fstat(root).map_err(VolumeError::io("looking at", b""))?;
    walk.device = (rustix::fs::major(top.st_dev), rustix::fs::minor(top.st_dev));
    let directory =
        open_below(root, b"", OFlags::RDONLY | OFlags::DIRECTORY).map_err(VolumeError::io("opening", b""))?;
    walk.look(root, b".", Name::new())?;
    walk.directory(directory, &Name::new(), 0)?;
    Ok(walk.found)
}

struct Walk<'a> {
    root: BorrowedFd<'a>,
    before: &'a Tree,
    found: Tree,
    device: (u32, u32),
}

impl Walk<'_> {
    fn directory(&mut self, directory: OwnedFd, path: &Name, depth: usize) -> Result<(), VolumeError> {
        if depth > DEPTH {
            return Err(VolumeError::unsupported(path, "directories are nested too deeply"));
        }
        let failed = || VolumeError::io("listing", path);
        let mut below = Vec::new();
        for entry in Dir::read_from(&directory).map_err(failed())? {
            let entry = entry.map_err(failed())?;
            let name = entry.file_name().to_bytes();
            if matches!(name, b"." | b"..") {
                continue;
            }
            let mut child = path.clone();
            if !child.is_empty() {
                child.push(b'/');
            }
            child.extend(name);
            if child.len() >= PATH_BYTES || self.found.len() >= NAMES {
                return Err(VolumeError::unsupported(&child, "there are too many or too long names"));
            }
            if self.look(directory.as_fd(), name, child.clone())? {
                below.push(child);
            }
        }
        drop(directory);
        for child in below {
            match open_below(self.root, &child, OFlags::RDONLY | OFlags::DIRECTORY) {
                Ok(opened) => self.directory(opened, &child, depth + 1)?,
                // It was removed or replaced since: the next walk tells.
                Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP) => {}
                Err(error) => return Err(VolumeError::io("opening", &child)(error)),
            }
        }
        Ok(())
    }

    /// Takes in one name of `directory`; says whether it is a directory.
    fn look(&mut self, directory: BorrowedFd<'_>, name: &[u8], path: Name) -> Result<bool, VolumeError> {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let stat = match rustix::fs::statx(directory, name, flags, StatxFlags::BASIC_STATS) {
            Err(rustix::io::Errno::NOENT) => return Ok(false),
            stat => stat.map_err(VolumeError::io("looking at", &path))?,
        };
        if (stat.stx_dev_major, stat.stx_dev_minor) != self.device {
            return Err(VolumeError::unsupported(&path, "another file system is mounted here: unmount it"));
        }
        let kind = match FileType::from_raw_mode(stat.stx_mode.into()) {
            FileType::Directory => Kind::Directory,
            FileType::RegularFile => Kind::File { inode: stat.stx_ino },
            FileType::Symlink => match rustix::fs::readlinkat(directory, name, Vec::new()) {
                Err(rustix::io::Errno::NOENT | rustix::io::Errno::INVAL) => return Ok(false),
                target => Kind::Symlink {
                    target: target.map_err(VolumeError::io("reading the link", &path))?.into_bytes(),
                },
            },
            FileType::Fifo => Kind::Fifo,
            FileType::Socket => Kind::Socket,
            FileType::CharacterDevice if DEVICES.contains(&(stat.stx_rdev_major, stat.stx_rdev_minor)) => {
                Kind::Device { major: stat.stx_rdev_major, minor: stat.stx_rdev_minor }
            }
            _ => {
                let reason =
                    "of device nodes only null, zero, full, random, tty and ptmx are carried: remove it";
                return Err(VolumeError::unsupported(&path, reason));
            }
        };
        let linked = !matches!(kind, Kind::Directory | Kind::File { .. }) && stat.stx_nlink > 1;
        if linked {
            return Err(VolumeError::unsupported(
                &path,
                "hard links to what is no regular file aren't carried",
            ));
        }
        let changed = (stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec);
        let same = self.before.get(&path).filter(|b| b.inode == stat.stx_ino && b.changed == changed);
        let xattrs = match same {
            Some(before) => before.attributes.xattrs.clone(),
            None => xattrs(directory, name, &path)?,
        };
        let attributes = Attributes {
            mode: u32::from(stat.stx_mode) & 0o7777,
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            accessed: (stat.stx_atime.tv_sec, stat.stx_atime.tv_nsec),
            modified: (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec),
            xattrs,
        };
        let directory = kind == Kind::Directory;
        let (size, allocated, inode) = (stat.stx_size, stat.stx_blocks * 512, stat.stx_ino);
        self.found.insert(path, Found { kind, attributes, changed, size, allocated, inode });
        Ok(directory)
    }
}

/// The path by which a name of an open directory is given to calls that take no directory; the last part is not followed by
/// the calls that don't follow links.
pub(super) fn by_descriptor(directory: BorrowedFd<'_>, name: &[u8]) -> Vec<u8> {
    [format!("/proc/self/fd/{}/", directory.as_raw_fd()).as_bytes(), name].concat()
}

fn xattrs(directory: BorrowedFd<'_>, name: &[u8], path: &[u8]) -> Result<Xattrs, VolumeError> {
    use rustix::io::Errno;
    let at = by_descriptor(directory, name);
    let failed = || VolumeError::io("reading the attributes of", path);
    let mut names = vec![0; 64 << 10];
    let length = match rustix::fs::llistxattr(at.as_slice(), names.as_mut_slice()) {
        Err(Errno::NOENT | Errno::NOTSUP) => return Ok(Vec::new()),
        length => length.map_err(failed())?,
    };
    names.truncate(length);
    let mut found = Vec::new();
    let mut bytes = 0;
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; 64 << 10];
        match rustix::fs::lgetxattr(at.as_slice(), name, value.as_mut_slice()) {
            // Removed meanwhile.
            Err(Errno::NODATA | Errno::NOENT | Errno::NOTSUP) => {}
            length => {
                value.truncate(length.map_err(failed())?);
                bytes += name.len() + value.len();
                found.push((name.to_vec(), value));
            }
        }
    }
    if bytes > XATTR_BYTES {
        return Err(VolumeError::unsupported(path, "its extended attributes are too long"));
    }
    found.sort();
    Ok(found)
}
