//! What a program has changed in its own network namespace, after it was started.
//!
//! It is compared with a namespace that is made for that moment, as `rswap run --net` would make it now. So nothing has to
//! be remembered, and an instance that has arrived is no different from one that was started here.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    os::unix::fs::{FileExt, PermissionsExt},
    panic::resume_unwind,
    path::{Component, Path},
    thread::{self, JoinHandle},
};

use nix::sched::{CloneFlags, unshare};
use rtnetlink::LinkVeth;
use serde::{Deserialize, Serialize};

use super::{INNER, configure, listed, run};
use crate::{
    instance::{
        InstanceError, NetworkIdentity,
        net_tables::{Limits, with_small_tables},
    },
    sys::namespace,
};

const SYSCTLS: &str = "/proc/sys";
/// The part that belongs to a network namespace, as far as it may be written there.
const NET: &str = "net";
/// The other end of the pair, which has no bridge here.
const OTHER_END: &str = "rswapother";
/// Most that a sysctl's value has, in bytes: a list of ports may be long.
const VALUE_LIMIT: usize = 64 << 10;
/// Some sysctls change others, which are set again then.
const SETTING_PASSES: usize = 3;

/// What helps against the others.
pub const REMEDY: &str = "changed after the start, and not carried, as only sysctls are: undo it";

/// Sysctls that a program has changed, by their paths below `/proc/sys`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sysctls(BTreeMap<String, String>);

/// What was changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// What can be set again elsewhere.
    pub sysctls: Sysctls,
    /// Everything else, each as a text.
    pub others: Vec<String>,
}

/// A network namespace as it was made, and the one that a program has.
#[derive(Debug)]
pub struct Settings {
    init_pid: i32,
    /// Each sysctl of the program's namespace, with what it is in a new one.
    sysctls: Vec<(String, File, Option<String>)>,
    listed: BTreeSet<String>,
}

impl Settings {
    /// Those of the instance with the address `identity` and the init `init_pid`.
    pub fn of(init_pid: i32, identity: &NetworkIdentity) -> Result<Self, InstanceError> {
        let (mut new, listed) = in_a_new_namespace(identity)?;
        let opened = namespace::inside(init_pid, &["net"], open_all)
            .map_err(InstanceError::io("listing the instance's sysctls"))?;
        let with_new = |(name, file): (String, File)| {
            let is_in_new = new.remove(&name);
            (name, file, is_in_new)
        };
        Ok(Self { init_pid, sysctls: opened.into_iter().map(with_new).collect(), listed })
    }

    /// What differs now. It takes about a millisecond.
    pub fn changes(&self) -> Result<Changes, InstanceError> {
        let mut sysctls = BTreeMap::new();
        for (name, file, new) in &self.sysctls {
            let Ok(value) = read(file) else { continue };
            if new.as_ref() != Some(&value) {
                sysctls.insert(name.clone(), value);
            }
        }
        let now = namespace::inside(self.init_pid, &["net"], || listed::all(None))
            .map_err(InstanceError::io("listing what the instance has in its network namespace"))?;
        let added = now.difference(&self.listed).cloned();
        let removed = self.listed.difference(&now).map(|text| format!("no longer: {text}"));
        Ok(Changes { sysctls: Sysctls(sysctls), others: added.chain(removed).collect() })
    }
}

impl Settings {
    /// Looks what differs, on a thread of its own.
    pub fn look(self) -> Looking {
        Looking(thread::spawn(move || self.changes()))
    }
}

/// A look at what a program has changed.
#[derive(Debug)]
pub struct Looking(JoinHandle<Result<Changes, InstanceError>>);

impl Looking {
    /// Waits for its end.
    ///
    /// # Errors
    /// When something was changed that can't be set again elsewhere.
    pub fn end(self) -> Result<Sysctls, InstanceError> {
        let changes = self.0.join().unwrap_or_else(|panic| resume_unwind(panic))?;
        match changes.others.first() {
            Some(item) => Err(InstanceError::Invalid(format!("network namespace: {item}: {REMEDY}"))),
            None => Ok(changes.sysctls),
        }
    }
}

/// Sysctls, and everything else, of a network namespace that nobody has changed.
fn in_a_new_namespace(
    identity: &NetworkIdentity,
) -> Result<(BTreeMap<String, String>, BTreeSet<String>), InstanceError> {
    let limits = Limits::read();
    with_small_tables(|| {
        unshare(CloneFlags::CLONE_NEWNET).map_err(InstanceError::io("making a network namespace"))?;
        run(|handle| async move {
            handle.link().add(LinkVeth::new(OTHER_END, INNER).build()).execute().await
        })
        .map_err(|source| InstanceError::Network {
            what: "making a veth pair".into(),
            source: Box::new(source),
        })?;
        configure(identity, INNER, &limits)?;
        open_all()
            .and_then(|all| Ok((values(&all), listed::all(Some(OTHER_END))?)))
            .map_err(InstanceError::io("listing what a network namespace holds"))
    })?
}

/// The sysctls of the calling thread's network namespace that can be set there, by name. Opening them takes most of the time.
fn open_all() -> io::Result<Vec<(String, File)>> {
    fn walk(directory: &Path, found: &mut Vec<(String, File)>) -> io::Result<()> {
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            let path = entry.path();
            if entry.file_type()?.is_dir() {
                walk(&path, found)?;
                continue;
            }
            // One that can't be opened can only be written, and does something then.
            let Ok(file) = File::open(&path) else { continue };
            if file.metadata()?.permissions().mode() & 0o200 != 0 {
                let name = path.strip_prefix(SYSCTLS).ok().and_then(Path::to_str);
                found.extend(name.map(|name| (name.to_owned(), file)));
            }
        }
        Ok(())
    }
    let mut found = Vec::new();
    walk(&Path::new(SYSCTLS).join(NET), &mut found)?;
    Ok(found)
}

/// What they are. Some can't be read before they are set (stable_secret).
fn values(sysctls: &[(String, File)]) -> BTreeMap<String, String> {
    sysctls.iter().filter_map(|(name, file)| Some((name.clone(), read(file).ok()?))).collect()
}

fn read(file: &File) -> io::Result<String> {
    let mut value = vec![0; 512];
    loop {
        let got = file.read_at(&mut value, 0)?;
        if got < value.len() || value.len() >= VALUE_LIMIT {
            value.truncate(got);
            return String::from_utf8(value).map_err(io::Error::other);
        }
        value.resize(value.len() * 4, 0);
    }
}

impl FromIterator<(String, String)> for Sysctls {
    fn from_iter<I: IntoIterator<Item = (String, String)>>(sysctls: I) -> Self {
        Self(sysctls.into_iter().collect())
    }
}

impl Sysctls {
    /// Whether nothing was changed.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What of it can be no sysctl of a network namespace: an image may come from anybody.
    pub fn unsound(&self) -> Option<&str> {
        let sound = |name: &str| {
            let mut parts = Path::new(name).components();
            parts.next() == Some(Component::Normal(NET.as_ref()))
                && parts.all(|part| matches!(part, Component::Normal(_)))
        };
        self.0.keys().map(String::as_str).find(|name| !sound(name))
    }

    /// Sets them in the network namespace of process `pid`, which must be its own.
    ///
    /// # Errors
    /// The first that can't be set, or that isn't what it was afterwards.
    pub fn give(&self, pid: i32) -> io::Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        if let Some(name) = self.unsound() {
            return Err(io::Error::other(format!("{name} is no sysctl of a network namespace")));
        }
        if fs::read_link(format!("/proc/{pid}/ns/net"))? == fs::read_link("/proc/self/ns/net")? {
            return Err(io::Error::other("it shares the host's network: it would be changed for everybody"));
        }
        namespace::inside(pid, &["net"], || {
            let all = open_all()?;
            let mut wanted = values(&all);
            wanted.extend(self.0.clone());
            for _ in 0..SETTING_PASSES {
                let is = values(&all);
                let mut differ =
                    wanted.iter().filter(|(name, value)| is.get(*name) != Some(value)).peekable();
                if differ.peek().is_none() {
                    return Ok(());
                }
                for (name, value) in differ {
                    let failed = |error: io::Error| {
                        io::Error::new(error.kind(), format!("the sysctl {name} to {value:?}: {error}"))
                    };
                    fs::write(Path::new(SYSCTLS).join(name), value).map_err(failed)?;
                }
            }
            let is = values(&all);
            match wanted.iter().find(|(name, value)| is.get(*name) != Some(value)) {
                Some((name, value)) => {
                    Err(io::Error::other(format!("the sysctl {name} does not become {value:?}")))
                }
                None => Ok(()),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sysctls_of_network_namespaces_are_sound() {
        let of = |name: &str| Sysctls::from_iter([(name.to_owned(), "1".to_owned())]);
        assert_eq!(of("net/ipv4/ip_forward").unsound(), None);
        for name in
            ["kernel/core_pattern", "net/../kernel/core_pattern", "/net/ipv4/ip_forward", "", "../net"]
        {
            assert_eq!(of(name).unsound(), Some(name));
        }
    }

    #[test]
    fn nothing_is_set_in_the_hosts_namespace() {
        let changed = Sysctls::from_iter([("net/ipv4/ip_forward".to_owned(), "1\n".to_owned())]);
        let error = changed.give(std::process::id() as i32).expect_err("this is the host's namespace");
        assert!(error.to_string().contains("the host's network"), "{error}");
    }
}
