//! A disk that is a file: a loop device with a file system, mounted. All of it goes when it is dropped.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
};

use anyhow::{Context, bail};

use crate::served_disk::{ServedDisk, Speed};

/// What is on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FileSystem {
    /// ext4, without blocks that only root may use.
    #[default]
    Ext4,
    /// XFS; it needs 300 MiB.
    Xfs,
    /// btrfs; it needs 110 MiB.
    Btrfs,
}

impl FileSystem {
    fn make(self, device: &str) -> anyhow::Result<()> {
        // Nothing is discarded: it is empty.
        let (program, arguments) = match self {
            Self::Ext4 => ("mkfs.ext4", ["-q", "-m", "0", "-E", "nodiscard"].as_slice()),
            Self::Xfs => ("mkfs.xfs", ["-q", "-f", "-K"].as_slice()),
            Self::Btrfs => ("mkfs.btrfs", ["-q", "-f", "--nodiscard"].as_slice()),
        };
        call(program, &[arguments, &[device]].concat()).map(drop)
    }
}

/// A mounted file system on a loop device of its own.
#[derive(Debug)]
pub struct LoopDevice {
    device: String,
    mount_point: PathBuf,
    file_system: FileSystem,
    bytes: u64,
    /// Its file system lets nobody write.
    held: AtomicBool,
    /// Who serves its image, if it can be made slow and fail. Dropped last: the others need it.
    served: Option<ServedDisk>,
}

impl LoopDevice {
    /// Makes an image of `bytes` in `directory`, and mounts it, as ext4, on `directory/mounted`.
    pub fn create(directory: &Path, bytes: u64) -> anyhow::Result<Self> {
        Self::create_as(directory, bytes, FileSystem::Ext4)
    }

    /// The same in a directory of this name, which is made.
    pub fn create_below(parent: &Path, name: &str, bytes: u64) -> anyhow::Result<Self> {
        let directory = parent.join(name);
        fs::create_dir(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
        Self::create(&directory, bytes)
    }

    /// The same with another file system.
    pub fn create_as(directory: &Path, bytes: u64, file_system: FileSystem) -> anyhow::Result<Self> {
        let image = directory.join("image");
        File::create(&image)?.set_len(bytes)?;
        Self::create_of(directory, attach(&image)?, bytes, file_system, None)
    }

    /// The same in memory that this process serves: it can be made [slow](Self::set_speed), to [fail](Self::fail_after), and to
    /// [vanish](Self::vanish).
    pub fn create_served(directory: &Path, bytes: u64, file_system: FileSystem) -> anyhow::Result<Self> {
        let (served, device) = serve(directory, bytes)?;
        Self::create_of(directory, device, bytes, file_system, Some(served))
    }

    fn create_of(
        directory: &Path,
        device: String,
        bytes: u64,
        file_system: FileSystem,
        served: Option<ServedDisk>,
    ) -> anyhow::Result<Self> {
        // From here on the device is given back, whatever fails.
        let (mount_point, held) = (directory.join("mounted"), AtomicBool::new(false));
        let made = Self { device, mount_point, file_system, bytes, held, served };
        fs::create_dir(&made.mount_point)?;
        file_system.make(&made.device)?;
        made.mount()?;
        Ok(made)
    }

    /// From here on it is so slow.
    pub fn set_speed(&self, speed: Speed) -> anyhow::Result<()> {
        self.served()?.set_speed(speed);
        Ok(())
    }

    /// Requests that it has had: reads, writes and flushes.
    pub fn requests(&self) -> anyhow::Result<u64> {
        Ok(self.served()?.requests())
    }

    /// After so many further requests all fail (EIO): whatever is read from it, written, or flushed.
    pub fn fail_after(&self, requests: u64) -> anyhow::Result<()> {
        self.served()?.fail_after(requests);
        Ok(())
    }

    /// From here on whoever writes to its file system waits in the kernel, and no signal reaches him (`FIFREEZE`): as where a disk hangs, at the
    /// very first write. Until it [goes on](Self::release), or is pulled out.
    pub fn hold(&self) -> anyhow::Result<()> {
        call("fsfreeze", &["--freeze", &self.mount_point.to_string_lossy()])?;
        self.held.store(true, Ordering::Release);
        Ok(())
    }

    /// Whoever waits goes on.
    pub fn release(&self) -> anyhow::Result<()> {
        if self.held.swap(false, Ordering::AcqRel) {
            call("fsfreeze", &["--unfreeze", &self.mount_point.to_string_lossy()])?;
        }
        Ok(())
    }

    /// It is pulled out while it is in use: no request is answered any more, and its file system is not mounted any more.
    pub fn vanish(&self) -> anyhow::Result<()> {
        self.served()?.vanish()?;
        // Whoever waits is told so.
        self.release()?;
        call("umount", &["--lazy", &self.mount_point.to_string_lossy()]).map(drop)
    }

    /// Puts an empty one in the place of one that failed or vanished.
    pub fn replace(&mut self) -> anyhow::Result<()> {
        let directory = self.mount_point.parent().context("no directory")?.to_owned();
        self.served()?;
        // What still uses it keeps it, or what is left of it.
        let _ = call("umount", &["--lazy", &self.mount_point.to_string_lossy()]);
        call("losetup", &["--detach", &self.device])?;
        drop(self.served.take());
        let (served, device) = serve(&directory, self.bytes)?;
        (self.served, self.device) = (Some(served), device);
        self.file_system.make(&self.device)?;
        self.mount()
    }

    /// `/dev/loopN`.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// Where it is mounted.
    pub fn mount_point(&self) -> &Path {
        &self.mount_point
    }

    /// The configuration of a storage pool on it, with further lines, in which `@` stands for its mount point.
    pub fn pool(&self, name: &str, lines: &str) -> String {
        let at = &self.mount_point;
        let lines = lines.replace('@', &at.to_string_lossy());
        format!("[[pool]]\nname = {name:?}\nstorage = {at:?}\nvolumes = {:?}\n{lines}\n\n", at.join("rswap"))
    }

    /// Mounts it.
    pub fn mount(&self) -> anyhow::Result<()> {
        call("mount", &[&self.device, &self.mount_point.to_string_lossy()]).map(drop)
    }

    /// Unmounts it.
    pub fn unmount(&self) -> anyhow::Result<()> {
        call("umount", &[&self.mount_point.to_string_lossy()]).map(drop)
    }

    fn served(&self) -> anyhow::Result<&ServedDisk> {
        self.served.as_ref().context("this disk is a plain file")
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        if let Some(served) = &self.served {
            served.set_speed(Speed::default());
        }
        if let Err(error) = self.release() {
            eprintln!("cannot clean up: {error:#}");
        }
        // It may be unmounted already.
        let _ = call("umount", &["--lazy", &self.mount_point.to_string_lossy()]);
        if let Err(error) = call("losetup", &["--detach", &self.device]) {
            eprintln!("cannot clean up: {error:#}");
        }
    }
}

/// A disk that this process serves, and the loop device of it.
fn serve(directory: &Path, bytes: u64) -> anyhow::Result<(ServedDisk, String)> {
    let at = (0..).map(|number| directory.join(format!("served-{number}"))).find(|path| !path.exists());
    let served = ServedDisk::serve(&at.context("no name is free")?, bytes)?;
    let device = attach(served.image())?;
    served.hide()?;
    Ok((served, device))
}

/// A loop device of `image`: its name.
fn attach(image: &Path) -> anyhow::Result<String> {
    Ok(call("losetup", &["--find", "--show", &image.to_string_lossy()])?.trim().to_owned())
}

fn call(program: &str, arguments: &[&str]) -> anyhow::Result<String> {
    let output =
        Command::new(program).args(arguments).output().with_context(|| format!("cannot start {program}"))?;
    if !output.status.success() {
        bail!("{program} {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
