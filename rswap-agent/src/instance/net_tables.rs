//! A hash table of TCP connections of an instance's own, and a small one.
//!
//! The kernel shares one table, of hundreds of thousands of buckets on a large host, among network namespaces. Whoever lists an
//! instance's connections walks all of it, in the freeze: that takes milliseconds for each family of addresses, as long as
//! stopping the instance itself. A namespace gets a table of its own if `net.ipv4.tcp_child_ehash_entries` is set where it
//! is made (Linux 6.1, Documentation/networking/ip-sysctl.rst). It is set in a namespace that is there for just that, so
//! that the host's setting stays as it is.

use std::{fs, io, path::Path, thread};

use nix::sched::{CloneFlags, unshare};

use super::InstanceError;

/// Buckets. Walked in a third of a millisecond; with as many connections as that, a bucket has one.
const BUCKETS: u32 = 16_384;
const SETTING: &str = "/proc/sys/net/ipv4/tcp_child_ehash_entries";
/// What the kernel makes smaller together with the table (`tcp_set_hashinfo` in net/ipv4/tcp_ipv4.c).
const DERIVED: [&str; 2] =
    ["/proc/sys/net/ipv4/tcp_max_tw_buckets", "/proc/sys/net/ipv4/tcp_max_syn_backlog"];

/// Does `work` on a thread of its own. Network namespaces that it makes have small tables, if the kernel knows of that.
pub(super) fn with_small_tables<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, InstanceError> {
    let thread = || {
        if Path::new(SETTING).exists()
            && let Err(error) = ask_for_small_tables()
        {
            tracing::warn!(%error, "the instance has its connections in the host's table: its moves take longer");
        }
        work()
    };
    thread::scope(|scope| scope.spawn(thread).join())
        .map_err(|_| InstanceError::Invalid("the thread that makes namespaces panicked".into()))
}

fn ask_for_small_tables() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    fs::write(SETTING, BUCKETS.to_string())
}

/// Limits that go with the size of the table, as they are in the network namespace of the calling thread.
#[derive(Debug)]
pub(super) struct Limits(Vec<(&'static str, String)>);

impl Limits {
    /// Reads them.
    pub(super) fn read() -> Self {
        Self(DERIVED.iter().filter_map(|path| Some((*path, fs::read_to_string(path).ok()?))).collect())
    }

    /// Sets them: an instance may keep as many connections waiting as anybody on this host.
    pub(super) fn set(&self) -> io::Result<()> {
        self.0.iter().try_for_each(|(path, value)| fs::write(path, value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces_made_by_it_have_a_small_table_and_the_hosts_limits() {
        if !Path::new(SETTING).exists() {
            println!("skipped: no tcp_child_ehash_entries (Linux 6.1)");
            return;
        }
        let before = fs::read_to_string(SETTING).expect("readable");
        let limits = Limits::read();
        let inside = with_small_tables(|| -> io::Result<(String, Vec<String>)> {
            unshare(CloneFlags::CLONE_NEWNET)?;
            limits.set()?;
            let read = |path: &str| fs::read_to_string(path);
            Ok((
                read("/proc/sys/net/ipv4/tcp_ehash_entries")?,
                DERIVED.iter().map(|path| read(path)).collect::<io::Result<_>>()?,
            ))
        });
        let (buckets, derived) = inside.expect("joined").expect("needs root");
        assert_eq!(buckets.trim(), BUCKETS.to_string());
        assert!(limits.0.iter().map(|(_, value)| value).eq(&derived), "{limits:?} {derived:?}");
        assert_eq!(fs::read_to_string(SETTING).expect("readable"), before, "the host's setting is untouched");
    }
}
