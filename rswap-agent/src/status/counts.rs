//! What can be counted of what instances do.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::spans::Sum;
use crate::profile::{Operation, Profile};

/// What was counted. `null`: it was known of no window.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Counts {
    /// CPU time, in microseconds.
    pub cpu_us: Option<u64>,
    /// Time in which a thread waited for a CPU (PSI `some`), in microseconds.
    pub cpu_pressure_some_us: Option<u64>,
    /// Time in which none of its threads ran, and some could have (PSI `full`), in microseconds.
    pub cpu_pressure_full_us: Option<u64>,
    /// Times that one of its threads went from one core to another.
    pub core_migrations: Option<u64>,
    /// Time in which a thread waited for I/O (PSI `some`), in microseconds.
    pub io_pressure_some_us: Option<u64>,
    /// Time in which all of its threads that had something to do waited for I/O (PSI `full`), in microseconds.
    pub io_pressure_full_us: Option<u64>,
    /// Payload received over TCP, in bytes.
    pub tcp_bytes_in: Option<u64>,
    /// Payload sent over TCP, in bytes.
    pub tcp_bytes_out: Option<u64>,
    /// Times that something was sent again.
    pub tcp_retransmits: Option<u64>,
    /// Connections that it made.
    pub tcp_opened: Option<u64>,
    /// Connections that were made to it.
    pub tcp_accepted: Option<u64>,
    /// Connections that it tried to make in vain.
    pub tcp_failed: Option<u64>,
    /// Connections that ended.
    pub tcp_closed: Option<u64>,
    /// Connections to it that were dropped before it could accept them.
    pub tcp_listen_drops: Option<u64>,
    /// Page faults served from memory.
    pub minor_faults: Option<u64>,
    /// Page faults that waited for a disk or for swap.
    pub major_faults: Option<u64>,
    /// Pages fetched again that reclaim had taken.
    pub refaults: Option<u64>,
    /// Time in which a thread waited for memory (PSI `some`), in microseconds.
    pub memory_pressure_some_us: Option<u64>,
    /// Time in which all of its threads that had something to do waited for memory (PSI `full`), in microseconds.
    pub memory_pressure_full_us: Option<u64>,
    /// Block I/O, of each device and operation that had any.
    pub block: Vec<BlockBytes>,
}

/// Block I/O of one device and operation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BlockBytes {
    /// `major:minor`, or `other`.
    pub device: String,
    /// What the requests do.
    pub operation: Operation,
    /// Bytes completed.
    pub bytes: u64,
}

/// What was counted over the spans.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CountsOver {
    /// The last window.
    pub window: Counts,
    /// The last minute: 60 to 70 seconds, as far as the instance was shown.
    pub minute: Counts,
    /// The last hour: 60 to 65 minutes.
    pub hour: Counts,
    /// Since the instance is shown.
    pub total: Counts,
}

impl Counts {
    /// What was counted in one window.
    pub(super) fn of(profile: &Profile) -> Self {
        let Profile { cpu, io, tcp, memory, .. } = profile;
        // Made of whole microseconds, and the same again: whatever the window's length, a double has far more digits.
        let us = |share: f64| (share * profile.window_ms as f64 * 1e3).round() as u64;
        let bytes = |bytes: u64| profile.tcp_counted.then_some(bytes);
        let connections = tcp.connections.as_ref();
        let mut counts = Self {
            cpu_us: Some(us(cpu.cores)),
            cpu_pressure_some_us: cpu.pressure_some.map(us),
            cpu_pressure_full_us: cpu.pressure_full.map(us),
            core_migrations: cpu.migrations,
            io_pressure_some_us: io.pressure_some.map(us),
            io_pressure_full_us: io.pressure_full.map(us),
            tcp_bytes_in: bytes(tcp.bytes_in),
            tcp_bytes_out: bytes(tcp.bytes_out),
            tcp_retransmits: tcp.retransmits,
            tcp_opened: connections.map(|of| of.opened),
            tcp_accepted: connections.map(|of| of.accepted),
            tcp_failed: connections.map(|of| of.failed),
            tcp_closed: connections.map(|of| of.closed),
            tcp_listen_drops: tcp.listen_drops,
            minor_faults: memory.faults.map(|of| of.minor),
            major_faults: memory.faults.map(|of| of.major),
            refaults: memory.refaults,
            memory_pressure_some_us: memory.pressure_some.map(us),
            memory_pressure_full_us: memory.pressure_full.map(us),
            block: Vec::new(),
        };
        for of in profile.block.iter().filter(|_| profile.block_counted) {
            let (device, operation) = (of.device.clone(), of.operation);
            counts.add_block(BlockBytes { device, operation, bytes: of.bytes });
        }
        counts
    }

    /// Devices and operations stay in their order.
    fn add_block(&mut self, more: BlockBytes) {
        match self.block.binary_search_by(|of| of.place().cmp(&more.place())) {
            Ok(place) => {
                let sum = &mut self.block[place].bytes;
                *sum = sum.saturating_add(more.bytes);
            }
            Err(place) => self.block.insert(place, more),
        }
    }

    /// All but what is by device.
    fn numbers(&mut self) -> [&mut Option<u64>; 19] {
        [
            &mut self.cpu_us,
            &mut self.cpu_pressure_some_us,
            &mut self.cpu_pressure_full_us,
            &mut self.core_migrations,
            &mut self.io_pressure_some_us,
            &mut self.io_pressure_full_us,
            &mut self.tcp_bytes_in,
            &mut self.tcp_bytes_out,
            &mut self.tcp_retransmits,
            &mut self.tcp_opened,
            &mut self.tcp_accepted,
            &mut self.tcp_failed,
            &mut self.tcp_closed,
            &mut self.tcp_listen_drops,
            &mut self.minor_faults,
            &mut self.major_faults,
            &mut self.refaults,
            &mut self.memory_pressure_some_us,
            &mut self.memory_pressure_full_us,
        ]
    }
}

impl BlockBytes {
    fn place(&self) -> (&str, Operation) {
        (&self.device, self.operation)
    }
}

impl Sum for Counts {
    fn is_nothing(&self) -> bool {
        *self == Self::default()
    }

    fn add(&mut self, other: &Self) {
        let mut other = other.clone();
        for (sum, more) in self.numbers().into_iter().zip(other.numbers()) {
            if let Some(more) = more {
                *sum = Some(sum.unwrap_or_default().saturating_add(*more));
            }
        }
        other.block.into_iter().for_each(|more| self.add_block(more));
    }

    fn packed(&self) -> impl Serialize {
        self
    }

    fn unpack(bytes: &[u8]) -> postcard::Result<(Self, &[u8])> {
        postcard::take_from_bytes(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        profile::{BlockProfile, CpuProfile, IoProfile, MemoryProfile, TcpProfile},
        units::UnixMillis,
    };

    fn profile() -> Profile {
        Profile {
            instance: "a".parse().unwrap(),
            at: UnixMillis(0),
            window_ms: 1003,
            cpu: CpuProfile::default(),
            block: Vec::new(),
            block_counted: false,
            disk_neighbours: Vec::new(),
            io: IoProfile::default(),
            tcp: TcpProfile::default(),
            tcp_counted: false,
            memory: MemoryProfile::default(),
        }
    }

    fn block(device: &str, operation: Operation, bytes: u64) -> BlockProfile {
        BlockProfile {
            device: device.to_owned(),
            operation,
            bytes,
            latency_ns: Default::default(),
            queue_ns: Default::default(),
            not_split: 0,
            in_flight: 0.0,
        }
    }

    #[test]
    fn what_is_not_known_is_not_counted() {
        let mut seen = profile();
        seen.tcp.bytes_in = 5;
        seen.block = vec![block("8:0", Operation::Read, 7)];
        assert_eq!(Counts::of(&seen), Counts { cpu_us: Some(0), ..Counts::default() });
        (seen.tcp_counted, seen.block_counted) = (true, true);
        let counts = Counts::of(&seen);
        assert_eq!((counts.tcp_bytes_in, counts.tcp_bytes_out), (Some(5), Some(0)));
        assert_eq!(counts.block.len(), 1);
    }

    #[test]
    fn microseconds_are_those_that_the_kernel_counted() {
        let mut seen = profile();
        for us in [0_u64, 1, 999, 333_333, 1_002_999, 1_003_000, 64_000_001] {
            let share = us as f64 / (seen.window_ms as f64 * 1e3);
            (seen.cpu.cores, seen.memory.pressure_full) = (share, Some(share));
            let counts = Counts::of(&seen);
            assert_eq!((counts.cpu_us, counts.memory_pressure_full_us), (Some(us), Some(us)));
        }
    }

    #[test]
    fn every_number_is_added_and_each_device_to_its_own() {
        let mut seen = profile();
        seen.block_counted = true;
        seen.block = vec![block("8:0", Operation::Write, 3), block("259:0", Operation::Read, 1)];
        let serde_json::Value::Object(mut members) = serde_json::to_value(Counts::of(&seen)).unwrap() else {
            panic!("no members");
        };
        for (name, member) in &mut members {
            if name != "block" {
                *member = 4.into();
            }
        }
        let one: Counts = serde_json::from_value(members.clone().into()).unwrap();
        let mut sum = Counts::default();
        sum.add(&one);
        assert_eq!(sum, one);
        sum.add(&one);
        sum.add(&Counts::default());
        seen.block = vec![block("8:0", Operation::Read, 9)];
        sum.add(&Counts { block: Counts::of(&seen).block, ..Counts::default() });
        let serde_json::Value::Object(added) = serde_json::to_value(&sum).unwrap() else {
            panic!("no members");
        };
        for (name, member) in added.iter().filter(|(name, _)| *name != "block") {
            assert_eq!(*member, serde_json::json!(8), "{name}");
        }
        let of: Vec<_> = sum.block.iter().map(|of| (of.device.as_str(), of.operation, of.bytes)).collect();
        let expected =
            [("259:0", Operation::Read, 2), ("8:0", Operation::Read, 9), ("8:0", Operation::Write, 6)];
        assert_eq!(of, expected);
        assert_eq!(unpacked(&sum), sum);
    }

    fn unpacked(counts: &Counts) -> Counts {
        let bytes = postcard::to_stdvec(&counts.packed()).unwrap();
        let (unpacked, others) = Counts::unpack(&bytes).unwrap();
        assert!(others.is_empty());
        unpacked
    }
}
