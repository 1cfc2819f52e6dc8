//! Makes the mounts of an instance again, by system calls of a stub in its namespaces.

use std::{
    os::{
        fd::{BorrowedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use nix::mount::MsFlags;

use super::{
    super::{
        TraceeError,
        link::{Link, STUB_END},
        remote::Remote,
    },
    Mount, Mounts, Options, What,
    survey::survey_of,
};

/// Where the second of two texts lies in the scratch page, and the third.
const SECOND: u64 = 1600;
const THIRD: u64 = 3200;

/// Makes `mounts` in the namespace of the stub `remote`, whose instance sees its volumes at `volumes`. `memories`: each tmpfs, mounted
/// nowhere yet.
///
/// # Errors
/// What can't be made, or was made otherwise than it was at the source.
pub fn make(
    mounts: &Mounts,
    volumes: &[PathBuf],
    memories: &[BorrowedFd<'_>],
    remote: &mut Remote,
    link: &Link,
) -> Result<(), TraceeError> {
    let mut maker = Maker { remote, shown: vec![None; mounts.list.len()] };
    // Before anything lies over them.
    for (at, mount) in mounts.list.iter().enumerate() {
        if let What::Bind { from, .. } = &mount.what {
            let tree = maker
                .copy_of(libc::AT_FDCWD, from)
                .map_err(|error| wrong("can't be mounted from", from, &error))?;
            maker.shown[at] = Some(tree);
        }
    }
    for (at, mount) in mounts.list.iter().enumerate() {
        let made = match &mount.what {
            What::Memory(number) => {
                let missing = || TraceeError::Unsupported(format!("there is no tmpfs {number}"));
                let memory = memories.get(*number as usize).ok_or_else(missing)?;
                let given = link.give(maker.remote, STUB_END, memory)?;
                maker.shown[at] = Some(given);
                maker.attach(given, &mount.point)
            }
            What::Again { of, path } => {
                let shown = maker.shown.get(*of as usize).copied().flatten().unwrap_or(-1);
                maker.copy_of(shown, path).and_then(|tree| {
                    maker.shown[at] = Some(tree);
                    maker.attach(tree, &mount.point)
                })
            }
            What::Bind { .. } => maker.attach(maker.shown[at].unwrap_or(-1), &mount.point),
            What::Kernel { kind, options, read_only } => {
                maker.mount(kind, options, *read_only, &mount.point).and_then(|()| {
                    maker.shown[at] = Some(maker.tree(libc::AT_FDCWD, &mount.point, 0)?);
                    Ok(())
                })
            }
            What::Host => Ok(()),
        };
        made.and_then(|()| maker.set(&mount.point, mount.flags, mount.follows_host))
            .map_err(|error| wrong("can't be mounted at the destination: at", &mount.point, &error))?;
    }
    for shown in std::mem::take(&mut maker.shown).into_iter().flatten() {
        maker.remote.call("close", libc::SYS_close, [shown as u64, 0, 0, 0, 0, 0])?;
    }
    let pid = maker.remote.tid();
    require_alike(mounts, pid, volumes)
}

/// What was made must look as it did at the source.
fn require_alike(mounts: &Mounts, pid: i32, volumes: &[PathBuf]) -> Result<(), TraceeError> {
    let here = survey_of(pid, volumes)?;
    if let Some(refused) = here.refused.first() {
        return Err(TraceeError::Unsupported(format!(
            "{} at the destination: {}",
            refused.item(),
            refused.reason
        )));
    }
    // Whether a mount follows its host's depends on whether that host's can be followed.
    let told = |mounts: &Mounts| -> Vec<Mount> {
        let all = mounts.list.iter().filter(|mount| mount.what != What::Host);
        all.map(|mount| Mount { follows_host: false, ..mount.clone() }).collect()
    };
    let (here, there) = (told(&here.mounts), told(mounts));
    let differing = here.iter().zip(&there).find(|(here, there)| here != there);
    if let Some((here, there)) = differing {
        let text = format!("a mount of the instance's came out differently: {here:?} instead of {there:?}");
        return Err(TraceeError::Unsupported(text));
    }
    match here.len() == there.len() {
        true => Ok(()),
        false => {
            let text = format!("the instance has {} mounts and had {}", here.len(), there.len());
            Err(TraceeError::Unsupported(text))
        }
    }
}

fn wrong(what: &str, path: &Path, error: &TraceeError) -> TraceeError {
    let why = match error {
        TraceeError::Remote { source, .. } => source.to_string(),
        other => other.to_string(),
    };
    TraceeError::Unsupported(format!("a mount of the instance's {what} {}: {why}", path.display()))
}

struct Maker<'a> {
    remote: &'a mut Remote,
    /// The stub's descriptors of what each mount shows.
    shown: Vec<Option<RawFd>>,
}

impl Maker<'_> {
    /// What `path` shows, below `from` or absolute; empty for `from` itself: to be attached elsewhere.
    fn copy_of(&mut self, from: RawFd, path: &Path) -> Result<RawFd, TraceeError> {
        self.tree(from, path, libc::OPEN_TREE_CLONE)
    }

    fn tree(&mut self, from: RawFd, path: &Path, flags: u32) -> Result<RawFd, TraceeError> {
        let at = self.text(0, path.as_os_str().as_bytes())?;
        let flags =
            flags | libc::OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH as u32 | libc::AT_SYMLINK_NOFOLLOW as u32;
        let args = [from as u64, at, flags.into(), 0, 0, 0];
        self.remote.call("open_tree", libc::SYS_open_tree, args).map(|tree| tree as RawFd)
    }

    fn attach(&mut self, tree: RawFd, point: &Path) -> Result<(), TraceeError> {
        let from = self.text(0, b"")?;
        let at = self.text(SECOND, point.as_os_str().as_bytes())?;
        let args = [tree as u64, from, libc::AT_FDCWD as u64, at, libc::MOVE_MOUNT_F_EMPTY_PATH.into(), 0];
        self.remote.call("move_mount", libc::SYS_move_mount, args).map(drop)
    }

    fn mount(
        &mut self,
        kind: &str,
        options: &Options,
        read_only: bool,
        point: &Path,
    ) -> Result<(), TraceeError> {
        let words = options.iter().map(|(name, value)| match value {
            Some(value) => format!("{name}={value}"),
            None => name.clone(),
        });
        let words = words.collect::<Vec<_>>().join(",");
        let kind = self.text(0, kind.as_bytes())?;
        let at = self.text(SECOND, point.as_os_str().as_bytes())?;
        let data = self.text(THIRD, words.as_bytes())?;
        let flags = if read_only { MsFlags::MS_RDONLY.bits() } else { 0 };
        self.remote.call("mount", libc::SYS_mount, [kind, at, kind, flags, data, 0]).map(drop)
    }

    /// Sets a mount's own flags, and whether it follows what it comes from.
    fn set(&mut self, point: &Path, flags: u64, follows_host: bool) -> Result<(), TraceeError> {
        let at = self.text(0, point.as_os_str().as_bytes())?;
        let flags = flags | (MsFlags::MS_REMOUNT | MsFlags::MS_BIND).bits();
        self.remote.call("mount", libc::SYS_mount, [0, at, 0, flags, 0, 0])?;
        if !follows_host {
            let private = MsFlags::MS_PRIVATE.bits();
            self.remote.call("mount", libc::SYS_mount, [0, at, 0, private, 0, 0])?;
        }
        Ok(())
    }

    fn text(&mut self, offset: u64, text: &[u8]) -> Result<u64, TraceeError> {
        self.remote.put(offset, &[text, &[0]].concat())
    }
}
