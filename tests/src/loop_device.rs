//! A disk that is a file: a loop device with a file system, mounted. All of it goes when it is dropped.

use std::{
    fs::File,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, bail};
use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
};

/// A mounted ext4 on a loop device of its own.
#[derive(Debug)]
pub struct LoopDevice {
    device: String,
    mount_point: PathBuf,
    /// The memory that its image is, if it can fail.
    memory: Option<File>,
}

impl LoopDevice {
    /// Makes an image of `bytes` in `directory`, and mounts it on `directory/mounted`.
    pub fn create(directory: &Path, bytes: u64) -> anyhow::Result<Self> {
        let image = directory.join("image");
        File::create(&image)?.set_len(bytes)?;
        Self::create_of(directory, &image, None)
    }

    /// The same in a directory of this name, which is made.
    pub fn create_below(parent: &Path, name: &str, bytes: u64) -> anyhow::Result<Self> {
        let directory = parent.join(name);
        std::fs::create_dir(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
        Self::create(&directory, bytes)
    }

    /// The same in memory. It can be made to [fail](Self::fail).
    pub fn create_that_can_fail(directory: &Path, bytes: u64) -> anyhow::Result<Self> {
        let (memory, image) = memory(bytes)?;
        Self::create_of(directory, &image, Some(memory))
    }

    fn create_of(directory: &Path, image: &Path, memory: Option<File>) -> anyhow::Result<Self> {
        let mount_point = directory.join("mounted");
        std::fs::create_dir(&mount_point)?;
        let made = Self { device: attach(image)?, mount_point, memory };
        // From here on the device is given back, whatever fails.
        call("mkfs.ext4", &["-q", "-m", "0", &made.device])?;
        made.mount()?;
        Ok(made)
    }

    /// From here on whatever is written to it fails (EIO).
    pub fn fail(&self) -> anyhow::Result<()> {
        let memory = self.memory.as_ref().context("it can't fail")?;
        fcntl(memory, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).context("sealing its image")?;
        Ok(())
    }

    /// Puts an empty one in the place of one that failed.
    pub fn replace(&mut self) -> anyhow::Result<()> {
        let bytes = self.memory.as_ref().context("it can't fail")?.metadata()?.len();
        self.unmount()?;
        call("losetup", &["--detach", &self.device])?;
        let (memory, image) = memory(bytes)?;
        self.device = attach(&image)?;
        self.memory = Some(memory);
        call("mkfs.ext4", &["-q", "-m", "0", &self.device])?;
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

    /// The configuration of a storage pool on it, with further lines.
    pub fn pool(&self, name: &str, lines: &str) -> String {
        let at = &self.mount_point;
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
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // It may be unmounted already.
        let _ = call("umount", &["--lazy", &self.mount_point.to_string_lossy()]);
        if let Err(error) = call("losetup", &["--detach", &self.device]) {
            eprintln!("cannot clean up: {error:#}");
        }
    }
}

/// Memory that is a disk's image, and its path.
fn memory(bytes: u64) -> anyhow::Result<(File, PathBuf)> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let memory = File::from(memfd_create(c"disk", flags)?);
    memory.set_len(bytes)?;
    let image = PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), memory.as_raw_fd()));
    Ok((memory, image))
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
