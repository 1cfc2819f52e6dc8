//! Fetches what the dashboard is made of besides our own files, by npm and as `package-lock.json` says, to `target/dashboard`.

use std::{fs, path::Path};

use anyhow::{Context, bail};
use xshell::{Shell, cmd};

use crate::{ebpf, project_root, step};

/// From which file of a package to which name.
const LIBRARIES: &[(&str, &str)] = &[
    ("uplot/dist/uPlot.iife.min.js", "uPlot.iife.min.js"),
    ("uplot/dist/uPlot.min.css", "uPlot.min.css"),
    ("uplot/LICENSE", "uPlot-LICENSE"),
    ("lit-html/lit-html.js", "lit-html.js"),
    ("lit-html/LICENSE", "lit-html-LICENSE"),
];
/// Which packages were installed from which lock file: two lines at least.
const STAMP: &str = ".installed";

/// What is wanted of the packages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Packages {
    /// What is embedded.
    Embedded,
    /// Also what formats the page and checks it in a browser.
    All,
}

impl Packages {
    /// Whether what `stamp` says is enough of what `lock` names.
    fn are_there(self, stamp: &str, lock: &str) -> bool {
        let (kind, of) = stamp.split_once('\n').unwrap_or_default();
        of == lock && (kind == Self::All.word() || kind == self.word())
    }

    fn word(self) -> &'static str {
        match self {
            Self::Embedded => "embedded",
            Self::All => "all",
        }
    }
}

/// Has the libraries ready to be embedded.
pub(crate) fn build() -> anyhow::Result<()> {
    install(Packages::Embedded)?;
    let to = project_root().join("target/dashboard");
    fs::create_dir_all(&to).with_context(|| format!("make {}", to.display()))?;
    for (from, name) in LIBRARIES {
        ebpf::replace(&directory().join("node_modules").join(from), &to.join(name))?;
    }
    Ok(())
}

/// Has what checks the page ready, too.
pub(crate) fn ready_to_check() -> anyhow::Result<()> {
    install(Packages::All)
}

fn directory() -> std::path::PathBuf {
    project_root().join("rswap-dashboard")
}

fn install(wanted: Packages) -> anyhow::Result<()> {
    let directory = directory();
    let lock = read(&directory.join("package-lock.json"))?;
    let stamp = directory.join("node_modules").join(STAMP);
    if wanted.are_there(&fs::read_to_string(&stamp).unwrap_or_default(), &lock) {
        return Ok(());
    }
    step("Fetching the dashboard's libraries (npm ci)");
    let shell = Shell::new()?;
    shell.change_dir(&directory);
    let omit = (wanted == Packages::Embedded).then_some("--omit=dev");
    // No package may run anything of its own here.
    let fetched = cmd!(shell, "npm ci --ignore-scripts --no-audit --no-fund {omit...}").run();
    if let Err(error) = fetched {
        bail!("npm could not fetch what {} names: {error}", directory.join("package-lock.json").display());
    }
    fs::write(&stamp, format!("{}\n{lock}", wanted.word()))
        .with_context(|| format!("write {}", stamp.display()))
}

fn read(path: &Path) -> anyhow::Result<String> {
    fs::read_to_string(path).with_context(|| format!("read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_fetched_again_when_the_lock_file_changed_or_more_are_wanted() {
        let (embedded, all) = ("embedded\nlock\n", "all\nlock\n");
        assert!(Packages::Embedded.are_there(embedded, "lock\n"));
        assert!(Packages::Embedded.are_there(all, "lock\n") && Packages::All.are_there(all, "lock\n"));
        assert!(!Packages::All.are_there(embedded, "lock\n"));
        assert!(!Packages::All.are_there(all, "other\n"));
        assert!(!Packages::Embedded.are_there("", "lock\n"));
    }
}
