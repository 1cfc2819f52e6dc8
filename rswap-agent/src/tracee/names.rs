//! The names that an instance knows its host by: those of its UTS namespace.

use std::{fs, io};

use serde::{Deserialize, Serialize};

use crate::sys::namespace;

const HOST: &str = "/proc/sys/kernel/hostname";
const DOMAIN: &str = "/proc/sys/kernel/domainname";

/// As sethostname(2) and setdomainname(2) have set them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostNames {
    /// The host's.
    pub host: String,
    /// Its NIS domain's.
    pub domain: String,
}

impl HostNames {
    /// Those that process `pid` sees.
    pub fn of(pid: i32) -> io::Result<Self> {
        // What these files say depends on who reads them.
        namespace::inside(pid, &["uts"], || {
            let read = |path| fs::read_to_string(path).map(|text| text.trim_end_matches('\n').to_owned());
            Ok(Self { host: read(HOST)?, domain: read(DOMAIN)? })
        })
    }

    /// Gives them to the UTS namespace of process `pid`, which must be its own.
    pub fn give(&self, pid: i32) -> io::Result<()> {
        let ours = fs::read_link("/proc/self/ns/uts")?;
        if fs::read_link(format!("/proc/{pid}/ns/uts"))? == ours {
            return Err(io::Error::other("it shares the host's names: they would be changed for everybody"));
        }
        namespace::inside(pid, &["uts"], || {
            fs::write(HOST, &self.host)?;
            fs::write(DOMAIN, &self.domain)
        })
    }
}
