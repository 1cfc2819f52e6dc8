//! Files without a name: deleted ones that are still open, `O_TMPFILE`'s, and memory of memfd_create(2). Their contents go along.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    ffi::CString,
    fs::{self, File},
    io::{self, Write},
    os::{
        fd::{AsRawFd, RawFd},
        unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    },
    path::Path,
};

use serde::{Deserialize, Serialize};

use super::{
    super::{
        TraceeError,
        image::DescriptorKind,
        link::Link,
        objects::{BuiltObject, huge_page_bytes},
        remote::Remote,
        tcp,
    },
    Look, files,
    info::{Info, Kind},
};
use crate::sys::file;

/// Bytes that are carried of one such file. With what else waits in an instance they must fit a frame.
const LIMIT: u64 = 16 << 20;
const SUFFIX: &str = " (deleted)";
const MEMORY: &str = "/memfd:";

/// A file without a name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nameless {
    /// What it was called; a memory's name.
    pub name: String,
    /// Its device and inode at the source.
    pub inode: (u64, u64),
    /// What was opened.
    pub origin: Origin,
    /// Permissions, user and group.
    pub access: (u32, u32, u32),
    /// The offset of the description, in bytes.
    pub position: i64,
    /// All of it; only at the first of its descriptions, and not if the memory is carried by its mappings.
    #[serde(with = "tcp::bytes")]
    pub contents: Vec<u8>,
    /// Its length, in bytes.
    pub len: u64,
}

/// Where a nameless file is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Origin {
    /// A directory.
    Directory,
    /// memfd_create(2), with these seals (`F_GET_SEALS`).
    Memory(i32),
    /// Either of these, and it is mapped by somebody, too: it is carried as what processes share, and is memory then.
    MappedMemory,
}

/// A descriptor of a file without a name.
pub(super) fn describe(info: &Info, look: &Look<'_>, metadata: &fs::Metadata) -> Result<Kind, TraceeError> {
    let pid = look.pid;
    let refuse = |remedy| Ok(Err((format!("deleted file {}", info.target), remedy)));
    if !metadata.is_file() {
        return refuse("only regular files are carried without a name");
    }
    if info.flags & libc::O_PATH != 0 {
        return refuse("without a name, O_PATH leads nowhere: close it");
    }
    let name = info.target.strip_suffix(SUFFIX).unwrap_or(&info.target);
    let memory = name.strip_prefix(MEMORY);
    let mapped = look.around.is_mapped(metadata.ino(), &info.target)?;
    let origin = match memory {
        None if !mapped => Origin::Directory,
        _ if mapped => Origin::MappedMemory,
        _ => {
            let ours = File::from(look.ours()?);
            let failed = |error| TraceeError::call("fstatfs", pid)(error);
            if huge_page_bytes(&ours).map_err(failed)?.is_some() {
                return refuse(
                    "huge pages of memfd_create are only carried where they are mapped: map it, or close it",
                );
            }
            let seals = file::seals(&ours).map_err(TraceeError::call("F_GET_SEALS", pid))?;
            Origin::Memory(seals)
        }
    };
    if origin != Origin::MappedMemory && metadata.len() > LIMIT {
        return refuse("it has more than the 16 MiB that are carried of a file without a name");
    }
    let contents = match look.contents && origin != Origin::MappedMemory {
        true => {
            let path = format!("/proc/{pid}/fd/{}", look.fd);
            fs::read(&path).map_err(TraceeError::proc(path))?
        }
        false => Vec::new(),
    };
    Ok(Ok(DescriptorKind::Nameless(Nameless {
        name: memory.unwrap_or(name).to_owned(),
        inode: (metadata.dev(), metadata.ino()),
        origin,
        access: (metadata.mode() & 0o7777, metadata.uid(), metadata.gid()),
        position: info.position,
        contents,
        len: metadata.len(),
    })))
}

/// The files made again so far, by the source's device and inode.
#[derive(Default)]
pub(super) struct Files {
    made: BTreeMap<(u64, u64), File>,
    /// Names to be removed when every description is open.
    named: BTreeMap<(u64, u64), String>,
}

impl Files {
    /// Opens the file in the stub, which is given it over `link`.
    pub(super) fn open(
        &mut self,
        remote: &mut Remote,
        image: &Nameless,
        flags: i32,
        (link, end): (&Link, RawFd),
        objects: &BTreeMap<u64, BuiltObject>,
    ) -> Result<RawFd, TraceeError> {
        let pid = remote.tid();
        let failed = |error: io::Error| TraceeError::call("making a file without a name again", pid)(error);
        let made = match image.origin {
            Origin::Directory => {
                let path = self.named(pid, image).map_err(failed)?;
                files::open_path(remote, &path, flags)?
            }
            Origin::Memory(seals) => {
                let made = match self.made.entry(image.inode) {
                    Entry::Occupied(made) => made.into_mut(),
                    Entry::Vacant(missing) => missing.insert(memory(image, seals).map_err(failed)?),
                };
                let again = reopen(made, flags).map_err(failed)?;
                link.give(remote, end, &again)?
            }
            Origin::MappedMemory => {
                let missing =
                    || TraceeError::Unsupported(format!("there is no shared memory {}", image.inode.1));
                let object = objects.get(&image.inode.1).ok_or_else(missing)?;
                // Pages come as a whole.
                if image.len < object.object.bytes && !object.object.huge {
                    object.file.set_len(image.len).map_err(failed)?;
                }
                let mode = fs::Permissions::from_mode(image.access.0);
                object.file.set_permissions(mode).map_err(failed)?;
                let again = reopen(&object.file, flags).map_err(failed)?;
                link.give(remote, end, &again)?
            }
        };
        let args = [made as u64, image.position as u64, libc::SEEK_SET as u64, 0, 0, 0];
        remote.call("lseek", libc::SYS_lseek, args)?;
        Ok(made)
    }

    /// The name that a deleted file has for the moment, as the instance sees it.
    fn named(&mut self, pid: i32, image: &Nameless) -> io::Result<String> {
        if let Some(name) = self.named.get(&image.inode) {
            return Ok(name.clone());
        }
        let root = format!("/proc/{pid}/root");
        let directory = Path::new(&image.name).parent().unwrap_or(Path::new("/"));
        let wanted = match Path::new(&format!("{root}{}", directory.display())).is_dir() {
            true => image.name.clone(),
            // Nobody can tell any more where it was.
            false => {
                format!("/tmp/{}", Path::new(&image.name).file_name().unwrap_or_default().to_string_lossy())
            }
        };
        let create = |name: &str| {
            let path = format!("{root}{name}");
            Ok((File::options().write(true).create_new(true).mode(0o600).open(&path)?, path))
        };
        let (name, (mut file, path)) = match create(&wanted) {
            Ok(made) => (wanted, made),
            // The name was taken by another file since.
            Err(error) if io::Error::kind(&error) == io::ErrorKind::AlreadyExists => {
                let name = format!("{wanted}.{}.rswap", image.inode.1);
                let made = create(&name)?;
                (name, made)
            }
            Err(error) => return Err(error),
        };
        self.named.insert(image.inode, name.clone());
        file.write_all(&image.contents)?;
        // Before the permissions: a change of owner takes some of them away.
        let (mode, uid, gid) = image.access;
        std::os::unix::fs::chown(&path, Some(uid), Some(gid))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
        // The stubs go through their own root to it; ours is the same file system.
        self.made.insert(image.inode, file);
        Ok(name)
    }

    /// Takes the names away; all descriptions are open, or will never be.
    pub(super) fn forget_names(&mut self, pid: i32) {
        for (_, name) in std::mem::take(&mut self.named) {
            if let Err(error) = fs::remove_file(format!("/proc/{pid}/root{name}")) {
                tracing::error!(name, %error, "a file that should have no name keeps it");
            }
        }
    }
}

fn memory(image: &Nameless, seals: i32) -> io::Result<File> {
    let name = CString::new(image.name.as_str()).map_err(io::Error::other)?;
    let mut memory = file::sealable_memory(&name, false)?;
    memory.write_all(&image.contents)?;
    memory.set_len(image.len)?;
    memory.set_permissions(fs::Permissions::from_mode(image.access.0))?;
    // What was made without leave to seal has this one from the beginning.
    file::add_seals(&memory, seals)?;
    Ok(memory)
}

/// Another description of the same file.
fn reopen(file: &File, flags: i32) -> io::Result<File> {
    let access = flags & libc::O_ACCMODE;
    File::options()
        .read(access != libc::O_WRONLY)
        .write(access != libc::O_RDONLY)
        .custom_flags(
            flags & !(libc::O_ACCMODE | libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_TMPFILE),
        )
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}
