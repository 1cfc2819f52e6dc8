//! Where volumes are on a host: `DIRECTORY/INSTANCE/NAME`, and beside them what arrives and what goes.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::fs::StatVfs;

use super::VolumeError;

/// What begins so is no instance's: names of instances begin with a letter or digit.
const ARRIVING: &str = ".arriving-";
const GONE: &str = ".gone-";

/// The place of an instance's volume.
pub fn of(directory: &Path, instance: &str, name: &str) -> PathBuf {
    directory.join(instance).join(name)
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
    fs::rename(&place, &gone).map_err(VolumeError::host("taking away", &place))?;
    // Of the instance nothing else may be left.
    let _ = fs::remove_dir(directory.join(instance));
    std::thread::spawn(move || {
        if let Err(error) = fs::remove_dir_all(&gone) {
            tracing::warn!(path = %gone.display(), %error, "a volume that went could not be removed");
        }
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
