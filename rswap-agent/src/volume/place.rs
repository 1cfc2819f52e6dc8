//! Where volumes are on a host: `DIRECTORY/INSTANCE/NAME`, and beside them what arrives and what goes.
//!
//! That place is the volume's directory itself, or a symbolic link to `POOL/INSTANCE/.NAME-NUMBER` in a storage pool's
//! directory. Which copy counts is what stands there, and it changes in one step ([`Switch`]).

use std::{
    fs,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::{SystemTime, UNIX_EPOCH},
};

use procfs::process::Process;
use rustix::{
    fs::{AtFlags, CWD, RenameFlags, StatVfs, Statx, StatxAttributes, StatxFlags},
    io::Errno,
};
use serde::{Deserialize, Serialize};

use super::VolumeError;

/// What begins so is no instance's: names of instances begin with a letter or digit.
const ARRIVING: &str = ".arriving-";
const GONE: &str = ".gone-";

/// The place of an instance's volume.
pub fn of(directory: &Path, instance: &str, name: &str) -> PathBuf {
    directory.join(instance).join(name)
}

/// A change of the place of a volume to a copy in a storage pool's directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Switch {
    /// The volume's place.
    pub place: PathBuf,
    /// What stands there is exchanged with this name beside it.
    aside: PathBuf,
    /// The directory before.
    before: PathBuf,
    /// The directory after.
    pub after: PathBuf,
}

impl Switch {
    /// From where `instance`'s volume `name` in `directory` is to a new directory in `pool`. Nothing is done yet.
    pub fn plan(directory: &Path, instance: &str, name: &str, pool: &Path) -> Result<Self, VolumeError> {
        let place = of(directory, instance, name);
        let before = fs::canonicalize(&place).map_err(VolumeError::host("looking for", &place))?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let fresh = format!(".{name}-{:x}", now.as_nanos());
        let after = pool.join(instance).join(&fresh);
        let aside = directory.join(instance).join(format!(".aside{fresh}"));
        Ok(Self { place, aside, before, after })
    }

    /// Whether the new directory is the volume.
    ///
    /// # Errors
    /// Nobody can tell, as where the file system of the place is not mounted: neither directory may be used or removed then.
    pub fn is_made(&self) -> Result<bool, VolumeError> {
        match fs::read_link(&self.place) {
            Ok(to) => Ok(to == self.after),
            // It is the old directory itself.
            Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => Ok(false),
            Err(error) => Err(VolumeError::host("looking which directory is", &self.place)(error)),
        }
    }

    /// Where the old directory is.
    pub fn old(&self) -> Result<&Path, VolumeError> {
        // It stood at the place itself, and was put aside.
        Ok(if self.before == self.place && self.is_made()? { &self.aside } else { &self.before })
    }

    /// Makes ready for [`Self::make`], and the way to the new directory's place, which is on the disk when this returns.
    pub fn prepare(&self) -> Result<(), VolumeError> {
        let above = self.after.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(above).map_err(VolumeError::host("making", above))?;
        sync_above(&self.after)?;
        std::os::unix::fs::symlink(&self.after, &self.aside)
            .map_err(VolumeError::host("making", &self.aside))?;
        self.sync()
    }

    /// From here on the new directory is the volume, or, the second time, the old one again. In one step, which is on the disk
    /// when it was [synced](Self::sync).
    pub fn make(&self) -> Result<(), VolumeError> {
        rustix::fs::renameat_with(CWD, &self.aside, CWD, &self.place, RenameFlags::EXCHANGE)
            .map_err(VolumeError::host("exchanging", &self.place))
    }

    /// What stands at the place now is so on the disk, too, when this returns.
    pub fn sync(&self) -> Result<(), VolumeError> {
        let parent = self.place.parent().unwrap_or(Path::new("/"));
        fs::File::open(parent)
            .and_then(|parent| parent.sync_all())
            .map_err(VolumeError::host("syncing", parent))
    }

    /// The disk of the new directory answers, and its file system has not given it up.
    pub fn require_disk(&self) -> Result<(), VolumeError> {
        let failed = || VolumeError::host("syncing", &self.after);
        let directory = fs::File::open(&self.after).map_err(failed())?;
        let found = directory.metadata().map_err(failed())?;
        let (accessed, modified) = (found.accessed().map_err(failed())?, found.modified().map_err(failed())?);
        let times = fs::FileTimes::new().set_accessed(accessed).set_modified(modified);
        // As they are: so that there is something to be written. Of a directory that is on the disk already nothing is asked of that.
        directory.set_times(times).map_err(failed())?;
        directory.sync_all().map_err(VolumeError::host("syncing", &self.after))
    }

    /// Removes the directory that is not the volume, and what only the change needed. It takes long.
    ///
    /// # Errors
    /// Which of them it is can't be told, and both are left.
    pub fn clean(&self) -> Result<(), VolumeError> {
        let loser = if self.is_made()? { self.old()?.to_owned() } else { self.after.clone() };
        if fs::symlink_metadata(&self.aside).is_ok_and(|found| found.is_symlink())
            && let Err(error) = fs::remove_file(&self.aside)
        {
            tracing::warn!(path = %self.aside.display(), %error, "a link is left");
        }
        match fs::remove_dir_all(&loser) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(path = %loser.display(), %error, "a copy of a volume that moved is left");
            }
            _ => {}
        }
        // Other volumes may be in it.
        let _ = loser.parent().map(fs::remove_dir);
        Ok(())
    }
}

/// A path in `directory` that nobody else uses, for a volume that arrives.
pub fn arriving(directory: &Path) -> Result<PathBuf, VolumeError> {
    make(directory)?;
    Ok(unused(directory, ARRIVING))
}

/// Makes the directory of all volumes, for root only: programs reach theirs by their mounts.
pub fn make(directory: &Path) -> Result<(), VolumeError> {
    use std::os::unix::fs::DirBuilderExt;
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(directory);
    made.map_err(VolumeError::host("making", directory))
}

/// A pool whose disk was taken away leaves an empty directory of another disk: nothing may be put there. Nor may it if `directory`,
/// which is at or below `mount_point`, is on yet another disk, which could be taken away, too.
pub fn require_mounted(mount_point: &Path, directory: &Path) -> Result<(), VolumeError> {
    let refused = |path: &Path, text: &str| {
        let error = std::io::Error::new(std::io::ErrorKind::NotFound, text);
        Err(VolumeError::host("looking for the disk of", path)(error))
    };
    let root = look(mount_point)?;
    // Linux 5.8.
    let is_mounted = if root.stx_attributes_mask.contains(StatxAttributes::MOUNT_ROOT) {
        root.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)
    } else {
        mount_of(mount_point)? == canonical(mount_point)?
    };
    if !is_mounted {
        return refused(mount_point, "no file system is mounted there");
    }
    // It is made when it is first needed.
    let there = directory.ancestors().find(|path| path.exists()).unwrap_or(mount_point);
    let found = look(there)?;
    if (found.stx_dev_major, found.stx_dev_minor) == (root.stx_dev_major, root.stx_dev_minor) {
        return Ok(());
    }
    // Subvolumes of btrfs have device numbers of their own.
    let told = |of: &Statx| of.stx_mask & StatxFlags::MNT_ID.bits() != 0;
    let is_together = if told(&root) && told(&found) {
        found.stx_mnt_id == root.stx_mnt_id
    } else {
        mount_of(there)? == mount_of(mount_point)?
    };
    if is_together {
        return Ok(());
    }
    let text = format!(
        "it is on another file system than {}: name the mount point of that one as the pool's storage",
        mount_point.display()
    );
    refused(there, &text)
}

/// The directory of `place`, and the one of that: both may have been made with it.
pub fn above(place: &Path) -> Result<Vec<OwnedFd>, VolumeError> {
    let open = |directory: &Path| {
        fs::File::open(directory).map(OwnedFd::from).map_err(VolumeError::host("opening", directory))
    };
    place.ancestors().skip(1).take(2).map(open).collect()
}

/// The directories on the way to `place`, as far as they are on its file system, are on the disk when this returns.
fn sync_above(place: &Path) -> Result<(), VolumeError> {
    let mut device = None;
    for directory in place.ancestors().skip(1) {
        let found = look(directory)?;
        if *device.get_or_insert((found.stx_dev_major, found.stx_dev_minor))
            != (found.stx_dev_major, found.stx_dev_minor)
        {
            break;
        }
        fs::File::open(directory)
            .and_then(|directory| directory.sync_all())
            .map_err(VolumeError::host("syncing", directory))?;
    }
    Ok(())
}

fn look(path: &Path) -> Result<Statx, VolumeError> {
    rustix::fs::statx(CWD, path, AtFlags::empty(), StatxFlags::BASIC_STATS | StatxFlags::MNT_ID)
        .map_err(VolumeError::host("looking at", path))
}

fn canonical(path: &Path) -> Result<PathBuf, VolumeError> {
    fs::canonicalize(path).map_err(VolumeError::host("looking for", path))
}

/// The mount point of what is mounted at or above `path`, for kernels that don't tell by statx(2).
fn mount_of(path: &Path) -> Result<PathBuf, VolumeError> {
    let list = Path::new("/proc/self/mountinfo");
    let mounts = Process::myself()
        .and_then(|process| process.mountinfo())
        .map_err(|error| VolumeError::host("reading", list)(std::io::Error::other(error.to_string())))?;
    let path = canonical(path)?;
    let above = mounts.into_iter().map(|mount| mount.mount_point).filter(|point| path.starts_with(point));
    Ok(above.max_by_key(|point| point.components().count()).unwrap_or_default())
}

fn unused(directory: &Path, prefix: &str) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    directory.join(format!("{prefix}{}-{count}", std::process::id()))
}

/// Bytes and inodes that are free for root where `directory` is or would be.
pub fn room(directory: &Path) -> Result<(u64, u64), VolumeError> {
    let there = directory.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let StatVfs { f_frsize, f_bfree, f_ffree, f_files, .. } =
        rustix::fs::statvfs(there).map_err(VolumeError::host("looking for room in", there))?;
    // Some file systems make inodes as they need them.
    let inodes = if f_files == 0 { u64::MAX } else { f_ffree };
    Ok((f_frsize.saturating_mul(f_bfree), inodes))
}

/// Takes a volume away that went along with its instance. It takes long to remove one, and nobody has to wait for that.
pub fn remove(directory: &Path, instance: &str, name: &str) -> Result<(), VolumeError> {
    let place = of(directory, instance, name);
    let gone = unused(directory, GONE);
    // It may be in a storage pool.
    let in_pool = fs::read_link(&place).ok();
    fs::rename(&place, &gone).map_err(VolumeError::host("taking away", &place))?;
    // Of the instance nothing else may be left.
    let _ = fs::remove_dir(directory.join(instance));
    std::thread::spawn(move || {
        for path in in_pool.iter().chain([&gone]) {
            if let Err(error) = fs::remove_dir_all(path) {
                tracing::warn!(path = %path.display(), %error, "a volume that went could not be removed");
            }
        }
        let _ = in_pool.and_then(|path| path.parent().map(fs::remove_dir));
    });
    Ok(())
}

/// Removes what an agent that was killed left half done. To be called while no migration is under way.
pub fn sweep(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if (name.starts_with(ARRIVING) || name.starts_with(GONE))
            && let Err(error) = fs::remove_dir_all(entry.path())
        {
            tracing::warn!(path = %entry.path().display(), %error, "it could not be removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A volume with one file in the home directory, and a pool.
    fn volume() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let (home, pool) = (directory.path().join("home"), directory.path().join("pool"));
        fs::create_dir_all(of(&home, "db", "data")).expect("create");
        fs::write(of(&home, "db", "data").join("file"), "old").expect("write");
        (directory, home, pool)
    }

    fn copy(switch: &Switch, contents: &str) {
        fs::create_dir_all(&switch.after).expect("create");
        fs::write(switch.after.join("file"), contents).expect("write");
    }

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        let mut names: Vec<String> =
            entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_place_is_switched_there_on_and_back_with_one_copy_left() {
        let (_directory, home, pool) = volume();
        let place = of(&home, "db", "data");
        for (number, to) in [(1, &pool), (2, &home), (3, &pool), (4, &pool)] {
            let switch = Switch::plan(&home, "db", "data", to).expect("plan");
            copy(&switch, &number.to_string());
            switch.prepare().expect("prepare");
            assert!(!switch.is_made().expect("look"));
            assert!(switch.old().expect("look").join("file").exists());
            switch.make().expect("make");
            assert!(switch.is_made().expect("look"));
            assert!(switch.old().expect("look").join("file").exists());
            switch.clean().expect("clean");
            assert_eq!(fs::read_to_string(place.join("file")).expect("read"), number.to_string());
            let left: Vec<_> = names(&home.join("db")).into_iter().chain(names(&pool.join("db"))).collect();
            assert_eq!(left.len(), 2, "{left:?}");
        }
    }

    #[test]
    fn a_switch_that_is_given_up_before_or_after_it_was_made_leaves_the_old_copy() {
        let (_directory, home, pool) = volume();
        for made in [false, true] {
            let switch = Switch::plan(&home, "db", "data", &pool).expect("plan");
            copy(&switch, "new");
            switch.prepare().expect("prepare");
            for _ in 0..2 * usize::from(made) {
                switch.make().expect("make");
            }
            switch.clean().expect("clean");
            assert_eq!(fs::read_to_string(of(&home, "db", "data").join("file")).expect("read"), "old");
            assert_eq!((names(&home.join("db")), names(&pool)), (vec!["data".to_owned()], vec![]));
        }
    }

    #[test]
    fn where_the_place_can_not_be_seen_neither_copy_is_removed() {
        let (directory, home, pool) = volume();
        let switch = Switch::plan(&home, "db", "data", &pool).expect("plan");
        copy(&switch, "new");
        switch.prepare().and_then(|()| switch.make()).expect("switch");
        // As it is before that file system is mounted.
        let elsewhere = directory.path().join("elsewhere");
        fs::rename(&home, &elsewhere).expect("rename");
        switch.clean().expect_err("nobody can tell");
        assert!(switch.old().is_err());
        assert_eq!(fs::read_to_string(switch.after.join("file")).expect("read"), "new");
        fs::rename(&elsewhere, &home).expect("rename");
        switch.clean().expect("clean");
        assert_eq!(fs::read_to_string(of(&home, "db", "data").join("file")).expect("read"), "new");
        assert_eq!(names(&home.join("db")), ["data"]);
    }

    #[test]
    fn a_directory_in_which_nothing_is_mounted_is_no_disk() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path();
        let error = require_mounted(path, &path.join("rswap")).expect_err("nothing is mounted there");
        assert!(error.to_string().contains("the disk of"), "{error}");
        for below in ["/proc", "/proc/self", "/proc/none/here"] {
            require_mounted(Path::new("/proc"), Path::new(below)).expect("it is mounted");
        }
        let elsewhere = require_mounted(Path::new("/proc"), path).expect_err("it is on another disk");
        assert!(elsewhere.to_string().contains("the disk of"), "{elsewhere}");
    }

    #[test]
    fn mounts_are_found_without_statx() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path();
        assert_eq!(mount_of(Path::new("/proc")).expect("look"), Path::new("/proc"));
        let above = mount_of(path).expect("look");
        assert!(above != path && path.starts_with(&above), "{above:?}");
    }

    #[test]
    fn one_that_leaves_is_removed_from_its_pool() {
        let (_directory, home, pool) = volume();
        let switch = Switch::plan(&home, "db", "data", &pool).expect("plan");
        copy(&switch, "new");
        switch.prepare().and_then(|()| switch.make()).and_then(|()| switch.sync()).expect("switch");
        switch.clean().expect("clean");
        remove(&home, "db", "data").expect("remove");
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while switch.after.exists() || !names(&home).is_empty() {
            assert!(std::time::Instant::now() < deadline, "it is still there");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}
