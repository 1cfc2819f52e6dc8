//! Swap of a test's own: compressed memory (zram). It is taken from the kernel again when it is dropped.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, ensure};

use crate::sweep;

const CONTROL: &str = "/sys/class/zram-control";

/// A zram device that the kernel swaps to.
#[derive(Debug)]
pub struct SwapDevice {
    number: u32,
    /// Says after a killed test whose the device was.
    record: PathBuf,
}

/// Why this machine has no swap for tests, if it has none.
pub fn reason_to_skip() -> Option<&'static str> {
    if !Path::new("/proc/swaps").exists() {
        return Some("the kernel has no swap (CONFIG_SWAP)");
    }
    (!Path::new(CONTROL).join("hot_add").exists())
        .then_some("the kernel has no zram, or its module is not loaded")
}

impl SwapDevice {
    /// Makes one of so many bytes, which is not used yet.
    pub fn make(bytes: u64) -> anyhow::Result<Self> {
        let number =
            fs::read_to_string(Path::new(CONTROL).join("hot_add")).context("making a zram device")?;
        let number: u32 = number.trim().parse().context("the number of a zram device")?;
        let record = Path::new("/run").join(sweep::own_name(&format!("zram{number}")));
        let made = Self { number, record };
        fs::write(&made.record, "")?;
        made.set_size(bytes)?;
        Ok(made)
    }

    /// `/dev/zramN`.
    pub fn path(&self) -> PathBuf {
        format!("/dev/zram{}", self.number).into()
    }

    fn set_size(&self, bytes: u64) -> anyhow::Result<()> {
        let directory = PathBuf::from(format!("/sys/block/zram{}", self.number));
        fs::write(directory.join("reset"), "1").context("emptying the zram device")?;
        fs::write(directory.join("disksize"), bytes.to_string()).context("setting the zram device's size")?;
        run(Command::new("mkswap").arg("--quiet").arg(self.path()))
    }

    /// Gives it another size, while it is not used.
    pub fn resize(&self, bytes: u64) -> anyhow::Result<()> {
        self.set_size(bytes)
    }

    /// Has the kernel use it.
    pub fn on(&self, priority: i32) -> anyhow::Result<()> {
        run(Command::new("swapon").args(["--priority", &priority.to_string()]).arg(self.path()))
    }

    /// Has the kernel bring back what is there, and use it no longer.
    pub fn off(&self) -> anyhow::Result<()> {
        run(Command::new("swapoff").arg(self.path()))
    }
}

impl Drop for SwapDevice {
    fn drop(&mut self) {
        if let Err(error) = remove(self.number) {
            eprintln!("cannot remove /dev/zram{}: {error:#}", self.number);
            return;
        }
        let _ = fs::remove_file(&self.record);
    }
}

/// Removes the device that a killed test has left; `name` is that of its record behind the prefix.
pub(crate) fn remove_stale(record: &Path) -> anyhow::Result<()> {
    let name = record.file_name().unwrap_or_default().to_string_lossy();
    let number = name.rsplit_once("-zram").and_then(|(_, number)| number.parse().ok());
    if let Some(number) = number {
        if Path::new(&format!("/sys/block/zram{number}")).exists() {
            remove(number)?;
        }
        fs::remove_file(record)?;
    }
    Ok(())
}

fn remove(number: u32) -> anyhow::Result<()> {
    let swaps = fs::read_to_string("/proc/swaps")?;
    let device = format!("/dev/zram{number}");
    if swaps.lines().any(|line| line.split_whitespace().next() == Some(&device)) {
        run(Command::new("swapoff").arg(&device))?;
    }
    fs::write(Path::new(CONTROL).join("hot_remove"), number.to_string())?;
    Ok(())
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let output = command.output().with_context(|| format!("cannot start {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}
