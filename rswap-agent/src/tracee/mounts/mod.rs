//! Mounts that were made inside of an instance: they are described by the survey, and made again in a stub when all that
//! they are to show is there.
//!
//! ```text
//! source                                  destination
//!   survey  whose is each, and from where   make   in the same order, in the new mount namespace
//!   covered who uses what is hidden         survey of what was made: it must say the same
//! ```
//!
//! A tmpfs is read and written as a volume is (`crate::volume`); it has no directory of its host's.

mod covered;
mod info;
mod make;
mod survey;

use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::files::Shown;

pub use self::{
    covered::covered,
    make::make,
    survey::{Refused, Survey, open_memory, require_same, survey},
};

/// Why what is hidden isn't carried.
pub const HIDDEN: &str =
    "something was mounted over it, or it was renamed a moment ago: its path leads elsewhere now";

/// Options of a file system, with their values.
pub type Options = Vec<(String, Option<String>)>;

/// Bytes of a path at most: two of them fit a stub's scratch page.
const LONGEST_PATH: usize = 1500;
/// Mounts at most.
const MOST: usize = 1000;

/// The mounts that an instance has made, and that are made again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mounts {
    /// Its file systems in memory.
    pub memories: Vec<Memory>,
    /// In the order in which they are made.
    pub list: Vec<Mount>,
}

/// A tmpfs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// As what it was mounted: a name that means nothing.
    pub source: String,
    /// Its limits, and what its root directory is made with.
    pub options: Options,
    /// Nobody may write to it.
    pub read_only: bool,
}

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Where the instance has it.
    pub point: PathBuf,
    /// What is there.
    pub what: What,
    /// `MS_RDONLY`, `MS_NOSUID` and so on.
    pub flags: u64,
    /// What the host mounts where it comes from appears in it.
    pub follows_host: bool,
    /// No other mount lies over it.
    pub visible: bool,
}

/// What is mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum What {
    /// All of the tmpfs with this number.
    Memory(u32),
    /// What an earlier mount of the list shows, or a part of it.
    Again {
        /// Which one, by its place in the list.
        of: u32,
        /// Below its root; empty for all.
        path: PathBuf,
    },
    /// What the instance had under this path when it was started: a directory or file of the host or of a volume.
    Bind {
        /// The path.
        from: PathBuf,
        /// It is a directory.
        directory: bool,
    },
    /// A file system that shows what the kernel knows of the instance.
    Kernel {
        /// Which one.
        kind: String,
        /// How it was mounted.
        options: Options,
        /// Nobody may write to it, by whatever mount.
        read_only: bool,
    },
    /// Nothing new: a mount of the host's that has other flags here.
    Host,
}

/// File systems of the kernel's that are made anew.
const KERNEL: [&str; 5] = ["proc", "sysfs", "mqueue", "devpts", "cgroup2"];
/// Options of a tmpfs that are carried.
const MEMORY_OPTIONS: [&str; 9] =
    ["size", "nr_inodes", "mode", "uid", "gid", "huge", "noswap", "inode32", "inode64"];

impl Mounts {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// What a mount shows; nothing of its own where the host's lies.
    pub fn shown(&self, mount: &Mount) -> Option<Shown> {
        match &mount.what {
            What::Memory(_) => Some(Shown::Memory),
            What::Kernel { .. } => Some(Shown::Kernel),
            What::Bind { from, .. } => Some(Shown::Path(from.clone())),
            What::Again { of, .. } => match self.list.get(*of as usize)?.what {
                What::Memory(_) => Some(Shown::Memory),
                _ => Some(Shown::Kernel),
            },
            What::Host => None,
        }
    }

    /// Whether they can be an instance's: they may come from any peer.
    pub fn is_sound(&self) -> bool {
        let options =
            |options: &Options| options.iter().all(|(name, value)| is_plain(name, value.as_deref()));
        let sound = |(at, mount): (usize, &Mount)| {
            is_path(&mount.point)
                && match &mount.what {
                    What::Memory(number) => (*number as usize) < self.memories.len(),
                    What::Again { of, path } => (*of as usize) < at && is_below(path),
                    What::Bind { from, .. } => from == Path::new("/") || is_path(from),
                    What::Kernel { kind, options: all, .. } => {
                        KERNEL.contains(&kind.as_str()) && options(all)
                    }
                    What::Host => true,
                }
        };
        self.list.len() <= MOST
            && self.memories.len() <= self.list.len()
            && self.memories.iter().all(|memory| {
                is_plain(&memory.source, None)
                    && options(&memory.options)
                    && memory.options.iter().all(|(name, _)| MEMORY_OPTIONS.contains(&name.as_str()))
            })
            && self.list.iter().enumerate().all(sound)
    }

    /// What of this host is missing for them: the path, and what it is for. `volumes`: where the instance sees its volumes, whose
    /// contents come along.
    pub fn lacking(&self, volumes: &[PathBuf]) -> Vec<(PathBuf, String)> {
        let comes = |path: &Path| volumes.iter().any(|volume| path.starts_with(volume));
        let mut found = Vec::new();
        for (at, mount) in self.list.iter().enumerate() {
            if let What::Bind { from, directory } = &mount.what
                && !comes(from)
                && !std::fs::metadata(from).is_ok_and(|here| here.is_dir() == *directory)
            {
                found.push((
                    from.clone(),
                    format!("the instance has it mounted at {}", mount.point.display()),
                ));
            }
            // What it lies on: the last one before it that holds its mount point.
            let below = self.list[..at].iter().rev().find(|other| mount.point.starts_with(&other.point));
            let on_host = match below.map(|other| (&other.what, mount.point.strip_prefix(&other.point))) {
                None => Some(mount.point.clone()),
                Some((What::Bind { from, .. }, Ok(rest))) => Some(from.join(rest)),
                Some(_) => None,
            };
            if let Some(point) = on_host.filter(|point| !comes(point) && !point.exists()) {
                found.push((point, "the instance has something mounted there".to_owned()));
            }
        }
        found
    }
}

/// Whether an option, or another word, could be one of mount(8)'s.
fn is_plain(name: &str, value: Option<&str>) -> bool {
    let plain = |text: &str| text.len() <= 200 && !text.contains(['\0', ',', '\n']);
    plain(name) && value.is_none_or(plain)
}

/// Whether a path is absolute, plain and not too long, and not the root.
fn is_path(path: &Path) -> bool {
    let mut parts = path.components();
    parts.next() == Some(Component::RootDir)
        && parts.clone().next().is_some()
        && parts.all(|part| matches!(part, Component::Normal(_)))
        && path.as_os_str().len() <= LONGEST_PATH
}

/// Whether a path leads downwards, or nowhere.
fn is_below(path: &Path) -> bool {
    path.components().all(|part| matches!(part, Component::Normal(_)))
        && path.as_os_str().len() <= LONGEST_PATH
}
