//! What runs: process trees in a cgroup v2, started with `rswap run` or adopted.

pub mod affinity;
pub mod arrival;
pub mod cgroup;
pub mod init;
pub mod launch;
pub mod main_process;
mod net_tables;
pub mod network;
pub mod registry;
mod standing;
pub mod volume;

use std::{collections::BTreeMap, path::PathBuf};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub use rswap_types::{InstanceName, NameError};

use crate::{kept_files::has_gone, units::UnixMillis};

/// Why an instance could not be named, started, adopted or found.
#[derive(Debug, thiserror::Error)]
pub enum InstanceError {
    /// A system call or a file operation failed.
    #[error("{what}")]
    Io {
        /// What was attempted, on what.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// Setting up the network failed.
    #[error("{what}")]
    Network {
        /// What was attempted, on what.
        what: String,
        /// Why it failed.
        source: Box<rtnetlink::Error>,
    },
    /// Something isn't as it must be.
    #[error("{0}")]
    Invalid(String),
}

impl InstanceError {
    /// For `map_err`: an I/O error with what was attempted.
    pub(crate) fn io<E: Into<std::io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        move |source| Self::Io { what: what.into(), source: source.into() }
    }
}

/// How an instance came under rswap's care.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// Started with `rswap run`: it has a PID namespace and an init of ours, so it can migrate.
    Run,
    /// An existing cgroup, taken over as it is: it can be profiled and moved between local pools.
    Adopted,
    /// Arrived from another host by migration.
    Migrated,
}

/// A process tree in one cgroup v2.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Instance {
    /// Unique on the host.
    pub name: InstanceName,
    /// Free `key=value` pairs of the user's.
    pub labels: BTreeMap<String, String>,
    /// Absolute path of its cgroup v2 directory.
    #[schema(value_type = String)]
    pub cgroup: PathBuf,
    /// The cgroup's id in the kernel (its directory's inode number).
    pub cgroup_id: u64,
    /// How it came here.
    pub origin: Origin,
    /// Pid (in the agent's PID namespace) of its namespace's init; `None` when adopted.
    pub init_pid: Option<i32>,
    /// The command as it was started; empty when adopted.
    pub command: Vec<String>,
    /// Its own network namespace's address, when it has one.
    pub network: Option<NetworkIdentity>,
    /// Directories that belong to it and move with it.
    #[serde(default)]
    pub volumes: Vec<volume::Volume>,
    /// The CPU pool that the user asked for with `--pool`, or that it was last moved to.
    pub pool: Option<String>,
    /// The link pool that it was last moved to. Nothing: it is on the bridge of the configuration, as fast as that is.
    #[serde(default)]
    pub uplink: Option<String>,
    /// The memory or swap pool that it was last moved to. Nothing: all of it is in memory.
    #[serde(default)]
    pub memory: Option<String>,
    /// When it was started, adopted or activated here.
    pub since: UnixMillis,
}

impl Instance {
    /// Whether its cgroup is still there: at its path, after its end or a new start of the host, may be another one, whose processes are
    /// somebody else's.
    ///
    /// # Errors
    /// It can't be looked at now: that says nothing of it.
    pub fn is_here(&self) -> Result<bool, InstanceError> {
        match cgroup::id(&self.cgroup) {
            Ok(id) => Ok(id == self.cgroup_id),
            Err(InstanceError::Io { source, .. }) if has_gone(&source) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Whether any process of it is here.
    ///
    /// # Errors
    /// Its cgroup can't be looked at, or read, now: it may live.
    pub fn is_alive(&self) -> Result<bool, InstanceError> {
        Ok(self.is_here()? && cgroup::is_populated(&self.cgroup)?)
    }
}

/// What the network knows an instance by; it goes along when the instance migrates.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NetworkIdentity {
    /// IPv4 address.
    #[schema(value_type = String)]
    pub address: std::net::Ipv4Addr,
    /// Prefix length, in bits.
    pub prefix_len: u8,
    /// Default route, if any.
    #[schema(value_type = Option<String>)]
    pub gateway: Option<std::net::Ipv4Addr>,
    /// Ethernet address.
    pub mac: [u8; 6],
    /// A second address, of the other family.
    #[serde(default)]
    pub ipv6: Option<Ipv6Identity>,
}

/// An IPv6 address that goes along with an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Ipv6Identity {
    /// The address.
    #[schema(value_type = String)]
    pub address: std::net::Ipv6Addr,
    /// Prefix length, in bits.
    pub prefix_len: u8,
    /// Default route, if any.
    #[schema(value_type = Option<String>)]
    pub gateway: Option<std::net::Ipv6Addr>,
}
