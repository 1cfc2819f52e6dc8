//! What instances used, a file per instance, for `rswap simulate`: "what would have been done last week?"

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
};

use crate::{
    config::RecordConfig,
    forecast::Usage,
    instance::InstanceName,
    profile::{Profile, histogram::Histogram},
    units::UnixMillis,
};

/// Means over a row's windows; `cpu_max` is the highest one, `mem` the last, `io_latency_ns` what 99 in 100 requests did not exceed.
const HEADER: &str = "trace,instance_id,class,timestamp_s,cpu,cpu_max,mem,\
                      io_bytes_per_s,io_latency_ns,net_in_bytes_per_s,net_out_bytes_per_s\n";
/// A file that is longer is put aside, and replaces the one put aside before: months, at a row a minute.
const LONGEST_BYTES: u64 = 16 << 20;

/// Writes rows of means.
pub(super) struct Recorder {
    directory: PathBuf,
    every_ms: u64,
    sums: BTreeMap<InstanceName, Sum>,
}

/// Windows since the last row.
struct Sum {
    since: UnixMillis,
    cores: f64,
    most: f64,
    bytes: u64,
    windows: u32,
    io: Mean,
    latency_ns: Histogram,
    net_in: Mean,
    net_out: Mean,
}

/// A mean of what was measured; nothing, if nothing was.
#[derive(Clone, Copy, Default)]
struct Mean {
    sum: f64,
    count: u32,
}

impl Mean {
    fn add(&mut self, value: Option<f64>) {
        if let Some(value) = value.filter(|value| value.is_finite()) {
            (self.sum, self.count) = (self.sum + value, self.count + 1);
        }
    }

    fn field(self) -> String {
        if self.count == 0 { String::new() } else { format!("{:.1}", self.sum / f64::from(self.count)) }
    }
}

impl Sum {
    fn new(since: UnixMillis) -> Self {
        Self {
            since,
            cores: 0.0,
            most: 0.0,
            bytes: 0,
            windows: 0,
            io: Mean::default(),
            latency_ns: Histogram::default(),
            net_in: Mean::default(),
            net_out: Mean::default(),
        }
    }

    fn add(&mut self, profile: &Profile, usage: &Usage) {
        self.cores += usage.reference_cores;
        self.most = self.most.max(usage.reference_cores);
        self.bytes = profile.memory.resident_bytes;
        self.windows += 1;
        self.io.add(usage.io_bytes_per_s);
        self.latency_ns.merge(&profile.io_latency_ns());
        self.net_in.add(usage.net_in_bytes_per_s);
        self.net_out.add(usage.net_out_bytes_per_s);
    }

    fn row(&self, name: &InstanceName, class: &str) -> String {
        // A class may be any label's text.
        let class: String = class.chars().map(|c| if c == ',' || c.is_control() { '_' } else { c }).collect();
        format!(
            "recorded,{name},{class},{:.1},{:.4},{:.4},{},{},{},{},{}\n",
            self.since.0 as f64 / 1000.0,
            self.cores / f64::from(self.windows),
            self.most,
            self.bytes,
            self.io.field(),
            self.latency_ns.quantile(0.99).map_or_else(String::new, |ns| ns.to_string()),
            self.net_in.field(),
            self.net_out.field(),
        )
    }
}

impl Recorder {
    /// `None` where nothing is to be recorded.
    pub(super) fn new(config: &RecordConfig) -> Option<Self> {
        let directory = config.directory.clone()?;
        Some(Self { directory, every_ms: config.every_s.saturating_mul(1000), sums: BTreeMap::new() })
    }

    /// A window of an instance of this class.
    pub(super) fn window(&mut self, profile: &Profile, class: &str, usage: &Usage) {
        let (name, at) = (&profile.instance, profile.at);
        if !usage.reference_cores.is_finite() {
            return;
        }
        let sum = self.sums.entry(name.clone()).or_insert_with(|| Sum::new(at));
        sum.add(profile, usage);
        if at.since(sum.since) < self.every_ms {
            return;
        }
        let row = sum.row(name, class);
        *sum = Sum::new(at);
        if let Err(error) = append(&self.directory, name, &row) {
            tracing::warn!(%error, directory = %self.directory.display(), instance = %name, "not recorded");
        }
    }

    /// The instance is gone.
    pub(super) fn forget(&mut self, name: &InstanceName) {
        self.sums.remove(name);
    }
}

fn append(directory: &Path, name: &InstanceName, row: &str) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    let path = directory.join(format!("{name}.csv"));
    let length = match fs::metadata(&path) {
        Ok(found) => found.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(error),
    };
    // One that was begun with other columns is put aside, too.
    let full = length > LONGEST_BYTES || (length > 0 && !begins_with_header(&path)?);
    if full {
        fs::rename(&path, directory.join(format!("{name}.csv.old")))?;
    }
    let mut file = OpenOptions::new().create(true).append(true).open(&path)?;
    let header = if full || length == 0 { HEADER } else { "" };
    file.write_all(format!("{header}{row}").as_bytes())
}

fn begins_with_header(path: &Path) -> io::Result<bool> {
    let mut head = Vec::new();
    fs::File::open(path)?.take(HEADER.len() as u64).read_to_end(&mut head)?;
    Ok(head == HEADER.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::{BlockProfile, CpuProfile, MemoryProfile, Operation, TcpProfile};

    fn window(second: u64) -> Profile {
        let mut latency_ns = Histogram::default();
        (0..200).for_each(|request| latency_ns.record(if request < 10 { 1 << 24 } else { 1 << 20 }));
        let block = BlockProfile {
            device: "8:0".to_owned(),
            operation: Operation::Read,
            bytes: 4096,
            latency_ns,
            queue_ns: Histogram::default(),
            not_split: 0,
            in_flight: 0.0,
        };
        Profile {
            instance: "web".parse().unwrap(),
            at: UnixMillis(second * 1000),
            window_ms: 1000,
            cpu: CpuProfile { cores: f64::from(second as u32 % 2), ..CpuProfile::default() },
            block: if second.is_multiple_of(2) { vec![block] } else { vec![] },
            block_counted: true,
            disk_neighbours: Vec::new(),
            io: Default::default(),
            tcp: TcpProfile { bytes_in: 100, bytes_out: 7, ..TcpProfile::default() },
            tcp_counted: true,
            memory: MemoryProfile { resident_bytes: 5, ..MemoryProfile::default() },
        }
    }

    fn record(recorder: &mut Recorder, profile: &Profile) {
        recorder.window(profile, "a, b", &super::super::usage::of(profile, 1.0, Default::default()));
    }

    #[test]
    fn rows_are_means_that_the_simulator_reads() {
        let directory = tempfile::tempdir().unwrap();
        let config = RecordConfig { directory: Some(directory.path().to_owned()), every_s: 60 };
        let mut recorder = Recorder::new(&config).unwrap();
        let file = directory.path().join("web.csv");
        fs::write(&file, "trace,instance_id,class,timestamp_s,cpu\nrecorded,web,,1,7\n").unwrap();
        (0..=600).for_each(|second| record(&mut recorder, &window(second)));
        assert!(fs::read_to_string(directory.path().join("web.csv.old")).unwrap().contains("web,,1,7"));
        let text = fs::read(directory.path().join("web.csv")).unwrap();
        let columns = rswap_simulate::traces::parse(text.as_slice()).unwrap();
        let cpu = columns.iter().find(|column| column.name == "cpu").unwrap();
        assert_eq!((cpu.series[0].instance.as_str(), cpu.series[0].values.len()), ("web", 2));
        assert!((cpu.series[0].values[0] - 0.5).abs() < 0.01);
        let mean =
            |name: &str| columns.iter().find(|column| column.name == name).unwrap().series[0].values[0];
        assert!((mean("io_bytes_per_s") - 2048.0).abs() < 50.0, "{}", mean("io_bytes_per_s"));
        // 5 in 100 requests took 16 times as long: they are the 99th percentile.
        assert!((mean("io_latency_ns") / f64::from(1 << 24) - 1.0).abs() < 1.0 / 16.0);
        assert_eq!((mean("net_in_bytes_per_s"), mean("net_out_bytes_per_s")), (100.0, 7.0));
        assert_eq!(cpu.series[0].class, "a_ b");
    }
}
