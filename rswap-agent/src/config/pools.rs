//! `[[pool]]`: pools of this host with a name, a cost or a limit of their own, and other hosts.

use std::{net::SocketAddr, path::PathBuf};

use rswap_pools::{Known, Member, Settings, Source, Wanted, cpu_list};
use rswap_trust::Name;
use rswap_types::{
    CpuSet,
    bounds::{optional_non_negative, optional_positive},
};
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};

use super::{Config, ThisHostConfig};
use crate::swap::share::Share;

const GIB: f64 = (1u64 << 30) as f64;
/// Bits per second.
const GBIT: f64 = 1e9;
const MBIT: f64 = 1e6;
/// What `cpu.weight` takes (Documentation/admin-guide/cgroup-v2.rst).
const WEIGHTS: std::ops::RangeInclusive<u64> = 1..=10_000;

/// One `[[pool]]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "RawPool")]
pub struct PoolConfig {
    /// Unique.
    pub name: String,
    /// What it is made of.
    #[serde(flatten)]
    pub kind: PoolKindConfig,
}

/// What a configured pool is made of.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum PoolKindConfig {
    /// Part of this host.
    Local {
        /// Which.
        member: Member,
        /// Limit: cores, bytes, or bits per second.
        capacity: Option<f64>,
        /// Money per hour and core, GiB, or Gbit/s.
        cost_per_hour: Option<f64>,
        /// Cores: speed of one, relative to the reference core. Storage: relative to the host's fastest.
        performance: Option<f64>,
        /// Storage: requests and bytes per second that it gives.
        #[serde(skip_serializing_if = "Option::is_none")]
        operations_per_s: Option<f64>,
        /// See there.
        #[serde(skip_serializing_if = "Option::is_none")]
        bytes_per_s: Option<f64>,
        /// Storage: the directory that volumes of instances are put into.
        #[serde(skip_serializing_if = "Option::is_none")]
        volumes: Option<PathBuf>,
        /// Links: what one instance may send, and receive, in bits per second.
        #[serde(skip_serializing_if = "Option::is_none")]
        instance_rate: Option<f64>,
        /// Cores: what one instance may have of them.
        #[serde(skip_serializing_if = "Share::is_all")]
        share: Share,
    },
    /// Another host's agent.
    Host {
        /// Where it takes migrations.
        host: SocketAddr,
        /// The name that its certificate must have; not set: the pool's.
        #[serde(skip_serializing_if = "Option::is_none")]
        certificate_name: Option<Name>,
        /// Money per core and hour.
        cost_per_core_hour: f64,
        /// Money per GiB of memory and hour.
        cost_per_gib_hour: f64,
        /// Cores that it offers.
        cores: f64,
        /// Memory that it offers, in GiB.
        memory_gib: f64,
        /// Speed of a core, relative to the reference core.
        performance: f64,
    },
}

/// A `[[pool]]` as it stands in the file: which keys belong together is checked afterwards.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPool {
    name: String,
    #[serde(default, deserialize_with = "numbers")]
    cpus: Option<CpuSet>,
    #[serde(default, deserialize_with = "numbers")]
    nodes: Option<CpuSet>,
    #[serde(default, deserialize_with = "absolute")]
    storage: Option<PathBuf>,
    #[serde(default, deserialize_with = "absolute")]
    swap: Option<PathBuf>,
    #[serde(default, deserialize_with = "interface")]
    link: Option<String>,
    #[serde(default, deserialize_with = "absolute")]
    volumes: Option<PathBuf>,
    host: Option<SocketAddr>,
    certificate_name: Option<Name>,
    #[serde(default, deserialize_with = "optional_non_negative")]
    cost_per_core_hour: Option<f64>,
    #[serde(default, deserialize_with = "optional_non_negative")]
    cost_per_gib_hour: Option<f64>,
    #[serde(default, deserialize_with = "optional_non_negative")]
    cost_per_gbit_hour: Option<f64>,
    #[serde(default, deserialize_with = "optional_positive")]
    performance: Option<f64>,
    #[serde(default, deserialize_with = "optional_positive")]
    capacity_cores: Option<f64>,
    #[serde(default, deserialize_with = "optional_positive")]
    capacity_gib: Option<f64>,
    #[serde(default, deserialize_with = "optional_positive")]
    capacity_gbit_per_s: Option<f64>,
    #[serde(default, deserialize_with = "optional_positive")]
    instance_mbit_per_s: Option<f64>,
    #[serde(default, deserialize_with = "optional_positive")]
    instance_cores: Option<f64>,
    instance_weight: Option<u64>,
    #[serde(default, deserialize_with = "optional_positive")]
    operations_per_s: Option<f64>,
    #[serde(default, deserialize_with = "optional_positive")]
    mbyte_per_s: Option<f64>,
    #[serde(default, deserialize_with = "optional_positive")]
    cores: Option<f64>,
    #[serde(default, deserialize_with = "optional_positive")]
    memory_gib: Option<f64>,
}

const WHAT_IT_IS: &str = "one of `cpus = \"0-3\"` (cores), `nodes = \"0\"` (memory), `storage = \"/srv\"` (a mounted file \
                          system), `swap = \"/dev/zram0\"`, `link = \"eth0\"` (all of this host), or `host = \"ip:port\"` \
                          (another agent)";

impl TryFrom<RawPool> for PoolConfig {
    type Error = String;

    fn try_from(raw: RawPool) -> Result<Self, String> {
        let name = raw.name.clone();
        if name.is_empty() {
            return Err("a pool needs a name".to_owned());
        }
        let mut members = Vec::new();
        members.extend(raw.cpus.clone().map(Member::Cpus));
        members.extend(raw.nodes.clone().map(Member::Nodes));
        members.extend(raw.storage.clone().map(Member::Storage));
        members.extend(raw.swap.clone().map(Member::Swap));
        members.extend(raw.link.clone().map(Member::Link));
        let kind = match (members.pop(), raw.host) {
            (Some(member), None) if members.is_empty() => local(&raw, member)?,
            (None, Some(host)) => another_host(&raw, host)?,
            _ => return Err(format!("pool {name:?}: needs {WHAT_IT_IS}, not both")),
        };
        Ok(Self { name, kind })
    }
}

impl RawPool {
    /// Refuses keys that are present and not in `allowed`.
    fn only(&self, what: &str, allowed: &[&str]) -> Result<(), String> {
        let keys = [
            ("cost_per_core_hour", self.cost_per_core_hour.is_some()),
            ("cost_per_gib_hour", self.cost_per_gib_hour.is_some()),
            ("cost_per_gbit_hour", self.cost_per_gbit_hour.is_some()),
            ("performance", self.performance.is_some()),
            ("capacity_cores", self.capacity_cores.is_some()),
            ("capacity_gib", self.capacity_gib.is_some()),
            ("capacity_gbit_per_s", self.capacity_gbit_per_s.is_some()),
            ("instance_mbit_per_s", self.instance_mbit_per_s.is_some()),
            ("instance_cores", self.instance_cores.is_some()),
            ("instance_weight", self.instance_weight.is_some()),
            ("operations_per_s", self.operations_per_s.is_some()),
            ("mbyte_per_s", self.mbyte_per_s.is_some()),
            ("cores", self.cores.is_some()),
            ("memory_gib", self.memory_gib.is_some()),
            ("volumes", self.volumes.is_some()),
            ("certificate_name", self.certificate_name.is_some()),
        ];
        match keys.iter().find(|(key, present)| *present && !allowed.contains(key)) {
            Some((key, _)) => Err(format!("pool {:?}: `{key}` does not belong to {what}", self.name)),
            None => Ok(()),
        }
    }
}

fn local(raw: &RawPool, member: Member) -> Result<PoolKindConfig, String> {
    let (capacity, cost_per_hour) = match &member {
        Member::Cpus(_) => {
            let keys =
                ["cost_per_core_hour", "performance", "capacity_cores", "instance_cores", "instance_weight"];
            raw.only("a set of cores", &keys)?;
            if raw.instance_weight.is_some_and(|weight| !WEIGHTS.contains(&weight)) {
                return Err(format!("pool {:?}: `instance_weight` must be from 1 to 10000", raw.name));
            }
            (raw.capacity_cores, raw.cost_per_core_hour)
        }
        Member::Storage(at) => {
            let keys = [
                "cost_per_gib_hour",
                "capacity_gib",
                "volumes",
                "performance",
                "operations_per_s",
                "mbyte_per_s",
            ];
            raw.only("storage", &keys)?;
            if let Some(volumes) = raw.volumes.as_ref().filter(|volumes| !volumes.starts_with(at)) {
                let (volumes, at) = (volumes.display(), at.display());
                return Err(format!(
                    "pool {:?}: `volumes` {volumes} does not lie in its storage {at}",
                    raw.name
                ));
            }
            (raw.capacity_gib.map(|gib| gib * GIB), raw.cost_per_gib_hour)
        }
        Member::Nodes(_) | Member::Swap(_) => {
            raw.only("memory or swap", &["cost_per_gib_hour", "capacity_gib"])?;
            (raw.capacity_gib.map(|gib| gib * GIB), raw.cost_per_gib_hour)
        }
        Member::Link(_) => {
            raw.only("a link", &["cost_per_gbit_hour", "capacity_gbit_per_s", "instance_mbit_per_s"])?;
            (raw.capacity_gbit_per_s.map(|gbit| gbit * GBIT), raw.cost_per_gbit_hour)
        }
    };
    let (performance, volumes) = (raw.performance, raw.volumes.clone());
    let instance_rate = raw.instance_mbit_per_s.map(|mbit| mbit * MBIT);
    let share = Share { cores: raw.instance_cores, weight: raw.instance_weight };
    let (operations_per_s, bytes_per_s) = (raw.operations_per_s, raw.mbyte_per_s.map(|mb| mb * 1e6));
    Ok(PoolKindConfig::Local {
        member,
        capacity,
        cost_per_hour,
        performance,
        operations_per_s,
        bytes_per_s,
        volumes,
        instance_rate,
        share,
    })
}

fn another_host(raw: &RawPool, host: SocketAddr) -> Result<PoolKindConfig, String> {
    raw.only(
        "another host",
        &[
            "cost_per_core_hour",
            "cost_per_gib_hour",
            "performance",
            "cores",
            "memory_gib",
            "certificate_name",
        ],
    )?;
    let needed = |key: &str, value: Option<f64>| {
        value.ok_or_else(|| format!("pool {:?}: a host pool needs `{key}`: what the host offers", raw.name))
    };
    let default = ThisHostConfig::default();
    Ok(PoolKindConfig::Host {
        host,
        certificate_name: raw.certificate_name.clone(),
        cost_per_core_hour: raw.cost_per_core_hour.unwrap_or(default.cost_per_core_hour),
        cost_per_gib_hour: raw.cost_per_gib_hour.unwrap_or(default.cost_per_gib_hour),
        cores: needed("cores", raw.cores)?,
        memory_gib: needed("memory_gib", raw.memory_gib)?,
        performance: raw.performance.unwrap_or(default.performance),
    })
}

fn numbers<'de, D: Deserializer<'de>>(from: D) -> Result<Option<CpuSet>, D::Error> {
    let numbers = cpu_list::parse(&String::deserialize(from)?).map_err(D::Error::custom)?;
    if numbers.is_empty() { Err(D::Error::custom("a pool needs at least one")) } else { Ok(Some(numbers)) }
}

fn absolute<'de, D: Deserializer<'de>>(from: D) -> Result<Option<PathBuf>, D::Error> {
    let path = PathBuf::deserialize(from)?;
    if path.is_absolute() { Ok(Some(path)) } else { Err(D::Error::custom("must be an absolute path")) }
}

/// As the kernel takes names: 1 to 15 bytes, no white space, no `/`.
fn interface<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    let name = String::deserialize(from)?;
    let plain = (1..16).contains(&name.len()) && !name.contains(|c: char| c == '/' || c.is_whitespace());
    if plain { Ok(Some(name)) } else { Err(D::Error::custom("is not the name of a network interface")) }
}

pub(super) fn pools<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<PoolConfig>, D::Error> {
    let pools = Vec::<PoolConfig>::deserialize(from)?;
    let mut names = std::collections::BTreeSet::from(["this-host"]);
    match pools.iter().find(|pool| !names.insert(pool.name.as_str())) {
        Some(twice) => Err(D::Error::custom(format!("the pool name {:?} is taken", twice.name))),
        None => Ok(pools),
    }
}

/// What an instance may have of the core pool `name`.
pub fn core_share(config: &Config, name: &str) -> Share {
    let found = config.pools.iter().find(|pool| pool.name == name).map(|pool| &pool.kind);
    match found {
        Some(PoolKindConfig::Local { share, .. }) => *share,
        _ => Share::default(),
    }
}

/// Where volumes may be put.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumePool {
    /// Where the pool's file system is mounted.
    pub mount_point: PathBuf,
    /// The directory for volumes, at or below it.
    pub directory: PathBuf,
}

/// The storage pool `name`, or why volumes can't be put there.
pub fn volume_pool(config: &Config, name: &str) -> Result<VolumePool, String> {
    let storage = config.pools.iter().filter_map(|pool| match &pool.kind {
        PoolKindConfig::Local { member: Member::Storage(at), volumes, .. } => {
            Some((pool.name.as_str(), at, volumes))
        }
        _ => None,
    });
    let all: Vec<_> = storage.collect();
    match all.iter().find(|(pool, ..)| *pool == name) {
        Some((_, at, Some(directory))) => {
            Ok(VolumePool { mount_point: at.into(), directory: directory.clone() })
        }
        Some((_, _, None)) => {
            Err(format!("the pool {name:?} has no directory for volumes (`volumes = \"/...\"`)"))
        }
        None => {
            let known: Vec<&str> =
                all.iter().filter(|(.., to)| to.is_some()).map(|(name, ..)| *name).collect();
            Err(format!(
                "there is no storage pool {name:?} in the configuration: for volumes there are {known:?}"
            ))
        }
    }
}

/// What the configuration says about this host's pools.
pub fn settings(config: &Config) -> Settings {
    let (host, default) = (&config.this_host, ThisHostConfig::default());
    // What is as it would be without a word about it is shown as that.
    let known = |value: f64, default: f64, key: &str| Known {
        value,
        source: if value == default {
            Source::Default
        } else {
            Source::configured(format!("this_host.{key}"))
        },
    };
    let wanted = config.pools.iter().enumerate().filter_map(|(index, pool)| match &pool.kind {
        PoolKindConfig::Host { .. } => None,
        PoolKindConfig::Local {
            member,
            capacity,
            cost_per_hour,
            performance,
            operations_per_s,
            bytes_per_s,
            instance_rate,
            share,
            ..
        } => Some(Wanted {
            name: pool.name.clone(),
            key: format!("pool[{index}]"),
            member: member.clone(),
            capacity: *capacity,
            cost_per_hour: *cost_per_hour,
            performance: *performance,
            operations_per_s: *operations_per_s,
            bytes_per_s: *bytes_per_s,
            instance_rate: *instance_rate,
            instance_cores: share.cores,
            instance_weight: share.weight.map(|weight| weight as f64),
        }),
    });
    Settings {
        pools: wanted.collect(),
        cost_per_core_hour: known(host.cost_per_core_hour, default.cost_per_core_hour, "cost_per_core_hour"),
        cost_per_gib_hour: known(host.cost_per_gib_hour, default.cost_per_gib_hour, "cost_per_gib_hour"),
        performance: known(host.performance, default.performance, "performance"),
        full_below_share: config.looks.full_below_share,
    }
}
