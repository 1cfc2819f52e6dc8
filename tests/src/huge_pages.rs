//! Huge pages for programs that want some.

use std::fs;

use anyhow::Context;

/// Huge pages that are set aside, and given back at the end.
#[derive(Debug)]
pub struct HugePages {
    before: u64,
    /// As many were set aside as were wanted.
    pub enough: bool,
}

const SETTING: &str = "/proc/sys/vm/nr_hugepages";

impl HugePages {
    /// Sets `pages` of 2 MiB aside, besides those that are already.
    pub fn reserve(pages: u64) -> anyhow::Result<Self> {
        let read = || -> anyhow::Result<u64> {
            fs::read_to_string(SETTING)?.trim().parse().context("no number of huge pages")
        };
        let before = read()?;
        fs::write(SETTING, (before + pages).to_string())?;
        Ok(Self { before, enough: read()? == before + pages })
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Err(error) = fs::write(SETTING, self.before.to_string()) {
            eprintln!("cannot give huge pages back: {error}");
        }
    }
}
