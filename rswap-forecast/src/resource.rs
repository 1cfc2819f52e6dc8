//! What is forecast of an instance, and what it used of it in one window.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A resource whose need is forecast.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Resource {
    /// CPU, in reference cores.
    Cpu,
    /// Memory, in bytes.
    Memory,
    /// Block I/O, what was read and what was written together, in bytes per second.
    #[serde(rename = "io_bytes_per_s")]
    Io,
    /// Latency of block I/O, in nanoseconds: what 99 in 100 of a window's requests did not exceed.
    #[serde(rename = "io_latency_ns")]
    IoLatency,
    /// What came over the network, in bytes per second.
    #[serde(rename = "net_in_bytes_per_s")]
    NetIn,
    /// What went over the network, in bytes per second.
    #[serde(rename = "net_out_bytes_per_s")]
    NetOut,
    /// Memory that was written, in bytes per second: distinct pages x their size.
    #[serde(rename = "written_bytes_per_s")]
    Written,
    /// Block I/O on the devices of its volumes, both ways, in requests per second.
    #[serde(rename = "volume_operations_per_s")]
    VolumeOperations,
    /// The same in bytes per second.
    #[serde(rename = "volume_bytes_per_s")]
    VolumeBytes,
    /// What went through its network port, headers included, in bytes per second of the fuller direction.
    #[serde(rename = "port_bytes_per_s")]
    Port,
}

impl Resource {
    /// All of them, in the order in which they are shown.
    pub const ALL: [Self; 10] = [
        Self::Cpu,
        Self::Memory,
        Self::Io,
        Self::IoLatency,
        Self::NetIn,
        Self::NetOut,
        Self::Written,
        Self::VolumeOperations,
        Self::VolumeBytes,
        Self::Port,
    ];

    /// Its name, as it is written in JSON: with its unit, but for `cpu` (reference cores) and `memory` (bytes).
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Io => "io_bytes_per_s",
            Self::IoLatency => "io_latency_ns",
            Self::NetIn => "net_in_bytes_per_s",
            Self::NetOut => "net_out_bytes_per_s",
            Self::Written => "written_bytes_per_s",
            Self::VolumeOperations => "volume_operations_per_s",
            Self::VolumeBytes => "volume_bytes_per_s",
            Self::Port => "port_bytes_per_s",
        }
    }
}

/// What an instance used in one window; `None` is what is not known of it, which is not 0.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// Reference cores: cores x the performance of the pool they were used on, so that it stays comparable when the instance
    /// moves.
    pub reference_cores: f64,
    /// Memory, in bytes.
    pub memory_bytes: f64,
    /// Block I/O, both ways.
    pub io_bytes_per_s: Option<f64>,
    /// What 99 in 100 requests did not exceed; `None` also where there was no request.
    pub io_latency_ns: Option<f64>,
    /// Received.
    pub net_in_bytes_per_s: Option<f64>,
    /// Sent.
    pub net_out_bytes_per_s: Option<f64>,
    /// Memory written.
    pub written_bytes_per_s: Option<f64>,
    /// Requests on the devices of its volumes; `None` also where it has none.
    pub volume_operations_per_s: Option<f64>,
    /// The same in bytes.
    pub volume_bytes_per_s: Option<f64>,
    /// What went through its port, in the fuller direction; `None` also where it has none.
    pub port_bytes_per_s: Option<f64>,
}

impl Usage {
    /// How much of one resource.
    pub fn of(&self, resource: Resource) -> Option<f64> {
        match resource {
            Resource::Cpu => Some(self.reference_cores),
            Resource::Memory => Some(self.memory_bytes),
            Resource::Io => self.io_bytes_per_s,
            Resource::IoLatency => self.io_latency_ns,
            Resource::NetIn => self.net_in_bytes_per_s,
            Resource::NetOut => self.net_out_bytes_per_s,
            Resource::Written => self.written_bytes_per_s,
            Resource::VolumeOperations => self.volume_operations_per_s,
            Resource::VolumeBytes => self.volume_bytes_per_s,
            Resource::Port => self.port_bytes_per_s,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_what_is_written() {
        for resource in Resource::ALL {
            assert_eq!(serde_json::to_value(resource).unwrap(), resource.name());
        }
    }
}
