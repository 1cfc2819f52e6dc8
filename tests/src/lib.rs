//! The scenario tests' harness: hosts as network namespaces, real programs, faults.
//!
//! A [`Fleet`] is a switch, a client and some [`Host`]s, each a network namespace with a bridge and an agent
//! of its own: own state, own sockets, own cgroups. Everything goes when it is dropped; what a killed test
//! left behind is removed by the next one.
//!
//! ```text
//!   client --.                      .-- host a: br0 -- instances
//!            +---- switch: sw0 -----+
//!                                   '-- host b: br0 -- instances
//! ```

pub mod api;
pub mod bench;
pub mod browser;
pub mod claims;
pub mod client;
pub mod cold;
pub mod controller;
pub mod converse;
pub mod fleet;
pub mod foreign;
pub mod guide;
pub mod heartbeat;
pub mod hog;
pub mod host;
pub mod hot;
pub mod huge_pages;
pub mod load;
pub mod long_way;
pub mod loop_device;
pub mod machine;
pub mod mangle;
pub mod mangle_image;
pub mod matrix;
pub mod migration;
pub mod moves;
pub mod netns;
pub mod pauses;
pub mod persistent;
pub mod postgres;
pub mod profiled;
pub mod proxy;
pub mod rounds;
pub mod scene;
pub mod served_disk;
pub mod shown;
pub mod steps;
pub mod stopping;
pub mod storage;
pub mod strangers;
pub mod stream;
pub mod subjects;
pub mod swap_device;
pub mod sweep;
pub mod tls;
pub mod traces;
pub mod uplinks;
pub mod wire;

use std::{
    io::Write,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};

pub use fleet::Fleet;
pub use host::{Host, HostOptions};

/// Where this build's binaries are: the runner says it, and otherwise it is near the running one.
pub fn binary(name: &str) -> anyhow::Result<PathBuf> {
    let dir = match std::env::var_os("RSWAP_BIN_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => {
            let own = std::env::current_exe().context("cannot find the running program")?;
            let dir = own.parent().context("the running program has no directory")?;
            if dir.ends_with("deps") { dir.parent().unwrap_or(dir).to_owned() } else { dir.to_owned() }
        }
    };
    let path = dir.join(name);
    if !path.exists() {
        bail!("{} is missing: build it with `cargo xtask build`", path.display());
    }
    Ok(path)
}

/// Asks `look` until it has an answer; after `limit` the error says what was waited for.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut look: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if Instant::now() > deadline {
            bail!("waited {} s for {what}", limit.as_secs());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Random numbers from a seed that is printed, and that `RSWAP_SEED` says to have the same ones again.
pub fn seeded() -> anyhow::Result<fastrand::Rng> {
    let seed = match std::env::var("RSWAP_SEED") {
        Ok(seed) => seed.parse()?,
        Err(_) => fastrand::u64(..),
    };
    println!("RSWAP_SEED={seed}");
    Ok(fastrand::Rng::with_seed(seed))
}

/// Why scenarios cannot run here, if they can't. A scenario that gets a reason returns at once, and is
/// counted as skipped by `cargo xtask test`.
pub fn reason_to_skip(test: &str) -> Option<&'static str> {
    if nix::unistd::geteuid().is_root() {
        return None;
    }
    let reason = "it needs root: network namespaces, cgroups, eBPF";
    skip(test, reason);
    Some(reason)
}

/// Says that `test` can't run here and why, to people and to `cargo xtask test`, which counts it.
pub fn skip(test: &str, reason: &str) {
    if let Some(path) = std::env::var_os("RSWAP_SKIP_LOG") {
        let log = std::fs::OpenOptions::new().append(true).create(true).open(path);
        // Without the log the test counts as passed, which the line on standard error corrects for people.
        if let Ok(mut log) = log {
            let _ = writeln!(log, "{test}: {reason}");
        }
    }
    eprintln!("skipped: {test}: {reason}");
}
