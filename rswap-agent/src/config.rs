//! The agent's configuration: TOML, with defaults that work.
//!
//! Everything is optional. A key that does not exist, a value of the wrong type and a value out of
//! range are errors that name the file, the line and the key; nothing is silently ignored.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use rswap_types::bounds::{non_negative, optional_positive, positive, positive_integer, positive_u32, share};
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};

mod control;
mod fleet;
mod memory;
mod pools;
mod tls;

pub use control::{ControlConfig, Grant, Right};
pub use fleet::{ControllerConfig, FleetConfig, LimitsConfig, controller_name};
pub use memory::MemoryConfig;
pub use pools::{PoolConfig, PoolKindConfig, VolumePool, core_share, settings, volume_pool};
pub use tls::{ControllerTls, TlsConfig};

pub use crate::{forecast::ForecastConfig, plan::PlanConfig};
use crate::{migrate::lanes::MAX_LANES, profile::ProfileConfig};

/// Read when no path is given and it exists.
pub const DEFAULT_PATH: &str = "/etc/rswap/rswap.toml";

/// Why a configuration could not be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error(
        "cannot read the configuration {path}: check that it exists and is readable, or leave out --config"
    )]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file was read, but something in it is wrong.
    #[error("{path}:{line}: {key}: {message}")]
    Invalid {
        /// Which file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// The key, with its sections: `plan.threshold`, `pool[0].cpus`.
        key: String,
        /// What is wrong with it.
        message: String,
    },
}

/// The whole configuration.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The agent itself.
    pub agent: AgentConfig,
    /// Who may call the agent.
    pub control: ControlConfig,
    /// Where instances are plugged in.
    pub network: NetworkConfig,
    /// Files of instances.
    pub files: FilesConfig,
    /// What is recorded.
    pub record: RecordConfig,
    /// What is learnt of instances, and from whom.
    pub learnt: LearntConfig,
    /// The fleet's controller, and what is kept for it.
    pub controller: ControllerConfig,
    /// What `rswap controller` is.
    pub fleet: FleetConfig,
    /// Live migration.
    pub migrate: MigrateConfig,
    /// Links to other hosts.
    pub tls: TlsConfig,
    /// Instances whose cold pages are in swap.
    pub memory: MemoryConfig,
    /// What this host costs, as a whole.
    pub this_host: ThisHostConfig,
    /// The profiler.
    pub profile: ProfileConfig,
    /// The forecaster.
    pub forecast: ForecastConfig,
    /// The planner.
    pub plan: PlanConfig,
    /// How this host's pools are looked at.
    #[serde(rename = "pools")]
    pub looks: LooksConfig,
    /// Pools of this host, and other hosts. Without a core set, one pool per core class is found.
    #[serde(rename = "pool", deserialize_with = "pools::pools")]
    pub pools: Vec<PoolConfig>,
}

/// Whether plans are carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Plan and explain, touch nothing.
    #[default]
    Observe,
    /// Carry the plans out.
    Act,
}

/// `[agent]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AgentConfig {
    /// What this host is called in plans and offers.
    pub host: String,
    /// Runtime state. Under /run on purpose: no instance outlives a reboot.
    pub state_dir: PathBuf,
    /// What `rswap calibrate` measured. Not under /run: it outlives a reboot.
    pub calibrations_dir: PathBuf,
    /// Unix socket of the mutating calls.
    pub control_socket: PathBuf,
    /// Read-only HTTP.
    pub status_address: SocketAddr,
    /// Plan only, or act.
    pub mode: Mode,
    /// Length of a profile window, in milliseconds.
    #[serde(deserialize_with = "positive_integer")]
    pub window_ms: u64,
    /// Directory under the cgroup v2 mount in which instances get theirs.
    #[serde(deserialize_with = "cgroup_name")]
    pub cgroup_parent: String,
}

impl Default for AgentConfig {
    fn default() -> Self {
        let host = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
        Self {
            host: host.unwrap_or_else(|| "localhost".to_owned()),
            state_dir: "/run/rswap".into(),
            calibrations_dir: "/var/lib/rswap/calibrations".into(),
            control_socket: "/run/rswap/control.sock".into(),
            status_address: SocketAddr::from(([127, 0, 0, 1], 7790)),
            mode: Mode::default(),
            window_ms: 1000,
            cgroup_parent: "rswap".to_owned(),
        }
    }
}

/// `[record]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RecordConfig {
    /// Where what instances use is recorded, a file per instance, for `rswap simulate`. Not set: nothing is.
    pub directory: Option<PathBuf>,
    /// How often a row is written, in seconds.
    #[serde(deserialize_with = "positive_integer")]
    pub every_s: u64,
}

impl Default for RecordConfig {
    fn default() -> Self {
        Self { directory: None, every_s: 60 }
    }
}

/// `[learnt]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LearntConfig {
    /// Where it is kept, so that forecasts go on after a new start of the agent, and of the host.
    pub file: PathBuf,
    /// How often it is written, in seconds; also when the agent ends.
    #[serde(deserialize_with = "positive_integer")]
    pub save_every_s: u64,
    /// An instance's class is its label of the first of these keys that it has; without one, the program that it runs and its
    /// user. Instances of a class start from what others of it have taught.
    pub class_labels: Vec<String>,
}

impl Default for LearntConfig {
    fn default() -> Self {
        Self {
            file: "/var/lib/rswap/learnt".into(),
            save_every_s: 60,
            class_labels: vec!["class".to_owned(), "app".to_owned()],
        }
    }
}

/// `[pools]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LooksConfig {
    /// How often this host's pools are looked at, in milliseconds.
    #[serde(deserialize_with = "positive_integer")]
    pub look_every_ms: u64,
    /// A file system or swap area with a smaller share available than this is full.
    #[serde(deserialize_with = "share")]
    pub full_below_share: f64,
}

impl Default for LooksConfig {
    fn default() -> Self {
        Self { look_every_ms: 2000, full_below_share: 0.02 }
    }
}

/// `[network]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NetworkConfig {
    /// Bridge that instances with an address of their own are plugged into.
    pub bridge: Option<String>,
    /// Interface through which other hosts are reached.
    pub uplink: Option<String>,
}

/// `[files]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FilesConfig {
    /// Directories that are one and the same on every host, such as network file systems: instances may write there.
    pub shared: Vec<PathBuf>,
    /// Where the volumes of instances are kept [default: `volumes` in the state directory]. Instances with volumes need no
    /// room elsewhere.
    pub volumes: Option<PathBuf>,
}

/// `[migrate]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MigrateConfig {
    /// Where this host takes migrations. Not set: it takes none.
    pub listen: Option<SocketAddr>,
    /// What migrations have come to. It has to outlive a new start of the host: what was in doubt before still is.
    pub journal_dir: PathBuf,
    /// How long an instance may stand still, in milliseconds.
    #[serde(deserialize_with = "positive_integer")]
    pub max_unavailability_ms: u64,
    /// A freeze that lasts so long (or twice what an instance may stand still, if that is longer) is ended by its
    /// watchdog, in milliseconds.
    #[serde(deserialize_with = "positive_integer")]
    pub freeze_limit_ms: u64,
    /// A migration that is not committed after so many seconds is rolled back.
    #[serde(deserialize_with = "positive_integer")]
    pub deadline_s: u64,
    /// Memory for copies of sent pages, against which deltas are made [default: as much as the instance has, but at most a
    /// quarter of what the host has available when a migration begins].
    pub cache_bytes: Option<u64>,
    /// Pre-copy rounds at most.
    #[serde(deserialize_with = "positive_u32")]
    pub max_rounds: u32,
    /// Connections that carry a migration, 1 to 8 [default: as many as make up for the round trip to the destination; one on a
    /// local network].
    #[serde(deserialize_with = "streams")]
    pub streams: Option<u8>,
    /// Nothing is copied before the freeze; asked for with each migration.
    #[serde(skip)]
    pub stop_and_copy: bool,
}

/// As many connections as a migration may have.
fn streams<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<u8>, D::Error> {
    match u8::deserialize(from)? {
        streams @ 1..=MAX_LANES => Ok(Some(streams)),
        streams => {
            Err(serde::de::Error::custom(format!("{streams} is not possible here: use 1 to {MAX_LANES}")))
        }
    }
}

impl Default for MigrateConfig {
    fn default() -> Self {
        Self {
            listen: None,
            journal_dir: "/var/lib/rswap/migrations".into(),
            max_unavailability_ms: 100,
            // Longer than a peer may be silent: the agent itself rolls back in an orderly way then.
            freeze_limit_ms: 15_000,
            deadline_s: 120,
            cache_bytes: None,
            max_rounds: 30,
            streams: None,
            stop_and_copy: false,
        }
    }
}

impl MigrateConfig {
    /// How long a freeze may last before the commit.
    pub fn freeze_limit(&self) -> std::time::Duration {
        std::time::Duration::from_millis(
            self.freeze_limit_ms.max(self.max_unavailability_ms.saturating_mul(2)),
        )
    }
}

/// `[this_host]`: what staying costs, so that other hosts can be compared with it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ThisHostConfig {
    /// Money per core and hour.
    #[serde(deserialize_with = "non_negative")]
    pub cost_per_core_hour: f64,
    /// Money per GiB of memory and hour.
    #[serde(deserialize_with = "non_negative")]
    pub cost_per_gib_hour: f64,
    /// Speed of a core, relative to the reference core.
    #[serde(deserialize_with = "positive")]
    pub performance: f64,
    /// Cores that instances may use; all online ones if not set.
    #[serde(deserialize_with = "optional_positive")]
    pub cores: Option<f64>,
    /// Memory that instances may use, in GiB; all of it if not set.
    #[serde(deserialize_with = "optional_positive")]
    pub memory_gib: Option<f64>,
}

impl Default for ThisHostConfig {
    fn default() -> Self {
        Self {
            cost_per_core_hour: 0.04,
            cost_per_gib_hour: 0.005,
            performance: 1.0,
            cores: None,
            memory_gib: None,
        }
    }
}

impl Config {
    /// Reads `path`; without one, [`DEFAULT_PATH`] if it exists, and the defaults otherwise.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let chosen = path.unwrap_or(Path::new(DEFAULT_PATH));
        match std::fs::read_to_string(chosen) {
            Ok(text) => Self::parse(&text, chosen),
            Err(error) if path.is_none() && error.kind() == std::io::ErrorKind::NotFound => {
                Ok(Self::default())
            }
            Err(source) => Err(ConfigError::Read { path: chosen.to_owned(), source }),
        }
    }

    /// Reads a configuration's text; `path` is only for the error.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let invalid = |key: String, error: &toml::de::Error| ConfigError::Invalid {
            path: path.to_owned(),
            line: error.span().map_or(1, |span| 1 + text[..span.start].matches('\n').count()),
            key: if key == "." { "syntax".to_owned() } else { key },
            message: error.message().trim().replace('\n', "; "),
        };
        let document = toml::Deserializer::parse(text).map_err(|error| invalid(".".to_owned(), &error))?;
        serde_path_to_error::deserialize(document)
            .map_err(|error| invalid(error.path().to_string(), error.inner()))
    }
}

fn cgroup_name<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    let name = String::deserialize(from)?;
    let plain = !name.is_empty() && name.split('/').all(|part| !["", ".", ".."].contains(&part));
    if plain {
        Ok(name)
    } else {
        Err(D::Error::custom("must be a path under the cgroup v2 mount, without `..`"))
    }
}

#[cfg(test)]
mod tests;
