//! A disk that is a file: a loop device with a file system, mounted. All of it goes when it is dropped.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, bail};

/// A mounted ext4 on a loop device of its own.
#[derive(Debug)]
pub struct LoopDevice {
    device: String,
    mount_point: PathBuf,
}

impl LoopDevice {
    /// Makes an image of `bytes` in `directory`, and mounts it on `directory/mounted`.
    pub fn create(directory: &Path, bytes: u64) -> anyhow::Result<Self> {
        let image = directory.join("image");
        File::create(&image)?.set_len(bytes)?;
        let mount_point = directory.join("mounted");
        std::fs::create_dir(&mount_point)?;
        let device = call("losetup", &["--find", "--show", &image.to_string_lossy()])?.trim().to_owned();
        // From here on the device is given back, whatever fails.
        let made = Self { device, mount_point };
        call("mkfs.ext4", &["-q", "-m", "0", &made.device])?;
        made.mount()?;
        Ok(made)
    }

    /// `/dev/loopN`.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// Where it is mounted.
    pub fn mount_point(&self) -> &Path {
        &self.mount_point
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

fn call(program: &str, arguments: &[&str]) -> anyhow::Result<String> {
    let output =
        Command::new(program).args(arguments).output().with_context(|| format!("cannot start {program}"))?;
    if !output.status.success() {
        bail!("{program} {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
